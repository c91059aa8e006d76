"""Random numbers of a training step, which depend only on (seed, images seen, position in the batch).

An image therefore gets the same timestep and the same noise for any number of processes and micro-batches, and
resuming a run needs no random state.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from .augmentation import NonLeakingAugmentation


# Keys of independent random streams for the same step.
_CROPS, _DRAWS, _TIMESTEPS = 0, 1, 2

_GOLDEN_RATIO = (5**0.5 - 1) / 2  # any run of its multiples, modulo 1, is spread evenly


class StepDraws(NamedTuple):
    """The random numbers for one process's share of a batch.

    Args:
        timesteps (`torch.Tensor` of shape `(share,)`, `torch.int64`): 0 to T - 1.
        flips (`torch.Tensor` of shape `(share,)`, `torch.bool`): Whether to mirror each image.
        augmentations (`torch.Tensor` of shape `(share, 13)`): Rows of [`~NonLeakingAugmentation.draw`].
        noise (`torch.Tensor` of shape `(share, channels, height, width)`): N(0, 1).
        dropouts (`torch.Tensor` of shape `(share,)`): [0, 1). Images below `condition_dropout` lose their condition.
    """

    timesteps: torch.Tensor
    flips: torch.Tensor
    augmentations: torch.Tensor
    noise: torch.Tensor
    dropouts: torch.Tensor

    def split(self, size: int) -> list["StepDraws"]:
        """Split into micro-batches of at most `size` images."""
        return [StepDraws(*parts) for parts in zip(*(tensor.split(size) for tensor in self), strict=True)]


def draw_step(
    seed: int,
    images_seen: int,
    batch_size: int,
    share: slice,
    num_train_timesteps: int,
    sample_shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    low_discrepancy: bool = False,
) -> StepDraws:
    """Draw the random numbers of the step that begins after `images_seen` images.

    Args:
        seed (`int`): Seed of the run, at least 0.
        images_seen (`int`): Images trained on so far.
        batch_size (`int`): Number of images in the step, over all processes.
        share (`slice`): The part of the batch that belongs to this process.
        num_train_timesteps (`int`): T.
        sample_shape (`(int, int, int)`): Channels, height and width.
        device (`torch.device` or `str`, defaults to `"cpu"`): Device of the results. CPU and GPU draw different noise.
        low_discrepancy (`bool`, defaults to `False`):
            Whether to spread the timesteps of consecutive images evenly instead of drawing each independently (like
            https://huggingface.co/papers/2107.00630, with a different sequence): image k of the run gets the timestep
            t = floor(T frac(u + k (sqrt(5) - 1) / 2)), with one u for the whole run.

    Returns:
        [`StepDraws`]
    """
    rng = np.random.default_rng((seed, images_seen, _DRAWS))
    timesteps = torch.from_numpy(rng.integers(num_train_timesteps, size=batch_size))
    if low_discrepancy:
        start = np.random.default_rng((seed, _TIMESTEPS)).random()
        places = (start + (images_seen + np.arange(batch_size)) * _GOLDEN_RATIO) % 1
        timesteps = torch.from_numpy((places * num_train_timesteps).astype(np.int64))
    flips = torch.from_numpy(rng.random(batch_size) < 0.5)
    noise_seeds = rng.integers(2**63, size=batch_size)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    augmentations = NonLeakingAugmentation.draw(batch_size, generator)
    dropouts = torch.from_numpy(rng.random(batch_size, dtype=np.float32))  # MPS has no float64

    # Each image has its own seed. With one seed for all, each process would have to draw the noise of all images.
    seeds, device = noise_seeds[share], torch.device(device)
    if device.type == "cuda":  # a generator would launch a kernel for each image
        noise = counted_normal(torch.from_numpy(seeds).to(device), sample_shape)
    else:
        generator = torch.Generator(device)
        noise = torch.empty((len(seeds), *sample_shape), device=device)
        for image, image_seed in zip(noise, seeds.tolist(), strict=True):
            image.normal_(generator=generator.manual_seed(image_seed))
    timesteps, flips, augmentations, dropouts = (
        tensor[share].to(device, non_blocking=True) for tensor in (timesteps, flips, augmentations, dropouts)
    )
    return StepDraws(timesteps, flips, augmentations, noise, dropouts)


def counted_normal(seeds: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw normal numbers that depend only on a seed and their position, not on the other seeds in the batch.

    Each seed starts a SplitMix64 sequence (Steele et al., "Fast splittable pseudorandom number generators", 2014). The
    Box-Muller transform turns each 64 bits into two normal numbers.

    Args:
        seeds (`torch.Tensor` of shape `(batch,)`, `torch.int64`): The seed of each image.
        shape (`tuple[int, ...]`): The shape of an image.

    Returns:
        `torch.Tensor` of shape `(batch, *shape)`, `torch.float32`: N(0, 1), within 6.8 of 0.
    """
    number = math.prod(shape)
    places = torch.arange(1, (number + 1) // 2 + 1, device=seeds.device)
    bits = seeds[:, None] + places * _signed(0x9E3779B97F4A7C15)  # (batch, ceil(number / 2)); int64 wraps around
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    bits = bits ^ _shifted(bits, 31)
    radius = ((_shifted(bits, 32).float() + 0.5) * 2**-32).log().mul(-2).sqrt()
    angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2**-32)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.flatten(1)[:, :number].reshape(-1, *shape)


def _signed(bits: int) -> int:
    """Return the int64 with these 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits


def _shifted(bits: torch.Tensor, places: int) -> torch.Tensor:
    """Shift to the right and fill with zeros. torch's shift would fill with the sign."""
    return (bits >> places) & (2 ** (64 - places) - 1)


def draw_crops(seed: int, images_seen: int, batch_size: int, share: slice) -> np.ndarray:
    """Draw vertical and horizontal crop positions for the images of a step, of shape `(share, 2)`, in [0, 1)."""
    return np.random.default_rng((seed, images_seen, _CROPS)).random((batch_size, 2))[share]
