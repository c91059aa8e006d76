# Copyright 2026 The ddpm-faces authors. Apache License 2.0, http://www.apache.org/licenses/LICENSE-2.0
"""Generation of faces, and of walks between them."""

import contextlib
import queue
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .show import enlarged, finished, grid, progress, show_faces, show_walk


# The limits of a run.
MAX_IMAGES, MAX_FRAMES, MAX_STEPS = 16, 16, 50
MIN_FRAMES, DEFAULT_STEPS = 3, 15
MAX_SEED = 2**31 - 1
MAX_PROMPT, MAX_SCALE = 200, 5.0  # characters, and guidance scale
IN_TURN = -1  # each image has the next class
FRAME_MS, PAUSE_MS = 90, 700  # durations in a walk: of each image, and at both ends
Event = tuple[str, str | None]  # HTML to show, and the file to download once it exists
SOFTWARE = "ddpm-faces"
with contextlib.suppress(ImportError):  # a Space does not install the package
    from ddpm_faces import __version__

    SOFTWARE += f" {__version__}"


class Stopped(Exception):
    """The visitor has left."""


class FaceMaker:
    """Generates the contents of the page: each method yields HTML to show, and at the end a file to download.

    Args:
        pipeline ([`DDPMFacesPipeline`]): The model. Its networks are optimized for their device.
        model (`str`): Its name, for the page and for the metadata of the images.

    Raises:
        ValueError: The model generates images that a browser cannot show, or its code is of an earlier version.
    """

    def __init__(self, pipeline: DiffusionPipeline, model: str) -> None:
        config, scheduler = pipeline.unet.config, pipeline.scheduler
        if config.in_channels not in (1, 3):
            raise ValueError(f"`model` must make grey or RGB images, got {config.in_channels} channels.")
        if not hasattr(pipeline, "presets"):
            raise ValueError(
                f"`model` {model} has code of an earlier version, without fast sampling: publish it again."
            )
        self.pipeline, self.model = pipeline.with_scheduler(scheduler).optimize(), model
        self.pipeline.set_progress_bar_config(disable=True)
        height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        self.shape = (config.in_channels, height, width)
        self.num_classes = config.get("num_class_embeds") or 0
        self.is_prompted = pipeline.components.get("text_encoder") is not None
        self.guidance_scale = max(1.0, pipeline.config.get("guidance_scale", 1.0))
        self.max_scale = max(MAX_SCALE, self.guidance_scale)
        self.max_steps = min(MAX_STEPS, scheduler.config.num_train_timesteps)
        has_default = pipeline.config.default_preset not in (None, "exact")
        self.default_steps = min(pipeline.num_timesteps if has_default else DEFAULT_STEPS, self.max_steps)

    def known(self, prompts: Sequence[str]) -> list[str]:
        """Return those prompts of which the model knows all words."""
        return [prompt for prompt in prompts if self.is_prompted and not self.pipeline.prompt_notes(prompt)]

    def faces(
        self,
        seed: int,
        num_images: int,
        steps: int,
        label: int = IN_TURN,
        prompt: str = "",
        guidance_scale: float | None = None,
    ) -> Iterator[Event]:
        """Generate a grid; image i has the seed `seed` + i."""
        seed = whole_number("The seed", seed, 0, MAX_SEED)
        num_images = whole_number("The number of images", num_images, 1, MAX_IMAGES)
        labels, steps = self.labels(label, num_images), self.check_steps(steps)
        text, notes = self.text([prompt], guidance_scale)
        seeds = [seed + i for i in range(num_images)]
        latents = torch.cat([self.noise(seed) for seed in seeds])
        if text:
            text["prompt_embeds"] = text["prompt_embeds"].expand(num_images, -1)
        for step, _, images in self.denoise(latents, steps, labels, text):
            if step < steps:
                yield show_faces(images, seeds, progress(step, steps)), None
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies the file before it asks for more
            path = Path(folder, f"faces-{seed}.png")
            seeds_text = f"{seeds[0]} to {seeds[-1]}" if num_images > 1 else str(seed)
            values = {"seed": seeds_text, "steps": steps, "class_labels": labels}
            values |= {"prompt": prompt, "guidance_scale": text["guidance_scale"]} if text else {}
            grid(images).save(path, pnginfo=self.metadata(**values))
            yield show_faces(images, seeds, finished(steps, notes)), str(path)

    def walk(
        self,
        seed: int,
        other_seed: int,
        num_frames: int,
        steps: int,
        label: int = 0,
        prompt: str = "",
        other_prompt: str = "",
        guidance_scale: float | None = None,
    ) -> Iterator[tuple[str, str | None, str | None]]:
        """Generate the faces between those of two seeds and two prompts.

        The noise is interpolated spherically (section 4.2 of https://huggingface.co/papers/2006.11239), the embeddings
        of the prompts linearly.
        """
        seed = whole_number("The first seed", seed, 0, MAX_SEED)
        other_seed = whole_number("The second seed", other_seed, 0, MAX_SEED)
        num_frames = whole_number("The number of images", num_frames, MIN_FRAMES, MAX_FRAMES)
        labels, steps = self.labels(label, num_frames), self.check_steps(steps)
        text, notes = self.text([prompt, other_prompt], guidance_scale)
        if seed == other_seed and (not text or prompt == other_prompt):
            also = " or the two prompts" if self.is_prompted else ""
            raise gr.Error(f"The two seeds{also} must differ.", print_exception=False)
        fractions = [i / (num_frames - 1) for i in range(num_frames)]
        start, end = self.noise(seed), self.noise(other_seed)
        latents = start.repeat(num_frames, 1, 1, 1)
        if seed != other_seed:
            latents = torch.cat([slerp(start, end, fraction) for fraction in fractions])
        if text:
            first_text, last_text = text["prompt_embeds"]
            text["prompt_embeds"] = torch.stack([first_text.lerp(last_text, fraction) for fraction in fractions])
        for step, _, images in self.denoise(latents, steps, labels, text):
            if step < steps:
                yield show_walk(images, seed, other_seed, progress(step, steps)), None, None
        there_and_back = [*images, *images[-2:0:-1]]
        durations = [PAUSE_MS if i in (0, num_frames - 1) else FRAME_MS for i in range(len(there_and_back))]
        scale = max(1, 256 // images[0].width)
        first, *others = [enlarged(image, scale) for image in there_and_back]
        comment = f"{SOFTWARE}, model {self.model}, seeds {seed} to {other_seed}, {steps} steps"
        if text:
            comment += f", prompts {prompt!r} to {other_prompt!r}, guidance scale {text['guidance_scale']:g}"
        with tempfile.TemporaryDirectory() as folder:
            webp, gif = (Path(folder, f"walk-{seed}-{other_seed}.{suffix}") for suffix in ("webp", "gif"))
            exif = Image.Exif()
            exif[0x0131], exif[0x010E] = SOFTWARE, comment  # Software, ImageDescription
            animation: dict[str, Any] = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
            first.save(webp, quality=90, exif=exif, **animation)
            first.save(gif, comment=comment.encode(), **animation)
            shown = show_walk(images, seed, other_seed, finished(steps, notes), webp.read_bytes())
            yield shown, str(webp), str(gif)

    def noise(self, seed: int) -> torch.Tensor:
        """Return the initial noise of the face of a seed, of shape `(1, channels, height, width)`."""
        return torch.randn((1, *self.shape), generator=torch.Generator().manual_seed(seed))

    def labels(self, label: int, num_images: int) -> list[int] | None:
        if not self.num_classes:
            return None
        label = whole_number("The class", label, IN_TURN, self.num_classes - 1)
        return [i % self.num_classes if label == IN_TURN else label for i in range(num_images)]

    def check_steps(self, steps: int) -> int:
        return whole_number("The number of steps", steps, 1, self.max_steps)

    def text(self, prompts: list[str], guidance_scale: float | None) -> tuple[dict[str, Any], list[str]]:
        """Return arguments of the pipeline for prompts, or none without any, and what the visitor should know."""
        for prompt in prompts:
            if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
                raise gr.Error(f"A prompt must be a text of at most {MAX_PROMPT} characters.", print_exception=False)
        if not any(prompt.strip() for prompt in prompts):
            return {}, []
        if not self.is_prompted:
            raise gr.Error("This model does not take prompts.", print_exception=False)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale <= self.max_scale:
            message = f"The guidance scale must be a number from 1 to {self.max_scale:g}, got {scale!r}."
            raise gr.Error(message, print_exception=False)
        text = {"prompt_embeds": self.pipeline.encode_prompt(prompts), "guidance_scale": float(scale)}
        return text, self.pipeline.prompt_notes(prompts)

    def metadata(self, **values: Any) -> PngInfo:
        info = PngInfo()
        scales = {name: self.pipeline.config.get(name, 1.0) for name in ("guidance_scale", "autoguidance_scale")}
        scales = {name: scale for name, scale in scales.items() if scale != 1}
        values = {"Software": SOFTWARE, "model": self.model, **scales, **values}
        for name, value in values.items():
            if value is not None:
                info.add_text(name, str(value))
        return info

    def denoise(
        self, latents: torch.Tensor, steps: int, labels: list[int] | None = None, text: dict[str, Any] | None = None
    ) -> Iterator[tuple[int, int, list[Image.Image]]]:
        return running(
            self.pipeline,
            batch_size=None if text else len(latents),
            num_inference_steps=steps,
            latents=latents,
            class_labels=labels,
            **(text or {}),
        )


def running(pipeline: DiffusionPipeline, **arguments: Any) -> Iterator[tuple[int, int, list[Image.Image]]]:
    """Yield (steps taken, steps in all, images) while a pipeline runs. The last images are the results.

    Steps that end while earlier images are still being sent are not shown. When the visitor leaves, Gradio closes this
    generator, and the pipeline stops at its next step.
    """
    previews: queue.SimpleQueue = queue.SimpleQueue()
    has_left = threading.Event()
    num_steps = 1

    def on_step_end(pipeline, i: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict:
        nonlocal num_steps
        if has_left.is_set():
            raise Stopped
        num_steps = pipeline.num_timesteps
        if i + 1 < num_steps:
            previews.put((i + 1, tensors["latents"]))
        return {}

    with ThreadPoolExecutor(1) as executor:
        result = executor.submit(pipeline, callback_on_step_end=on_step_end, **arguments)
        result.add_done_callback(lambda _: previews.put(None))
        try:
            while (preview := newest(previews)) is not None:
                yield preview[0], num_steps, pipeline.postprocess(preview[1])
            images = result.result().images
            yield num_steps, num_steps, images
        finally:
            has_left.set()


def newest(items: queue.SimpleQueue) -> Any:
    """Wait for an item, and drop all but the last."""
    item = items.get()
    while not items.empty():
        item = items.get()
    return item


def whole_number(name: str, value: Any, smallest: int, largest: int) -> int:
    """Check a value from a visitor, who may bypass the widgets and their limits through the API."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not smallest <= value <= largest or value != int(value):
        message = f"{name} must be a whole number from {smallest} to {largest}, got {value!r}."
        raise gr.Error(message, print_exception=False)
    return int(value)


def slerp(start: torch.Tensor, end: torch.Tensor, fraction: float) -> torch.Tensor:
    """Interpolate spherically between two noise tensors. A mean would have a smaller norm and give greyish faces."""
    cosine = (start * end).sum() / (start.norm() * end.norm())
    angle = cosine.clamp(-1, 1).acos()
    return (((1 - fraction) * angle).sin() * start + (fraction * angle).sin() * end) / angle.sin()
