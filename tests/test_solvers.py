"""Sampling in few steps is compared with exact solutions."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, fast_solver


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
        assert solver.sigmas[1:].isfinite().all()  # the first of zero terminal SNR is infinite
    solver.set_timesteps(timesteps=[200, 100, 2])
    assert solver.timesteps.tolist() == [200, 100, 2]


@pytest.mark.parametrize("sigma_min", [None, 0.1])
def test_all_steps_divide_the_noise_by_the_same_factor(sigma_min):
    solver = fast_solver(DDPMFacesScheduler(1000, beta_schedule="squaredcos_cap_v2"), sigma_min)
    solver.set_timesteps(10)
    expected = torch.logspace(math.log10(120), math.log10(sigma_min or 0.02), 10, dtype=torch.float64)
    assert torch.allclose(solver.sigmas[:-1], expected, rtol=0.2)  # at the highest noise levels, timesteps are sparse
    assert torch.allclose(solver.sigmas[2:-1], expected[2:], rtol=0.05)
    assert solver.sigmas[-1] == 0


@pytest.mark.parametrize("sigma_min", [0, -0.1, 1, float("nan")])
def test_impossible_sigma_min(sigma_min):
    with pytest.raises(ValueError, match="`sigma_min` must lie in \\(0, 1\\), got"):
        fast_solver(DDPMFacesScheduler(), sigma_min)


def solved(scheduler, tables: DDPMFacesScheduler, scaling: float = 1.0, **step_arguments) -> torch.Tensor:
    """Return the result of all steps, with a network that predicts less noise in all steps but the first."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        alpha_bar = tables.alphas_cumprod[t].double()
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        network = torch.tanh(torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) + x)  # of any x
        if i > 0 and scaling != 1:
            kind = tables.config.prediction_type
            if kind == "sample":
                network = x / alpha - (x / alpha - network) / scaling
            elif kind == "epsilon":
                network = network / scaling
            else:
                epsilon = (alpha * network + sigma * x) / scaling
                network = alpha * epsilon - sigma * (x - sigma * epsilon) / alpha
        x = scheduler.step(network, t, x, **step_arguments).prev_sample
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("config", [*SCHEDULES, {"prediction_type": "sample"}], ids=str)
def test_dpm_solver_takes_the_steps_of_diffusers(config, order, num_steps):
    scheduler = DDPMFacesScheduler(**config)
    for scaling in (1.0, 1.01) if not config.get("rescale_betas_zero_snr") else (1.0,):
        solver = DDPMFacesScheduler.from_config(
            scheduler.config,
            algorithm="dpmsolver++",
            timestep_spacing="logsnr",
            solver_order=order,
            epsilon_scaling=scaling,
        )
        theirs = DPMSolverMultistepScheduler.from_config(
            scheduler.config, trained_betas=scheduler.betas.tolist(), solver_order=order
        )
        solver.set_timesteps(num_steps)
        theirs.set_timesteps(timesteps=solver.timesteps.tolist())
        expected = solved(theirs, scheduler, scaling)
        torch.testing.assert_close(solved(solver, scheduler), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 5, 10, 300])
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("config", [SCHEDULES[0], SCHEDULES[1], SCHEDULES[4]], ids=str)
def test_ddim_takes_the_steps_of_diffusers(config, clip_sample, num_steps):
    scheduler = DDPMFacesScheduler(**config, clip_sample=clip_sample)
    ours = DDPMFacesScheduler.from_config(scheduler.config, algorithm="ddim")
    theirs = DDIMScheduler.from_config(scheduler.config, trained_betas=scheduler.betas.tolist())
    ours.set_timesteps(num_steps)
    theirs.set_timesteps(num_steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    expected = solved(theirs, scheduler, use_clipped_model_output=True)
    torch.testing.assert_close(solved(ours, scheduler), expected, rtol=1e-4, atol=1e-4)


TUNED = {
    "timesteps": [290.5, 200, 100.25],
    "sigmas": [40.0, 2.0, 0.3],
    "epsilon_scaling": [1.0, 1.02, 0.98],
    "weights": [[], [-0.4], [-0.5, 0.1]],
}


def test_tuned_steps_are_taken_as_they_are_written():
    """The reference is written in images with noise, x / sqrt(alpha_bar) = x_0 + sigma epsilon."""
    base = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "tuned_steps": {"3": TUNED}}
    solver = DDPMFacesScheduler(**base, algorithm="dpmsolver++")
    solver.set_timesteps(3)
    assert solver.timesteps.tolist() == TUNED["timesteps"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    noisy, predicted = x * math.hypot(1, 40), []
    for i, t in enumerate(solver.timesteps):
        sigma, following = [*TUNED["sigmas"], 0.0][i : i + 2]
        v = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
        x0 = noisy / (1 + sigma**2) - sigma / math.hypot(1, sigma) * v
        epsilon = (noisy - x0) / sigma / TUNED["epsilon_scaling"][i]
        predicted.insert(0, noisy - sigma * epsilon)
        weights = [1 - sum(TUNED["weights"][i]), *TUNED["weights"][i]]
        mixture = sum(weight * one for weight, one in zip(weights, predicted, strict=False))
        noisy = mixture + following / sigma * (noisy - mixture)
        x = solver.step(v, t, x).prev_sample
        torch.testing.assert_close(x, noisy / math.hypot(1, following))
    solver.set_timesteps(4)  # no tuned settings
    assert solver.timesteps.dtype == torch.int64
    ancestral = DDPMFacesScheduler(**base)  # has no use for them
    ancestral.set_timesteps(3)
    assert ancestral.timesteps.tolist() == [200, 100, 0]


@pytest.mark.parametrize("algorithm", ["ddim", "dpmsolver++"])
def test_tuned_timesteps_bring_their_noise_levels(algorithm):
    scheduler = DDPMFacesScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    tuned = DDPMFacesScheduler.from_config(
        scheduler.config, algorithm=algorithm, tuned_steps={"3": {"timesteps": [299, 150, 20]}}
    )
    plain = DDPMFacesScheduler.from_config(scheduler.config, algorithm=algorithm)
    tuned.set_timesteps(3)
    plain.set_timesteps(timesteps=[299, 150, 20])
    torch.testing.assert_close(solved(tuned, scheduler), solved(plain, scheduler), rtol=0, atol=0)
    between = DDPMFacesScheduler.from_config(tuned.config, tuned_steps={"1": {"timesteps": [150.5]}})
    between.set_timesteps(1)
    sigmas = [((1 - bar) / bar) ** 0.5 for bar in scheduler.alphas_cumprod[150:152].tolist()]
    assert between._sigmas[0] == pytest.approx((sigmas[0] * sigmas[1]) ** 0.5)


@pytest.mark.parametrize(
    ("tuned_steps", "message"),
    [
        ({3: {"timesteps": [2, 1, 0]}}, "numbers of steps from '1' to '100' as keys, got 3"),
        ({"0": {"timesteps": []}}, "numbers of steps from '1' to '100' as keys, got '0'"),
        ({"301": {"timesteps": []}}, "as keys, got '301'"),
        ({"2": [2, 1]}, r"must be a dictionary with `timesteps`, got \[2, 1\]"),
        ({"2": {"sigmas": [2, 1]}}, "must be a dictionary with `timesteps`"),
        ({"2": {"timesteps": [2, 1, 0]}}, r"needs 2 `timesteps` from 0 to 299, got \[2, 1, 0\]"),
        ({"2": {"timesteps": [300, 1]}}, r"needs 2 `timesteps` from 0 to 299, got \[300, 1\]"),
        ({"2": {"timesteps": [1, 1]}}, r"needs descending `timesteps`, got \[1, 1\]"),
        ({"2": {"timesteps": [2, 1], "sigmas": [1, 0]}}, "needs 2 `sigmas` from 0.0001 to 10000.0"),
        ({"2": {"timesteps": [2, 1], "sigmas": [1, True]}}, "needs 2 `sigmas`"),
        ({"2": {"timesteps": [2, 1], "sigmas": None}}, "needs 2 `sigmas` .*, got None"),
        ({"2": {"timesteps": [2, 1], "epsilon_scaling": [1, 3]}}, "needs 2 `epsilon_scaling` from 0.5 to 2"),
        ({"2": {"timesteps": [2, 1], "weights": [[], [1, 2, 3]]}}, "needs 2 lists of at most 2 `weights`"),
        ({"2": {"timesteps": [2, 1], "weights": [[]]}}, "needs 2 lists of at most 2 `weights`"),
        ({"2": {"timesteps": [2, 1], "order": 2}}, "has settings that this version does not know: order"),
    ],
)
def test_bad_tuned_steps_are_named(tuned_steps, message):
    with pytest.raises(ValueError, match=f"`tuned_steps.*{message}"):
        DDPMFacesScheduler(tuned_steps=tuned_steps)


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


def test_a_pipeline_with_a_solver_can_be_saved(pipeline, tmp_path):
    tuned = {"timesteps": [17.5, 3], "weights": [[], [-0.3]]}
    pipeline.scheduler = DDPMFacesScheduler.from_config(
        fast_solver(pipeline.scheduler, 0.1, 1.02).config, solver_order=3, tuned_steps={"2": tuned}
    )
    pipeline.save_pretrained(tmp_path)
    loaded = DDPMFacesPipeline.from_pretrained(tmp_path)
    for steps in (2, 5):
        pixels = [
            one(2, steps, torch.Generator().manual_seed(0), output_type="pt").images for one in (pipeline, loaded)
        ]
        assert torch.equal(*pixels)


def test_a_run_forgets_the_predictions_of_the_one_before():
    """The one before may have had another batch size."""
    solver = fast_solver(DDPMFacesScheduler(20))
    solver.set_timesteps(4)
    for batch_size in (2, 3):
        x = torch.randn(batch_size, 3, 4, 4)
        for t in solver.timesteps:
            x = solver.step(torch.randn_like(x), t, x).prev_sample
    assert len(x) == 3


@pytest.mark.parametrize("steps", [0, 21, 2.5, None])
def test_more_steps_than_timesteps_are_refused(steps):
    solver = fast_solver(DDPMFacesScheduler(num_train_timesteps=20))
    with pytest.raises(ValueError, match="`num_inference_steps`"):
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
