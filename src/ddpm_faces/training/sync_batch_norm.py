"""BatchNorm over the samples of all processes, so that several processes learn the same as one, even on a CPU.

Algorithm 1 of https://huggingface.co/papers/1502.03167 for each channel, with sums over all processes:

    n        number of values of the channel: samples * height * width
    mu       = sum x / n
    sigma^2  = sum (x - mu)^2 / n
    y        = weight * (x - mu) / sqrt(sigma^2 + eps) + bias
"""

import torch
import torch.distributed as dist
from torch import nn


def convert_sync_batch_norm(module: nn.Module) -> nn.Module:
    """Make each `nn.BatchNorm2d` in `module`, in place, use the samples of all processes during training.

    Parameters, buffers and state dict keys do not change. Call this once `module` is on its device and before it is
    wrapped for training. All processes must then run the same layers in the same order, each on any number of samples.
    Evaluation and single-process training do not change.

    Args:
        module (`torch.nn.Module`): A network.

    Returns:
        `torch.nn.Module`: The same network.
    """
    if any(tensor.is_cuda for tensor in module.state_dict().values()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # the same with fused CUDA kernels
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNorm2d
    return module


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the statistics of all processes during training, made by [`convert_sync_batch_norm`].

    Unlike `nn.SyncBatchNorm`, it works on any device whose backend supports `all_reduce`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize each channel.

        Args:
            input (`torch.Tensor` of shape `(batch, channels, height, width)`): x, the samples of this process.

        Returns:
            `torch.Tensor` with the shape and dtype of `input`: y.
        """
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        self._check_input_dim(input)

        # 1. n, mu and sigma^2, each (channels,), at least in float32. mu comes first, since E[x^2] - mu^2 cancels.
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        num_values = x.new_tensor([x.numel() // x.shape[1]])
        sums = _SumOverProcesses.apply(torch.cat([x.sum(dim=(0, 2, 3)), num_values]))
        num_values = sums[-1].detach()
        mean = sums[:-1] / num_values
        centered = x - mean[:, None, None]
        variance = _SumOverProcesses.apply(centered.square().sum(dim=(0, 2, 3))) / num_values

        # 2. Running statistics, with the unbiased variance
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
    """Sums a tensor over all processes. Its gradient is the sum of the gradients of all processes."""

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
