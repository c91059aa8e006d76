"""Cache of decoded images: each is decoded and resized once, for all processes and later runs."""

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


CHUNK, CHUNK_BYTES = 256, 2**26  # limits on the images that are decoded at a time


def cached(source: Source, settings: dict[str, Any], cache_dir: str | None = None) -> FaceDataset:
    """Open the decoded images of a source. The first process to ask decodes them.

    Args:
        source ([`Source`]): The images.
        settings (`dict`): Everything that affects the result. A hash of it names the cache.
        cache_dir (`str`, *optional*): Folder of all caches; defaults to `ddpm-faces` beside the Hub's cache.

    Raises:
        ValueError: `cache_dir` cannot be written or is full, or images cannot be read.
    """
    root = Path(cache_dir or Path(HF_HOME, "ddpm-faces")).expanduser()
    cache = root / content_hash(json.dumps(settings, sort_keys=True, default=str).encode())
    dataset = _open_cache(cache)  # first without the lock, because a shared cache may be read-only
    if dataset is not None:
        return dataset
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{cache}.lock").acquire()  # the first process decodes, the others wait
    except OSError as error:
        raise ValueError(f"`cache_dir` {str(root)!r} cannot be written ({error}): choose another folder.") from error
    with lock:
        dataset = _open_cache(cache)
        if dataset is None:
            _build_cache(cache, source, settings)
            dataset = _read_cache(cache)
    return dataset


def _build_cache(cache: Path, source: Source, settings: dict[str, Any]) -> None:
    """Decode and resize in threads (PIL releases the interpreter lock), and write the complete cache or nothing."""
    size, mode, num_images = settings["size"], MODES[settings["channels"]], settings["num_images"]
    image_bytes = len(mode) * size[0] * size[1]  # a lower bound: uncropped images take more
    needed, free = num_images * image_bytes, shutil.disk_usage(cache.parent).free
    if needed > free:
        raise ValueError(
            f"`cache_dir` {str(cache.parent)!r} has {free:,} bytes free, and the decoded images need {needed:,}: "
            "choose another folder."
        )
    values, class_names, number = _classes(source)
    captions = None if source.captions is None else source.captions()
    resize = picture_to_tensor if settings["crop"] == "center" else resize_to_cover

    def decode(index: int) -> tuple[str, tuple[torch.Tensor, np.ndarray, int | None] | None]:
        name, value = source.read(index)
        try:
            label = None if values is None else number(values[index])
            pixels = resize(open_image(value, settings["max_image_pixels"]), size, mode).contiguous()
        except MemoryError:  # not an error of the image
            raise
        except Exception as error:  # PIL raises many kinds of errors on damaged images
            return f"{name}: {error or type(error).__name__}", None
        return name, (pixels, describe(pixels), label)

    folder = unfinished_path(cache)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        names, labels, table, unreadable, kept = [], [], [], [], []
        chunk = min(CHUNK, max(16, CHUNK_BYTES // image_bytes))
        with (
            ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool,
            (folder / "pixels.bin").open("wb") as file,
            tqdm(total=num_images, desc="Reading images", unit="img") as bar,
        ):
            for first in range(0, num_images, chunk):
                indices = range(first, min(first + chunk, num_images))
                for index, (name, decoded) in zip(indices, pool.map(decode, indices), strict=True):
                    if decoded is None:
                        unreadable.append(name)
                        continue
                    pixels, description, label = decoded
                    file.write(pixels.numpy().data)
                    names.append(name)
                    table.append(description)
                    labels.append(label)
                    kept.append(index)
                bar.update(len(indices))
        if unreadable and (not settings["skip_unreadable"] or not names):
            raise ValueError(
                f"{len(unreadable)} of {num_images} images cannot be read:\n{shorten(unreadable)}\n"
                "Set `skip_unreadable` to skip such images."
            )
        np.save(folder / "table.npy", np.stack(table))
        if values is not None:
            np.save(folder / "labels.npy", np.array(labels, dtype=np.int64))
        if captions is not None:
            (folder / "captions.json").write_text(json.dumps([captions[index] for index in kept]))
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
    """Open the cache that [`_build_cache`] has written, or return `None` if it is missing or incomplete."""
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
    captions = json.loads((cache / "captions.json").read_text()) if "captions.json" in info["files"] else None
    dataset = FaceDataset(images, size, labels, info["class_names"], info["unreadable"], table, captions)
    dataset._cache = cache
    return dataset


def _classes(source: Source) -> tuple[list[Any] | None, list[str] | None, Callable[[Any], int]]:
    """Return the label of each image, the class names, and a function from labels to class numbers."""
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
