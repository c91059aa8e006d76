"""Training is tested by launching the real script, with injected faults.

Tests that need `accelerate launch` use it. All other runs are forks of a process that has imported the dependencies of
the script, which saves more than ten seconds each.
"""

import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ALL_CORES, tiny_unet
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from diffusers import DiffusionPipeline
from forked import run_script
from hub_server import OWNER_TOKEN, READER_TOKEN
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTextConfig, CLIPTextModel

from ddpm_faces import DDPMFacesPipeline, fast_solver
from ddpm_faces.plots import image_grid
from ddpm_faces.training.checkpoint import list_checkpoints
from ddpm_faces.training.cores import use_all_cores
from ddpm_faces.training.preemption import EXIT_NONFINITE, EXIT_PREEMPTED
from ddpm_faces.training.setup import copy_weights


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "training" / "train.py"
TINY = {
    "resolution": 16, "num_drawn_images": 40, "block_out_channels": [8, 16], "block_types": ["resnet"],
    "norm_num_groups": 4, "num_train_timesteps": 20, "train_batch_size": 8, "max_train_images": 96,
    "lr_warmup_images": 16, "log_every_images": 16, "num_samples": 3, "sample_inference_steps": 4,
    "sample_every_images": 48, "checkpoint_every_images": 48, "ema_half_life_images": 32,
    "num_validation_images": 4, "validate_every_images": 32, "dropout": 0.1, "random_flip": "true",
}  # fmt: skip


ARTICLE = {
    "block_types": ["conv"], "mid_block_type": "none", "out_block_type": "conv", "time_embedding_layers": 1,
    "time_embedding_dim": 32, "act_fn": "relu", "dropout": 0,
}  # fmt: skip
slow = pytest.mark.slow


def command(
    output_dir: Path,
    num_processes: int = 1,
    mixed_precision: str = "no",
    launch_config: str = "cpu2.yaml",
    launch: bool = False,
    **overrides,
) -> list[str]:
    launcher = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    if num_processes > 1 and (launch or launch_config != "cpu2.yaml"):
        config_file = ROOT / "training" / "accelerate" / launch_config
        launcher = ["--config_file", str(config_file), "--num_processes", str(num_processes)]
    flags = []
    for name, value in {**TINY, **overrides, "output_dir": output_dir}.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    launcher = ["-m", "accelerate.commands.launch", *launcher, "--mixed_precision", mixed_precision]
    if not launch and launch_config == "cpu2.yaml":
        launcher = []
        flags += ["--mixed_precision", mixed_precision] if mixed_precision != "no" else []
    return [sys.executable, *launcher, str(SCRIPT), *flags]


def environment(faults: dict | None = None) -> dict[str, str]:
    extra = {"ACCELERATE_USE_CPU": "true"}
    if faults is not None:
        path = [str(ROOT / "tests" / "faults"), os.environ.get("PYTHONPATH", "")]
        extra |= {"FAULTS": json.dumps(faults), "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return {**os.environ, **extra}


def train(output_dir: Path, num_processes: int = 1, faults: dict | None = None, **overrides):
    """Launch a run, wait for it, and return its result: of several processes, that of the first failure."""
    arguments, environ = command(output_dir, num_processes, **overrides), environment(faults)
    if arguments[1] != str(SCRIPT):
        return subprocess.run(arguments, env=environ, capture_output=True, text=True, start_new_session=True)
    results = run_script(arguments[1:], environ, num_processes)
    failures = [result.returncode for result in results if result.returncode]
    stdout, stderr = ("".join(getattr(result, name) for result in results) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, failures[0] if failures else 0, stdout, stderr)


def succeed(output_dir: Path, *args, **overrides) -> str:
    result = train(output_dir, *args, **overrides)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(output_dir: Path, *args, **overrides) -> str:
    result = train(output_dir, *args, **overrides)
    assert result.returncode != 0
    return f"{result.stdout}{result.stderr}\nexit status {result.returncode}"


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors")


def read_log(output_dir: Path, key: str = "loss") -> list[dict]:
    entries = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if key in entry]


def untimed(output_dir: Path) -> list[dict]:
    """Return the log without the entries that depend on the clock and the machine."""
    timed = {"images_per_second", "data_wait", "memory_gb"}
    entries = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in timed} for entry in entries]


def checkpoint_names(output_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in list_checkpoints(output_dir)]


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_close_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float = 2e-3) -> None:
    """Assert equality up to float32 rounding, which Adam's division by tiny moments amplifies."""
    for name in a:
        assert (a[name] - b[name]).float().norm() <= rtol * b[name].float().norm() + 1e-6, name


def assert_same_run(run: Path, expected: Path) -> None:
    """Assert that EMA, raw weights, optimizer and all log entries are bit-identical."""
    assert_equal_weights(weights(run), weights(expected))
    last = [list_checkpoints(folder)[-1] for folder in (run, expected)]
    assert last[0].name == last[1].name
    for name in ("model.safetensors", "ema.safetensors"):
        assert_equal_weights(*(load_file(folder / name) for folder in last))
    states = [torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in last]
    for index in states[0]:
        assert all(torch.equal(states[0][index][name], states[1][index][name]) for name in states[0][index])
    assert untimed(run) == untimed(expected)
    assert not list(run.rglob(".unfinished*"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """An uninterrupted run. Tests must not write to it."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    assert str(output_dir / "samples.png") in succeed(output_dir, launch=True)
    return output_dir


@pytest.fixture(scope="session")
def parquet(tmp_path_factory) -> Path:
    """A dataset folder with four files and classes."""
    folder = tmp_path_factory.mktemp("parquet") / "set"
    (folder / "data").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, sizes in {"train": [10] * 4, "test": [4]}.items():
        for shard, size in enumerate(sizes):
            rows = {"face": [], "kind": [], "texts": []}
            for number in range(size):
                buffer = io.BytesIO()
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "PNG")
                rows["face"].append({"bytes": buffer.getvalue(), "path": f"{split}{shard}-{number}.png"})
                rows["kind"].append(number % 3)
                rows["texts"].append([f"a {'gray' if number % 2 else 'red'} face with noise and no hair", "a face"])
            features = Features({"face": ImageFeature(), "kind": Value("int64"), "texts": List(Value("string"))})
            path = folder / "data" / f"{split}-{shard:05d}-of-{len(sizes):05d}.parquet"
            Dataset.from_dict(rows, features).to_parquet(path)
    return folder


# A run and its output


def test_output_of_a_run(finished):
    pipeline = DDPMFacesPipeline.from_pretrained(finished)
    assert pipeline(2).images[0].size == (16, 16)
    assert pipeline.scheduler.config.num_train_timesteps == 20
    assert pipeline.config.weights == "ema"
    for path in finished.rglob("*.safetensors"):  # have the permissions of the umask
        assert path.stat().st_mode & 0o666 == path.parent.stat().st_mode & 0o666
    alone = DiffusionPipeline.from_pretrained(finished, trust_remote_code=True)  # with the code in the folder
    assert alone(2).images[0].size == (16, 16)

    log = read_log(finished)
    assert [entry["images_seen"] for entry in log] == list(range(16, 97, 16))
    assert [entry["epoch"] for entry in log] == [0, 0, 1, 1, 1, 2]  # an epoch has five batches of eight
    assert all(entry["images_per_second"] > 0 and np.isfinite(entry["loss"]) for entry in log)
    assert all(0 <= entry["data_wait"] < 1 and entry["memory_gb"] > 0.1 and entry["grad_norm"] > 0 for entry in log)
    # Warm-up to 1e-3 over two steps, then a cosine to 0 after the last image; at the last step of each entry.
    rates = [entry["learning_rate"] for entry in log]
    expected = [5e-4, *(1e-3 * (1 + np.cos(np.pi * (images - 24) / 80)) / 2 for images in range(32, 97, 16))]
    np.testing.assert_allclose(rates, expected, atol=1e-9)
    by_bin = log[0]["loss_by_timestep"]
    assert list(by_bin)[:2] == ["00-01", "02-03"]
    assert len(by_bin) == 10

    assert checkpoint_names(finished) == [64, 96]  # the newest two; the last one is the best
    for name in ("samples.png", "loss_curve.png", "samples/0000000048.png"):
        assert Image.open(finished / name).size[0] > 100
    events = EventAccumulator(str(finished / "logs" / "training")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(16, 97, 16))
    assert [event.step for event in events.Scalars("held_out_loss")] == [32, 64, 96]
    assert [event.step for event in events.Images("samples")] == [48, 96]
    assert not list(finished.rglob(".unfinished*"))


def test_progress_in_the_log_of_a_job_is_short(tmp_path):
    """In a log file every update is a line, so there is one every ten seconds, for any speed."""
    lengths = {"train_batch_size": 1, "max_train_images": 300, "log_every_images": 300}
    never = {f"{what}_every_images": 0 for what in ("sample", "checkpoint", "validate")}
    result = train(tmp_path / "run", **lengths, **never, num_samples=1)
    assert result.returncode == 0, result.stderr
    assert "300/300" in result.stderr
    seconds = 3600 * json.loads((tmp_path / "run" / "training_summary.json").read_text())["hours"]
    assert result.stderr.count("Training:") < 10 + seconds / 10


def test_saved_weights_are_the_ema(finished):
    """The checkpoint contains raw and EMA weights, and the pipeline the EMA weights."""
    last = list_checkpoints(finished)[-1]
    saved = weights(finished)
    assert all(torch.equal(value, saved[name]) for name, value in load_file(last / "ema.safetensors").items())
    raw = load_file(last / "model.safetensors")
    assert any(not torch.equal(value, raw[name]) for name, value in saved.items())


@slow
def test_ema_averages_the_statistics_of_batch_norm(tmp_path):
    """EMA weights with the statistics of the raw weights would normalise other activations."""
    run = tmp_path / "run"
    succeed(run, **ARTICLE)
    last = list_checkpoints(run)[-1]
    averaged, raw, saved = load_file(last / "ema.safetensors"), load_file(last / "model.safetensors"), weights(run)
    statistics = [name for name in saved if name.endswith(("running_mean", "running_var"))]
    assert statistics
    for name in statistics:
        assert torch.equal(saved[name], averaged[name])
        assert not torch.equal(saved[name], raw[name])


def test_grid_shows_raw_and_ema_weights(finished):
    pictures = [np.asarray(Image.open(finished / "samples" / f"{n:010d}.png")) for n in (48, 96)]
    assert pictures[0].shape[1] > 2 * pictures[1].shape[1]
    width = pictures[1].shape[1]
    raw, averaged = pictures[0][-width:, :width], pictures[0][-width:, -width:]
    assert (raw != averaged).any()


def test_validation_and_samples_do_not_affect_training(finished, tmp_path):
    """Dropout draws from the global random state, so a change of this state would be noticed."""
    succeed(
        tmp_path / "run", sample_every_images=8, num_samples=1, validate_every_images=8, num_validation_images=4,
        report_to="none", checkpoint_every_images=16, sample_sigma_min=0.5,
    )  # fmt: skip
    assert_equal_weights(weights(tmp_path / "run"), weights(finished))
    assert not (tmp_path / "run" / "logs").exists()
    expected = {entry["images_seen"]: entry["held_out_loss"] for entry in read_log(finished, "held_out_loss")}
    actual = {entry["images_seen"]: entry["held_out_loss"] for entry in read_log(tmp_path / "run", "held_out_loss")}
    assert {images_seen: actual[images_seen] for images_seen in expected} == expected

    # The grid can be reproduced from the checkpoint.
    checkpoint = list_checkpoints(tmp_path / "run")[-2]
    pipeline = DDPMFacesPipeline.from_pretrained(tmp_path / "run")
    pipeline.unet.load_state_dict(load_file(checkpoint / "ema.safetensors"))
    pipeline.scheduler = fast_solver(pipeline.scheduler, sigma_min=0.5)
    expected = image_grid(pipeline(1, 4, torch.Generator().manual_seed(0)).images, scale=8)
    picture = Image.open(tmp_path / "run" / "samples" / f"{checkpoint.name.removeprefix('checkpoint-')}.png")
    averaged = picture.crop((picture.width - expected.width, picture.height - expected.height, *picture.size))
    assert np.abs(np.asarray(averaged, dtype=int) - np.asarray(expected)).max() <= 1


# A guide


def test_early_ema_becomes_the_guide(finished, tmp_path):
    """The guide survives an interruption, is used for samples, and is saved. The training does not change."""
    run = tmp_path / "run"
    settings = {"autoguidance_scale": 1.5, "guide_images": 30, "checkpoints_total_limit": 9}
    fail(
        run, 1, {"in_step": {"at": 24, "signal": "SIGUSR1"}}, **settings
    )  # before the tasks that are due after 32 images
    output = fail(run, 1, {"in_step": {"at": 72}}, **settings)
    assert "The weights after 32 images are kept as the guide." in output
    assert "as the guide" not in succeed(run, **settings)
    assert_equal_weights(weights(run), weights(finished))

    pipeline = DDPMFacesPipeline.from_pretrained(run)
    assert pipeline.config.autoguidance_scale == 1.5
    assert_equal_weights(pipeline.guide.state_dict(), load_file(run / "checkpoint-0000000032" / "ema.safetensors"))
    expected = image_grid(pipeline(1, generator=torch.Generator().manual_seed(0)).images, scale=8)
    drawn = Image.open(run / "samples.png").crop((0, 0, *expected.size))
    assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(expected)).max() <= 1
    for name in ("0000000048.png", "0000000096.png"):
        assert (run / "samples" / name).read_bytes() != (finished / "samples" / name).read_bytes()
    summary = json.loads((run / "training_summary.json").read_text())
    assert (summary["guide_images_seen"], summary["autoguidance_scale"]) == (32, 1.5)


def test_guide_without_ema_and_after_guidance_is_switched_off(tmp_path):
    run = tmp_path / "run"
    fail(run, 1, {"in_step": {"at": 72}}, autoguidance_scale=1.5, use_ema="false", checkpoints_total_limit=9)
    output = succeed(run, autoguidance_scale=1, use_ema="false", checkpoints_total_limit=9)
    assert "`autoguidance_scale` was 1.5 and is 1.0: the learned weights are not affected" in output
    assert DDPMFacesPipeline.from_pretrained(run).guide is None
    # The last checkpoint has no guide, so none is restored. The one after 64 images has the guide of a quarter.
    output = succeed(run, autoguidance_scale=1.5, use_ema="false", checkpoints_total_limit=9)
    assert "Note: The run kept no guide after 24 images, and it is past that point." in output
    assert "Note: the pipeline has no guide, because the run kept none after 24 images" in output
    assert json.loads((run / "training_summary.json").read_text())["autoguidance_scale"] == 1
    shutil.rmtree(run / "checkpoint-0000000096")
    succeed(run, autoguidance_scale=1.5, use_ema="false", checkpoints_total_limit=9)
    guide = DDPMFacesPipeline.from_pretrained(run).guide.state_dict()
    assert_equal_weights(guide, load_file(run / "checkpoint-0000000064" / "guide.safetensors"))
    succeed(run, autoguidance_scale=1, use_ema="false", checkpoints_total_limit=9)
    assert not (run / "guide").exists()
    succeed(tmp_path / "last", max_train_images=96, autoguidance_scale=1.5, guide_images=90, use_ema="false")
    assert DDPMFacesPipeline.from_pretrained(tmp_path / "last").guide is None  # it would equal the network itself


# Exact resume


SOURCES = {
    "map": {},
    "stream": {
        "streaming": "true", "image_column": "face", "validation_split": "test", "shuffle_block_size": 4,
        "label_column": "kind", "num_class_embeds": 3,
    },
    "captions": {"caption_column": "caption", "text_embed_dim": 16, "guidance_scale": 2, "autoguidance_scale": 1.5},
    "stream of captions": {
        "streaming": "true", "image_column": "face", "validation_split": "test", "shuffle_block_size": 4,
        "caption_column": "texts", "text_embed_dim": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("num_processes", "source", "mixed_precision"),
    [
        (2, "stream", "bf16"),
        (1, "captions", "no"),
        pytest.param(2, "stream of captions", "bf16", marks=slow),
        pytest.param(1, "map", "no", marks=slow),
        pytest.param(2, "map", "no", marks=slow),
        pytest.param(1, "map", "bf16", marks=slow),
        pytest.param(1, "stream", "no", marks=slow),
        pytest.param(1, "stream", "bf16", marks=slow),
        pytest.param(2, "map", "bf16", marks=slow),
        pytest.param(2, "stream", "no", marks=slow),
    ],
)
def test_killed_run_resumes_bit_for_bit(tmp_path, parquet, num_processes, source, mixed_precision):
    """The run is killed during a step in the middle of an epoch, and again during a save."""
    settings = {**SOURCES[source], "mixed_precision": mixed_precision}
    if "stream" in source:
        settings["dataset_name"] = parquet
    expected = tmp_path / "expected"
    succeed(expected, num_processes, **settings)
    run = tmp_path / "run"
    fail(run, num_processes, {"in_step": {"at": 72}}, **settings)  # two steps after a checkpoint
    assert checkpoint_names(run)[-1] == 64
    assert not (run / "model_index.json").exists()
    with pytest.raises(OSError, match="model_index.json"):
        DDPMFacesPipeline.from_pretrained(run)
    fail(run, num_processes, {"in_save": {"stage": "before_commit", "at": 96, "step": 8}}, **settings)
    assert checkpoint_names(run)[-1] == 64
    assert list(run.glob(".unfinished*"))
    assert "after 64 images" in succeed(run, num_processes, **settings)
    assert_same_run(run, expected)


# Each fault, the message of the run, and its newest checkpoint afterwards. Steps have 8 images. Checkpoints are due
# after 48 and 96 images, and after 32 and 64, where the held-out loss is the best so far.
LINEAGE = [
    ({"in_step": {"at": 0, "signal": "SIGTERM"}}, "Preempted after 8 of 96 images: received SIGTERM", 8),
    ({"in_step": {"at": 8, "signal": "SIGINT"}}, "Preempted after 16 of 96 images: received SIGINT", 16),
    ({"in_step": {"at": 16, "signal": "SIGUSR1"}}, "Preempted after 24 of 96 images: received SIGUSR1", 24),
    ({"in_step": {"at": 24, "signal": "SIGUSR1"}}, "Preempted after 32 of 96 images: received SIGUSR1", 32),
    ({"in_save": {"stage": "before_prune", "at": 48, "step": 8}}, "after 32 images", 48),
    ({"in_step": {"at": 56}, "cut_log": True}, "after 48 images", 48),
    ({"in_save": {"stage": "before_commit", "at": 64, "step": 8}}, "after 48 images", 48),
    ({"in_save": {"stage": "before_state", "at": 64, "step": 8}}, "after 48 images", 48),
    ({"disk_full": {"from": 64, "to": 97, "bytes": 20_000}}, "could not be saved", 48),
    ({"age_minutes": 60}, "Preempted after 56 of 96 images: the time limit is near", 56),
    ({"in_step": {"at": 64, "signal": "SIGKILL", "target": "launcher"}}, "after 56 images", 72),
]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its launcher died")
@pytest.mark.parametrize("faults", [LINEAGE[3:7] + LINEAGE[9:], pytest.param(LINEAGE, marks=slow)], ids=["six", "all"])
def test_run_with_every_fault_equals_an_uninterrupted_run(finished, tmp_path, faults):
    run = tmp_path / "run"
    for fault, message, newest in faults:
        limit = {"time_limit_minutes": 60} if "age_minutes" in fault else {}
        output = fail(run, 1, fault, launch="target" in fault.get("in_step", {}), **limit)
        assert message in output, (fault, output)
        if "Preempted" in message:
            assert f"exit status {EXIT_PREEMPTED}" in output
        assert checkpoint_names(run)[-1] == newest, fault
        assert not (run / "model_index.json").exists()
        with pytest.raises(OSError, match="model_index.json"):
            DDPMFacesPipeline.from_pretrained(run)
        if fault.get("cut_log"):
            with (run / "log.jsonl").open("a") as file:
                file.write('{"images_seen": 80, "lo')
    assert "after 72 images" in succeed(run)
    assert_same_run(run, finished)


@slow
def test_temporarily_full_disk_loses_nothing(finished, tmp_path):
    run = tmp_path / "run"
    result = train(run, 1, {"disk_full": {"from": 48, "to": 96, "bytes": 20_000}})
    assert result.returncode == 0, result.stderr
    assert "could not be saved" in result.stderr
    assert "The run continues" in result.stderr
    assert checkpoint_names(run) == [32, 96]
    assert_same_run(run, finished)


def test_one_rank_killed(tmp_path):
    """The others do not hang, and the earlier checkpoint stays."""
    run = tmp_path / "run"
    fail(run, 2, {"in_step": {"at": 40, "rank": 1}}, launch=True)
    assert checkpoint_names(run)[-1] == 32
    assert not (run / "model_index.json").exists()


def test_damaged_checkpoint_is_set_aside_and_the_previous_one_used(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    optimizer = run / "checkpoint-0000000096" / "optimizer.bin"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    output = succeed(run)
    assert f"Warning: {run / 'checkpoint-0000000096'} is damaged: optimizer.bin has " in output
    assert "Resuming from" in output
    assert "after 64 images" in output
    assert_same_run(run, finished)
    assert (run / "damaged-checkpoint-0000000096").is_dir()


@slow
def test_ema_switched_on_in_the_middle_of_a_run(tmp_path):
    run = tmp_path / "run"
    fail(run, 1, {"in_step": {"at": 72}}, use_ema="false")
    output = succeed(run, use_ema="true")
    assert "`use_ema` was False and is True" in output
    assert "The checkpoint has no EMA: it starts from the weights after 64 images." in output


def test_training_in_a_thread_and_its_signal_handlers(tmp_path):
    """A notebook calls `main` in a process that continues, and a server calls it in a thread."""
    flags = command(tmp_path / "run", report_to="none")[2:]
    code = f"""
import runpy, signal, sys, threading
script = runpy.run_path({str(SCRIPT)!r})
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
config = script["parse_training_config"]({flags!r})
script["main"](config)
assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
other = script["replace"](config, output_dir={str(tmp_path / "other")!r})
thread = threading.Thread(target=script["main"], args=(other,))
thread.start()
thread.join()
"""
    (tmp_path / "notebook.py").write_text(code)
    (result,) = run_script([str(tmp_path / "notebook.py")], environment())
    assert result.returncode == 0, result.stderr
    assert_equal_weights(weights(tmp_path / "run"), weights(tmp_path / "other"))


@pytest.mark.parametrize(("num_processes", "fault"), [(1, {}), (2, {"rank": 1})])
def test_failed_final_images_keep_the_model(tmp_path, num_processes, fault):
    """If one process of two fails, the other does not wait for it."""
    output = train(tmp_path / "run", num_processes, faults={"last_grid": fault})
    assert output.returncode == 0, output.stderr
    assert "The last grid of samples could not be drawn: ZeroDivisionError" in output.stderr
    assert DDPMFacesPipeline.from_pretrained(tmp_path / "run").config.weights == "ema"
    assert (tmp_path / "run" / "training_summary.json").exists()
    assert (tmp_path / "run" / "loss_curve.png").exists()


@slow
def test_images_that_were_trained_on_are_never_held_out(tmp_path):
    run = tmp_path / "run"
    for count, images, expected in ((4, 48, 4), (2, 96, 2), (4, 144, 2)):
        output = succeed(run, num_validation_images=count, max_train_images=images, num_drawn_images=40 - count)
        assert f"({expected} more held out)" in output


@slow
def test_damaged_best_checkpoint_leaves_the_last_weights(tmp_path):
    run = tmp_path / "run"
    settings = {"early_stopping_patience": 1, "validate_every_images": 16, "learning_rate": 0.3, "max_grad_norm": 0}
    settings |= {"lr_scheduler": "constant", "max_train_images": 2000, "sample_every_images": 0}
    succeed(run, **settings)
    losses = {entry["images_seen"]: entry["held_out_loss"] for entry in read_log(run, "held_out_loss")}
    best = run / f"checkpoint-{min(losses, key=losses.get):010d}" / "model.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    assert "model.safetensors has " in (output := succeed(run, **settings))
    assert "the pipeline has the latest weights." in output


# Preemption


def test_exit_codes_without_launcher(tmp_path):
    """Runs are started as with `srun` in examples/slurm.sh: one process per GPU, each with its own exit code.

    One of the two receives the signal, and both end. The tasks due after their last step are done on resuming.
    """
    faults = {"in_step": {"at": 24, "rank": 1, "signal": "SIGUSR1"}}
    results = run_script(command(tmp_path / "run")[1:], environment(faults), num_processes=2)
    assert [result.returncode for result in results] == [EXIT_PREEMPTED] * 2, results
    assert checkpoint_names(tmp_path / "run") == [32]
    succeed(tmp_path / "run", 2)
    assert [entry["images_seen"] for entry in read_log(tmp_path / "run", "held_out_loss")] == [32, 64, 96]


def test_compiled_run_ends_like_any_other(finished, tmp_path, monkeypatch):
    # Uses dynamo without a compiler, so results equal PyTorch's up to rounding. Its wrapper would rename all weights.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    succeed(tmp_path / "run")
    assert_close_weights(weights(tmp_path / "run"), weights(finished))
    last = [list_checkpoints(folder)[-1] for folder in (tmp_path / "run", finished)]
    assert last[0].name == last[1].name
    for name in ("model.safetensors", "ema.safetensors"):
        ours, theirs = (load_file(folder / name) for folder in last)
        assert ours.keys() == theirs.keys()
        assert_close_weights(ours, theirs)


@pytest.mark.parametrize(
    ("threads", "cores", "processes", "expected"),
    [(1, 4, 1, 4), (1, 4, 2, 2), (2, 1, 1, 1), (8, 4, 1, 4), (4, 4, 2, 2), (3, 4, 1, 3), (1, 1, 2, 1)],
)
def test_threads_are_no_more_than_cores(monkeypatch, threads, cores, processes, expected):
    """The launcher sets one thread, or one per core of the machine. Any other number is the user's choice."""
    chosen = [threads]
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr("ddpm_faces.training.cores.cgroup_limit", lambda: None)
    use_all_cores()
    assert chosen[-1] == expected


def test_two_runs_in_one_folder(finished, tmp_path):
    """The second is refused while the first is alive. Here, another process holds the lock."""
    run = tmp_path / "run"
    run.mkdir()
    lock = f"lock = filelock.FileLock({str(run / '.lock')!r})"
    hold = f"import filelock, time; {lock}; lock.acquire(); print('held', flush=True)"
    holder = subprocess.Popen([sys.executable, "-c", hold + "; time.sleep(600)"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        faults = {"lock_timeout": 0.1}
        assert "is in use by another run" in fail(run, 1, faults)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()


# Independence of the layout


INVARIANT = {"dropout": 0, "augment_probability": 0.5, "random_flip": None, "low_discrepancy_timesteps": "true"}


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """A run without dropout, because each process draws its own. Tests must not write to it."""
    output_dir = tmp_path_factory.mktemp("reference") / "run"
    succeed(output_dir, **INVARIANT)
    return output_dir


def test_low_discrepancy_covers_each_tenth_of_the_timesteps(finished, reference):
    """A log entry has sixteen images, and multiples of the golden ratio leave no gap of a tenth."""

    def missed(run: Path) -> int:
        return sum(loss is None for entry in read_log(run) for loss in entry["loss_by_timestep"].values())

    assert missed(reference) == 0
    assert missed(finished) > 0


@pytest.mark.parametrize(
    ("num_processes", "device_batch_size"),
    [(2, None), pytest.param(1, 2, marks=slow), pytest.param(4, 1, marks=slow)],
    ids=str,
)
def test_layout_changes_only_rounding(tmp_path, reference, num_processes, device_batch_size):
    run = tmp_path / "run"
    succeed(run, num_processes, device_batch_size=device_batch_size, launch=num_processes == 4, **INVARIANT)
    assert_close_weights(weights(run), weights(reference))
    rates = [[entry["learning_rate"] for entry in read_log(folder)] for folder in (run, reference)]
    assert rates[0] == rates[1]
    for key in ("loss", "held_out_loss", "grad_norm"):
        values = [[entry[key] for entry in read_log(folder, key)] for folder in (run, reference)]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-3)
    pictures = [np.asarray(Image.open(folder / "samples.png"), dtype=int) for folder in (run, reference)]
    assert np.abs(pictures[0] - pictures[1]).mean() < 2


@slow
def test_sharded_over_processes(tmp_path, reference):
    """FSDP shards parameters, gradients, moments and EMA. They are saved, resumed, and complete in the pipeline."""
    run = tmp_path / "run"
    settings = {**INVARIANT, "autoguidance_scale": 1.5}
    fail(run, 2, {"fsdp": True, "in_step": {"at": 72}}, launch_config="fsdp.yaml", **settings)
    assert not (list_checkpoints(run)[-1] / "model.safetensors").exists()
    assert "after 64 images" in succeed(run, 2, {"fsdp": True}, launch_config="fsdp.yaml", **settings)
    assert_close_weights(weights(run), weights(reference))
    losses = [[entry["held_out_loss"] for entry in read_log(folder, "held_out_loss")] for folder in (run, reference)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    guide = DDPMFacesPipeline.from_pretrained(run).guide.state_dict()
    assert_equal_weights(guide, load_file(list_checkpoints(run)[-1] / "guide.safetensors"))


@slow
def test_batch_norm_uses_the_batch_of_all_processes(tmp_path):
    """Without this, the article's network would train differently on half of the batch."""
    one = succeed(tmp_path / "one", 1, **ARTICLE)
    succeed(tmp_path / "two", 2, **ARTICLE)
    assert_close_weights(weights(tmp_path / "two"), weights(tmp_path / "one"))
    assert "BatchNorm" not in one


@slow
def test_resuming_with_another_layout_prints_notes(finished, tmp_path):
    run = tmp_path / "run"
    fail(run, 1, {"in_step": {"at": 72}})
    output = succeed(run, 2, learning_rate=5e-4, num_drawn_images=44)
    assert "processes 1 -> 2" in output
    assert "`learning_rate` was 0.001 and is 0.0005: the new value applies from here on" in output
    assert "`num_drawn_images` was 40 and is 44" in output
    assert "The training images have changed" in output
    assert read_log(run)[-2]["learning_rate"] == pytest.approx(read_log(finished)[-2]["learning_rate"] / 2)


@slow
def test_stream_resumed_with_another_number_of_processes(tmp_path, parquet):
    run = tmp_path / "run"
    settings = {**SOURCES["stream"], "dataset_name": parquet}
    fail(run, 2, {"in_step": {"at": 72}}, **settings)
    assert re.search(r"restarts epoch 1, because `num_processes` was 2 and is 1", succeed(run, 1, **settings))


# Non-finite values


def test_nonfinite_steps_are_skipped_counted_and_named(tmp_path):
    """Two steps are not finite on one of two processes. After the second, the run is preempted and resumes."""
    run = tmp_path / "run"
    faults = {"nan": {"from": 32, "to": 48, "rank": 1, "picture": 2}, "in_step": {"at": 40, "signal": "SIGTERM"}}
    assert "Preempted after 48 of 96 images" in fail(run, 2, faults)
    succeed(run, 2)
    log = read_log(run)
    assert [entry["skipped_steps"] for entry in log] == [0, 0, 2, 2, 2, 2]
    assert all(np.isfinite(entry["loss"]) for entry in log)
    skipped = [json.loads(line) for line in (run / "skipped_steps.jsonl").read_text().splitlines()]
    assert [entry["images_seen"] for entry in skipped] == [40, 48]
    for entry in skipped:
        assert [np.isfinite(loss) for loss in entry["losses"]] == [True] * 6 + [False] + [True]
        assert len(entry["pictures"]) == len(entry["timesteps"]) == 8
        assert all(re.fullmatch(r"drawn face \d+", name) for name in entry["pictures"])
    assert all(value.isfinite().all() for value in weights(run).values())


def test_run_stops_after_too_many_nonfinite_steps(finished, tmp_path):
    """Uses an article network, whose BatchNorm statistics must not change either."""
    run = tmp_path / "run"
    output = fail(run, 1, {"nan": {"from": 48, "to": 1000}}, max_nonfinite_steps=3, validate_every_images=0, **ARTICLE)
    assert f"exit status {EXIT_NONFINITE}" in output
    assert re.search(r"3 steps in a row .* Last good checkpoint: .*checkpoint-0000000048", output)
    assert re.search(r"Skipped the step .* its gradient norm is nan.*drawn face \d+ at timestep \d+", output)
    assert checkpoint_names(run) == [48]
    assert not (run / "model_index.json").exists()
    assert all(value.isfinite().all() for value in load_file(list_checkpoints(run)[0] / "model.safetensors").values())


def test_weights_that_are_not_finite_are_neither_saved_nor_published(tmp_path):
    """A huge learning rate makes them infinite in a step with a finite gradient."""
    run = tmp_path / "run"
    output = fail(run, 1, learning_rate=1e39, lr_warmup_images=0, max_nonfinite_steps=100)
    assert f"exit status {EXIT_NONFINITE}" in output
    assert "The weights are not finite after 48 images and were not saved" in output
    assert checkpoint_names(run) == []
    assert not (run / "model_index.json").exists()


# Failures of the disk, of images and of workers


@pytest.fixture
def pictures(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / kind / f"{i}.png")
    return tmp_path / "pictures"


def test_unreadable_images(pictures, tmp_path):
    (pictures / "cats" / "broken.png").write_bytes(b"no picture")
    settings = {"train_data_dir": pictures, "max_train_images": 16, "num_validation_images": 0, "report_to": "none"}
    output = fail(tmp_path / "run", **settings)
    assert "1 of 17 images cannot be read" in output
    assert "broken.png" in output
    assert not (tmp_path / "run").exists()
    result = train(tmp_path / "run", skip_unreadable="true", **settings)
    assert result.returncode == 0, result.stderr
    assert "16 images" in result.stdout
    assert "broken.png" in result.stderr


def test_dead_worker_is_replaced(finished, tmp_path):
    run = tmp_path / "run"
    result = train(run, 1, {"worker": {"marker": str(tmp_path / "died")}}, dataloader_num_workers=1)
    assert result.returncode == 0, result.stderr
    assert "A data worker died" in result.stderr
    assert_equal_weights(weights(run), weights(finished))


# Data


def test_article_network_in_bf16_from_a_folder_of_images(pictures, tmp_path, monkeypatch, all_cores):
    """The precision comes from `accelerate launch`, and everything that the configuration switches off is off."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as `accelerate launch` sets it without --cpu
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    output = succeed(
        tmp_path / "run", launch=True, mixed_precision="bf16", config=ROOT / "training/configs/article64.yaml",
        train_data_dir=pictures, block_types=["conv"], random_flip="true", max_train_images=32, dropout=None,
        checkpoint_every_images=0, gradient_checkpointing="true", num_validation_images=0, lr_warmup_images=None,
        device_batch_size=4,
    )  # fmt: skip
    assert "precision: bf16" in output
    if platform.machine() in ("x86_64", "AMD64"):
        assert "this CPU (AVX2) has no bf16 instructions" in output
    assert "BatchNorm sees the 4 images of a micro-batch" in output
    if ALL_CORES:
        assert f"({len(ALL_CORES)} CPU threads each)" in output
    pipeline = DDPMFacesPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.unet.config.out_block_type == "conv"
    assert pipeline.unet.dtype == torch.float32
    assert pipeline.config.weights == "raw"
    assert {entry["learning_rate"] for entry in read_log(tmp_path / "run")} == {1e-3}


@slow
def test_classes_random_crops_of_wide_images_and_augmentation(pictures, tmp_path):
    succeed(
        tmp_path / "run", train_data_dir=pictures, label_column="folder", resolution=[16, 24], crop="random",
        in_channels=1, augment_probability=0.3, random_flip=None, max_train_images=32, num_validation_images=0,
        checkpoint_every_images=0, report_to="none", dataloader_num_workers=1,
    )  # fmt: skip
    pipeline = DDPMFacesPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.unet.config.num_class_embeds == 2
    assert pipeline(2, class_labels=[0, 1]).images[0].size == (24, 16)


# Fine-tuning

# One step that changes nothing, so the result shows the initial weights.
STILL = {
    "learning_rate": 1e-30, "max_train_images": 8, "num_validation_images": 0, "checkpoint_every_images": 0,
    "report_to": "none", "num_samples": 1,
}  # fmt: skip


def test_run_starts_from_a_trained_model(finished, pictures, tmp_path):
    """With other images, another size, and new labels for augmentation and classes that have no effect at first."""
    output = succeed(
        tmp_path / "run", pretrained_model_name_or_path=finished, train_data_dir=pictures, resolution=[16, 24],
        label_column="folder", augment_probability=0.3, random_flip=None, dropout=0.2, **STILL,
    )  # fmt: skip
    assert f"Starting from the weights of {finished}." in output
    trained, started = weights(finished), weights(tmp_path / "run")
    new = {name: started.pop(name) for name in ("class_embedding.weight", "augment_embedding.weight")}
    assert_equal_weights(started, trained)
    assert not any(weight.any() for weight in new.values())
    network = dict.fromkeys(("resolution", "block_out_channels", "block_types", "norm_num_groups", "dropout"))
    back = {**STILL, **network, "num_train_timesteps": None}  # taken over from the pretrained model
    succeed(tmp_path / "back", pretrained_model_name_or_path=tmp_path / "run", **back)
    assert_equal_weights(weights(tmp_path / "back"), trained)
    pipeline = DDPMFacesPipeline.from_pretrained(tmp_path / "back")
    assert (pipeline.unet.config.sample_size, pipeline.unet.config.dropout) == ([16, 24], 0.2)


@pytest.mark.parametrize("condition_dropout", [0.5, 1e-9, 0])
def test_classes_are_hidden_at_random(finished, pictures, tmp_path, condition_dropout):
    """The embedding of a class is trained only by the images that have it. New embeddings start at zero."""
    guidance = {"guidance_scale": 2.5} if condition_dropout else {}
    succeed(
        tmp_path / "run", pretrained_model_name_or_path=finished, train_data_dir=pictures, label_column="folder",
        condition_dropout=condition_dropout, max_train_images=32, num_validation_images=0, checkpoint_every_images=0,
        report_to="none", block_out_channels=None, **guidance,
    )  # fmt: skip
    pipeline = DDPMFacesPipeline.from_pretrained(tmp_path / "run")
    embeddings = pipeline.unet.class_embedding.weight
    assert embeddings[:2].any(dim=1).all()
    assert pipeline.unet.config.null_class == (condition_dropout > 0)
    assert len(embeddings) == 2 + (condition_dropout > 0)
    assert embeddings[2:].any() == (condition_dropout == 0.5)
    assert pipeline.config.guidance_scale == guidance.get("guidance_scale", 1.0)


def test_captions_teach_the_network_and_its_encoder(tmp_path):
    """The encoder may be new, come with a pretrained model, or be a frozen one of transformers."""
    settings = {**SOURCES["captions"], "autoguidance_scale": None, "max_train_images": 48, "report_to": "none",
                "checkpoint_every_images": 0}  # fmt: skip
    succeed(tmp_path / "first", **settings)
    first = DDPMFacesPipeline.from_pretrained(tmp_path / "first")
    assert first.config.guidance_scale == 2
    assert first.unet.text_embedding.weight.any()
    assert first.unet.null_text_embed.any()
    call = {"num_inference_steps": 4, "output_type": "pt", "prompt_embeds": first.encode_prompt("a smiling face")}
    images = [
        first(generator=torch.Generator().manual_seed(0), **call, guidance_scale=scale).images for scale in (1, 9)
    ]
    assert not torch.allclose(*images, atol=1e-4)
    last = read_log(tmp_path / "first", "held_out_loss")[-1]
    assert 0 < abs(last["held_out_loss_without_captions"] - last["held_out_loss"]) < 0.1
    prompts = yaml.safe_load((tmp_path / "first" / "training_config.yaml").read_text())["sample_prompts"]
    assert len(prompts) == 3

    still = {**STILL, "block_out_channels": None, "caption_column": "caption"}
    succeed(tmp_path / "further", pretrained_model_name_or_path=tmp_path / "first", **still)
    further = DDPMFacesPipeline.from_pretrained(tmp_path / "further")
    for name in ("unet", "text_encoder"):
        ours, theirs = (getattr(pipeline, name).state_dict() for pipeline in (further, first))
        assert_equal_weights(ours, theirs)
    assert further.tokenizer.get_vocab() == first.tokenizer.get_vocab()

    folder = tmp_path / "clip"
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(first.tokenizer), hidden_size=12, intermediate_size=8,
                                           num_hidden_layers=1, num_attention_heads=2))  # fmt: skip
    encoder.save_pretrained(folder)
    first.tokenizer.save_pretrained(folder)
    succeed(tmp_path / "frozen", text_encoder=folder, **settings)
    frozen = DDPMFacesPipeline.from_pretrained(tmp_path / "frozen")
    assert frozen.unet.config.text_embed_dim == 12
    assert_equal_weights(frozen.text_encoder.state_dict(), encoder.state_dict())
    assert frozen.unet.text_embedding.weight.any()

    # A frozen encoder that came with the pretrained model is part of the checkpoints.
    base = shutil.copytree(tmp_path / "frozen", tmp_path / "base")
    more = {**settings, "pretrained_model_name_or_path": base, "block_out_channels": None, "guidance_scale": None,
            "text_embed_dim": None, "checkpoint_every_images": 24}  # fmt: skip
    succeed(tmp_path / "more", **more)
    for path in [*list_checkpoints(tmp_path / "more")[1:], base]:
        shutil.rmtree(path)
    assert "Resuming from" in succeed(tmp_path / "more", **more)
    resumed = DDPMFacesPipeline.from_pretrained(tmp_path / "more")
    assert_equal_weights(resumed.text_encoder.state_dict(), encoder.state_dict())
    plain = {**more, "pretrained_model_name_or_path": tmp_path / "frozen", "caption_column": None}
    assert "the new model understands no prompts" in succeed(tmp_path / "plain", **plain)


def test_bad_captions_are_named(tmp_path, parquet, pictures):
    run = {"num_validation_images": 0, "report_to": "none"}
    for settings, message in (
        ({"caption_column": "title"}, "`caption_column` of drawn faces must be 'caption' or None, got 'title'"),
        (
            {"caption_column": "kind", "dataset_name": parquet},
            "`caption_column` 'kind' of .* contains no texts. Columns",
        ),
        ({"caption_column": "caption", "train_data_dir": pictures}, r"must be 'txt' \(for face.jpg, the lines of"),
        ({"caption_column": "txt", "train_data_dir": pictures}, "needs text files beside the images"),
        ({"caption_column": "caption", "text_encoder": tmp_path / "no"}, "`text_encoder` '.*no' cannot be loaded"),
        ({"text_encoder": "x"}, "`text_encoder` 'x' needs a `caption_column`"),
        ({"guidance_scale": 2}, r"`guidance_scale` \(2.0\) needs a `label_column` or a `caption_column`"),
    ):
        output = fail(tmp_path / "run", **{**run, **settings})
        assert re.search(message, output), output
        assert "Traceback" not in output
        assert not (tmp_path / "run").exists()


def test_classes_without_a_null_class_gain_one():
    known = tiny_unet(num_class_embeds=3)
    unet = tiny_unet(num_class_embeds=3, null_class=True)
    copy_weights(known, unet)
    assert torch.equal(unet.class_embedding.weight[:3], known.class_embedding.weight)
    assert not unet.class_embedding.weight[3].any()
    assert torch.equal(unet.conv_in.weight, known.conv_in.weight)


def test_texts_are_added_to_a_network_without_effect():
    known, unet = tiny_unet(), tiny_unet(text_embed_dim=16)
    no_text = unet.null_text_embed.clone()
    copy_weights(known, unet)
    x, texts = torch.randn(2, 3, 16, 16), torch.randn(2, 16)
    assert torch.equal(unet(x, 3, text_embeds=texts).sample, known(x, 3).sample)
    assert torch.equal(unet(x, 3).sample, known(x, 3).sample)
    assert torch.equal(unet.null_text_embed, no_text)
    assert 0.5 < no_text.std() < 2


def test_resumed_run_no_longer_needs_its_pretrained_model(finished, tmp_path):
    base = shutil.copytree(finished, tmp_path / "base")
    run = {"pretrained_model_name_or_path": base, "learning_rate": 1e-4, "block_out_channels": None}
    succeed(tmp_path / "whole", **run)
    succeed(tmp_path / "run", **run)
    for path in [*list_checkpoints(tmp_path / "run")[1:], base]:
        shutil.rmtree(path)
    assert "Resuming from" in succeed(tmp_path / "run", **run)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_incompatible_pretrained_model_is_refused(finished, tmp_path):
    output = fail(
        tmp_path / "run", pretrained_model_name_or_path=finished, block_out_channels=[8, 12],
        prediction_type="epsilon", beta_schedule="linear",
    )  # fmt: skip
    assert (
        "does not fit the configuration: its `block_out_channels` is [8, 16], not [8, 12]; its `prediction_type` is "
        "v_prediction, not epsilon; its noise schedule is different." in output
    )
    assert not (tmp_path / "run").exists()


# Validation


def test_early_stopping_keeps_the_best_weights(tmp_path):
    """The learning rate is so high that the loss soon rises."""
    run = tmp_path / "run"
    output = succeed(
        run, early_stopping_patience=2, validate_every_images=16, learning_rate=0.3, lr_scheduler="constant",
        max_train_images=2000, max_grad_norm=0, lr_warmup_images=64, ema_rampup_ratio=0.01, sample_every_images=0,
    )  # fmt: skip
    losses = {entry["images_seen"]: entry["held_out_loss"] for entry in read_log(run, "held_out_loss")}
    best = min(losses, key=losses.get)
    assert f"Stopped early: the held-out loss was best after {best} images" in output
    assert list(losses)[-3] == best
    assert best in checkpoint_names(run)
    averaged = load_file(run / f"checkpoint-{best:010d}" / "ema.safetensors")
    assert_equal_weights(averaged, {name: weights(run)[name] for name in averaged})


@slow
def test_best_checkpoint_that_cannot_be_saved_keeps_the_previous_one(tmp_path):
    """The same training twice; in the second run, the disk is full when the loss is at its best."""
    settings = {"early_stopping_patience": 2, "validate_every_images": 16, "learning_rate": 0.3, "max_grad_norm": 0}
    settings |= {"lr_scheduler": "constant", "max_train_images": 2000, "lr_warmup_images": 64}
    settings |= {"ema_rampup_ratio": 0.01, "sample_every_images": 0, "checkpoints_total_limit": 1}
    succeed(tmp_path / "whole", **settings)
    losses = {entry["images_seen"]: entry["held_out_loss"] for entry in read_log(tmp_path / "whole", "held_out_loss")}
    best = min(losses, key=losses.get)
    second = min((seen for seen in losses if seen != best), key=losses.get)
    disk_full = {"from": best, "to": best + 1, "bytes": 20_000}
    output = succeed(tmp_path / "run", faults={"disk_full": disk_full}, **settings)
    assert f"Stopped early: the held-out loss was best after {second} images" in output
    assert f"The pipeline has the weights after {second} images" in output


ASSESSED = {
    "num_drawn_images": 60, "num_validation_images": 100, "num_evaluation_samples": 100, "max_train_images": 64,
    "sample_every_images": 0, "validate_every_images": 0, "report_to": "none",
}  # fmt: skip


def test_run_stops_on_copies_with_the_last_clean_weights(tmp_path):
    run = tmp_path / "run"
    output = succeed(
        run, faults={"copies": {"from": 40}}, audit_every_images=16, stop_on_copies=True, checkpoints_total_limit=1,
        autoguidance_scale=1.5, guide_images=33, **ASSESSED,
    )  # fmt: skip
    found = {entry["images_seen"]: entry["copies_found"] for entry in read_log(run, "copies_found")}
    assert found == {16: 0, 32: 0, 48: 1}
    assert "Stopped early: samples are copies of training images. The pipeline has the weights after 32" in output
    averaged = load_file(run / "checkpoint-0000000032" / "ema.safetensors")
    assert_equal_weights(averaged, {name: weights(run)[name] for name in averaged})
    assert json.loads((run / "training_summary.json").read_text())["images_seen"] == 32
    verdict = json.loads((run / "metrics.json").read_text())["memorisation"]["verdict"]
    assert verdict.startswith("No more copies than among held-out real faces: by pixels")
    assert Image.open(run / "audits" / "0000000048.png").width > 400
    assert "Note: the pipeline has no guide, because the run kept none after 33 images, or ends with weights" in output
    assert DDPMFacesPipeline.from_pretrained(run).guide is None


def test_clean_checkpoint_that_cannot_be_saved_keeps_the_previous_one(tmp_path):
    output = succeed(
        tmp_path / "run", faults={"copies": {"from": 40}, "disk_full": {"from": 32, "to": 33, "bytes": 20_000}},
        audit_every_images=16, stop_on_copies=True, checkpoints_total_limit=1, **ASSESSED,
    )  # fmt: skip
    assert "The pipeline has the weights after 16" in output


def test_samples_are_evaluated_and_audited_during_training(tmp_path):
    """Copies do not stop a run without `stop_on_copies`, and its metrics.json has the verdict."""
    run = tmp_path / "run"
    succeed(
        run, num_processes=2, faults={"copies": {"from": 40}}, audit_every_images=32, evaluate_every_images=32,
        variance_type="learned_range", autoguidance_scale=1.5, **{**ASSESSED, "num_evaluation_samples": 101},
    )  # fmt: skip
    assert {entry["images_seen"]: entry["copies_found"] for entry in read_log(run, "copies_found")} == {32: 0, 64: 1}
    entries = read_log(run, "evaluation")
    assert [entry["images_seen"] for entry in entries] == [32, 64]
    for entry in entries:
        assert entry["evaluation"]["face_rate"] == 0
        assert entry["evaluation"]["frechet_distance"] > entry["evaluation"]["kernel_distance_x1000"] / 1000 > 0
    assert json.loads((run / "metrics.json").read_text())["memorisation"]["verdict"].startswith("Copies found")


def test_too_few_images_to_audit(pictures, tmp_path):
    output = fail(
        tmp_path / "run", train_data_dir=pictures, num_drawn_images=None, audit_every_images=16,
        num_validation_images=100, checkpoint_every_images=16, report_to="none",
    )  # fmt: skip
    assert "`audit_every_images` needs at least 100 held-out images, and there are" in output
    assert not (tmp_path / "run").exists()


# Bad input and dry runs


def test_label_outside_the_classes_of_a_stream_is_named(parquet, tmp_path):
    settings = {**SOURCES["stream"], "num_class_embeds": 2, "dataset_name": parquet, "num_validation_images": 0}
    output = fail(tmp_path / "run", **{**settings, "validation_split": None})
    assert re.search(r"error: .*row \d+ .*label 2 is outside 0 to 1", output)
    assert "Traceback" not in output
    assert "exit status 2" in output


def test_no_network_is_told_in_one_line(tmp_path):
    path = tmp_path / "offline.py"
    path.write_text(f"""
import runpy, datasets
def load_dataset(*args, **kwargs):
    raise ConnectionError("Couldn't reach it")
datasets.load_dataset = load_dataset
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
""")
    arguments = [str(path), "--output_dir", str(tmp_path / "run"), "--dataset_name", "nofolder"]
    (result,) = run_script(arguments, environment())
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "error: There is no folder 'nofolder', and the Hub could not be reached for a dataset of that name: check the "
        "network, or run this again later.\n"
    )
    assert not (tmp_path / "run").exists()


def test_bad_input_leaves_nothing(tmp_path):
    output = fail(tmp_path / "run", train_data_dir="no/such/folder")
    assert "error: `train_data_dir` must be an existing folder, got 'no/such/folder'" in output
    assert "Traceback" not in output
    assert "exit status 2" in output
    assert not (tmp_path / "run").exists()


@slow
def test_batch_size_must_be_divisible_by_the_processes(tmp_path):
    assert "`train_batch_size` must be a multiple of the number of processes (2), got 7" in fail(
        tmp_path / "run", 2, train_batch_size=7
    )
    assert not (tmp_path / "run").exists()


@slow
def test_another_model_in_the_same_folder_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    output = fail(tmp_path / "run", block_out_channels=[8, 12], beta_end=0.03)
    assert "block_out_channels was [8, 16] and is [8, 12]; beta_end was 0.02 and is 0.03" in output
    assert_equal_weights(weights(tmp_path / "run"), weights(finished))


@slow
def test_earlier_run_is_not_overwritten(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    assert "holds checkpoints of an earlier run" in fail(tmp_path / "run", resume="never")
    for checkpoint in list_checkpoints(tmp_path / "run"):
        (checkpoint / "run_state.json").unlink()
    assert "checkpoint-0000000096 is damaged: run_state.json is missing." in fail(tmp_path / "run")
    assert_equal_weights(weights(tmp_path / "run"), weights(finished))


def test_dry_run_prints_the_plan_and_leaves_nothing(tmp_path):
    output = succeed(
        tmp_path / "run", dry_run="true", checkpoint_every_images=0, autoguidance_scale=1.2, guide_images=90
    )
    assert "Everything works" in output
    assert "checkpoints  never" in output
    assert re.search(r"run +96 images in 12 steps of 8", output)
    for line in ("time", "memory", "disk", "checkpoints", "validation", "samples", "data"):
        assert re.search(rf"\n +{line} ", output), output
    assert not (tmp_path / "run").exists()


# The Hub

ON_THE_HUB = """
import os, runpy, sys
os.environ["ACCELERATE_USE_CPU"] = "true"
sys.argv = arguments
runpy.run_path(arguments[0], run_name="__main__")
sys.exit(0)
"""


@pytest.fixture
def train_on_the_hub(client):
    """Returns a function that trains with access to the local Hub and returns the exit code and the output."""

    def train_on_the_hub(output_dir: Path, token: str = OWNER_TOKEN, **overrides) -> tuple[int, str]:
        outcome = client.run(ON_THE_HUB, token, arguments=command(output_dir, **overrides)[1:])
        assert outcome.kind == "SystemExit", outcome.output
        return int(outcome.error), outcome.output

    return train_on_the_hub


def test_finished_run_is_published(server, train_on_the_hub, tmp_path):
    """If publishing fails, the model is complete, and the same command publishes it."""
    run = tmp_path / "trained"
    settings = {"push_to_hub": "true", "hub_private_repo": "true", "hub_license": "apache-2.0"}
    server.fail("POST /api/models/owner/trained/commit/", status=403)
    code, output = train_on_the_hub(run, **settings)
    assert code != 0
    assert "owner/trained: the token has no permission for this" in output
    assert f"To publish it later: ddpm-faces push {run} owner/trained --private --license apache-2.0\n" in output
    assert checkpoint_names(run)[-1] == 96
    server.heal()
    code, output = train_on_the_hub(run, **settings)
    assert code == 0, output
    assert f"Published: {server.endpoint}/owner/trained/commit/" in output
    repo = server.repos["models", "owner/trained"]
    assert repo.private
    card = repo.files["README.md"].decode()
    for text in ("license: apache-2.0", "| images seen | 96 |", "40 drawn faces (4 more held out)", "1 x CPU", "fp32"):
        assert text in card, text
    assert "loss_curve.png" in repo.files
    everything = b"".join(repo.files.values()) + (run / "training_config.yaml").read_bytes()
    assert OWNER_TOKEN.encode() not in everything
    assert str(tmp_path).encode() not in b"".join(repo.files.values())
    assert not any("checkpoint" in name or "optimizer" in name for name in repo.files)

    # Another run is fine-tuned from it.
    base = {"pretrained_model_name_or_path": "owner/trained", "block_out_channels": None}
    code, output = train_on_the_hub(tmp_path / "next", push_to_hub="true", **base, **STILL)
    assert code == 0, output
    assert_equal_weights(weights(tmp_path / "next"), weights(run))
    assert "base_model: owner/trained\n" in server.repos["models", "owner/next"].files["README.md"].decode()


@slow
def test_dry_run_checks_permission_on_the_hub(server, train_on_the_hub, tmp_path):
    run = tmp_path / "rehearsed"
    code, output = train_on_the_hub(run, dry_run="true", push_to_hub="true")
    assert code == 0, output
    assert re.search(r"Hub +owner/rehearsed, at the end; this token has write access", output)
    assert ("models", "owner/rehearsed") not in server.repos
    code, output = train_on_the_hub(run, READER_TOKEN, dry_run="true", push_to_hub="true", hub_model_id="owner/other")
    assert code != 0
    assert "owner/other: the token of owner is read-only: use one with write access." in output
    assert not run.exists()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_train_command(tmp_path, num_processes):
    """`ddpm-faces train` does the same as the script, and prints the next commands."""
    flags = command(tmp_path / "typed", max_train_images=32)[2:]
    typed = [Path(sys.executable).with_name("ddpm-faces"), "train", "--num-processes", str(num_processes)]
    environ = {**environment(), "HF_HOME": str(tmp_path / "home")}  # without `accelerate config`
    arguments = [*typed, "--config", "drawn32", *flags]
    result = subprocess.run(arguments, env=environ, capture_output=True, text=True, start_new_session=True)
    assert result.returncode == 0, result.stderr
    assert f"on {num_processes} x cpu" in result.stdout
    assert result.stdout.endswith(
        f"Next:\n  ddpm-faces generate {tmp_path / 'typed'}\n  ddpm-faces push {tmp_path / 'typed'} USER/NAME\n"
    )
    succeed(tmp_path / "script", num_processes, max_train_images=32)
    assert weights(tmp_path / "typed").keys() == weights(tmp_path / "script").keys()
    for name, weight in weights(tmp_path / "script").items():
        torch.testing.assert_close(weights(tmp_path / "typed")[name], weight)


def test_train_command_passes_on_signals_and_exit_codes(tmp_path):
    flags = command(tmp_path / "run", max_train_images=10**9)[2:]
    environ = {**environment(), "HF_HOME": str(tmp_path / "home"), "PYTHONUNBUFFERED": "1"}
    executable = Path(sys.executable).with_name("ddpm-faces")
    with subprocess.Popen(
        [executable, "train", *flags], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert any("images per step" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        text = process.stdout.read()
    assert process.returncode == 75, text
    assert "Preempted after" in text
    for arguments, says in (
        (["--num-processes", "0"], "error: `num_processes` must be at least 1, got 0."),
        (["--learning-rat", "1"], "error: unknown argument --learning-rat; did you mean --learning-rate?"),
        (
            ["--config", "faces46"],
            "error: `--config` must be one of article64, drawn32, faces32-cpu, faces64, faces64-mini, guide64",
        ),
    ):
        result = subprocess.run([executable, "train", *arguments], env=environ, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(says)
        assert len(result.stderr.splitlines()) == 1
