"""Generate many images into shards, on one or several processes. An interrupted run resumes where it stopped.

A shard holds consecutive images, and exists only once it is complete:

    generation.json                    the settings, so that a folder never mixes two models or recipes
    00000/seed-00000042.png            with the format "png"
    train-00000-of-00050.tar           with "webdataset": seed-00000042.png and seed-00000042.json of each image
    data/train-00000-of-00050.parquet  with "parquet": the columns image, seed and, with classes, label

`datasets.load_dataset` opens each of these folders. Shards have fixed contents and batches, so that the images do not
depend on the number of processes.
"""

import io
import json
import os
import queue
import tarfile
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from tqdm.auto import tqdm

from .checks import check_integer
from .files import check_writable, commit, delete_unfinished, read_json_object, replacing, sync, unfinished_path
from .generation import Recipe, metadata, png_bytes, sample, with_sampler
from .pipeline_ddpm_faces import DDPMFacesPipeline


FORMATS = ("png", "webdataset", "parquet")
MANIFEST = "generation.json"
MAX_WAITING = 4  # batches that wait for the writer


def generate_shards(
    pipeline: DDPMFacesPipeline,
    recipe: Recipe,
    output: str | os.PathLike,
    model: str,
    format: str = "png",
    shard_size: int = 1000,
    batch_size: int = 64,
) -> list[Path]:
    """Generate images into a folder of shards, or resume an interrupted run. Every process must call this.

    Args:
        pipeline ([`DDPMFacesPipeline`]): The model, on the device of this process.
        recipe ([`Recipe`]): What to generate.
        output (`str` or `os.PathLike`): New folder, or that of an interrupted run with the same settings.
        model (`str`): Name of the model for the metadata.
        format (`str`, defaults to `"png"`): `"png"`, `"webdataset"` or `"parquet"`.
        shard_size (`int`, defaults to 1000): Images in a shard.
        batch_size (`int`, defaults to 64): Images that a process generates at once.

    Returns:
        `list[Path]`: The shards.

    Raises:
        ValueError: An argument is out of range, or `output` holds other files or images with other settings.
    """
    output = Path(output)
    check_format(output, format)
    check_integer("shard_size", shard_size, 1)
    check_integer("batch_size", batch_size, 1)
    recipe = recipe.resolve(pipeline)
    settings = {"model": model, "weights": _checksum(pipeline), "format": format, "shard_size": shard_size}
    settings |= {name: value for name, value in asdict(recipe).items() if value is not None}
    _check_folder(output, settings)
    accelerator = Accelerator()
    accelerator.wait_for_everyone()  # the main process must not write before all have checked the folder

    # 1. Which shards are missing, as the main process sees it
    paths = _shard_paths(output, format, recipe.num_images, shard_size)
    missing: list[int] = []
    if accelerator.is_main_process:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        delete_unfinished(paths[0].parent)
        with replacing(output / MANIFEST) as path:
            path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        missing = [number for number, path in enumerate(paths) if not path.exists()]
    (missing,) = broadcast_object_list([missing])

    # 2. Generate this process's share of them
    pipeline = with_sampler(pipeline, recipe)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    shards = [range(number * shard_size, min((number + 1) * shard_size, recipe.num_images)) for number in mine]
    bar = tqdm(
        total=sum(map(len, shards)),
        desc="Generating" if accelerator.num_processes == 1 else f"Generating on each of {accelerator.num_processes}",
        unit="image",
        disable=None if accelerator.is_main_process else True,
    )
    with bar, _writer(bar) as submit:
        for number, indices in zip(mine, shards, strict=True):
            write = _SHARD_WRITERS[format](paths[number], recipe, model)
            for first in range(0, len(indices), batch_size):
                part = indices[first : first + batch_size]
                images = sample(pipeline, recipe, part).images
                submit(write, part, images, part[-1] == indices[-1])
    accelerator.wait_for_everyone()
    return paths


def check_format(output: str | os.PathLike, format: str) -> None:
    """Raise a `ValueError` unless `format` is known and `output` can be a folder of shards."""
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {format!r}.")
    if Path(output).suffix.lower() in Image.registered_extensions():
        raise ValueError(f"`output` must be a folder with `format` {format!r}, got {os.fspath(output)!r}.")
    check_writable(output)


def _check_folder(output: Path, settings: dict[str, Any]) -> None:
    """Raise a `ValueError` if the folder has other files, or images with other settings."""
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / MANIFEST).is_file():
        raise ValueError(f"`output` {str(output)!r} must be a new or empty folder, or hold an interrupted run.")
    found = read_json_object(output / MANIFEST)
    for name in [*settings, *found]:
        if found.get(name) != json.loads(json.dumps(settings.get(name))):
            raise ValueError(
                f"`output` {str(output)!r} holds images with a `{name}` of {found.get(name)!r}, not "
                f"{settings.get(name)!r}; choose another folder."
            )


def _checksum(pipeline: DDPMFacesPipeline) -> str:
    """Return a checksum of all weights, so that a model that was trained on is not taken for the one before."""
    checksum = 0
    for network in (pipeline.unet, pipeline.guide, pipeline.student):
        for tensor in [] if network is None else network.state_dict().values():
            checksum = zlib.crc32(tensor.detach().float().cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"


def _shard_paths(output: Path, format: str, num_images: int, shard_size: int) -> list[Path]:
    count = -(-num_images // shard_size)
    names = {
        "png": "{number:05}",
        "webdataset": "train-{number:05}-of-{count:05}.tar",
        "parquet": "data/train-{number:05}-of-{count:05}.parquet",
    }
    return [output / names[format].format(number=number, count=count) for number in range(count)]


@contextmanager
def _writer(bar: tqdm) -> Iterator[Callable[..., None]]:
    """Yield a function that has another thread write images, so that the device does not wait for files."""
    waiting: queue.Queue = queue.Queue(MAX_WAITING)
    problems: list[BaseException] = []

    def work() -> None:
        while (task := waiting.get()) is not None:
            if problems:
                continue  # empties the queue, so that nobody waits for it
            write, part, images, is_last = task
            try:
                write(part, images, is_last)
                bar.update(len(images))
            except BaseException as error:
                problems.append(error)

    def submit(*task: Any) -> None:
        waiting.put(task)
        if problems:
            raise problems[0]

    thread = threading.Thread(target=work, name="shard writer", daemon=True)
    thread.start()
    try:
        yield submit
    finally:
        waiting.put(None)
        thread.join()
    if problems:
        raise problems[0]


class _Shard(ABC):
    """Writes the images of a shard under a temporary name, and renames it when the last is written."""

    def __init__(self, path: Path, recipe: Recipe, model: str) -> None:
        self.path, self.recipe, self.model = path, recipe, model
        self.unfinished = unfinished_path(path)

    def __call__(self, indices: Sequence[int], images: Sequence[Image.Image], is_last: bool) -> None:
        for index, image in zip(indices, images, strict=True):
            seed = self.recipe.seed + index
            recipe = self.recipe.of_image(index)
            facts: dict[str, Any] = {"seed": seed}
            facts |= {"label": recipe.class_labels[0]} if recipe.class_labels else {}
            facts |= {"prompt": recipe.prompts[0]} if recipe.prompts else {}
            self.add(f"seed-{seed:08}", png_bytes(image, metadata(self.model, recipe, seed)), facts)
        if is_last:
            self.close()

    @abstractmethod
    def add(self, name: str, png: bytes, facts: dict[str, Any]) -> None:
        """Add an image."""

    @abstractmethod
    def close(self) -> None:
        """Give the complete shard its name."""


class _PngShard(_Shard):
    def __init__(self, path: Path, recipe: Recipe, model: str) -> None:
        super().__init__(path, recipe, model)
        self.unfinished.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, png: bytes, facts: dict[str, Any]) -> None:
        (self.unfinished / f"{name}.png").write_bytes(png)

    def close(self) -> None:
        commit(self.path)


class _TarShard(_Shard):
    def __init__(self, path: Path, recipe: Recipe, model: str) -> None:
        super().__init__(path, recipe, model)
        self.file = tarfile.open(self.unfinished, "w")  # noqa: SIM115 - `close` closes it

    def add(self, name: str, png: bytes, facts: dict[str, Any]) -> None:
        for suffix, content in (("png", png), ("json", json.dumps(facts).encode())):
            member = tarfile.TarInfo(f"{name}.{suffix}")
            member.size = len(content)
            self.file.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        self.file.close()
        sync(self.unfinished)
        self.unfinished.replace(self.path)
        sync(self.path.parent)


class _ParquetShard(_Shard):
    def __init__(self, path: Path, recipe: Recipe, model: str) -> None:
        super().__init__(path, recipe, model)
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, png: bytes, facts: dict[str, Any]) -> None:
        self.rows.append({"image": {"bytes": png, "path": f"{name}.png"}, **facts})

    def close(self) -> None:
        import datasets

        columns = {name: [row[name] for row in self.rows] for name in self.rows[0]}
        kinds = {"image": datasets.Image(), **dict.fromkeys(("seed", "label"), datasets.Value("int64"))}
        kinds["prompt"] = datasets.Value("string")
        features = datasets.Features({name: kinds[name] for name in columns})
        with replacing(self.path) as path:
            datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


_SHARD_WRITERS: dict[str, type[_Shard]] = {"png": _PngShard, "webdataset": _TarShard, "parquet": _ParquetShard}
