"""Restoration, against the exact posterior of Gaussian images, for which the best denoiser is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from PIL import Image
from test_prompts import a_prompt_model

from ddpm_faces import (
    Blur,
    DDPMFacesPipeline,
    DDPMFacesRestorePipeline,
    DDPMFacesScheduler,
    Downsample,
    GaussianBlur,
    Gray,
    Inpaint,
)
from ddpm_faces.operators_ddpm_faces import ROUNDING, motion_kernel, observations
from ddpm_faces.restoration_ddpm_faces import CHANNEL_COUPLING, SMOOTHNESS, explain, probe


SIZE = 8


@pytest.fixture
def restore(pipeline) -> DDPMFacesRestorePipeline:
    restore = DDPMFacesRestorePipeline.from_pipe(pipeline)
    restore.set_progress_bar_config(disable=True)
    return restore


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def a_mask(size: int = 16) -> torch.Tensor:
    return torch.rand(size, size, generator=torch.Generator().manual_seed(1)) < 0.6


def a_photo(size: int = 16, mode: str = "RGB") -> Image.Image:
    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(0)).byte()
    return Image.fromarray(pixels.numpy()).convert(mode)


class GaussianFaces:
    """A model of images of 8x8 pixels whose values are normally distributed, with a perfect prediction."""

    def __init__(self) -> None:
        self.scheduler = DDPMFacesScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
        )
        unet = tiny_unet(sample_size=SIZE, in_channels=1, out_channels=1)
        self.restore = DDPMFacesRestorePipeline(unet, self.scheduler)
        self.restore.predict = self.predict
        self.restore.set_progress_bar_config(disable=True)
        places = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE)).double()
        self.covariance = 0.25 * torch.exp(-torch.cdist(places, places) / 4)
        self.variances, self.axes = torch.linalg.eigh(self.covariance)

    def draw(self, seed: int) -> torch.Tensor:
        noise = torch.randn(1, SIZE**2, generator=torch.Generator().manual_seed(seed)).double()
        return ((noise * self.variances.sqrt()) @ self.axes.T).view(1, 1, SIZE, SIZE)

    def predict(self, sample, timestep, *_):
        bar = self.scheduler.alphas_cumprod[round(float(timestep))].double()
        shrunk = (sample.double().flatten(1) @ self.axes) * bar.sqrt() * self.variances
        x_0 = (shrunk / (bar * self.variances + 1 - bar)) @ self.axes.T
        noise = (sample.flatten(1) - bar.sqrt() * x_0) / (1 - bar).sqrt()
        return (bar.sqrt() * noise - (1 - bar).sqrt() * x_0).view_as(sample).float()

    def posterior(self, operator, observed, noise_level):
        """Return the mean and the variances of the image, given the observation."""
        matrix = operator(torch.eye(SIZE**2).double().view(-1, 1, SIZE, SIZE)).flatten(1).T
        noise = max(noise_level, 1e-4) ** 2 * torch.eye(len(matrix)).double()
        gain = self.covariance @ matrix.T @ torch.linalg.inv(matrix @ self.covariance @ matrix.T + noise)
        return gain @ observed.flatten().double(), (self.covariance - gain @ matrix @ self.covariance).diagonal()


SHAPE = (1, SIZE, SIZE)
LINEAR = {
    "x4": (Downsample(4, SHAPE), 0.0),
    "x4 with noise": (Downsample(4, SHAPE), 0.05),
    "x2, bicubic": (Downsample(2, SHAPE, "bicubic"), 0.02),
    "pixels": (Inpaint(a_mask(SIZE), 1), 0.05),
    "blur with noise": (GaussianBlur(1.0, SHAPE), 0.1),
    "motion with noise": (Blur(motion_kernel(3, 20), SHAPE), 0.05),
}


@pytest.mark.parametrize(("num_resamples", "least"), [(2, 0.55), (None, 0.3)])
@pytest.mark.parametrize("name", LINEAR)
def test_restorations_are_drawn_from_the_posterior(name, num_resamples, least):
    operator, noise_level = LINEAR[name]
    model = GaussianFaces()
    observed = operator(model.draw(5))
    observed += noise_level * torch.randn(observed.shape, generator=torch.Generator().manual_seed(1)).double()
    mean, variances = model.posterior(operator, observed, noise_level)
    arguments = (observed, operator, noise_level, 50, 400, torch.Generator().manual_seed(0), "latent")
    drawn = model.restore(*arguments, regularization=1.0, num_resamples=num_resamples).images
    drawn = drawn.double().flatten(1)
    # Their mean is right, and their spread is too small, above all with repetitions.
    error = (drawn.mean(dim=0) - mean).square().mean()
    assert error < (0.25 if name == "motion with noise" else 0.12) ** 2 * variances.mean()
    assert least < drawn.var(dim=0).mean() / variances.mean() < 1.1


@pytest.mark.parametrize("noise_level", [0.0, 0.3])
def test_probe_moves_as_far_as_the_covariance_says(noise_level):
    """Against the best point on the line along C A^T (y - A x_0), where C is the covariance of the error."""
    model, sigma = GaussianFaces(), 0.7
    operator = Downsample(2, SHAPE)
    identity = torch.eye(SIZE**2).double()
    jacobian = model.covariance @ torch.linalg.inv(model.covariance + sigma**2 * identity)

    def predict_x_0(sample):
        return (sample.flatten(1) * math.hypot(1, sigma) @ jacobian).view_as(sample)

    sample = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    observed = operator(torch.cat([model.draw(1), model.draw(2)]))
    x_0 = predict_x_0(sample)
    found = probe(operator, x_0, observed, noise_level**2, sample, sigma, predict_x_0)
    for before, after, y in zip(x_0, found, observed, strict=True):
        residual = y - operator(before[None])[0]
        direction = sigma**2 * jacobian @ operator.adjoint(residual[None]).flatten()
        explained = operator(direction.view(1, *SHAPE)).flatten()
        curvature = explained @ explained
        curvature += noise_level**2 * direction @ torch.linalg.solve(sigma**2 * jacobian, direction)
        expected = before.flatten() + residual.flatten() @ explained / curvature * direction
        torch.testing.assert_close(after.flatten(), expected)


def test_probe_leaves_what_is_explained():
    operator, sample = Gray((3, 8, 8)), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(probe(operator, sample, operator(sample), 0.0, sample, 0.5, lambda sample: sample), sample)


@pytest.mark.parametrize("noise_level", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "sigma"), [*itertools.product(["mask", "x4", "gray", "blur"], [0.2, 2.0]), ("mask", math.inf)]
)
def test_predictions_are_moved_smoothly(name, sigma, noise_level, monkeypatch):
    """Against the solution of a system of linear equations, with a Laplacian made of its graph."""
    shape = (3, 8, 8)
    operators = {"mask": Inpaint(a_mask(8)), "x4": Downsample(4, shape), "gray": Gray(shape)}
    operator = {**operators, "blur": GaussianBlur(0.5, shape)}[name]
    generator = torch.Generator().manual_seed(0)
    x_0, truth = (torch.randn(2, *shape, generator=generator).double() for _ in range(2))
    observed = operator(truth)

    path = torch.diag(torch.ones(7), 1).double()
    path = torch.diag((path + path.T).sum(dim=1)) - path - path.T
    eye = torch.eye(8).double()
    laplacian = torch.kron(torch.eye(3).double(), torch.kron(path, eye) + torch.kron(eye, path))
    smoothness, coupling = SMOOTHNESS[0] + SMOOTHNESS[1] / sigma, CHANNEL_COUPLING if name == "gray" else 0
    channels = torch.eye(3).double() + coupling * (torch.eye(3) - torch.ones(3, 3) / 3)
    precision = torch.kron(channels, torch.eye(64).double()) / sigma**2 + smoothness * laplacian
    basis = torch.eye(192).double().view(-1, *shape)
    matrix = operator(basis).flatten(1).T
    size = len(matrix)
    # The least value of the penalty, with a multiplier for each equation A z + noise_variance * multiplier = y.
    equations = torch.zeros(192 + size, 192 + size).double()
    equations[:192, :192], equations[:192, 192:], equations[192:, :192] = precision, -matrix.T, matrix
    equations[192:, 192:] = noise_level**2 * torch.eye(size)
    right = torch.cat([precision @ x_0.flatten(1).T, observed.flatten(1).T])
    expected = torch.linalg.lstsq(equations, right, driver="gelsd").solution[:192].T.view_as(x_0)

    few = explain(operator, x_0, observed, noise_level**2, sigma)
    assert (few - expected).norm() < 0.25 * (x_0 - expected).norm()
    if noise_level == 0:
        torch.testing.assert_close(operator(few), observed)
    monkeypatch.setattr("ddpm_faces.restoration_ddpm_faces.NUM_ITERATIONS", 3000)
    torch.testing.assert_close(explain(operator, x_0, observed, noise_level**2, sigma), expected, rtol=0, atol=1e-3)


def test_denoiser_returns_the_expected_image():
    model = GaussianFaces()
    noisy = model.draw(3).float() + 0.6 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(2))
    bars = model.scheduler.alphas_cumprod.double()
    sigmas = ((1 - bars) / bars).sqrt()
    for sigma in sigmas[[20, 150, 280]].tolist():
        covariance = model.covariance + sigma**2 * torch.eye(SIZE**2)
        expected = (model.covariance @ torch.linalg.solve(covariance, noisy.double().flatten())).view_as(noisy)
        denoised = model.restore.as_denoiser()((noisy + 1) / 2, sigma / 2)  # deepinv's images lie in [0, 1]
        torch.testing.assert_close(denoised.double() * 2 - 1, expected, rtol=0, atol=1e-4)


def test_denoiser_takes_a_noise_for_each_image_and_lets_gradients_through(restore):
    denoiser = restore.as_denoiser()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    both = denoiser(images, torch.tensor([0.1, 0.4]))
    torch.testing.assert_close(both[:1], denoiser(images[:1], 0.1))
    torch.testing.assert_close(both[1:], denoiser(images[1:], torch.tensor(0.4)))
    both.sum().backward()
    assert images.grad.abs().min(dim=-1).values.max() > 0
    with pytest.raises(ValueError, match="`sigma` must be above 0, got 0"):
        denoiser(images, 0)
    with pytest.raises(ValueError, match="one number, or one for each of the 2 images, got 3"):
        denoiser(images, torch.tensor([0.1, 0.2, 0.3]))


def test_denoiser_takes_a_prompt():
    restore = DDPMFacesRestorePipeline.from_pipe(a_prompt_model())
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, one, other = (
        restore.as_denoiser(prompt, 2.0)(images, 0.5) for prompt in (None, "a young woman", "an old man")
    )
    assert not torch.equal(plain, one)
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="`prompt` must be one text"):
        restore.as_denoiser(["a woman", "a man"])


def test_denoiser_of_a_class():
    restore = DDPMFacesRestorePipeline(tiny_unet(num_class_embeds=3), DDPMFacesScheduler(num_train_timesteps=20))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one, other = (restore.as_denoiser(class_label=label)(images, 0.5) for label in (0, 2))
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="`class_labels` must be given"):
        restore.as_denoiser()


def test_autoguidance_is_off_by_default(pipeline):
    guided = DDPMFacesPipeline(pipeline.unet, pipeline.scheduler, guide=tiny_unet(), autoguidance_scale=2.0)
    restore = DDPMFacesRestorePipeline.from_pipe(guided)

    def call(**scales):
        arguments = (torch.zeros(1, 3, 16, 16), Inpaint(a_mask()), 0.0, 8, 1, torch.Generator().manual_seed(0), "pt")
        return restore(*arguments, **scales).images

    assert torch.equal(call(), call(autoguidance_scale=1.0))
    assert not torch.equal(call(), call(autoguidance_scale=2.0))


def test_callbacks_see_their_own_call(restore):
    seen = []

    def record(pipeline, i, t, tensors):
        seen.append((i, pipeline.num_timesteps, tuple(tensors["latents"].shape)))
        return {}

    restore(torch.rand(1, 3, 16, 16), Inpaint(a_mask()), 0.0, 8, callback_on_step_end=record)
    assert seen == [(i, len(seen), (1, 3, 16, 16)) for i in range(len(seen))]
    assert 2 < len(seen) <= 8


@pytest.mark.parametrize(
    "operator",
    [
        Inpaint(a_mask()),
        Downsample(4, (3, 16, 16)),
        Gray((3, 16, 16)),
        GaussianBlur(1.0, (3, 16, 16)),
        Downsample(2, (3, 16, 16)) @ GaussianBlur(0.5, (3, 16, 16)),
    ],
)
def test_results_explain_the_observation(restore, operator):
    face = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    observed = operator(face)
    found = restore(observed, operator, num_inference_steps=5, output_type="latent").images
    assert found.shape == face.shape
    assert (operator(found) - observed).abs().max() < 1e-3


def test_known_pixels_stay(restore):
    photo, mask = a_photo(), a_mask()
    images = restore(photo, Inpaint(mask), num_inference_steps=5, num_images_per_prompt=2).images
    known = ~mask.numpy()
    for image in images:
        assert (np.asarray(image)[known] == np.asarray(photo)[known]).all()
    assert (np.asarray(images[0])[~known] != np.asarray(images[1])[~known]).any()  # two different answers


def test_result_depends_only_on_its_generator(restore):
    operator, observed = Gray((3, 16, 16)), torch.rand(2, 1, 16, 16)
    together = restore(observed, operator, 0.1, 4, 2, generators(4), "latent").images
    alone = restore(observed[1:], operator, 0.1, 4, 2, generators(4)[2:], "latent").images
    torch.testing.assert_close(together[2:], alone)


def test_without_eta_and_repetitions_only_the_start_is_random(restore):
    operator, observed = Gray((3, 16, 16)), torch.rand(1, 1, 16, 16)
    states = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        restore(observed, operator, num_inference_steps=4, generator=generator, eta=0.0, num_resamples=1)
        states.append(generator.get_state())
    fresh = torch.Generator().manual_seed(1)
    torch.randn(1, 3, 16, 16, generator=fresh)
    assert torch.equal(states[0], fresh.get_state())


def test_prompts_and_guidance_reach_the_network():
    restore = DDPMFacesRestorePipeline.from_pipe(a_prompt_model())
    restore.set_progress_bar_config(disable=True)
    operator, observed = Gray((3, 16, 16)), torch.rand(2, 1, 16, 16)
    texts = ["a woman", "an older man"]

    def call(**arguments):
        arguments = {"num_inference_steps": 3, "output_type": "latent", **arguments}
        return restore(observed, operator, generator=generators(2), **arguments).images

    asked = call(prompt=texts)
    assert not torch.equal(asked, call())
    torch.testing.assert_close(call(prompt="a woman")[0], asked[0])
    torch.testing.assert_close(call(prompt_embeds=restore.encode_prompt(texts)), asked)
    assert not torch.equal(call(prompt=texts, guidance_scale=3.0), asked)
    many = restore(observed, operator, 0.0, 3, 2, generators(4), "latent", prompt=texts).images
    first = restore(observed[:1], operator, 0.0, 3, 2, generators(2), "latent", prompt="a woman").images
    torch.testing.assert_close(many[:2], first)


@pytest.mark.parametrize(("num_steps", "num_resamples"), [(1, 1), (1, 2), (7, 1), (7, 2), (20, 2), (20, 20)])
def test_number_of_steps_counts_evaluations(restore, num_steps, num_resamples):
    calls = []
    restore.unet.register_forward_hook(lambda *_: calls.append(1))
    arguments = {"num_inference_steps": num_steps, "num_resamples": num_resamples}
    restore(torch.zeros(1, 1, 16, 16), Gray((3, 16, 16)), **arguments)
    assert max(1, num_steps - 2 * num_resamples) <= len(calls) <= num_steps


def test_tuned_steps_are_those_of_sampling_only(restore):
    """They belong to a solver with few steps: other timesteps, some of them between two of the model."""
    arguments = (torch.zeros(1, 1, 16, 16), Gray((3, 16, 16)), 0.0)
    results = []
    tuned = {str(n): {"timesteps": [19.0, *(n - 1.5 - i for i in range(n - 1))]} for n in range(2, 8)}
    for tuned_steps in (None, tuned):
        restore.scheduler = DDPMFacesScheduler(num_train_timesteps=20, tuned_steps=tuned_steps)
        results.append(restore(*arguments, 7, generator=generators(1), output_type="latent").images)
    assert torch.equal(*results)


def test_callback_sees_each_step_and_changes_it(restore):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = restore(
        torch.rand(1, 1, 16, 16), Gray((3, 16, 16)), num_inference_steps=6, num_resamples=1,
        callback_on_step_end=callback, output_type="latent",
    ).images  # fmt: skip
    assert [step for step, *_ in seen] == list(range(len(seen)))
    assert 2 < len(seen) <= 6
    assert seen[0][2] == (1, 3, 16, 16)
    assert (images == 0).all()


def test_8_bit_images_count_as_rounded():
    photo = a_photo()
    observed, is_rounded = observations([photo, photo], (3, 16, 16))
    assert is_rounded
    assert observed.shape == (2, 3, 16, 16)
    exact = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    error = ((exact / 2 + 0.5) * 255).round() / 127.5 - 1 - exact
    assert error.std() == pytest.approx(ROUNDING, rel=0.05)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_any_photo_is_read_or_refused():
    colored, gray = (3, 16, 16), (1, 16, 16)
    expected, _ = observations(a_photo(), colored)
    assert expected.min() >= -1
    assert expected.max() <= 1
    assert expected[0, :, 0, 1].tolist() == pytest.approx([v / 127.5 - 1 for v in a_photo().getpixel((1, 0))])
    # Turned by EXIF
    turned = a_photo().transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    torch.testing.assert_close(observations(turned, colored)[0], expected)
    # Its other tags may be damaged
    damaged = a_photo()
    damaged.info["exif"] = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    torch.testing.assert_close(observations(damaged, colored)[0], expected)
    # 16 bits
    deep = Image.fromarray(np.full((16, 16), 65535, dtype=np.uint16))
    assert (observations(deep, gray)[0] == 1).all()
    assert (observations(deep, colored)[0] == 1).all()
    # Other modes
    torch.testing.assert_close(observations(a_photo(mode="CMYK"), colored)[0], expected, atol=0.01, rtol=0)
    assert observations(a_photo(mode="RGBA"), colored)[0].shape == (1, *colored)  # opaque
    torch.testing.assert_close(observations(a_photo(), gray)[0], Gray(colored)(expected), atol=0.006, rtol=0)
    holes = a_photo(mode="RGBA")
    holes.putpixel((3, 3), (0, 0, 0, 0))
    with pytest.raises(ValueError, match="some of its pixels are transparent"):
        observations(holes, colored)
    with pytest.raises(ValueError, match="mode 'F' has no defined white"):
        observations(a_photo(mode="F"), gray)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operator": None}, "`operator` must be a LinearOperator"),
        ({"operator": Inpaint(a_mask(), 1)}, "images with 3 channels, as the model, got 1"),
        ({"operator": Gray((3, 18, 17))}, "with sides that are multiples of 2, got 17x18"),
        ({"noise_level": -0.1}, "`noise_level` must be a number from 0 to 2, got -0.1"),
        ({"noise_level": math.nan}, "got nan"),
        ({"eta": 1.5}, "`eta` must be a number from 0 to 1"),
        ({"regularization": -1}, "`regularization` must be a number of at least 0"),
        ({"regularization": math.inf}, "`regularization` must be a number of at least 0, got inf"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be from 1 to 20"),
        ({"num_resamples": 0}, "`num_resamples` must be an integer from 1 to 20, got 0"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be an integer of at least 1"),
        ({"image": a_photo(8)}, "`image` must be of 16x16 pixels, got 8x8"),
        ({"image": []}, "a PIL image, a list of them or a tensor, got list"),
        ({"image": torch.zeros(3, 16, 16)}, r"`image` must be of shape \(batch, 3, 16, 16\)"),
        ({"image": torch.full((1, 3, 16, 16), math.inf)}, "finite"),
        ({"image": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, r"pixels in \[-1, 1\]"),
        ({"prompt": "a woman"}, "not trained with texts"),
        ({"guidance_scale": 2.0}, "`guidance_scale` must be 1"),
        ({"generator": generators(2)}, "one generator per image"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
    ],
)
def test_bad_input(restore, arguments, message):
    arguments = {"image": a_photo(), "operator": Inpaint(a_mask()), **arguments}
    with pytest.raises(ValueError, match=message):
        restore(**arguments)


def test_other_scheduler_is_refused(restore):
    from diffusers import DDIMScheduler

    restore.scheduler = DDIMScheduler.from_config(restore.scheduler.config)
    with pytest.raises(ValueError, match="`scheduler` must be a DDPMFacesScheduler, got DDIMScheduler"):
        restore(a_photo(), Inpaint(a_mask()))


def test_number_of_prompts():
    restore = DDPMFacesRestorePipeline.from_pipe(a_prompt_model())
    with pytest.raises(ValueError, match="one text, or one for each of the 3 images, got 2"):
        restore([a_photo()] * 3, Inpaint(a_mask()), prompt=["a woman", "a man"])
    with pytest.raises(ValueError, match="`prompt_embeds` must be one text, or one for each of the 3 images, got 2"):
        restore([a_photo()] * 3, Inpaint(a_mask()), prompt_embeds=torch.zeros(2, restore.unet.config.text_embed_dim))


CALL = """
import torch
mask = torch.zeros(16, 16)
mask[4:12, 4:12] = 1
pipeline.set_progress_bar_config(disable=True)
operator = pipeline.operators.Inpaint(mask) if mask is not None else None
y = torch.zeros(1, 3, 16, 16)
result = pipeline(y, operator, 0.0, 3, 1, torch.Generator().manual_seed(0), "pt").images.tolist()
"""
WITH = "from ddpm_faces import DDPMFacesRestorePipeline\npipeline = DDPMFacesRestorePipeline.from_pretrained(source)"
WITHOUT = """
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(source, custom_pipeline="restoration_ddpm_faces", trust_remote_code=True)
"""


def test_it_works_with_and_without_the_package(client, bare_client, restore, tmp_path):
    restore.save_pretrained(tmp_path)
    mask = torch.zeros(16, 16)
    mask[4:12, 4:12] = 1
    expected = restore(torch.zeros(1, 3, 16, 16), Inpaint(mask), 0.0, 3, 1, generators(1)[0], "pt").images
    for who, load in ((client, WITH), (bare_client, WITHOUT)):
        outcome = who.run(load + CALL, source=str(tmp_path))
        assert outcome.error is None, outcome.output
        torch.testing.assert_close(torch.tensor(outcome.value), expected)
    again = DDPMFacesPipeline.from_pretrained(tmp_path)
    assert type(DDPMFacesPipeline.from_pipe(restore)) is type(again) is DDPMFacesPipeline


def test_it_loads_from_the_hub(server, client, bare_client, restore, tmp_path):
    restore.save_pretrained(tmp_path)
    server.put("models", "owner/restore", {str(path.relative_to(tmp_path)): path.read_bytes()
                                           for path in tmp_path.rglob("*") if path.is_file()})  # fmt: skip
    found = []
    for who, load in ((client, WITH), (bare_client, WITHOUT)):
        outcome = who.run(load + CALL, source="owner/restore")
        assert outcome.error is None, outcome.output
        found.append(outcome.value)
    assert found[0] == found[1]
