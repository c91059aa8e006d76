import json
import re
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from safetensors.torch import load_file

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler
from ddpm_faces.evaluation.samples import Generated
from ddpm_faces.generation import Recipe
from ddpm_faces.pipeline_ddpm_faces import Condition, Guidance
from ddpm_faces.solvers import fast_solver


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def values(pipeline) -> tuple[int, float]:
    return pipeline.num_timesteps, pipeline.autoguidance_scale


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Output


def test_equals_diffusers_pipeline_with_the_same_components():
    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 8), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    theirs = quiet(DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20)))
    ours = quiet(DDPMFacesPipeline(unet, DDPMFacesScheduler(num_train_timesteps=20)))
    expected = theirs(2, torch.Generator().manual_seed(1), num_inference_steps=20, output_type="np").images
    actual = ours(2, generator=torch.Generator().manual_seed(1), output_type="np").images
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_diffusers_pipeline_runs_our_network():
    images = quiet(DDPMPipeline(tiny_unet(), DDIMScheduler(num_train_timesteps=20)))(2, num_inference_steps=4).images
    assert [image.size for image in images] == [(16, 16)] * 2


def test_output_types_show_the_same_image(pipeline):
    def generate(output_type):
        return pipeline(2, generator=torch.Generator().manual_seed(0), output_type=output_type).images

    latent, pt, array, pil = (generate(output_type) for output_type in ("latent", "pt", "np", "pil"))
    assert latent.shape == pt.shape == (2, 3, 16, 16)
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in pil)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in pil]), (array * 255).round())
    assert torch.equal(
        pipeline(2, generator=torch.Generator().manual_seed(0), output_type="pt", return_dict=False)[0], pt
    )


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_other_channels(channels, mode):
    unet = tiny_unet(in_channels=channels, out_channels=channels)
    image = quiet(DDPMFacesPipeline(unet, DDPMFacesScheduler(num_train_timesteps=3)))().images[0]
    assert (image.mode, image.size) == (mode, (16, 16))


def test_non_square():
    pipeline = quiet(DDPMFacesPipeline(tiny_unet(sample_size=(16, 24)), DDPMFacesScheduler(num_train_timesteps=3)))
    assert pipeline(output_type="pt").images.shape == (1, 3, 16, 24)
    assert pipeline().images[0].size == (24, 16)


def test_default_number_of_steps_is_that_of_the_scheduler(pipeline):
    seen = []
    pipeline(callback_on_step_end=lambda pipe, i, t, tensors: seen.append((i, int(t))))
    assert seen == [(i, 19 - i) for i in range(20)]


# Presets


PRESETS = {
    "fast": {"algorithm": "dpmsolver++", "timestep_spacing": "logsnr", "num_inference_steps": 6, "sigma_min": 0.1},
    "draft": {"algorithm": "ddim", "num_inference_steps": 3},
}


def pixels(pipeline, *arguments, **settings):
    return pipeline(2, *arguments, generator=generators(0, 1), output_type="pt", **settings).images


def test_presets_choose_scheduler_and_steps(pipeline):
    schedule = pipeline.scheduler.config
    exact = pixels(pipeline)
    fast = DDPMFacesScheduler.from_config(schedule, algorithm="dpmsolver++", timestep_spacing="logsnr", sigma_min=0.1)
    draft = DDPMFacesScheduler.from_config(schedule, algorithm="ddim")
    pipeline.set_presets(PRESETS)
    assert list(pipeline.presets) == ["exact", "fast", "draft"]
    assert torch.equal(pixels(pipeline), exact)  # no default
    pipeline.set_presets(PRESETS, "fast")
    expected = {
        "fast": pixels(quiet(DDPMFacesPipeline(pipeline.unet, fast)), 6),
        "draft": pixels(quiet(DDPMFacesPipeline(pipeline.unet, draft)), 3),
        "exact": exact,
        None: pixels(quiet(DDPMFacesPipeline(pipeline.unet, fast)), 6),
    }
    for preset, images in expected.items():
        assert torch.equal(pixels(pipeline, preset=preset), images)
    # A number of steps: of the preset, or else of the fast solver, unless all are asked for.
    assert torch.equal(pixels(pipeline, 4, preset="draft"), pixels(quiet(DDPMFacesPipeline(pipeline.unet, draft)), 4))
    assert torch.equal(pixels(pipeline, 4), pixels(quiet(DDPMFacesPipeline(pipeline.unet, fast)), 4))
    assert torch.equal(pixels(pipeline, 20), exact)


def test_fewer_steps_are_those_of_the_solver_without_any_preset(pipeline):
    solver = quiet(DDPMFacesPipeline(pipeline.unet, fast_solver(pipeline.scheduler)))
    assert torch.equal(pixels(pipeline, 5), pixels(solver, 5))
    ancestral = DDPMScheduler.from_config(pipeline.scheduler.config)
    other = quiet(DDPMFacesPipeline(pipeline.unet, ancestral))
    torch.testing.assert_close(pixels(pipeline, 5, preset="exact"), pixels(other, 5), atol=1e-5, rtol=0)


def test_presets_leave_another_scheduler_alone(pipeline):
    pipeline.set_presets(PRESETS, "fast")
    for scheduler in (
        DDIMScheduler.from_config(pipeline.scheduler.config),
        DDPMFacesScheduler.from_config(pipeline.scheduler.config, algorithm="ddim"),
    ):
        other = pipeline.with_scheduler(scheduler)
        other.set_progress_bar_config(disable=True)
        alone = quiet(DDPMFacesPipeline(pipeline.unet, scheduler))
        assert torch.equal(pixels(other), pixels(alone))
        assert torch.equal(pixels(other, 4), pixels(alone, 4))
        name = type(scheduler).__name__
        with pytest.raises(ValueError, match=f"`preset` 'fast' needs the scheduler .*, got {name}.*: give `num_inf"):
            other(preset="fast")


def test_preset_may_turn_guidance_off():
    torch.manual_seed(0)
    pipeline = quiet(DDPMFacesPipeline(tiny_unet(), DDPMFacesScheduler(num_train_timesteps=20)))
    pipeline.set_guide(a_guide(), 1.5)
    pipeline.set_presets(
        {"draft": {"num_inference_steps": 3, "autoguidance_scale": 1.0}, "fast": {"num_inference_steps": 3}}
    )
    plain = quiet(DDPMFacesPipeline(pipeline.unet, pipeline.scheduler))
    plain.set_presets({"fast": {"num_inference_steps": 3}})
    assert torch.equal(pixels(pipeline, preset="draft"), pixels(plain, preset="fast"))
    assert torch.equal(pixels(pipeline, preset="draft", autoguidance_scale=1.5), pixels(pipeline, preset="fast"))
    assert not torch.equal(pixels(pipeline, preset="draft"), pixels(pipeline, preset="fast"))
    pipeline.set_presets({"fast": {"num_inference_steps": 3, "autoguidance_scale": 1.2}}, "fast")
    alone = quiet(DDPMFacesPipeline(pipeline.unet, pipeline.scheduler, presets=pipeline.config.presets))
    with pytest.raises(ValueError, match="`autoguidance_scale` must be 1 for a model without a guide, got 1.2"):
        alone(preset="fast")


def test_callback_reads_the_steps_of_the_preset(pipeline):
    pipeline.set_presets(PRESETS, "fast")
    assert pipeline.num_timesteps == 6
    seen = set()
    pipeline(preset="draft", callback_on_step_end=lambda pipe, i, t, tensors: seen.add(pipe.num_timesteps))
    assert seen == {3}


def test_presets_travel(client, pipeline, tmp_path):
    """The same pixels with the package, without it, and after a copy; earlier versions cannot read the folder."""
    tuned = {"timesteps": [19, 11.5, 4], "weights": [[], [-0.3], [-0.2]]}
    pipeline.scheduler = DDPMFacesScheduler.from_config(pipeline.scheduler.config, tuned_steps={"3": tuned})
    pipeline.set_presets({**PRESETS, "tuned": {"algorithm": "dpmsolver++", "num_inference_steps": 3}}, "tuned")
    expected = pixels(pipeline)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_format_version"] == 4
    for script in (WITH_THE_PACKAGE, WITHOUT):
        outcome = client.run(script, folder=str(tmp_path))
        assert outcome.value == expected.tolist(), outcome.output
    loaded = quiet(DDPMFacesPipeline.from_pretrained(tmp_path))
    assert (loaded.config.default_preset, loaded.presets) == ("tuned", pipeline.presets)
    for copy in (DDPMFacesPipeline.from_pipe(loaded), loaded.with_scheduler(loaded.scheduler)):
        assert torch.equal(pixels(quiet(copy), preset="fast"), pixels(pipeline, preset="fast"))


def test_folder_without_presets_is_as_before(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_format_version"] == 1
    assert not {"presets", "default_preset"} & set(index)


@pytest.mark.parametrize(
    ("presets", "default", "message"),
    [
        ([], None, "`presets` must be a dictionary or None, got"),
        ({"exact": {"num_inference_steps": 3}}, None, "words other than 'exact' as names, got 'exact'"),
        ({"my fast": {"num_inference_steps": 3}}, None, "words other than 'exact' as names, got 'my fast'"),
        ({"fast": {}}, None, r"`presets\['fast'\]` must be a dictionary with `num_inference_steps`, got {}"),
        (
            {"fast": {"num_inference_steps": 21}},
            None,
            r"\['fast'\]\['num_inference_steps'\]` must be from 1 to 20, .*21",
        ),
        ({"fast": {"num_inference_steps": 2.5}}, None, r"\['num_inference_steps'\]` must be an integer"),
        ({"fast": {"num_inference_steps": 2, "order": 3}}, None, "may set num_inference_steps, .*, got 'order'"),
        ({"fast": {"num_inference_steps": 2, "algorithm": "euler"}}, None, "`algorithm` must be one of .*got 'euler'"),
        (
            {"fast": {"num_inference_steps": 2, "autoguidance_scale": -1}},
            None,
            "`autoguidance_scale` must be a number",
        ),
        ({"fast": {"num_inference_steps": 2}}, "quick", "`default_preset` must be one of exact, fast, got 'quick'"),
    ],
)
def test_bad_presets_are_named(pipeline, presets, default, message):
    with pytest.raises(ValueError, match=message):
        pipeline.set_presets(presets, default)
    with pytest.raises(ValueError, match=message):
        DDPMFacesPipeline(pipeline.unet, pipeline.scheduler, presets=presets, default_preset=default)


def test_unknown_preset_is_refused_with_those_there_are(pipeline):
    pipeline.set_presets(PRESETS)
    with pytest.raises(ValueError, match="`preset` must be one of exact, fast, draft, got 'quick'"):
        pipeline(preset="quick")
    with pytest.raises(ValueError, match="`num_inference_steps` must be from 1 to 20, .* got 21"):
        pipeline(preset="fast", num_inference_steps=21)


# Speed


@pytest.mark.parametrize("has_bf16", [True, False])
def test_optimized_pipeline_makes_the_same_faces(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16, raising=False)
    torch.manual_seed(0)
    pipeline = quiet(DDPMFacesPipeline(tiny_unet(), DDPMFacesScheduler(num_train_timesteps=20)))
    pipeline.set_guide(a_guide(), 1.5)
    before = pixels(pipeline, 5)
    assert pipeline.optimize() is pipeline
    for network in (pipeline.unet, pipeline.guide):
        assert network.dtype == (torch.bfloat16 if has_bf16 else torch.float32)
        assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pixels(pipeline, 5), before, atol=0.1 if has_bf16 else 1e-4, rtol=0)


def test_cpu_without_a_way_to_tell_keeps_float32(monkeypatch, pipeline):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert pipeline.optimize().unet.dtype == torch.float32


def limit(unet, capacity: int) -> list[int]:
    """Let a network fail, as for lack of memory, on batches above `capacity`; return the list of its batch sizes."""
    forward, sizes = unet.forward, []

    def limited(sample, *args, **kwargs):
        sizes.append(len(sample))
        if len(sample) > capacity:
            raise torch.OutOfMemoryError("no memory")
        return forward(sample, *args, **kwargs)

    unet.forward = limited
    return sizes


@pytest.mark.parametrize(("capacity", "sizes"), [(99, [4, 4, 1] * 2), (2, [4, 2, 2, 2, 2, 1] + [2, 2, 2, 2, 1])])
def test_batches_of_any_size_fit_into_memory(monkeypatch, capacity, sizes):
    pipeline = quiet(DDPMFacesPipeline(tiny_unet(num_class_embeds=9), DDPMFacesScheduler(num_train_timesteps=2)))

    def generate():
        labels = list(range(9))
        return pipeline(9, generator=generators(*labels), class_labels=labels, output_type="pt").images

    expected = generate()
    monkeypatch.setattr("ddpm_faces.pipeline_ddpm_faces.MAX_CPU_PIXELS", 4 * 16 * 16)
    actual_sizes = limit(pipeline.unet, capacity)
    torch.testing.assert_close(generate(), expected)
    assert actual_sizes == sizes


def test_an_image_that_does_not_fit_is_an_error():
    pipeline = quiet(DDPMFacesPipeline(tiny_unet(), DDPMFacesScheduler(num_train_timesteps=2)))
    sizes = limit(pipeline.unet, 0)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline(3)
    assert sizes == [3, 2, 1]


def test_prediction_is_guided_and_keeps_the_variance():
    torch.manual_seed(0)
    scheduler = DDPMFacesScheduler(20, variance_type="learned_range")
    pipeline = DDPMFacesPipeline(tiny_unet(out_channels=6), scheduler)
    pipeline.set_guide(DDPMFacesPipeline(tiny_unet(out_channels=6), scheduler), 1.5)
    x = torch.randn(2, 3, 16, 16)
    ours, worse = (network(x, 7).sample for network in (pipeline.unet, pipeline.guide))
    expected = torch.cat([1.5 * ours[:, :3] - 0.5 * worse[:, :3], ours[:, 3:]], dim=1)
    torch.testing.assert_close(pipeline.predict(x, 7, guidance=Guidance(autoguidance_scale=1.5)), expected)
    torch.testing.assert_close(pipeline.predict(x, 7), ours)


# Reproducibility


def test_image_depends_only_on_its_generator(pipeline):
    together = pipeline(3, generator=generators(5, 6, 7), output_type="pt").images
    alone = pipeline(1, generator=generators(7), output_type="pt").images
    swapped = pipeline(2, generator=generators(7, 5), output_type="pt").images
    torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[[2, 0]], swapped, atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=0.01)


IMAGES = """
generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
result = pipeline(2, generator=generators, output_type="pt").images.tolist()
"""
WITH_THE_PACKAGE = "pipeline = DDPMFacesPipeline.from_pretrained(folder)\n" + IMAGES
WITHOUT = "pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)\n" + IMAGES


def test_same_pixels_from_a_saved_model_in_a_fresh_process(client, pipeline, tmp_path):
    expected = pipeline(2, generator=generators(0, 1), output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    outcome = client.run(WITH_THE_PACKAGE, folder=str(tmp_path))
    assert outcome.value == expected.tolist(), outcome.output
    assert not list(tmp_path.rglob("*.bin"))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_global_random_state_is_untouched_with_a_generator(pipeline):
    before = torch.get_rng_state()
    pipeline(2, generator=generators(0, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_given_latents_are_the_start(pipeline):
    latents = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    a = pipeline(2, latents=latents, generator=torch.Generator().manual_seed(0), output_type="pt").images
    b = pipeline(2, latents=latents.clone(), generator=torch.Generator().manual_seed(0), output_type="pt").images
    c = pipeline(2, latents=-latents, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(a, b)
    assert not torch.allclose(a, c, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(pipeline, tmp_path, dtype):
    expected = pipeline(2, generator=generators(0, 1), output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    half = quiet(DDPMFacesPipeline.from_pretrained(tmp_path, dtype=dtype))
    assert half.unet.dtype == dtype
    actual = half(2, generator=generators(0, 1), output_type="pt").images
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().mean() < 0.02
    assert half(output_type="pil").images[0].size == (16, 16)
    assert half(output_type="np").images.dtype == np.float32


# Schedulers


def test_other_schedulers_scale_and_step_as_in_diffusers(pipeline):
    """Euler starts from noise with standard deviation sigma_max, and scales the input of the network."""
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    inputs = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    pipeline(64, num_inference_steps=5)
    assert inputs[0].std().item() == pytest.approx(1.0, abs=0.05)


def test_eta_reaches_ddim(pipeline):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

    def images(eta):
        return pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=5, eta=eta, output_type="pt")[
            0
        ]

    assert torch.equal(images(0.0), images(0.0))
    assert not torch.allclose(images(0.0), images(1.0), atol=0.01)


def test_zero_snr_is_refused_where_it_fails():
    scheduler = DDPMFacesScheduler(20, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    pipeline = quiet(DDPMFacesPipeline(tiny_unet(), scheduler))
    assert torch.isfinite(pipeline(output_type="pt").images).all()
    pipeline.scheduler = PNDMScheduler.from_config(scheduler.config, trained_betas=scheduler.betas.tolist())
    with pytest.raises(ValueError, match="PNDMScheduler divides by the signal"):
        pipeline()


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(20, trained_betas=[*[0.1] * 19, 1.0]),
        DDIMScheduler(20, rescale_betas_zero_snr=True),
        DDPMScheduler(20, rescale_betas_zero_snr=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_zero_snr_is_refused_for_epsilon_with_any_scheduler(pipeline, scheduler):
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match="zero terminal SNR: the last timestep is pure noise, .* 'epsilon' cannot"):
        pipeline()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_learned_variance(prediction_type, channels):
    """Schedulers without a learned variance give the same images as with a network that predicts none."""
    scheduler = DDPMFacesScheduler(20, variance_type="learned_range", prediction_type=prediction_type)
    unet = tiny_unet(in_channels=channels, out_channels=2 * channels)
    plain = tiny_unet(in_channels=channels, out_channels=channels)
    state = unet.state_dict()
    plain.load_state_dict({**state, **{key: state[key][:channels] for key in ("conv_out.weight", "conv_out.bias")}})
    pipeline = quiet(DDPMFacesPipeline(unet, scheduler))
    assert torch.isfinite(pipeline(output_type="pt").images).all()
    solvers = (
        fast_solver(scheduler),
        *(
            cls.from_config(scheduler.config)
            for cls in (UniPCMultistepScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler)
        ),
    )
    for solver in solvers:
        images = [
            quiet(DDPMFacesPipeline(network, solver))(2, 4, torch.Generator().manual_seed(0), output_type="pt").images
            for network in (unet, plain)
        ]
        torch.testing.assert_close(*images)
    assert solvers[-1].config.variance_type == "learned_range"  # a call does not change its scheduler


# Callback


def test_callback_sees_and_replaces_latents(pipeline):
    def blacken(pipe, step, timestep, tensors):
        assert tensors["latents"].shape == (1, 3, 16, 16)
        return {"latents": torch.full_like(tensors["latents"], -1.0)} if step == 19 else tensors

    assert not np.asarray(pipeline(callback_on_step_end=blacken).images[0]).any()


def test_callback_reads_the_values_of_its_call(pipeline):
    pipeline.set_guide(a_guide(), autoguidance_scale=1.25)
    seen = []
    for scale in (1.5, None):
        pipeline(1, 4, autoguidance_scale=scale, callback_on_step_end=lambda pipe, *_: seen.append(values(pipe)) or {})
    assert seen == [(4, 1.5)] * 4 + [(4, 1.25)] * 4
    assert values(pipeline) == (20, 1.25)  # the defaults, outside of a call


def test_callback_reads_the_steps_that_the_scheduler_takes(pipeline):
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    seen = []
    pipeline(1, 4, callback_on_step_end=lambda pipe, i, *_: seen.append((i, pipe.num_timesteps)) or {})
    assert seen == [(i, 7) for i in range(7)]  # second order: two evaluations per step, except for the last


def test_values_of_a_call_are_not_visible_in_other_calls(pipeline):
    """They are not visible in another thread, in another pipeline, in an outer call, or afterwards."""
    other, seen, barrier = pipeline.with_scheduler(pipeline.scheduler), {}, threading.Barrier(2, timeout=60)

    def inside(pipe, i, *_):
        if i == 0 and pipe.num_timesteps == 6:
            quiet(pipe)(1, 3)
            seen["around"] = pipe.num_timesteps
            seen["other"] = other.num_timesteps
        barrier.wait()
        seen.setdefault(threading.current_thread().name, set()).add(pipe.num_timesteps)
        barrier.wait()
        return {}

    def call(steps):
        # The two calls take turns; the longer one then continues alone.
        pipeline(1, steps, callback_on_step_end=lambda pipe, i, *rest: inside(pipe, i, *rest) if i < 4 else {})

    threads = [threading.Thread(target=call, args=(steps,), name=str(steps)) for steps in (6, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"around": 6, "other": 20, "6": {6}, "4": {4}}

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pipeline(1, 2, callback_on_step_end=fail)
    assert pipeline.num_timesteps == 20


# Classes


def test_class_labels():
    unet = tiny_unet(num_class_embeds=3)
    pipeline = quiet(DDPMFacesPipeline(unet, DDPMFacesScheduler(num_train_timesteps=20)))

    def images(labels):
        return pipeline(2, generator=generators(0, 0), class_labels=labels, output_type="pt").images

    assert torch.equal(images([1, 2]), images(torch.tensor([1, 2])))
    assert not torch.allclose(*images([1, 2]), atol=1e-3)
    for labels, message in [(None, "has 3 classes"), ([1], "2 .* integers"), ([0, 3], "from 0 to 2")]:
        with pytest.raises(ValueError, match=message):
            images(labels)


# Guidance


def a_guide(**overrides) -> DDPMFacesPipeline:
    """A narrower network with the same noise schedule."""
    torch.manual_seed(1)
    unet = tiny_unet(**{"block_out_channels": (4, 8), **overrides})
    return DDPMFacesPipeline(unet, DDPMFacesScheduler(num_train_timesteps=20))


class Stub(torch.nn.Module):
    dtype, device = torch.float32, torch.device("cpu")


class Combined(Stub):
    """A single network that combines two by eq. 3 of https://huggingface.co/papers/2406.02507."""

    def __init__(self, unet, guide, scale, interval=(0, 19)):
        super().__init__()
        self.unet, self.guide, self.scale, self.interval = unet, guide, scale, interval
        self.config = unet.config

    def forward(self, x, t, **kwargs):
        if not self.interval[0] <= t <= self.interval[1]:
            return self.unet(x, t, **kwargs)
        better, worse = self.unet(x, t, **kwargs).sample, self.guide(x, t).sample
        better[:, :3] = self.scale * better[:, :3] + (1 - self.scale) * worse[:, :3]
        return UNet2DOutput(sample=better)


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("learns_variance", [False, True])
@pytest.mark.parametrize("scale", [1.5, 0.3])
def test_guidance_extrapolates_from_the_guide(learns_variance, scale, is_fast):
    unet = tiny_unet(out_channels=6 if learns_variance else 3)
    scheduler = DDPMFacesScheduler(20, variance_type="learned_range" if learns_variance else "fixed_small")
    pipeline = quiet(DDPMFacesPipeline(unet, fast_solver(scheduler) if is_fast else scheduler))
    pipeline.set_guide(a_guide(), autoguidance_scale=scale)
    expected = quiet(DDPMFacesPipeline(unet, pipeline.scheduler))
    expected.unet = Combined(unet, pipeline.guide, scale)
    images = pipeline(2, 6, generators(0, 1), output_type="pt").images
    torch.testing.assert_close(images, expected(2, 6, generators(0, 1), output_type="pt").images, atol=1e-5, rtol=0)
    alone = pipeline(2, 6, generators(0, 1), output_type="pt", autoguidance_scale=1).images
    expected.unet = unet
    assert torch.equal(alone, expected(2, 6, generators(0, 1), output_type="pt").images)
    assert not torch.allclose(images, alone, atol=0.01)


@pytest.mark.parametrize("interval", [(5, 14), [0, 9], (19, 19)])
def test_guide_is_used_within_its_interval(pipeline, interval):
    pipeline.set_guide(a_guide(), 1.5, interval)
    expected = quiet(DDPMFacesPipeline(pipeline.unet, pipeline.scheduler))
    expected.unet = Combined(pipeline.unet, pipeline.guide, 1.5, interval)
    evaluations = []
    hook = pipeline.guide.register_forward_pre_hook(lambda module, arguments: evaluations.append(int(arguments[1])))
    images = pipeline(2, generator=generators(0, 1), output_type="pt").images
    hook.remove()
    assert evaluations == list(range(interval[1], interval[0] - 1, -1))  # nowhere else
    torch.testing.assert_close(
        images, expected(2, generator=generators(0, 1), output_type="pt").images, atol=1e-5, rtol=0
    )

    # Each image of a batch may have its own timestep.
    timesteps = torch.tensor([interval[0], 0, 10, interval[1]])
    x = torch.randn(4, *pipeline.image_shape)
    together = pipeline.predict(x, timesteps, guidance=Guidance(1.0, 1.5))
    single = torch.cat([pipeline.predict(x[i : i + 1], timesteps[i], guidance=Guidance(1.0, 1.5)) for i in range(4)])
    torch.testing.assert_close(together, single, atol=1e-5, rtol=0)

    pipeline.set_guidance(autoguidance_scale=1.5)
    assert pipeline.config.guidance_interval is None
    assert not torch.allclose(pipeline(2, generator=generators(0, 1), output_type="pt").images, images)


def test_interval_of_a_preset(pipeline):
    pipeline.set_guide(a_guide(), 1.5, (5, 14))
    settings = {"num_inference_steps": 6, "algorithm": "dpmsolver++"}
    pipeline.set_presets({"late": {**settings, "guidance_interval": [0, 2]}, "middle": settings})
    images = {
        name: pipeline(2, generator=generators(0, 1), output_type="pt", preset=name).images
        for name in ("late", "middle")
    }
    assert not torch.allclose(images["late"], images["middle"])
    for name, interval in {"late": [0, 2], "middle": [5, 14]}.items():  # as the commands sample
        generated = Generated(pipeline, Recipe(2, preset=name).resolve(pipeline))
        expected = (images[name] * 255).round().to(torch.uint8)
        assert torch.equal(generated.batches(range(2)), expected)
        assert generated.provenance(2)["guidance_interval"] == interval
    pipeline.set_guidance(1.0, 1.5, (0, 2))
    assert torch.equal(
        images["late"], pipeline(2, generator=generators(0, 1), output_type="pt", preset="middle").images
    )
    with pytest.raises(ValueError, match=r"`presets\['late'\]`: `guidance_interval` must be .* got \[3, 2\]"):
        pipeline.set_presets({"late": {"num_inference_steps": 20, "guidance_interval": [3, 2]}})


def test_interval_is_saved_with_the_guide(bare_client, pipeline, tmp_path):
    pipeline.set_guide(a_guide(), 1.5, (5, 14))
    expected = pipeline(2, generator=generators(0, 1), output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_format_version"] == 4
    loaded = quiet(DDPMFacesPipeline.from_pretrained(tmp_path))
    assert loaded.config.guidance_interval == [5, 14]
    assert torch.equal(loaded(2, generator=generators(0, 1), output_type="pt").images, expected)
    copied = quiet(loaded.with_scheduler(loaded.scheduler))
    assert torch.equal(copied(2, generator=generators(0, 1), output_type="pt").images, expected)
    outcome = bare_client.run(WITHOUT, folder=str(tmp_path))
    assert outcome.value == expected.tolist(), outcome.output

    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("14\n", "20\n"))
    with pytest.raises(ValueError, match=r"`guidance_interval` must be two timesteps .* got \[5, 20\]"):
        DDPMFacesPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("interval", [(14, 5), (-1, 5), (5, 20), (5,), (1, 2, 3), (0.0, 5), (False, 5), 5, "05", {}])
def test_unsuitable_intervals_are_refused(pipeline, interval):
    kept = a_guide()
    pipeline.set_guide(kept, 1.25, (2, 3))
    message = rf"`guidance_interval` must be two timesteps from 0 to 19, .* got {re.escape(repr(interval))}\."
    with pytest.raises(ValueError, match=message):
        pipeline.set_guide(a_guide(), 1.5, interval)
    with pytest.raises(ValueError, match=message):
        pipeline.set_guidance(1.0, 1.5, interval)
    settings = pipeline.guide, pipeline.config.autoguidance_scale, pipeline.config.guidance_interval
    assert settings == (kept.unet, 1.25, [2, 3])


def test_interval_needs_a_guide(pipeline):
    for change in (
        lambda: pipeline.set_guide(None, 1.0, (2, 3)),
        lambda: pipeline.set_guidance(guidance_interval=(2, 3)),
        lambda: DDPMFacesPipeline(pipeline.unet, pipeline.scheduler, guidance_interval=(2, 3)),
    ):
        with pytest.raises(
            ValueError, match=r"`guidance_interval` must be None for a model without a guide.*\(2, 3\)"
        ):
            change()


def test_guide_alone_and_no_guide(pipeline):
    guide = a_guide()
    pipeline.set_guide(guide)
    of_guide = pipeline(2, generator=generators(0, 1), output_type="pt", autoguidance_scale=0).images
    expected = quiet(guide)(2, generator=generators(0, 1), output_type="pt").images
    torch.testing.assert_close(of_guide, expected, atol=1e-5, rtol=0)
    guide.unet.forward = None  # without guidance, the guide is not evaluated
    pipeline(2)


def test_guidance_leads_away_from_the_guides_mistakes():
    """In closed form: each network knows one image, and the result is extrapolated from both."""

    class OnePicture(Stub):
        """Predicts the noise in an image whose pixels are all `value`."""

        def __init__(self, value):
            super().__init__()
            self.value, self.config = value, tiny_unet().config

        def forward(self, x, t):
            alpha_bar = scheduler.alphas_cumprod[t]
            return UNet2DOutput(sample=(x - alpha_bar.sqrt() * self.value) / (1 - alpha_bar).sqrt())

    scheduler = DDPMFacesScheduler(20)
    pipeline = quiet(DDPMFacesPipeline(tiny_unet(), scheduler))
    pipeline.set_guide(a_guide(), autoguidance_scale=1.5)
    pipeline.unet, pipeline.guide = OnePicture(0.2), OnePicture(-0.2)
    images = pipeline(2, generator=generators(0, 1), output_type="latent").images
    torch.testing.assert_close(images, torch.full_like(images, 1.5 * 0.2 - 0.5 * -0.2), atol=1e-5, rtol=0)


def test_classes_of_a_guide():
    """A guide has as many classes as the network or none, as in classifier-free guidance."""
    pipeline = quiet(DDPMFacesPipeline(tiny_unet(num_class_embeds=2), DDPMFacesScheduler(20)))
    images = {}
    for classes in (None, 2):
        pipeline.set_guide(a_guide(num_class_embeds=classes), 1.5)
        images[classes] = pipeline(2, 3, generators(0, 0), output_type="pt", class_labels=[0, 1]).images
        assert not torch.allclose(*images[classes], atol=1e-3)
    assert not torch.allclose(images[None], images[2], atol=1e-3)
    with pytest.raises(ValueError, match="`guide` must have no classes or as many as this model, 2, got 3"):
        pipeline.set_guide(a_guide(num_class_embeds=3), 1.5)


# Classifier-free guidance


def a_class_model(**unet) -> DDPMFacesPipeline:
    torch.manual_seed(3)
    network = tiny_unet(num_class_embeds=2, null_class=True, **unet)
    return quiet(DDPMFacesPipeline(network, DDPMFacesScheduler(20)))


class ClassGuided(Stub):
    """The networks with all their guidance, one image at a time."""

    def __init__(self, unet, scale, guide=None, autoguidance_scale=1.0, interval=(0, 19)):
        super().__init__()
        self.unet, self.guide = unet, guide
        self.scale, self.autoguidance_scale, self.interval = scale, autoguidance_scale, interval
        self.config = unet.config

    def forward(self, sample, timestep, class_labels):
        outputs = []
        for x, label in zip(sample, class_labels, strict=True):
            own = self.unet(x[None], timestep, label[None]).sample
            output = own
            if self.interval[0] <= timestep <= self.interval[1]:
                output = own + (self.scale - 1) * (own - self.unet(x[None], timestep).sample)
                if self.guide is not None:
                    output = output + (self.autoguidance_scale - 1) * (own - self.guide(x[None], timestep).sample)
            outputs.append(output)
        return UNet2DOutput(torch.cat(outputs))


@pytest.mark.parametrize(
    ("scale", "autoguidance_scale", "interval"), [(3.0, None, None), (0.5, None, (5, 14)), (2.5, 1.5, (5, 14))]
)
def test_classifier_free_guidance(scale, autoguidance_scale, interval):
    pipeline = a_class_model()
    if autoguidance_scale is not None:
        pipeline.set_guide(a_guide(), autoguidance_scale)
    pipeline.set_guidance(1.0, autoguidance_scale or 1.0, interval)
    call = {"generator": generators(0, 1, 2), "output_type": "pt", "class_labels": [0, 1, 0]}
    expected = quiet(DDPMFacesPipeline(pipeline.unet, pipeline.scheduler))
    expected.unet = ClassGuided(pipeline.unet, scale, pipeline.guide, autoguidance_scale or 1.0, interval or (0, 19))
    batches = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, arguments: batches.append(len(arguments[0])))
    images = pipeline(3, guidance_scale=scale, **call).images
    hook.remove()
    low, high = interval or (0, 19)
    assert batches == [6 if low <= t <= high else 3 for t in reversed(range(20))]  # both halves in one batch
    call["generator"] = generators(0, 1, 2)
    torch.testing.assert_close(images, expected(3, **call).images, atol=1e-4, rtol=0)

    # Each image of a batch may have its own timestep.
    x, labels, timesteps = torch.randn(3, *pipeline.image_shape), torch.tensor([0, 1, 0]), torch.tensor([2, 9, 19])
    guidance = Guidance(scale, autoguidance_scale or 1.0)
    together = pipeline.predict(x, timesteps, Condition(labels), guidance)
    single = [pipeline.predict(x[i : i + 1], timesteps[i], Condition(labels[i : i + 1]), guidance) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(single), atol=1e-5, rtol=0)


def test_classes_may_be_left_out_with_a_null_class():
    """The images are those of the label after the last class, and there is nothing to guide."""
    pipeline = a_class_model()
    images = pipeline(2, generator=generators(0, 1), output_type="pt").images
    guided = pipeline(2, generator=generators(0, 1), output_type="pt", guidance_scale=3).images
    assert torch.equal(images, guided)
    x = torch.randn(2, *pipeline.image_shape)
    assert torch.equal(pipeline.predict(x, 5), pipeline.predict(x, 5, Condition(torch.tensor([2, 2]))))
    assert not torch.allclose(pipeline.predict(x, 5), pipeline.predict(x, 5, Condition(torch.tensor([0, 1]))))


def test_default_guidance_scale_travels(bare_client, tmp_path):
    pipeline = a_class_model()
    assert "guidance_scale" not in json.loads(pipeline.to_json_string())
    pipeline.set_guidance(guidance_scale=2.5)
    assert (pipeline.guidance_scale, pipeline.do_classifier_free_guidance) == (2.5, True)
    call = {"generator": generators(0, 1), "output_type": "pt", "class_labels": [0, 1]}
    expected = pipeline(2, **call).images
    call["generator"] = generators(0, 1)
    assert torch.equal(pipeline(2, guidance_scale=2.5, **call).images, expected)
    pipeline.set_presets({"plain": {"num_inference_steps": 20, "algorithm": "ddpm", "guidance_scale": 1.0}})
    assert pipeline.resolve_preset("plain").guidance.guidance_scale == 1.0
    pipeline.set_presets(None)
    pipeline.save_pretrained(tmp_path)
    assert DDPMFacesPipeline.from_pretrained(tmp_path).config.guidance_scale == 2.5
    outcome = bare_client.run(WITHOUT.replace("output_type", "class_labels=[0, 1], output_type"), folder=str(tmp_path))
    assert outcome.value == expected.tolist(), outcome.output

    seen = []

    def note(pipeline, i, t, values):
        seen.append((pipeline.guidance_scale, pipeline.autoguidance_scale, pipeline.do_classifier_free_guidance))
        return {}

    pipeline(1, 2, class_labels=[0], guidance_scale=1, callback_on_step_end=note)
    assert seen == [(1, 1.0, False)] * 2


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        (
            {},
            "`guidance_scale` must be 1 for this model, got 2: it knows neither classes nor texts. `autoguid",
        ),
        ({"num_class_embeds": 2}, "got 2: it was trained without `condition_dropout`"),
    ],
)
def test_classifier_free_guidance_needs_a_null_class(unet, message):
    pipeline = quiet(DDPMFacesPipeline(tiny_unet(**unet), DDPMFacesScheduler(20)))
    labels = [0] if unet else None
    with pytest.raises(ValueError, match=message):
        pipeline(1, class_labels=labels, guidance_scale=2)
    with pytest.raises(ValueError, match=message):
        pipeline.set_guidance(guidance_scale=2)
    for scale in (-1, float("nan"), float("inf"), "2", True):
        with pytest.raises(ValueError, match="`guidance_scale` must be a number of at least 0, got"):
            pipeline(1, class_labels=labels, guidance_scale=scale)


def test_guidance_of_earlier_formats_keeps_its_meaning(bare_client, pipeline, tmp_path):
    """Before format 4, `guidance_scale` was the scale of autoguidance."""
    pipeline.set_guide(a_guide(), 1.25)
    pipeline.set_presets({"fast": {"num_inference_steps": 20, "autoguidance_scale": 1.5}}, "fast")
    expected = pipeline(2, generator=generators(0, 1), output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    index["_format_version"] = 3
    index["guidance_scale"] = index.pop("autoguidance_scale")
    index["presets"]["fast"]["guidance_scale"] = index["presets"]["fast"].pop("autoguidance_scale")
    path.write_text(json.dumps(index))
    loaded = quiet(DDPMFacesPipeline.from_pretrained(tmp_path))
    assert (loaded.config.guidance_scale, loaded.config.autoguidance_scale) == (1.0, 1.25)
    assert loaded.presets["fast"]["autoguidance_scale"] == 1.5
    assert torch.equal(loaded(2, generator=generators(0, 1), output_type="pt").images, expected)
    outcome = bare_client.run(WITHOUT, folder=str(tmp_path))
    assert outcome.value == expected.tolist(), outcome.output


# Saving the guide


def test_guide_is_saved_with_the_pipeline(bare_client, pipeline, tmp_path):
    before = pipeline.to_json_string()
    pipeline.set_guide(a_guide(), autoguidance_scale=1.25)
    expected = pipeline(2, generator=generators(0, 1), output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_format_version"] == 4  # earlier versions of this package refuse this format with a message
    loaded = quiet(DDPMFacesPipeline.from_pretrained(tmp_path))
    assert loaded.config.autoguidance_scale == 1.25
    assert torch.equal(loaded(2, generator=generators(0, 1), output_type="pt").images, expected)
    outcome = bare_client.run(WITHOUT, folder=str(tmp_path))
    assert outcome.value == expected.tolist(), outcome.output

    loaded.set_guide(None)
    assert loaded.config.autoguidance_scale == 1
    without = json.loads(loaded.to_json_string())
    without.pop("_name_or_path")
    assert without == json.loads(before)  # the format that earlier versions load


@pytest.mark.parametrize(
    "publish", ["pipeline.push_to_hub('user/name')", "pipeline.save_pretrained(other, push_to_hub=True)"]
)
def test_publishing_without_the_package_says_what_to_install(bare_client, pipeline, tmp_path, publish):
    pipeline.save_pretrained(tmp_path / "model")
    paths = {"folder": str(tmp_path / "model"), "other": str(tmp_path / "other")}
    outcome = bare_client.run(WITHOUT + publish, **paths)
    assert outcome.kind == "ImportError", outcome.output
    assert "Publishing needs the ddpm-faces package, which is not installed: run `pip install .`" in outcome.error
    assert not (tmp_path / "other").exists()


def test_networks_are_kept_when_the_scheduler_is_replaced(pipeline):
    pipeline.set_guide(a_guide(), 1.5)
    fast = pipeline.with_scheduler(fast_solver(pipeline.scheduler))
    assert (fast.unet, fast.guide, fast.config.autoguidance_scale) == (pipeline.unet, pipeline.guide, 1.5)
    assert type(pipeline.scheduler) is DDPMFacesScheduler


@pytest.mark.parametrize(
    ("guide", "scale", "message"),
    [
        (lambda: a_guide(sample_size=32), 1.5, r"of images of the shape \(3, 16, 16\).* \(3, 32, 32\)"),
        (lambda: a_guide(in_channels=1, out_channels=1), 1.5, r"`guide` must be of images of .*\(1, 16, 16"),
        (lambda: a_guide(num_class_embeds=2), 1.5, "`guide` must have no classes or .*, None, got 2"),
        (lambda: a_guide().with_scheduler(DDPMFacesScheduler(10)), 1.5, "a `num_train_timesteps` of 20, got 10"),
        (lambda: a_guide().with_scheduler(DDPMFacesScheduler(20, beta_end=0.5)), 1.5, "with the same noise at each"),
        (
            lambda: a_guide().with_scheduler(DDPMFacesScheduler(20, prediction_type="v_prediction")), 1.5,
            "a `prediction_type` of 'epsilon', got 'v_prediction'",
        ),
        (lambda: tiny_unet(), 1.5, "`guide` must be a DDPMFacesPipeline or None, got DDPMFacesUNet"),
        (a_guide, -0.1, "`autoguidance_scale` must be a number of at least 0, got -0.1"),
        (a_guide, float("nan"), "`autoguidance_scale` must be a number of at least 0, got nan"),
        (a_guide, float("inf"), "`autoguidance_scale` must be a number of at least 0, got inf"),
        (a_guide, True, "`autoguidance_scale` must be a number of at least 0, got True"),
        (a_guide, "2", "`autoguidance_scale` must be a number of at least 0, got '2'"),
        (lambda: None, 1.5, "`autoguidance_scale` must be 1 for a model without a guide, got 1.5"),
    ],
)  # fmt: skip
def test_unsuitable_guides_are_refused(pipeline, guide, scale, message):
    kept = a_guide()
    pipeline.set_guide(kept, 1.25)
    with pytest.raises(ValueError, match=message):
        pipeline.set_guide(guide(), scale)
    assert (pipeline.guide, pipeline.config.autoguidance_scale) == (kept.unet, 1.25)


def test_guide_with_a_scheduler_without_betas_is_refused():
    pipelines = [a_guide().with_scheduler(FlowMatchEulerDiscreteScheduler(20)) for _ in range(2)]
    with pytest.raises(ValueError, match="with the same noise at each timestep"):
        pipelines[0].set_guide(pipelines[1], 1.5)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` .* got 0"),
        ({"num_inference_steps": 21}, "from 1 to 20.* got 21"),
        ({"num_inference_steps": 0}, "from 1 to 20.* got 0"),
        ({"num_inference_steps": 2.5}, "integer or None, got 2.5"),
        ({"batch_size": 3, "generator": generators(0, 1)}, "got 2 for a `batch_size` of 3"),
        ({"batch_size": 2, "generator": [generators(0)[0], None]}, "must be a torch.Generator, .* None"),
        ({"generator": 0}, "must be a torch.Generator, .* got 0"),
        ({"eta": 1.5}, r"`eta` must lie in \[0, 1\], got 1.5"),
        ({"latents": torch.zeros(1, 3, 16, 8)}, r"shape \(1, 3, 16, 16\), got \(1, 3, 16, 8\)"),
        ({"autoguidance_scale": 1.5}, "`autoguidance_scale` must be 1 for a model without a guide, got 1.5"),
        ({"autoguidance_scale": -1}, "`autoguidance_scale` must be a number of at least 0, got -1"),
        ({"output_type": "jpeg"}, "'pil', 'np', 'pt', 'latent', got 'jpeg'"),
        ({"class_labels": [0]}, "has no classes"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"got \['noise'\]"),
    ],
)
def test_bad_input(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


@pytest.mark.parametrize("weights", ["ema", "raw", None])
def test_pipeline_records_the_origin_of_its_weights(pipeline, tmp_path, weights):
    DDPMFacesPipeline(pipeline.unet, pipeline.scheduler, weights=weights).save_pretrained(tmp_path)
    assert DDPMFacesPipeline.from_pretrained(tmp_path).config.weights == weights


# Concurrent calls and shared networks


@pytest.mark.parametrize("make_scheduler", [lambda scheduler: scheduler, fast_solver], ids=["ddpm", "fast_solver"])
def test_threads_that_share_a_pipeline_get_the_images_of_their_seeds(pipeline, make_scheduler):
    pipeline.scheduler = make_scheduler(pipeline.scheduler)
    before = vars(pipeline.scheduler).copy()

    def images(steps: int) -> torch.Tensor:
        return pipeline(1, steps, generators(0), output_type="pt").images

    steps = [20, 10, 7, 4]
    expected, barrier, found = [images(n) for n in steps], threading.Barrier(len(steps)), {}

    def request(n: int) -> None:
        barrier.wait()
        found[n] = images(n)

    threads = [threading.Thread(target=request, args=(n,)) for n in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, image in zip(steps, expected, strict=True):
        torch.testing.assert_close(found[n], image)
    assert vars(pipeline.scheduler) == before


def test_sampling_from_a_network_in_training_mode_restores_the_mode():
    unet = tiny_unet(block_types=("conv",)).train()
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in unet.modules())
    unet.conv_in.eval()  # like a frozen part
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    pipeline = quiet(DDPMFacesPipeline(unet, DDPMFacesScheduler(num_train_timesteps=20)))
    together = pipeline(3, 5, generators(0, 1, 2), output_type="pt").images
    alone = pipeline(1, 5, generators(0), output_type="pt").images
    torch.testing.assert_close(together[:1], alone)
    assert unet.training
    assert unet.down_blocks.training
    assert not unet.conv_in.training
    torch.testing.assert_close(dict(unet.state_dict()), before, rtol=0, atol=0)


def test_the_last_of_several_calls_restores_training_mode(pipeline):
    """The first call waits between its steps for the second one to end."""
    pipeline.unet.train()
    seen, first_runs, second_is_done = [], threading.Event(), threading.Event()

    def wait(*_):
        first_runs.set()
        assert second_is_done.wait(60)
        seen.append(any(module.training for module in pipeline.unet.modules()))

    thread = threading.Thread(target=pipeline, args=(1, 3), kwargs={"callback_on_step_end": wait})
    thread.start()
    assert first_runs.wait(60)
    pipeline(1, 2)
    second_is_done.set()
    thread.join()
    assert seen == [False] * 3
    assert all(module.training for module in pipeline.unet.modules())


def test_training_mode_is_restored_after_an_error(pipeline):
    def fail(*_):
        raise RuntimeError("stop")

    pipeline.unet.train()
    with pytest.raises(RuntimeError, match="stop"):
        pipeline(1, 2, callback_on_step_end=fail)
    assert all(module.training for module in pipeline.unet.modules())


@pytest.mark.parametrize("with_guide", [False, True])
def test_from_pipe(pipeline, with_guide, caplog):
    if with_guide:
        pipeline = DDPMFacesPipeline(pipeline.unet, pipeline.scheduler, guide=tiny_unet(), autoguidance_scale=1.5)
    pipeline.unet.to(torch.bfloat16)
    caplog.clear()
    copy = DDPMFacesPipeline.from_pipe(pipeline)
    assert not caplog.records
    assert copy.unet is pipeline.unet
    assert copy.guide is pipeline.guide
    assert copy.config.autoguidance_scale == pipeline.config.autoguidance_scale
    assert copy.unet.dtype == torch.bfloat16
    assert DDPMFacesPipeline.from_pipe(DDPMPipeline(copy.unet, pipeline.scheduler)).unet is pipeline.unet


# A folder that an earlier version saved


@pytest.fixture(scope="module")
def saved_by_287d241(tmp_path_factory) -> Path:
    """Pipelines `alone` and `guided` as commit 287d241 saved them, with the images that they generated there.

    Both use v-prediction, 20 timesteps of the cosine schedule, and seeds 0 and 1. `alone` has conv blocks. `guided`
    has resnet blocks with attention, and a guide with a scale of 1.5.
    """
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(Path(__file__).parent / "fixtures" / "saved_by_287d241.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(("name", "weights", "scale"), [("alone", "raw", 1.0), ("guided", "ema", 1.5)])
def test_an_earlier_folder_loads_with_the_package(saved_by_287d241, name, weights, scale):
    loaded = quiet(DDPMFacesPipeline.from_pretrained(saved_by_287d241 / name))
    assert type(loaded.scheduler) is DDPMFacesScheduler
    assert (loaded.config.weights, loaded.autoguidance_scale) == (weights, scale)
    assert (loaded.guide is not None) == (name == "guided")
    images = loaded(2, generator=generators(0, 1), output_type="pt").images
    expected = load_file(saved_by_287d241 / f"{name}.safetensors")["images"]
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["alone", "guided"])
def test_an_earlier_folder_loads_without_the_package(bare_client, saved_by_287d241, name):
    """diffusers alone runs the code in the folder."""
    outcome = bare_client.run(WITHOUT, folder=str(saved_by_287d241 / name))
    assert outcome.error is None, outcome.output
    expected = load_file(saved_by_287d241 / f"{name}.safetensors")["images"]
    torch.testing.assert_close(torch.tensor(outcome.value), expected, atol=1e-5, rtol=0)


# Saving twice to the same folder


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(
    "sizes", [(None, "5KB"), ("5KB", None), ("5KB", "4KB"), ("4KB", "5KB")], ids=lambda sizes: f"{sizes[0]}-{sizes[1]}"
)
def test_a_folder_holds_what_was_saved_last(pipeline, tmp_path, variant, sizes):
    other = DDPMFacesPipeline(tiny_unet(), pipeline.scheduler)
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.add_(1)
    for saved, size in zip((pipeline, other), sizes, strict=True):
        saved.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    loaded = DDPMFacesPipeline.from_pretrained(tmp_path, variant=variant)
    torch.testing.assert_close(dict(loaded.unet.state_dict()), dict(other.unet.state_dict()), rtol=0, atol=0)
    assert not list(tmp_path.rglob(".unfinished-*"))


def test_variants_can_share_a_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, max_shard_size="5KB")
    pipeline.save_pretrained(tmp_path, variant="fp16")
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="5KB")
    for variant in (None, "fp16"):
        loaded = DDPMFacesPipeline.from_pretrained(tmp_path, variant=variant)
        torch.testing.assert_close(dict(loaded.unet.state_dict()), dict(pipeline.unet.state_dict()), rtol=0, atol=0)


def test_a_scheduler_that_cannot_be_loaded_again_is_refused_before_anything_is_written(pipeline, tmp_path):
    class OwnSolver(DPMSolverMultistepScheduler):
        pass

    pipeline.scheduler = OwnSolver.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="`scheduler` OwnSolver could not be loaded again"):
        pipeline.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
