"""Samples during training, and grids of them."""

from typing import TYPE_CHECKING

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

from ..files import replacing
from ..pipeline_ddpm_faces import DDPMFacesPipeline
from ..plots import image_grid, side_by_side
from ..scheduling_ddpm_faces import DDPMFacesScheduler
from ..solvers import fast_solver


if TYPE_CHECKING:
    from .run import Run


def draw_samples(run: "Run", averaged: bool = True, num_samples: int | None = None) -> torch.Tensor:
    """Draw samples from the run's seeds in a few steps of the fast solver. Called by every process.

    Args:
        run ([`Run`]): The run whose weights and guide draw the samples.
        averaged (`bool`, defaults to `True`): Whether to use the EMA weights or the raw ones.
        num_samples (`int`, *optional*): Number of samples; defaults to `num_samples` of the configuration.

    Returns:
        `torch.Tensor` of shape `(num_samples, channels, height, width)`: x_0, on the CPU of each process.
    """
    return gather_shares(run, draw_share(run, averaged, num_samples), num_samples)


def draw_share(
    run: "Run", averaged: bool = True, num_samples: int | None = None, scheduler: DDPMFacesScheduler | None = None
) -> torch.Tensor:
    """Draw this process's share of the samples. Processes do not wait for each other here.

    Args:
        run ([`Run`]): The run whose weights and guide draw the samples.
        averaged (`bool`, defaults to `True`): Whether to use the EMA weights or the raw ones.
        num_samples (`int`, *optional*): Number of samples; defaults to `num_samples` of the configuration.
        scheduler ([`DDPMFacesScheduler`], *optional*): Scheduler to use in all T steps; defaults to the fast solver.

    Returns:
        `torch.Tensor` of shape `(share, channels, height, width)`: x_0, equally many on each process.
    """
    config, num_processes = run.config, run.accelerator.num_processes
    num_inference_steps = None
    if scheduler is None:
        scheduler = fast_solver(run.objective.scheduler)
        num_inference_steps = config.sample_inference_steps
    num_samples = num_samples or config.num_samples
    per_process = -(-num_samples // num_processes)
    mine = [(k * num_processes + run.accelerator.process_index) % num_samples for k in range(per_process)]
    samples = []
    with run.evaluating(averaged) as unet:
        pipeline = DDPMFacesPipeline(scheduler=scheduler, guide=run.guide, **run.components(unet), **run.scales)
        pipeline.set_progress_bar_config(desc="Sampling", leave=False, disable=not run.accelerator.is_main_process)
        for first in range(0, per_process, run.micro_batch_size):
            numbers = mine[first : first + run.micro_batch_size]
            generators = [torch.Generator().manual_seed(config.seed + number) for number in numbers]
            num_classes = config.num_class_embeds
            classes = [number % num_classes for number in numbers] if num_classes else None
            texts = config.sample_prompts
            prompts = [texts[number % len(texts)] for number in numbers] if texts else None
            output: ImagePipelineOutput = pipeline(
                prompts or len(numbers), num_inference_steps, generators, output_type="latent", class_labels=classes
            )
            samples.append(output.images)
    return torch.cat(samples)


def gather_shares(run: "Run", share: torch.Tensor, num_samples: int | None = None) -> torch.Tensor:
    """Gather the samples of all processes in the order of the seeds. Called by every process."""
    num_processes = run.accelerator.num_processes
    gathered = run.accelerator.gather(share.contiguous())
    gathered = gathered.view(num_processes, len(share), *gathered.shape[1:]).transpose(0, 1)
    return gathered.flatten(0, 1)[: num_samples or run.config.num_samples].cpu()


def sample_grid(run: "Run") -> None:
    """Draw a grid during training, with raw and EMA weights side by side, in a few steps of the fast solver."""
    samples = {}
    with run.steps.paused():
        if run.ema is not None:
            samples["weights"] = draw_samples(run, averaged=False)
        samples["EMA weights"] = draw_samples(run)
        show(run, samples)


def show(run: "Run", samples: dict[str, torch.Tensor]) -> Image.Image:
    """Log grids and color statistics of samples; return the last grid.

    Args:
        run ([`Run`]): The run whose log receives them.
        samples (`dict[str, torch.Tensor]`):
            Samples by title, each of shape `(num_samples, channels, height, width)` in [-1, 1].
    """
    last = list(samples.values())[-1]
    run.log.write(_colors(run, last))
    scale = max(1, 128 // max(run.config.image_size))
    grids = {title: image_grid(DDPMFacesPipeline.postprocess(s), scale=scale) for title, s in samples.items()}
    if run.accelerator.is_main_process:
        picture = side_by_side(grids)
        folder = run.output_dir / "samples"
        folder.mkdir(exist_ok=True)
        with replacing(folder / f"{run.state.images_seen:010d}.png") as path:
            picture.save(path, "PNG")
        run.log.write_image(picture)
    return list(grids.values())[-1]


def _colors(run: "Run", samples: torch.Tensor) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation of each channel in [-1, 1], of the samples and the training images."""
    channels = "rgba" if samples.shape[1] > 1 else "y"
    pixels = samples.clamp(-1, 1).transpose(0, 1).flatten(1)
    statistics = {"samples": (pixels.mean(dim=1), pixels.std(dim=1)), "data": run.data.color_statistics}
    values = {}
    for source, of_channels in statistics.items():
        if of_channels is None:
            continue
        for name, per_channel in zip(("mean", "std"), of_channels, strict=True):
            values[f"{source}_{name}"] = dict(zip(channels, per_channel.tolist(), strict=False))
    return values
