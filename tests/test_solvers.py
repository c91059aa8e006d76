"""Sampling in few steps is compared with exact solutions."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, FastSolver, fast_solver


SCHEDULES = [
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    {"beta_schedule": "linear"},
    {"beta_schedule": "sigmoid"},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("config", SCHEDULES)
def test_timesteps_are_distinct_and_of_the_requested_number(config):
    scheduler = DDPMFacesScheduler(**config)
    solver = fast_solver(scheduler)
    for num_steps in (1, 2, 10, 20, 157, len(scheduler)):
        solver.set_timesteps(num_steps)
        timesteps = solver.timesteps.tolist()
        assert len(timesteps) == num_steps
        assert timesteps == sorted(set(timesteps), reverse=True)
        assert 0 <= timesteps[-1]
        assert timesteps[0] <= len(scheduler) - 1
        assert solver.sigmas.isfinite().all()
    solver.set_timesteps(timesteps=[200, 100, 2])
    assert solver.timesteps.tolist() == [200, 100, 2]


@pytest.mark.parametrize("sigma_min", [None, 0.1])
def test_all_steps_divide_the_noise_by_the_same_factor(sigma_min):
    solver = fast_solver(DDPMFacesScheduler(1000, beta_schedule="squaredcos_cap_v2"), sigma_min)
    solver.set_timesteps(10)
    expected = torch.logspace(math.log10(120), math.log10(sigma_min or 0.02), 10)
    assert torch.allclose(solver.sigmas[:-1], expected, rtol=0.2)  # at the highest noise levels, timesteps are sparse
    assert torch.allclose(solver.sigmas[2:-1], expected[2:], rtol=0.05)
    assert solver.sigmas[-1] == 0


@pytest.mark.parametrize("sigma_min", [0, -0.1, 1, float("nan")])
def test_impossible_sigma_min(sigma_min):
    with pytest.raises(ValueError, match="`sigma_min` must lie in \\(0, 1\\), got"):
        fast_solver(DDPMFacesScheduler(), sigma_min)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("epsilon_scaling", [None, 1.003, 0.95])
def test_predicted_noise_is_divided(prediction_type, epsilon_scaling):
    """The reference is diffusers' solver with a network that predicts less noise in all steps but the first."""
    scheduler = DDPMFacesScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    solver = fast_solver(scheduler, epsilon_scaling=epsilon_scaling)
    plain = DPMSolverMultistepScheduler.from_config(scheduler.config, trained_betas=scheduler.betas.tolist())
    scaling = epsilon_scaling or 1.0
    solver.set_timesteps(6)
    plain.set_timesteps(timesteps=solver.timesteps.tolist())
    generator = torch.Generator().manual_seed(0)
    x = expected = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    for i, t in enumerate(solver.timesteps):
        alpha_bar = scheduler.alphas_cumprod[t].double()
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        network = torch.tanh(torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) + x)  # of any x
        outputs = []
        for sample, factor in ((x, 1.0), (expected, 1.0 if i == 0 else 1 / scaling)):
            epsilon = {
                "epsilon": network,
                "sample": (sample - alpha * network) / sigma,
                "v_prediction": alpha * network + sigma * sample,
            }[prediction_type] * factor
            x0 = (sample - sigma * epsilon) / alpha
            outputs.append({"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0})
        x = solver.step(outputs[0][prediction_type], t, x).prev_sample
        expected = plain.step(outputs[1][prediction_type], t, expected).prev_sample
        assert torch.allclose(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("epsilon_scaling", [0, 0.89, 1.2, float("nan")])
def test_impossible_epsilon_scaling(epsilon_scaling):
    with pytest.raises(ValueError, match="`epsilon_scaling` must lie in \\[0.9, 1.1\\], got"):
        fast_solver(DDPMFacesScheduler(), epsilon_scaling=epsilon_scaling)


def gaussian_faces(solver, scheduler, deviation: float, num_steps: int, noise: torch.Tensor) -> torch.Tensor:
    """Return x_0 from `noise`, with the exact prediction for data of N(0.5, deviation^2)."""
    solver.set_timesteps(num_steps)
    x = noise.clone()
    for t in solver.timesteps:
        alpha_bar = scheduler.alphas_cumprod[t].double()
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x0 = 0.5 + alpha * deviation**2 * (x - alpha * 0.5) / (alpha_bar * deviation**2 + sigma**2)
        epsilon = (x - alpha * x0) / sigma
        x = solver.step(alpha * epsilon - sigma * x0, t, x).prev_sample
    return x


def test_ten_steps_keep_brightness_and_detail():
    """Fine detail has a small standard deviation, and brightness, which all pixels share, one of tens."""
    scheduler = DDPMFacesScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    even = DPMSolverMultistepScheduler.from_config(
        scheduler.config, timestep_spacing="trailing", trained_betas=scheduler.betas.tolist()
    )
    noise = torch.linspace(-3, 3, 13, dtype=torch.float64)

    def gain(solver, deviation: float, num_steps: int) -> torch.Tensor:
        """Return the factor on a standard deviation; it is 1 in the exact solution."""
        solved = gaussian_faces(solver, scheduler, deviation, num_steps, noise)
        assert abs(solved[6] - 0.5) < 0.01 * max(1, deviation)  # the mean, from a noise of 0
        return (solved[-1] - solved[0]) / (6 * deviation)

    deviations = [0.1, 0.3, 1.0, 5.0, 30.0]
    for num_steps in (10, 20):
        assert all(abs(gain(fast_solver(scheduler), deviation, num_steps) - 1) < 0.05 for deviation in deviations)
    assert gain(even, 30.0, 10) < 0.3  # all faces equally bright
    assert gain(even, 0.1, 10) < 0.6  # and smooth


def test_fast_solver_cannot_be_saved(pipeline, tmp_path):
    pipeline = DDPMFacesPipeline(pipeline.unet, fast_solver(pipeline.scheduler))
    assert isinstance(pipeline.scheduler, FastSolver)
    with pytest.raises(ValueError, match="could not be loaded again, so nothing is saved"):
        pipeline.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("steps", [0, 21, 2.5, None])
def test_more_steps_than_timesteps_are_refused(steps):
    solver = fast_solver(DDPMFacesScheduler(num_train_timesteps=20))
    with pytest.raises(ValueError, match="`num_inference_steps` must be from 1 to 20, got"):
        solver.set_timesteps(steps)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_learned_variance_is_ignored(channels):
    """A user's own loop may pass the whole output of the network."""
    scheduler = DDPMFacesScheduler(num_train_timesteps=20, variance_type="learned_range")
    plain, learned = fast_solver(DDPMFacesScheduler(num_train_timesteps=20)), fast_solver(scheduler)
    x = torch.randn(2, channels, 4, 4)
    output = torch.randn(2, 2 * channels, 4, 4)
    expected = actual = x
    plain.set_timesteps(4)
    learned.set_timesteps(4)
    for t in plain.timesteps:
        expected = plain.step(output[:, :channels], t, expected).prev_sample
        actual = learned.step(output, t, actual).prev_sample
        torch.testing.assert_close(actual, expected)
