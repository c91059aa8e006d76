"""The images of one step with their timesteps, noise, flips and augmentations."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data.draws import StepDraws, draw_step
from .run import Run
from .setup import SetupError, setting_up
from .text import choose_captions


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """The images of one step on one process and its device, or a micro-batch of them.

    Args:
        images (`torch.Tensor` of shape `(share, channels, height, width)`, `torch.uint8`): 0 to 255.
        labels (`torch.Tensor` of shape `(share,)`, `torch.int64`, *optional*):
            Class labels. Those of some images are replaced by the class for no class (`condition_dropout`).
        text (`dict[str, torch.Tensor]`, *optional*):
            Captions, as arguments of [`PromptedUNet`]. Those of some images are hidden (`condition_dropout`).
        names (`Sequence[str]`): The file or row of each image.
        draws ([`StepDraws`]): The timestep, noise, flip and augmentation of each image.
        epoch (`int`): The epoch that the step begins in.
        is_last (`bool`): Whether this is the last micro-batch of the step.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    text: dict[str, torch.Tensor] | None
    names: Sequence[str]
    draws: StepDraws
    epoch: int
    is_last: bool = True

    def __len__(self) -> int:
        return len(self.images)

    @property
    def timesteps(self) -> torch.Tensor:
        """Timestep t of each image, of shape `(share,)`."""
        return self.draws.timesteps

    @property
    def noise(self) -> torch.Tensor:
        """Standard normal noise, of the shape of `images`."""
        return self.draws.noise

    def split(self, size: int) -> Iterator["Batch"]:
        """Iterate over micro-batches of at most `size` images."""
        draws = self.draws.split(size)
        for i, first in enumerate(range(0, len(self), size)):
            part = slice(first, first + size)
            yield replace(
                self,
                images=self.images[part],
                labels=None if self.labels is None else self.labels[part],
                text=self.text and {name: values[part] for name, values in self.text.items()},
                names=self.names[part],
                draws=draws[i],
                is_last=first + size >= len(self),
            )


def batches(run: Run) -> Iterator[Batch]:
    """Iterate over the batches of this process, from the current position of the run until its end."""
    config, data, device = run.config, run.data, run.accelerator.device
    loader = data.batches.batches(pin_memory=device.type == "cuda")
    while not run.is_finished:
        epoch, began = data.batches.epoch, time.perf_counter()
        try:
            with setting_up():  # in a stream, bad images and labels are found only when they are read
                values: dict[str, Any] = next(loader)
        except SetupError:
            run.log.bar.close()
            raise
        run.steps.note_wait(time.perf_counter() - began)
        for skipped in values.get("skipped", ()):
            logger.warning("Skipped an image that cannot be read: %s", skipped)
        images, labels = values["images"].to(device, non_blocking=True), values.get("labels")
        draws = draw_step(
            config.seed,
            run.state.images_seen,
            config.train_batch_size,
            data.share,
            len(run.objective.scheduler),
            images.shape[1:],
            device,
            config.low_discrepancy_timesteps,
        )
        if labels is not None:
            labels = labels.to(device, non_blocking=True)
            if config.condition_dropout:  # the number after the last class means no class
                labels = labels.where(draws.dropouts >= config.condition_dropout, config.num_class_embeds)
        text = None
        if run.text is not None:
            captions = choose_captions(values["captions"], config.seed, run.state.images_seen, data.share)
            text = run.text.batch(captions, draws.dropouts >= config.condition_dropout, device)
        yield Batch(images, labels, text, values["names"], draws, epoch)
