"""Training is tested by launching it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_faces import DDPMFacesPipeline
from ddpm_faces.checkpoint import list_checkpoints


ROOT = Path(__file__).parents[1]
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--cpu", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"),
]
TINY = {
    "resolution": 16, "num_drawn_images": 40, "block_out_channels": [8, 16], "block_types": ["resnet"],
    "norm_num_groups": 4, "num_train_timesteps": 20, "train_batch_size": 8, "max_train_images": 96,
    "lr_warmup_images": 16, "log_every_images": 16, "num_samples": 3, "sample_inference_steps": 4,
    "sample_every_images": 48, "checkpoint_every_images": 48, "ema_half_life_images": 32,
}  # fmt: skip


def command(output_dir: Path, *, mixed_precision: str = "no", **overrides) -> list[str]:
    flags = []
    for name, value in {**TINY, **overrides, "output_dir": output_dir}.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return [*LAUNCH, "--mixed_precision", mixed_precision, str(ROOT / "training" / "train.py"), *flags]


def train(output_dir: Path, **overrides) -> subprocess.CompletedProcess:
    return subprocess.run(command(output_dir, **overrides), capture_output=True, text=True)


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors")


def read_log(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that went through without interruption; never written to."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    result = train(output_dir)
    assert result.returncode == 0, result.stderr
    assert str(output_dir / "samples.png") in result.stdout
    return output_dir


def test_what_a_run_leaves(finished):
    pipeline = DDPMFacesPipeline.from_pretrained(finished)
    assert pipeline(2).images[0].size == (16, 16)
    assert pipeline.scheduler.config.num_train_timesteps == 20

    log = read_log(finished)
    assert [entry["images_seen"] for entry in log] == list(range(16, 97, 16))
    assert [entry["epoch"] for entry in log] == [0, 0, 1, 1, 1, 2]  # five batches of eight make an epoch
    assert all(entry["images_per_second"] > 0 and np.isfinite(entry["loss"]) for entry in log)
    # Warm-up over the first two steps to 1e-3, then the cosine, in optimizer steps, to 0 at the last image.
    rates = [entry["learning_rate"] for entry in log]
    expected = [1e-3 * (1 + np.cos(np.pi * (images - 16) / 80)) / 2 for images in range(16, 97, 16)]
    np.testing.assert_allclose(rates, expected, atol=1e-9)

    assert [path.name for path in list_checkpoints(finished)] == ["checkpoint-0000000048", "checkpoint-0000000096"]
    for name in ("samples.png", "loss_curve.png", "samples/0000000048.png"):
        assert Image.open(finished / name).size[0] > 100
    events = EventAccumulator(str(finished / "logs" / "training")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(16, 97, 16))
    assert [event.step for event in events.Images("samples")] == [48, 96]
    assert not list(finished.rglob(".unfinished*"))


def test_saved_weights_are_the_average(finished):
    """Not the last ones: these lie in the checkpoint, and the average in the pipeline."""
    last = load_file(finished / "checkpoint-0000000096" / "model.safetensors")
    assert any(not torch.equal(value, last[name]) for name, value in weights(finished).items())


def test_same_seed_same_weights_and_sampling_leaves_training_alone(finished, tmp_path):
    assert train(tmp_path / "run", sample_every_images=8, num_samples=1, report_to="none").returncode == 0
    assert_equal_weights(weights(tmp_path / "run"), weights(finished))
    assert not (tmp_path / "run" / "logs").exists()


def test_resumed_run_equals_uninterrupted_run(finished, tmp_path):
    """As if it had died after the checkpoint in the middle of the second epoch, having logged more since."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoint-0000000096")
    for path in (run / "unet", run / "scheduler"):
        shutil.rmtree(path)
    (run / "model_index.json").unlink()
    result = train(run)
    assert "after 48 images" in result.stdout, result.stderr
    assert_equal_weights(weights(run), weights(finished))
    untimed = [[{**entry, "images_per_second": None} for entry in read_log(folder)] for folder in (run, finished)]
    assert untimed[0] == untimed[1]


def test_killed_run_does_not_look_whole_and_goes_on(finished, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(run, sample_every_images=0), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    seen = b""
    while b"48/96" not in seen:  # read its progress bar until the checkpoint is being written or just has been
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, seen.decode()
        seen += chunk
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run / "model_index.json").exists()
    with pytest.raises(OSError, match="model_index.json"):
        DDPMFacesPipeline.from_pretrained(run)
    assert train(run, sample_every_images=0).returncode == 0
    assert_equal_weights(weights(run), weights(finished))
    assert not list(run.glob(".unfinished*"))


def test_accumulation_counts_steps_not_batches(tmp_path):
    """Half the batches twice as often accumulated: the same course of the learning rate over the images."""
    result = train(tmp_path, train_batch_size=4, gradient_accumulation_steps=2, checkpoint_every_images=0)
    assert result.returncode == 0, result.stderr
    log = read_log(tmp_path)
    assert [entry["images_seen"] for entry in log] == list(range(16, 97, 16))
    expected = [1e-3 * (1 + np.cos(np.pi * (images - 16) / 80)) / 2 for images in range(16, 97, 16)]
    np.testing.assert_allclose([entry["learning_rate"] for entry in log], expected, atol=1e-9)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_single_thread_of_accelerate_launch_is_undone(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as `accelerate launch` sets it where --cpu is not given
    result = train(tmp_path, max_train_images=8, checkpoint_every_images=0, sample_every_images=0, report_to="none")
    assert f"({len(os.sched_getaffinity(0))} CPU threads each)" in result.stdout, result.stderr


def test_article_network_in_bf16_from_a_folder_of_pictures(tmp_path):
    """Precision comes from `accelerate launch`, and all that the article's preset switches off is off."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    result = train(
        tmp_path / "run", mixed_precision="bf16", config=ROOT / "training/configs/article64.yaml",
        train_data_dir=tmp_path / "pictures", block_types=["conv"], random_flip="true", max_train_images=32,
        checkpoint_every_images=0, gradient_checkpointing="true",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "precision: bf16" in result.stdout
    unet = DDPMFacesPipeline.from_pretrained(tmp_path / "run").unet
    assert unet.config.out_block_type == "conv"
    assert unet.dtype == torch.float32
    assert {entry["learning_rate"] for entry in read_log(tmp_path / "run")} == {1e-3}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train_data_dir": "no/such/folder"}, "`train_data_dir` must be an existing folder"),
        ({"resolution": 17}, "`sample_size` must be .* multiple of 2"),
        ({"output_dir": ROOT / "README.md"}, "`output_dir` must be a folder"),
        ({"num_drawn_images": 4}, "needs at least 8 pictures, and the data set has 4"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, overrides, message):
    result = train(**{"output_dir": tmp_path / "run", **overrides})
    assert result.returncode != 0
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "run").exists()


def test_another_model_in_the_same_folder_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = weights(tmp_path / "run")
    result = train(tmp_path / "run", block_out_channels=[8, 12], beta_end=0.03)
    assert result.returncode != 0
    assert "block_out_channels: [8, 16] there, [8, 12] now; beta_end: 0.02 there, 0.03 now" in result.stderr
    result = train(tmp_path / "run", resume="never")
    assert "holds checkpoints of an earlier run" in result.stderr
    (tmp_path / "run" / "training_config.yaml").unlink()
    result = train(tmp_path / "run")
    assert "holds checkpoints but no training_config.yaml" in result.stderr
    assert_equal_weights(weights(tmp_path / "run"), before)
