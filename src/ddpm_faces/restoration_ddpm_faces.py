# Copyright 2026 The ddpm-faces authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Restoration of faces with a model that was trained only to generate them.

Sampling, with one more operation in each step: the predicted image is moved to explain the observation, as in DiffPIR
(https://huggingface.co/papers/2305.08995) and, without noise, DDNM (https://huggingface.co/papers/2212.00490). These
move each pixel on its own. Here the move is smooth, because the errors of predictions are (`explain`), and a second
prediction says how the network would change the image (`probe`). No gradient passes through the network.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from .operators_ddpm_faces import ROUNDING, Inpaint, LinearOperator, observations
from .pipeline_ddpm_faces import Condition, DDPMFacesPipeline, Guidance, Text, calling, evaluating


LIMITS: dict[str, tuple[int, float]] = {
    "noise_level": (0, 2),
    "eta": (0, 1),
    "regularization": (0, math.inf),
    "num_images_per_prompt": (1, math.inf),
    "num_resamples": (1, 20),
}
# Noise-to-signal ratios between which steps are repeated and probed: the content of an image is decided there.
RESAMPLED = PROBED = (0.05, 10.0)
PROBE = 0.1  # root mean square by which a sample is moved to probe the network, in standard deviations of its noise
EPS = 1e-12
STEPS, MAX_RESAMPLES = 50, 4  # by default
# The errors of neighboring pixels of a predicted image are alike, and so are those of its channels. These numbers
# describe them, see `explain`. The errors of models/faces64-mini are smoother still, but these numbers restore better.
SMOOTHNESS = (3.0, 7.0)
CHANNEL_COUPLING = 9.0
NUM_ITERATIONS = 10
SCHEDULER = {"algorithm": "ddim", "timestep_spacing": "logsnr", "tuned_steps": None}


class DDPMFacesRestorePipeline(DDPMFacesPipeline):
    """Pipeline that restores faces: missing pixels, low resolution, blur, lost colors, noise.

    It uses the networks of any [`DDPMFacesPipeline`]: load it from the same folders and repositories, or take those of
    a loaded one with `DDPMFacesRestorePipeline.from_pipe(pipeline)`. Its arguments are the same.

    Attributes:
        operators: The module of the operators: `pipeline.operators.Inpaint` is `ddpm_faces.Inpaint`.
    """

    operators = sys.modules[LinearOperator.__module__]

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # as in diffusers, each kind of pipeline has its own arguments
        self,
        image: Any,
        operator: LinearOperator,
        noise_level: float = 0.0,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DDPMFacesRestorePipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        class_labels: Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        autoguidance_scale: float = 1.0,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        eta: float = 1.0,
        regularization: float = 2.0,
        num_resamples: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Restore faces.

        What an observation leaves open has many answers. Each call draws one, or `num_images_per_prompt` for each
        observation; their mean is the restoration with the least squared error, and their spread shows what is known.

        Args:
            image (`PIL.Image.Image`, a list of them, or `torch.Tensor` of shape `(batch, *operator.output_shape)`):
                The observations y = A x + noise. Tensors are in the range of x, [-1, 1].
            operator ([`LinearOperator`]): A, what happened to the images.
            noise_level (`float`, defaults to 0.0):
                Standard deviation of the noise of the observations, of images in [-1, 1], from 0 to 2: 0.05 is 6.4 of
                the 255 levels. The rounding of `PIL` images is added, unless pixels are just missing.
            num_inference_steps (`int`, *optional*):
                Evaluations of the network, from 1 to T. Defaults to 50, or T if that is less. Steps between little and
                much noise take two and are repeated, so that there are fewer steps.
            num_images_per_prompt (`int`, defaults to 1): Number of restorations of each observation.
            generator (`torch.Generator` or a list of one per result, *optional*):
                Makes the result reproducible. With a list, result i depends only on generator i, not on the batch.
            output_type (`str`, defaults to `"pil"`): As in [`DDPMFacesPipeline.__call__`].
            return_dict (`bool`, defaults to `True`): Whether to return an output class, or a tuple.
            callback_on_step_end (`Callable`, *optional*): As in [`DDPMFacesPipeline.__call__`].
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): As in [`DDPMFacesPipeline.__call__`].
            class_labels (`list[int]` or `torch.Tensor`, *optional*): Class of each result, for a model with classes.
            guidance_scale (`float`, *optional*): As in [`DDPMFacesPipeline.__call__`].
            autoguidance_scale (`float`, defaults to 1.0):
                As in [`DDPMFacesPipeline.__call__`]. It is off by default: with it, restorations are less exact.
            prompt (`str` or `list[str]`, *optional*):
                What the faces should show, one text for all observations or one for each.
            negative_prompt (`str` or `list[str]`, *optional*): What they should not show.
            prompt_embeds (`torch.Tensor`, *optional*): Instead of `prompt`.
            negative_prompt_embeds (`torch.Tensor`, *optional*): Instead of `negative_prompt`.
            eta (`float`, defaults to 1.0):
                Noise that each step draws anew, as in DDIM: 0 is none (except in repetitions), 1 that of DDPM.
            regularization (`float`, defaults to 2.0):
                How much more the prediction counts than `noise_level` says, at least 0. Without noise it has no
                effect.
            num_resamples (`int`, *optional*):
                How often each step between little and much noise is taken (RePaint,
                https://huggingface.co/papers/2201.09865, section 4.2), from 1 to 20. Repetitions let known pixels
                influence unknown ones. More of them restore more exactly, but several restorations of an observation
                become more alike. With the same number of evaluations in total, steps become coarser. Defaults to a
                tenth of `num_inference_steps`, but at least 1 and at most 4.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: `images`, in the form of `output_type`. The restorations of
            the first observation come first.

        Raises:
            ValueError: An argument is invalid, the images do not fit the operator, or the network does not.
        """
        # 0. Check
        settings = {"noise_level": noise_level, "eta": eta, "regularization": regularization}
        counts = {"num_images_per_prompt": num_images_per_prompt}
        if num_resamples is not None:
            counts["num_resamples"] = num_resamples
        self._check_settings(operator, settings, counts)
        if num_inference_steps is None:
            num_inference_steps = min(STEPS, self.scheduler.config.num_train_timesteps)
        observed, is_rounded = observations(image, operator.output_shape)
        prompts = self.check_prompts(prompt, negative_prompt, 1, prompt_embeds, negative_prompt_embeds)
        if prompts not in (None, 1, len(observed)):
            name = "prompt_embeds" if prompt is None else "prompt"
            raise ValueError(
                f"`{name}` must be one text, or one for each of the {len(observed)} images, got {prompts}."
            )
        batch_size = len(observed) * num_images_per_prompt
        guidance = self._guidance_of(guidance_scale, autoguidance_scale)
        self.check_inputs(
            *(batch_size, num_inference_steps, generator, None, output_type, class_labels),
            *(callback_on_step_end_tensor_inputs, 0.0, guidance),
        )

        # 1. Observations, condition and timesteps
        device = self._execution_device
        observed = observed.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        if is_rounded and not isinstance(operator, Inpaint):
            noise_level = math.hypot(noise_level, ROUNDING)
        texts = prompt, negative_prompt, prompt_embeds, negative_prompt_embeds
        condition = self._condition(class_labels, batch_size // num_images_per_prompt, num_images_per_prompt, *texts)
        scheduler = self._scheduler_with(SCHEDULER)
        num_resamples = num_resamples or min(MAX_RESAMPLES, max(1, num_inference_steps // 10))
        plan = _plan(scheduler, num_inference_steps, num_resamples, eta)

        # 2. Noise, around what the observation says
        def noise() -> torch.Tensor:
            shape = (batch_size, *operator.image_shape)
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

        def predict_x_0(sample: torch.Tensor, t: int) -> torch.Tensor:
            output = self.predict(sample, t, condition, guidance)[:, : sample.shape[1]]
            return scheduler.predict_original_sample(output, t, sample)

        noise_variance = regularization * noise_level**2
        signal, spread = _rates(plan[0].sigma)
        latents = signal * operator.pseudo_inverse(observed) + spread * noise()

        # 3. Denoise
        with calling(self, len(plan), guidance), evaluating(self.unet, self.guide):
            for i, (t, sigma, next_sigma, kept, is_probed) in enumerate(self.progress_bar(plan)):
                # 3.1 Predict x_0
                x_0 = predict_x_0(latents, t)

                # 3.2 Move it to explain the observation
                if is_probed:
                    x_0 = probe(operator, x_0, observed, noise_variance, latents, sigma, partial(predict_x_0, t=t))
                x_0 = explain(operator, x_0, observed, noise_variance, sigma)

                # 3.3 The next x_t: part of its noise is kept, part is new
                (signal, spread), (next_signal, next_spread) = _rates(sigma), _rates(next_sigma)
                latents_noise = kept * (latents - signal * x_0) / spread
                if next_spread and kept < 1:
                    latents_noise = latents_noise + math.sqrt(1 - kept**2) * noise()
                latents = next_signal * x_0 + next_spread * latents_noise

                if callback_on_step_end is not None:
                    callback_kwargs = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = (callback_on_step_end(self, i, t, callback_kwargs) or {}).get("latents", latents)

        # 4. Images
        images = self.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def as_denoiser(
        self,
        prompt: str | None = None,
        guidance_scale: float | None = None,
        autoguidance_scale: float = 1.0,
        class_label: int | None = None,
    ) -> "Denoiser":
        """Return a denoiser in the convention of deepinv (https://deepinv.github.io), for its algorithms.

        Args:
            prompt (`str`, *optional*): What the faces should show.
            guidance_scale (`float`, *optional*): As in [`__call__`].
            autoguidance_scale (`float`, defaults to 1.0): As in [`__call__`].
            class_label (`int`, *optional*): Class of the faces, for a model with classes.

        Raises:
            ValueError: An argument is invalid, or the scheduler is not a `DDPMFacesScheduler`.
        """
        self._check_scheduler()
        if self.check_prompts(prompt) not in (None, 1):
            raise ValueError(f"`prompt` must be one text, got {prompt!r}.")
        guidance = self._guidance_of(guidance_scale, autoguidance_scale)
        labels = None if class_label is None else [class_label]
        self.check_inputs(1, 1, None, None, "pt", labels, (), 0.0, guidance)
        return Denoiser(self, prompt, guidance, class_label)

    def _check_scheduler(self) -> None:
        if not self._scheduler_is_of({"DDPMFacesScheduler"}):
            raise ValueError(
                f"`scheduler` must be a DDPMFacesScheduler, got {type(self.scheduler).__name__}: restoration takes "
                "its own steps."
            )

    def _check_settings(self, operator: LinearOperator, settings: dict[str, float], counts: dict[str, int]) -> None:
        """Raise a `ValueError` if the operator, a number or the scheduler is not allowed."""
        if not isinstance(operator, LinearOperator):
            raise ValueError(
                f"`operator` must be a LinearOperator, such as Inpaint(mask), got {type(operator).__name__}."
            )
        if operator.image_shape[0] != self.image_shape[0]:
            raise ValueError(
                f"`operator` must be of images with {self.image_shape[0]} channels, as the model, got "
                f"{operator.image_shape[0]}."
            )
        multiple = getattr(self.unet, "size_multiple", 1)
        if any(side % multiple for side in operator.image_shape[1:]):
            sides = "x".join(map(str, operator.image_shape[:0:-1]))
            raise ValueError(f"`operator` must be of images with sides that are multiples of {multiple}, got {sides}.")
        for name, value in settings.items():
            low, high = LIMITS[name]
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or not low <= value <= high:
                allowed = f"from {low} to {high:g}" if high < math.inf else f"of at least {low}"
                raise ValueError(f"`{name}` must be a number {allowed}, got {value!r}.")
        for name, count in counts.items():
            low, high = LIMITS[name]
            if type(count) is not int or not low <= count <= high:
                allowed = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
                raise ValueError(f"`{name}` must be an integer {allowed}, got {count!r}.")
        self._check_scheduler()


class Denoiser(torch.nn.Module):
    """A denoiser for images in [0, 1], in the convention of deepinv. Gradients pass through it.

    Create one with [`DDPMFacesRestorePipeline.as_denoiser`].
    """

    def __init__(
        self, pipeline: DDPMFacesRestorePipeline, prompt: str | None, guidance: Guidance, class_label: int | None
    ) -> None:
        super().__init__()
        self.pipeline, self.guidance, self.class_label = pipeline, guidance, class_label
        self.text = None if prompt is None else pipeline.encode_texts(prompt)
        bars = pipeline.scheduler.alphas_cumprod.double().cpu()
        self.log_sigmas = ((1 - bars) / bars).log().numpy() / 2  # at each timestep

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Return the expected image.

        Args:
            x (`torch.Tensor` of shape `(batch, channels, height, width)`): An image in [0, 1] plus noise.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch,)`):
                Standard deviation of the noise, above 0. Beyond the noise that the model was trained with, the closest
                timestep is used.

        Returns:
            `torch.Tensor` of the shape of `x`: It is not clipped to [0, 1].

        Raises:
            ValueError: `sigma` is not above 0, or not one number or one for each image.
        """
        sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).flatten()
        if len(sigmas) not in (1, len(x)):
            raise ValueError(f"`sigma` must be one number, or one for each of the {len(x)} images, got {len(sigmas)}.")
        if not bool((sigmas > 0).all()):
            raise ValueError(f"`sigma` must be above 0, got {sigma!r}.")
        sigmas = sigmas.expand(len(x))
        ratios = 2 * sigmas  # of noise to signal, in [-1, 1]
        t = np.interp(ratios.cpu().double().log().numpy(), self.log_sigmas, np.arange(len(self.log_sigmas)))
        signal = (1 / (1 + ratios**2).sqrt()).view(-1, 1, 1, 1)
        sample, noise = signal * (2 * x - 1), signal * ratios.view(-1, 1, 1, 1)
        text = labels = None
        if self.text is not None:
            text = Text(*(values.expand(len(x), *values.shape[1:]) for values in self.text))
        if self.class_label is not None:
            labels = torch.full((len(x),), self.class_label, device=x.device)
        condition = Condition(labels, text)
        timesteps = torch.as_tensor(t, dtype=torch.float32, device=x.device)
        with evaluating(self.pipeline.unet, self.pipeline.guide):
            output = self.pipeline.predict(sample, timesteps, condition, self.guidance)[:, : x.shape[1]]
        x_0 = self.pipeline.scheduler._original_sample(output, signal, noise, sample, clip=False)
        return (x_0 + 1) / 2


def probe(
    operator: LinearOperator,
    x_0: torch.Tensor,
    observed: torch.Tensor,
    noise_variance: float,
    sample: torch.Tensor,
    sigma: float,
    predict_x_0: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return a prediction that explains the observation better, as the network would change it.

    The covariance of the error of a prediction is sigma^2 J, where J is the Jacobian of the prediction with respect to
    x_t / sqrt(alpha_bar). J is symmetric, so the direction in which DPS (https://huggingface.co/papers/2209.14687)
    moves, J^T A^T (y - A x_0), is also how the prediction changes when x_t moves by A^T (y - A x_0). A second
    prediction shows it without a gradient. How far to go follows from the covariance.

    Args:
        operator ([`LinearOperator`]): A.
        x_0 (`torch.Tensor` of shape `(batch, *operator.image_shape)`): The images predicted from `sample`.
        observed (`torch.Tensor` of shape `(batch, *operator.output_shape)`): The observations y.
        noise_variance (`float`): Variance of their noise, at least 0.
        sample (`torch.Tensor` of the shape of `x_0`): x_t.
        sigma (`float`): Its noise-to-signal ratio, above 0 and finite.
        predict_x_0 (`Callable`): Predicts x_0 from x_t.
    """
    signal, _ = _rates(sigma)
    residual = observed - operator(x_0)
    shift = operator.adjoint(residual)
    norms = shift.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    shift = PROBE * sigma * math.sqrt(shift[0].numel()) * shift / norms.clamp(min=torch.finfo(shift.dtype).tiny)
    change = predict_x_0(sample + signal * shift) - x_0
    explained = operator(change)
    # The least of |residual - length explained|^2 / noise_variance + length^2 <change, shift> / sigma^2
    stiffness = noise_variance * _dot(change, shift).clamp(min=0) / sigma**2
    length = _dot(residual, explained) / (_dot(explained, explained) + stiffness).clamp(min=EPS)
    return x_0 + length.clamp(min=0) * change


def explain(
    operator: LinearOperator, x_0: torch.Tensor, observed: torch.Tensor, noise_variance: float, sigma: float
) -> torch.Tensor:
    """Return the most likely image, given a prediction and an observation.

    The error of the prediction is taken for a Gaussian: the image z has the least

        |A z - y|^2 / noise_variance + |e|^2 / sigma^2 + smoothness |gradient of e|^2,   e = z - x_0,

    where the smoothness is `SMOOTHNESS[0] + SMOOTHNESS[1] / sigma`. If y has fewer channels than x, the difference
    of each channel of e to their mean counts more, by `CHANNEL_COUPLING / sigma^2`.

    Ten steps of the accelerated proximal gradient method (section 2.2 of https://doi.org/10.1007/978-1-4419-8853-9)
    come close enough. Without noise, each of them explains the observation exactly.

    Args:
        operator ([`LinearOperator`]): A.
        x_0 (`torch.Tensor` of shape `(batch, *operator.image_shape)`): The predicted images.
        observed (`torch.Tensor` of shape `(batch, *operator.output_shape)`): The observations y.
        noise_variance (`float`): Variance of their noise, at least 0.
        sigma (`float`): Noise-to-signal ratio of the sample from which `x_0` was predicted, above 0; may be infinite.
    """
    white = 1 / sigma**2
    smoothness = SMOOTHNESS[0] + SMOOTHNESS[1] / sigma
    has_all_channels = len(operator.output_shape) != 3 or operator.output_shape[0] >= operator.image_shape[0]
    coupling = 0.0 if has_all_channels else CHANNEL_COUPLING * white
    curvature = white + coupling + 8 * smoothness  # the largest one; 8 is that of the discrete Laplacian
    root = math.sqrt(white / curvature)
    momentum = (1 - root) / (1 + root)
    z = ahead = operator.proximal(x_0, observed, noise_variance * white)
    for _ in range(NUM_ITERATIONS):
        error = ahead - x_0
        slope = white * error - smoothness * _laplacian(error)
        if coupling:
            slope += coupling * (error - error.mean(dim=1, keepdim=True))
        previous, z = z, operator.proximal(ahead - slope / curvature, observed, noise_variance * curvature)
        ahead = z + momentum * (z - previous)
    return z


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).flatten(1).sum(dim=1).view(-1, 1, 1, 1)


def _laplacian(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of the differences between each pixel and its up to four neighbors."""
    result = torch.zeros_like(x)
    for dim in (-2, -1):
        steps = x.diff(dim=dim)
        length = steps.shape[dim]
        result.narrow(dim, 0, length).add_(steps)
        result.narrow(dim, 1, length).sub_(steps)
    return result


class _Step(NamedTuple):
    """A step from `sigma` to `next_sigma`, which keeps `kept` of the noise and draws the rest of its variance.

    It takes one evaluation of the network, or two if it is probed.
    """

    timestep: int
    sigma: float
    next_sigma: float
    kept: float
    is_probed: bool


def _plan(scheduler: Any, num_steps: int, num_resamples: int, eta: float) -> list[_Step]:
    """Return steps that take `num_steps` evaluations of the network, or a few less."""
    plan: list[_Step] = []
    for num_levels in range(num_steps, 0, -1):
        scheduler.set_timesteps(num_levels)
        sigmas, plan = scheduler.sigmas.tolist(), []
        for t, sigma, next_sigma in zip(scheduler.timesteps.tolist(), sigmas[:-1], sigmas[1:], strict=True):
            ratio = next_sigma / sigma
            kept = math.sqrt(1 - eta**2 * (1 - ratio**2))  # DDIM, eq. 16
            is_probed = num_steps > 1 and PROBED[0] < sigma < PROBED[1]
            if RESAMPLED[0] < sigma < RESAMPLED[1] and next_sigma:
                # A repetition goes to the next noise level and back, by DDPM's forward process.
                plan += [_Step(t, sigma, sigma, ratio * kept, is_probed)] * (num_resamples - 1)
            plan.append(_Step(t, sigma, next_sigma, kept, is_probed))
        if len(plan) + sum(step.is_probed for step in plan) <= num_steps:
            break
    return plan


def _rates(sigma: float) -> tuple[float, float]:
    """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) of a noise-to-signal ratio."""
    return (0.0, 1.0) if sigma == math.inf else (1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))


# diffusers refuses a file with two pipelines as a `custom_pipeline`.
del DDPMFacesPipeline
