"""The model in this repository."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from ddpm_faces import DDPMFacesPipeline, hub
from ddpm_faces.data.detection import MTCNN
from ddpm_faces.evaluation.quality import read_metrics


MODEL = Path(__file__).parents[1] / "models" / "faces64"
pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="a source distribution does not hold the model")


def test_shipped_model_generates_faces_in_eight_steps():
    pipeline = DDPMFacesPipeline.from_pretrained(MODEL)
    assert pipeline.unet.dtype == torch.float32  # every CPU supports float32
    assert pipeline.num_timesteps == 8
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(3, generator=[torch.Generator().manual_seed(seed) for seed in range(3)], output_type="pt").images
    faces = (images * 255).round().byte()
    assert (MTCNN()(faces) > 0.9).all()
    assert faces.float().std(dim=(1, 2, 3)).min() > 30  # and they are not grey


def test_shipped_guide_is_small_and_has_the_measured_scale():
    pipeline = DDPMFacesPipeline.from_pretrained(MODEL)
    assert pipeline.config.autoguidance_scale == 1.2
    assert pipeline.guide.num_parameters() < pipeline.unet.num_parameters() / 10


def test_shipped_model_is_small_and_its_card_is_complete():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) < 40e6
    card = (MODEL / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "cc-by-nc-sa-4.0"
    assert "not measured" not in card.lower()
    for metric in read_metrics(MODEL / "metrics.json")["metrics"]:
        assert (metric["n"], metric["steps"], metric["autoguidance_scale"]) == (400, 300, 1.2)
        assert metric["real_faces"] is not None
    assert value("face_rate") >= 0.95


def value(kind: str) -> float:
    return next(m["value"] for m in read_metrics(MODEL / "metrics.json")["metrics"] if m["type"] == kind)


def test_tuned_steps_beat_even_steps():
    rows = json.loads((MODEL / "tuning.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [4, 6, 8, 10]
    assert all(row["tuned"]["frechet_distance"] < row["even"]["frechet_distance"] for row in rows)


def test_shipped_model_loads_with_diffusers_alone():
    """With its own code, which consists of links to the code of the package."""
    hub.check(MODEL)
