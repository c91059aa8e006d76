"""Skips steps with a NaN or infinite gradient, so that they do not affect the weights."""

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn


class NonFiniteGuard:
    """Makes an optimizer skip steps with a non-finite gradient, without the CPU waiting for the GPU.

    A non-finite loss has a non-finite gradient, so checking the gradient is enough.

    Args:
        unet (`torch.nn.Module`): The network. Its BatchNorm statistics are restored after a skipped step.
        optimizer ([`~accelerate.optimizer.AcceleratedOptimizer`]):
            The fused optimizer, as returned by `accelerator.prepare`. A fused optimizer reads a flag on the device.
    """

    def __init__(self, unet: nn.Module, optimizer: AcceleratedOptimizer) -> None:
        self.optimizer = optimizer
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
        return is_finite

    def remember(self) -> None:
        """Record the current statistics as good ones. Call this after loading them."""
        for buffer, good in zip(self.buffers, self.last_good, strict=True):
            good.copy_(buffer)
