"""The images of a model card: a grid of faces, and a strip from noise to face."""

from pathlib import Path

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

from ..pipeline_ddpm_faces import DDPMFacesPipeline
from ..plots import image_grid
from ..solvers import fast_solver


_STRIP_FRAMES, _STRIP_FACES = 10, 2
_GRID_FACES, _GRID_STEPS = 16, 20


def check_drawing(pipeline: DDPMFacesPipeline) -> None:
    """Raise a `ValueError` if the scheduler cannot be used with the network, before any work starts."""
    labels = _labels(pipeline, 1)
    pipeline.check_inputs(1, pipeline.scheduler.config.num_train_timesteps, None, None, "pil", labels, (), 0.0)


def draw_grid(pipeline: DDPMFacesPipeline, path: Path, sigma_min: float | None) -> str:
    """Save a grid of 16 faces with the seeds 0 to 15. Return a description of the sampling."""
    steps, preset = None, pipeline.config.default_preset
    if preset is None:
        steps = min(_GRID_STEPS, pipeline.scheduler.config.num_train_timesteps)
        pipeline = pipeline.with_scheduler(fast_solver(pipeline.scheduler, sigma_min))
    pipeline.set_progress_bar_config(desc="Generating faces for the card", leave=False)
    labels = _labels(pipeline, _GRID_FACES)
    output: ImagePipelineOutput = pipeline(_GRID_FACES, steps, _seeds(_GRID_FACES), class_labels=labels)
    image_grid(output.images, scale=_scale(output.images[0])).save(path)
    if preset is None:
        return f"{steps} steps of DPM-Solver++"
    return f'{pipeline.num_timesteps} steps (`preset="{preset}"`)'


def draw_strip(pipeline: DDPMFacesPipeline, path: Path) -> list[int]:
    """Save two rows of images from noise to face, by the default preset. Return the timestep of each column."""
    frames, timesteps = [], []

    def keep(pipeline: DDPMFacesPipeline, index: int, timestep: int, values: dict) -> dict:
        total = pipeline.num_timesteps
        count = min(_STRIP_FRAMES, total)
        if index in {round((i + 1) * total / count) - 1 for i in range(count)}:
            frames.append(DDPMFacesPipeline.postprocess(values["latents"]))
            timesteps.append(int(timestep))
        return {}

    pipeline.set_progress_bar_config(desc="Generating the denoising strip for the card", leave=False)
    labels = _labels(pipeline, _STRIP_FACES)
    pipeline(_STRIP_FACES, generator=_seeds(_STRIP_FACES), callback_on_step_end=keep, class_labels=labels)
    rows: list[Image.Image] = [frame[face] for face in range(_STRIP_FACES) for frame in frames]
    image_grid(rows, columns=len(frames), scale=_scale(rows[0])).save(path)
    return timesteps


def _scale(image: Image.Image) -> int:
    """Return the factor that enlarges a small image to a visible size."""
    return max(1, 96 // max(image.size))


def _seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def _labels(pipeline: DDPMFacesPipeline, count: int) -> list[int] | None:
    classes = pipeline.unet.config.get("num_class_embeds")
    return None if classes is None else [i % classes for i in range(count)]


def copy_pixels(source: Path, destination: Path) -> None:
    """Copy an image without its metadata.

    Raises:
        ValueError: The file is not an image.
    """
    try:
        with Image.open(source) as image:
            pixels = image.convert("RGB")
    except OSError as error:
        raise ValueError(f"{source} must be an image: {error}") from error
    pixels.info.clear()
    pixels.save(destination)
