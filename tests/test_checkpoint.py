import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler
from ddpm_faces.data import FaceBatches, FaceDataset
from ddpm_faces.training import checkpoint
from ddpm_faces.training.changes import check_same_model
from ddpm_faces.training.checkpoint import (
    CheckpointIO,
    check_whole,
    checkpoint_path,
    list_checkpoints,
    newest_whole,
    prune_checkpoints,
    read_state,
    save_pipeline,
    set_aside,
)
from ddpm_faces.training.config import TrainingConfig
from ddpm_faces.training.ema import EMA
from ddpm_faces.training.state import RunState


def test_checkpoints_are_listed_oldest_first_without_unfinished_ones(tmp_path):
    for images_seen in (900, 10_000, 2_000):
        checkpoint_path(tmp_path, images_seen).mkdir()
    (tmp_path / ".unfinished-checkpoint-0000020000").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-0000000001").touch()  # a file
    assert list_checkpoints(tmp_path) == [
        checkpoint_path(tmp_path, images_seen) for images_seen in (900, 2_000, 10_000)
    ]
    assert list_checkpoints(tmp_path / "no_such_folder") == []


def test_pruning_keeps_the_newest(tmp_path):
    for images_seen in (1, 2, 3):
        checkpoint_path(tmp_path, images_seen).mkdir()
        (checkpoint_path(tmp_path, images_seen) / "model.safetensors").touch()
    (tmp_path / ".unfinished-checkpoint-0000000002").mkdir()
    (tmp_path / "samples").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-0000000002",
        "checkpoint-0000000003",
        "samples",
    ]


def test_pruning_keeps_the_best(tmp_path):
    for images_seen in (1, 2, 3, 4):
        checkpoint_path(tmp_path, images_seen).mkdir()
    prune_checkpoints(tmp_path, keep=1, spared=[checkpoint_path(tmp_path, 2)])
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, images_seen) for images_seen in (2, 4)]


def make_pipeline(sample_size: int) -> DDPMFacesPipeline:
    return DDPMFacesPipeline(tiny_unet(sample_size=sample_size), DDPMFacesScheduler(num_train_timesteps=5))


def test_pipeline_is_replaced_and_other_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for sample_size in (16, 24):
        save_pipeline(make_pipeline(sample_size), tmp_path)
        assert DDPMFacesPipeline.from_pretrained(tmp_path).unet.config.sample_size == sample_size
    code = {f"{name}_ddpm_faces.py" for name in ("pipeline", "restoration", "editing", "operators")}
    names = {"model_index.json", "notes.txt", *code, "scheduler", "unet"}
    assert {path.name for path in tmp_path.iterdir()} == names  # and so diffusers alone can load it


@pytest.mark.parametrize("commits_before_death", [0, 1])
def test_interrupted_saving_never_mixes_two_pipelines(tmp_path, monkeypatch, commits_before_death):
    """An interruption between the first and the last rename leaves a folder that does not load, not a mixture."""
    save_pipeline(make_pipeline(16), tmp_path)
    commits = []
    real_commit = checkpoint.commit

    def commit_or_die(*args):
        if len(commits) == commits_before_death:
            raise KeyboardInterrupt
        commits.append(args)
        real_commit(*args)

    monkeypatch.setattr(checkpoint, "commit", commit_or_die)
    with pytest.raises(KeyboardInterrupt):
        save_pipeline(make_pipeline(24), tmp_path)
    with pytest.raises(OSError, match="model_index.json"):
        DDPMFacesPipeline.from_pretrained(tmp_path)

    monkeypatch.undo()
    save_pipeline(make_pipeline(24), tmp_path)
    assert DDPMFacesPipeline.from_pretrained(tmp_path).unet.config.sample_size == 24


def test_failure_before_the_first_rename_keeps_the_old_pipeline(tmp_path, monkeypatch):
    save_pipeline(make_pipeline(16), tmp_path)
    monkeypatch.setattr(
        DDPMFacesScheduler, "save_pretrained", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        save_pipeline(make_pipeline(24), tmp_path)
    assert DDPMFacesPipeline.from_pretrained(tmp_path).unet.config.sample_size == 16


# Saved, damaged, loaded


def make_io(use_ema: bool = True, batches=None) -> CheckpointIO:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    unet = tiny_unet(block_types=("conv",))
    unet, _ = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters()))
    images = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    batches = FaceBatches(FaceDataset(images), 4, slice(0, 4)) if batches is None else batches
    data = SimpleNamespace(batches=batches, fingerprint="of images")
    return CheckpointIO(TrainingConfig(), accelerator, unet, EMA(unet) if use_ema else None, data)


def disturb(io: CheckpointIO) -> None:
    with torch.no_grad():
        for parameter in io.unet.parameters():
            parameter.add_(1)


@pytest.fixture
def saved(tmp_path) -> tuple[CheckpointIO, dict[str, torch.Tensor]]:
    """Checkpoints after 8 and 16 images, in `tmp_path`."""
    io = make_io()
    for images_seen in (8, 16):
        io.save(checkpoint_path(tmp_path, images_seen), RunState(images_seen=images_seen, best_loss=0.5))
    return io, {name: value.clone() for name, value in io.unet.state_dict().items()}


def test_saved_state_is_loaded(saved, tmp_path):
    io, weights = saved
    averaged = {name: value.clone() for name, value in io.ema.shadow.items()}
    disturb(io)
    io.ema.update(0.5, torch.tensor(True))
    state, guide, notes = io.load(checkpoint_path(tmp_path, 16))
    assert state == RunState(images_seen=16, best_loss=0.5)
    assert (guide, notes) == (None, [])
    assert all(torch.equal(value, weights[name]) for name, value in io.unet.state_dict().items())
    assert all(torch.equal(value, averaged[name]) for name, value in io.ema.shadow.items())
    assert io.data.batches.images_seen == 16
    assert any("running_mean" in name for name in averaged)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def fill(path):
    """Fill the rest of a file with zeros, like an interrupted copy of full size."""
    path.write_bytes(path.read_bytes()[:100] + bytes(path.stat().st_size - 100))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "optimizer.bin", "random_states_0.pkl", "run_state.json"]
)
@pytest.mark.parametrize("damage", [cut, fill, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_damaged_checkpoint_falls_back_to_the_previous_one(saved, tmp_path, name, damage):
    damage(checkpoint_path(tmp_path, 16) / name)
    newest, damaged = newest_whole(tmp_path)
    assert newest == checkpoint_path(tmp_path, 8)
    ((path, message),) = damaged.items()
    assert path == checkpoint_path(tmp_path, 16)
    assert name in message
    assert set_aside(path).name == "damaged-checkpoint-0000000016"
    assert list_checkpoints(tmp_path) == [newest]


def test_only_damaged_checkpoints_are_an_error(saved, tmp_path):
    for path in list_checkpoints(tmp_path):
        cut(path / "optimizer.bin")
    with pytest.raises(
        ValueError, match="All checkpoints in `output_dir` .* are damaged: .*optimizer.bin has .* bytes"
    ):
        newest_whole(tmp_path)


@pytest.mark.parametrize("change", [{"format_version": 3}, {"run": {"images_seen": 16, "novel": 1}}])
def test_checkpoint_of_a_later_version_is_refused(saved, tmp_path, change):
    path = checkpoint_path(tmp_path, 16) / "run_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="was saved by a later version of ddpm-faces"):
        newest_whole(tmp_path)


def test_checkpoint_of_format_1(saved, tmp_path):
    """Format 1 has no checksums, and no buffers in the EMA: they come from the network."""
    from safetensors.torch import load_file, save_file

    io, weights = saved
    folder = checkpoint_path(tmp_path, 16)
    state = json.loads((folder / "run_state.json").read_text())
    del state["files"], state["format_version"]
    (folder / "run_state.json").write_text(json.dumps(state))
    averaged = load_file(folder / "ema.safetensors")
    parameters = {name: averaged[name] + 1 for name, _ in io.unet.named_parameters()}
    save_file(parameters, folder / "ema.safetensors")
    assert newest_whole(tmp_path) == (folder, {})
    io.load(folder)
    for name, value in io.ema.shadow.items():
        assert torch.equal(value, parameters.get(name, weights[name]))
    cut(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        check_whole(folder)


def test_settings_of_earlier_versions_keep_their_meaning(saved, tmp_path):
    """`guidance_scale` was the scale of the guide, and no class was hidden."""
    folder = checkpoint_path(tmp_path, 16)
    state = json.loads((folder / "run_state.json").read_text())
    assert read_state(folder)["config"] == state["config"]
    del state["config"]["condition_dropout"], state["config"]["autoguidance_scale"]
    state["config"] |= {"guidance_scale": 1.5, "label_column": "kind", "num_class_embeds": 3}
    (folder / "run_state.json").write_text(json.dumps(state))
    config = read_state(folder)["config"]
    assert "guidance_scale" not in config
    assert (config["autoguidance_scale"], config["condition_dropout"]) == (1.5, 0.0)
    check_same_model(replace(TrainingConfig(), label_column="kind", num_class_embeds=3, condition_dropout=0), folder)


def test_ema_switched_on_later_starts_from_the_weights(tmp_path):
    make_io(use_ema=False).save(checkpoint_path(tmp_path, 8), RunState(images_seen=8))
    io = make_io()
    disturb(io)
    _, _, notes = io.load(checkpoint_path(tmp_path, 8))
    assert notes == ["The checkpoint has no EMA: it starts from the weights after 8 images."]
    weights = io.unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in io.ema.shadow.items())


def test_ema_switched_off_later_is_ignored(saved, tmp_path):
    assert make_io(use_ema=False).load(checkpoint_path(tmp_path, 16))[2] == []


def test_stream_switched_on_later_begins_with_its_first_image(saved, tmp_path):
    class Stream:
        def load_state_dict(self, state_dict):
            raise AssertionError("there is no place to load")

    _, _, notes = make_io(batches=Stream()).load(checkpoint_path(tmp_path, 16))
    assert notes == ["The checkpoint has no position in a stream: the stream begins with its first image."]


def test_fp16_switched_on_later_starts_with_a_new_loss_scale(saved, tmp_path):
    io = make_io()
    io.accelerator.scaler = torch.amp.GradScaler("cpu")
    _, _, notes = io.load(checkpoint_path(tmp_path, 16))
    assert notes == [
        "The checkpoint has no loss scale because the run did not use fp16: the scale starts from its default."
    ]
    assert io.accelerator.scaler is not None
    io.save(checkpoint_path(tmp_path, 24), RunState(images_seen=24))
    assert io.load(checkpoint_path(tmp_path, 24))[2] == []
