"""The variational bound of a picture's likelihood, DDPM eq. 5 (https://huggingface.co/papers/2006.11239).

In bits per dimension: how many bits each channel of each pixel would take, were the picture compressed with the model.
"""

import math

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from .data import to_samples
from .scheduling_ddpm_faces import DDPMFacesScheduler


def bound_terms(
    scheduler: DDPMFacesScheduler,
    model_output: torch.Tensor,
    original_samples: torch.Tensor,
    noisy_samples: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """What each picture's timestep adds to the bound: L_t-1 of eq. 5, or L_0, the likelihood of its pixels, at t = 0.

    Args:
        scheduler ([`DDPMFacesScheduler`]): The reverse process, with its `variance_type` and its clipping.
        model_output (`torch.Tensor` of shape `(batch, channels, height, width)`):
            What the network predicts; `2 * channels` with a learned variance.
        original_samples (`torch.Tensor` of shape `(batch, channels, height, width)`): x_0 in [-1, 1], of 256 values.
        noisy_samples (`torch.Tensor` of the same shape): x_t.
        timesteps (`torch.Tensor` of shape `(batch,)`, `torch.int64`): t of each.

    Returns:
        `torch.Tensor` of shape `(batch,)`: In bits per dimension, of the type of `original_samples`.
    """
    predicted_variance = None
    if model_output.shape[1] != original_samples.shape[1]:
        model_output, predicted_variance = model_output.chunk(2, dim=1)
    pred_original_sample = scheduler.predict_original_sample(model_output, timesteps, noisy_samples)

    def of_timestep(values: torch.Tensor) -> torch.Tensor:
        return values.to(original_samples)[timesteps].view(-1, 1, 1, 1)

    # 1. Variances of q(x_t-1 | x_t, x_0) and of p(x_t-1 | x_t). At t = 0 the first is 0, and p takes that of t = 1
    # (Improved DDPM): the sampler adds no noise there, but pixels need some for their likelihood.
    posterior_variance = scheduler.posterior_variance.clone()
    posterior_variance[0] = posterior_variance[1] if len(posterior_variance) > 1 else scheduler.betas[0]
    posterior_variance = of_timestep(posterior_variance)
    variance = scheduler.variance(posterior_variance, of_timestep(scheduler.betas), predicted_variance)

    # 2. t > 0: the divergence of q from p, whose means differ by that of x_0 times its coefficient in eq. 7
    coefficient = scheduler.alphas_cumprod_prev.sqrt() * scheduler.betas / (1 - scheduler.alphas_cumprod)
    squared_difference = (of_timestep(coefficient) * (original_samples - pred_original_sample)) ** 2
    ratio = posterior_variance / variance
    divergence = 0.5 * (ratio - 1 - ratio.log() + squared_difference / variance)

    # 3. t = 0: the negative log-likelihood of the pixels, each a bin of width 2 / 255 (eq. 13)
    surprise = -_log_probability(original_samples, pred_original_sample, variance.sqrt())
    terms = torch.where(timesteps.view(-1, 1, 1, 1) > 0, divergence, surprise)
    return terms.flatten(start_dim=1).mean(dim=1) / math.log(2)


@torch.no_grad()
def bits_per_dimension(
    unet: nn.Module,
    scheduler: DDPMFacesScheduler,
    images: torch.Tensor,
    num_terms: int | None = None,
    batch_size: int = 64,
    process_index: int = 0,
    num_processes: int = 1,
) -> torch.Tensor:
    """Bound the bits per dimension of pictures from above. Called by every process.

    Args:
        unet ([`DDPMFacesUNet`]): The network, without classes, in evaluation mode.
        scheduler ([`DDPMFacesScheduler`]): Of its training.
        images (`torch.Tensor` of shape `(num_images, channels, height, width)`, `torch.uint8`): The pictures.
        num_terms (`int`, *optional*):
            Of the T terms, how many to evaluate: one of each of so many groups of timesteps, drawn by a fixed seed,
            stands for its group, which leaves the mean what it is. At least 2; by default all.
        batch_size (`int`, defaults to 64): Evaluations at a time.
        process_index (`int`, defaults to 0): Which process this is.
        num_processes (`int`, defaults to 1): Among which the pictures are shared out.

    Returns:
        `torch.Tensor` of shape `(num_images,)`, `torch.float64`: On every process.

    Raises:
        ValueError: A `num_terms` below 2.
    """
    if num_terms is not None and num_terms < 2:
        raise ValueError(f"`num_terms` must be at least 2 or None, got {num_terms}.")
    num_train_timesteps = scheduler.config.num_train_timesteps
    bounds = np.arange(num_train_timesteps + 1)
    if num_terms is not None and num_terms < num_train_timesteps:
        # The first term, the largest, by itself; then narrow where terms are large and differ, and none empty.
        squares = np.linspace(0, 1, num_terms) ** 2
        bounds = np.unique([0, *(1 + (num_train_timesteps - 1) * squares).round().astype(int)])
    parameter = next(unet.parameters())
    mine, rows = range(process_index, len(images), num_processes), []
    for index in tqdm(mine, desc="Likelihood", unit="img", disable=process_index > 0):
        rng = np.random.default_rng((0, index))
        timesteps = torch.from_numpy(rng.integers(bounds[:-1], bounds[1:]))
        weights = torch.from_numpy(np.diff(bounds)).double()
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        sample = to_samples(images[index : index + 1])
        bits = _prior_bits(scheduler, sample.double()).sum()
        for chosen, weight in zip(timesteps.split(batch_size), weights.split(batch_size), strict=True):
            repeated = sample.expand(len(chosen), -1, -1, -1)
            noisy = scheduler.add_noise(repeated, torch.randn(repeated.shape, generator=generator), chosen)
            output = unet(noisy.to(parameter), chosen.to(parameter.device)).sample
            output = output.double().cpu()
            bits += (weight * bound_terms(scheduler, output, repeated.double(), noisy.double(), chosen)).sum()
        rows.append((index, bits.item()))
    if num_processes > 1:
        rows = sorted(gather_object(rows))
    return torch.tensor([bits for _, bits in rows], dtype=torch.float64)


def _prior_bits(scheduler: DDPMFacesScheduler, original_samples: torch.Tensor) -> torch.Tensor:
    """L_T of each picture: how far x_T is from pure noise."""
    alpha_bar = scheduler.alphas_cumprod[-1].to(original_samples)
    divergence = 0.5 * (alpha_bar * original_samples**2 - alpha_bar - torch.log1p(-alpha_bar))
    return divergence.flatten(start_dim=1).mean(dim=1) / math.log(2)


def _log_probability(x: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """log of the part of N(mean, deviation^2) that rounds to x; the first and last of 256 values take the tails."""
    upper = torch.where(x > 1 - 1e-3, math.inf, (x - mean + 1 / 255) / deviation)
    lower = torch.where(x < -1 + 1e-3, -math.inf, (x - mean - 1 / 255) / deviation)
    # In the left tail, where the logarithm of the distribution function is exact however small it is.
    is_right = lower + upper > 0
    upper, lower = torch.where(is_right, -lower, upper), torch.where(is_right, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log1p(-torch.exp(log_lower - log_upper))
