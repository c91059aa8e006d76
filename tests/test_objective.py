from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_faces import DDPMFacesObjective, DDPMFacesScheduler
from ddpm_faces.variational_bound import bound_terms


class Recorder:
    """A network that records its inputs and returns zeros or a given prediction."""

    def __init__(self, answer=None):
        self.answer = answer

    def __call__(self, sample, timesteps, **kwargs):
        self.sample, self.timesteps, self.kwargs = sample, timesteps, kwargs
        return SimpleNamespace(sample=torch.zeros_like(sample) if self.answer is None else self.answer)


def draw(batch_size: int, seed: int = 0, num_train_timesteps: int = 300):
    """The timesteps and the noise that the objective draws from this generator."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(num_train_timesteps, (batch_size,), generator=generator)
    return timesteps, torch.randn(batch_size, 3, 8, 8, generator=generator)


@pytest.mark.parametrize(("loss_type", "power"), [("l2", 2), ("l1", 1)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_loss_is_distance_to_the_target(prediction_type, loss_type, power):
    scheduler = DDPMFacesScheduler(prediction_type=prediction_type)
    x_0 = torch.rand(16, 3, 8, 8) * 2 - 1
    unet = Recorder()
    losses, timesteps = DDPMFacesObjective(scheduler, loss_type)(unet, x_0, generator=torch.Generator().manual_seed(0))

    expected_timesteps, noise = draw(16)
    assert torch.equal(timesteps, expected_timesteps)
    assert torch.equal(unet.timesteps, expected_timesteps)
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 300, dtype=torch.float64)).cumprod(0)[timesteps].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(unet.sample.double(), x_t, atol=1e-5, rtol=1e-5)
    target = {
        "epsilon": noise,
        "sample": x_0,
        "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0,
    }[prediction_type]
    torch.testing.assert_close(
        losses.double(), (target.double().abs() ** power).mean(dim=(1, 2, 3)), rtol=1e-4, atol=0
    )


def test_perfect_prediction_has_no_loss():
    _, noise = draw(4)
    objective = DDPMFacesObjective(DDPMFacesScheduler())
    losses, _ = objective(Recorder(noise), torch.zeros(4, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(losses, torch.zeros(4))


@pytest.mark.parametrize(("snr_gamma", "snr_floor"), [(5.0, 0.0), (float("inf"), 0.0), (5.0, 1.0)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weights_errors_in_x_0_equally_for_every_prediction_type(prediction_type, snr_gamma, snr_floor):
    if snr_floor and prediction_type == "epsilon":
        pytest.skip("the error of the noise has no floor")
    scheduler = DDPMFacesScheduler(prediction_type=prediction_type, beta_schedule="squaredcos_cap_v2")
    x_0, error = torch.rand(64, 3, 8, 8) * 2 - 1, 0.1
    timesteps, noise = draw(64)
    alpha_bar = scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    x_0_hat = x_0 + error
    noise_hat = (x_t - alpha_bar.sqrt() * x_0_hat) / (1 - alpha_bar).sqrt()
    answer = {
        "epsilon": noise_hat,
        "sample": x_0_hat,
        "v_prediction": alpha_bar.sqrt() * noise_hat - (1 - alpha_bar).sqrt() * x_0_hat,
    }[prediction_type]
    objective = DDPMFacesObjective(scheduler, snr_gamma=snr_gamma, snr_floor=snr_floor)
    losses, _ = objective(Recorder(answer), x_0, generator=torch.Generator().manual_seed(0))

    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    assert snr.min() < 5 < snr.max()
    # At the last timesteps, almost no signal is left, so errors of 1e-7 in the float32 tables become visible.
    torch.testing.assert_close(losses.double(), snr.clamp(snr_floor, snr_gamma) * error**2, rtol=1e-3, atol=1e-6)
    if snr_gamma == float("inf"):
        noise_error = ((noise_hat - noise) ** 2).mean(dim=(1, 2, 3))
        torch.testing.assert_close(losses.double(), noise_error.double(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_min_snr_gives_pure_noise_no_weight(prediction_type):
    scheduler = DDPMFacesScheduler(1000, rescale_betas_zero_snr=True, prediction_type=prediction_type)
    losses, timesteps = DDPMFacesObjective(scheduler, snr_gamma=5.0)(Recorder(), torch.ones(20_000, 1, 1, 1))
    assert losses.isfinite().all()
    assert (timesteps == 999).any()
    assert (losses[timesteps == 999] == 0).all()


@pytest.mark.parametrize(
    ("prediction_type", "snr_gamma"),
    [
        ("epsilon", 5.0),
        ("sample", 5.0),
        ("v_prediction", 5.0),
        ("epsilon", float("inf")),
        ("v_prediction", float("inf")),
    ],
)
def test_min_snr_is_finite_where_float32_rounds_the_noise_away(prediction_type, snr_gamma):
    scheduler = DDPMScheduler(10, beta_start=1e-9, prediction_type=prediction_type)  # refused by ours
    assert scheduler.alphas_cumprod[0] == 1
    losses, _ = DDPMFacesObjective(scheduler, snr_gamma=snr_gamma)(Recorder(), torch.ones(200, 1, 1, 1))
    assert losses.isfinite().all()


def test_min_snr_keeps_the_weight_of_epsilon_at_pure_noise():
    scheduler = DDPMScheduler(2, trained_betas=[0.5, 1.0])  # DDPMFacesScheduler refuses such betas with epsilon
    x_0, generator = torch.ones(200, 1, 1, 1), torch.Generator().manual_seed(0)
    plain, timesteps = DDPMFacesObjective(scheduler)(Recorder(), x_0, generator=generator.manual_seed(0))
    weighted, _ = DDPMFacesObjective(scheduler, snr_gamma=5.0)(Recorder(), x_0, generator=generator.manual_seed(0))
    assert (timesteps == 1).any()
    assert torch.equal(weighted, plain)  # min(SNR, 5) / SNR is 1 wherever SNR is below 5


def test_timesteps_are_uniform_and_reach_both_ends():
    x_0 = torch.zeros(20_000, 1, 1, 1)
    _, timesteps = DDPMFacesObjective(DDPMFacesScheduler(num_train_timesteps=10))(Recorder(), x_0)
    counts = torch.bincount(timesteps, minlength=10)
    assert len(counts) == 10
    assert (counts - 2000).abs().max() < 5 * 2000**0.5


def test_everything_except_the_network_is_float32():
    """In bfloat16, the first timesteps would get no noise (1 - alpha_bar rounds to 0), and the loss be coarse."""
    unet = Recorder(torch.zeros(4, 3, 8, 8, dtype=torch.bfloat16))
    losses, _ = DDPMFacesObjective(DDPMFacesScheduler())(unet, torch.zeros(4, 3, 8, 8))
    assert unet.sample.dtype == losses.dtype == torch.float32


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_hybrid_loss_adds_a_bound_that_trains_only_the_variance(snr_gamma):
    x_0 = torch.randint(256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(1)) / 127.5 - 1
    timesteps, noise = torch.tensor([0, 0, 1, 2, 10, 100, 298, 299]), draw(8)[1]
    answer = torch.randn(8, 6, 8, 8, generator=torch.Generator().manual_seed(2))
    scheduler = DDPMFacesScheduler(variance_type="learned_range")
    outputs, gradients = [], []
    for variance_type, channels, weight in (
        ("learned_range", 6, 0.001),
        ("learned_range", 6, 0),
        ("fixed_small", 3, 1),
    ):
        objective = DDPMFacesObjective(DDPMFacesScheduler(variance_type=variance_type), "l2", snr_gamma, weight)
        prediction = answer[:, :channels].clone().requires_grad_()
        outputs.append(objective(Recorder(prediction), x_0, timesteps=timesteps, noise=noise).losses)
        gradients += torch.autograd.grad(outputs[-1].sum(), prediction)

    hybrid, without, simple = outputs
    assert torch.equal(without, simple)
    assert not gradients[1][:, 3:].any()
    terms = bound_terms(scheduler, answer, x_0, scheduler.add_noise(x_0, noise, timesteps), timesteps)
    torch.testing.assert_close(hybrid - simple, 0.001 * 300 * terms, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradients[0][:, :3], gradients[2])
    assert torch.isfinite(gradients[0]).all()
    assert (gradients[0][:, 3:].abs().amax(dim=(1, 2, 3)) > 0).all()


def test_best_learned_variance_is_that_of_the_error():
    """If x_0 is 0 or 1 at random, the mean is one half, and the learned variance must cover the error."""
    scheduler = DDPMFacesScheduler(20, variance_type="learned_range", prediction_type="sample", beta_end=0.2)
    objective, t = DDPMFacesObjective(scheduler), 4
    x_0 = torch.tensor([0.0, 1.0]).repeat(8).view(16, 1, 1, 1).expand(-1, 3, 8, 8)
    v = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=0.1)
    for _ in range(200):
        answer = torch.cat([torch.full_like(x_0, 0.5), v.expand(16, 3, 8, 8)], dim=1)
        optimizer.zero_grad()
        objective(Recorder(answer), x_0, timesteps=torch.full((16,), t)).losses.mean().backward()
        optimizer.step()
    alpha_bars = (1 - scheduler.betas.double()).cumprod(0)
    coefficient = alpha_bars[t - 1].sqrt() * scheduler.betas[t] / (1 - alpha_bars[t])  # of x_0, eq. 7
    posterior_variance = scheduler.betas[t] * (1 - alpha_bars[t - 1]) / (1 - alpha_bars[t])
    answer = torch.cat([x_0, v.detach().expand(16, 3, 8, 8)], dim=1)
    learned = scheduler.variance(posterior_variance, scheduler.betas[t], answer[:, 3:]).mean()
    torch.testing.assert_close(learned.double(), posterior_variance + coefficient**2 / 4, rtol=1e-3, atol=0)


def test_class_labels_reach_the_network():
    unet = Recorder()
    DDPMFacesObjective(DDPMFacesScheduler())(unet, torch.zeros(2, 3, 8, 8), class_labels=torch.tensor([0, 1]))
    assert unet.kwargs["class_labels"].tolist() == [0, 1]


def test_bad_input():
    with pytest.raises(ValueError, match="`loss_type` must be one of 'l2', 'l1', 'huber', got 'l3'"):
        DDPMFacesObjective(DDPMFacesScheduler(), loss_type="l3")
    with pytest.raises(ValueError, match="`variance_type` must not be 'learned' in training"):
        DDPMFacesObjective(DDPMFacesScheduler(variance_type="learned"))
    with pytest.raises(ValueError, match="must be a DDPMFacesScheduler for a learned variance, got DDPMScheduler"):
        DDPMFacesObjective(DDPMScheduler(variance_type="learned_range"))
    with pytest.raises(ValueError, match="`bound_weight` must be at least 0 and finite, got -1"):
        DDPMFacesObjective(DDPMFacesScheduler(), bound_weight=-1)
    with pytest.raises(ValueError, match="`snr_gamma` must be positive or None, got 0"):
        DDPMFacesObjective(DDPMFacesScheduler(), snr_gamma=0)
    with pytest.raises(ValueError, match="`snr_gamma` needs the `loss_type` 'l2', got 'l1'"):
        DDPMFacesObjective(DDPMFacesScheduler(), loss_type="l1", snr_gamma=5.0)
    velocity = DDPMFacesScheduler(prediction_type="v_prediction")
    for gamma, floor in ((5.0, 6.0), (None, 1.0), (5.0, -1.0), (float("inf"), float("inf")), (5.0, float("nan"))):
        with pytest.raises(ValueError, match="`snr_floor` must be 0, or at most `snr_gamma`"):
            DDPMFacesObjective(velocity, snr_gamma=gamma, snr_floor=floor)
    with pytest.raises(ValueError, match="`snr_floor` must be 0 for the `prediction_type` 'epsilon', got 1.0"):
        DDPMFacesObjective(DDPMFacesScheduler(), snr_gamma=5.0, snr_floor=1.0)


def test_given_timesteps_noise_and_augmentation_replace_drawn_ones():
    x_0, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    timesteps, augment_labels = torch.tensor([0, 7, 150, 299]), torch.randn(4, 9)
    scheduler, unet = DDPMFacesScheduler(), Recorder()
    state = torch.get_rng_state()
    output = DDPMFacesObjective(scheduler)(unet, x_0, timesteps=timesteps, noise=noise, augment_labels=augment_labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(unet.sample, scheduler.add_noise(x_0, noise, timesteps))
    assert torch.equal(output.timesteps, timesteps)
    assert torch.equal(unet.kwargs["augment_labels"], augment_labels)
    assert "class_labels" not in unet.kwargs
    torch.testing.assert_close(output.losses, noise.square().mean(dim=(1, 2, 3)))
