"""The variational bound is compared with distributions of PyTorch, and with known bounds."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpm_faces import DDPMFacesScheduler
from ddpm_faces.evaluation.likelihood import bits_per_dimension
from ddpm_faces.variational_bound import bound_terms


def pictures(num_images: int = 3, size: int = 4) -> torch.Tensor:
    values = torch.randint(256, (num_images, 3, size, size), generator=torch.Generator().manual_seed(0))
    values[0, 0] = torch.tensor([0, 255]).repeat(size // 2)  # the values whose bins include the tails
    return values.to(torch.uint8)


def posterior(scheduler: DDPMFacesScheduler, x_0: torch.Tensor, x_t: torch.Tensor, t: int) -> Normal:
    """q(x_t-1 | x_t, x_0) by Bayes' rule, from x_t-1 ~ q(x_t-1 | x_0) and x_t ~ q(x_t | x_t-1)."""
    alphas = 1 - scheduler.betas.double()
    alpha_bar_prev = alphas[:t].prod()
    precision = 1 / (1 - alpha_bar_prev) + alphas[t] / (1 - alphas[t])
    mean = (alpha_bar_prev.sqrt() * x_0 / (1 - alpha_bar_prev) + alphas[t].sqrt() * x_t / (1 - alphas[t])) / precision
    return Normal(mean, precision**-0.5)


class Oracle(torch.nn.Module):
    """Knows the image, and therefore the noise in it; predicts `fraction` for a learned variance."""

    def __init__(self, scheduler: DDPMFacesScheduler, picture: torch.Tensor, fraction: float | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.scheduler, self.x_0, self.fraction = scheduler, picture / 127.5 - 1, fraction
        self.timesteps: list[int] = []

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor) -> SimpleNamespace:
        self.timesteps += timesteps.tolist()
        alpha_bar = self.scheduler.alphas_cumprod.to(sample)[timesteps].view(-1, 1, 1, 1)
        noise = (sample - alpha_bar.sqrt() * self.x_0) / (1 - alpha_bar).sqrt()
        if self.fraction is not None:
            noise = torch.cat([noise, torch.full_like(noise, 2 * self.fraction - 1)], dim=1)
        return SimpleNamespace(sample=noise)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_terms_are_divergences_of_the_posterior(variance_type, prediction_type):
    scheduler = DDPMFacesScheduler(20, variance_type=variance_type, prediction_type=prediction_type, beta_end=0.2)
    generator = torch.Generator().manual_seed(1)
    x_0 = pictures(1).double() / 127.5 - 1
    for t in (1, 7, 19):
        x_t = scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=generator).double(), torch.tensor([t]))
        output = 0.3 * torch.randn(x_0.shape, generator=generator).double()
        fraction = torch.rand(x_0.shape, generator=generator).double()
        model_output = torch.cat([output, 2 * fraction - 1], dim=1) if variance_type == "learned_range" else output
        terms = bound_terms(scheduler, model_output, x_0, x_t, torch.tensor([t]))

        alpha_bar = (1 - scheduler.betas.double())[: t + 1].prod()
        pred_x_0 = {
            "epsilon": (x_t - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt(),
            "sample": output,
            "v_prediction": alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * output,
        }[prediction_type].clamp(-1, 1)
        q, p = posterior(scheduler, x_0, x_t, t), posterior(scheduler, pred_x_0, x_t, t)
        beta = scheduler.betas[t].double()
        deviation = {
            "fixed_small": p.scale,
            "fixed_large": beta.sqrt(),
            "learned_range": p.scale ** (1 - fraction) * beta.sqrt() ** fraction,
        }[variance_type]
        expected = kl_divergence(q, Normal(p.loc, deviation)).mean() / math.log(2)
        torch.testing.assert_close(terms, expected[None], rtol=5e-4, atol=1e-7)  # because of betas in float32


def test_first_term_is_the_likelihood_of_the_pixels():
    scheduler = DDPMFacesScheduler(20, prediction_type="sample", beta_end=0.2)
    x_0 = pictures().double() / 127.5 - 1
    prediction = (x_0 + 0.01 * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    terms = bound_terms(scheduler, prediction, x_0, x_0, torch.zeros(3, dtype=torch.int64))
    alphas = 1 - scheduler.betas.double()
    variance = scheduler.betas[1].double() * (1 - alphas[0]) / (1 - alphas[0] * alphas[1])  # posterior at t = 1
    pixels = Normal(prediction, variance.sqrt())
    upper = torch.where(x_0 == 1, 1.0, pixels.cdf(x_0 + 1 / 255))
    lower = torch.where(x_0 == -1, 0.0, pixels.cdf(x_0 - 1 / 255))
    expected = -(upper - lower).log2().mean(dim=(1, 2, 3))
    torch.testing.assert_close(terms, expected, rtol=1e-4, atol=1e-6)
    # Far out in the tails, where a distribution function in float32 is 0.
    far = bound_terms(scheduler, -x_0.float().sign(), x_0.float().sign(), x_0.float(), torch.zeros(3).long())
    assert torch.isfinite(far).all()
    assert (far > 1000).all()


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_bound_of_a_network_that_knows_the_image(variance_type):
    """Only the divergences of the variances remain, plus the terms of the pixels and of pure noise."""
    scheduler = DDPMFacesScheduler(20, variance_type=variance_type, beta_end=0.2)
    picture = pictures(1)
    fraction = 0.25 if variance_type == "learned_range" else None
    bits = bits_per_dimension(Oracle(scheduler, picture.double(), fraction), scheduler, picture, batch_size=7)

    alphas = 1 - scheduler.betas.double()
    alpha_bars = alphas.cumprod(0)
    betas, posterior_variances = 1 - alphas[1:], (1 - alphas[1:]) * (1 - alpha_bars[:-1]) / (1 - alpha_bars[1:])
    share = {"fixed_small": 0.0, "fixed_large": 1.0, "learned_range": 0.25}[variance_type]
    variances = posterior_variances ** (1 - share) * betas**share
    ratio = posterior_variances / variances
    expected = 0.5 * (ratio - 1 - ratio.log()).sum()
    decoder = posterior_variances[0] ** (1 - share) * scheduler.betas[0].double() ** share
    x_0 = picture.double() / 127.5 - 1
    one_side = Normal(0, 1).cdf(1 / 255 / decoder.sqrt())
    expected = expected - torch.where(x_0.abs() == 1, one_side, 2 * one_side - 1).log().mean()
    last = alpha_bars[-1]
    expected += kl_divergence(Normal(last.sqrt() * x_0, (1 - last).sqrt()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(bits, expected[None] / math.log(2), rtol=1e-3, atol=2e-3)


def test_some_terms_estimate_the_whole_bound():
    scheduler = DDPMFacesScheduler(300, variance_type="fixed_large")
    picture = pictures(1)
    repeated = picture.expand(40, -1, -1, -1)
    unet = Oracle(scheduler, picture.double())
    all_terms = bits_per_dimension(unet, scheduler, picture)
    assert sorted(unet.timesteps) == [*range(300)]
    unet.timesteps.clear()
    bits = bits_per_dimension(unet, scheduler, repeated, num_terms=25)
    timesteps = torch.tensor(unet.timesteps).view(40, -1)
    assert timesteps.shape[1] <= 25
    assert not timesteps[:, 0].any()  # the likelihood of the pixels, the largest term, is always evaluated
    assert (timesteps.diff(dim=1) > 0).all()
    assert timesteps.max() == 299
    error = bits.std() / len(bits) ** 0.5
    assert 0 < error < 0.05 * all_terms
    assert abs(bits.mean() - all_terms) < 4 * error
    # The result of an image does not depend on the other images of its batch.
    torch.testing.assert_close(bits_per_dimension(unet, scheduler, repeated[:3], num_terms=25), bits[:3])


def test_one_term_is_too_few():
    scheduler, picture = DDPMFacesScheduler(20), pictures(1)
    unet = Oracle(scheduler, picture.double())
    with pytest.raises(ValueError, match="`num_terms` must be at least 2 or None, got 1"):
        bits_per_dimension(unet, scheduler, picture, num_terms=1)
    assert unet.timesteps == []
