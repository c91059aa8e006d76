"""Images from a stream: a dataset that is read during training and never stored completely.

A stream has the order of its files. `reader.py` reads a block of rows without decoding them, shuffles them, and
decodes one after the other. A position in the stream is small: where the block begins in the files, and the number of
its images that have been taken. Resuming from a position reads that block again, but decodes no earlier image.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .batches import make_data_loader, restarting
from .captions import CAPTION_FILES, captions_of, check_folder_caption, folder_captions
from .folders import ImageFolder, find_source
from .images import CROPS, MAX_IMAGE_PIXELS, MODES, picture_to_tensor, random_crop, resize_to_cover
from .labels import check_folder_label, folder_labels
from .reader import StreamReader, beginning
from .tables import open_table


class FaceStream(IterableDataset):
    """Endless batches of decoded images, split over processes and workers, that resume exactly.

    ```python
    stream = FaceStream(dataset, decode, batch_size=32, num_workers=4, process_index=rank, num_processes=world_size)
    message = stream.load_state_dict(checkpoint["stream"])  # None, or the reason why the epoch restarts
    for batch in stream.batches(pin_memory=True):
        ...
        checkpoint["stream"] = stream.state_dict()  # of this process after this batch, not counting prefetched ones
    ```

    Each epoch reads every image once, with the files in a new order. The files are shared among the processes, and
    then among the workers of each process. If they cannot be divided evenly, the processes take turns at the rows
    instead. A worker continues with its next epoch by itself, and its batches may span blocks and epochs.

    Args:
        dataset (`datasets.IterableDataset`):
            The result of `load_dataset(..., split=..., streaming=True)`. It must not have a shuffle buffer, which
            could not resume.
        decode (`Callable[[PIL.Image.Image, numpy.random.Generator], torch.Tensor]`):
            Turns an image into a `torch.uint8` tensor of shape `(channels, height, width)`, 0 to 255. The generator
            gives the same numbers after resuming. On systems without `fork`, this must be a module-level function.
        image_column (`str`, *optional*): Column of the images; defaults to the first that contains images.
        label_column (`str`, *optional*): Column of integers or class labels.
        batch_size (`int`, defaults to 32): Number of images per batch, which is one process's share of a step.
        seed (`int`, defaults to 0): Seed of the order and of the generator for `decode`, at least 0.
        block_size (`int`, defaults to 1024): Number of images that are shuffled together. Each worker keeps a block in
            memory, undecoded.
        num_workers (`int`, defaults to 0):
            Number of worker processes; 0 reads in this process. There are never more workers than files per process.
        process_index (`int`, defaults to 0): Index of this process.
        num_processes (`int`, defaults to 1): Number of processes that train together.
        skip_unreadable (`bool`, defaults to `False`):
            Whether to skip and report images that cannot be read or have no valid label, instead of raising an error.
        num_class_embeds (`int`, *optional*):
            Number of classes of the network. Labels must be 0 to `num_class_embeds` - 1. Defaults to the number of
            names of class labels.
        max_image_pixels (`int`, defaults to 2**29): As in [`load_faces`].
        caption_column (`str`, *optional*): As in [`load_faces`].

    Raises:
        ValueError: A column contains no images or no labels, or there are more classes than `num_class_embeds`. While
            reading, an image cannot be read or has no valid label (the message names it), or an epoch has no readable
            image.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        decode: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        image_column: str | None = None,
        label_column: str | None = None,
        batch_size: int = 32,
        seed: int = 0,
        block_size: int = 1024,
        num_workers: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        skip_unreadable: bool = False,
        num_class_embeds: int | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        caption_column: str | None = None,
    ) -> None:
        if min(batch_size, block_size) < 1:
            raise ValueError(f"`batch_size` and `block_size` must be at least 1, got {batch_size} and {block_size}.")
        if max_image_pixels < 1:
            raise ValueError(f"`max_image_pixels` must be at least 1, got {max_image_pixels}.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"`process_index` must be 0 to {num_processes - 1}, got {process_index}.")
        self._reader = StreamReader(
            dataset,
            decode,
            image_column=image_column,
            label_column=label_column,
            num_class_embeds=num_class_embeds,
            seed=seed,
            block_size=block_size,
            process_index=process_index,
            num_processes=num_processes,
            skip_unreadable=skip_unreadable,
            max_image_pixels=max_image_pixels,
            caption_column=caption_column,
        )
        self.dataset = self._reader.dataset
        self.batch_size = batch_size
        self.num_workers = min(
            num_workers, self._reader.share().num_shards
        )  # a worker without a file would have no rows
        self.num_skipped = 0
        self._next_worker = 0
        self.start_epoch(0)

    # In the training process

    def batches(self, pin_memory: bool = False) -> Iterator[dict[str, Any]]:
        """Iterate endlessly from the current position.

        Args:
            pin_memory (`bool`, defaults to `False`): Whether to copy batches to pinned memory, for transfer to a GPU.

        Yields:
            `dict`:
            - **images** (`torch.Tensor` of shape `(batch_size, channels, height, width)`, `torch.uint8`) -- 0 to 255.
            - **labels** (`torch.Tensor` of shape `(batch_size,)`, `torch.int64`) -- Class labels, if requested.
            - **captions** (`list[list[str]]`) -- Captions, if requested.
            - **names** (`list[str]`) -- The row, and if known the file, of each image.
            - **skipped** (`list[str]`) -- Images skipped since the same worker's previous batch, each with the reason.
        """
        for batch in restarting(lambda: make_data_loader(self, self.num_workers, pin_memory)):
            if batch is None:
                continue
            self._places[self._next_worker] = batch.pop("place")
            self._next_worker = (self._next_worker + 1) % len(self._places)
            self.num_skipped += len(batch["skipped"])
            yield batch

    def captions(self, num_images: int) -> list[str]:
        """Return the captions of the first images."""
        rows = self.dataset.select_columns([self._reader.caption_column]).take(num_images)
        return [text for row in rows for text in captions_of(row[self._reader.caption_column])]

    @property
    def epoch(self) -> int:
        """The epoch of the worker that is furthest behind."""
        return min(place["epoch"] for place in self._places)

    def start_epoch(self, epoch: int) -> None:
        """Make [`~FaceStream.batches`] begin with the first image of an epoch."""
        self._places = [beginning(epoch)] * max(1, self.num_workers)
        self._next_worker = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch of [`~FaceStream.batches`], as plain values for JSON."""
        return {
            "split": self._split(),
            "places": list(self._places),
            "next_worker": self._next_worker,
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> str | None:
        """Make [`~FaceStream.batches`] continue from a position.

        Args:
            state_dict (`dict`): The result of [`~FaceStream.state_dict`] in the same process. The batch size may have
                changed.

        Returns:
            `str`, *optional*: `None` if the batches resume exactly. If the images are now split or shuffled
            differently, the epoch restarts, and this sentence explains why.
        """
        self.num_skipped = state_dict["num_skipped"]
        changes = [
            f"`{name}` was {state_dict['split'][name]} and is {value}"
            for name, value in self._split().items()
            if state_dict["split"][name] != value
        ]
        if changes:
            self.start_epoch(min(place["epoch"] for place in state_dict["places"]))
            return f"The stream restarts epoch {self.epoch}, because {', '.join(changes)}."
        self._places = list(state_dict["places"])
        self._next_worker = state_dict["next_worker"]
        return None

    def _split(self) -> dict[str, int]:
        return {
            "num_processes": self._reader.num_processes,
            "process_index": self._reader.process_index,
            "num_workers": len(self._places),  # 0 and 1 worker read alike
            "num_shards": self.dataset.num_shards,
            "block_size": self._reader.block_size,
            "seed": self._reader.seed,
        }

    # In a worker

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if worker < self._next_worker:
            yield None  # a DataLoader begins with worker 0, so workers before the next one pass
        yield from self._reader.batches(worker, self._places[worker], self.batch_size)


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
        dataset_name (`str`, *optional*): As in [`load_faces`].
        train_data_dir (`str`, *optional*): As in [`load_faces`].
        resolution (`(int, int)`, defaults to `(64, 64)`): Height and width in pixels.
        channels (`int`, defaults to 3): 1 (grayscale), 3 (RGB) or 4 (RGBA).
        dataset_config_name (`str`, *optional*): Configuration of the dataset.
        split (`str`, defaults to `"train"`): Split of the dataset. A folder of images has no other split.
        crop (`str`, defaults to `"center"`): `"center"` or `"random"`.
        **stream_arguments: Arguments of [`FaceStream`].

    Raises:
        ValueError: As for [`load_faces`] and [`FaceStream`].
    """
    if channels not in MODES:
        raise ValueError(f"`channels` must be one of {', '.join(map(str, MODES))}, got {channels}.")
    if crop not in CROPS:
        raise ValueError(f"`crop` must be one of {', '.join(map(repr, CROPS))}, got {crop!r}.")
    name, folder = find_source(dataset_name, train_data_dir, split)
    if folder is not None:
        dataset = _stream_folder(folder, stream_arguments.get("label_column"), stream_arguments.get("caption_column"))
    else:
        dataset = open_table(name, dataset_config_name, split, streaming=True)
    height, width = resolution
    decode = partial(_decode, size=(height, width), mode=MODES[channels], crop=crop)
    return FaceStream(dataset, decode, **stream_arguments)


def _stream_folder(
    folder: ImageFolder, label_column: str | None, caption_column: str | None
) -> datasets.IterableDataset:
    """Stream the images of a folder in the order of [`load_faces`], with each file as a shard."""
    check_folder_label(label_column)
    check_folder_caption(caption_column)
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows: dict[str, Any] = {"paths": [str(path) for path in folder.paths]}
    if label_column is not None:
        labels = folder_labels(folder)
        features["folder"] = datasets.ClassLabel(names=sorted(set(labels)))
        rows["labels"] = features["folder"].str2int(labels)
    if caption_column is not None:
        features[caption_column] = datasets.List(datasets.Value("string"))
        rows["captions"] = folder_captions(folder)
    return datasets.IterableDataset.from_generator(_folder_rows, features=features, gen_kwargs=rows)


def _folder_rows(
    paths: list[str], labels: list[int] | None = None, captions: list[list[str]] | None = None
) -> Iterator[dict[str, Any]]:
    for index, path in enumerate(paths):
        row: dict[str, Any] = {"image": {"bytes": None, "path": path}}
        row |= {} if labels is None else {"folder": labels[index]}
        yield row if captions is None else row | {CAPTION_FILES: captions[index]}


def _decode(image: Image.Image, rng: np.random.Generator, size: tuple[int, int], mode: str, crop: str) -> torch.Tensor:
    if crop == "center":
        return picture_to_tensor(image, size, mode)
    return random_crop(resize_to_cover(image, size, mode), size, tuple(rng.random(2)))
