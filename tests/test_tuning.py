"""Tuning of a model: what is measured, what is kept, and what is written."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from datasets import Dataset
from PIL import Image
from test_evaluation import Plain, pixel_features

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DrawnFaces, hub
from ddpm_faces.evaluation import tuning as module
from ddpm_faces.evaluation.metrics import frechet_distance
from ddpm_faces.evaluation.tuning import Tuning, save_tuning, tune
from ddpm_faces.fitting import fit_solvers
from ddpm_faces.hub.description import describe_model


QUICK = {"num_steps": (2, 3), "fast": 3, "draft": 2, "num_images": 100, "num_trajectories": 16, "batch_size": 50}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    faces = [face["image"] for face in DrawnFaces(220, resolution=16)]
    for split, images in {"train": faces[:110], "test": faces[110:]}.items():
        Dataset.from_list([{"image": image} for image in images]).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture
def model(pipeline, tmp_path):
    pipeline.scheduler = DDPMFacesScheduler(20, beta_schedule="squaredcos_cap_v2")
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def distances(pipeline, data_images, steps, seeds, tuned_steps):
    scheduler = DDPMFacesScheduler.from_config(pipeline.scheduler.config, tuned_steps=tuned_steps)
    images = pipeline.with_scheduler(scheduler)(
        100, steps, [torch.Generator().manual_seed(seed) for seed in seeds], output_type="pt"
    ).images
    return frechet_distance(pixel_features((images * 255).round()), pixel_features(data_images))


def test_tuning_measures_both_and_keeps_the_better(model, data):
    pipeline = DDPMFacesPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    tuned = tune(pipeline, data, networks=Plain(), seed=7, **QUICK)
    assert (pipeline.presets.keys(), pipeline.scheduler.config.tuned_steps) == ({"exact"}, None)
    fitted = fit_solvers(pipeline, (2, 3), 16, 50)
    faces = DrawnFaces(220, resolution=16)
    real = torch.stack([torch.from_numpy(np.array(faces[i]["image"])).permute(2, 0, 1) for i in range(110, 210)])
    assert [row["steps"] for row in tuned.report["rows"]] == [2, 3]
    for row in tuned.report["rows"]:
        number, factor = str(row["steps"]), row["epsilon_scaling"]
        assert factor in (1.0, 1.003, 1.006)
        first, *others = fitted[number]["epsilon_scaling"]
        entry = {**fitted[number], "epsilon_scaling": [first, *(round(divisor * factor, 6) for divisor in others)]}
        seeds = range(7, 107)
        expected = [distances(pipeline, real, row["steps"], seeds, steps) for steps in ({number: entry}, None)]
        found = [row[kind]["frechet_distance"] for kind in ("tuned", "even")]
        assert found == pytest.approx(expected, rel=1e-2, abs=1e-3)
        assert row["kept"] == ("tuned" if found[0] < found[1] else "even")
        assert tuned.tuned_steps.get(number) == (entry if found[0] < found[1] else None)
        assert set(row["even"]) == {"face_rate", "frechet_distance", "kernel_distance_x1000", "precision", "recall"}
    assert (tuned.report["n"], tuned.report["n_reference"], tuned.report["seeds"]) == (100, 100, "7 to 106")
    assert json.loads(json.dumps(tuned.report)) == tuned.report


def test_the_guide_is_limited_to_its_interval(data):
    """Tuning with an interval is tuning a pipeline that has it, and the presets keep it."""
    torch.manual_seed(3)
    weaker = DDPMFacesPipeline(tiny_unet(), DDPMFacesScheduler(20, beta_schedule="squaredcos_cap_v2"))
    pipeline = DDPMFacesPipeline(tiny_unet(), weaker.scheduler)
    pipeline.set_guide(weaker, 2.0)
    pipeline.set_progress_bar_config(disable=True)
    everywhere = tune(pipeline, data, networks=Plain(), **QUICK)
    limited = tune(pipeline, data, networks=Plain(), guidance_interval=(4, 14), **QUICK)
    pipeline.set_guidance(1.0, 2.0, (4, 14))
    own = tune(pipeline, data, networks=Plain(), **QUICK)
    assert limited.report == own.report != everywhere.report
    assert limited.report["guidance_interval"] == [4, 14]
    assert [limited.presets[name]["guidance_interval"] for name in ("fast", "draft")] == [[4, 14], [4, 14]]
    assert "guidance_interval" not in own.presets["fast"]
    with pytest.raises(ValueError, match="`guidance_interval` must be"):
        tune(pipeline, data, networks=Plain(), guidance_interval=(14, 4), **QUICK)


def test_saved_presets_are_used_and_published(model, tmp_path):
    entry = {"timesteps": [19, 4.5], "weights": [[], [-0.3]], "epsilon_scaling": [1.0, 1.01]}
    solver = {"algorithm": "dpmsolver++", "timestep_spacing": "logsnr"}
    row = {"frechet_distance": 12.34, "recall": 0.5, "face_rate": 1.0}
    report = {
        "rows": [{"steps": 2, "tuned": row, "even": {**row, "frechet_distance": 23.45}, "kept": "tuned"}],
        "n": 100, "n_reference": 100, "image_size": "16x16", "extractor": "pixels", "reference": "set, test",
        "seeds": "0 to 99", "autoguidance_scale": 1.0,
    }  # fmt: skip
    presets = {"fast": {**solver, "num_inference_steps": 3}, "draft": {**solver, "num_inference_steps": 2}}
    pipeline = DDPMFacesPipeline.from_pretrained(model)
    before = (model / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    save_tuning(model, pipeline, Tuning({"2": entry}, presets, "fast", report))
    assert (model / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    loaded = DDPMFacesPipeline.from_pretrained(model)
    assert loaded.num_timesteps == 3
    assert loaded.scheduler.config.tuned_steps == {"2": entry}
    assert loaded.resolve_preset("draft")[0].config.tuned_steps == {"2": entry}
    assert json.loads((model / "tuning.json").read_text()) == report

    assert describe_model(model)["presets"] == "fast (3 steps, the default), draft (2 steps)"

    hub.export(model, tmp_path / "published", "user/faces")
    card = (tmp_path / "published" / "README.md").read_text()
    assert "In few steps, tuned to this model" in card
    assert "| `draft` | 2 | dpmsolver++, tuned to this model |" in card
    assert "| `fast` | 3 | dpmsolver++ |" in card
    assert "`fast` is the default" in card
    assert "| 2 | 12.3 | 23.4 | 0.50 | 0.50 | 1.00 | 1.00 |" in card
    assert 'in 3 steps (`preset="fast"`)' in card
    steps = loaded.resolve_preset("fast").scheduler
    steps.set_timesteps(3)
    assert f"to face, after the timesteps {', '.join(str(int(t)) for t in steps.timesteps)}." in card
    with Image.open(tmp_path / "published" / "denoising_strip.png") as strip:
        assert round(strip.width / strip.height * 2) == 3  # two rows
    assert json.loads((tmp_path / "published" / "tuning.json").read_text()) == report
    published = DDPMFacesPipeline.from_pretrained(tmp_path / "published")
    assert published.presets == loaded.presets

    # More training removes the presets. Their measurements no longer count.
    published.set_presets(None)
    published.save_pretrained(model)
    hub.export(model, tmp_path / "again", "user/faces")
    assert "In few steps, tuned" not in (tmp_path / "again" / "README.md").read_text()


def test_other_presets_and_their_default_stay(model):
    pipeline = DDPMFacesPipeline.from_pretrained(model)
    pipeline.set_presets({"mine": {"num_inference_steps": 2}, "fast": {"num_inference_steps": 4}}, "mine")
    save_tuning(model, pipeline, Tuning({}, {"fast": {"num_inference_steps": 3}}, "fast", {"rows": []}))
    loaded = DDPMFacesPipeline.from_pretrained(model)
    assert loaded.config.presets == {"mine": {"num_inference_steps": 2}, "fast": {"num_inference_steps": 3}}
    assert loaded.config.default_preset == "mine"
    assert loaded.scheduler.config.tuned_steps is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": (1, 4)}, r"`num_steps` must be numbers from 2 to 20, got \[1, 4\]"),
        ({"fast": 5}, r"`fast` must be one of `num_steps` \(2, 3\), got 5"),
        ({"draft": 4}, r"`draft` must be one of `num_steps` \(2, 3\), got 4"),
        ({"num_images": 99}, "`num_images` must be an integer from 100 to .*, got 99"),
        ({"split": "train"}, "`choice_split` 'train' must differ from `split`"),
        ({"split": "test[:99]"}, r"`data` needs at least 100 images in the split 'test\[:99\]', has 99"),
        ({"choice_split": "test[:50]"}, r"`data` needs at least 100 images in the split 'test\[:50\]', has 50"),
    ],
)
def test_bad_arguments_are_named_before_any_work(model, data, arguments, message, monkeypatch):
    monkeypatch.setattr(module, "fit_solvers", None)
    with pytest.raises(ValueError, match=message):
        tune(DDPMFacesPipeline.from_pretrained(model), data, networks=Plain(), **{**QUICK, **arguments})


def test_a_solver_in_place_of_the_schedule_is_refused(data):
    scheduler = DDPMFacesScheduler(20, algorithm="ddim")
    with pytest.raises(ValueError, match="`pipeline` must have a scheduler of 'ddpm', got 'ddim'"):
        tune(DDPMFacesPipeline(tiny_unet(), scheduler), data, networks=Plain(), **QUICK)
