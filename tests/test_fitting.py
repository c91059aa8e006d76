"""Solvers that are fitted to a model are compared with exact solutions and with exhaustive search."""

import itertools
import math

import pytest
import torch
from conftest import tiny_unet

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler
from ddpm_faces.fitting import cheapest_path, fit_solvers, follow, straight_step_errors
from ddpm_faces.pipeline_ddpm_faces import Guidance


class TwoFaces(torch.nn.Module):
    """The exact prediction of v for data of two constant images, each with some texture (a mixture of Gaussians)."""

    MEANS, STD = (0.5, -0.3), 0.1
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, scheduler):
        super().__init__()
        self.alphas_cumprod = scheduler.alphas_cumprod.double()
        self.config = tiny_unet().config

    def forward(self, sample, timestep):
        x, t = sample.double(), float(timestep)
        below, fraction = int(t), t - int(t)
        bars = self.alphas_cumprod[[below, min(below + 1, len(self.alphas_cumprod) - 1)]]
        log_ratio = ((1 - bars) / bars).log()
        ratio = (log_ratio[0] * (1 - fraction) + log_ratio[1] * fraction).exp()  # sigma^2, as between timesteps
        alpha_bar = 1 / (1 + ratio)
        alpha, variance = alpha_bar.sqrt(), alpha_bar * self.STD**2 + 1 - alpha_bar
        distances = torch.stack([-((x - alpha * mean) ** 2).mean(dim=(1, 2, 3)) * 40 / 2 for mean in self.MEANS])
        shares = (distances / variance).softmax(dim=0)[:, :, None, None, None]  # 40 independent pixels
        x_0 = sum(
            share * (mean + alpha * self.STD**2 / variance * (x - alpha * mean))
            for share, mean in zip(shares, self.MEANS, strict=True)
        )
        epsilon = (x - alpha * x_0) / (1 - alpha_bar).sqrt()
        return type("Output", (), {"sample": (alpha * epsilon - (1 - alpha_bar).sqrt() * x_0).float()})


@pytest.fixture
def exact():
    """A pipeline whose network is exact, so that only its solver makes errors."""
    scheduler = DDPMFacesScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    pipeline = DDPMFacesPipeline(tiny_unet(), scheduler)
    pipeline.unet = TwoFaces(scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noises(num: int, first: int = 0) -> torch.Tensor:
    return torch.stack(
        [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(first + i)) for i in range(num)]
    )


def solve(pipeline, num_steps, latents, **settings):
    scheduler = DDPMFacesScheduler.from_config(
        pipeline.scheduler.config,
        **{"algorithm": "dpmsolver++", "timestep_spacing": "logsnr", **settings},
    )
    scheduler.set_timesteps(num_steps)
    x = latents
    for t in scheduler.timesteps:
        x = scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    return x


def test_trajectories_are_solutions(exact):
    found = follow(exact, 20, Guidance(), batch_size=8, seed=5)
    assert len(found.timesteps) == 60
    assert found.states.shape == (61, 20, 3, 16, 16)
    torch.testing.assert_close(found.states[0].float(), noises(20, 5), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.states[-1].float(), solve(exact, 250, noises(20, 5)), atol=0.01, rtol=0)
    # each prediction belongs to its state
    t = found.timesteps[30]
    x = found.states[30].float()
    x_0 = exact.scheduler.predict_original_sample(exact.unet(x, t).sample, t, x)
    torch.testing.assert_close(found.predictions[30].float(), x_0, atol=5e-3, rtol=0)


def test_error_of_a_straight_step(exact):
    found = follow(exact, 16, Guidance(), 16, seed=0)
    errors = straight_step_errors(found)
    ddim = DDPMFacesScheduler.from_config(exact.scheduler.config, algorithm="ddim", clip_sample=False)
    for start, end in ((0, 20), (20, 41), (50, 60)):
        steps = found.timesteps[start], *([found.timesteps[end]] if end < 60 else [])
        ddim.set_timesteps(timesteps=list(steps))
        x = found.states[start].float()
        landed = ddim.step(exact.unet(x, steps[0]).sample, steps[0], x).prev_sample
        scale = math.hypot(1, found.sigmas[end])
        expected = ((landed - found.states[end].float()) * scale).flatten(1).norm(dim=1).mean()
        assert errors[start, end].item() == pytest.approx(expected.item(), rel=0.05, abs=0.01 * scale)
    assert errors[5, 5] == errors[6, 5] == math.inf


@pytest.mark.parametrize("num_steps", [1, 2, 4, 7])
def test_path_is_the_cheapest_of_all(num_steps):
    points = 8
    every = [(0, *inner, points - 1) for inner in itertools.combinations(range(1, points - 1), num_steps - 1)]
    for seed in range(20):
        errors = torch.rand(points, points, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        errors[~(torch.ones(points, points).triu(1) > 0)] = math.inf
        costs = {
            path: sum(1.15**i * errors[a, b].item() for i, (a, b) in enumerate(itertools.pairwise(path)))
            for path in every
        }
        assert cheapest_path(errors, num_steps) == list(min(costs, key=costs.__getitem__))


@pytest.mark.parametrize("num_steps", [3, 5, 8])
def test_fitted_solver_is_closer_to_the_solution(exact, num_steps):
    tuned = fit_solvers(exact, [num_steps], num_trajectories=32)
    assert list(tuned) == [str(num_steps)]
    unseen = noises(64)
    solution = solve(exact, 250, unseen)
    even, ours = (solve(exact, num_steps, unseen, tuned_steps=steps) for steps in (None, tuned))
    errors = [(one - solution).square().mean().sqrt().item() for one in (even, ours)]
    assert errors[1] < 0.75 * errors[0]


def test_fitting_changes_nothing(exact):
    before = dict(exact.scheduler.config)
    exact.unet.train()
    fit_solvers(exact, [2], num_trajectories=16)
    assert dict(exact.scheduler.config) == before
    assert exact.unet.training


def test_guide_and_classes_take_part():
    torch.manual_seed(0)
    scheduler = DDPMFacesScheduler(30)
    pipeline = DDPMFacesPipeline(tiny_unet(num_class_embeds=3), scheduler)
    guide = DDPMFacesPipeline(tiny_unet(block_out_channels=(4, 8)), scheduler)
    alone = fit_solvers(pipeline, [3], num_trajectories=16)
    pipeline.set_guide(guide, 1.5)
    guided = fit_solvers(pipeline, [3], num_trajectories=16)
    assert guided != alone
    pipeline.set_guidance(autoguidance_scale=1.0)
    assert fit_solvers(pipeline, [3], num_trajectories=16) == alone
    DDPMFacesScheduler(30, tuned_steps=guided)  # accepts them


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": []}, r"`num_steps` must be numbers from 2 to 20, got \[\]"),
        ({"num_steps": [4, 21]}, r"`num_steps` must be numbers from 2 to 20, got \[4, 21\]"),
        ({"num_steps": [1]}, r"`num_steps` must be numbers from 2 to 20, got \[1\]"),
        ({"num_steps": [10]}, "`num_steps` must be below 9 for this model, got 10"),
        ({"num_trajectories": 15}, "`num_trajectories` must be an integer from 16 to .*, got 15"),
        ({"batch_size": 0}, "`batch_size` must be an integer from 1 to .*, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    pipeline = DDPMFacesPipeline(tiny_unet(), DDPMFacesScheduler(10))
    with pytest.raises(ValueError, match=message):
        fit_solvers(pipeline, **{"num_steps": [4], **arguments})
