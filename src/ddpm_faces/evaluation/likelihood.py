"""The variational bound of an image's likelihood, DDPM eq. 5 (https://huggingface.co/papers/2006.11239).

Bits per dimension are the bits per channel of a pixel that the model needs to compress the image.
"""

import math

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from ..data.images import to_samples
from ..scheduling_ddpm_faces import DDPMFacesScheduler
from ..variational_bound import bound_terms


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
    """Compute an upper bound on the bits per dimension of images. Every process must call it.

    Args:
        unet ([`DDPMFacesUNet`]): The network, without classes, in evaluation mode.
        scheduler ([`DDPMFacesScheduler`]): The scheduler that the network was trained with.
        images (`torch.Tensor` of shape `(num_images, channels, height, width)`, `torch.uint8`): The images.
        num_terms (`int`, *optional*):
            Number of terms to evaluate, at least 2; defaults to all T. The timesteps are divided into this number of
            groups. One timestep of each, drawn with a fixed seed, represents its group, which keeps the expectation.
        batch_size (`int`, defaults to 64): Evaluations in a batch.
        process_index (`int`, defaults to 0): Index of this process.
        num_processes (`int`, defaults to 1): Number of processes that share the images.

    Returns:
        `torch.Tensor` of shape `(num_images,)`, `torch.float64`: The bits, on every process.

    Raises:
        ValueError: `num_terms` is below 2.
    """
    if num_terms is not None and num_terms < 2:
        raise ValueError(f"`num_terms` must be at least 2 or None, got {num_terms}.")
    num_train_timesteps = scheduler.config.num_train_timesteps
    bounds = np.arange(num_train_timesteps + 1)
    if num_terms is not None and num_terms < num_train_timesteps:
        # The first and largest term is a group of its own. Groups are narrow where terms are large, and none is empty.
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
    """Return L_T of each image, the divergence of x_T from pure noise."""
    alpha_bar = scheduler.alphas_cumprod[-1].to(original_samples)
    divergence = 0.5 * (alpha_bar * original_samples**2 - alpha_bar - torch.log1p(-alpha_bar))
    return divergence.flatten(start_dim=1).mean(dim=1) / math.log(2)
