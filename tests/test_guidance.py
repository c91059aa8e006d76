import json

import pytest
import torch
from conftest import tiny_unet

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, guidance
from ddpm_faces.guidance import save_guidance, save_guide


def a_guide(seed: int) -> DDPMFacesPipeline:
    torch.manual_seed(seed)
    return DDPMFacesPipeline(tiny_unet(block_out_channels=(4, 8)), DDPMFacesScheduler(num_train_timesteps=20))


def test_summary_forgets_the_previous_guide_and_samples(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    summary = tmp_path / "training_summary.json"
    summary.write_text(json.dumps({"images_seen": 96, "guide_images_seen": 24, "autoguidance_scale": 1.5}))
    save_guide(tmp_path, None)
    assert json.loads(summary.read_text()) == {
        "images_seen": 96,
        "guide_images_seen": None,
        "autoguidance_scale": None,
    }


def test_guidance_changes_without_the_weights(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    save_guide(tmp_path, a_guide(1), 1.5)
    summary = tmp_path / "training_summary.json"
    summary.write_text(json.dumps({"guide_images_seen": 24, "autoguidance_scale": 1.5}))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    save_guidance(tmp_path, autoguidance_scale=1.25, guidance_interval=(3, 17))
    config = DDPMFacesPipeline.from_pretrained(tmp_path).config
    assert (config.autoguidance_scale, config.guidance_interval) == (1.25, [3, 17])
    # The samples in the folder have another guidance, but the guide is the same.
    assert json.loads(summary.read_text()) == {
        "guide_images_seen": 24,
        "guidance_scale": None,
        "autoguidance_scale": None,
    }
    changed = {path.name for path, time in files.items() if path.stat().st_mtime_ns != time}
    assert changed == {"model_index.json", "training_summary.json"}
    save_guidance(tmp_path, autoguidance_scale=1.3)
    config = DDPMFacesPipeline.from_pretrained(tmp_path).config
    assert (config.autoguidance_scale, config.guidance_interval) == (1.3, [3, 17])


def test_guidance_of_a_model_without_a_guide_is_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`autoguidance_scale` must be 1 for a model without a guide, got 1.5"):
        save_guidance(tmp_path, autoguidance_scale=1.5)
    with pytest.raises(ValueError, match="`guidance_interval` must be None for a model without a guide"):
        save_guidance(tmp_path, guidance_interval=(3, 4))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_summary_is_named_before_anything_is_written(pipeline, tmp_path, text):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "training_summary.json").write_text(text)
    with pytest.raises(
        ValueError, match="training_summary.json (cannot be read|must contain a JSON object, got list)"
    ):
        save_guide(tmp_path, a_guide(1), 1.5)
    assert guide_of(tmp_path) == (None, 1)
    assert not (tmp_path / "guide").exists()


def guide_of(folder) -> tuple[torch.Tensor | None, float]:
    pipeline = DDPMFacesPipeline.from_pretrained(folder)
    return pipeline.guide and pipeline.guide.conv_in.weight, pipeline.config.autoguidance_scale


@pytest.mark.parametrize("step", ["commit", "replacing", "delete"])
def test_interrupted_change_can_be_repeated(pipeline, tmp_path, monkeypatch, step):
    """The folder still loads, and repeating the change completes it."""
    pipeline.save_pretrained(tmp_path)
    first, second = a_guide(1), a_guide(2)
    wanted = None if step == "delete" else second
    if step == "delete":
        save_guide(tmp_path, first, 1.5)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(guidance, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_guide(tmp_path, wanted, 1.0 if wanted is None else 1.25)
    assert guide_of(tmp_path) == (None, 1)
    assert step == "delete" or not list(tmp_path.glob(".unfinished*"))

    monkeypatch.undo()
    save_guide(tmp_path, second, 1.25)
    weight, scale = guide_of(tmp_path)
    assert (torch.equal(weight, second.unet.conv_in.weight), scale) == (True, 1.25)
    save_guide(tmp_path, first, 1.5)
    weight, scale = guide_of(tmp_path)
    assert (torch.equal(weight, first.unet.conv_in.weight), scale) == (True, 1.5)
    assert not list(tmp_path.glob(".unfinished*"))
