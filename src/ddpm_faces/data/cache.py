"""Decoded images on disk: each is decoded and resized once, for all processes and later runs."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from ..files import commit, unfinished_path
from .dataset import FaceDataset, content_hash, describe, map_images
from .folders import shorten
from .images import MODES, open_image, picture_to_tensor, resize_to_cover
from .labels import class_number
from .sources import Source


CHUNK, CHUNK_BYTES = 256, 2**26  # what is decoded at a time, at most


def cached(source: Source, settings: dict[str, Any], cache_dir: str | None = None) -> FaceDataset:
    """Open the decoded images of a source, which whoever asks first decodes.

    Args:
        source ([`Source`]): The images.
        settings (`dict`): All that decides what is read and how; the cache is found by a hash of it.
        cache_dir (`str`, *optional*): Where to; by default `ddpm-faces` beside the Hub's cache.

    Raises:
        ValueError: A `cache_dir` that cannot be written or has no room, or images that cannot be read.
    """
    root = Path(cache_dir or Path(HF_HOME, "ddpm-faces")).expanduser()
    cache = root / content_hash(json.dumps(settings, sort_keys=True, default=str).encode())
    dataset = _open_cache(cache)  # without the lock first: a cache may be shared, and read-only
    if dataset is not None:
        return dataset
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{cache}.lock").acquire()  # whoever comes first decodes, the others wait
    except OSError as error:
        raise ValueError(f"`cache_dir` {str(root)!r} cannot be written ({error}): choose another.") from error
    with lock:
        dataset = _open_cache(cache)
        if dataset is None:
            _build_cache(cache, source, settings)
            dataset = _read_cache(cache)
    return dataset


def _build_cache(cache: Path, source: Source, settings: dict[str, Any]) -> None:
    """Decode and resize in threads (PIL lets go of the interpreter), and write what comes of it, or nothing."""
    size, mode, num_images = settings["size"], MODES[settings["channels"]], settings["num_images"]
    image_bytes = len(mode) * size[0] * size[1]  # at least: what is yet to be cropped takes more
    needed, free = num_images * image_bytes, shutil.disk_usage(cache.parent).free
    if needed > free:
        raise ValueError(
            f"`cache_dir` {str(cache.parent)!r} has {free:,} bytes free, and the decoded pictures take {needed:,}: "
            "choose another."
        )
    values, class_names, number = _classes(source)
    resize = picture_to_tensor if settings["crop"] == "center" else resize_to_cover

    def decode(index: int) -> tuple[str, tuple[torch.Tensor, np.ndarray, int | None] | None]:
        name, value = source.read(index)
        try:
            label = None if values is None else number(values[index])
            pixels = resize(open_image(value, settings["max_image_pixels"]), size, mode).contiguous()
        except MemoryError:  # which is not the image's fault
            raise
        except Exception as error:  # PIL raises many kinds on an image that is cut off or damaged
            return f"{name}: {error or type(error).__name__}", None
        return name, (pixels, describe(pixels), label)

    folder = unfinished_path(cache)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        names, labels, table, unreadable = [], [], [], []
        chunk = min(CHUNK, max(16, CHUNK_BYTES // image_bytes))
        with (
            ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool,
            (folder / "pixels.bin").open("wb") as file,
            tqdm(total=num_images, desc="Reading pictures", unit="img") as bar,
        ):
            for first in range(0, num_images, chunk):
                indices = range(first, min(first + chunk, num_images))
                for name, decoded in pool.map(decode, indices):
                    if decoded is None:
                        unreadable.append(name)
                        continue
                    pixels, description, label = decoded
                    file.write(pixels.numpy().data)
                    names.append(name)
                    table.append(description)
                    labels.append(label)
                bar.update(len(indices))
        if unreadable and (not settings["skip_unreadable"] or not names):
            raise ValueError(
                f"{len(unreadable)} of {num_images} pictures cannot be read:\n{shorten(unreadable)}\n"
                "`skip_unreadable` leaves such pictures out."
            )
        np.save(folder / "table.npy", np.stack(table))
        if values is not None:
            np.save(folder / "labels.npy", np.array(labels, dtype=np.int64))
        (folder / "names.json").write_text(json.dumps(names))
        info = {
            "class_names": class_names,
            "unreadable": unreadable,
            "settings": settings,
            "files": {path.name: path.stat().st_size for path in folder.iterdir()},
        }
        (folder / "info.json").write_text(json.dumps(info, default=str))
        commit(cache)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_cache(cache: Path) -> FaceDataset | None:
    """What [`_build_cache`] has written, or `None` where there is nothing that is whole."""
    try:
        info = json.loads((cache / "info.json").read_text())
        if any((cache / name).stat().st_size != size for name, size in info["files"].items()):
            return None
    except (OSError, ValueError, KeyError):
        return None
    return _read_cache(cache)


def _read_cache(cache: Path) -> FaceDataset:
    info = json.loads((cache / "info.json").read_text())
    size = tuple(info["settings"]["size"])
    images, table = map_images(cache, size)
    labels = torch.from_numpy(np.load(cache / "labels.npy")) if "labels.npy" in info["files"] else None
    dataset = FaceDataset(images, size, labels, info["class_names"], info["unreadable"], table)
    dataset._cache = cache
    return dataset


def _classes(source: Source) -> tuple[list[Any] | None, list[str] | None, Callable[[Any], int]]:
    """The label of each image, the names of the classes, and what turns a label into a class, or raises."""
    if source.labels is None:
        return None, None, class_number
    values = source.labels()
    if source.class_names is not None:
        number = partial(class_number, num_classes=len(source.class_names), is_class_label=True)
        return values, source.class_names, number
    classes = sorted({value for value in values if value is not None})
    number_of = {value: number for number, value in enumerate(classes)}
    names = [str(value) for value in classes]
    return values, names, lambda value: class_number(number_of.get(value))
