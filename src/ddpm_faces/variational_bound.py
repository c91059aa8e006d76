"""The terms of the variational bound, DDPM eq. 5 (https://huggingface.co/papers/2006.11239)."""

import math

import torch

from .scheduling_ddpm_faces import DDPMFacesScheduler


def bound_terms(
    scheduler: DDPMFacesScheduler,
    model_output: torch.Tensor,
    original_samples: torch.Tensor,
    noisy_samples: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Compute the term of the bound at each image's timestep: L_t-1 of eq. 5, or the pixels' likelihood L_0 at t = 0.

    Args:
        scheduler ([`DDPMFacesScheduler`]): Defines the reverse process, with its `variance_type` and its clipping.
        model_output (`torch.Tensor` of shape `(batch, channels, height, width)`):
            Prediction of the network; `2 * channels` with a learned variance.
        original_samples (`torch.Tensor` of shape `(batch, channels, height, width)`):
            x_0, with the 256 values of 8-bit pixels scaled to [-1, 1].
        noisy_samples (`torch.Tensor` of the same shape): x_t.
        timesteps (`torch.Tensor` of shape `(batch,)`, `torch.int64`): Timestep t of each image.

    Returns:
        `torch.Tensor` of shape `(batch,)`: The terms in bits per dimension, in the dtype of `original_samples`.
    """
    predicted_variance = None
    if model_output.shape[1] != original_samples.shape[1]:
        model_output, predicted_variance = model_output.chunk(2, dim=1)
    pred_original_sample = scheduler.predict_original_sample(model_output, timesteps, noisy_samples)

    def of_timestep(values: torch.Tensor) -> torch.Tensor:
        return values.to(original_samples)[timesteps].view(-1, 1, 1, 1)

    # 1. Variances of q(x_t-1 | x_t, x_0) and of p(x_t-1 | x_t). At t = 0, the first is 0, and p uses the value of
    # t = 1 (Improved DDPM): the sampler adds no noise there, but the likelihood of pixels needs some.
    posterior_variance = scheduler.posterior_variance.clone()
    posterior_variance[0] = posterior_variance[1] if len(posterior_variance) > 1 else scheduler.betas[0]
    posterior_variance = of_timestep(posterior_variance)
    variance = scheduler.variance(posterior_variance, of_timestep(scheduler.betas), predicted_variance)

    # 2. t > 0: the divergence of q from p. Their means differ by the error in x_0 times its coefficient in eq. 7.
    coefficient = scheduler.alphas_cumprod_prev.sqrt() * scheduler.betas / (1 - scheduler.alphas_cumprod)
    squared_difference = (of_timestep(coefficient) * (original_samples - pred_original_sample)) ** 2
    ratio = posterior_variance / variance
    divergence = 0.5 * (ratio - 1 - ratio.log() + squared_difference / variance)

    # 3. t = 0: the negative log-likelihood of the pixels, each a bin of width 2 / 255 (eq. 13)
    surprise = -_log_probability(original_samples, pred_original_sample, variance.sqrt())
    terms = torch.where(timesteps.view(-1, 1, 1, 1) > 0, divergence, surprise)
    return terms.flatten(start_dim=1).mean(dim=1) / math.log(2)


def _log_probability(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Log-probability that N(mean, std^2) rounds to x. The first and the last of the 256 values include the tails."""
    upper = torch.where(x > 1 - 1e-3, math.inf, (x - mean + 1 / 255) / std)
    lower = torch.where(x < -1 + 1e-3, -math.inf, (x - mean - 1 / 255) / std)
    # Computed in the left tail, where log_ndtr is accurate however small the probability is.
    is_right = lower + upper > 0
    upper, lower = torch.where(is_right, -lower, upper), torch.where(is_right, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log1p(-torch.exp(log_lower - log_upper))
