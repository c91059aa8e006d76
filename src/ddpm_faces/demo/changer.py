# Copyright 2026 The ddpm-faces authors. Apache License 2.0, http://www.apache.org/licenses/LICENSE-2.0
"""Restoration and editing of the faces that visitors upload."""

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from .maker import IN_TURN, MAX_SEED, Event, FaceMaker, running, whole_number
from .show import finished, grid, progress, show_faces


MAX_ANSWERS, DEFAULT_STEPS = 8, 50
CANVAS = 512  # shorter side of the face on the page, in pixels
REPAINT, ENLARGE, COLORIZE, SHARPEN = "Repaint what you paint over", "Enlarge 4 times", "Add colors", "Sharpen"
FACTOR = 4
MIN_BLUR, MAX_BLUR, MAX_NOISE = 0.3, 4.0, 0.5  # in pixels of the model, and of values in [-1, 1]
KEEP, VARY = "Keep the face", "Draw new details"
METHODS = {KEEP: "inversion", VARY: "noise"}
STRENGTHS = {KEEP: 0.9, VARY: 0.5}  # at first


class FaceChanger:
    """Restores and changes given faces, at the size of the model.

    Args:
        maker ([`FaceMaker`]): The model.
        restorer ([`DDPMFacesRestorePipeline`]): The same model. Its networks are optimized for their device.
        editor ([`DDPMFacesEditPipeline`]): The same model, in float32: its inversion is too exact for bfloat16.
        find_face (`Callable`, *optional*):
            Returns the face in a photo as the model expects it, or `None` if there is none. Without it, visitors give
            pictures that show just a face.
    """

    def __init__(
        self,
        maker: FaceMaker,
        restorer: DiffusionPipeline,
        editor: DiffusionPipeline,
        find_face: Callable[[Image.Image], Image.Image | None] | None = None,
    ) -> None:
        self.maker, self.restorer, self.editor, self.find_face = maker, restorer.optimize(), editor, find_face
        for pipeline in (restorer, editor):
            pipeline.set_progress_bar_config(disable=True)
        channels, height, width = maker.shape
        self.damages = [REPAINT]
        if not height % FACTOR and not width % FACTOR:
            self.damages.append(ENLARGE)
        if channels == 3:
            self.damages.append(COLORIZE)
        self.damages.append(SHARPEN)
        self.default_steps = min(DEFAULT_STEPS, maker.max_steps)

    def open(self, photo: Image.Image) -> tuple[Image.Image, str]:
        """Return the face in a photo, enlarged or reduced for the page, and a note."""
        photo = self._flat(photo)
        face = None if self.find_face is None else self.find_face(photo)
        if face is not None:
            return ImageOps.fit(face, self._canvas, Image.Resampling.LANCZOS), ""
        cropped = ImageOps.fit(photo, self._canvas, Image.Resampling.LANCZOS)
        if self.find_face is not None:
            return cropped, "No face was found. This is the middle of the picture."
        return cropped, "This is the middle of the picture. The face should fill it, with the eyes in its center."

    def generated(self, seed: int) -> Image.Image:
        """Return a generated face, for visitors without a photo."""
        maker = self.maker
        labels = maker.labels(seed % maker.num_classes if maker.num_classes else IN_TURN, 1)
        *_, (_, _, images) = maker.denoise(maker.noise(seed), maker.default_steps, labels)
        return ImageOps.fit(images[0].convert("RGB"), self._canvas, Image.Resampling.LANCZOS)

    def restore(
        self,
        picture: dict[str, Any] | None,
        damage: str,
        blur: float,
        noise_level: float,
        seed: int,
        num_images: int,
        steps: int,
        prompt: str = "",
        label: int = 0,
    ) -> Iterator[Event]:
        """Restore a face. `picture` is the value of the editor: the photo, and the layer that was painted over it."""
        seed, num_images, steps = self._numbers(seed, num_images, steps)
        if damage not in self.damages:
            raise gr.Error(f"The damage must be one of {', '.join(self.damages)}.", print_exception=False)
        blur = _number("The blur", blur, MIN_BLUR, MAX_BLUR)
        noise_level = _number("The noise", noise_level, 0, MAX_NOISE)
        text, notes = self.maker.text([prompt], None)
        face, is_painted = self._read(picture)
        operators, shape = self.restorer.operators, self.maker.shape
        if damage == REPAINT:
            if not is_painted.any() or is_painted.all():
                what = "a part" if not is_painted.any() else "only a part"
                raise gr.Error(f"Paint over {what} of the face first.", print_exception=False)
            operator = operators.Inpaint(is_painted, shape[0])
            observed = before = operator(face)
        else:
            noise_level = math.hypot(noise_level, operators.ROUNDING)
            if damage == ENLARGE:
                operator = operators.Downsample(FACTOR, shape)
                observed = operator(face)
                before = operator.pseudo_inverse(observed)
            elif damage == COLORIZE:
                operator = operators.Gray(shape)
                observed = operator(face)
                before = observed.expand_as(face)
            else:
                operator, observed, before = operators.GaussianBlur(blur, shape), face, face
        arguments = {"image": observed, "operator": operator, "noise_level": noise_level, **text}
        arguments["class_labels"] = self.maker.labels(label, num_images)
        values = {"restored": damage, "prompt": prompt or None, "guidance_scale": text.get("guidance_scale")}
        yield from self._show(self.restorer, before, seed, num_images, steps, arguments, values, notes)

    def change(
        self,
        photo: Image.Image | None,
        method: str,
        strength: float,
        seed: int,
        num_images: int,
        steps: int,
        prompt: str = "",
        source_prompt: str = "",
        guidance_scale: float | None = None,
        label: int = 0,
    ) -> Iterator[Event]:
        """Change a face: towards a prompt, or at random."""
        seed, num_images, steps = self._numbers(seed, num_images, steps)
        if method not in METHODS:
            raise gr.Error(f"The method must be one of {', '.join(METHODS)}.", print_exception=False)
        strength = _number("The strength", strength, 0.05, 1)
        text, notes = self.maker.text([prompt, source_prompt], guidance_scale)
        if method == KEEP and not prompt.strip():
            raise gr.Error("Say what the face should show.", print_exception=False)
        face, _ = self._read({"background": photo, "layers": []})
        arguments = {"image": face, "method": METHODS[method], "strength": strength}
        if text:
            arguments |= {"prompt": prompt, "guidance_scale": text["guidance_scale"]}
            if method == KEEP:  # nothing is random
                arguments["source_prompt"], num_images = source_prompt, 1
        arguments["class_labels"] = self.maker.labels(label, num_images)
        values = {"changed": method, "strength": strength, "prompt": prompt or None}
        values |= {"source_prompt": source_prompt or None, "guidance_scale": text.get("guidance_scale")}
        yield from self._show(self.editor, face, seed, num_images, steps, arguments, values, notes)

    def _show(
        self,
        pipeline: DiffusionPipeline,
        before: torch.Tensor,
        seed: int,
        num_images: int,
        steps: int,
        arguments: dict[str, Any],
        values: dict[str, Any],
        notes: list[str],
    ) -> Iterator[Event]:
        """Run a pipeline and show its images beside that before."""
        seeds = [seed + i for i in range(num_images)]
        arguments["image"] = arguments["image"].repeat(num_images, 1, 1, 1)
        arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        if "prompt_embeds" in arguments:
            arguments["prompt_embeds"] = arguments["prompt_embeds"].expand(num_images, -1)
        first = pipeline.postprocess(before)
        labels: list[int | str] = ["before", *seeds]
        if arguments.get("method") == METHODS[KEEP]:
            labels = ["before", "after"]
        try:
            for step, total, images in running(pipeline, num_inference_steps=steps, **arguments):
                if step < total:
                    yield show_faces([*first, *images], labels, progress(step, total)), None
        except ValueError as error:  # an inversion does not converge
            raise gr.Error(str(error).replace("`", ""), print_exception=False) from error
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"face-{seed}.png")
            values = {"seed": ", ".join(map(str, seeds)), "steps": steps, "autoguidance_scale": None, **values}
            grid([*first, *images]).save(path, pnginfo=self.maker.metadata(**values))
            yield show_faces([*first, *images], labels, finished(total, notes)), str(path)

    def _numbers(self, seed: int, num_images: int, steps: int) -> tuple[int, int, int]:
        return (
            whole_number("The seed", seed, 0, MAX_SEED),
            whole_number("The number of images", num_images, 1, MAX_ANSWERS),
            self.maker.check_steps(steps),
        )

    def _read(self, picture: dict[str, Any] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the face, `(1, channels, height, width)` in [-1, 1], and which of its pixels are painted over."""
        photo = None if picture is None else picture["background"]
        if picture is None or photo is None:
            raise gr.Error("Choose a picture of a face first.", print_exception=False)
        channels, height, width = self.maker.shape
        face = ImageOps.fit(self._flat(photo), (width, height), Image.Resampling.LANCZOS).convert(
            "RGB" if channels == 3 else "L"
        )
        pixels = _bytes(face).view(height, width, channels)
        is_painted = torch.zeros(height, width, dtype=torch.bool)
        for layer in picture["layers"]:
            alpha = ImageOps.fit(layer.convert("RGBA").getchannel("A"), (width, height), Image.Resampling.BOX)
            is_painted |= _bytes(alpha).view(height, width) > 8
        return pixels.permute(2, 0, 1)[None] / 127.5 - 1, is_painted

    def _flat(self, photo: Image.Image) -> Image.Image:
        """Return a photo upright, on white where it is transparent."""
        photo = self.restorer.operators.turned_upright(photo).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo).convert("RGB")

    @property
    def _canvas(self) -> tuple[int, int]:
        _, height, width = self.maker.shape
        scale = CANVAS / min(height, width)
        return round(width * scale), round(height * scale)


def _bytes(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)


def _number(name: str, value: Any, smallest: float, largest: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not smallest <= value <= largest:
        message = f"{name} must be a number from {smallest:g} to {largest:g}, got {value!r}."
        raise gr.Error(message, print_exception=False)
    return float(value)
