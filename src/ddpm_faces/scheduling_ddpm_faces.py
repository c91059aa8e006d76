# Copyright 2026 The ddpm-faces authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The noise schedule of DDPM and the steps back (Ho et al. 2020, https://huggingface.co/papers/2006.11239).

With betas beta_t, alpha_t = 1 - beta_t and alpha_bar_t = alpha_0 * ... * alpha_t:

    forward   q(x_t | x_0)      = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)                                  (4)
    posterior q(x_t-1 | x_t, x_0): mean  sqrt(alpha_bar_t-1) beta_t / (1 - alpha_bar_t) x_0
                                       + sqrt(alpha_t) (1 - alpha_bar_t-1) / (1 - alpha_bar_t) x_t               (7)
                               variance  beta_t (1 - alpha_bar_t-1) / (1 - alpha_bar_t)                          (7)

Timesteps count from 0 (least noise) to T - 1 (most noise), so t here is t + 1 in the paper.

The deterministic solvers need far fewer steps. With the noise-to-signal ratio sigma_t = sqrt((1 - alpha_bar_t) /
alpha_bar_t), a step from sigma_s to sigma_t moves to a mixture of x_s and a predicted image D:

    x_t / sqrt(alpha_bar_t) = r x_s / sqrt(alpha_bar_s) + (1 - r) D,   r = sigma_t / sigma_s

DDIM (https://huggingface.co/papers/2010.02502) takes D = x_0 as predicted at s. DPM-Solver++
(https://huggingface.co/papers/2211.01095) extrapolates D from the predictions of the last steps.
"""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing", "logsnr")
ALGORITHMS = ("ddpm", "ddim", "dpmsolver++")
# Arguments that no scheduler of diffusers shares. `from_config` of another class skips them.
SOLVER_ARGUMENTS = ("algorithm", "solver_order", "sigma_min", "epsilon_scaling", "tuned_steps")
SIGMA_MAX = 120.0  # the first sigma of "logsnr"; more noise changes nothing that is visible
MAX_TIMESTEPS = 1_000_000  # far above realistic values; an untrusted configuration must not exhaust the memory


@dataclass
class DDPMFacesSchedulerOutput(BaseOutput):
    """Output of `DDPMFacesScheduler.step`.

    Args:
        prev_sample (`torch.Tensor` of shape `(batch, channels, height, width)`):
            x_t-1, the input of the next step.
        pred_original_sample (`torch.Tensor` of shape `(batch, channels, height, width)`):
            Predicted x_0 at this step.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class DDPMFacesScheduler(SchedulerMixin, ConfigMixin):
    """DDPM scheduler with the article's defaults: 300 timesteps, linear betas, posterior variance.

    With the same configuration, it takes the same steps as `diffusers.DDPMScheduler`; with another `algorithm`, it
    samples in few deterministic steps. Other schedulers of that family
    can replace it with `from_config(scheduler.config)`. The terms of the algorithm are attributes, `torch.float32`
    tensors of shape `(num_train_timesteps,)` with the article's names: `betas`, `alphas`, `alphas_cumprod`,
    `alphas_cumprod_prev`, `sqrt_recip_alphas`, `sqrt_alphas_cumprod`, `sqrt_one_minus_alphas_cumprod`,
    `posterior_variance`.

    Args:
        num_train_timesteps (`int`, defaults to 300): T, the length of the diffusion.
        beta_start (`float`, defaults to 1e-4): beta_0, in (0, 1).
        beta_end (`float`, defaults to 0.02): beta_T-1, in (0, 1).
        beta_schedule (`str`, defaults to `"linear"`):
            `"linear"` (DDPM, the article), `"scaled_linear"`, `"squaredcos_cap_v2"` (cosine, Improved DDPM eq. 17) or
            `"sigmoid"`. Few other schedulers know `"sigmoid"`: pass its values as `trained_betas` to use them.
        trained_betas (`list[float]`, *optional*): Betas to use instead, `num_train_timesteps` values in (0, 1).
        variance_type (`str`, defaults to `"fixed_small"`):
            `"fixed_small"` (posterior variance, eq. 7), `"fixed_large"` (beta_t), `"learned"` or `"learned_range"`
            (the model predicts it in additional channels, Improved DDPM eq. 15). The `_log` forms are accepted for
            configurations of DDPMScheduler and mean the same variances.
        clip_sample (`bool`, defaults to `True`): Clamp the predicted x_0 to the data range. The article does not.
        prediction_type (`str`, defaults to `"epsilon"`): `"epsilon"`, `"sample"` or `"v_prediction"`.
        thresholding (`bool`, defaults to `False`): Dynamic thresholding (Imagen, section 2.3) instead of clipping.
        dynamic_thresholding_ratio (`float`, defaults to 0.995): Quantile of the absolute values for the threshold.
        clip_sample_range (`float`, defaults to 1.0): x_0 is clamped to [-`clip_sample_range`, `clip_sample_range`].
        sample_max_value (`float`, defaults to 1.0): Largest threshold of dynamic thresholding.
        timestep_spacing (`str`, defaults to `"leading"`):
            Which timesteps are used when there are fewer steps than T: `"linspace"`, `"leading"` or `"trailing"`
            (Table 2 of https://huggingface.co/papers/2305.08891); or `"logsnr"`, where each step divides sigma by the
            same factor (https://huggingface.co/papers/2206.00927), from at most 120 to `sigma_min`. Brightness, color
            and pose of a face are decided at high sigmas, which a cosine schedule covers in its last tenth. Evenly
            spaced timesteps take too few steps there, and ten of them produce grayish faces.
        steps_offset (`int`, defaults to 0): Added to the timesteps of `"leading"`.
        rescale_betas_zero_snr (`bool`, defaults to `False`):
            Rescale the betas so that the last timestep is pure noise (Algorithm 1 of the same paper). Needs a
            `prediction_type` other than `"epsilon"`, because the noise does not determine x_0 there. The same applies
            to `trained_betas` that end with 1.
        algorithm (`str`, defaults to `"ddpm"`):
            `"ddpm"` (Algorithm 2 of DDPM, which adds noise in each step), `"ddim"` (DDIM without noise) or
            `"dpmsolver++"` (multistep DPM-Solver++). The last is the best in 4 to 20 steps with the spacing
            `"logsnr"`. Both ignore a learned variance; `"dpmsolver++"` also ignores `clip_sample`, which its
            extrapolation would suffer from.
        solver_order (`int`, defaults to 2): Order of `"dpmsolver++"`, 1 to 3.
        sigma_min (`float`, defaults to 0.02):
            Sigma of the last step of `"logsnr"`, in (0, 1), from which a solver goes straight to x_0. 0.02 is 2.5 of
            the 255 levels of an 8-bit pixel. A network with little training gives cleaner images with 0.1.
        epsilon_scaling (`float`, defaults to 1.0):
            Divisor of the predicted noise of a solver in each step except the first, in [0.9, 1.1]
            (https://huggingface.co/papers/2308.15321). It corrects exposure bias: in sampling, unlike in training,
            the input contains the errors of earlier steps, so a well-trained, guided network predicts slightly too
            much noise, and faces become too smooth.
        tuned_steps (`dict[str, dict]`, *optional*):
            Settings of a solver for given numbers of steps n, which `ddpm-faces tune` finds for a model, such as
            `{"4": {"timesteps": [...], ...}}`. They replace the spacing. Each has the `timesteps` that the network is
            told (n numbers from 0 to T - 1), and optionally the `sigmas` of these steps (n descending numbers,
            otherwise those of the timesteps), `epsilon_scaling` (n numbers, one for each step) and `weights` (n rows
            of at most 2 numbers: the weight of each earlier prediction in D, from the latest; the weights of D sum
            to 1), which replace those of DPM-Solver++.

    Raises:
        ValueError: An argument has a value that is not allowed (the message names both); or the betas are so small
            that float32 rounds them away, or so large that it rounds alpha_bar_t to 0 before the last timestep.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 300,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        algorithm: str = "ddpm",
        solver_order: int = 2,
        sigma_min: float = 0.02,
        epsilon_scaling: float = 1.0,
        tuned_steps: dict[str, dict] | None = None,
    ) -> None:
        # When a config moves to another class, diffusers drops the values that were left at their defaults, and the
        # other class's defaults (T = 1000) would silently replace them. So all values that other classes know count
        # as given, and those that only this class knows count as defaults, or each class would warn of them.
        self.register_to_config(_use_default_values=list(SOLVER_ARGUMENTS))

        # 1. Check
        _check_integer("num_train_timesteps", num_train_timesteps, 1)
        if num_train_timesteps > MAX_TIMESTEPS:
            raise ValueError(f"`num_train_timesteps` must be at most {MAX_TIMESTEPS}, got {num_train_timesteps}.")
        _check_integer("steps_offset", steps_offset, 0)
        _check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        _check_choice("variance_type", variance_type, VARIANCE_TYPES)
        _check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        _check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        _check_choice("algorithm", algorithm, ALGORITHMS)
        _check_integer("solver_order", solver_order, 1)
        numbers = {
            "sigma_min": sigma_min,
            "epsilon_scaling": epsilon_scaling,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "dynamic_thresholding_ratio": dynamic_thresholding_ratio,
            "clip_sample_range": clip_sample_range,
            "sample_max_value": sample_max_value,
        }
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"`{name}` must be a number, got {value!r}.")
        switches = {
            "clip_sample": clip_sample,
            "thresholding": thresholding,
            "rescale_betas_zero_snr": rescale_betas_zero_snr,
        }
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` must be True or False, got {value!r}.")
        for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not 0 < value < 1:
                raise ValueError(f"`{name}` must lie in (0, 1), got {value}.")
        if beta_start > beta_end:
            raise ValueError(f"`beta_start` ({beta_start}) must not exceed `beta_end` ({beta_end}).")
        if not 0 < dynamic_thresholding_ratio <= 1:
            raise ValueError(f"`dynamic_thresholding_ratio` must lie in (0, 1], got {dynamic_thresholding_ratio}.")
        if not clip_sample_range > 0:
            raise ValueError(f"`clip_sample_range` must be positive, got {clip_sample_range}.")
        if not sample_max_value >= 1:
            raise ValueError(f"`sample_max_value` must be at least 1, got {sample_max_value}.")
        if solver_order > 3:
            raise ValueError(f"`solver_order` must be from 1 to 3, got {solver_order}.")
        if not 0 < sigma_min < 1:
            raise ValueError(f"`sigma_min` must lie in (0, 1), got {sigma_min}.")
        if not 0.9 <= epsilon_scaling <= 1.1:
            raise ValueError(f"`epsilon_scaling` must lie in [0.9, 1.1], got {epsilon_scaling}.")
        _check_tuned_steps(tuned_steps, num_train_timesteps)
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "`rescale_betas_zero_snr=True` makes the last timestep pure noise, from which `prediction_type="
                "'epsilon'` cannot tell the image: use 'v_prediction' or 'sample'."
            )
        if rescale_betas_zero_snr and num_train_timesteps < 2:
            raise ValueError("`rescale_betas_zero_snr=True` needs a `num_train_timesteps` of at least 2, got 1.")

        # 2. Schedule: beta_t
        if trained_betas is not None:
            try:
                betas = torch.as_tensor(trained_betas, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise ValueError(f"`trained_betas` must be a list of numbers: {error}.") from error
            if betas.shape != (num_train_timesteps,):
                raise ValueError(
                    f"`trained_betas` must have `num_train_timesteps` ({num_train_timesteps}) values, got a shape of "
                    f"{tuple(betas.shape)}."
                )
            # The betas of a schedule with zero terminal SNR end with exactly 1.
            if not ((betas > 0) & (betas <= 1)).all() or not (betas[:-1] < 1).all():
                raise ValueError(
                    f"`trained_betas` must lie in (0, 1) (the last may be 1), got {betas.min():g} to {betas.max():g}."
                )
        elif beta_schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, num_train_timesteps)
        elif beta_schedule == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
        elif beta_schedule == "squaredcos_cap_v2":
            betas = _cosine_betas(num_train_timesteps)
        else:  # sigmoid
            betas = torch.linspace(-6, 6, num_train_timesteps).sigmoid() * (beta_end - beta_start) + beta_start
        if not (1.0 - betas < 1.0).all():
            raise ValueError(
                f"`{'beta_start' if trained_betas is None else 'trained_betas'}` must be at least 6e-8: float32 "
                f"rounds 1 - beta to 1 for {betas.min():g}, and such a timestep adds no noise."
            )
        if rescale_betas_zero_snr:
            betas = _rescale_zero_terminal_snr(betas)

        # 3. The article's terms
        self.betas = betas
        self.alphas = 1.0 - betas
        self.alphas_cumprod = self.alphas.cumprod(dim=0)
        if not (self.alphas_cumprod[:-1] > 0).all():
            raise ValueError(
                f"{_betas_argument(trained_betas)} too large for `num_train_timesteps` ({num_train_timesteps}): in "
                "float32, several timesteps are pure noise, and no step between them is defined."
            )
        if prediction_type == "epsilon" and self.alphas_cumprod[-1] == 0:
            raise ValueError(
                f"{_betas_argument(trained_betas)} too large for `prediction_type='epsilon'`: the last timestep is "
                "pure noise (zero terminal SNR), from which it cannot tell the image. Use 'v_prediction' or 'sample'."
            )
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        self.sqrt_recip_alphas = (1.0 / self.alphas).sqrt()
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1.0 - self.alphas_cumprod).sqrt()
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

        bars = self.alphas_cumprod.double()
        self._all_sigmas = ((1 - bars) / bars).sqrt().tolist()  # the noise-to-signal ratio of each timestep

        # 4. Sampling state: all timesteps, until `set_timesteps` selects some
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._use_timesteps(range(num_train_timesteps - 1, -1, -1))

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        # The counterpart of the first line of `__init__`: `DDPMFacesScheduler.from_config(DDPMScheduler().config)`
        # must keep the 1000 timesteps of that scheduler, not fall back to the 300 of this one.
        dropped = ["_use_default_values"]
        if config_dict.get("_class_name", cls.__name__) != cls.__name__:
            dropped += SOLVER_ARGUMENTS  # those of another scheduler's own solver
        config_dict = {key: value for key, value in config_dict.items() if key not in dropped}
        return super().extract_init_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Save as [`~diffusers.SchedulerMixin.save_pretrained`] does, with this file beside the configuration."""
        if push_to_hub:
            self.push_to_hub()
        if kwargs:
            raise TypeError(f"save_pretrained() got unexpected arguments: {', '.join(kwargs)}.")
        super().save_pretrained(save_directory)
        shutil.copyfile(__file__, Path(save_directory, Path(__file__).name))

    def push_to_hub(self, *args, **kwargs) -> str:
        """Raise a `NotImplementedError`: only whole pipelines are published, with a model card."""
        raise NotImplementedError(
            "A pipeline is published, not its scheduler: DDPMFacesPipeline(unet, scheduler).push_to_hub(repo_id)."
        )

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        try:
            config = super()._dict_from_json_file(json_file)
        except RecursionError as error:
            raise ValueError(f"{json_file} is nested too deeply.") from error
        if not isinstance(config, dict):
            raise ValueError(f"{json_file} must contain a JSON object, got {type(config).__name__}.")
        return config

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Set the timesteps of the next sampling run.

        Args:
            num_inference_steps (`int`, *optional*):
                Number of timesteps, 1 to T, laid out by `timestep_spacing`, or by `tuned_steps` if a solver has
                settings for this number.
            device (`str` or `torch.device`, *optional*):
                Device of `self.timesteps` (`torch.int64`, or `torch.float32` for tuned timesteps between two others).
            timesteps (`Sequence[int]`, *optional*): Descending timesteps to use instead of a number of steps.

        Raises:
            ValueError: Both arguments or neither are given, or the timesteps are not descending integers in 0..T-1.
        """
        num_train_timesteps = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give either `num_inference_steps` or `timesteps`.")

        tuned: Mapping[str, Any] = {}
        if timesteps is not None:
            timesteps = [int(t) for t in timesteps]
            if not timesteps or any(a <= b for a, b in zip(timesteps[:-1], timesteps[1:], strict=True)):
                raise ValueError(f"`timesteps` must be a descending list of at least one, got {timesteps}.")
        else:
            n = num_inference_steps
            if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= num_train_timesteps:
                raise ValueError(
                    f"`num_inference_steps` must be an integer from 1 to `num_train_timesteps` "
                    f"({num_train_timesteps}), got {n!r}."
                )
            if self.config.algorithm != "ddpm":
                tuned = (self.config.tuned_steps or {}).get(str(n), {})
            if tuned:
                timesteps = tuned["timesteps"]
            elif self.config.timestep_spacing == "logsnr":
                timesteps = self._logsnr_timesteps(n)
            elif self.config.timestep_spacing == "linspace":
                stride = (num_train_timesteps - 1) / max(n - 1, 1)
                timesteps = [round(i * stride) for i in reversed(range(n))]
            elif self.config.timestep_spacing == "leading":
                stride = num_train_timesteps // n
                timesteps = [i * stride + self.config.steps_offset for i in reversed(range(n))]
            else:  # trailing
                # Computed as numpy.arange does, so that halves round the same way as in DDPMScheduler.
                stride = num_train_timesteps - (num_train_timesteps - num_train_timesteps / n)
                timesteps = [round(num_train_timesteps - i * stride) - 1 for i in range(n)]

        if timesteps[0] >= num_train_timesteps or timesteps[-1] < 0:
            raise ValueError(
                f"Timesteps must lie in 0..{num_train_timesteps - 1}, got {timesteps[0]}..{timesteps[-1]} "
                f"(`steps_offset` is {self.config.steps_offset})."
            )
        self.num_inference_steps = len(timesteps)
        self._use_timesteps(timesteps, device, tuned)

    def _use_timesteps(
        self,
        timesteps: Sequence[float],
        device: str | torch.device | None = None,
        tuned: Mapping[str, Any] | None = None,
    ) -> None:
        dtype = torch.int64 if all(t == int(t) for t in timesteps) else torch.float32
        self.timesteps = torch.tensor(list(timesteps), dtype=dtype, device=device)
        self._step_index = {t: i for i, t in enumerate(self.timesteps.tolist())}
        self._tuned = tuned or {}
        sigmas = self._tuned.get("sigmas") or [self._sigma_at(t) for t in timesteps]
        self._sigmas = [*sigmas, 0.0]
        self._predictions: list[torch.Tensor] = []  # x_0 of the last steps, the latest first

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise-to-signal ratio of each of `self.timesteps`, then 0: `torch.float64` of shape `(steps + 1,)`."""
        return torch.tensor(self._sigmas, dtype=torch.float64)

    def _sigma_at(self, timestep: float) -> float:
        """Return the noise-to-signal ratio at a timestep. Between two of them, log(sigma) is interpolated."""
        below = int(timestep)
        fraction, (lower, upper) = timestep - below, [*self._all_sigmas[below : below + 2], math.inf][:2]
        return lower if not fraction else lower ** (1 - fraction) * upper**fraction

    def _logsnr_timesteps(self, num_steps: int) -> list[int]:
        """Return distinct timesteps, each the closest to its sigma in a geometric sequence."""
        log_sigmas = torch.tensor(self._all_sigmas, dtype=torch.float64).log()  # rising
        ends = torch.tensor([SIGMA_MAX, self.config.sigma_min], dtype=torch.float64).log()
        first, last = ends.clamp(log_sigmas[0], log_sigmas[-1]).tolist()
        wanted = torch.linspace(first, last, num_steps, dtype=torch.float64)
        timesteps: list[int] = []
        for i, timestep in enumerate((log_sigmas - wanted[:, None]).abs().argmin(dim=1).tolist()):
            left = num_steps - 1 - i  # steps that still need lower timesteps
            highest = timesteps[-1] - 1 if timesteps else len(log_sigmas) - 1
            timesteps.append(min(max(timestep, left), highest))
        return timesteps

    def previous_timestep(self, timestep: float | torch.Tensor) -> float | torch.Tensor:
        """Return the timestep that follows `timestep` in sampling, or -1 after the last.

        Args:
            timestep (`float` or `torch.Tensor` with one element): One of `self.timesteps`.

        Returns:
            `float`, or a `torch.Tensor` of the shape, type and device of `timestep`, if that is a tensor.

        Raises:
            ValueError: `timestep` is not one of `self.timesteps`.
        """
        index = self._index_of(timestep)
        previous = self.timesteps[index + 1].item() if index + 1 < len(self.timesteps) else -1
        return torch.full_like(timestep, previous) if isinstance(timestep, torch.Tensor) else previous

    def _index_of(self, timestep: float | torch.Tensor) -> int:
        t = timestep.item() if isinstance(timestep, torch.Tensor) else timestep
        if t not in self._step_index:
            raise ValueError(f"`timestep` {t} is not among the {len(self.timesteps)} that `set_timesteps` chose.")
        return self._step_index[t]

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Return `sample` unchanged. Schedulers whose networks expect a scaled x_t scale it here."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMFacesSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Take a step of `algorithm` from x_t to the next timestep.

        `"ddpm"` draws x_t-1 from p(x_t-1 | x_t), Algorithm 2 of DDPM, like the article's `sample_timestep`. A solver
        also uses its predictions of the last steps; they are forgotten at the first of `self.timesteps`.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`):
                Output of the network, defined by `prediction_type`; `2 * channels` with a learned variance.
            timestep (`int` or 0-d `torch.Tensor`): t, one of `self.timesteps`.
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t.
            generator (`torch.Generator` or a list of one per image, *optional*): Source of the noise of `"ddpm"`.
            return_dict (`bool`, defaults to `True`): Whether to return an output class, or a tuple.

        Returns:
            `DDPMFacesSchedulerOutput` or `(prev_sample, pred_original_sample)`. No noise is added at the last step.

        Raises:
            ValueError: `timestep` is not one of `self.timesteps`, or the shapes do not match.
        """
        if self.config.algorithm == "ddpm":
            prev_sample, pred_original_sample = self._ddpm_step(model_output, timestep, sample, generator)
        else:
            prev_sample, pred_original_sample = self._solver_step(model_output, timestep, sample)
        if not return_dict:
            return prev_sample, pred_original_sample
        return DDPMFacesSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _ddpm_step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # eps, v: predicted noise, velocity  | model_output, by prediction_type
        # x_t, x_t-1, x_0                    | sample, prev_sample, pred_original_sample
        # alpha_bar_t, alpha_bar_t-1         | alpha_prod_t, alpha_prod_t_prev
        # alpha_t, beta_t (of this stride)   | current_alpha_t, current_beta_t
        t = int(timestep)
        prev_t = int(self.previous_timestep(t))

        predicted_variance = None
        if self.config.variance_type in ("learned", "learned_range"):
            if model_output.shape[1] != 2 * sample.shape[1]:
                raise ValueError(
                    f"`variance_type={self.config.variance_type!r}` needs a `model_output` of {2 * sample.shape[1]} "
                    f"channels (prediction and variance), got {model_output.shape[1]}."
                )
            model_output, predicted_variance = model_output.chunk(2, dim=1)
        self._check_output(model_output, sample)

        # 1. alpha_bar and beta of this stride
        alpha_prod_t = self.alphas_cumprod[t]
        alpha_prod_t_prev = self.alphas_cumprod[prev_t] if prev_t >= 0 else torch.ones_like(alpha_prod_t)
        current_alpha_t = alpha_prod_t / alpha_prod_t_prev
        current_beta_t = 1 - current_alpha_t

        # 2. x_0
        pred_original_sample = self.predict_original_sample(model_output, t, sample)

        # 3. Posterior mean, eq. 7
        original_sample_coeff = alpha_prod_t_prev.sqrt() * current_beta_t / (1 - alpha_prod_t)
        current_sample_coeff = current_alpha_t.sqrt() * (1 - alpha_prod_t_prev) / (1 - alpha_prod_t)
        prev_sample = original_sample_coeff * pred_original_sample + current_sample_coeff * sample

        # 4. Noise with the posterior variance, except at the last step
        if prev_t >= 0:
            noise = randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
            posterior_variance = (1 - alpha_prod_t_prev) / (1 - alpha_prod_t) * current_beta_t
            variance = self.variance(posterior_variance, current_beta_t, predicted_variance)
            prev_sample = prev_sample + variance.sqrt() * noise
        return prev_sample, pred_original_sample

    def _solver_step(
        self, model_output: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # sqrt(alpha_bar), sqrt(1 - alpha_bar) of this step | signal, noise
        # the same of the next step                         | next_signal, next_noise
        # D                                                 | denoised
        index = self._index_of(timestep)
        if self.config.variance_type in ("learned", "learned_range"):
            model_output = model_output[:, : sample.shape[1]]  # a solver has no use for the variance
        self._check_output(model_output, sample)
        (signal, noise), (next_signal, next_noise) = (_rates(sigma) for sigma in self._sigmas[index : index + 2])

        # 1. x_0, with the predicted noise divided by the scaling
        x_0 = self._original_sample(
            model_output, signal, noise, sample, self.config.clip_sample and self.config.algorithm == "ddim"
        )
        scalings = self._tuned.get("epsilon_scaling")
        scaling = scalings[index] if scalings else 1.0 if index == 0 else self.config.epsilon_scaling
        if scaling != 1:
            # epsilon = (x - signal x_0) / noise, and x_0 = (x - noise epsilon / scaling) / signal
            x_0 = x_0 + (1 - 1 / scaling) * (sample / signal - x_0)

        # 2. D: x_0, extrapolated from the last predictions
        if index == 0:
            self._predictions = []
        earlier = self._predictions
        weights = self._earlier_weights(index, len(earlier))
        denoised = (1 - sum(weights)) * x_0
        for weight, prediction in zip(weights, earlier, strict=False):
            denoised = denoised + weight * prediction
        self._predictions = [x_0, *earlier][:2]

        # 3. The step
        ratio = self._sigmas[index + 1] / self._sigmas[index]
        return next_noise / noise * sample + next_signal * (1 - ratio) * denoised, x_0

    def _earlier_weights(self, index: int, num_earlier: int) -> list[float]:
        """Return the weights of the earlier predictions in D, from the latest; the present one has the rest."""
        if self.config.algorithm == "ddim":
            return []
        if "weights" in self._tuned:
            return list(self._tuned["weights"][index][:num_earlier])
        # diffusers' DPMSolverMultistepScheduler lowers the order at the end, where no later step corrects errors: to 1
        # in the last step, and to at most 2 in the step before if there are few steps.
        num_left = len(self._sigmas) - 1 - index
        order = min(
            self.config.solver_order, num_earlier + 1, num_left if num_left == 1 or len(self._sigmas) <= 15 else 3
        )
        if order == 1:
            return []
        h, h_0, h_1 = (
            math.log(self._sigmas[i] / self._sigmas[i + 1]) if i >= 0 else math.inf
            for i in (index, index - 1, index - 2)
        )  # steps in log-SNR / 2: this one, the last, the one before
        r_0, r_1 = h_0 / h, h_1 / h
        if order == 2:
            return [-1 / (2 * r_0)]
        # D = D_0 + a D_1 + b D_2, with divided differences of the predictions
        rest = -math.expm1(-h)
        a, b = 1 / rest - 1 / h, 0.5 / rest - 1 / (rest * h) + 1 / h**2
        # D_1 = d_0 + r_0 / (r_0 + r_1) (d_0 - d_1), D_2 = (d_0 - d_1) / (r_0 + r_1),
        # d_0 = (x_0 - first earlier) / r_0, d_1 = (first earlier - second earlier) / r_1
        slope, bend = a, (a * r_0 + b) / (r_0 + r_1)
        return [-(slope + bend) / r_0 - bend / r_1, bend / r_1]

    def _check_output(self, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` of shape {tuple(model_output.shape)} does not fit `sample` of shape "
                f"{tuple(sample.shape)} with `variance_type={self.config.variance_type!r}`."
            )

    def predict_original_sample(
        self, model_output: torch.Tensor, timesteps: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Predict x_0, with clipping or thresholding as configured.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`):
                Output of the network without a learned variance, defined by `prediction_type`.
            timesteps (`int` or `torch.Tensor` of shape `(batch,)`, integer): t of each image, 0 to T - 1.
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t.

        Returns:
            `torch.Tensor` of the shape of `sample`: x_0 (DDPM eq. 15).
        """
        if isinstance(timesteps, torch.Tensor):
            alpha_prod_t = self.alphas_cumprod.to(sample)[timesteps].view(-1, *[1] * (sample.ndim - 1))
        else:
            alpha_prod_t = self.alphas_cumprod[timesteps]
        signal, noise = alpha_prod_t.sqrt(), (1 - alpha_prod_t).sqrt()
        return self._original_sample(model_output, signal, noise, sample, self.config.clip_sample)

    def _original_sample(
        self,
        model_output: torch.Tensor,
        signal: torch.Tensor | float,
        noise: torch.Tensor | float,
        sample: torch.Tensor,
        clip: bool,
    ) -> torch.Tensor:
        if self.config.prediction_type == "epsilon":
            pred_original_sample = (sample - noise * model_output) / signal
        elif self.config.prediction_type == "sample":
            pred_original_sample = model_output
        else:  # v_prediction, Progressive Distillation, appendix D
            pred_original_sample = signal * sample - noise * model_output
        if self.config.thresholding:
            return self._threshold_sample(pred_original_sample)
        if clip:
            return pred_original_sample.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return pred_original_sample

    def variance(
        self, posterior_variance: torch.Tensor, beta: torch.Tensor, predicted_variance: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the variance of p(x_t-1 | x_t) for `variance_type`, never its square root or logarithm.

        Args:
            posterior_variance (`torch.Tensor`, broadcastable): Variance of q(x_t-1 | x_t, x_0), eq. 7.
            beta (`torch.Tensor`, broadcastable): beta_t.
            predicted_variance (`torch.Tensor`, *optional*): Additional channels of the network for a learned variance.

        Raises:
            ValueError: The variance is learned, but `predicted_variance` is `None`.
        """
        variance_type = self.config.variance_type
        if variance_type in ("fixed_small", "fixed_small_log"):
            return posterior_variance
        if variance_type in ("fixed_large", "fixed_large_log"):
            return beta
        if predicted_variance is None:
            raise ValueError(f"`predicted_variance` must be given where `variance_type` is {variance_type!r}.")
        if variance_type == "learned":
            return predicted_variance
        # learned_range: Improved DDPM eq. 15, with v = (predicted_variance + 1) / 2
        fraction = (predicted_variance + 1) / 2
        return torch.exp(fraction * beta.log() + (1 - fraction) * posterior_variance.log())

    def _threshold_sample(self, sample: torch.Tensor) -> torch.Tensor:
        """Dynamic thresholding, Imagen section 2.3 (https://huggingface.co/papers/2205.11487)."""
        magnitudes = sample.flatten(start_dim=1).abs().float()  # torch.quantile does not support half precision
        s = torch.quantile(magnitudes, self.config.dynamic_thresholding_ratio, dim=1)
        s = s.clamp(min=1, max=self.config.sample_max_value).to(sample.dtype)
        s = s.view(-1, *[1] * (sample.ndim - 1))
        return torch.clamp(sample, -s, s) / s

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Draw x_t from q(x_t | x_0), eq. 4, like the article's `forward_diffuse_process`.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, channels, height, width)`): x_0 in [-1, 1].
            noise (`torch.Tensor` of the same shape): Standard normal noise.
            timesteps (`torch.Tensor` of shape `(batch,)` or `(1,)` or `()`, integer): t of each image, 0 to T - 1.

        Returns:
            `torch.Tensor` of the shape and type of `original_samples`: x_t.
        """
        sqrt_alpha_prod, sqrt_one_minus_alpha_prod = self._signal_and_noise_rates(original_samples, timesteps)
        return sqrt_alpha_prod * original_samples + sqrt_one_minus_alpha_prod * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0, the target of a `v_prediction` network.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): x_0 in [-1, 1].
            noise (`torch.Tensor` of the same shape): The noise of x_t.
            timesteps (`torch.Tensor` of shape `(batch,)`, integer): t of each image, 0 to T - 1.
        """
        sqrt_alpha_prod, sqrt_one_minus_alpha_prod = self._signal_and_noise_rates(sample, timesteps)
        return sqrt_alpha_prod * noise - sqrt_one_minus_alpha_prod * sample

    def _signal_and_noise_rates(
        self, sample: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply `sample`."""
        # Looked up in float32 and cast last: in half precision, 1 - alpha_bar_t is zero at the first timesteps.
        self.sqrt_alphas_cumprod = self.sqrt_alphas_cumprod.to(sample.device)
        self.sqrt_one_minus_alphas_cumprod = self.sqrt_one_minus_alphas_cumprod.to(sample.device)
        timesteps = torch.as_tensor(timesteps, device=sample.device)
        shape = (-1, *[1] * (sample.ndim - 1))
        return (
            self.sqrt_alphas_cumprod[timesteps].view(shape).to(sample.dtype),
            self.sqrt_one_minus_alphas_cumprod[timesteps].view(shape).to(sample.dtype),
        )


def _check_integer(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def _check_tuned_steps(tuned_steps: Any, num_train_timesteps: int) -> None:
    """Raise a `ValueError` unless `tuned_steps` can be used. The file that it comes from may be untrusted."""
    if tuned_steps is None:
        return
    if not isinstance(tuned_steps, dict) or not tuned_steps:
        raise ValueError(f"`tuned_steps` must be a dictionary or None, got {tuned_steps!r}.")
    for key, settings in tuned_steps.items():
        if not (isinstance(key, str) and key.isdecimal() and 1 <= int(key[:7]) <= min(num_train_timesteps, 100)):
            raise ValueError(f"`tuned_steps` must have numbers of steps from '1' to '100' as keys, got {key!r}.")
        name, n = f"`tuned_steps[{key!r}]`", int(key)
        if not isinstance(settings, dict) or "timesteps" not in settings:
            raise ValueError(f"{name} must be a dictionary with `timesteps`, got {settings!r}.")
        unknown = sorted(set(settings) - {"timesteps", "sigmas", "epsilon_scaling", "weights"})
        if unknown:
            raise ValueError(f"{name} has settings that this version does not know: {', '.join(map(str, unknown))}.")
        last = num_train_timesteps - 1
        for setting, (low, high) in {
            "timesteps": (0, last),
            "sigmas": (1e-4, 1e4),
            "epsilon_scaling": (0.5, 2),
        }.items():
            if setting not in settings:
                continue
            values = settings[setting]
            if not _are_numbers(values, n, low, high):
                raise ValueError(f"{name} needs {n} `{setting}` from {low} to {high}, got {values!r}.")
            if setting != "epsilon_scaling" and any(a <= b for a, b in zip(values[:-1], values[1:], strict=True)):
                raise ValueError(f"{name} needs descending `{setting}`, got {values!r}.")
        rows = settings.get("weights", [[]] * n)
        if not (
            isinstance(rows, list)
            and len(rows) == n
            and all(isinstance(row, list) and len(row) <= 2 and _are_numbers(row, len(row), -10, 10) for row in rows)
        ):
            raise ValueError(f"{name} needs {n} lists of at most 2 `weights` from -10 to 10, got {rows!r}.")


def _are_numbers(values: Any, count: int, low: float, high: float) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and low <= value <= high for value in values)
    )


def _rates(sigma: float) -> tuple[float, float]:
    """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) of a noise-to-signal ratio."""
    return (0.0, 1.0) if sigma == math.inf else (1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))


def _betas_argument(trained_betas: Sequence[float] | None) -> str:
    """Return the start of an error message, with the arguments that define the betas."""
    return "`beta_start` and `beta_end` are" if trained_betas is None else "`trained_betas` are"


def _cosine_betas(num_train_timesteps: int, max_beta: float = 0.999) -> torch.Tensor:
    """Cosine schedule, Improved DDPM eq. 17 (https://huggingface.co/papers/2102.09672)."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    bars = [alpha_bar(i / num_train_timesteps) for i in range(num_train_timesteps + 1)]
    return torch.tensor([min(1 - b / a, max_beta) for a, b in zip(bars[:-1], bars[1:], strict=True)])


def _rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2305.08891)."""
    alphas_bar_sqrt = (1.0 - betas).cumprod(dim=0).sqrt()
    first, last = alphas_bar_sqrt[0].clone(), alphas_bar_sqrt[-1].clone()
    alphas_bar_sqrt = (alphas_bar_sqrt - last) * (first / (first - last))
    alphas_bar = alphas_bar_sqrt**2
    return 1 - torch.cat([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
