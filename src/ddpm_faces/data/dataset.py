"""Decoded images as a dataset, in memory or memory-mapped, and the choice of held-out ones."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .images import random_crop


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
        images: "torch.Tensor | Sequence[torch.Tensor] | _Ragged",
        size: tuple[int, int] | None = None,
        labels: torch.Tensor | None = None,
        class_names: list[str] | None = None,
        unreadable: Sequence[str] = (),
        table: np.ndarray | None = None,
    ) -> None:
        self._images = images
        self._indices = np.arange(len(images))  # of those that belong to this subset
        self._labels = labels
        self._table = np.stack([describe(images[i]) for i in range(len(images))]) if table is None else table
        self._cache: Path | None = None
        self.size = size or (images[0].shape[1], images[0].shape[2])
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
        labels = [] if self._labels is None else [self._labels[self._indices].numpy()]
        return content_hash(self._table["digest"][self._indices], *labels)

    @property
    def digests(self) -> list[bytes]:
        """A hash of shape and pixels of each image, 16 bytes."""
        return [bytes(digest) for digest in self._table["digest"][self._indices]]

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
        names = read_names(self._cache)
        return [names[index] for index in indices]

    def subset(self, indices: Sequence[int] | np.ndarray) -> "FaceDataset":
        """Some of the pictures, in this order."""
        subset = object.__new__(FaceDataset)
        subset.__dict__ = dict(self.__dict__)
        subset._indices = self._indices[np.asarray(indices)]
        return subset

    def relabelled(self, class_names: list[str]) -> "FaceDataset":
        """The same pictures, with classes numbered as in another data set.

        Raises:
            ValueError: A class that is not among `class_names`, or no classes at all.
        """
        if self._labels is None or self.class_names is None:
            raise ValueError(f"There are no classes to be numbered as in {class_names}.")
        missing = sorted(
            {self.class_names[label] for label in self._labels[self._indices].unique()} - set(class_names)
        )
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
            self._images, self._table = map_images(self._cache, self.size)


class _Ragged:
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
    """Set images aside, chosen by their content alone: neither by their order, nor by the seed of a run.

    Images are ranked by a hash of their decoded pixels, and the first `num_images` are held out. Where images are
    added later and as many are held out as before, no image moves from the training to the held-out ones: only new
    images take the places of others. At another resolution, other images are held out.

    Args:
        dataset ([`FaceDataset`]): All images.
        num_images (`int`): How many distinct ones, fewer than there are. Their duplicates are held out with them.

    Returns:
        `([`FaceDataset`], [`FaceDataset`])`: The others, in their order, and those that are held out, in theirs.

    Raises:
        ValueError: `num_images` leaves none to train on.
    """
    digests = dataset.digests
    distinct = sorted(set(digests))  # hashes lie in no order that means anything
    if not 0 <= num_images < len(distinct):
        raise ValueError(
            f"`num_images` must be from 0 to {len(distinct) - 1}, got {num_images}: there are {len(distinct)} "
            "distinct pictures, and one must be left to train on."
        )
    chosen = set(distinct[:num_images])
    is_held_out = np.array([digest in chosen for digest in digests])
    return dataset.subset(np.flatnonzero(~is_held_out)), dataset.subset(np.flatnonzero(is_held_out))


def map_images(cache: Path, size: tuple[int, int]) -> tuple[torch.Tensor | _Ragged, np.ndarray]:
    """The images of a cache folder, memory-mapped, and the table of what is known of each."""
    table = np.load(cache / "table.npy", mmap_mode="r")
    # Copy on write: a tensor must be writable, but the file must not change.
    pixels = torch.from_numpy(np.memmap(cache / "pixels.bin", dtype=np.uint8, mode="c"))
    if (table["shape"][:, 1:] == size).all():
        return pixels.view(len(table), -1, *size), table
    return _Ragged(pixels, table["shape"]), table


@lru_cache(maxsize=2)  # of the pictures that are trained on, and of those that are held out
def read_names(cache: Path) -> list[str]:
    """What each image of a cache folder is called."""
    return json.loads((cache / "names.json").read_text())


def describe(image: torch.Tensor) -> np.ndarray:
    """What statistics and hashes of any subset follow from: a row of [`FaceDataset`]'s table."""
    pixels = image.contiguous().numpy()
    kind = [("shape", "<i8", 3), ("sums", "<i8", len(pixels)), ("squares", "<i8", len(pixels)), ("digest", "V16")]
    sums = pixels.sum(axis=(1, 2), dtype=np.int64)
    squares = np.square(pixels, dtype=np.uint16).sum(axis=(1, 2), dtype=np.int64)  # 255^2 fits
    digest = bytes.fromhex(content_hash(repr(pixels.shape).encode(), pixels))
    return np.array((pixels.shape, sums, squares, digest), dtype=kind)


def content_hash(*parts: bytes | np.ndarray) -> str:
    """A hash in 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.data)
    return digest.hexdigest()
