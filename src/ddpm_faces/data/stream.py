"""Pictures of faces from a stream: a data set that is read while it is trained on, and is never held as a whole.

A stream comes in the order of its files. [`FaceStream`] reads a block of rows undecoded, shuffles them, and decodes
one after the other. What is drawn for a block depends on (seed, epoch, process, worker, first row) alone, so a place
in the stream is small: where its block begins in the files, and how many of the block's pictures have been taken.
Whoever goes on from a place reads that block again, and decodes none of the pictures before it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .batches import make_data_loader, restarting
from .folders import ImageFolder, find_source
from .images import CROPS, MAX_IMAGE_PIXELS, MODES, open_image, picture_to_tensor, random_crop, resize_to_cover
from .labels import check_folder_label, class_number, folder_labels
from .tables import choose_image_column, open_table, undecoded


class FaceStream(IterableDataset):
    """Endless batches of decoded pictures, split over processes and workers, that go on exactly where they were.

    ```python
    stream = FaceStream(dataset, decode, batch_size=32, num_workers=4, process_index=rank, num_processes=world_size)
    message = stream.load_state_dict(checkpoint["stream"])  # None, or why it begins its epoch anew
    for batch in stream.batches(pin_memory=True):
        ...
        checkpoint["stream"] = stream.state_dict()  # of this process, after this batch, whatever has been prefetched
    ```

    In each epoch every picture is read once: the files in another order, shared out among the processes (which take
    turns at the rows where the files cannot be divided evenly) and then among the workers of each. A worker goes on to
    its next epoch by itself, and its batches straddle blocks and epochs.

    Args:
        dataset (`datasets.IterableDataset`):
            As `load_dataset(..., split=..., streaming=True)` gives it. A shuffle buffer of its own would not resume.
        decode (`Callable[[PIL.Image.Image, numpy.random.Generator], torch.Tensor]`):
            Turns a picture into a `torch.uint8` tensor of shape `(channels, height, width)`, 0 to 255. What it draws
            from the generator is the same after a resumption. A function of a module, where workers are not forked.
        image_column (`str`, *optional*): Column of the pictures; by default the first that holds any.
        label_column (`str`, *optional*): Column of whole numbers or class labels.
        num_class_embeds (`int`, *optional*):
            Number of classes of the network: a label outside 0 to `num_class_embeds` - 1 is an error. By default, the
            number of class labels, where they have names.
        batch_size (`int`, defaults to 32): Pictures per batch: the share of one process in a step.
        seed (`int`, defaults to 0): Seed of the order and of what `decode` draws, at least 0.
        block_size (`int`, defaults to 1024): Pictures shuffled together, and held undecoded by each worker.
        num_workers (`int`, defaults to 0):
            Worker processes; 0 reads in this one. No more are started than a process has files.
        process_index (`int`, defaults to 0): Number of this process.
        num_processes (`int`, defaults to 1): Number of processes that train together.
        skip_unreadable (`bool`, defaults to `False`):
            Leave out pictures that cannot be read or have no label of a class, and name them.
        max_image_pixels (`int`, defaults to 2**29): As that of [`load_faces`].

    Raises:
        ValueError: A column that holds no pictures or no labels, or more classes than `num_class_embeds`. While it is
            read: a picture that cannot be read or has no label of a class, by its name, or an epoch without any that
            can.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        decode: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        image_column: str | None = None,
        label_column: str | None = None,
        num_class_embeds: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
        block_size: int = 1024,
        num_workers: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        skip_unreadable: bool = False,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        if min(batch_size, block_size) < 1:
            raise ValueError(f"`batch_size` and `block_size` must be at least 1, got {batch_size} and {block_size}.")
        if max_image_pixels < 1:
            raise ValueError(f"`max_image_pixels` must be at least 1, got {max_image_pixels}.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"`process_index` must be 0 to {num_processes - 1}, got {process_index}.")
        self.dataset, self.image_column = _choose_columns(dataset, image_column, label_column)
        feature = None if label_column is None else (self.dataset.features or {}).get(label_column)
        self.has_class_labels = isinstance(feature, datasets.ClassLabel)
        num_names = feature.num_classes if self.has_class_labels else None
        if num_names is not None and num_class_embeds is not None and num_names > num_class_embeds:
            raise ValueError(f"`num_class_embeds` is {num_class_embeds}, but there are {num_names} classes.")
        self.num_classes = num_names or num_class_embeds
        self.decode = decode
        self.label_column = label_column
        self.batch_size = batch_size
        self.seed = seed
        self.block_size = block_size
        self.process_index = process_index
        self.num_processes = num_processes
        self.skip_unreadable = skip_unreadable
        self.max_image_pixels = max_image_pixels
        self.num_workers = min(num_workers, self._share().num_shards)  # a worker without a file would have no rows
        self.num_skipped = 0
        self.start_epoch(0)

    # The consumer's side

    def batches(self, pin_memory: bool = False) -> Iterator[dict[str, Any]]:
        """Go on from the current place, for ever.

        Args:
            pin_memory (`bool`, defaults to `False`): Copy the batches to memory from which a GPU reads faster.

        Yields:
            `dict`:
            - **images** (`torch.Tensor` of shape `(batch_size, channels, height, width)`, `torch.uint8`) -- 0 to 255.
            - **labels** (`torch.Tensor` of shape `(batch_size,)`, `torch.int64`) -- Where there is a `label_column`.
            - **names** (`list[str]`) -- What each picture is called.
            - **skipped** (`list[str]`) -- What could not be read since the batch before of the same worker, and why.
        """
        for batch in restarting(lambda: make_data_loader(self, self.num_workers, pin_memory)):
            if batch is None:
                continue
            self._places[self._next_worker] = batch.pop("place")
            self._next_worker = (self._next_worker + 1) % len(self._places)
            self.num_skipped += len(batch["skipped"])
            yield batch

    @property
    def epoch(self) -> int:
        """The epoch of the worker that is furthest behind."""
        return min(place["epoch"] for place in self._places)

    def start_epoch(self, epoch: int) -> None:
        """Let [`~FaceStream.batches`] begin with the first picture of an epoch."""
        self._places = [_beginning(epoch)] * max(1, self.num_workers)
        self._next_worker = 0

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that [`~FaceStream.batches`] gave: small, and plain enough for JSON."""
        return {
            "split": self._split(),
            "places": list(self._places),
            "next_worker": self._next_worker,
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> str | None:
        """Let [`~FaceStream.batches`] go on from a place.

        Args:
            state_dict (`dict`): What [`~FaceStream.state_dict`] gave in the same process; the batch size may differ.

        Returns:
            `str`, *optional*: `None` where the batches go on exactly. Where the pictures are split or shuffled in
            another way, a sentence that says so: then the stream begins the epoch of `state_dict` anew.
        """
        self.num_skipped = state_dict["num_skipped"]
        changes = [
            f"`{name}` was {state_dict['split'][name]} and is {value}"
            for name, value in self._split().items()
            if state_dict["split"][name] != value
        ]
        if changes:
            self.start_epoch(min(place["epoch"] for place in state_dict["places"]))
            return f"The stream begins epoch {self.epoch} anew, for {', '.join(changes)}."
        self._places = list(state_dict["places"])
        self._next_worker = state_dict["next_worker"]
        return None

    def _split(self) -> dict[str, int]:
        return {
            "num_processes": self.num_processes,
            "process_index": self.process_index,
            "num_workers": len(self._places),  # none and one read alike
            "num_shards": self.dataset.num_shards,
            "block_size": self.block_size,
            "seed": self.seed,
        }

    # The worker's side

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if worker < self._next_worker:
            yield None  # a DataLoader begins with worker 0; those who have had their turn let it pass

        pictures, skipped = [], []
        for name, pixels, label, place in self._pictures(worker):
            if pixels is None:
                skipped.append(name)
                continue
            pictures.append((name, pixels, label))
            if len(pictures) == self.batch_size:
                names, images, labels = zip(*pictures, strict=True)
                batch = {"images": torch.stack(images), "names": list(names), "skipped": skipped, "place": place}
                if self.label_column is not None:
                    batch["labels"] = torch.tensor(labels)
                yield batch
                pictures, skipped = [], []

    def _pictures(self, worker: int) -> Iterator[tuple[str, torch.Tensor | None, int | None, dict[str, Any]]]:
        """Endless: a picture's name, its pixels or None where it cannot be read, its label, and the place after it."""
        dataset = self._share()
        place = self._places[worker]
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
                    value, label = block[index][self.image_column], block[index].get(self.label_column)
                    name = f"epoch {epoch}, process {self.process_index}, worker {worker}, row {place['row'] + index}"
                    if isinstance(value, dict) and value.get("path"):
                        name += f" ({value['path']})"
                    try:
                        if self.label_column is not None:
                            label = class_number(label, self.num_classes, self.has_class_labels)
                        image = open_image(value, self.max_image_pixels)
                        pixels = self.decode(image, np.random.default_rng(seeds[index]))
                    except MemoryError:  # which is not the picture's fault
                        raise
                    except Exception as error:  # PIL raises many kinds on a picture that is cut off or damaged
                        name += f": {error or type(error).__name__}"
                        if not self.skip_unreadable:
                            raise ValueError(f"A picture cannot be read: {name}") from error
                        pixels = None
                    readable = place["readable"] + (pixels is not None)
                    place = place | {"taken": place["taken"] + 1, "readable": readable}
                    yield name, pixels, label, place
                place = place | {"row": place["row"] + len(block), "taken": 0, "reader": dataset.state_dict()}
                block.clear()  # before the next is read

            # 3. Go on to the next epoch, unless this would never end.
            if place["readable"] == 0:
                raise ValueError(
                    f"Process {self.process_index}, worker {worker} found no picture that can be read in the "
                    f"{place['row']} rows that epoch {epoch} has for it. Check the data set, or take fewer workers."
                )
            place = _beginning(epoch + 1)

    def _share(self) -> datasets.IterableDataset:
        """The rows of this process; a new object, for all workers share the memory that holds the epoch of one."""
        return split_dataset_by_node(self.dataset, rank=self.process_index, world_size=self.num_processes)


def open_stream(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    resolution: tuple[int, int] = (64, 64),
    channels: int = 3,
    dataset_config_name: str | None = None,
    split: str = "train",
    crop: str = "center",
    **stream_arguments: Any,
) -> FaceStream:
    """Open a source as [`load_faces`] does, but as a stream.

    Args:
        dataset_name (`str`, *optional*): As that of [`load_faces`].
        train_data_dir (`str`, *optional*): As that of [`load_faces`].
        resolution (`(int, int)`, defaults to `(64, 64)`): Height and width in pixels.
        channels (`int`, defaults to 3): 1 (grey), 3 (RGB) or 4 (RGBA).
        dataset_config_name (`str`, *optional*): Configuration of the data set.
        split (`str`, defaults to `"train"`): Split of the dataset; a folder of images has no other.
        crop (`str`, defaults to `"center"`): `"center"` or `"random"`.
        **stream_arguments: Those of [`FaceStream`].

    Raises:
        ValueError: As [`load_faces`] and [`FaceStream`] say.
    """
    if channels not in MODES:
        raise ValueError(f"`channels` must be one of {', '.join(map(str, MODES))}, got {channels}.")
    if crop not in CROPS:
        raise ValueError(f"`crop` must be one of {', '.join(map(repr, CROPS))}, got {crop!r}.")
    name, folder = find_source(dataset_name, train_data_dir, split)
    if folder is not None:
        dataset = _stream_folder(folder, stream_arguments.get("label_column"))
    else:
        dataset = open_table(name, dataset_config_name, split, streaming=True)
    decode = partial(_decode, size=tuple(resolution), mode=MODES[channels], crop=crop)
    return FaceStream(dataset, decode, **stream_arguments)


def _stream_folder(folder: ImageFolder, label_column: str | None) -> datasets.IterableDataset:
    """The images of a folder, in the order in which [`load_faces`] reads them: each file is a shard."""
    check_folder_label(label_column)
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = {"paths": [str(path) for path in folder.paths]}
    if label_column is not None:
        labels = folder_labels(folder)
        features["folder"] = datasets.ClassLabel(names=sorted(set(labels)))
        rows["labels"] = features["folder"].str2int(labels)
    return datasets.IterableDataset.from_generator(_folder_rows, features=features, gen_kwargs=rows)


def _folder_rows(paths: list[str], labels: list[int] | None = None) -> Iterator[dict[str, Any]]:
    for index, path in enumerate(paths):
        row = {"image": {"bytes": None, "path": path}}
        yield row if labels is None else row | {"folder": labels[index]}


def _decode(image: Image.Image, rng: np.random.Generator, size: tuple[int, int], mode: str, crop: str) -> torch.Tensor:
    if crop == "center":
        return picture_to_tensor(image, size, mode)
    return random_crop(resize_to_cover(image, size, mode), size, tuple(rng.random(2)))


def _beginning(epoch: int) -> dict[str, Any]:
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
