"""What a worker of a stream does: it reads blocks of rows, shuffles them, and decodes one image after the other.

What is drawn for a block depends on (seed, epoch, process, worker, first row) alone.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image

from .images import open_image
from .labels import class_number
from .tables import choose_image_column, undecoded


class StreamReader:
    """Endless batches from any place of a stream; the arguments are those of [`FaceStream`]."""

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
    ) -> None:
        self.dataset, self.image_column = _choose_columns(dataset, image_column, label_column)
        feature = None if label_column is None else (self.dataset.features or {}).get(label_column)
        self.has_class_labels = isinstance(feature, datasets.ClassLabel)
        num_names = feature.num_classes if isinstance(feature, datasets.ClassLabel) else None
        if num_names is not None and num_class_embeds is not None and num_names > num_class_embeds:
            raise ValueError(f"`num_class_embeds` is {num_class_embeds}, but there are {num_names} classes.")
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
        """The rows of this process; a new object, for all workers share the memory that holds the epoch of one."""
        return split_dataset_by_node(self.dataset, rank=self.process_index, world_size=self.num_processes)

    def batches(self, worker: int, place: dict[str, Any], batch_size: int) -> Iterator[dict[str, Any]]:
        """What [`FaceStream.batches`] gives, and as `place` the place after each batch."""
        read, skipped = [], []
        for name, pixels, label, place_after in self._images(worker, place):
            if pixels is None:
                skipped.append(name)
                continue
            read.append((name, pixels, label))
            if len(read) == batch_size:
                names, images, labels = zip(*read, strict=True)
                batch = {"images": torch.stack(images), "names": list(names), "skipped": skipped, "place": place_after}
                if self.label_column is not None:
                    batch["labels"] = torch.tensor(labels)
                yield batch
                read, skipped = [], []

    def _images(
        self, worker: int, place: dict[str, Any]
    ) -> Iterator[tuple[str, torch.Tensor | None, int | None, dict[str, Any]]]:
        """Endless: a picture's name, its pixels or None where it cannot be read, its label, and the place after it."""
        dataset = self.share()
        while True:
            # 1. Open the epoch. datasets shuffles the files by the number of the epoch, for all processes and workers.
            epoch = place["epoch"]
            dataset.set_epoch(int(np.random.default_rng((self.seed, epoch)).integers(1, 2**31)))
            dataset.load_state_dict(place["reader"])
            rows = iter(dataset)

            # 2. Read and shuffle a block, and take those of its pictures that have not been taken.
            while block := list(islice(rows, self.block_size)):
                rng = np.random.default_rng((self.seed, epoch, self.process_index, worker, place["row"]))
                order, seeds = rng.permutation(len(block)), rng.integers(2**63, size=len(block))
                for index in order[place["taken"] :]:
                    name = f"epoch {epoch}, process {self.process_index}, worker {worker}, row {place['row'] + index}"
                    name, pixels, label = self._read(block[index], name, np.random.default_rng(seeds[index]))
                    readable = place["readable"] + (pixels is not None)
                    place = place | {"taken": place["taken"] + 1, "readable": readable}
                    yield name, pixels, label, place
                place = place | {"row": place["row"] + len(block), "taken": 0, "reader": dataset.state_dict()}
                block.clear()  # before the next is read

            # 3. Go on to the next epoch, unless this would never end.
            if place["readable"] == 0:
                raise ValueError(
                    f"Process {self.process_index}, worker {worker} found no readable image in its "
                    f"{place['row']} rows of epoch {epoch}. Check the dataset, or use fewer workers."
                )
            place = beginning(epoch + 1)

    def _read(
        self, row: dict[str, Any], name: str, rng: np.random.Generator
    ) -> tuple[str, torch.Tensor | None, int | None]:
        """The name of an image, its pixels, and its label; or why it cannot be read, where that is allowed."""
        value, label = row[self.image_column], None
        if isinstance(value, dict) and value.get("path"):
            name += f" ({value['path']})"
        try:
            if self.label_column is not None:
                label = class_number(row.get(self.label_column), self.num_classes, self.has_class_labels)
            return name, self.decode(open_image(value, self.max_image_pixels), rng), label
        except MemoryError:  # which is not the image's fault
            raise
        except Exception as error:  # PIL raises many kinds on an image that is cut off or damaged
            name += f": {error or type(error).__name__}"
            if not self.skip_unreadable:
                raise ValueError(f"A picture cannot be read: {name}") from error
            return name, None, None


def beginning(epoch: int) -> dict[str, Any]:
    """A place: `taken` pictures into the block that begins at `row`, which datasets finds by its state, `reader`."""
    return {"epoch": epoch, "row": 0, "taken": 0, "readable": 0, "reader": None}


def _choose_columns(
    dataset: datasets.IterableDataset, image_column: str | None, label_column: str | None
) -> tuple[datasets.IterableDataset, str]:
    """The columns that are asked for, images as they are stored, and the name of the column of images."""
    # The column of images is known by its type or, where the stream has no types, by what its first row holds.
    columns = next(iter(dataset), None) if dataset.features is None else dataset.features
    if columns is None:
        raise ValueError("The data set is empty: it holds no pictures.")
    image_column = choose_image_column(image_column, columns, "the stream")
    if label_column is not None and not _is_label(columns.get(label_column)):
        raise ValueError(
            f"`label_column` {label_column!r} of the stream holds no whole numbers or class labels. Columns that do: "
            f"{', '.join(name for name, column in columns.items() if _is_label(column)) or 'none'}."
        )
    return undecoded(dataset, image_column, [] if label_column is None else [label_column]), image_column


def _is_label(column: Any) -> bool:
    is_whole = isinstance(column, datasets.Value) and column.dtype.startswith(("bool", "int", "uint"))
    return is_whole or isinstance(column, datasets.ClassLabel | int)
