"""An exponential moving average (EMA) of a network's weights and buffers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def averaged_tensors(unet: nn.Module) -> dict[str, torch.Tensor]:
    """What an EMA averages: parameters and floating-point buffers, by name."""
    buffers = {name: buffer for name, buffer in unet.named_buffers() if buffer.is_floating_point()}
    return {**dict(unet.named_parameters()), **buffers}


class EMA:
    """The EMA of all parameters and floating-point buffers of a network, such as BatchNorm's running statistics.

    Averaged weights want averaged statistics: those of the raw weights normalise other activations.

    Args:
        unet (`torch.nn.Module`):
            The network, on its device and prepared for training. The EMA starts as a copy of it. Each process of a
            sharded network (FSDP) averages its own shards.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.live = averaged_tensors(unet)
        self.shadow = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        self._is_sharded = any(hasattr(tensor, "full_tensor") for tensor in self.live.values())

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the weights that the network has now."""
        for name, tensor in self.live.items():
            self.shadow[name].copy_(tensor)

    @torch.no_grad()
    def update(self, decay: float, is_finite: torch.Tensor) -> None:
        """Move a step towards the weights: shadow = decay * shadow + (1 - decay) * weights.

        Args:
            decay (`float`): How much of the EMA stays, 0 to 1.
            is_finite (`torch.Tensor` of shape `()`, `torch.bool`):
                Whether the optimizer took its step. Where it did not, nothing moves; the CPU does not wait to know.
        """
        weight = (1 - decay) * is_finite.float()  # a tensor on the device
        shadow, live = list(self.shadow.values()), list(self.live.values())
        if self._is_sharded:  # there are no foreach kernels for shards
            number = weight.item()
            for average, tensor in zip(shadow, live, strict=True):
                average.add_((tensor.detach() - average) * number)
        else:
            differences = torch._foreach_sub(live, shadow)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(shadow, differences)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the network the averaged weights for as long as this lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self.live.items():
            raw = tensor.detach().clone()
            tensor.copy_(self.shadow[name])
            self.shadow[name].copy_(raw)
