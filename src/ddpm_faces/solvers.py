"""Sampling in few steps, with diffusers' solvers."""

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

from .scheduling_ddpm_faces import DDPMFacesScheduler


# Those of EDM (Table 1 of https://huggingface.co/papers/2206.00364), whose least noise, 0.002, is below 8 bits.
_SIGMA_MAX, _SIGMA_MIN, _RHO = 80.0, 0.02, 7.0


class FastSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ (2M) at the timesteps where few steps are enough for a good picture.

    Brightness, colour and pose of a face are decided where there is tens of times more noise than picture. A cosine
    schedule passes through all of that within its last tenth, where evenly spaced timesteps hardly step: in 10 steps
    they make greyish faces. EDM's spacing does better (eq. 5 of https://huggingface.co/papers/2206.00364): with
    sigma = sqrt((1 - alpha_bar) / alpha_bar), noise to picture, step i of n is at the timestep whose sigma is next to

        (80^(1/7) + i / (n - 1) (0.02^(1/7) - 80^(1/7)))^7

    Each is a timestep that the network was trained at, and none comes twice.
    """

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
        """
        if timesteps is None:
            timesteps = self._spaced(num_inference_steps)
        super().set_timesteps(device=device, timesteps=timesteps)

    def save_pretrained(self, *args, **kwargs) -> None:
        """Refuse: without this package it could not be loaded."""
        raise ValueError("A FastSolver is made anew by `fast_solver`, not saved: save the scheduler of the training.")

    def _spaced(self, num_steps: int) -> list[int]:
        alphas_cumprod = self.alphas_cumprod.double().numpy()
        log_sigmas = 0.5 * np.log((1 - alphas_cumprod) / alphas_cumprod)  # rising
        first, last = (np.clip(np.log(s), log_sigmas[0], log_sigmas[-1]) for s in (_SIGMA_MAX, _SIGMA_MIN))
        roots = np.linspace(np.exp(first / _RHO), np.exp(last / _RHO), num_steps)
        wanted = np.abs(log_sigmas - _RHO * np.log(roots)[:, None]).argmin(axis=1)
        timesteps: list[int] = []
        for i, timestep in enumerate(wanted.tolist()):
            left = num_steps - 1 - i  # which need timesteps of their own below
            highest = timesteps[-1] - 1 if timesteps else len(log_sigmas) - 1
            timesteps.append(min(max(timestep, left), highest))
        return timesteps


def fast_solver(scheduler: DDPMFacesScheduler) -> FastSolver:
    """A [`FastSolver`] for the schedule that a network was trained with; 10 to 20 steps are enough."""
    return FastSolver.from_config(
        scheduler.config,
        trained_betas=scheduler.betas.tolist(),  # which it knows, whatever the schedule is called
    )
