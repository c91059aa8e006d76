"""Decoded images as a dataset, in memory or memory-mapped, and the choice of held-out images."""

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
    """Decoded images, in memory or memory-mapped from a cache folder.

    Args:
        images (`torch.Tensor` of shape `(num_images, channels, height, width)`, `torch.uint8`, or a sequence):
            The images, or a sequence of uncropped ones that will be cropped at random.
        size (`(int, int)`, *optional*): Height and width of images from [`~FaceDataset.fetch`]; defaults to theirs.
        labels (`torch.Tensor` of shape `(num_images,)`, `torch.int64`, *optional*): Class of each image.
        class_names (`list[str]`, *optional*): Names of the classes.
        unreadable (`list[str]`): Images that were skipped, each with the reason.
        table (`numpy.ndarray` of shape `(num_images,)`, *optional*):
            Shape, sums and hash of each image, by [`describe`]. Computed by default.
        captions (`list[list[str]]`, *optional*): The captions of each image.
    """

    def __init__(
        self,
        images: "torch.Tensor | Sequence[torch.Tensor] | _Ragged",
        size: tuple[int, int] | None = None,
        labels: torch.Tensor | None = None,
        class_names: list[str] | None = None,
        unreadable: Sequence[str] = (),
        table: np.ndarray | None = None,
        captions: list[list[str]] | None = None,
    ) -> None:
        self._images = images
        self._indices = np.arange(len(images))  # of the images in this subset
        self._labels = labels
        self._captions = captions
        self._table = np.stack([describe(images[i]) for i in range(len(images))]) if table is None else table
        self._cache: Path | None = None
        self.size = size or (images[0].shape[1], images[0].shape[2])
        self.class_names = class_names
        self.unreadable = list(unreadable)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.fetch(np.array([range(len(self))[index]]))
        return {name: values[0] for name, values in batch.items()}

    @property
    def images(self) -> torch.Tensor:
        """All images, as a `torch.uint8` tensor of shape `(num_images, channels, height, width)`.

        Raises:
            ValueError: The images are uncropped and differ in shape.
        """
        if not isinstance(self._images, torch.Tensor):
            raise ValueError("`images` needs images of one shape, and these are uncropped: use `fetch`.")
        is_whole = len(self) == len(self._images) and (np.diff(self._indices) == 1).all()
        return self._images if is_whole else self._images[torch.from_numpy(self._indices)]

    @property
    def labels(self) -> torch.Tensor | None:
        """Class of each image, as a `torch.int64` tensor of shape `(num_images,)`, or `None` without classes."""
        return None if self._labels is None else self._labels[torch.from_numpy(self._indices)]

    @property
    def captions(self) -> list[list[str]] | None:
        """The captions of each image, or `None` without captions."""
        return None if self._captions is None else [self._captions[index] for index in self._indices.tolist()]

    @property
    def fingerprint(self) -> str:
        """Hash of all pixels, labels and captions in hexadecimal digits. It depends only on the content."""
        parts: list[np.ndarray | bytes] = [self._table["digest"][self._indices]]
        if self._labels is not None:
            parts.append(self._labels[self._indices].numpy())
        if self._captions is not None:
            parts.append(json.dumps(self.captions).encode())
        return content_hash(*parts)

    @property
    def digests(self) -> list[bytes]:
        """Hash of the shape and pixels of each image, 16 bytes each."""
        return [bytes(digest) for digest in self._table["digest"][self._indices]]

    def fetch(self, indices: np.ndarray, crops: np.ndarray | None = None) -> dict[str, Any]:
        """Return a batch.

        Args:
            indices (`numpy.ndarray` of shape `(batch,)`): Indices of the images.
            crops (`numpy.ndarray` of shape `(batch, 2)`, *optional*):
                Vertical and horizontal position of each crop, in [0, 1); defaults to the center. Images that are
                cropped already ignore it.

        Returns:
            `dict`: "images" (`torch.Tensor` of shape `(batch, channels, height, width)`, `torch.uint8`) and, if there
            are classes, "labels" (`torch.Tensor` of shape `(batch,)`, `torch.int64`); if there are captions,
            "captions" (`list[list[str]]`).
        """
        indices = self._indices[indices]
        if isinstance(self._images, torch.Tensor):
            batch: dict[str, Any] = {"images": self._images[torch.from_numpy(indices)]}
        else:
            crops = np.full((len(indices), 2), 0.5) if crops is None else crops
            pairs = zip(indices, crops, strict=True)
            batch = {"images": torch.stack([random_crop(self._images[i], self.size, crop) for i, crop in pairs])}
        if self._labels is not None:
            batch["labels"] = self._labels[torch.from_numpy(indices)]
        if self._captions is not None:
            batch["captions"] = [self._captions[index] for index in indices.tolist()]
        return batch

    def names(self, indices: Sequence[int]) -> list[str]:
        """Return the file or row of each image."""
        indices = self._indices[list(indices)].tolist()
        if self._cache is None:
            return [f"image {index}" for index in indices]
        names = read_names(self._cache)
        return [names[index] for index in indices]

    def subset(self, indices: Sequence[int] | np.ndarray) -> "FaceDataset":
        """Return a dataset of the images with these indices, in this order."""
        subset = object.__new__(FaceDataset)
        subset.__dict__ = dict(self.__dict__)
        subset._indices = self._indices[np.asarray(indices)]
        return subset

    def relabelled(self, class_names: list[str]) -> "FaceDataset":
        """Return the same images with classes numbered as in another dataset.

        Raises:
            ValueError: A class is not among `class_names`, or there are no classes.
        """
        if self._labels is None or self.class_names is None:
            raise ValueError(f"There are no classes to be numbered as in {class_names}.")
        missing = sorted(
            {self.class_names[label] for label in self._labels[self._indices].unique()} - set(class_names)
        )
        if missing:
            raise ValueError(f"Classes {', '.join(missing)} are not among the training classes: {class_names}.")
        numbers = torch.tensor([class_names.index(name) if name in class_names else -1 for name in self.class_names])
        relabelled = self.subset(np.arange(len(self)))
        relabelled._labels, relabelled.class_names = numbers[self._labels], list(class_names)
        return relabelled

    def channel_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of each channel over all pixels, scaled as by [`to_samples`].

        Returns:
            `(torch.Tensor, torch.Tensor)` of shape `(channels,)`, `torch.float32`: Computed from exact sums. All
            pixels of uncropped images count.
        """
        table = self._table[self._indices]
        count = table["shape"][:, 1:].prod(axis=1).sum()
        mean, mean_square = table["sums"].sum(axis=0) / count, table["squares"].sum(axis=0) / count
        deviation = np.sqrt(np.maximum(mean_square - mean**2, 0))
        return torch.from_numpy(mean / 127.5 - 1).float(), torch.from_numpy(deviation / 127.5).float()

    def __getstate__(self) -> dict[str, Any]:
        # A cache is sent to workers as the name of its folder.
        return self.__dict__ if self._cache is None else {**self.__dict__, "_images": None, "_table": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        if self._cache is not None:
            self._images, self._table = map_images(self._cache, self.size)


class _Ragged:
    """Images of different shapes, stored one after the other."""

    def __init__(self, pixels: torch.Tensor, shapes: np.ndarray) -> None:
        self.pixels, self.shapes = pixels, shapes
        self.ends = np.cumsum(shapes.prod(axis=1))

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> torch.Tensor:
        shape = self.shapes[range(len(self))[index]]
        return self.pixels[self.ends[index] - shape.prod() : self.ends[index]].view(*shape.tolist())


def hold_out(dataset: FaceDataset, num_images: int) -> tuple[FaceDataset, FaceDataset]:
    """Set images aside as held-out images. The choice depends only on their content, not on their order or a seed.

    Images are ranked by a hash of their decoded pixels, and the first `num_images` are held out. When images are added
    later and `num_images` stays the same, no image moves from the training images to the held-out ones: only new
    images can replace held-out ones. At another resolution, other images are held out.

    Args:
        dataset ([`FaceDataset`]): All images.
        num_images (`int`): Number of distinct images to hold out, together with their duplicates.

    Returns:
        `([`FaceDataset`], [`FaceDataset`])`: The training images and the held-out images, each in their old order.

    Raises:
        ValueError: `num_images` leaves no image to train on.
    """
    digests = dataset.digests
    distinct = sorted(set(digests))  # the order of hashes is arbitrary
    if not 0 <= num_images < len(distinct):
        raise ValueError(
            f"`num_images` must be from 0 to {len(distinct) - 1}, got {num_images}: there are {len(distinct)} "
            "distinct images, and one must be left to train on."
        )
    chosen = set(distinct[:num_images])
    is_held_out = np.array([digest in chosen for digest in digests])
    return dataset.subset(np.flatnonzero(~is_held_out)), dataset.subset(np.flatnonzero(is_held_out))


def map_images(cache: Path, size: tuple[int, int]) -> tuple[torch.Tensor | _Ragged, np.ndarray]:
    """Open the images of a cache folder, memory-mapped, and the table that describes them."""
    table = np.load(cache / "table.npy", mmap_mode="r")
    # Copy on write: a tensor must be writable, but the file must not change.
    pixels = torch.from_numpy(np.memmap(cache / "pixels.bin", dtype=np.uint8, mode="c"))
    if (table["shape"][:, 1:] == size).all():
        return pixels.view(len(table), -1, *size), table
    return _Ragged(pixels, table["shape"]), table


@lru_cache(maxsize=2)  # of the training images and the held-out images
def read_names(cache: Path) -> list[str]:
    """Read the names of the images in a cache folder."""
    return json.loads((cache / "names.json").read_text())


def describe(image: torch.Tensor) -> np.ndarray:
    """Return a row of [`FaceDataset`]'s table, from which statistics and hashes of any subset are computed."""
    pixels = image.contiguous().numpy()
    kind = [("shape", "<i8", 3), ("sums", "<i8", len(pixels)), ("squares", "<i8", len(pixels)), ("digest", "V16")]
    sums = pixels.sum(axis=(1, 2), dtype=np.int64)
    squares = np.square(pixels, dtype=np.uint16).sum(axis=(1, 2), dtype=np.int64)  # 255^2 fits
    digest = bytes.fromhex(content_hash(repr(pixels.shape).encode(), pixels))
    return np.array((pixels.shape, sums, squares, digest), dtype=kind)


def content_hash(*parts: bytes | np.ndarray) -> str:
    """Return a hash of 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.data)
    return digest.hexdigest()
