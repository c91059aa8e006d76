"""The worker of a stream: it reads blocks of rows, shuffles them, and decodes one image after the other.

The random numbers for a block depend only on (seed, epoch, process, worker, first row).
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image

from .captions import captions_of
from .images import open_image
from .labels import class_number
from .tables import check_caption_column, choose_image_column, undecoded


class StreamReader:
    """Reads endless batches from any position in a stream. The arguments are those of [`FaceStream`]."""

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        decode: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        image_column: str | None,
        label_column: str | None,
        num_class_embeds: int | None,
        seed: int,
        block_size: int,
        process_index: int,
        num_processes: int,
        skip_unreadable: bool,
        max_image_pixels: int,
        caption_column: str | None,
    ) -> None:
        self.dataset, self.image_column = _choose_columns(dataset, image_column, label_column, caption_column)
        self.caption_column = caption_column
        feature = None if label_column is None else (self.dataset.features or {}).get(label_column)
        self.has_class_labels = isinstance(feature, datasets.ClassLabel)
        num_names = feature.num_classes if isinstance(feature, datasets.ClassLabel) else None
        if num_names is not None and num_class_embeds is not None and num_names > num_class_embeds:
            raise ValueError(
                f"`num_class_embeds` must be at least the number of classes ({num_names}), got {num_class_embeds}."
            )
        self.num_classes = num_names or num_class_embeds
        self.decode = decode
        self.label_column = label_column
        self.seed = seed
        self.block_size = block_size
        self.process_index = process_index
        self.num_processes = num_processes
        self.skip_unreadable = skip_unreadable
        self.max_image_pixels = max_image_pixels

    def share(self) -> datasets.IterableDataset:
        """Return this process's rows as a new object, because workers share the memory of an object's epoch."""
        return split_dataset_by_node(self.dataset, rank=self.process_index, world_size=self.num_processes)

    def batches(self, worker: int, place: dict[str, Any], batch_size: int) -> Iterator[dict[str, Any]]:
        """Yield the batches of [`FaceStream.batches`], with the position after each batch as `place`."""
        read, skipped = [], []
        for name, pixels, label, captions, place_after in self._images(worker, place):
            if pixels is None:
                skipped.append(name)
                continue
            read.append((name, pixels, label, captions))
            if len(read) == batch_size:
                names, images, labels, texts = zip(*read, strict=True)
                batch = {"images": torch.stack(images), "names": list(names), "skipped": skipped, "place": place_after}
                if self.label_column is not None:
                    batch["labels"] = torch.tensor(labels)
                if self.caption_column is not None:
                    batch["captions"] = list(texts)
                yield batch
                read, skipped = [], []

    def _images(
        self, worker: int, place: dict[str, Any]
    ) -> Iterator[tuple[str, torch.Tensor | None, int | None, list[str], dict[str, Any]]]:
        """Yield endlessly an image's name, pixels (None if unreadable), label, captions, and the position after it."""
        dataset = self.share()
        while True:
            # 1. Open the epoch. `datasets` shuffles the files by the epoch, alike in all processes and workers.
            epoch = place["epoch"]
            dataset.set_epoch(int(np.random.default_rng((self.seed, epoch)).integers(1, 2**31)))
            dataset.load_state_dict(place["reader"])
            rows = iter(dataset)

            # 2. Read and shuffle a block, and take those of its images that have not been taken.
            while block := list(islice(rows, self.block_size)):
                rng = np.random.default_rng((self.seed, epoch, self.process_index, worker, place["row"]))
                order, seeds = rng.permutation(len(block)), rng.integers(2**63, size=len(block))
                for index in order[place["taken"] :]:
                    name = f"epoch {epoch}, process {self.process_index}, worker {worker}, row {place['row'] + index}"
                    rng = np.random.default_rng(seeds[index])
                    name, pixels, label, captions = self._read(block[index], name, rng)
                    readable = place["readable"] + (pixels is not None)
                    place = place | {"taken": place["taken"] + 1, "readable": readable}
                    yield name, pixels, label, captions, place
                place = place | {"row": place["row"] + len(block), "taken": 0, "reader": dataset.state_dict()}
                block.clear()  # before the next is read

            # 3. Continue with the next epoch, unless this epoch had no readable image.
            if place["readable"] == 0:
                raise ValueError(
                    f"Process {self.process_index}, worker {worker} found no readable image in its "
                    f"{place['row']} rows of epoch {epoch}. Check the dataset, or use fewer workers."
                )
            place = beginning(epoch + 1)

    def _read(
        self, row: dict[str, Any], name: str, rng: np.random.Generator
    ) -> tuple[str, torch.Tensor | None, int | None, list[str]]:
        """Return name, pixels, label and captions of an image, or its name with the reason why it is skipped."""
        value, label, captions = row[self.image_column], None, []
        if isinstance(value, dict) and value.get("path"):
            name += f" ({value['path']})"
        try:
            if self.label_column is not None:
                label = class_number(row.get(self.label_column), self.num_classes, self.has_class_labels)
            if self.caption_column is not None:
                captions = captions_of(row.get(self.caption_column))
            return name, self.decode(open_image(value, self.max_image_pixels), rng), label, captions
        except MemoryError:  # not an error of the image
            raise
        except Exception as error:  # PIL raises many kinds of errors on damaged images
            name += f": {error or type(error).__name__}"
            if not self.skip_unreadable:
                raise ValueError(f"An image cannot be read: {name}") from error
            return name, None, None, []


def beginning(epoch: int) -> dict[str, Any]:
    """Return the position at the start of an epoch.

    A position is `taken` images into the block that begins at `row`. `reader` is the state of `datasets` at that row.
    """
    return {"epoch": epoch, "row": 0, "taken": 0, "readable": 0, "reader": None}


def _choose_columns(
    dataset: datasets.IterableDataset,
    image_column: str | None,
    label_column: str | None,
    caption_column: str | None,
) -> tuple[datasets.IterableDataset, str]:
    """Select the requested columns without decoding images, and return them with the name of the image column."""
    # The image column is found by its type or, in a stream without types, by the first row.
    columns = next(iter(dataset), None) if dataset.features is None else dataset.features
    if columns is None:
        raise ValueError("The dataset is empty: it contains no images.")
    image_column = choose_image_column(image_column, columns, "the stream")
    if label_column is not None and not _is_label(columns.get(label_column)):
        raise ValueError(
            f"`label_column` {label_column!r} of the stream contains no integers or class labels. Columns that do: "
            f"{', '.join(name for name, column in columns.items() if _is_label(column)) or 'none'}."
        )
    if caption_column is not None:
        check_caption_column(caption_column, columns, "the stream")
    others = [column for column in (label_column, caption_column) if column is not None]
    return undecoded(dataset, image_column, others), image_column


def _is_label(column: Any) -> bool:
    is_whole = isinstance(column, datasets.Value) and column.dtype.startswith(("bool", "int", "uint"))
    return is_whole or isinstance(column, datasets.ClassLabel | int)
