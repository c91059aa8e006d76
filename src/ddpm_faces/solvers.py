"""Sampling in few steps, with diffusers' solvers."""

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

from .scheduling_ddpm_faces import DDPMFacesScheduler


class FastSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ (2M) at the timesteps where few steps are enough for a good picture.

    Brightness, colour and pose of a face are decided where there is tens of times more noise than picture. A cosine
    schedule passes through all of that within its last tenth, where evenly spaced timesteps hardly step: in 10 steps
    they make greyish faces. Here all steps divide the noise by the same factor (equal steps of the logarithm of the
    signal-to-noise ratio, as in https://huggingface.co/papers/2206.00927): with sigma = sqrt((1 - alpha_bar) /
    alpha_bar), noise to picture, step i of n is at the timestep whose sigma is next to

        sigma_max (sigma_min / sigma_max)^(i / (n - 1))

    Each is a timestep that the network was trained at, and none comes twice. From the last, the picture is predicted.

    The noise that the network predicts can be divided by an `epsilon_scaling` in each step but the first (Epsilon
    Scaling, https://huggingface.co/papers/2308.15321). A sampler arrives at each step with the errors of those before,
    and not with what the network saw in training; a good one, guided, then takes a little too much for noise, and
    faces come out too smooth.

    Attributes:
        sigma_max (`float`): Where the first step is: 120, or the most that the schedule has.
        sigma_min (`float`): Where the last step is, or the least that the schedule has.
        epsilon_scaling (`float`): By what the predicted noise is divided.
    """

    sigma_max = 120.0
    sigma_min = 0.02  # two and a half of the 255 steps from black to white
    epsilon_scaling = 1.0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps of the next sampling.

        Args:
            num_inference_steps (`int`, *optional*): How many, 1 to T.
            device (`str` or `torch.device`, *optional*): Where they are kept.
            timesteps (`list[int]`, *optional*): In place of the number: which, falling.

        Raises:
            ValueError: A number of steps outside of 1 to T.
        """
        if timesteps is None:
            most = self.config.num_train_timesteps
            if type(num_inference_steps) is not int or not 1 <= num_inference_steps <= most:
                raise ValueError(f"`num_inference_steps` must be from 1 to {most}, got {num_inference_steps!r}.")
            timesteps = self._spaced(num_inference_steps)
        super().set_timesteps(device=device, timesteps=timesteps)

    def convert_model_output(self, model_output: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Predict x_0, as [`~diffusers.DPMSolverMultistepScheduler.convert_model_output`] does.

        Channels of `model_output` beyond those of the sample are a learned variance, which is ignored.
        """
        sample = kwargs["sample"] if "sample" in kwargs else args[1]
        if model_output.shape != sample.shape:
            model_output = model_output[:, : sample.shape[1]]
        x0 = super().convert_model_output(model_output, *args, **kwargs)
        if self.epsilon_scaling == 1 or self.step_index == 0:
            return x0
        alpha, _ = self._sigma_to_alpha_sigma_t(self.sigmas[self.step_index])
        # epsilon = (x - alpha x_0) / sigma, and x_0 = (x - sigma epsilon / scaling) / alpha
        return x0 + (1 - 1 / self.epsilon_scaling) * (sample / alpha - x0)

    def save_pretrained(self, *args, **kwargs) -> None:
        """Refuse: without this package it could not be loaded."""
        raise ValueError("A FastSolver is made anew by `fast_solver`, not saved: save the scheduler of the training.")

    def _spaced(self, num_steps: int) -> list[int]:
        alphas_cumprod = self.alphas_cumprod.double().numpy()
        log_sigmas = 0.5 * np.log((1 - alphas_cumprod) / alphas_cumprod)  # rising
        first, last = (np.clip(np.log(s), log_sigmas[0], log_sigmas[-1]) for s in (self.sigma_max, self.sigma_min))
        wanted = np.abs(log_sigmas - np.linspace(first, last, num_steps)[:, None]).argmin(axis=1)
        timesteps: list[int] = []
        for i, timestep in enumerate(wanted.tolist()):
            left = num_steps - 1 - i  # which need timesteps of their own below
            highest = timesteps[-1] - 1 if timesteps else len(log_sigmas) - 1
            timesteps.append(min(max(timestep, left), highest))
        return timesteps


def fast_solver(
    scheduler: DDPMFacesScheduler, sigma_min: float | None = None, epsilon_scaling: float | None = None
) -> FastSolver:
    """A [`FastSolver`] for the schedule that a network was trained with; 10 to 20 steps are enough.

    Args:
        scheduler ([`DDPMFacesScheduler`]): Of the training.
        sigma_min (`float`, *optional*, defaults to 0.02):
            Noise to picture at the last step, above 0 and below 1. A network that has learned too little to tell
            fine detail from noise leaves noise behind there, and makes cleaner pictures with 0.1.
        epsilon_scaling (`float`, *optional*, defaults to 1.0):
            By what the predicted noise is divided, 0.9 to 1.1: more leaves more of it, and makes richer detail. 1.003
            suits `models/faces64` with its guide, where 1 suits it without, and networks that have learned little.

    Raises:
        ValueError: `sigma_min` or `epsilon_scaling` outside of that.
    """
    if sigma_min is not None and not 0 < sigma_min < 1:
        raise ValueError(f"`sigma_min` must lie in (0, 1), got {sigma_min}.")
    if epsilon_scaling is not None and not 0.9 <= epsilon_scaling <= 1.1:
        raise ValueError(f"`epsilon_scaling` must lie in [0.9, 1.1], got {epsilon_scaling}.")
    solver = FastSolver.from_config(
        scheduler.config,
        trained_betas=scheduler.betas.tolist(),  # which it knows, whatever the schedule is called
        variance_type=None,  # a learned one would cut the output to three channels, whatever the image has
    )
    if sigma_min is not None:
        solver.sigma_min = sigma_min
    if epsilon_scaling is not None:
        solver.epsilon_scaling = epsilon_scaling
    return solver
