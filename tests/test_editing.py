"""Inversion and changes of faces."""

import math

import pytest
import torch
from conftest import tiny_unet
from PIL import Image
from test_prompts import a_prompt_model
from test_restoration import GaussianFaces, a_photo, generators

from ddpm_faces import DDPMFacesEditPipeline, DDPMFacesScheduler
from ddpm_faces.editing_ddpm_faces import TOLERANCE
from ddpm_faces.pipeline_ddpm_faces import Condition


@pytest.fixture
def edit(pipeline) -> DDPMFacesEditPipeline:
    edit = DDPMFacesEditPipeline.from_pipe(pipeline)
    edit.set_progress_bar_config(disable=True)
    return edit


@pytest.fixture
def with_prompts() -> DDPMFacesEditPipeline:
    edit = DDPMFacesEditPipeline.from_pipe(a_prompt_model())
    edit.set_progress_bar_config(disable=True)
    return edit


def some_faces(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("num_steps", [None, 12])
def test_inversion_is_exact(edit, strength, num_steps):
    faces = some_faces()
    latents = edit.invert(faces, strength=strength, num_inference_steps=num_steps)
    again = edit.reconstruct(latents, strength=strength, num_inference_steps=num_steps, output_type="latent").images
    torch.testing.assert_close(again, faces, atol=2e-3, rtol=0)
    assert (latents - faces).abs().mean() > 0.01


@pytest.mark.parametrize("num_steps", [4, 10])
def test_inversion_of_few_steps_converges(num_steps):
    """The model is linear, so the exact solution is known. Substitution alone would diverge."""
    model = GaussianFaces()
    edit = DDPMFacesEditPipeline(model.restore.unet, model.scheduler)
    edit.predict = model.predict
    edit.set_progress_bar_config(disable=True)
    faces = torch.cat([model.draw(seed) for seed in range(2)]).float()
    latents = edit.invert(faces, num_inference_steps=num_steps)
    levels = edit._levels(1.0, num_steps)
    state, largest = faces.double().flatten(1) @ model.axes, 0.0
    for level, following in [*zip(levels[:-1], levels[1:], strict=True)][::-1]:
        ratio, shrink = following.sigma / level.sigma, model.variances / (model.variances + level.sigma**2)
        state = state / (ratio + (1 - ratio) * shrink)
        largest = max(largest, (shrink * (1 - ratio) / ratio).max().item())
    assert largest > 1
    expected = (levels[0].signal * state @ model.axes.T).view_as(faces)
    torch.testing.assert_close(latents.double(), expected, rtol=0, atol=2e-3)


def test_a_solved_step_leads_to_its_target():
    """Even where substitution would diverge."""
    model = GaussianFaces()
    edit = DDPMFacesEditPipeline(model.restore.unet, model.scheduler)
    edit.predict = model.predict
    target = torch.cat([model.draw(seed) for seed in range(2)]).float()
    levels = edit._levels(1.0, 6)
    for level, following in [*zip(levels[:-1], levels[1:], strict=True)][::-1]:
        ratio = following.sigma / level.sigma
        state = edit._solve(target, level, ratio, Condition())
        predicted = edit._denoised(state, level, Condition())
        assert (predicted + ratio * (state - predicted) - target).abs().max() < TOLERANCE * 1.01
        target = state


def test_reconstruction_is_that_of_the_sampler(edit):
    """The steps are those of DDIM: the sampler of the pipeline, at the same timesteps, makes the same image."""
    latents = torch.randn(1, 3, 16, 16, generator=generators(1)[0])
    levels = edit._levels(1.0, None)
    scheduler = edit._scheduler_with({"algorithm": "ddim"})
    scheduler.set_timesteps(timesteps=[level.timestep for level in levels])
    sample = latents
    for t in scheduler.timesteps[:-1]:
        sample = scheduler.step(edit.predict(sample, t), t, sample).prev_sample
    expected = sample / levels[-1].signal
    torch.testing.assert_close(edit.reconstruct(latents, output_type="latent").images, expected, atol=1e-4, rtol=1e-4)


def test_inversion_with_a_prompt(with_prompts):
    faces = some_faces()
    latents = with_prompts.invert(faces, ["a woman", "an older man"])
    again = with_prompts.reconstruct(latents, ["a woman", "an older man"], output_type="latent", guidance_scale=1.0)
    torch.testing.assert_close(again.images, faces, atol=2e-3, rtol=0)
    assert not torch.allclose(with_prompts.invert(faces, "a woman")[1], latents[1])


def test_callbacks_see_all_steps_and_can_replace_the_image(edit):
    faces, seen = some_faces(), []

    def record(pipeline, i, t, tensors):
        seen.append((i, t, pipeline.num_timesteps))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == pipeline.num_timesteps - 1 else None

    blank = edit(faces, strength=0.5, num_inference_steps=6, output_type="latent", callback_on_step_end=record)
    assert torch.equal(blank.images, torch.zeros_like(faces))
    count = len(seen)
    assert [(i, total) for i, _, total in seen] == [(i, count) for i in range(count)]
    noisier, cleaner = [t for _, t, _ in seen[: count // 2]], [t for _, t, _ in seen[count // 2 :]]
    assert noisier == sorted(noisier)
    assert cleaner == sorted(noisier, reverse=True)[1:] + cleaner[-1:]

    seen.clear()
    latents = edit.invert(faces, num_inference_steps=6, callback_on_step_end=lambda *step: record(*step) and None)
    edit.reconstruct(latents, num_inference_steps=6, callback_on_step_end=lambda *step: record(*step) and None)
    assert [i for i, _, _ in seen] == [*range(len(seen) // 2)] * 2


def test_changes_of_a_model_with_classes():
    edit = DDPMFacesEditPipeline(tiny_unet(num_class_embeds=3), DDPMFacesScheduler(num_train_timesteps=20))
    edit.set_progress_bar_config(disable=True)
    faces = some_faces()
    with pytest.raises(ValueError, match="`class_labels` must be given"):
        edit(faces)
    same = edit(faces, output_type="latent", class_labels=[0, 2]).images
    torch.testing.assert_close(same, faces, atol=2e-3, rtol=0)
    other = edit(faces, output_type="latent", class_labels=[0, 1], source_class_labels=[0, 2]).images
    torch.testing.assert_close(other[:1], faces[:1], atol=2e-3, rtol=0)
    assert (other[1] - faces[1]).abs().max() > 0.01
    latents = edit.invert(faces, class_labels=[0, 2])
    again = edit.reconstruct(latents, output_type="latent", class_labels=[0, 2]).images
    torch.testing.assert_close(again, faces, atol=2e-3, rtol=0)


def test_classes_are_guided_from_one_to_the_other():
    """The prediction is D_s + w (D_t - D_s), of which inversion under the source class undoes the first part."""
    torch.manual_seed(0)
    unet = tiny_unet(num_class_embeds=3, null_class=True)
    edit = DDPMFacesEditPipeline(unet, DDPMFacesScheduler(num_train_timesteps=20))
    edit.set_progress_bar_config(disable=True)
    faces, seen = some_faces(), []
    arguments = {"guidance_scale": 3.0, "output_type": "latent"}
    same = edit(faces, class_labels=[0, 2], **arguments).images
    torch.testing.assert_close(same, faces, atol=2e-3, rtol=0)
    unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    edit(faces, class_labels=[1, 2], source_class_labels=[0, 2], **arguments)
    assert seen[0] == [0, 2]
    assert seen[-1] == [1, 2, 0, 2]


def test_only_the_difference_of_the_prompts_changes_the_face(with_prompts):
    faces = some_faces()
    arguments = {"output_type": "latent", "guidance_scale": 1.0}
    for scale in (1.0, 4.0):
        same = with_prompts(faces, "a woman", "a woman", output_type="latent", guidance_scale=scale).images
        torch.testing.assert_close(same, faces, atol=2e-3, rtol=0)
    other = with_prompts(faces, "an older man", "a woman", **arguments).images
    more = with_prompts(faces, "an older man", "a woman", **{**arguments, "guidance_scale": 3.0}).images
    less = with_prompts(faces, "an older man", "a woman", strength=0.2, **arguments).images
    changes = [(result - faces).abs().mean() for result in (less, other, more)]
    assert 1e-3 < changes[0] < changes[1] < changes[2]


def test_noise_gives_new_answers(edit):
    face = some_faces(1)
    images = [
        edit(face, strength=0.5, method="noise", generator=torch.Generator().manual_seed(seed), output_type="latent")
        for seed in (1, 1, 2)
    ]
    first, same, other = (output.images for output in images)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    weak = edit(face, strength=0.05, method="noise", generator=generators(1)[0], output_type="latent").images
    assert (weak - face).abs().mean() < (first - face).abs().mean() / 2


@pytest.mark.parametrize("strength", [0.01, 0.6])
def test_no_noise_is_left(edit, strength):
    """A model that knows a single image makes exactly this image of any noise."""

    def predict(sample, timestep, *_):
        bar = edit.scheduler.alphas_cumprod[timestep]
        return (sample - bar.sqrt() * 0.3) / (1 - bar).sqrt()

    edit.predict = predict
    images = edit(
        some_faces(), strength=strength, method="noise", generator=generators(2), output_type="latent"
    ).images
    torch.testing.assert_close(images, torch.full_like(images, 0.3), atol=1e-5, rtol=0)


def test_photos_go_in_and_come_out(edit):
    images = edit([a_photo(), a_photo()], strength=0.2).images
    assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in images)


def test_a_network_that_is_too_steep_for_the_steps(edit):
    edit.predict = lambda sample, *_: (1e4 * sample).sin()
    with pytest.raises(ValueError, match="`num_inference_steps` is too small: the inversion of a step has not"):
        edit.invert(some_faces(), num_inference_steps=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0}, "`strength` must be a number above 0 and at most 1, got 0"),
        ({"strength": math.nan}, "got nan"),
        ({"method": "magic"}, "`method` must be one of 'inversion', 'noise', got 'magic'"),
        ({"method": "noise", "source_prompt": "a woman"}, "`source_prompt` must be None for the method 'noise'"),
        ({"method": "noise", "source_class_labels": [0, 0]}, "`source_class_labels` must be None for the method"),
        ({"class_labels": [0, 0]}, "this model has no classes"),
        ({"method": "noise", "generator": generators(2)}, "one generator per image"),
        ({"num_inference_steps": 21}, "`num_inference_steps` must be from 1 to 20"),
        ({"prompt": "a woman"}, "`prompt` must be None: this model was not trained with texts"),
        ({"source_prompt": "a woman"}, "`source_prompt` must be None: this model was not trained with texts"),
        ({"source_class_labels": [0]}, "`source_class_labels` must be None: this model has no classes"),
        ({"guidance_scale": 2.0}, "`guidance_scale` must be 1"),
        ({"image": a_photo(8)}, "must be of 16x16 pixels"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
    ],
)
def test_bad_input(edit, arguments, message):
    with pytest.raises(ValueError, match=message):
        edit(**{"image": a_photo(), **arguments})


def test_latents_of_another_shape(edit):
    with pytest.raises(ValueError, match=r"`latents` must be of shape \(batch, 3, 16, 16\)"):
        edit.reconstruct(torch.zeros(1, 3, 8, 8))


CALL = """
import torch
pipeline.set_progress_bar_config(disable=True)
result = pipeline.invert(torch.linspace(-1, 1, 768).view(1, 3, 16, 16)).tolist()
"""
WITH = "from ddpm_faces import DDPMFacesEditPipeline\npipeline = DDPMFacesEditPipeline.from_pretrained(source)"
WITHOUT = """
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(source, custom_pipeline="editing_ddpm_faces", trust_remote_code=True)
"""


def test_it_works_with_and_without_the_package(client, bare_client, edit, tmp_path):
    edit.save_pretrained(tmp_path)
    expected = edit.invert(torch.linspace(-1, 1, 768).view(1, 3, 16, 16))
    for who, load in ((client, WITH), (bare_client, WITHOUT)):
        outcome = who.run(load + CALL, source=str(tmp_path))
        assert outcome.error is None, outcome.output
        torch.testing.assert_close(torch.tensor(outcome.value), expected)
