"""The random numbers of a training step, which depend on (seed, images seen, place in the batch) and on nothing else.

Whatever number of processes share a batch, and in however many passes, a picture meets the same timestep and the same
noise; and whoever resumes a run needs no random state for them.
"""

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
        """The draws for passes of at most `size` pictures."""
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
        device (`torch.device` or `str`, defaults to `"cpu"`): Where to. Noise differs between CPU and GPU.
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

    # A generator's seed per picture: one for all would make each process draw the noise of all others as well.
    generator = torch.Generator(device)
    seeds = noise_seeds[share].tolist()
    noise = torch.empty((len(seeds), *sample_shape), device=device)
    for picture, picture_seed in zip(noise, seeds, strict=True):
        picture.normal_(generator=generator.manual_seed(picture_seed))
    small = (tensor[share].to(device, non_blocking=True) for tensor in (timesteps, flips, augmentations))
    return StepDraws(*small, noise)


def draw_crops(seed: int, images_seen: int, batch_size: int, share: slice) -> np.ndarray:
    """Where to crop the pictures of a step: of shape `(share, 2)`, in [0, 1), vertical and horizontal."""
    return np.random.default_rng((seed, images_seen, _CROPS)).random((batch_size, 2))[share]
