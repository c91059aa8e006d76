"""The random numbers of a training step, which depend on (seed, images seen, place in the batch) and on nothing else.

However many processes share a batch, and however many micro-batches it is split into, an image meets the same timestep
and the same noise; and resuming a run needs no random state for them.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from .augmentation import NonLeakingAugmentation


# Keys of independent streams for the same step.
_CROPS, _DRAWS, _TIMESTEPS = 0, 1, 2

_GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples, modulo 1, leave no wide gap, wherever one begins and stops


class StepDraws(NamedTuple):
    """What is drawn for one process's share of a batch.

    Args:
        timesteps (`torch.Tensor` of shape `(share,)`, `torch.int64`): 0 to T - 1.
        flips (`torch.Tensor` of shape `(share,)`, `torch.bool`): Whether to mirror each picture.
        augmentations (`torch.Tensor` of shape `(share, 13)`): Of [`~NonLeakingAugmentation.draw`].
        noise (`torch.Tensor` of shape `(share, channels, height, width)`): N(0, 1).
    """

    timesteps: torch.Tensor
    flips: torch.Tensor
    augmentations: torch.Tensor
    noise: torch.Tensor

    def split(self, size: int) -> list["StepDraws"]:
        """The draws for micro-batches of at most `size` images."""
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
    """Draw for the step that begins after `images_seen` images.

    Args:
        seed (`int`): Seed of the run, at least 0.
        images_seen (`int`): Images trained on so far.
        batch_size (`int`): Pictures of the step, over all processes.
        share (`slice`): Those of this process.
        num_train_timesteps (`int`): T.
        sample_shape (`(int, int, int)`): Channels, height and width.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where to. CPU and GPU draw different noise.
        low_discrepancy (`bool`, defaults to `False`):
            Spread the timesteps of pictures that follow one another evenly, in place of drawing each by itself (as
            https://huggingface.co/papers/2107.00630 does, by another sequence): image k of the run meets
            t = floor(T frac(u + k (sqrt(5) - 1) / 2)), with one u for the run.

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

    # A seed per image: one for all would make each process draw the noise of all others as well.
    seeds, device = noise_seeds[share], torch.device(device)
    if device.type == "cuda":  # where a generator would launch a kernel for each image
        noise = counted_normal(torch.from_numpy(seeds).to(device), sample_shape)
    else:
        generator = torch.Generator(device)
        noise = torch.empty((len(seeds), *sample_shape), device=device)
        for image, image_seed in zip(noise, seeds.tolist(), strict=True):
            image.normal_(generator=generator.manual_seed(image_seed))
    timesteps, flips, augmentations = (
        tensor[share].to(device, non_blocking=True) for tensor in (timesteps, flips, augmentations)
    )
    return StepDraws(timesteps, flips, augmentations, noise)


def counted_normal(seeds: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal numbers that depend on a seed and their place, whichever other seeds are in the batch.

    The numbers of a seed are a SplitMix64 sequence (Steele et al., "Fast splittable pseudorandom number generators",
    2014), of which each 64 bits give two normal numbers by the Box-Muller transform.

    Args:
        seeds (`torch.Tensor` of shape `(batch,)`, `torch.int64`): A seed for each image.
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
    """The int64 of these 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits


def _shifted(bits: torch.Tensor, places: int) -> torch.Tensor:
    """Shift to the right, with zeros coming in, where torch's shift would copy the sign."""
    return (bits >> places) & (2 ** (64 - places) - 1)


def draw_crops(seed: int, images_seen: int, batch_size: int, share: slice) -> np.ndarray:
    """Where to crop the pictures of a step: of shape `(share, 2)`, in [0, 1), vertical and horizontal."""
    return np.random.default_rng((seed, images_seen, _CROPS)).random((batch_size, 2))[share]
