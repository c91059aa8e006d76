"""An exponential moving average (EMA) of a network's weights and buffers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def averaged_tensors(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that an EMA averages: parameters and floating-point buffers, by name."""
    buffers = {name: buffer for name, buffer in unet.named_buffers() if buffer.is_floating_point()}
    return {**dict(unet.named_parameters()), **buffers}


class EMA:
    """The EMA of all parameters and floating-point buffers of a network, such as BatchNorm's running statistics.

    Averaged weights need averaged statistics, because the raw statistics describe the activations of the raw weights.

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
        """Restart the EMA from the current weights of the network."""
        for name, tensor in self.live.items():
            self.shadow[name].copy_(tensor)

    @torch.no_grad()
    def update(self, decay: float, is_finite: torch.Tensor) -> None:
        """Update the EMA: shadow = decay * shadow + (1 - decay) * weights.

        Args:
            decay (`float`): The decay of the EMA, 0 to 1.
            is_finite (`torch.Tensor` of shape `()`, `torch.bool`):
                Whether the optimizer took its step. If it did not, the EMA stays unchanged. The flag is used on the
                device, so the CPU does not wait for it.
        """
        weight = (1 - decay) * is_finite.float()  # a tensor on the device
        shadow, live = list(self.shadow.values()), list(self.live.values())
        if self._is_sharded:  # shards have no foreach kernels
            number = weight.item()
            for average, tensor in zip(shadow, live, strict=True):
                average.add_((tensor.detach() - average) * number)
        else:
            differences = torch._foreach_sub(live, shadow)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(shadow, differences)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Use the EMA weights in the network within this context."""
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
