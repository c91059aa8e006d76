"""The state that the parts of a training run share."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from ..objective import DDPMFacesObjective
from ..unet_ddpm_faces import DDPMFacesUNet
from .config import TrainingConfig
from .data import TrainingData
from .ema import EMA
from .preemption import Preemption
from .state import RunState
from .text import TextSide, split_weights


if TYPE_CHECKING:
    from .log import TrainingLog
    from .steps import StepRecorder


@dataclass
class Run:
    """The objects of a run, for the functions that log, validate, sample, save and finish it.

    Args:
        config ([`TrainingConfig`]): The configuration, with the number of classes filled in.
        accelerator ([`~accelerate.Accelerator`]): Holds the prepared network and optimizer.
        unet (`torch.nn.Module`): The prepared network.
        optimizer (`torch.optim.Optimizer`): The prepared optimizer.
        ema ([`EMA`], *optional*): The EMA of the weights of `unet`.
        objective ([`DDPMFacesObjective`]): The loss.
        data ([`TrainingData`]): The training and held-out images.
        preemption ([`Preemption`]): Knows whether the run has to stop.
        log ([`TrainingLog`]): The log that receives losses and metrics.
        steps ([`StepRecorder`]): Measurements of the steps since the last log entry.
        state ([`RunState`]): Progress of the run; shared with the log.
        guide ([`DDPMFacesUNet`], *optional*): An earlier EMA of this run, for autoguidance.
        text ([`TextSide`], *optional*): Tokenizer and encoder of the captions.
    """

    config: TrainingConfig
    accelerator: Accelerator
    unet: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    objective: DDPMFacesObjective
    data: TrainingData
    preemption: Preemption
    log: "TrainingLog"
    steps: "StepRecorder"
    state: RunState
    guide: DDPMFacesUNet | None = None
    text: TextSide | None = None
    began: float = field(default_factory=time.time)

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def last_image(self) -> int:
        """Number of images seen at the end of the full run."""
        return self.config.max_train_steps * self.config.train_batch_size

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far, including before it was resumed."""
        return self.state.seconds + time.time() - self.began

    @property
    def micro_batch_size(self) -> int:
        """Number of images in a forward pass of training, which is known to fit in memory."""
        share = self.config.train_batch_size // self.accelerator.num_processes
        return min(share, self.config.device_batch_size or share)

    @property
    def stopped_early(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.validations_since_best >= patience

    @property
    def stopped_on_copies(self) -> bool:
        audits = self.state.audits
        return self.config.stop_on_copies and bool(audits) and audits[-1]["found_copies"]

    @property
    def is_finished(self) -> bool:
        return self.stopped_early or self.stopped_on_copies or self.state.images_seen >= self.last_image

    @property
    def scales(self) -> dict[str, Any]:
        """The scales of guidance in samples, and of the finished pipeline."""
        autoguidance_scale = 1.0 if self.guide is None else self.config.autoguidance_scale
        return {"guidance_scale": self.config.guidance_scale, "autoguidance_scale": autoguidance_scale}

    @contextmanager
    def evaluating(self, averaged: bool = True) -> Iterator[torch.nn.Module]:
        """Put the network into evaluation mode within this context, with the EMA weights if there are any."""
        unet = self.accelerator.unwrap_model(self.unet)
        unet.eval()
        try:
            # Otherwise a compiled network would be recompiled for evaluation and for each batch size.
            with (
                self.ema.swapped_in() if averaged and self.ema is not None else nullcontext(),
                torch.compiler.set_stance("force_eager"),
            ):
                try:
                    yield unet
                finally:
                    for module in unet.modules():
                        if hasattr(module, "reshard"):  # FSDP, after a forward pass without a backward one
                            module.reshard()
        finally:
            unet.train()

    def network(self, weights: dict[str, torch.Tensor]) -> DDPMFacesUNet:
        """Build a separate network with these weights."""
        with torch.random.fork_rng(devices=[]):  # initial weights must not advance the training's random state
            unet = DDPMFacesUNet(**self.config.unet_config())
        unet.load_state_dict(split_weights(weights, "unet"))
        return unet.eval().requires_grad_(False)

    def text_components(self, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the components of a pipeline that encode its prompts, with these weights."""
        if self.text is None:
            return {}
        encoder = copy.deepcopy(self.text.text_encoder).cpu()
        if self.text.is_trained:
            encoder.load_state_dict(split_weights(weights, "text_encoder"))
        return {"tokenizer": self.text.tokenizer, "text_encoder": encoder.eval().requires_grad_(False)}

    def components(self, network: torch.nn.Module) -> dict[str, Any]:
        """Return the components of a pipeline of the network in training, from [`evaluating`]."""
        if self.text is None:
            return {"unet": network}
        encoder = self.text.text_encoder
        return {
            "unet": network.unet,
            "tokenizer": self.text.tokenizer,
            "text_encoder": network.text_encoder or encoder,
        }

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Copy the EMA weights, or the raw ones without an EMA, to the CPU. Only the main process has all of them."""
        with self.evaluating():
            return {k: v.cpu().clone() for k, v in self.accelerator.get_state_dict(self.unet).items()}

    def set_guide(self, weights: dict[str, torch.Tensor]) -> None:
        """Use these weights as the guide."""
        guide = self.network(weights).to(self.accelerator.device, memory_format=torch.channels_last)
        guide.forward = self.accelerator.autocast()(guide.forward)  # same precision as the network
        self.guide = guide
