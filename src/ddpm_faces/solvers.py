"""Sampling in few steps."""

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .pipeline_ddpm_faces import SOLVER
from .scheduling_ddpm_faces import DDPMFacesScheduler


def fast_solver(
    scheduler: SchedulerMixin, sigma_min: float | None = None, epsilon_scaling: float | None = None
) -> DDPMFacesScheduler:
    """Create a scheduler for sampling in 4 to 20 steps of DPM-Solver++, with steps of equal length in the log-SNR.

    A pipeline does the same by itself when a call asks for fewer than T steps. This function is for other values of
    `sigma_min` and `epsilon_scaling`, and for loops of your own.

    Args:
        scheduler ([`DDPMFacesScheduler`] or another scheduler of its family):
            Scheduler that the network was trained with.
        sigma_min (`float`, *optional*): See [`DDPMFacesScheduler`].
        epsilon_scaling (`float`, *optional*):
            See [`DDPMFacesScheduler`]. Larger values give richer detail. Use 1 without a guide or for networks with
            little training.

    Returns:
        [`DDPMFacesScheduler`]: It can be saved with a pipeline.

    Raises:
        ValueError: `sigma_min` or `epsilon_scaling` is outside its range.
    """
    given = {"sigma_min": sigma_min, "epsilon_scaling": epsilon_scaling}
    changes = {name: value for name, value in given.items() if value is not None}
    return DDPMFacesScheduler.from_config(scheduler.config, **SOLVER, **changes, tuned_steps=None)
