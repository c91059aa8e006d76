"""Generate images into files: a grid or a folder of single images, with the recipe in the PNG metadata."""

import copy
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from . import __version__
from .checks import check_integer, check_seed
from .files import check_writable, replacing
from .pipeline_ddpm_faces import MODEL_COMPONENTS, DDPMFacesPipeline, convert, fastest_dtype
from .plots import image_grid
from .scheduling_ddpm_faces import DDPMFacesScheduler
from .solvers import fast_solver


DEFAULT_STEPS = 20  # of a model without a default preset
DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class Recipe:
    """Settings for generating images.

    Args:
        num_images (`int`, defaults to 16): Number of images.
        seed (`int`, defaults to 0): Seed of the first image; image i uses `seed + i`.
        preset (`str`, *optional*):
            A preset of the model, such as `"exact"` or `"fast"`. Defaults to the model's own default if `steps` is
            not given.
        steps (`int`, *optional*):
            Sampling steps, 1 to T. Defaults to those of the preset, or to 20. Without a preset, fewer than T steps are
            those of DPM-Solver++.
        sigma_min (`float`, *optional*): For DPM-Solver++, see [`DDPMFacesScheduler`].
        epsilon_scaling (`float`, *optional*): For DPM-Solver++, see [`DDPMFacesScheduler`].
        guidance_scale (`float`, *optional*): Scale of classifier-free guidance. Defaults to that of the pipeline.
        autoguidance_scale (`float`, *optional*): Scale of autoguidance. Defaults to that of the pipeline.
        class_labels (`list[int]`, *optional*): Classes, in turn. Defaults to all classes of the model, in turn.
        prompts (`list[str]`, *optional*): Prompts, in turn.
        negative_prompt (`str`, *optional*): What the images should not show.
        dtype (`str`, *optional*):
            Precision of the networks, `"float32"` or `"bfloat16"`; `"auto"` is bfloat16 where the device has
            instructions for it, and float32 elsewhere. Defaults to that of the pipeline.

    Raises:
        ValueError: A value is out of range.
    """

    num_images: int = 16
    seed: int = 0
    preset: str | None = None
    steps: int | None = None
    sigma_min: float | None = None
    epsilon_scaling: float | None = None
    guidance_scale: float | None = None
    autoguidance_scale: float | None = None
    class_labels: Sequence[int] | None = None
    dtype: str | None = None
    prompts: Sequence[str] | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        check_integer("num_images", self.num_images, 1)
        if self.steps is not None:
            check_integer("steps", self.steps, 1)
        check_seed(self.seed)

    def of_image(self, index: int) -> "Recipe":
        """Return the recipe with the class and the prompt of one image."""
        labels, prompts = self.class_labels, self.prompts
        labels = labels and [labels[index % len(labels)]]
        prompts = prompts and [prompts[index % len(prompts)]]
        return replace(self, class_labels=labels, prompts=prompts)

    @property
    def _solver_options(self) -> dict[str, float]:
        options = {"sigma_min": self.sigma_min, "epsilon_scaling": self.epsilon_scaling}
        return {name: value for name, value in options.items() if value is not None}

    def resolve(self, pipeline: DDPMFacesPipeline, default_preset: str | None = None) -> "Recipe":
        """Return the recipe, with the defaults of the model filled in.

        Args:
            pipeline ([`DDPMFacesPipeline`]): The model.
            default_preset (`str`, *optional*):
                Preset for a model without a default preset; without it, such a model takes 20 steps of DPM-Solver++.

        Raises:
            ValueError: The model has no such preset or class, the number of steps is above T, or an option of
                DPM-Solver++ is given for another sampler.
        """
        total = pipeline.scheduler.config.num_train_timesteps
        pipeline = with_own_scheduler(pipeline)
        preset, steps = self.preset, self.steps
        if preset is None and steps is None:
            preset = (pipeline.config.default_preset or default_preset) if pipeline.takes_presets else None
            steps = min(DEFAULT_STEPS, total) if preset is None else None
        if steps is not None and steps > total:
            raise ValueError(f"`steps` must be at most {total}, as in training, got {steps}.")
        scheduler, steps, guidance, network = pipeline.resolve_preset(
            preset, steps, self.guidance_scale, self.autoguidance_scale
        )
        if self._solver_options and preset is not None and scheduler.config.algorithm != "dpmsolver++":
            name = next(iter(self._solver_options))
            raise ValueError(f"`{name}` needs DPM-Solver++, but the preset {preset!r} means another sampler.")
        if network == "unet":
            pipeline.check_guidance(guidance)
        num_classes = pipeline.unet.config.get("num_class_embeds")
        labels = self.class_labels or (None if num_classes is None else list(range(num_classes)))
        if labels and num_classes is None:
            raise ValueError(f"`class_labels` must be None because this model has no classes, got {list(labels)}.")
        if labels and not all(0 <= label < num_classes for label in labels):
            raise ValueError(f"`class_labels` must be from 0 to {num_classes - 1}, got {list(labels)}.")
        pipeline.check_prompts(self.prompts and list(self.prompts), self.negative_prompt)
        dtype = self.dtype
        if dtype == "auto":
            dtype = str(fastest_dtype(pipeline.unet)).removeprefix("torch.")
        scales: dict[str, Any] = {
            "guidance_scale": guidance.guidance_scale,
            "autoguidance_scale": guidance.autoguidance_scale,
        }
        return replace(self, preset=preset, steps=steps, **scales, class_labels=labels, dtype=dtype)


def generate(pipeline: DDPMFacesPipeline, recipe: Recipe, batch_size: int = 64) -> Iterator[Image.Image]:
    """Generate images one after the other, with a progress bar.

    Args:
        pipeline ([`DDPMFacesPipeline`]): The model. It is not changed.
        recipe ([`Recipe`]): What to generate.
        batch_size (`int`, defaults to 64): Number of images to generate at once.

    Raises:
        ValueError: The recipe does not suit the model, such as too many steps or a class that it does not have.
    """
    check_integer("batch_size", batch_size, 1)
    recipe = recipe.resolve(pipeline)
    pipeline = with_sampler(pipeline, recipe)

    # `disable=None` means: only in a terminal.
    with tqdm(total=recipe.num_images, desc="Generating", unit="image", disable=None, leave=False) as bar:
        for first in range(0, recipe.num_images, batch_size):
            indices = range(first, min(first + batch_size, recipe.num_images))
            count = len(indices)

            def advance(pipeline, i, timestep, tensors, first=first, count=count) -> dict:
                bar.n = round(first + count * (i + 1) / pipeline.num_timesteps, 1)
                bar.refresh()
                return {}

            yield from sample(pipeline, recipe, indices, callback_on_step_end=advance).images


def with_own_scheduler(pipeline: DDPMFacesPipeline) -> DDPMFacesPipeline:
    """Return the pipeline with a [`DDPMFacesScheduler`], which takes presets, in place of a scheduler of diffusers."""
    if isinstance(pipeline.scheduler, DDPMFacesScheduler):
        return pipeline
    return pipeline.with_scheduler(DDPMFacesScheduler.from_config(pipeline.scheduler.config))


def with_sampler(pipeline: DDPMFacesPipeline, recipe: Recipe) -> DDPMFacesPipeline:
    """Return a copy of a pipeline with the scheduler and the dtype of a resolved recipe, without a progress bar."""
    pipeline = with_own_scheduler(pipeline)
    scheduler, _, guidance, network = pipeline.resolve_preset(
        *(recipe.preset, recipe.steps, recipe.guidance_scale, recipe.autoguidance_scale)
    )
    if recipe._solver_options:  # tuned steps bring their own
        scheduler = fast_solver(scheduler, recipe.sigma_min, recipe.epsilon_scaling)
    pipeline = pipeline.with_scheduler(scheduler)
    pipeline.register_to_config(
        guidance_interval=guidance.guidance_interval
    )  # with this scheduler, presets no longer apply
    if network == "student":  # the scheduler alone does not know whose steps it takes
        pipeline.register_modules(unet=pipeline.student)
    if recipe.dtype is not None:
        for name in MODEL_COMPONENTS:
            network = pipeline.components[name]
            if network is not None:
                pipeline.register_modules(**{name: convert(copy.deepcopy(network), getattr(torch, recipe.dtype))})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: DDPMFacesPipeline, recipe: Recipe, indices: Sequence[int], **settings: Any
) -> ImagePipelineOutput:
    """Generate some images of a recipe in one batch. Each has its own seed, so it does not depend on the others.

    Args:
        pipeline ([`DDPMFacesPipeline`]): The model, by [`with_sampler`].
        recipe ([`Recipe`]): By [`Recipe.resolve`].
        indices (`Sequence[int]`): Numbers of the images; image i has the seed `recipe.seed + i`.
        settings: Other arguments of the pipeline.
    """
    labels, prompts = recipe.class_labels, recipe.prompts
    return pipeline(
        None if prompts else len(indices),
        prompt=[prompts[i % len(prompts)] for i in indices] if prompts else None,
        negative_prompt=recipe.negative_prompt,
        num_inference_steps=recipe.steps,
        preset=recipe.preset if pipeline.takes_presets else None,
        generator=[torch.Generator().manual_seed(recipe.seed + i) for i in indices],
        class_labels=labels and [labels[i % len(labels)] for i in indices],
        guidance_scale=recipe.guidance_scale,
        autoguidance_scale=recipe.autoguidance_scale,
        **settings,
    )


def check_output(output: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise a `ValueError` if `output` exists already or cannot be written."""
    output = Path(output)
    is_file = output.suffix.lower() == ".png"
    if output.suffix.lower() in Image.registered_extensions() and not is_file:
        raise ValueError(f"`output` must end in .png for a grid, or name a folder, got {str(output)!r}.")
    if str(output) == "-":
        raise ValueError("`output` must name a file or a folder, got '-': images are not written to standard output.")
    if output.exists() and output.is_dir() == is_file:
        raise ValueError(f"`output` {str(output)!r} is a {'folder' if is_file else 'file'}; choose another name.")
    if not overwrite and output.exists() and (is_file or any(output.iterdir())):
        raise ValueError(f"`output` {str(output)!r} exists; choose another name, or add --overwrite.")
    check_writable(output.parent if is_file else output)


def generate_to(
    pipeline: DDPMFacesPipeline,
    recipe: Recipe,
    output: str | os.PathLike,
    model: str,
    batch_size: int = 64,
    overwrite: bool = False,
) -> list[Path]:
    """Generate images into a PNG grid or a folder of PNG images.

    Args:
        pipeline ([`DDPMFacesPipeline`]): The model.
        recipe ([`Recipe`]): What to generate.
        output (`str` or `os.PathLike`):
            A name that ends in ".png" is a grid in which small images are enlarged, or the image itself if there is
            only one. Any other name is a folder of images named after their seeds, such as `seed-00000042.png`. If you
            interrupt, the images that are already in the folder are complete.
        model (`str`): Name of the model for the metadata.
        batch_size (`int`, defaults to 64): Number of images to generate at once.
        overwrite (`bool`, defaults to `False`): Whether existing files may be replaced.

    Returns:
        `list[Path]`: The files.

    Raises:
        ValueError: `output` exists, or the recipe does not suit the model.
    """
    check_output(output, overwrite)
    output, recipe = Path(output), recipe.resolve(pipeline)
    images = generate(pipeline, recipe, batch_size)
    if output.suffix.lower() == ".png":
        pictures = list(images)
        picture = pictures[0]
        if len(pictures) > 1:
            picture = image_grid(pictures, scale=max(1, 128 // picture.width))
        output.parent.mkdir(parents=True, exist_ok=True)
        last = recipe.seed + recipe.num_images - 1
        save_png(picture, output, metadata(model, recipe, f"{recipe.seed} to {last}" if last > recipe.seed else last))
        return [output]
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed, image in enumerate(images, start=recipe.seed):
        paths.append(output / f"seed-{seed:08}.png")
        save_png(image, paths[-1], metadata(model, recipe.of_image(seed - recipe.seed), seed))
    return paths


def metadata(model: str, recipe: Recipe, seed: int | str) -> dict[str, Any]:
    """Return the text chunks of a PNG file: the program, the model and the recipe."""
    settings = asdict(recipe)
    settings = {k: v for k, v in settings.items() if v is not None and k not in ("num_images", "seed")}
    return {
        "Software": f"ddpm-faces {__version__}",
        "Description": "generated by ddpm-faces",
        "model": model,
        "seed": seed,
        **settings,
    }


def save_png(image: Image.Image, path: str | os.PathLike, text: dict[str, Any]) -> None:
    """Save an image with text chunks. The file appears once it is complete."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(png_bytes(image, text))


def png_bytes(image: Image.Image, text: dict[str, Any]) -> bytes:
    """Encode an image as PNG, with text chunks."""
    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, str(value))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()
