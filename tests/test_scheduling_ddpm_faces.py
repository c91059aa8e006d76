"""The scheduler is compared with diffusers, the article's formulas, and data with exact solutions."""

import inspect
import math
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from ddpm_faces.objective import DDPMFacesObjective
from ddpm_faces.pipeline_ddpm_faces import DDPMFacesPipeline
from ddpm_faces.scheduling_ddpm_faces import DDPMFacesScheduler


CONFIG_KEYS = list(inspect.signature(DDPMScheduler.__init__).parameters)[1:]
KARRAS_SCHEDULERS = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
EXTRA_PACKAGES = {"LMSDiscreteScheduler": "scipy", "DPMSolverSDEScheduler": "torchsde"}
SPACINGS = ("linspace", "leading", "trailing")
LEARNED = ("learned", "learned_range")

# The article's schedule in float64, like the formulas below.
BETAS = torch.linspace(0.0001, 0.02, 300, dtype=torch.float64)
ALPHAS_BAR = (1 - BETAS).cumprod(dim=0)

# diffusers' schedulers use numpy 1 protocols on torch tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def seed(value=0):
    return torch.Generator().manual_seed(int(value))


def karras_scheduler(name):
    if name in EXTRA_PACKAGES:
        pytest.importorskip(EXTRA_PACKAGES[name], reason=f"{name} needs the package {EXTRA_PACKAGES[name]}")
    return getattr(diffusers, name)


# 1. diffusers' DDPMScheduler


def random_step_inputs(variance_type="fixed_small", shape=(2, 3, 4, 4), dtype=torch.float32):
    """A prediction and an x_t, large enough for clipping and thresholding to have an effect."""
    prediction, sample, variance = torch.randn((3, *shape), generator=seed(1), dtype=torch.float64)
    if variance_type in LEARNED:
        prediction = torch.cat([prediction, variance.abs() / 2], dim=1)
    return prediction.to(dtype), (2 * sample).to(dtype)


def assert_same_steps(ours, theirs, timesteps):
    prediction, sample = random_step_inputs(ours.config.variance_type)
    for t in timesteps:
        got = ours.step(prediction, t, sample, generator=seed(t))
        expected = theirs.step(prediction, t, sample, generator=seed(t))
        for name in ("prev_sample", "pred_original_sample"):
            error = (got[name] - expected[name]).abs().max() / expected[name].abs().max()
            assert error <= 1e-6, f"{name} at t = {int(t)}"


@pytest.mark.parametrize("num_train_timesteps", [300, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_start": 0.0005, "beta_end": 0.05},
        {"beta_schedule": "scaled_linear", "clip_sample": False},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": "sample", "rescale_betas_zero_snr": True, "clip_sample": False},
        {"variance_type": "fixed_small_log"},
        {"variance_type": "fixed_large"},
        {"variance_type": "learned"},
        {"variance_type": "learned_range"},
        {"clip_sample": False},
        {"clip_sample_range": 2.5},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0},
    ],
    ids=str,
)
def test_equals_diffusers_at_every_timestep(options, num_train_timesteps):
    config = {"num_train_timesteps": num_train_timesteps, **options}
    ours, theirs = DDPMFacesScheduler(**config), DDPMScheduler(**config)
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=1e-12)
    assert len(ours) == num_train_timesteps
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert_same_steps(ours, theirs, ours.timesteps)  # before any call of set_timesteps

    t = torch.arange(num_train_timesteps)
    original, noise = torch.randn((2, num_train_timesteps, 1, 2, 2), generator=seed())
    for method in ("add_noise", "get_velocity"):
        got, expected = getattr(ours, method)(original, noise, t), getattr(theirs, method)(original, noise, t)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("num_train_timesteps", [300, 1000])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
def test_timesteps_equal_diffusers_for_every_number_of_steps(timestep_spacing, num_train_timesteps):
    config = {"num_train_timesteps": num_train_timesteps, "timestep_spacing": timestep_spacing}
    ours, theirs = DDPMFacesScheduler(**config), DDPMScheduler(**config)
    for n in range(1, num_train_timesteps + 1):
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        # diffusers' "trailing" sometimes rounds past the end (7 of 300: 299, 256, ..., 42, -1) to an invalid t.
        assert ours.timesteps.tolist() == [t for t in theirs.timesteps.tolist() if t >= 0], f"{n} steps"
        assert len(ours.timesteps) == ours.num_inference_steps == n


@pytest.mark.parametrize("num_inference_steps", [1, 7, 10, 33, 300])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
def test_strided_steps_equal_diffusers(timestep_spacing, num_inference_steps):
    config = {"num_train_timesteps": 300, "timestep_spacing": timestep_spacing, "clip_sample": False}
    ours, theirs = DDPMFacesScheduler(**config), DDPMScheduler(**config)
    ours.set_timesteps(num_inference_steps)
    theirs.set_timesteps(num_inference_steps)
    assert_same_steps(ours, theirs, ours.timesteps)


def test_given_and_shifted_timesteps_equal_diffusers():
    ours, theirs = DDPMFacesScheduler(steps_offset=3), DDPMScheduler(num_train_timesteps=300, steps_offset=3)
    for choice in ({"timesteps": [281, 100, 99, 7, 0]}, {"num_inference_steps": 40}):
        ours.set_timesteps(**choice)
        theirs.set_timesteps(**choice)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        assert_same_steps(ours, theirs, ours.timesteps)


def test_previous_timestep_has_the_type_of_its_argument():
    ours, theirs = DDPMFacesScheduler(num_train_timesteps=20), DDPMScheduler(num_train_timesteps=20)
    ours.set_timesteps(5)
    theirs.set_timesteps(5)
    for t in ours.timesteps:
        previous = ours.previous_timestep(t)
        assert isinstance(previous, torch.Tensor)
        assert torch.equal(previous, theirs.previous_timestep(t))
        assert type(ours.previous_timestep(int(t))) is int
        assert ours.previous_timestep(int(t)) == previous.item()
    assert ours.previous_timestep(torch.tensor([4])).shape == (1,)


def test_trained_betas_equal_diffusers():
    betas = torch.linspace(0.001, 0.3, 30).square().tolist()
    config = {"num_train_timesteps": 30, "trained_betas": betas}
    ours, theirs = DDPMFacesScheduler(**config), DDPMScheduler(**config)
    assert torch.equal(ours.betas, theirs.betas)
    assert_same_steps(ours, theirs, ours.timesteps)
    # `trained_betas` carry a schedule that other schedulers do not know, even one that ends in pure noise.
    zero_snr = DDPMFacesScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert zero_snr.alphas_cumprod[-1] == 0
    written_out = DDPMFacesScheduler(prediction_type="v_prediction", trained_betas=zero_snr.betas.tolist())
    assert torch.equal(written_out.alphas_cumprod, zero_snr.alphas_cumprod)


def test_unlike_diffusers_fixed_large_log_is_a_variance():
    prediction, sample = random_step_inputs()
    theirs = DDPMScheduler(num_train_timesteps=300, variance_type="fixed_large_log")
    assert theirs.step(prediction, 150, sample, generator=seed()).prev_sample.isnan().all()
    large, large_log = (DDPMFacesScheduler(variance_type=name) for name in ("fixed_large", "fixed_large_log"))
    for t in large.timesteps:
        steps = [ours.step(prediction, t, sample, generator=seed(t)).prev_sample for ours in (large, large_log)]
        assert torch.equal(*steps)


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned"])
def test_unlike_diffusers_the_last_step_adds_no_noise(variance_type):
    config = {"num_train_timesteps": 300, "timestep_spacing": "trailing", "variance_type": variance_type}
    ours, theirs = DDPMFacesScheduler(**config), DDPMScheduler(**config)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    assert_same_steps(ours, theirs, ours.timesteps[:-1])
    prediction, sample = random_step_inputs(variance_type)
    last = ours.timesteps[-1]
    assert last == 29
    prev_sample, pred_original_sample = ours.step(prediction, last, sample, generator=seed(), return_dict=False)
    torch.testing.assert_close(prev_sample, pred_original_sample, rtol=0, atol=1e-6)
    noise_of_theirs = theirs.step(prediction, last, sample, generator=seed()).prev_sample - prev_sample
    assert noise_of_theirs.std() > 0.1


# 2. The article


def test_article_terms():
    ours = DDPMFacesScheduler()
    alphas_bar_prev = torch.cat([torch.ones(1), ALPHAS_BAR[:-1]])
    expected = {
        "betas": BETAS,
        "alphas": 1 - BETAS,
        "alphas_cumprod": ALPHAS_BAR,
        "alphas_cumprod_prev": alphas_bar_prev,
        "sqrt_recip_alphas": (1 - BETAS) ** -0.5,
        "sqrt_alphas_cumprod": ALPHAS_BAR**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - ALPHAS_BAR) ** 0.5,
        "posterior_variance": BETAS * (1 - alphas_bar_prev) / (1 - ALPHAS_BAR),
    }
    for name, values in expected.items():
        # 1 - alpha_bar_t is about 1e-4 at the first timesteps, where float32 keeps three digits.
        rtol = 1e-3 if name in ("sqrt_one_minus_alphas_cumprod", "posterior_variance") else 1e-5
        got = getattr(ours, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), values, rtol=rtol, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_article_sample_timestep(dtype, tolerance):
    ours = DDPMFacesScheduler(clip_sample=False)
    # From the table in float32, 1 - alpha_bar_t / alpha_bar_t-1 is beta_t to about 6e-5 only.
    if dtype == torch.float64:
        ours.alphas_cumprod = ALPHAS_BAR
    sqrt_recip_alphas = (1 - BETAS) ** -0.5
    sqrt_one_minus_alphas_cumprod = (1 - ALPHAS_BAR) ** 0.5
    posterior_variance = BETAS * (1 - ALPHAS_BAR / (1 - BETAS)) / (1 - ALPHAS_BAR)
    eps, x = random_step_inputs(dtype=dtype)
    for t in range(299, -1, -1):
        expected = sqrt_recip_alphas[t] * (x - BETAS[t] * eps / sqrt_one_minus_alphas_cumprod[t])
        if t > 0:
            z = torch.randn(x.shape, generator=seed(t), dtype=dtype)
            expected = expected + posterior_variance[t] ** 0.5 * z
        got = ours.step(eps, t, x, generator=seed(t)).prev_sample
        assert got.dtype == dtype
        assert (got - expected).abs().max() <= tolerance * expected.abs().max(), f"t = {t}"


def test_article_forward_diffuse_process_for_a_batch():
    ours = DDPMFacesScheduler()
    t = torch.tensor([0, 1, 150, 298, 299])
    x_0, noise = torch.randn((2, 5, 3, 4, 4), generator=seed())
    rows = zip(ALPHAS_BAR[t], x_0.double(), noise.double(), strict=True)
    expected = torch.stack([alpha**0.5 * x + (1 - alpha) ** 0.5 * eps for alpha, x, eps in rows])
    torch.testing.assert_close(ours.add_noise(x_0, noise, t).double(), expected, rtol=0, atol=1e-5)
    for single in (torch.tensor(150), torch.tensor([150])):
        torch.testing.assert_close(ours.add_noise(x_0, noise, single)[2].double(), expected[2], rtol=0, atol=1e-5)


# 3. Pixels of N(MEAN, STD^2), for which the optimal network and the distribution of samples are known exactly


MEAN, STD = 0.3, 0.2
KNOWN_STD = {  # of the samples, by number of steps
    "fixed_small": {300: 0.194, 50: 0.173, 20: 0.151, 10: 0.126},
    "fixed_large": {300: 0.202, 50: 0.213, 20: 0.234, 10: 0.272},
}


def best_prediction(x, alpha_bar, prediction_type="epsilon"):
    """E[eps | x_t], E[x_0 | x_t] or E[v | x_t]."""
    residual = (x - alpha_bar**0.5 * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar)
    eps = (1 - alpha_bar) ** 0.5 * residual
    original = MEAN + alpha_bar**0.5 * STD**2 * residual
    v = alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * original
    return {"epsilon": eps, "sample": original, "v_prediction": v}[prediction_type]


def exact_moments(timesteps, variance_type="fixed_small"):
    """Mean and standard deviation of samples from the optimal network, by DDPM eq. 11, which is linear in x_t."""
    alphas_bar = ALPHAS_BAR.tolist()
    mean, variance = 0.0, 1.0
    for t, prev_t in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha_bar, alpha_bar_prev = alphas_bar[t], 1.0 if prev_t is None else alphas_bar[prev_t]
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        # x_t-1 = (x_t - beta / sqrt(1 - alpha_bar) eps) / sqrt(alpha), with eps = slope (x_t - sqrt(alpha_bar) MEAN)
        slope = (1 - alpha_bar) ** 0.5 / (alpha_bar * STD**2 + 1 - alpha_bar)
        weight = beta / (1 - alpha_bar) ** 0.5 * slope
        mean = (mean - weight * (mean - alpha_bar**0.5 * MEAN)) / alpha**0.5
        variance = (1 - weight) ** 2 / alpha * variance
        if prev_t is not None:
            variance += beta if variance_type == "fixed_large" else beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return mean, variance**0.5


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("num_inference_steps", [300, 50, 20, 10])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_samples_have_the_exact_moments(variance_type, num_inference_steps, prediction_type):
    ours = DDPMFacesScheduler(variance_type=variance_type, prediction_type=prediction_type, clip_sample=False)
    ours.set_timesteps(num_inference_steps)
    stride = 300 // num_inference_steps
    mean, std = exact_moments(list(range(300 - stride, -1, -stride)), variance_type)
    assert std == pytest.approx(KNOWN_STD[variance_type][num_inference_steps], abs=5e-4)

    generator, num_pixels = seed(num_inference_steps), 100_000
    x = torch.randn((1, 1, 1, num_pixels), generator=generator)
    for t in ours.timesteps:
        prediction = best_prediction(x, float(ALPHAS_BAR[t]), prediction_type)
        x = ours.step(prediction, t, x, generator=generator).prev_sample
    assert float(x.mean()) == pytest.approx(mean, abs=5 * std / num_pixels**0.5)
    assert float(x.std()) == pytest.approx(std, abs=5 * std / (2 * num_pixels) ** 0.5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_objective_of_the_best_network_is_the_known_minimum(prediction_type):
    scheduler = DDPMFacesScheduler(prediction_type=prediction_type)

    def best_network(noisy_samples, timesteps):
        alpha_bar = ALPHAS_BAR[timesteps].float().view(-1, 1, 1, 1)
        return SimpleNamespace(sample=best_prediction(noisy_samples, alpha_bar, prediction_type))

    # The remaining uncertainty of x_0 given x_t, in terms of eps, x_0 and v.
    unknown = STD**2 * (1 - ALPHAS_BAR) / (ALPHAS_BAR * STD**2 + 1 - ALPHAS_BAR)
    share = {"epsilon": ALPHAS_BAR / (1 - ALPHAS_BAR), "sample": 1, "v_prediction": 1 / (1 - ALPHAS_BAR)}
    minimum = unknown * share[prediction_type]

    pictures = MEAN + STD * torch.randn((30_000, 1, 4, 4), generator=seed(1))
    losses, timesteps = DDPMFacesObjective(scheduler)(best_network, pictures, generator=seed(2))
    # At the drawn timesteps, and as a mean over all T.
    for excess in (losses - minimum[timesteps], losses - minimum.mean()):
        assert abs(excess.mean()) <= 5 * excess.std() / len(losses) ** 0.5
    assert (timesteps.min(), timesteps.max()) == (0, 299)


# 4. The other schedulers of diffusers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_train_timesteps": 120, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"beta_schedule": "scaled_linear", "clip_sample": False, "timestep_spacing": "trailing"},
        {"num_train_timesteps": 8, "trained_betas": [0.01, 0.02, 0.04, 0.08, 0.1, 0.2, 0.3, 0.4]},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", KARRAS_SCHEDULERS)
def test_config_survives_conversion_to_every_scheduler_and_back(name, options, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(diffusers.utils.logging.get_logger("diffusers"), "propagate", True)
    ours = DDPMFacesScheduler(**options)
    other = karras_scheduler(name).from_config(ours.config)
    other.save_config(tmp_path / "other")
    loaded = type(other).from_pretrained(tmp_path / "other")
    back = DDPMFacesScheduler.from_config(loaded.config)
    back.save_config(tmp_path / "ours")
    for scheduler in (other, loaded, back, DDPMFacesScheduler.from_pretrained(tmp_path / "ours")):
        assert scheduler.config.num_train_timesteps == len(ours)
        assert {key: scheduler.config[key] for key in CONFIG_KEYS} == {key: ours.config[key] for key in CONFIG_KEYS}
        if name != "EDMEulerScheduler" or scheduler is back:  # uses its own noise levels
            assert torch.equal(scheduler.betas, ours.betas)
    if name != "EDMEulerScheduler":
        assert "not expected" not in caplog.text


def test_config_of_diffusers_keeps_its_own_defaults(tmp_path):
    theirs = DDPMScheduler()
    assert len(DDPMFacesScheduler.from_config(theirs.config)) == 1000
    assert len(DDPMFacesScheduler.from_config(theirs.config, num_train_timesteps=77)) == 77
    theirs.save_config(tmp_path)
    assert len(DDPMFacesScheduler.from_pretrained(tmp_path)) == 1000
    assert {key: theirs.config[key] for key in CONFIG_KEYS} == {
        **{key: DDPMFacesScheduler().config[key] for key in CONFIG_KEYS},
        "num_train_timesteps": 1000,
    }


def test_compatibles_are_named():
    assert {cls.__name__ for cls in DDPMFacesScheduler().compatibles} == set(KARRAS_SCHEDULERS)


class GaussianUNet(ModelMixin, ConfigMixin):
    """The optimal network for pixels of N(MEAN, STD^2). Between two timesteps, log(sigma) is linear."""

    @register_to_config
    def __init__(self, sample_size=64, in_channels=1, out_channels=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))  # a model without parameters has no dtype
        self.log_sigmas = (1 / ALPHAS_BAR - 1).log() / 2

    def forward(self, sample, timestep):
        t = float(timestep)
        below = min(int(t), 298)
        log_sigma = torch.lerp(self.log_sigmas[below], self.log_sigmas[below + 1], t - below)
        return UNet2DOutput(sample=best_prediction(sample, float(1 / (1 + (2 * log_sigma).exp()))))


def gaussian_pipeline(scheduler):
    pipeline = DDPMFacesPipeline(GaussianUNet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def exact_flow_moments(t):
    """Mean and standard deviation after N(0, 1) at t follows the probability flow to x_0, as in ODE solvers."""
    alpha_bar = float(ALPHAS_BAR[int(t)])
    std_t = (alpha_bar * STD**2 + 1 - alpha_bar) ** 0.5
    return MEAN - STD * alpha_bar**0.5 * MEAN / std_t, STD / std_t


@pytest.mark.parametrize("name", ["DDPMFacesScheduler", *KARRAS_SCHEDULERS])
def test_every_scheduler_samples_in_the_pipeline(name):
    ours = DDPMFacesScheduler(clip_sample=False)
    scheduler = ours if name == "DDPMFacesScheduler" else karras_scheduler(name).from_config(ours.config)
    pipeline = gaussian_pipeline(scheduler)
    call = {"batch_size": 24, "num_inference_steps": 50, "generator": seed(), "output_type": "latent"}
    if name == "EDMEulerScheduler":
        with pytest.raises(ValueError, match="EDMEulerScheduler is not defined by betas"):
            pipeline(**call)
        return
    torch.manual_seed(0)  # DPMSolverSDEScheduler takes no generator
    preset = "exact" if name == "DDPMFacesScheduler" else None
    pixels = pipeline(**call, preset=preset).images

    # 98,304 pixels: 5 standard errors are 0.003 for the mean and 0.002 for the standard deviation. The latter also has
    # the error of a first-order solver, or of a second-order one with noise, in 50 steps.
    if name in ("DDPMFacesScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"):
        (mean, std), tolerance = exact_moments(list(range(294, -1, -6))), 0.0025
    elif name in ("KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"):
        (mean, std), tolerance = (MEAN, STD), 0.011
    else:
        scheduler.set_timesteps(50)  # the pipeline has used a copy
        mean, std = exact_flow_moments(scheduler.timesteps[0])
        first_order = name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverSinglestepScheduler")
        tolerance = 0.016 if first_order else 0.005
    assert float(pixels.mean()) == pytest.approx(mean, abs=0.0035)
    assert float(pixels.std()) == pytest.approx(std, abs=tolerance)


# 5. Bad input


def step_with(channels, variance_type="fixed_small", t=0, num_inference_steps=300):
    ours = DDPMFacesScheduler(variance_type=variance_type)
    ours.set_timesteps(num_inference_steps)
    return ours.step(torch.zeros(1, channels, 4, 4), t, torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda new: new(beta_schedule="cosine"), "`beta_schedule` must be one of .*'sigmoid', got 'cosine'"),
        (lambda new: new(variance_type="small"), "`variance_type` must be one of .*'fixed_small'.*got 'small'"),
        (lambda new: new(prediction_type="noise"), "`prediction_type` must be one of 'epsilon', .*got 'noise'"),
        (lambda new: new(timestep_spacing="even"), "`timestep_spacing` must be one of 'linspace', .*got 'even'"),
        (lambda new: new(beta_start=0.0), r"`beta_start` must lie in \(0, 1\), got 0.0"),
        (lambda new: new(beta_end=1.0), r"`beta_end` must lie in \(0, 1\), got 1.0"),
        (lambda new: new(beta_start=0.03), r"`beta_start` \(0.03\) must not exceed `beta_end` \(0.02\)"),
        (lambda new: new(num_train_timesteps=0), "`num_train_timesteps` must be an integer of at least 1, got 0"),
        (lambda new: new(num_train_timesteps=3.0), "`num_train_timesteps` must be an integer of at least 1, got 3.0"),
        (lambda new: new(trained_betas=[0.1, 0.2]), r"`trained_betas` must have .*\(300\) values, got .*\(2,\)"),
        (lambda new: new(2, trained_betas=[0.0, 0.2]), r"`trained_betas` must lie in \(0, 1\).*got 0 to 0.2"),
        (lambda new: new(2, trained_betas=[1.0, 0.2]), r"`trained_betas` must lie in \(0, 1\).*got 0.2 to 1"),
        (lambda new: new(2, trained_betas=[0.1, 1.2]), r"`trained_betas` must lie in \(0, 1\).*got 0.1 to 1.2"),
        (lambda new: new(dynamic_thresholding_ratio=1.5), r"`dynamic_thresholding_ratio` must lie in \(0, 1\].*1.5"),
        (lambda new: new(clip_sample_range=0.0), "`clip_sample_range` must be positive, got 0.0"),
        (lambda new: new(sample_max_value=0.5), "`sample_max_value` must be at least 1, got 0.5"),
        (lambda new: new(steps_offset=-1), "`steps_offset` must be an integer of at least 0, got -1"),
        (lambda new: new(rescale_betas_zero_snr=True), "use 'v_prediction' or 'sample'"),
        (lambda new: new(2, trained_betas=[0.1, 1.0]), "`trained_betas` are too large for .*'epsilon'.*zero terminal"),
        (lambda new: new(beta_start=0.9, beta_end=0.9), "`beta_start` and `beta_end` are too large for .*300"),
        (lambda new: new(13_000), "`beta_start` and `beta_end` are too large for `num_train_timesteps`"),
        (
            lambda new: new(50, prediction_type="sample", trained_betas=[0.99] * 50),
            "`trained_betas` are too large for `num_train_timesteps`",
        ),
        (lambda new: new(beta_start=1e-9), "`beta_start` must be at least 6e-8: .* for 1e-09"),
        (lambda new: new(2, trained_betas=[1e-9, 0.1]), "`trained_betas` must be at least 6e-8: .* for 1e-09"),
        (lambda new: new().set_timesteps(301), r"`num_inference_steps` must be .* \(300\), got 301"),
        (lambda new: new().set_timesteps(0), "`num_inference_steps` must be an integer from 1 to .*got 0"),
        (lambda new: new().set_timesteps(), "either `num_inference_steps` or `timesteps`"),
        (lambda new: new().set_timesteps(2, timesteps=[9, 0]), "either `num_inference_steps` or `timesteps`"),
        (lambda new: new().set_timesteps(timesteps=[0, 9]), r"`timesteps` must be a descending list .*, got \[0, 9\]"),
        (lambda new: new().set_timesteps(timesteps=[9, 9]), r"`timesteps` must be a descending list .*, got \[9, 9\]"),
        (lambda new: new().set_timesteps(timesteps=[]), "`timesteps` must be a descending list of at least one"),
        (lambda new: new().set_timesteps(timesteps=[300, 0]), r"must lie in 0..299, got 300..0"),
        (lambda new: new().set_timesteps(timesteps=[9, -1]), r"must lie in 0..299, got 9..-1"),
        (lambda new: new(steps_offset=1).set_timesteps(300), r"must lie in 0..299, got 300..1 .*offset` is 1"),
        (lambda new: step_with(3, t=1, num_inference_steps=10), "`timestep` 1 is not among the 10"),
        (lambda new: step_with(3, t=300), "`timestep` 300 is not among the 300"),
        (lambda new: step_with(6), r"`model_output` of shape \(1, 6, 4, 4\) does not fit .*\(1, 3, 4, 4\)"),
        (lambda new: step_with(3, "learned"), "'learned'` needs a `model_output` of 6 channels .* got 3"),
        (lambda new: step_with(5, "learned_range"), "'learned_range'` needs a `model_output` of 6 channels .* got 5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(DDPMFacesScheduler)


UNBOUNDED = ("steps_offset", "clip_sample_range", "sample_max_value")
# Wrong values that a scheduler_config.json may contain.
ODD_VALUES = [None, "x", "0", -1, 2**70, math.inf, math.nan, [], {}, [[1]], [5], [None], ["linear"], ["x"] * 300]


@pytest.mark.parametrize("name", list(inspect.signature(DDPMFacesScheduler.__init__).parameters)[1:])
def test_config_of_wrong_types(name):
    default = inspect.signature(DDPMFacesScheduler.__init__).parameters[name].default
    for value in ODD_VALUES:
        if value is default or (name in UNBOUNDED and value in (2**70, math.inf)):
            continue
        with pytest.raises(ValueError, match=f"`{name}`"):
            DDPMFacesScheduler(**{name: value})


# 6. Half precision and generators


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_add_noise_in_half_precision(dtype):
    ours, t = DDPMFacesScheduler(), torch.arange(300)
    nothing, noise = torch.zeros(300, 1, 2, 2), torch.ones(300, 1, 2, 2)
    got = ours.add_noise(nothing.to(dtype), noise.to(dtype), t)
    assert got.dtype == ours.get_velocity(nothing.to(dtype), noise.to(dtype), t).dtype == dtype
    # With 1 - alpha_bar_t in half precision, the first timesteps would have no noise.
    torch.testing.assert_close(got.float(), ours.add_noise(nothing, noise, t), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, {"thresholding": True}, {"variance_type": "fixed_large"}, {"variance_type": "learned_range"}],
    ids=str,
)
def test_step_in_half_precision(options, dtype):
    ours = DDPMFacesScheduler(**options)
    prediction, sample = random_step_inputs(ours.config.variance_type)
    for t in (299, 150, 1, 0):
        got = ours.step(prediction.to(dtype), t, sample.to(dtype), generator=seed())
        assert got.prev_sample.dtype == got.pred_original_sample.dtype == dtype
        # randn draws other numbers in other dtypes, so only the deterministic part is compared.
        expected = ours.step(prediction, t, sample).pred_original_sample
        torch.testing.assert_close(got.pred_original_sample.float(), expected, rtol=0.1, atol=0.1)
        assert got.prev_sample.isfinite().all()


def test_image_depends_only_on_its_own_generator():
    ours = DDPMFacesScheduler()
    prediction, sample = random_step_inputs(shape=(4, 3, 4, 4))
    batch = ours.step(prediction, 200, sample, generator=[seed(i) for i in range(4)]).prev_sample
    for i in range(4):
        alone = ours.step(prediction[i : i + 1], 200, sample[i : i + 1], generator=[seed(i)]).prev_sample
        torch.testing.assert_close(alone[0], batch[i], rtol=0, atol=1e-6)

    pipeline = gaussian_pipeline(ours)
    call = {"num_inference_steps": 5, "output_type": "latent"}
    batch = pipeline(batch_size=3, generator=[seed(i) for i in range(3)], **call).images
    for i in range(3):
        alone = pipeline(batch_size=1, generator=[seed(i)], **call).images
        torch.testing.assert_close(alone[0], batch[i], rtol=0, atol=1e-5)
