"""The training images of a run, and the held-out ones."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from ..data.batches import FaceBatches
from ..data.dataset import FaceDataset, hold_out
from ..data.folders import find_source
from ..data.loading import load_faces
from .config import LEAST_PICTURES, TrainingConfig


NUM_NEIGHBOURS = 50  # the audit compares each sample with this many nearest neighbors


if TYPE_CHECKING:
    from ..data.stream import FaceStream


@dataclass
class TrainingData:
    """The training data of a run, with its held-out images and statistics."""

    batches: "FaceBatches | FaceStream"
    share: slice  # the part of each batch that this process trains on
    held_out: FaceDataset | None
    fingerprint: str
    color_statistics: tuple[torch.Tensor, torch.Tensor] | None
    num_classes: int | None
    description: str
    num_held_out: int  # distinct images set aside from the training data; 0 with `validation_split`

    def all_captions(self, num_streamed: int = 20_000) -> list[str]:
        """Return the captions of the training images; of a stream, those of the first `num_streamed`."""
        if isinstance(self.batches, FaceBatches):
            return [text for texts in self.batches.dataset.captions or [] for text in texts]
        return self.batches.captions(num_streamed)


def load_training_data(
    config: TrainingConfig, accelerator: Accelerator, num_held_out: int | None = None
) -> TrainingData:
    """Open the images. The first process to get here decodes them, unless they are in the cache.

    Args:
        config ([`TrainingConfig`]): The run's configuration.
        accelerator ([`~accelerate.Accelerator`]): The processes that share each batch.
        num_held_out (`int`, *optional*):
            Number of distinct images that the resumed run has set aside. Keeping this number ensures that no image
            that the run has trained on becomes a held-out image when images are added to the folder.

    Raises:
        ValueError: The images, classes or sizes do not match the configuration.
    """
    share = share_of(config.train_batch_size, accelerator.process_index, accelerator.num_processes)
    source: dict[str, Any] = {
        "dataset_name": config.dataset_name,
        "train_data_dir": config.train_data_dir,
        "dataset_config_name": config.dataset_config_name,
        "image_column": config.image_column,
        "label_column": config.label_column,
        "caption_column": config.caption_column,
        "resolution": config.image_size,
        "channels": config.in_channels,
        "skip_unreadable": config.skip_unreadable,
        "max_image_pixels": config.max_image_pixels,
    }
    held_out = None
    if config.validation_split is not None and config.num_validation_images:
        _, folder = find_source(config.dataset_name, config.train_data_dir, "train")
        if folder is not None:
            raise ValueError(f"`validation_split` {config.validation_split!r}: a folder of images has no splits.")
        held_out = load_faces(
            **source,
            cache_dir=config.cache_dir,
            split=config.validation_split,
            max_images=config.num_validation_images,
        )
    if config.streaming:
        data = _stream(config, source, held_out, share, accelerator)
    else:
        data = _decoded(config, source, held_out, share, num_held_out)
    for name, least in LEAST_PICTURES.items():  # a small dataset sets fewer aside than requested
        count = len(data.held_out or [])
        if getattr(config, name) and count < least:
            raise ValueError(f"`{name}` needs at least {least} held-out images, and there are {count}.")
    if config.audit_every_images and len(data.batches.dataset) <= NUM_NEIGHBOURS:
        raise ValueError(
            f"`audit_every_images` needs more than {NUM_NEIGHBOURS} training images, and there are "
            f"{len(data.batches.dataset)}."
        )
    return data


def share_of(train_batch_size: int, process_index: int, num_processes: int) -> slice:
    """Return the part of each batch that a process trains on.

    Raises:
        ValueError: `train_batch_size` is not a multiple of `num_processes`.
    """
    if train_batch_size % num_processes:
        raise ValueError(
            f"`train_batch_size` must be a multiple of the number of processes ({num_processes}), got "
            f"{train_batch_size}."
        )
    size = train_batch_size // num_processes
    return slice(process_index * size, (process_index + 1) * size)


def _stream(
    config: TrainingConfig,
    source: dict[str, Any],
    held_out: FaceDataset | None,
    share: slice,
    accelerator: Accelerator,
) -> TrainingData:
    from ..data.stream import open_stream  # imports datasets, which takes time

    stream = open_stream(
        **source,
        split=config.dataset_split,
        crop=config.crop,
        num_class_embeds=config.num_class_embeds,
        batch_size=share.stop - share.start,
        seed=config.seed,
        block_size=config.shuffle_block_size,
        num_workers=config.dataloader_num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    if held_out is not None and config.label_column is not None:
        feature = (stream.dataset.features or {}).get(config.label_column)
        numbers = [str(number) for number in range(config.num_class_embeds or 0)]  # a stream keeps no labels
        held_out = held_out.relabelled(getattr(feature, "names", None) or numbers)
    identity = [config.dataset_name or config.train_data_dir, config.dataset_config_name, config.dataset_split]
    fingerprint = hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()
    description = f"a stream of {stream.dataset.num_shards} files"
    return TrainingData(stream, share, held_out, fingerprint, None, config.num_class_embeds, description, 0)


def _decoded(
    config: TrainingConfig,
    source: dict[str, Any],
    held_out: FaceDataset | None,
    share: slice,
    num_remembered: int | None,
) -> TrainingData:
    is_drawn = config.dataset_name is None and config.train_data_dir is None
    num_held_out = config.num_validation_images
    dataset = load_faces(
        **source,
        cache_dir=config.cache_dir,
        split=config.dataset_split,
        crop=config.crop,
        max_images=config.max_train_samples,
        # Held-out faces are drawn in addition to `num_drawn_images`.
        num_drawn_images=config.num_drawn_images + (num_held_out if is_drawn else 0),
    )
    if held_out is None:
        if num_remembered is not None:  # the run may have trained on all others
            num_held_out = min(num_held_out, num_remembered)
        elif not is_drawn:  # at most a tenth of a small dataset
            num_held_out = min(num_held_out, len(set(dataset.digests)) // 10)
        if num_held_out:
            dataset, held_out = hold_out(dataset, num_held_out)
    else:
        num_held_out = 0
    if num_held_out == 0 and held_out is not None and dataset.class_names is not None:
        held_out = held_out.relabelled(dataset.class_names)
    batches = FaceBatches(dataset, config.train_batch_size, share, config.seed, config.dataloader_num_workers)
    num_classes = config.num_class_embeds
    if dataset.class_names is not None:
        num_labels = len(dataset.class_names)
        if num_classes is not None and num_classes < num_labels:
            raise ValueError(
                f"`num_class_embeds` must be at least the number of classes ({num_labels}), got {num_classes}."
            )
        num_classes = num_classes or num_labels
    kind = "drawn faces" if is_drawn else "images"
    description = f"{len(dataset)} {kind} ({len(held_out or [])} more held out)"
    statistics = dataset.channel_statistics()
    return TrainingData(
        batches, share, held_out, dataset.fingerprint, statistics, num_classes, description, num_held_out
    )
