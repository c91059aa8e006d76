"""Steps whose gradient is NaN or infinite, which must leave no trace in the weights."""

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn


class NonFiniteGuard:
    """Lets an optimizer skip a step whose gradient is not finite; the CPU does not wait for the GPU to know.

    A loss that is not finite makes its gradient so as well: there is one thing to look at.

    Args:
        unet (`torch.nn.Module`): The network, whose BatchNorm statistics such a step would spoil, too.
        optimizer ([`~accelerate.optimizer.AcceleratedOptimizer`]):
            As `accelerator.prepare` gives it, and fused: then it looks at a flag that is on the device.
    """

    def __init__(self, unet: nn.Module, optimizer: AcceleratedOptimizer) -> None:
        self.optimizer = optimizer
        self.buffers = [buffer for buffer in unet.buffers() if buffer.is_floating_point()]
        self.last_good = [buffer.clone() for buffer in self.buffers]

    def step(self, grad_norm: torch.Tensor) -> torch.Tensor:
        """Take the optimizer's step, if `grad_norm`, of shape `()`, is finite; return whether it is, of shape `()`."""
        is_finite = grad_norm.isfinite()
        inner, scaler = self.optimizer.optimizer, self.optimizer.scaler
        if scaler is None and hasattr(inner.param_groups[0]["params"][0], "full_tensor"):
            # Fused steps on sharded parameters take no flag.
            if is_finite:
                self.optimizer.step()
        else:
            if scaler is None:  # which looks at the gradients itself
                inner.found_inf = (~is_finite).float()
            self.optimizer.step()
        for buffer, good in zip(self.buffers, self.last_good, strict=True):
            buffer.copy_(torch.where(is_finite, buffer, good))
            good.copy_(buffer)
        return is_finite

    def remember(self) -> None:
        """Take the statistics as they are for good; after loading them."""
        for buffer, good in zip(self.buffers, self.last_good, strict=True):
            good.copy_(buffer)
