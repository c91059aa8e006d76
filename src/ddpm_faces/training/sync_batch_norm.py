"""BatchNorm over the samples of all processes, so that a run on many is the run on one (on the CPU, too).

Algorithm 1 of https://huggingface.co/papers/1502.03167, for each channel, with its sums taken over all processes:

    n        values of the channel: samples * height * width
    mu       = sum x / n
    sigma^2  = sum (x - mu)^2 / n
    y        = weight * (x - mu) / sqrt(sigma^2 + eps) + bias
"""

import torch
import torch.distributed as dist
from torch import nn


def convert_sync_batch_norm(module: nn.Module) -> nn.Module:
    """Let each `nn.BatchNorm2d` in `module` see the samples of all processes while it trains, in place.

    Parameters, buffers and the keys of the state dict stay what they are. Call it once `module` is on its device, and
    before it is wrapped for training; all processes must then run the same layers in the same order, each on any
    number of samples. In evaluation, and in one process, nothing changes.

    Args:
        module (`torch.nn.Module`): A network.

    Returns:
        `torch.nn.Module`: The same network.
    """
    if any(tensor.is_cuda for tensor in module.state_dict().values()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # the same in fused kernels, which the CPU has not
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNorm2d
    return module


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of all processes; made by [`convert_sync_batch_norm`].

    Unlike `nn.SyncBatchNorm`, it takes tensors on any device whose backend has `all_reduce`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise each channel.

        Args:
            input (`torch.Tensor` of shape `(batch, channels, height, width)`): x, the samples of this process.

        Returns:
            `torch.Tensor` of the shape and type of `input`: y.
        """
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        self._check_input_dim(input)

        # 1. n, mu and sigma^2, each (channels,), in float32 whatever the network's; mu first, as E[x^2] - mu^2 cancels
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        num_values = x.new_tensor([x.numel() // x.shape[1]])
        sums = _SumOverProcesses.apply(torch.cat([x.sum(dim=(0, 2, 3)), num_values]))
        num_values = sums[-1].detach()
        mean = sums[:-1] / num_values
        centered = x - mean[:, None, None]
        variance = _SumOverProcesses.apply(centered.square().sum(dim=(0, 2, 3))) / num_values

        # 2. Running statistics; of the variance, the unbiased one
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            unbiased_variance = variance.detach() * num_values / (num_values - 1)
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), momentum)

        # 3. y
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        output = centered * scale[:, None, None]
        if self.affine:
            output = output + self.bias[:, None, None]
        return output.to(input.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of each process's tensor, in each process. Its gradient is the sum of each process's gradient."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient
