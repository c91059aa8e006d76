"""Skips steps with a NaN or infinite gradient, and notices parameters that get no gradient."""

import logging

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn


logger = logging.getLogger(__name__)

# Layers that start at zero block the gradients of others in the first steps.
STEPS_UNTIL_CHECK = 100


class GradientGuard:
    """Makes an optimizer skip steps with a non-finite gradient, without the CPU waiting for the GPU.

    A non-finite loss has a non-finite gradient, so checking the gradient is enough.

    After 100 steps it also warns of parameters whose gradient has always been exactly zero. A compiler's error can
    cause this, and the loss does not show it.

    Args:
        unet (`torch.nn.Module`): The network. Its BatchNorm statistics are restored after a skipped step.
        optimizer ([`~accelerate.optimizer.AcceleratedOptimizer`]):
            The fused optimizer, as returned by `accelerator.prepare`. A fused optimizer reads a flag on the device.
    """

    def __init__(self, unet: nn.Module, optimizer: AcceleratedOptimizer) -> None:
        self.unet = unet
        self.optimizer = optimizer
        self.steps = 0
        self.buffers = [buffer for buffer in unet.buffers() if buffer.is_floating_point()]
        self.last_good = [buffer.clone() for buffer in self.buffers]

    def step(self, grad_norm: torch.Tensor) -> torch.Tensor:
        """Take the optimizer's step if `grad_norm`, of shape `()`, is finite; return whether it is, of shape `()`."""
        is_finite = grad_norm.isfinite()
        inner, scaler = self.optimizer.optimizer, self.optimizer.scaler
        if scaler is None and hasattr(inner.param_groups[0]["params"][0], "full_tensor"):
            # Fused steps on sharded parameters do not support the flag.
            if is_finite:
                self.optimizer.step()
        else:
            if scaler is None:  # the scaler checks the gradients itself
                inner.found_inf = (~is_finite).float()
            self.optimizer.step()
        for buffer, good in zip(self.buffers, self.last_good, strict=True):
            buffer.copy_(torch.where(is_finite, buffer, good))
            good.copy_(buffer)
        self.steps += 1
        if self.steps == STEPS_UNTIL_CHECK and self.optimizer.accelerator_state.is_main_process:
            self._warn_of_untrained()
        return is_finite

    def _warn_of_untrained(self) -> None:
        trained = {}
        for name, parameter in self.unet.named_parameters():
            # Adam's second moment is zero only if all gradients were.
            moment = self.optimizer.state.get(parameter, {}).get("exp_avg_sq")
            # A process holds only a part of a sharded parameter.
            if parameter.requires_grad and not hasattr(moment, "full_tensor"):
                trained[name] = moment is not None and bool(moment.any())
        untrained = [name for name, is_trained in trained.items() if not is_trained]
        if untrained and any(trained.values()):  # otherwise all steps were skipped, which is reported elsewhere
            logger.warning(
                "The gradient of %d of %d parameters has been exactly zero in every step, so they are not trained: "
                "%s%s. If the network is compiled, try it without `torch.compile`.",
                *(len(untrained), len(trained), ", ".join(untrained[:5]), ", ..." if len(untrained) > 5 else ""),
            )

    def remember(self) -> None:
        """Record the current statistics as good ones. Call this after loading them."""
        for buffer, good in zip(self.buffers, self.last_good, strict=True):
            good.copy_(buffer)
