"""Pictures of faces, from wherever they are, as batches for the network.

A source is a data set on the Hub, a data set folder (parquet and the like), a folder of pictures, or nothing: then the
faces are drawn by the program. Each picture is decoded and resized once, into a memory-mapped cache of uint8 that all
processes share and later runs open in no time.
"""

import hashlib
import inspect
import io
import json
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..files import commit, unfinished_path
from . import drawn_faces
from .drawn_faces import DrawnFaces


logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
DATA_SUFFIXES = frozenset((".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tar", ".zip"))
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CROPS = ("center", "random")
# What PIL raises on a file that is no picture, is cut off, is damaged, or is absurdly large. Too little memory is not
# the picture's fault.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
CACHE_VERSION = 1  # of what a cache holds and how it is decoded
CHUNK, CHUNK_BYTES = 256, 2**26  # what is decoded at a time, at most


# Pictures


def to_samples(images: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
    """Turn pictures into x_0.

    Args:
        images (`torch.Tensor` of shape `(batch, channels, height, width)`, `torch.uint8`): Pictures, 0 to 255.
        flips (`torch.Tensor` of shape `(batch,)`, `torch.bool`, *optional*): Which to mirror.

    Returns:
        `torch.Tensor` of the same shape, `torch.float32`, in [-1, 1].
    """
    samples = images.float() / 127.5 - 1.0
    return samples if flips is None else torch.where(flips[:, None, None, None], samples.flip(-1), samples)


def picture_to_tensor(image: Image.Image, size: tuple[int, int], mode: str = "RGB") -> torch.Tensor:
    """Decode one picture the way [`load_faces`] does.

    Args:
        image (`PIL.Image.Image`):
            A picture of any size, the first of an animation. Transparent parts lie on white, unless `mode` keeps them;
            16 bits are scaled to 8.
        size (`(int, int)`): Height and width in pixels.
        mode (`str`, defaults to `"RGB"`): `"L"`, `"RGB"` or `"RGBA"`.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`, `torch.uint8`: Upright, cropped about its centre to the
        shape of `size`, and resized with an antialiasing filter.

    Raises:
        ValueError: Pixels whose range is unknown: floating-point numbers, or integers beyond 16 bits.
    """
    image = _upright(image, mode)
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    return _pixels(image)


def resize_to_cover(image: Image.Image, size: tuple[int, int], mode: str = "RGB") -> torch.Tensor:
    """Decode one picture as [`picture_to_tensor`] does, but uncropped.

    Args:
        image (`PIL.Image.Image`): A picture.
        size (`(int, int)`): Height and width in pixels.
        mode (`str`, defaults to `"RGB"`): `"L"`, `"RGB"` or `"RGBA"`.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`, `torch.uint8`: As small as still covers `size`, so that
        [`random_crop`] can cut that out.
    """
    image = _upright(image, mode)
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if image.size != covering:
        image = image.resize(covering, Image.Resampling.LANCZOS)
    return _pixels(image)


def random_crop(pixels: torch.Tensor, size: tuple[int, int], crop: Sequence[float]) -> torch.Tensor:
    """Cut out a part.

    Args:
        pixels (`torch.Tensor` of shape `(channels, height, width)`): A picture that covers `size`.
        size (`(int, int)`): Height and width in pixels.
        crop (`(float, float)`): Where, in [0, 1), vertically and horizontally: 0 is at the upper left.

    Returns:
        `torch.Tensor` of shape `(channels, *size)`: A view of `pixels`.
    """
    top, left = (int(part * (have - want + 1)) for part, have, want in zip(crop, pixels.shape[1:], size, strict=True))
    return pixels[:, top : top + size[0], left : left + size[1]]


# What to do with an image of each EXIF orientation, 2 to 8 (1 is upright).
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, or None where the metadata has none or is damaged: the pixels are whole all the same."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # Pillow raises many kinds on damaged metadata
        return None


def _upright(image: Image.Image, mode: str) -> Image.Image:
    # Not by ImageOps.exif_transpose, which writes all other tags anew and fails where one of them is odd.
    image.load()  # metadata may follow the pixels
    orientation = _orientation(image)
    if isinstance(orientation, int) and orientation in _TRANSPOSES:
        image = image.transpose(_TRANSPOSES[orientation])
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip it instead of scaling
        pixels = np.asarray(image, dtype=np.float64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("integer pixels beyond 16 bits, whose range is unknown")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    if image.mode == "F":  # PIL would clip this to 0..255, so that a range of 0 to 1 would become black
        raise ValueError("floating-point pixels, whose range is unknown")
    if mode != "RGBA" and image.has_transparency_data:
        # What lies under transparent pixels is arbitrary.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _pixels(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]


# The data set


class FaceDataset(Dataset):
    """Decoded pictures, in memory or memory-mapped from a cache folder.

    Args:
        images (`torch.Tensor` of shape `(num_images, channels, height, width)`, `torch.uint8`, or a sequence):
            The pictures; a sequence of tensors, where they are yet to be cropped at random.
        size (`(int, int)`, *optional*): Height and width of what [`~FaceDataset.fetch`] gives; by default, theirs.
        labels (`torch.Tensor` of shape `(num_images,)`, `torch.int64`, *optional*): Their classes.
        class_names (`list[str]`, *optional*): Names of the classes.
        unreadable (`list[str]`): What was left out, and why.
        table (`numpy.ndarray` of shape `(num_images,)`, *optional*):
            What is known of each picture: shape, sums and hash. By default it is computed.
    """

    def __init__(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        size: tuple[int, int] | None = None,
        labels: torch.Tensor | None = None,
        class_names: list[str] | None = None,
        unreadable: Sequence[str] = (),
        table: np.ndarray | None = None,
    ) -> None:
        self._images = images
        self._indices = np.arange(len(images))  # of those that belong to this subset
        self._labels = labels
        self._table = np.stack([_describe(image) for image in images]) if table is None else table
        self._cache: Path | None = None
        self.size = size or tuple(images[0].shape[-2:])
        self.class_names = class_names
        self.unreadable = list(unreadable)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self.fetch(np.array([range(len(self))[index]]))
        return {name: values[0] for name, values in batch.items()}

    @property
    def images(self) -> torch.Tensor:
        """All pictures, `(num_images, channels, height, width)`, `torch.uint8`.

        Raises:
            ValueError: They are yet to be cropped, and of different shapes.
        """
        if not isinstance(self._images, torch.Tensor):
            raise ValueError("Pictures that are cropped at random have no one shape: use `fetch`.")
        is_whole = len(self) == len(self._images) and (np.diff(self._indices) == 1).all()
        return self._images if is_whole else self._images[torch.from_numpy(self._indices)]

    @property
    def labels(self) -> torch.Tensor | None:
        """Classes, `(num_images,)`, `torch.int64`, where there are any."""
        return None if self._labels is None else self._labels[torch.from_numpy(self._indices)]

    @property
    def fingerprint(self) -> str:
        """A hash of pixels and labels, in hexadecimal digits: the same for the same content, wherever it came from."""
        labels = [] if self._labels is None else [self.labels.numpy()]
        return _hash(self._table["digest"][self._indices], *labels)

    def fetch(self, indices: np.ndarray, crops: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """A batch.

        Args:
            indices (`numpy.ndarray` of shape `(batch,)`): Which pictures.
            crops (`numpy.ndarray` of shape `(batch, 2)`, *optional*):
                Where to crop them, in [0, 1), vertically and horizontally; by default about the centre. Without effect
                on pictures that are cropped already.

        Returns:
            `dict`: "images" (`torch.Tensor` of shape `(batch, channels, height, width)`, `torch.uint8`) and, where
            there are classes, "labels" (`torch.Tensor` of shape `(batch,)`, `torch.int64`).
        """
        indices = self._indices[indices]
        if isinstance(self._images, torch.Tensor):
            batch = {"images": self._images[torch.from_numpy(indices)]}
        else:
            crops = np.full((len(indices), 2), 0.5) if crops is None else crops
            pairs = zip(indices, crops, strict=True)
            batch = {"images": torch.stack([random_crop(self._images[i], self.size, crop) for i, crop in pairs])}
        if self._labels is not None:
            batch["labels"] = self._labels[torch.from_numpy(indices)]
        return batch

    def names(self, indices: Sequence[int]) -> list[str]:
        """The file or row of each picture."""
        indices = self._indices[list(indices)].tolist()
        if self._cache is None:
            return [f"picture {index}" for index in indices]
        names = _names(self._cache)
        return [names[index] for index in indices]

    def subset(self, indices: Sequence[int]) -> "FaceDataset":
        """Some of the pictures, in this order."""
        subset = object.__new__(FaceDataset)
        subset.__dict__ = dict(self.__dict__)
        subset._indices = self._indices[np.asarray(indices)]
        return subset

    def relabelled(self, class_names: list[str]) -> "FaceDataset":
        """The same pictures, with classes numbered as in another data set.

        Raises:
            ValueError: A class that is not among `class_names`.
        """
        missing = sorted({self.class_names[label] for label in self.labels.unique()} - set(class_names))
        if missing:
            raise ValueError(f"Classes {', '.join(missing)} are not among those of the training: {class_names}.")
        numbers = torch.tensor([class_names.index(name) if name in class_names else -1 for name in self.class_names])
        relabelled = self.subset(np.arange(len(self)))
        relabelled._labels, relabelled.class_names = numbers[self._labels], list(class_names)
        return relabelled

    def channel_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel over all pixels, as [`to_samples`] scales them.

        Returns:
            `(torch.Tensor, torch.Tensor)` of shape `(channels,)`, `torch.float32`: From exact sums. Of pictures that
            are yet to be cropped, all pixels count.
        """
        table = self._table[self._indices]
        count = table["shape"][:, 1:].prod(axis=1).sum()
        mean, mean_square = table["sums"].sum(axis=0) / count, table["squares"].sum(axis=0) / count
        deviation = np.sqrt(np.maximum(mean_square - mean**2, 0))
        return torch.from_numpy(mean / 127.5 - 1).float(), torch.from_numpy(deviation / 127.5).float()

    def __getstate__(self) -> dict[str, Any]:
        # To workers, a cache travels as the name of its folder.
        return self.__dict__ if self._cache is None else {**self.__dict__, "_images": None, "_table": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        if self._cache is not None:
            self._images, self._table = _map_images(self._cache, self.size)


class _Ragged(Sequence):
    """Pictures of different shapes, one after the other in flat memory."""

    def __init__(self, pixels: torch.Tensor, shapes: np.ndarray) -> None:
        self.pixels, self.shapes = pixels, shapes
        self.ends = np.cumsum(shapes.prod(axis=1))

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> torch.Tensor:
        shape = self.shapes[range(len(self))[index]]
        return self.pixels[self.ends[index] - shape.prod() : self.ends[index]].view(*shape.tolist())


def hold_out(dataset: FaceDataset, num_images: int) -> tuple[FaceDataset, FaceDataset]:
    """Set pictures aside, the same ones whatever the seed of a run.

    Args:
        dataset ([`FaceDataset`]): All pictures.
        num_images (`int`): How many, fewer than there are.

    Returns:
        `([`FaceDataset`], [`FaceDataset`])`: The others, in their order, and those that were set aside.
    """
    if not 0 <= num_images < len(dataset):
        raise ValueError(f"`num_images` must be from 0 to {len(dataset) - 1}, got {num_images}.")
    held_out = np.sort(np.random.default_rng(0).permutation(len(dataset))[:num_images])
    return dataset.subset(np.setdiff1d(np.arange(len(dataset)), held_out)), dataset.subset(held_out)


# Sources


@dataclass
class Source:
    """Where pictures come from.

    Args:
        identity (`Any`): All that decides what is read, plain enough for JSON.
        num_images (`int`): How many there are.
        read (`Callable`):
            From an index to the name of a picture and either the picture, or a path or an open file to read it from,
            or None where there is none.
        labels (`Callable`, *optional*): Gives the values of the column of classes.
        class_names (`list[str]`, *optional*): Where labels are numbers that have names.
    """

    identity: Any
    num_images: int
    read: Callable[[int], tuple[str, Image.Image | Path | io.BytesIO | None]]
    labels: Callable[[], list[Any]] | None = None
    class_names: list[str] | None = None


def load_faces(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    resolution: int | tuple[int, int] = 64,
    channels: int = 3,
    dataset_config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
    num_drawn_images: int = 4096,
    max_images: int | None = None,
    crop: str = "center",
    skip_unreadable: bool = False,
) -> FaceDataset:
    """Open all pictures of a source, decoded and resized; this is done once, by whoever asks first.

    Args:
        dataset_name (`str`, *optional*): A data set on the Hub, or a local data set folder.
        train_data_dir (`str`, *optional*): A local folder of pictures, searched in depth, or a data set folder.
        resolution (`int` or `(int, int)`, defaults to 64): Side, or height and width, in pixels.
        channels (`int`, defaults to 3): 1 (grey), 3 (RGB) or 4 (RGBA).
        dataset_config_name (`str`, *optional*): Configuration of the data set.
        split (`str`, defaults to `"train"`): Split of the data set; a folder of pictures has none.
        image_column (`str`, *optional*): Column of the pictures; by default the first that holds any.
        label_column (`str`, *optional*):
            Column of the classes: class labels; or integers, strings or truth values, of which all that occur are
            classes, in their order. For a folder of pictures, `"folder"`: the names of its subfolders. For drawn
            faces, one of their attributes.
        cache_dir (`str`, *optional*):
            Where decoded pictures are kept, and what `datasets` downloads; by default `ddpm-faces` beside the Hub's
            cache. Whatever lies there may be deleted between runs.
        num_drawn_images (`int`, defaults to 4096): Number of faces to draw where no source is given.
        max_images (`int`, *optional*): Read the first so many only.
        crop (`str`, defaults to `"center"`):
            `"center"`: each picture is cropped about its centre to the shape of `resolution`. `"random"`: it is kept
            whole, for [`~FaceDataset.fetch`] to crop.
        skip_unreadable (`bool`, defaults to `False`):
            Leave out pictures that cannot be read or have no label, and list them.

    Returns:
        [`FaceDataset`]

    Raises:
        ValueError: Two sources, a folder that is missing or empty, a column that holds no pictures or no classes,
            pictures that cannot be read, by their names, or a disk without room for the decoded ones.
    """
    if channels not in MODES:
        raise ValueError(f"`channels` must be one of {', '.join(map(str, MODES))}, got {channels}.")
    size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"`resolution` must be a side or (height, width) in pixels, got {resolution}.")
    if max_images is not None and max_images < 1:
        raise ValueError(f"`max_images` must be at least 1 or None, got {max_images}.")
    if crop not in CROPS:
        raise ValueError(f"`crop` must be one of {', '.join(map(repr, CROPS))}, got {crop!r}.")

    if dataset_name is None and train_data_dir is None:
        source = _drawn_source(num_drawn_images, max(size), label_column)
    else:
        name, folder = resolve_source(dataset_name, train_data_dir)
        if folder is not None and is_picture_folder(folder):
            source = _folder_source(folder, label_column)
        else:
            source = _dataset_source(name, dataset_config_name, split, image_column, label_column, cache_dir)
    num_images = min(source.num_images, max_images or source.num_images)
    if num_images == 0:
        raise ValueError("The data set is empty: it holds no pictures.")

    settings = {
        "version": [CACHE_VERSION, PIL.__version__],
        "source": [source.identity, source.num_images],  # of which all count for the classes
        "num_images": num_images,
        "size": size,
        "channels": channels,
        "crop": crop,
        "label_column": label_column,
        "skip_unreadable": skip_unreadable,
    }
    root = Path(cache_dir or Path(HF_HOME, "ddpm-faces")).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    cache = root / _hash(json.dumps(settings, sort_keys=True, default=str).encode())
    dataset = _open_cache(cache)  # without the lock first: a cache may be shared, and read-only
    if dataset is None:
        with FileLock(f"{cache}.lock"):  # whoever comes first decodes, the others wait
            dataset = _open_cache(cache)
            if dataset is None:
                _build_cache(cache, source, settings)
                dataset = _open_cache(cache)
    if dataset.unreadable:
        logger.warning(
            "%d pictures cannot be read and are left out:\n%s", len(dataset.unreadable), _lines(dataset.unreadable)
        )
    return dataset


def resolve_source(dataset_name: str | None, train_data_dir: str | None) -> tuple[str, Path | None]:
    """The name of a data set and, unless it is one on the Hub, the local folder that is meant.

    Raises:
        ValueError: Both are given, or a folder that does not exist.
    """
    if dataset_name is not None and train_data_dir is not None:
        raise ValueError("Give either `dataset_name` or `train_data_dir`, not both.")
    name = train_data_dir or dataset_name
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), path
    if train_data_dir is not None:
        raise ValueError(f"`train_data_dir` must be an existing folder, got {train_data_dir!r}.")
    # A Hub name is "name" or "user/name"; all else is a path that somebody mistyped.
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"`dataset_name` is neither a folder nor a name on the Hub: {name!r}.")
    return name, None


def choose_image_column(wanted: str | None, image_columns: list[str], columns: list[str], source: str) -> str:
    """The column to take pictures from: `wanted`, by default the first that holds some.

    Args:
        wanted (`str`, *optional*): What the user asked for.
        image_columns (`list[str]`): Columns that hold pictures.
        columns (`list[str]`): All columns, for the message.
        source (`str`): What they are columns of, for the message.

    Raises:
        ValueError: No column holds pictures, or the wanted one does not.
    """
    if wanted is None and image_columns:
        return image_columns[0]
    if wanted not in image_columns:
        problem = "No column" if wanted is None else f"`image_column` must name a column of pictures: {wanted!r}"
        verb = "holds pictures" if wanted is None else "is none"
        raise ValueError(
            f"{problem} of {source} {verb}. Columns with pictures: {', '.join(image_columns) or 'none'}; all columns: "
            f"{', '.join(columns)}."
        )
    return wanted


def _check_split(split: str) -> None:
    """Raise a `ValueError` unless it is written as `datasets` writes splits and parts of them."""
    from datasets import ReadInstruction

    try:
        ReadInstruction.from_spec(split)
    except ValueError as error:
        raise ValueError(
            f"`split` must be the name of a split or a part of one, such as 'train' or 'train[:500]', got {split!r}: "
            f"{error}"
        ) from error


def is_picture_folder(folder: Path) -> bool:
    """Whether the folder holds pictures alone, and no files of a data set.

    Raises:
        ValueError: It holds neither.
    """
    suffixes = {path.suffix.lower() for path in _files(folder)}
    if not suffixes & (PICTURE_SUFFIXES | DATA_SUFFIXES):
        raise ValueError(f"The folder {str(folder)!r} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}).")
    return not suffixes & DATA_SUFFIXES


def _drawn_source(num_images: int, side: int, label_column: str | None) -> Source:
    faces = DrawnFaces(num_images, resolution=side)
    labels = None
    if label_column is not None:
        attributes = drawn_faces.face_attributes(0, 0)
        if label_column not in attributes:
            raise ValueError(
                f"`label_column` {label_column!r} is no attribute of drawn faces. These are: {', '.join(attributes)}."
            )

        def labels() -> list[str]:
            return [drawn_faces.face_attributes(index, 0)[label_column] for index in range(num_images)]

    # Only what is drawn decides, not how many: a picture depends on its index alone.
    identity = ["drawn", side, _hash(inspect.getsource(drawn_faces).encode())]
    return Source(identity, num_images, lambda i: (f"drawn face {i}", faces[i]["image"]), labels)


def _files(folder: Path) -> Iterator[Path]:
    for root, dirs, names in os.walk(folder):
        dirs[:] = sorted(name for name in dirs if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _folder_source(folder: Path, label_column: str | None) -> Source:
    paths = [path for path in _files(folder) if path.suffix.lower() in PICTURE_SUFFIXES]
    labels = None
    if label_column is not None:
        if label_column != "folder":
            raise ValueError(f"`label_column` of a folder of pictures must be 'folder' or None, got {label_column!r}.")

        def labels() -> list[str]:
            parts = [path.relative_to(folder).parts for path in paths]
            if stray := [part[0] for part in parts if len(part) == 1]:
                raise ValueError(
                    f"`label_column` 'folder' needs each picture in a subfolder, but {stray[0]} is in none."
                )
            return [part[0] for part in parts]

    listing = [(str(path.relative_to(folder)), *_size_and_time(path)) for path in paths]
    identity = ["folder", str(folder.resolve()), _hash(json.dumps(listing).encode())]
    return Source(identity, len(paths), lambda index: (str(paths[index]), paths[index]), labels)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:  # a link to nowhere, which reading it will name
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _dataset_source(
    name: str,
    config_name: str | None,
    split: str,
    image_column: str | None,
    label_column: str | None,
    cache_dir: str | None,
) -> Source:
    from datasets import ClassLabel, Value, load_dataset
    from datasets import Image as ImageFeature

    _check_split(split)
    dataset = load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    image_columns = [key for key, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    image_column = choose_image_column(image_column, image_columns, dataset.column_names, repr(name))
    labels, class_names = None, None
    if label_column is not None:
        kinds = ("bool", "int", "uint", "string", "large_string")
        label_columns = {
            column: feature
            for column, feature in dataset.features.items()
            if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and feature.dtype.startswith(kinds))
        }
        if label_column not in label_columns:
            raise ValueError(
                f"`label_column` {label_column!r} of {name!r} holds no classes. Columns that may: "
                f"{', '.join(label_columns) or 'none'}."
            )
        class_names = getattr(label_columns[label_column], "names", None)

        def labels() -> list[Any]:
            return dataset[label_column][:]

    # Undecoded, so that a broken picture can be named.
    pictures = dataset.select_columns(image_column).cast_column(image_column, ImageFeature(decode=False))

    def read(index: int) -> tuple[str, Path | io.BytesIO | None]:
        value = pictures[index][image_column]
        if value is None:
            return f"row {index}", None
        name = f"row {index} ({value['path']})" if value["path"] else f"row {index}"
        return name, Path(value["path"]) if value["bytes"] is None else io.BytesIO(value["bytes"])

    identity = ["dataset", dataset._fingerprint, image_column]
    return Source(identity, len(dataset), read, labels, class_names)


# The cache


def _build_cache(cache: Path, source: Source, settings: dict[str, Any]) -> None:
    """Decode and resize in threads (PIL lets go of the interpreter), and write what comes of it, or nothing."""
    size, mode, num_images = settings["size"], MODES[settings["channels"]], settings["num_images"]
    picture_bytes = len(mode) * size[0] * size[1]  # at least: what is yet to be cropped takes more
    needed, free = num_images * picture_bytes, shutil.disk_usage(cache.parent).free
    if needed > free:
        raise ValueError(
            f"`cache_dir` {str(cache.parent)!r} has {free:,} bytes free, and the decoded pictures take {needed:,}: "
            "choose another."
        )
    values, class_names = _classes(source)
    resize = picture_to_tensor if settings["crop"] == "center" else resize_to_cover

    def decode(index: int) -> tuple[str, torch.Tensor | None, np.ndarray | None]:
        name, picture = source.read(index)
        if picture is None:
            return f"{name}: no picture", None, None
        if values is not None and values[index] is None:
            return f"{name}: no label", None, None
        try:
            image = picture if isinstance(picture, Image.Image) else Image.open(picture)
            pixels = resize(image, size, mode).contiguous()
        except UNREADABLE as error:
            return f"{name}: {error or type(error).__name__}", None, None
        return name, pixels, _describe(pixels)

    folder = unfinished_path(cache)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        names, labels, table, unreadable = [], [], [], []
        chunk = min(CHUNK, max(16, CHUNK_BYTES // picture_bytes))
        with (
            ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool,
            (folder / "pixels.bin").open("wb") as file,
            tqdm(total=num_images, desc="Reading pictures", unit="img") as bar,
        ):
            for first in range(0, num_images, chunk):
                indices = range(first, min(first + chunk, num_images))
                for index, (name, pixels, description) in zip(indices, pool.map(decode, indices), strict=True):
                    if pixels is None:
                        unreadable.append(name)
                        continue
                    file.write(pixels.numpy())
                    names.append(name)
                    table.append(description)
                    labels.append(None if values is None else values[index])
                bar.update(len(indices))
        if unreadable and (not settings["skip_unreadable"] or not names):
            raise ValueError(
                f"{len(unreadable)} of {num_images} pictures cannot be read:\n{_lines(unreadable)}\n"
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
    size = tuple(info["settings"]["size"])
    images, table = _map_images(cache, size)
    labels = torch.from_numpy(np.load(cache / "labels.npy")) if "labels.npy" in info["files"] else None
    dataset = FaceDataset(images, size, labels, info["class_names"], info["unreadable"], table)
    dataset._cache = cache
    return dataset


def _map_images(cache: Path, size: tuple[int, int]) -> tuple[torch.Tensor | _Ragged, np.ndarray]:
    table = np.load(cache / "table.npy", mmap_mode="r")
    # Copy on write: a tensor must be writable, but the file must not change.
    pixels = torch.from_numpy(np.memmap(cache / "pixels.bin", dtype=np.uint8, mode="c"))
    if (table["shape"][:, 1:] == size).all():
        return pixels.view(len(table), -1, *size), table
    return _Ragged(pixels, table["shape"]), table


@lru_cache(maxsize=2)  # of the pictures that are trained on, and of those that are held out
def _names(cache: Path) -> list[str]:
    return json.loads((cache / "names.json").read_text())


def _classes(source: Source) -> tuple[list[int | None] | None, list[str] | None]:
    """The class of each picture as a number, or None where it is missing, and the names of the classes."""
    if source.labels is None:
        return None, None
    values = source.labels()
    if source.class_names is not None:
        return [None if value is None or value < 0 else value for value in values], source.class_names
    classes = sorted({value for value in values if value is not None})
    number_of = {value: number for number, value in enumerate(classes)}
    return [number_of.get(value) for value in values], [str(value) for value in classes]


def _describe(image: torch.Tensor) -> np.ndarray:
    """What statistics and hashes of any subset follow from: a row of [`FaceDataset`]'s table."""
    pixels = image.contiguous().numpy()
    kind = [("shape", "<i8", 3), ("sums", "<i8", len(pixels)), ("squares", "<i8", len(pixels)), ("digest", "V16")]
    sums = pixels.sum(axis=(1, 2), dtype=np.int64)
    squares = np.square(pixels, dtype=np.uint16).sum(axis=(1, 2), dtype=np.int64)  # 255^2 fits
    digest = bytes.fromhex(_hash(repr(pixels.shape).encode(), pixels))
    return np.array((pixels.shape, sums, squares, digest), dtype=kind)


def _hash(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _lines(problems: Sequence[str]) -> str:
    listed = "\n".join(f"  {problem}" for problem in problems[:10])
    return listed + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
