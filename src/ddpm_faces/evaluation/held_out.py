"""The loss on held-out images, always at the same timesteps with the same noise."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..data.dataset import FaceDataset
from ..data.images import to_samples


NUM_TIMESTEP_BINS = 10


def timestep_bins(num_train_timesteps: int) -> np.ndarray:
    """Return the bounds of the timestep bins of reported losses: bin i is bounds[i] to bounds[i + 1] - 1."""
    num_bins = min(NUM_TIMESTEP_BINS, num_train_timesteps)
    return np.linspace(0, num_train_timesteps, num_bins + 1).astype(np.int64)


def bin_names(num_train_timesteps: int) -> list[str]:
    """Return the names of the bins in order, such as "000-029"."""
    bounds = timestep_bins(num_train_timesteps)
    width = len(str(num_train_timesteps - 1))
    return [f"{first:0{width}}-{last - 1:0{width}}" for first, last in zip(bounds[:-1], bounds[1:], strict=True)]


@torch.no_grad()
def held_out_losses(
    accelerator,
    unet,
    objective,
    dataset: FaceDataset,
    batch_size: int,
    condition: Callable[[dict[str, Any]], dict[str, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Evaluate the objective on each image at one timestep in each bin. Every process must call it.

    Timestep and noise depend only on the index of the image, so two evaluations differ only if the weights differ. The
    random state does not change.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Distributes the images among its processes.
        unet (`torch.nn.Module`): The network, in evaluation mode.
        objective ([`DDPMFacesObjective`]): The loss.
        dataset ([`FaceDataset`]): The held-out images.
        batch_size (`int`): Images in a forward pass.
        condition (`Callable`, *optional*): Returns further arguments of the network for a batch of the dataset.

    Returns:
        `torch.Tensor` of shape `(num_images, num_bins)`, `torch.float32`: The losses, on every process.
    """
    bounds = timestep_bins(objective.scheduler.config.num_train_timesteps)
    rng = np.random.default_rng(0)
    cases = (len(dataset), len(bounds) - 1)
    timesteps = torch.from_numpy(rng.integers(bounds[:-1], bounds[1:], size=cases)).flatten()
    seeds = rng.integers(2**63, size=cases).flatten()

    # Each process takes every n-th case. All take the same number, because they evaluate a sharded network together.
    num_processes = accelerator.num_processes
    per_process = -(-len(seeds) // num_processes)
    mine = (np.arange(per_process) * num_processes + accelerator.process_index) % len(seeds)
    losses = []
    for first in range(0, per_process, batch_size):
        indices = mine[first : first + batch_size]
        batch = dataset.fetch(indices // cases[1])
        samples = to_samples(batch["images"].to(accelerator.device))
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[indices]]
        noise = torch.stack([torch.randn(samples.shape[1:], generator=generator) for generator in generators])
        labels = batch["labels"].to(accelerator.device) if "labels" in batch else None
        losses.append(
            objective(
                unet,
                samples,
                labels,
                timesteps=timesteps[indices].to(accelerator.device),
                noise=noise.to(accelerator.device),
                condition=condition and condition(batch),
            ).losses
        )
    gathered = accelerator.gather(torch.cat(losses)).view(num_processes, per_process)  # case k lies at [k % n, k // n]
    return gathered.T.flatten()[: len(seeds)].view(cases)
