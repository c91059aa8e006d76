"""Sampling in few steps, with diffusers' solvers."""

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

from .scheduling_ddpm_faces import DDPMFacesScheduler


class FastSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ (2M) with timesteps for sampling in few steps.

    Brightness, color and pose of a face are decided at noise levels tens of times above the signal. A cosine schedule
    covers these levels in its last tenth, where evenly spaced timesteps take too few steps: in 10 steps they produce
    grayish faces. This solver instead divides the noise level by the same factor in each step (uniform steps in the
    log-SNR, https://huggingface.co/papers/2206.00927). With the noise-to-signal ratio sigma = sqrt((1 - alpha_bar) /
    alpha_bar), step i of n is at the timestep whose sigma is closest to

        sigma_max (sigma_min / sigma_max)^(i / (n - 1))

    All timesteps are distinct, and the network was trained at each of them. The image is predicted at the last one.

    Epsilon Scaling (https://huggingface.co/papers/2308.15321) divides the predicted noise by `epsilon_scaling` in each
    step except the first. It corrects exposure bias: in sampling, unlike in training, the network's input contains the
    errors of earlier steps, so a well-trained, guided network predicts slightly too much noise, and faces become too
    smooth.

    Attributes:
        sigma_max (`float`): Sigma of the first step: 120, or the largest of the schedule if that is smaller.
        sigma_min (`float`): Sigma of the last step, or the smallest of the schedule if that is larger.
        epsilon_scaling (`float`): Divisor of the predicted noise; 1 leaves it unchanged.
    """

    sigma_max = 120.0
    sigma_min = 0.02  # 2.5 of the 255 levels of an 8-bit pixel
    epsilon_scaling = 1.0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the timesteps of the next sampling run.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps, 1 to T.
            device (`str` or `torch.device`, *optional*): Device of the timesteps.
            timesteps (`list[int]`, *optional*): Descending timesteps to use instead of a number of steps.

        Raises:
            ValueError: The number of steps is not an integer from 1 to T.
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
        """Raise a `ValueError`: a saved `FastSolver` would not load without this package."""
        raise ValueError(
            "A FastSolver cannot be saved: save the scheduler of the training, and call `fast_solver` after loading."
        )

    def _spaced(self, num_steps: int) -> list[int]:
        alphas_cumprod = self.alphas_cumprod.double().numpy()
        log_sigmas = 0.5 * np.log((1 - alphas_cumprod) / alphas_cumprod)  # rising
        first, last = (np.clip(np.log(s), log_sigmas[0], log_sigmas[-1]) for s in (self.sigma_max, self.sigma_min))
        wanted = np.abs(log_sigmas - np.linspace(first, last, num_steps)[:, None]).argmin(axis=1)
        timesteps: list[int] = []
        for i, timestep in enumerate(wanted.tolist()):
            left = num_steps - 1 - i  # steps that still need lower timesteps
            highest = timesteps[-1] - 1 if timesteps else len(log_sigmas) - 1
            timesteps.append(min(max(timestep, left), highest))
        return timesteps


def fast_solver(
    scheduler: DDPMFacesScheduler, sigma_min: float | None = None, epsilon_scaling: float | None = None
) -> FastSolver:
    """Create a [`FastSolver`] for the noise schedule of a network; 10 to 20 steps are enough.

    Args:
        scheduler ([`DDPMFacesScheduler`]): Scheduler that the network was trained with.
        sigma_min (`float`, *optional*, defaults to 0.02):
            Noise-to-signal ratio at the last step, in (0, 1). A network with little training leaves noise in the
            image at low levels, and gives cleaner images with 0.1.
        epsilon_scaling (`float`, *optional*, defaults to 1.0):
            Divisor of the predicted noise, 0.9 to 1.1. Larger values give richer detail. Use 1.003 for
            `models/faces64` with its guide, and 1 without the guide or for networks with little training.

    Raises:
        ValueError: `sigma_min` or `epsilon_scaling` is outside its range.
    """
    if sigma_min is not None and not 0 < sigma_min < 1:
        raise ValueError(f"`sigma_min` must lie in (0, 1), got {sigma_min}.")
    if epsilon_scaling is not None and not 0.9 <= epsilon_scaling <= 1.1:
        raise ValueError(f"`epsilon_scaling` must lie in [0.9, 1.1], got {epsilon_scaling}.")
    solver = FastSolver.from_config(
        scheduler.config,
        trained_betas=scheduler.betas.tolist(),  # the solver does not know all names of `beta_schedule`
        variance_type=None,  # with a learned variance, diffusers cuts the output to three channels
    )
    if sigma_min is not None:
        solver.sigma_min = sigma_min
    if epsilon_scaling is not None:
        solver.epsilon_scaling = epsilon_scaling
    return solver
