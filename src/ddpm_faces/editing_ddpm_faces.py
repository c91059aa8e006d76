# Copyright 2026 The ddpm-faces authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Changes of a given face: noise is added or found that leads to it, and removed again under another prompt.

With noise, this is SDEdit (https://huggingface.co/papers/2108.01073). Inversion finds the noise from which DDIM
(https://huggingface.co/papers/2010.02502) makes the face. A step of DDIM from sigma_s to sigma_t, in terms of the
noisy image z = x / sqrt(alpha_bar) = x_0 + sigma noise and the prediction D, is

    z_t = D(z_s) + r (z_s - D(z_s)),   r = sigma_t / sigma_s

Its inverse is the solution z_s of z_s = (z_t - (1 - r) D(z_s)) / r, which repeated substitution finds, accelerated by
Anderson's method.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from .operators_ddpm_faces import observations
from .pipeline_ddpm_faces import UNGUIDED, Condition, DDPMFacesPipeline, Guidance, calling, evaluating


STRENGTHS = {"inversion": 0.9, "noise": 0.5}  # of the methods, by default
SIGMA_MIN, SIGMA_MAX = 0.02, 120.0  # noise-to-signal ratios of the last and of the first step
STEPS, MAX_ITERATIONS = 50, 100
MEMORY = 4  # earlier states that extrapolation uses
TOLERANCE = 1e-4  # of a solution, in pixels of [-1, 1]: 0.013 of the 255 levels


class DDPMFacesEditPipeline(DDPMFacesPipeline):
    """Pipeline that changes faces, above all with prompts, and finds the noise that leads to a face.

    It uses the networks of any [`DDPMFacesPipeline`]: load it from the same folders and repositories, or take those of
    a loaded one with `DDPMFacesEditPipeline.from_pipe(pipeline)`. Its arguments are the same.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # as in diffusers, each kind of pipeline has its own arguments
        self,
        image: Any,
        prompt: str | list[str] | None = None,
        source_prompt: str | list[str] | None = None,
        strength: float | None = None,
        method: str = "inversion",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DDPMFacesEditPipeline", int, int, dict], dict] | None = None,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        source_class_labels: Sequence[int] | torch.Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Change faces.

        Args:
            image (`PIL.Image.Image`, a list of them, or `torch.Tensor` of shape `(batch, channels, height, width)`):
                Faces of the size of the model. Tensors are in [-1, 1].
            prompt (`str` or `list[str]`, *optional*): What they should show: one text, or one for each.
            source_prompt (`str` or `list[str]`, *optional*):
                What they show now, for `"inversion"`. Only what differs between the two prompts changes.
            strength (`float`, *optional*):
                How far back the change begins, in (0, 1]: 0.3 changes details, 1 leaves only what the noise keeps.
                Defaults to 0.9 for `"inversion"` and to 0.5 for `"noise"`.
            method (`str`, defaults to `"inversion"`):
                `"inversion"` finds the noise that leads to the face and goes back under the new prompt; nothing is
                random. `"noise"` adds random noise (SDEdit) and gives a new answer each time.
            num_inference_steps (`int`, *optional*):
                Denoising steps, 1 to T; defaults to 50, or T if that is less. Inversion takes several evaluations for
                each.
            guidance_scale (`float`, *optional*):
                Scale of classifier-free guidance: how far the result goes from `source_prompt` towards `prompt`. The
                inversion is not guided.
            generator (`torch.Generator` or a list of one per image, *optional*): Source of the noise of `"noise"`.
            output_type (`str`, defaults to `"pil"`): As in [`DDPMFacesPipeline.__call__`].
            return_dict (`bool`, defaults to `True`): Whether to return an output class, or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                As in [`DDPMFacesPipeline.__call__`], with `latents` only. The steps of the inversion come first.
            class_labels (`list[int]` or `torch.Tensor`, *optional*):
                Class that each face should show, for a model with classes.
            source_class_labels (`list[int]` or `torch.Tensor`, *optional*):
                Class that each face shows now, for `"inversion"`; defaults to `class_labels`.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: `images`, in the form of `output_type`.

        Raises:
            ValueError: An argument is invalid, or the inversion does not converge.
        """
        if method not in STRENGTHS:
            raise ValueError(f"`method` must be one of {', '.join(map(repr, STRENGTHS))}, got {method!r}.")
        if method == "noise" and source_prompt is not None:
            raise ValueError("`source_prompt` must be None for the method 'noise', which does not use it.")
        if method == "noise" and source_class_labels is not None:
            raise ValueError("`source_class_labels` must be None for the method 'noise', which does not use them.")
        faces, _ = observations(image, self.image_shape)
        faces = faces.to(self._execution_device)
        levels = self._levels(STRENGTHS[method] if strength is None else strength, num_inference_steps)
        guidance = self._guidance_of(guidance_scale)
        self._check(len(faces), class_labels, output_type, generator, guidance)
        condition = self._condition_of(len(faces), prompt, class_labels)
        source_class_labels = class_labels if source_class_labels is None else source_class_labels
        with naming("prompt", "source_prompt"), naming("class_labels", "source_class_labels"):
            self._check(len(faces), source_class_labels)
            source = self._condition_of(len(faces), source_prompt, source_class_labels)
        if method == "inversion":  # guided from what the faces show now, so that equal prompts change nothing
            condition = condition._replace(negative=source.text, negative_class_labels=source.class_labels)
        report = _Reporter(self, callback_on_step_end)
        num_steps = (len(levels) - 1) * (2 if method == "inversion" else 1)
        with calling(self, num_steps, guidance), evaluating(self.unet):
            if method == "inversion":
                state = self._invert(faces, levels, source, report)
            else:
                noise = randn_tensor(faces.shape, generator=generator, device=faces.device, dtype=torch.float32)
                state = faces + levels[0].sigma * noise
            state = self._reconstruct(state, levels, condition, guidance, report)
            if method == "noise":  # Inverted faces are those of the last level. Here, a little of its noise is left.
                state = self._denoised(state, levels[-1], condition, guidance)
        return self._output(state, output_type, return_dict)

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        prompt: str | list[str] | None = None,
        strength: float = 1.0,
        num_inference_steps: int | None = None,
        callback_on_step_end: Callable[["DDPMFacesEditPipeline", int, int, dict], dict] | None = None,
        class_labels: Sequence[int] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Find the noisy images from which [`reconstruct`], with the same arguments, makes these faces.

        Points between the results for two faces (on the sphere, by slerp) lead to faces between them.

        Args:
            image (`PIL.Image.Image`, a list of them, or `torch.Tensor` of shape `(batch, channels, height, width)`):
                As in [`__call__`].
            prompt (`str` or `list[str]`, *optional*): What the faces show.
            strength (`float`, defaults to 1.0): How much noise to find, in (0, 1]; 1 is that of the last timestep.
            num_inference_steps (`int`, *optional*): Steps, 1 to T; defaults to 50, or T if that is less.
            callback_on_step_end (`Callable`, *optional*): As in [`DDPMFacesPipeline.__call__`], with `latents` only.
            class_labels (`list[int]` or `torch.Tensor`, *optional*): Class of each face, for a model with classes.

        Returns:
            `torch.Tensor` of shape `(batch, channels, height, width)`: x_t at the timestep of `strength`.

        Raises:
            ValueError: An argument is invalid, or the solutions do not converge to 0.0001.
        """
        faces, _ = observations(image, self.image_shape)
        levels = self._levels(strength, num_inference_steps)
        self._check(len(faces), class_labels)
        condition = self._condition_of(len(faces), prompt, class_labels)
        report = _Reporter(self, callback_on_step_end)
        with calling(self, len(levels) - 1, UNGUIDED), evaluating(self.unet):
            state = self._invert(faces.to(self._execution_device), levels, condition, report)
        return levels[0].signal * state

    def _invert(
        self, state: torch.Tensor, levels: list["_Level"], condition: Condition, report: "_Reporter"
    ) -> torch.Tensor:
        """Return the z of the first level that leads to the faces `state`."""
        for level, following in self.progress_bar([*zip(levels[:-1], levels[1:], strict=True)][::-1]):
            state = self._solve(state, level, following.sigma / level.sigma, condition)
            state = report(level, state)
        return state

    def _solve(self, target: torch.Tensor, level: "_Level", ratio: float, condition: Condition) -> torch.Tensor:
        """Return the z_s whose step leads to `target`."""
        state, change = target, math.inf
        states: list[torch.Tensor] = []
        residuals: list[torch.Tensor] = []
        for _ in range(MAX_ITERATIONS):
            guess = (target - (1 - ratio) * self._denoised(state, level, condition)) / ratio
            # What the step misses the target by
            change = ratio * (guess - state).abs().max().item()
            if change < TOLERANCE:
                return state
            states, residuals = [*states[-MEMORY:], state], [*residuals[-MEMORY:], guess - state]
            state = _extrapolated(states, residuals)
        raise ValueError(
            f"`num_inference_steps` is too small: the inversion of a step has not converged after {MAX_ITERATIONS} "
            f"iterations (it still changes pixels by {change:.2g}, of [-1, 1])."
        )

    @torch.no_grad()
    def reconstruct(
        self,
        latents: torch.Tensor,
        prompt: str | list[str] | None = None,
        strength: float = 1.0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DDPMFacesEditPipeline", int, int, dict], dict] | None = None,
        class_labels: Sequence[int] | torch.Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Make faces from the noisy images of [`invert`], by DDIM without new noise.

        Args:
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`): From [`invert`].
            prompt (`str` or `list[str]`, *optional*): What the faces should show: one text, or one for each.
            strength (`float`, defaults to 1.0): As in [`invert`].
            num_inference_steps (`int`, *optional*): As in [`invert`].
            guidance_scale (`float`, *optional*): Scale of classifier-free guidance; defaults to that of the pipeline.
            output_type (`str`, defaults to `"pil"`): As in [`DDPMFacesPipeline.__call__`].
            return_dict (`bool`, defaults to `True`): Whether to return an output class, or a tuple.
            callback_on_step_end (`Callable`, *optional*): As in [`DDPMFacesPipeline.__call__`], with `latents` only.
            class_labels (`list[int]` or `torch.Tensor`, *optional*): Class of each face, for a model with classes.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: `images`, in the form of `output_type`.

        Raises:
            ValueError: An argument is invalid.
        """
        if latents.ndim != 4 or tuple(latents.shape[1:]) != self.image_shape:
            allowed = ", ".join(map(str, self.image_shape))
            raise ValueError(f"`latents` must be of shape (batch, {allowed}), got {tuple(latents.shape)}.")
        levels = self._levels(strength, num_inference_steps)
        guidance = self._guidance_of(guidance_scale)
        self._check(len(latents), class_labels, output_type, None, guidance)
        condition = self._condition_of(len(latents), prompt, class_labels)
        state = latents.to(self._execution_device, torch.float32) / levels[0].signal
        with calling(self, len(levels) - 1, guidance), evaluating(self.unet):
            state = self._reconstruct(state, levels, condition, guidance, _Reporter(self, callback_on_step_end))
        return self._output(state, output_type, return_dict)

    def _reconstruct(
        self,
        state: torch.Tensor,
        levels: list["_Level"],
        condition: Condition,
        guidance: Guidance,
        report: "_Reporter",
    ) -> torch.Tensor:
        """Return the faces to which the z `state` of the first level leads."""
        for level, following in self.progress_bar([*zip(levels[:-1], levels[1:], strict=True)]):
            predicted = self._denoised(state, level, condition, guidance)
            state = predicted + following.sigma / level.sigma * (state - predicted)
            state = report(following, state)
        return state

    def _output(self, state: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        images = self.postprocess(state, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoised(
        self, state: torch.Tensor, level: "_Level", condition: Condition, guidance: Guidance = UNGUIDED
    ) -> torch.Tensor:
        """Return the prediction D of z at a level."""
        noisy = level.signal * state
        output = self.predict(noisy, level.timestep, condition, guidance)[:, : state.shape[1]]
        return self.scheduler.predict_original_sample(output, level.timestep, noisy)

    def _condition_of(
        self,
        num_images: int,
        prompt: str | list[str] | None,
        class_labels: Sequence[int] | torch.Tensor | None,
    ) -> Condition:
        count = self.check_prompts(prompt)
        if count not in (None, 1, num_images):
            raise ValueError(f"`prompt` must be one text, or one for each of the {num_images} images, got {count}.")
        return self._condition(class_labels, num_images, 1, prompt)

    def _check(
        self,
        num_images: int,
        class_labels: Sequence[int] | torch.Tensor | None,
        output_type: str = "pt",
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance: Guidance = UNGUIDED,
    ) -> None:
        self.check_inputs(num_images, 1, generator, None, output_type, class_labels, (), 0.0, guidance)

    def _levels(self, strength: float, num_inference_steps: int | None) -> list["_Level"]:
        """Return the noise levels of all steps, from the most to the least noise."""
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
            raise ValueError(f"`strength` must be a number above 0 and at most 1, got {strength!r}.")
        if not self._scheduler_is_of({"DDPMFacesScheduler"}):
            raise ValueError(f"`scheduler` must be a DDPMFacesScheduler, got {type(self.scheduler).__name__}.")
        bars = self.scheduler.alphas_cumprod.double().cpu()
        total = len(bars)
        count = min(STEPS, total) if num_inference_steps is None else num_inference_steps
        self._check_steps(count, "`num_inference_steps`")
        sigmas = ((1 - bars) / bars).sqrt()
        first = min(round(strength * (total - 1)), int((sigmas <= SIGMA_MAX).sum()) - 1)
        last = min(int((sigmas < SIGMA_MIN).sum()), max(first - 1, 0))
        wanted = torch.linspace(sigmas[first].log(), sigmas[last].log(), count + 1, dtype=torch.float64)
        nearest = (sigmas.log() - wanted[:, None]).abs().argmin(dim=1).tolist()
        timesteps = sorted({*nearest, first, last}, reverse=True)  # fewer than asked where timesteps are sparse
        return [_Level(t, math.sqrt(bars[t]), math.sqrt(1 - bars[t]), float(sigmas[t])) for t in timesteps]


def _extrapolated(states: list[torch.Tensor], residuals: list[torch.Tensor]) -> torch.Tensor:
    """Return the next guess of a fixed point, by Anderson's method (eq. 2.2 of https://arxiv.org/abs/1808.03971).

    Of the combinations of the last states, it takes the one with the smallest residual if they were linear.
    """

    def exact(x: torch.Tensor) -> torch.Tensor:
        return (x.cpu() if x.device.type == "mps" else x).double().flatten(1)  # MPS has no float64

    state, residual = (exact(values[-1]) for values in (states, residuals))
    if len(states) > 1:
        # (batch, values, number of differences)
        moves, changes = (
            torch.stack([b - a for a, b in pairwise([exact(x) for x in values])], dim=-1)
            for values in (states, residuals)
        )
        gram = changes.mT @ changes
        size = gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-30).view(-1, 1, 1)
        regular = gram + 1e-10 * size * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(regular, changes.mT @ residual[..., None])
        state = state - (moves @ weights)[..., 0]
        residual = residual - (changes @ weights)[..., 0]
    return (state + residual).to(states[-1].dtype).to(states[-1].device).view_as(states[-1])


@contextmanager
def naming(name: str, new_name: str) -> Iterator[None]:
    """Let a `ValueError` name an argument as the caller knows it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(f"`{name}`", f"`{new_name}`")) from error


class _Level(NamedTuple):
    """A timestep, with sqrt(alpha_bar), sqrt(1 - alpha_bar) and their ratio."""

    timestep: int
    signal: float
    noise: float
    sigma: float


class _Reporter:
    """Calls `callback_on_step_end` after each step, with the noisy images x_t that were reached."""

    def __init__(self, pipeline: DDPMFacesEditPipeline, callback: Callable | None) -> None:
        self.pipeline, self.callback, self.num_steps = pipeline, callback, 0

    def __call__(self, level: _Level, state: torch.Tensor) -> torch.Tensor:
        """Return z, or what the callback puts in its place."""
        if self.callback is None:
            return state
        latents = level.signal * state
        returned = self.callback(self.pipeline, self.num_steps, level.timestep, {"latents": latents}) or {}
        self.num_steps += 1
        replaced = returned.get("latents", latents)
        return state if replaced is latents else replaced / level.signal


# diffusers refuses a file with two pipelines as a `custom_pipeline`.
del DDPMFacesPipeline
