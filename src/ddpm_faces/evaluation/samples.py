"""The faces to measure, from a pipeline or from a folder of images."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..checks import MAX_INTEGER, check_integer, check_seed
from ..data.folders import image_suffixes
from ..data.images import picture_to_tensor
from ..generation import Recipe, sample, with_sampler
from ..models import load_pipeline
from ..pipeline_ddpm_faces import DDPMFacesPipeline


def open_samples(
    source: str | os.PathLike | DDPMFacesPipeline,
    preset: str | None = None,
    num_inference_steps: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    sigma_min: float | None = None,
    guide: str | os.PathLike | DDPMFacesPipeline | None = None,
    autoguidance_scale: float | None = None,
    guidance_scale: float | None = None,
    epsilon_scaling: float | None = None,
    default_preset: str | None = "exact",
    dtype: str | None = None,
) -> "Generated | PictureFiles":
    """Prepare the faces to measure, without generating or reading any yet.

    Args:
        source (`str`, `os.PathLike` or [`DDPMFacesPipeline`]):
            A pipeline, its folder or its name on the Hub; or a folder of images.
        preset (`str`, *optional*): As in [`DDPMFacesPipeline`]; by default the model's, or `default_preset`.
        num_inference_steps (`int`, *optional*): As in [`DDPMFacesPipeline`].
        seed (`int`, defaults to 0): Seed of the first image; image i uses `seed + i`.
        device (`str` or `torch.device`, defaults to `"cpu"`): Device for a pipeline that is loaded here.
        sigma_min (`float`, *optional*): For DPM-Solver++, see [`DDPMFacesScheduler`].
        guide (`str`, `os.PathLike` or [`DDPMFacesPipeline`], *optional*):
            A weaker model for autoguidance, see [`DDPMFacesPipeline.set_guide`]; by default the pipeline's own.
        autoguidance_scale (`float`, *optional*): By default that of the pipeline; required with `guide`.
        guidance_scale (`float`, *optional*): By default that of the pipeline.
        epsilon_scaling (`float`, *optional*): For DPM-Solver++, see [`DDPMFacesScheduler`].
        default_preset (`str`, *optional*, defaults to `"exact"`):
            Preset for a model without a default preset; `None` for 20 steps of DPM-Solver++.
        dtype (`str`, *optional*): Precision of the networks in sampling, see [`Recipe`].

    Returns:
        [`Generated`] or [`PictureFiles`]: Both have `batches` (from indices to `torch.uint8` of shape
        `(batch, 3, height, width)`), `image_size` (height and width), `len` and `provenance`.

    Raises:
        ValueError: An argument is out of range, the folder contains no images, other files or images of several
            sizes, or the pipeline generates neither RGB nor grayscale images.
    """
    check_seed(seed)
    if num_inference_steps is not None:
        check_integer("num_inference_steps", num_inference_steps, 1)
    if guide is not None and autoguidance_scale is None:
        raise ValueError("`guide` needs an `autoguidance_scale`, such as 1.2.")
    if isinstance(source, DDPMFacesPipeline):
        pipeline = source
    else:
        path = Path(source).expanduser()
        if path.is_dir() and not (path / "model_index.json").exists():
            for name, scale in {"autoguidance_scale": autoguidance_scale, "guidance_scale": guidance_scale}.items():
                if scale is not None:
                    raise ValueError(f"`{name}` needs a pipeline, but {str(source)!r} is a folder of images.")
            return PictureFiles(path)
        pipeline = load_pipeline(source, device=device)
    total = pipeline.scheduler.config.num_train_timesteps
    if num_inference_steps is not None and num_inference_steps > total:
        raise ValueError(
            f"`num_inference_steps` must be from 1 to {total}, the number of timesteps in training, got "
            f"{num_inference_steps}."
        )
    guide_name = None
    if guide is not None and autoguidance_scale is not None:
        if not isinstance(guide, DDPMFacesPipeline):
            folder = Path(guide).expanduser()
            guide_name = folder.resolve().name if folder.is_dir() else str(guide)
            guide = load_pipeline(guide, device=device)
        pipeline = pipeline.with_scheduler(pipeline.scheduler)  # a copy, so that the caller's pipeline does not change
        pipeline.set_guide(guide, autoguidance_scale)
    scales: dict[str, Any] = {"guidance_scale": guidance_scale, "autoguidance_scale": autoguidance_scale}
    recipe = Recipe(1, seed, preset, num_inference_steps, sigma_min, epsilon_scaling, **scales, dtype=dtype)
    return Generated(pipeline, recipe.resolve(pipeline, default_preset), guide_name)


class Generated:
    """Faces from a pipeline. Each has its own seed, so it does not depend on its batch."""

    def __init__(self, pipeline: DDPMFacesPipeline, recipe: Recipe, guide_name: str | None = None) -> None:
        config = pipeline.unet.config
        if config.in_channels not in (1, 3):  # `out_channels` may include a variance
            raise ValueError(f"`source` generates images of {config.in_channels} channels; 1 or 3 can be measured.")
        self.unet, self.scheduler = pipeline.unet, pipeline.scheduler  # those of training
        self.interval = pipeline.resolve_preset(recipe.preset, recipe.steps).guidance.guidance_interval
        self.pipeline, self.recipe, self.guide_name = with_sampler(pipeline, recipe), recipe, guide_name
        size = config.sample_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)

    def __len__(self) -> int:
        return MAX_INTEGER

    def batches(self, indices: Sequence[int]) -> torch.Tensor:
        images = sample(self.pipeline, self.recipe, indices, output_type="pt").images  # in [0, 1]
        return (images.float() * 255).round().to("cpu", torch.uint8).expand(-1, 3, -1, -1)

    def with_prompts(self, prompts: Sequence[str]) -> "Generated":
        """Return the same sampler with prompts, in turn.

        Raises:
            ValueError: The pipeline has no text encoder.
        """
        self.pipeline.check_prompts(list(prompts))
        prompted = copy.copy(self)
        prompted.recipe = replace(self.recipe, prompts=list(prompts))
        return prompted

    def provenance(self, num_images: int) -> dict[str, Any]:
        recipe = self.recipe
        seeds = f"{recipe.seed} to {recipe.seed + num_images - 1}"
        config = self.pipeline.scheduler.config
        provenance: dict[str, Any] = {"preset": recipe.preset} if recipe.preset else {}
        provenance |= {"sampler": config.algorithm, "steps": recipe.steps, "seeds": seeds}
        is_tuned = str(recipe.steps) in (config.tuned_steps or {})
        if config.algorithm != "ddpm" and not is_tuned:
            provenance["sigma_min"] = config.sigma_min
            # Left out at 1, so that older metrics stay comparable.
            provenance |= {"epsilon_scaling": config.epsilon_scaling} if config.epsilon_scaling != 1 else {}
        is_conditional = recipe.prompts is not None or self.unet.config.get("num_class_embeds") is not None
        scales: dict[str, Any] = {
            "guidance_scale": recipe.guidance_scale if is_conditional else 1,  # it has no effect without a condition
            "autoguidance_scale": recipe.autoguidance_scale,
        }
        if any(scale != 1 for scale in scales.values()):
            provenance |= {name: scale for name, scale in scales.items() if scale != 1}
            provenance |= {"guidance_interval": list(self.interval)} if self.interval else {}
            provenance |= {"guide": self.guide_name} if self.guide_name else {}
        if recipe.dtype not in (None, "float32"):
            provenance["dtype"] = recipe.dtype
        return provenance


class PictureFiles:
    """The images of a folder, all of the same size."""

    def __init__(self, folder: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        strangers = [path for path in files if path.suffix.lower() not in image_suffixes()]
        if strangers:
            raise ValueError(
                f"`source` {str(folder)!r} contains files that are not images: {strangers[0].name}"
                f"{f' and {len(strangers) - 1} more' if len(strangers) > 1 else ''}."
            )
        sizes: dict[tuple[int, int], Path] = {}
        for path in files:
            try:
                with Image.open(path) as image:
                    sizes.setdefault((image.height, image.width), path)
            except OSError as error:
                raise ValueError(f"`source`: {path} cannot be read: {error}") from error
        if len(sizes) > 1:
            shown = ", ".join(f"{path.name} of {width}x{height}" for (height, width), path in [*sizes.items()][:3])
            raise ValueError(f"`source` must contain images of the same size, got {shown}.")
        if not files:
            raise ValueError(f"`source` {str(folder)!r} contains neither a pipeline nor images.")
        self.files, self.folder = files, folder
        (self.image_size,) = sizes

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, indices: Sequence[int]) -> torch.Tensor:
        images = []
        for index in indices:
            try:
                with Image.open(self.files[index]) as image:
                    images.append(picture_to_tensor(image, self.image_size))
            except OSError as error:
                raise ValueError(f"`source`: {self.files[index]} cannot be read: {error}") from error
        return torch.stack(images)

    def provenance(self, num_images: int) -> dict[str, Any]:
        return {"source": f"the first {num_images} pictures of {self.folder.resolve().name}"}


def select(images: torch.Tensor) -> Callable[[Sequence[int]], torch.Tensor]:
    """Make `batches` for [`measure`] from a tensor of images."""
    return lambda indices: images[list(indices)]
