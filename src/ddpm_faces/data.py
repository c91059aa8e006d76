"""Pictures of faces, from wherever they are, as batches for the network.

A source is a data set on the Hub, a data set folder (parquet and the like), a folder of pictures, or nothing: then the
faces are drawn by the program. Each picture is decoded and resized once, and kept as uint8.
"""

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .drawn_faces import DrawnFaces


PICTURE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
DATA_SUFFIXES = frozenset((".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tar", ".zip"))
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# What PIL raises on a file that is no picture, is cut off, or is absurdly large.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class FaceDataset(Dataset):
    """Pictures in memory.

    Args:
        images (`torch.Tensor` of shape `(num_images, channels, height, width)`, `torch.uint8`): The pictures.
    """

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"images": self.images[index]}


def to_samples(images: torch.Tensor, random_flip: bool = False) -> torch.Tensor:
    """Turn pictures into x_0.

    Args:
        images (`torch.Tensor` of shape `(batch, channels, height, width)`, `torch.uint8`): Pictures, 0 to 255.
        random_flip (`bool`, defaults to `False`): Mirror each with probability one half.

    Returns:
        `torch.Tensor` of the same shape, `torch.float32`, in [-1, 1].
    """
    samples = images.float() / 127.5 - 1.0
    if random_flip:
        flip = torch.rand(len(samples), device=samples.device) < 0.5
        samples = torch.where(flip[:, None, None, None], samples.flip(-1), samples)
    return samples


def picture_to_tensor(image: Image.Image, size: tuple[int, int], mode: str = "RGB") -> torch.Tensor:
    """Decode one picture the way [`load_faces`] does.

    Args:
        image (`PIL.Image.Image`): A picture of any mode and size.
        size (`(int, int)`): Height and width in pixels.
        mode (`str`, defaults to `"RGB"`): `"L"`, `"RGB"` or `"RGBA"`.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`, `torch.uint8`: Upright, cropped about its centre to the
        shape of `size`, and resized with an antialiasing filter.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip it instead of scaling
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode != mode:
        image = image.convert(mode)
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def load_faces(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    resolution: int | tuple[int, int] = 64,
    channels: int = 3,
    dataset_config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    cache_dir: str | None = None,
    num_drawn_images: int = 4096,
    max_images: int | None = None,
) -> FaceDataset:
    """Read all pictures of a source.

    Args:
        dataset_name (`str`, *optional*): A data set on the Hub, or a local data set folder.
        train_data_dir (`str`, *optional*): A local folder of pictures, searched in depth, or a data set folder.
        resolution (`int` or `(int, int)`, defaults to 64):
            Side, or height and width, in pixels. Pictures are cropped about their centre to that shape, then resized.
        channels (`int`, defaults to 3): 1 (grey), 3 (RGB) or 4 (RGBA).
        dataset_config_name (`str`, *optional*): Configuration of the data set.
        split (`str`, defaults to `"train"`): Split of the data set.
        image_column (`str`, *optional*): Column of the pictures; by default the first that holds any.
        cache_dir (`str`, *optional*): Where `datasets` keeps what it downloads.
        num_drawn_images (`int`, defaults to 4096): Number of faces to draw where no source is given.
        max_images (`int`, *optional*): Read the first so many only.

    Returns:
        [`FaceDataset`]

    Raises:
        ValueError: Two sources, a folder that is missing or empty, a column that holds no pictures, or a picture that
            cannot be read, by its name.
    """
    if dataset_name is not None and train_data_dir is not None:
        raise ValueError("Give either `dataset_name` or `train_data_dir`, not both.")
    if channels not in MODES:
        raise ValueError(f"`channels` must be one of {', '.join(map(str, MODES))}, got {channels}.")
    size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"`resolution` must be a side or (height, width) in pixels, got {resolution}.")
    if max_images is not None and max_images < 1:
        raise ValueError(f"`max_images` must be at least 1 or None, got {max_images}.")

    if dataset_name is None and train_data_dir is None:
        source = _drawn_source(num_drawn_images, max(size))
    else:
        folder = _existing_folder(dataset_name, train_data_dir)
        if folder is not None and _is_picture_folder(folder):
            source = _folder_source(folder)
        else:
            name = dataset_name or train_data_dir
            source = _dataset_source(name, dataset_config_name, split, image_column, cache_dir)
    return FaceDataset(_read_all(source, max_images, size, MODES[channels]))


# A source is a number of pictures, and a function from an index to the name of a picture and either the picture, or a
# path or an open file to read it from, or None where there is none.
Source = tuple[int, Callable[[int], tuple[str, Image.Image | Path | io.BytesIO | None]]]


def _drawn_source(num_images: int, side: int) -> Source:
    faces = DrawnFaces(num_images, resolution=side)
    return len(faces), lambda index: (f"drawn face {index}", faces[index]["image"])


def _existing_folder(dataset_name: str | None, train_data_dir: str | None) -> Path | None:
    """The local folder that is meant, or None where `dataset_name` is one on the Hub."""
    path = Path(train_data_dir or dataset_name).expanduser()
    if path.is_dir():
        return path
    if train_data_dir is not None:
        raise ValueError(f"`train_data_dir` must be an existing folder, got {train_data_dir!r}.")
    # A Hub name is "name" or "user/name"; all else is a path that somebody mistyped.
    if path.is_absolute() or dataset_name.startswith((".", "~")) or dataset_name.count("/") > 1:
        raise ValueError(f"`dataset_name` is neither a folder nor a name on the Hub: {dataset_name!r}.")
    return None


def _files(folder: Path) -> Iterator[Path]:
    for root, dirs, names in os.walk(folder):
        dirs[:] = sorted(name for name in dirs if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _is_picture_folder(folder: Path) -> bool:
    suffixes = {path.suffix.lower() for path in _files(folder)}
    if not suffixes & (PICTURE_SUFFIXES | DATA_SUFFIXES):
        raise ValueError(f"The folder {str(folder)!r} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}).")
    return not suffixes & DATA_SUFFIXES


def _folder_source(folder: Path) -> Source:
    paths = [path for path in _files(folder) if path.suffix.lower() in PICTURE_SUFFIXES]
    return len(paths), lambda index: (str(paths[index]), paths[index])


def _dataset_source(
    name: str, config_name: str | None, split: str, image_column: str | None, cache_dir: str | None
) -> Source:
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    dataset = load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    image_columns = [key for key, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    if image_column is None and image_columns:
        image_column = image_columns[0]
    if image_column not in image_columns:
        wanted = "No column" if image_column is None else f"`image_column` {image_column!r}"
        raise ValueError(
            f"{wanted} of {name!r} holds pictures. Columns with pictures: {', '.join(image_columns) or 'none'}; all "
            f"columns: {', '.join(dataset.column_names)}."
        )
    # Undecoded, so that a broken picture can be named.
    dataset = dataset.select_columns(image_column).cast_column(image_column, ImageFeature(decode=False))

    def read(index: int) -> tuple[str, Path | io.BytesIO | None]:
        value = dataset[index][image_column]
        if value is None:
            return f"row {index}", None
        name = f"row {index} ({value['path']})" if value["path"] else f"row {index}"
        return name, Path(value["path"]) if value["bytes"] is None else io.BytesIO(value["bytes"])

    return len(dataset), read


def _read_all(source: Source, max_images: int | None, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Decode and resize in threads (PIL lets go of the interpreter), and report every picture that cannot be read."""
    num_images, read = source
    num_images = min(num_images, max_images or num_images)
    if num_images == 0:
        raise ValueError("The data set is empty: it holds no pictures.")
    images = torch.empty((num_images, len(mode), *size), dtype=torch.uint8)

    def read_one(index: int) -> str | None:
        name, picture = read(index)
        if picture is None:
            return f"{name}: no picture"
        try:
            image = picture if isinstance(picture, Image.Image) else Image.open(picture)
            images[index] = picture_to_tensor(image, size, mode)
        except UNREADABLE as error:
            return f"{name}: {error}"
        return None

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = tqdm(pool.map(read_one, range(num_images)), total=num_images, desc="Reading pictures", unit="img")
        problems = [problem for problem in results if problem is not None]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{len(problems)} of {num_images} pictures cannot be read:\n{listed}{more}")
    return images
