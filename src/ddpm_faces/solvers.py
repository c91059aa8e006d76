"""Sampling in few steps, with diffusers' solvers."""

from diffusers import DPMSolverMultistepScheduler

from .scheduling_ddpm_faces import DDPMFacesScheduler


def fast_solver(scheduler: DDPMFacesScheduler) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (2M) for the schedule that a network was trained with; 20 steps are enough for a good picture.

    Its timesteps end at T - 1 ("trailing", Table 2 of https://huggingface.co/papers/2305.08891): sampling starts from
    pure noise, which is what the network knows of the last timestep, and not of an earlier one.
    """
    return DPMSolverMultistepScheduler.from_config(
        scheduler.config,
        timestep_spacing="trailing",
        trained_betas=scheduler.betas.tolist(),  # which it knows, whatever the schedule is called
        rescale_betas_zero_snr=False,
    )
