"""Metrics are compared with values computed by hand; provenance and bad input are checked."""

import functools
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import run_script
from PIL import Image

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DDPMFacesUNet, DrawnFaces
from ddpm_faces.evaluation.likelihood import bits_per_dimension
from ddpm_faces.evaluation.measurements import Measured, MetricNetworks
from ddpm_faces.evaluation.metrics import channel_statistics, frechet_distance, kernel_distance, precision_recall
from ddpm_faces.evaluation.quality import (
    check_comparable,
    check_metrics_file,
    compare,
    evaluate,
    read_metrics,
    table,
    write_metrics,
)
from ddpm_faces.solvers import fast_solver


def pixel_features(images: torch.Tensor) -> torch.Tensor:
    """Stands in for a feature network."""
    return F.adaptive_avg_pool2d(images.float() / 255, 3).flatten(start_dim=1)


class BrightPictures:
    """Stands in for a face detector."""

    name = "brightness"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert min(images.shape[2:]) >= 64
        return (images.float().mean(dim=(1, 2, 3)) > 127).float()


class Plain(MetricNetworks):
    def __init__(self) -> None:
        self.extractors = (pixel_features,)
        self.detector = BrightPictures()


@functools.cache
def drawn(num_images: int, resolution: int = 16) -> torch.Tensor:
    faces = DrawnFaces(num_images, resolution=resolution)
    return torch.stack([torch.from_numpy(np.array(face["image"])).permute(2, 0, 1) for face in faces])


def tiny(channels: int = 3, **unet) -> DDPMFacesPipeline:
    torch.manual_seed(0)
    config = {"block_out_channels": (8, 8), "block_types": ("resnet",), "norm_num_groups": 4, **unet}
    network = DDPMFacesUNet(16, channels, channels, **config)
    for parameter in network.conv_out.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return DDPMFacesPipeline(network.eval(), DDPMFacesScheduler(10))


@pytest.fixture
def folder(tmp_path):
    """Forty drawn faces of 16x16, as files."""
    (tmp_path / "faces").mkdir()
    for index, image in enumerate(drawn(40)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "faces" / f"{index:02}.png")
    return tmp_path / "faces"


def value(results: dict, kind: str) -> float:
    return next(metric["value"] for metric in results["metrics"] if metric["type"] == kind)


@pytest.mark.parametrize(
    ("preset", "sigma_min", "epsilon_scaling"),
    [("exact", None, None), (None, None, None), (None, 0.3, 1.05), (None, 0.3, 1)],
)
def test_metrics_of_a_pipeline(folder, preset, sigma_min, epsilon_scaling):
    pipeline = tiny()
    results = evaluate(pipeline, str(folder), num_images=24, preset=preset, num_inference_steps=5, seed=7,
                       batch_size=10, networks=Plain(), sigma_min=sigma_min,
                       epsilon_scaling=epsilon_scaling)  # fmt: skip

    if sigma_min is not None:
        pipeline = DDPMFacesPipeline(pipeline.unet, fast_solver(pipeline.scheduler, sigma_min, epsilon_scaling))
    faces = [
        pipeline(1, 5, torch.Generator().manual_seed(7 + i), output_type="np", preset=preset).images[0]
        for i in range(24)
    ]
    images = torch.from_numpy((np.stack(faces) * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    reference = drawn(24)
    x, y = pixel_features(images), pixel_features(reference)
    assert value(results, "frechet_distance") == pytest.approx(frechet_distance(x, y), rel=1e-3)
    assert value(results, "kernel_distance_x1000") == pytest.approx(1000 * kernel_distance(x, y)[0], rel=1e-3)
    assert (value(results, "precision"), value(results, "recall")) == precision_recall(x, y)
    assert value(results, "face_rate") == (images.float().mean(dim=(1, 2, 3)) > 127).double().mean()
    assert results["channels"]["mean"] == pytest.approx(channel_statistics(images)["mean"], abs=1e-3)
    assert results["channels"]["deviation"] == pytest.approx(channel_statistics(images)["deviation"], abs=1e-3)
    assert results["reference_channels"]["deviation"] == pytest.approx(channel_statistics(reference)["deviation"])

    assert json.loads(json.dumps(results)) == results
    for metric in results["metrics"]:
        assert (metric["n"], metric["n_reference"], metric["image_size"]) == (24, 24, "16x16")
        assert (metric["sampler"], metric["steps"], metric["seeds"]) == (
            "ddpm" if preset else "dpmsolver++",
            5,
            "7 to 30",
        )
        assert metric.get("preset") == preset
        assert metric.get("sigma_min") == (None if preset else sigma_min or 0.02)
        assert metric.get("epsilon_scaling") == (None if epsilon_scaling == 1 else epsilon_scaling)
        assert metric["reference"].startswith("faces (")
        assert metric["error"] >= 0
    assert results["metrics"][0]["resize"] == "to 64 pixels, bicubic"


def test_guidance(folder, tmp_path):
    """The result equals that of a pipeline with this guide, and the given pipeline does not change."""
    pipeline = tiny()
    guide = tiny(block_out_channels=(4, 4))
    guide.save_pretrained(tmp_path / "weaker")
    arguments = {"num_images": 20, "num_inference_steps": 4, "networks": Plain()}
    alone = evaluate(pipeline, str(folder), **arguments)
    guided = evaluate(pipeline, str(folder), **arguments, guide=tmp_path / "weaker", autoguidance_scale=1.5)
    assert (pipeline.guide, pipeline.config.autoguidance_scale) == (None, 1)
    assert guided["channels"] != alone["channels"]
    figure = guided["metrics"][0]
    assert (figure["autoguidance_scale"], figure["guide"]) == (1.5, "weaker")
    assert not {"autoguidance_scale", "guide"} & alone["metrics"][0].keys()

    pipeline.set_guide(guide, 1.5)
    own = evaluate(pipeline, str(folder), **arguments)
    assert own["channels"] == guided["channels"]
    assert own["metrics"][0]["autoguidance_scale"] == 1.5
    without = evaluate(pipeline, str(folder), **arguments, autoguidance_scale=1)
    assert without["metrics"] == alone["metrics"]
    exact = {**arguments, "preset": "exact"}
    assert evaluate(pipeline, str(folder), **exact)["channels"] != evaluate(tiny(), str(folder), **exact)["channels"]


@pytest.mark.parametrize("has_bf16", [True, False])
def test_dtype_is_that_of_sampling_alone_and_is_recorded(monkeypatch, folder, has_bf16):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16, raising=False)
    pipeline = tiny()
    arguments = {"num_images": 20, "num_inference_steps": 4, "networks": Plain(), "num_likelihood_images": 2}
    exact, low, auto = (
        evaluate(pipeline, str(folder), dtype=dtype, **arguments) for dtype in ("float32", "bfloat16", "auto")
    )
    assert pipeline.unet.dtype == torch.float32
    assert exact["channels"] != low["channels"]
    assert exact["channels"]["mean"] == pytest.approx(low["channels"]["mean"], abs=0.02)
    assert auto == (low if has_bf16 else exact)
    bits = [results["metrics"][-1] for results in (exact, low)]
    assert bits[0] == bits[1]
    assert "dtype" not in exact["metrics"][0]
    assert low["metrics"][0]["dtype"] == "bfloat16"


def test_unknown_dtype_is_refused(folder):
    with pytest.raises(ValueError, match="`dtype` must be one of auto, float32, bfloat16, got 'int8'"):
        evaluate(tiny(), str(folder), networks=Plain(), dtype="int8")


def test_distance_is_zero_only_between_equal_images(folder):
    same = evaluate(folder, str(folder), networks=Plain())
    assert value(same, "frechet_distance") == pytest.approx(0, abs=1e-9)
    assert (value(same, "precision"), value(same, "recall")) == (1, 1)
    kernel = next(metric for metric in same["metrics"] if metric["type"] == "kernel_distance_x1000")
    assert abs(kernel["value"]) < 3 * kernel["error"]
    assert same["metrics"][0]["source"] == "the first 40 pictures of faces"
    others = evaluate(folder, None, num_images=40, networks=Plain())
    assert value(others, "frechet_distance") > 0
    assert others["metrics"][1]["reference"].startswith("drawn faces (")
    assert others["metrics"][1]["real_faces"] > 0


def test_error_of_a_share_is_never_zero():
    """All 40 images show faces and look real. The error is still that of one more image."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(40, 2, generator=generator)
    moments = torch.zeros(40, 2, 3, dtype=torch.float64)
    real = Measured([reference], torch.ones(40, dtype=torch.bool), moments, (16, 16))
    blurred = Measured([reference / 1000], torch.ones(40, dtype=torch.bool), moments, (16, 16))
    figures = {figure["type"]: figure for figure in compare(blurred, real, Plain())}
    for kind in ("face_rate", "precision"):
        assert (figures[kind]["value"], figures[kind]["error"]) == (1, pytest.approx(1 / 41))


def test_grayscale_images_and_classes(folder):
    grey = evaluate(tiny(channels=1), str(folder), num_images=20, num_inference_steps=2, networks=Plain())
    assert len(set(grey["channels"]["mean"])) == 1

    seen = []
    pipeline = tiny(num_class_embeds=3)
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    evaluate(pipeline, str(folder), num_images=20, num_inference_steps=1, batch_size=8, networks=Plain())
    assert seen == [[0, 1, 2, 0, 1, 2, 0, 1], [2, 0, 1, 2, 0, 1, 2, 0], [1, 2, 0, 1]]


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
from test_evaluation import Plain, drawn, tiny
from accelerate import PartialState
from ddpm_faces.evaluation.measurements import measure
from ddpm_faces.evaluation.quality import evaluate
from ddpm_faces.evaluation.samples import select
results = evaluate(tiny(), {folder!r}, num_images=25, num_inference_steps=3, batch_size=4, networks=Plain(),
                   num_likelihood_images=5)
assert PartialState().num_processes == 2
one = measure(select(drawn(1)), 1, Plain(), 4)  # of which the second process has none
assert (len(one.faces), one.image_size) == (1, (16, 16))
if PartialState().is_main_process:
    print(json.dumps(results))
"""


def test_processes_share_the_work(folder, tmp_path, request):
    tests = str(request.path.parent)
    (tmp_path / "script.py").write_text(SCRIPT.format(tests=tests, folder=str(folder)))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    first, second = run_script([str(tmp_path / "script.py")], environment, num_processes=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    shared = json.loads(first.stdout.splitlines()[-1])
    alone = evaluate(
        tiny(), str(folder), num_images=25, num_inference_steps=3, networks=Plain(), num_likelihood_images=5
    )
    for a, b in zip(shared["metrics"], alone["metrics"], strict=True):
        assert {**a, "value": 0, "error": 0} == {**b, "value": 0, "error": 0}
        assert a["value"] == pytest.approx(b["value"], rel=1e-3, abs=1e-6)


def test_bits_per_dimension(folder):
    pipeline = tiny()
    *_, figure = evaluate(pipeline, str(folder), num_images=20, num_inference_steps=1, networks=Plain(),
                          num_likelihood_images=6)["metrics"]  # fmt: skip
    bits = bits_per_dimension(pipeline.unet, pipeline.scheduler, drawn(6))
    assert figure["type"] == "bits_per_dimension"
    assert figure["value"] == pytest.approx(bits.mean().item(), rel=1e-6)
    assert figure["error"] == pytest.approx(bits.std().item() / 6**0.5, rel=1e-6)
    assert (figure["n"], figure["n_reference"]) == (6, 6)
    assert figure["extractor"] == "variational bound (10 of 10 terms for each picture)"
    assert figure["reference"] == evaluate(
        *(pipeline, str(folder)), num_images=20, num_inference_steps=1, networks=Plain(), num_likelihood_images=6,
        seed=3,
    )["metrics"][-1]["reference"]  # fmt: skip


@pytest.mark.parametrize("preset", ["exact", None])
def test_network_that_predicts_the_variance_too(folder, preset):
    torch.manual_seed(0)
    network = DDPMFacesUNet(16, 3, 6, block_out_channels=(8, 8), block_types=("resnet",), norm_num_groups=4).eval()
    pipeline = DDPMFacesPipeline(network, DDPMFacesScheduler(10, variance_type="learned_range"))
    results = evaluate(pipeline, str(folder), num_images=20, num_inference_steps=3, preset=preset, networks=Plain(),
                       num_likelihood_images=2)  # fmt: skip
    *figures, bits = results["metrics"]
    expected = bits_per_dimension(network, pipeline.scheduler, drawn(2)).mean().item()
    assert bits["value"] == pytest.approx(expected, rel=1e-6)
    assert {figure["n"] for figure in figures} == {20}


def test_dataset_with_splits(tmp_path):
    from datasets import Dataset

    (tmp_path / "set").mkdir()
    for split, first in {"train": 0, "test": 20}.items():
        rows = [{"image": Image.fromarray(drawn(40)[first + i].permute(1, 2, 0).numpy())} for i in range(20)]
        Dataset.from_list(rows).to_parquet(tmp_path / "set" / f"{split}.parquet")
    load = {"num_inference_steps": 1, "networks": Plain(), "cache_dir": str(tmp_path / "cache")}
    results = evaluate(tiny(), str(tmp_path / "set"), **load)
    x, y = pixel_features(drawn(40)[:20]), pixel_features(drawn(40)[20:])
    assert results["metrics"][1]["n"] == 20  # as many as there are
    assert results["metrics"][1]["real_faces"] == pytest.approx(frechet_distance(x, y), abs=1e-3)
    assert results["metrics"][1]["reference"].startswith("set, test (")
    alone = evaluate(tiny(), str(tmp_path / "set"), baseline_split=None, **load)
    assert "real_faces" not in alone["metrics"][1]
    swapped = evaluate(tiny(), str(tmp_path / "set"), split="train", baseline_split=None, **load)
    with pytest.raises(ValueError, match=r"different settings.*`reference` set, train \(.*\) and set, test \("):
        check_comparable(swapped["metrics"], alone["metrics"])
    check_comparable(results["metrics"], alone["metrics"])


FIGURE = {
    "name": "Fréchet distance", "type": "frechet_distance", "value": 12.345, "error": 0.5, "n": 400,
    "n_reference": 400, "image_size": "64x64", "extractor": "A (b)", "resize": "none", "reference": "x (1)",
    "sampler": "ddpm", "steps": 300, "seeds": "0 to 399", "real_faces": 10.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 500}, "`n` 400 and 500"),
        ({"n_reference": 500}, "`n_reference` 400 and 500"),
        ({"image_size": "32x32"}, "`image_size` 64x64 and 32x32"),
        ({"resize": "other"}, "`resize` none and other"),
        ({"reference": "x (2)"}, r"`reference` x \(1\) and x \(2\)"),
        ({"extractor": "C"}, "no type and network in common"),
    ],
)
def test_metrics_with_different_settings_are_not_compared(change, message):
    with pytest.raises(ValueError, match=message):
        check_comparable([FIGURE], [{**FIGURE, **change}])


def test_samplers_and_models_are_compared():
    check_comparable([FIGURE], [{**FIGURE, "sampler": "dpmsolver++", "steps": 10, "seeds": "1 to 400", "value": 1}])
    lines = table([FIGURE], [{**FIGURE, "value": 20.0}]).splitlines()
    assert lines[0] == "| | value | other real faces | before |".replace("| |", "|  |")
    assert lines[2] == "| Fréchet distance, A | 12.35 ± 0.5 | 10 | 20 ± 0.5 |"


def never(images):
    raise AssertionError("an image was generated or looked at")


def test_metrics_that_cannot_be_compared_are_refused_before_the_work(folder, tmp_path):
    """Comparable metrics are not refused: the planned provenance equals the final one."""
    arguments = {"num_images": 20, "num_inference_steps": 1, "num_likelihood_images": 2}
    metrics = evaluate(tiny(), str(folder), **arguments, networks=Plain())["metrics"]
    again = evaluate(tiny(), str(folder), **arguments, networks=Plain(), seed=7, against=metrics)["metrics"]
    check_comparable(again, metrics)

    idle, pipeline = Plain(), tiny()
    idle.detector.__class__ = type("Idle", (BrightPictures,), {"__call__": lambda self, images: never(images)})
    pipeline.unet.register_forward_pre_hook(lambda module, args: never(args))
    for changed, message in (
        ({"num_images": 24}, "`n` 24 and 20, `n_reference` 24 and 20, `reference` faces"),
        ({"num_likelihood_images": 3}, "`n` 3 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(pipeline, str(folder), **{**arguments, **changed}, networks=idle, against=metrics)
    # Size, network and resizing are known before the real faces are loaded, so these need not even exist.
    for key, value, message in (
        ("image_size", "32x32", "`image_size` 16x16 and 32x32"),
        ("resize", "other", "`resize` .* and other"),
        ("extractor", "C", "no type and network in common"),
    ):
        others = [{**metric, key: value} for metric in metrics]
        with pytest.raises(ValueError, match=message):
            evaluate(pipeline, str(tmp_path / "none"), **arguments, networks=idle, against=others)


def test_metrics_file(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"memorisation": {"verdict": "None."}, "metrics": []}')
    write_metrics(path, {"metrics": [FIGURE]})
    assert json.loads(path.read_text()) == {"memorisation": {"verdict": "None."}, "metrics": [FIGURE]}
    assert read_metrics(path)["metrics"] == [FIGURE]
    for text in ("{", "[]", '{"metrics": [{}]}', '{"metrics": 3}', "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="does not contain metrics of `ddpm-faces evaluate`"):
            read_metrics(path)
    path.write_text("not JSON")
    with pytest.raises(ValueError, match="is not JSON, and will not be overwritten"):
        write_metrics(path, {"metrics": [FIGURE]})
    assert path.read_text() == "not JSON"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must contain a JSON object, got a list, and will not be overwritten"):
        write_metrics(path, {"metrics": [FIGURE]})
    with pytest.raises(ValueError, match="the folder .* does not exist"):
        check_metrics_file(tmp_path / "none" / "metrics.json")
    with pytest.raises(ValueError, match="is a folder; name a file, such as .*metrics.json"):
        check_metrics_file(tmp_path)


# Bad input


class Never(MetricNetworks):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 19}, "`num_images` must be an integer from 20 to .*, got 19"),
        ({"num_images": True}, "`num_images` must be an integer from 20 to .*, got True"),
        ({"preset": "fast"}, "`preset` must be one of exact, got 'fast'"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer from 1 to .*, got 0"),
        ({"num_inference_steps": 11}, "`num_inference_steps` must be from 1 to 10, .*, got 11"),
        ({"sigma_min": 0.1}, "`sigma_min` needs DPM-Solver\\+\\+, but the preset 'exact' means another sampler"),
        ({"epsilon_scaling": 1.01}, "`epsilon_scaling` needs DPM-Solver\\+\\+, but the preset 'exact'"),
        ({"sigma_min": 1, "num_inference_steps": 3}, "`sigma_min` must lie in \\(0, 1\\), got 1"),
        ({"autoguidance_scale": 1.5}, "`autoguidance_scale` must be 1 for a model without a guide, got 1.5"),
        ({"autoguidance_scale": -1}, "`autoguidance_scale` must be a number of at least 0, got -1"),
        ({"guide": tiny()}, "`guide` needs an `autoguidance_scale`"),
        ({"guide": tiny(channels=1), "autoguidance_scale": 1.5}, "`guide` must be of images of the shape"),
        ({"seed": -1}, "`seed` must be an integer from 0 to .*, got -1"),
        ({"batch_size": 0}, "`batch_size` must be an integer from 1 to .*, got 0"),
        ({"num_likelihood_images": 1}, "`num_likelihood_images` must be 0 or an integer of at least 2, got 1"),
        ({"num_likelihood_images": True}, "`num_likelihood_images` must be 0 or an integer of at least 2, got Tr"),
        ({"num_likelihood_images": 41}, "`num_likelihood_images` must be at most the number .* read, 40, got 41"),
        ({"num_images": 41}, "`data` must have at least 41 images as set by `num_images`, has 40"),
    ],
)
def test_bad_arguments(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny(), str(folder), **arguments, networks=Never())


def test_likelihood_that_cannot_be_measured_is_refused(folder):
    for pipeline, message in (
        (folder, "needs a pipeline as `source`"),
        (tiny(channels=1), "got DDPMFacesScheduler, 1 channels and None classes"),
        (tiny(num_class_embeds=2), "got DDPMFacesScheduler, 3 channels and 2 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(pipeline, str(folder), networks=Never(), num_likelihood_images=4)


def test_bad_images(folder, tmp_path):
    with pytest.raises(ValueError, match="generates images of 4 channels; 1 or 3 can be measured"):
        evaluate(tiny(channels=4), str(folder), networks=Never())
    for path in sorted(folder.iterdir())[19:]:
        path.unlink()
    with pytest.raises(ValueError, match="`source` must have at least 20 images for meaningful metrics, has 19"):
        evaluate(folder, None, networks=Never())
    with pytest.raises(ValueError, match="`data` must have at least 20 images for meaningful metrics, has 19"):
        evaluate(tiny(), str(folder), networks=Never())
    (folder / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="contains files that are not images: notes.txt"):
        evaluate(folder, None, networks=Never())
    (folder / "notes.txt").rename(folder / "notes.png")
    with pytest.raises(ValueError, match="notes.png cannot be read"):
        evaluate(folder, None, networks=Never())
    Image.new("RGB", (16, 24)).save(folder / "notes.png")
    with pytest.raises(ValueError, match="images of the same size, got 00.png of 16x16, notes.png of 16x24"):
        evaluate(folder, None, networks=Never())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="contains neither a pipeline nor images"):
        evaluate(tmp_path / "empty", None, networks=Never())
