import pytest
from conftest import tiny_unet

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler
from ddpm_faces.training import checkpoint
from ddpm_faces.training.checkpoint import checkpoint_path, list_checkpoints, prune_checkpoints, save_pipeline


def test_checkpoints_are_listed_oldest_first_and_unfinished_ones_not_at_all(tmp_path):
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


def test_pipeline_is_replaced_beside_what_else_there_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for sample_size in (16, 24):
        save_pipeline(make_pipeline(sample_size), tmp_path)
        assert DDPMFacesPipeline.from_pretrained(tmp_path).unet.config.sample_size == sample_size
    names = {"model_index.json", "notes.txt", "pipeline_ddpm_faces.py", "scheduler", "unet"}
    assert {path.name for path in tmp_path.iterdir()} == names  # and so diffusers alone can load it


@pytest.mark.parametrize("commits_before_death", [0, 1])
def test_interrupted_saving_never_mixes_two_pipelines(tmp_path, monkeypatch, commits_before_death):
    """Dying anywhere between the first and the last rename leaves a folder that does not load, not a mixture."""
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
