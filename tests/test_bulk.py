"""Shards of many images: complete, resumable, and the same on any number of processes."""

import io
import json
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from datasets import load_dataset
from forked import run_script
from PIL import Image

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, bulk
from ddpm_faces.bulk import generate_shards
from ddpm_faces.generation import Recipe


RECIPE = Recipe(num_images=7, seed=40, steps=3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    pipeline = DDPMFacesPipeline(tiny_unet(num_class_embeds=3), DDPMFacesScheduler(num_train_timesteps=20))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make(model, folder, format="png", recipe=RECIPE, **settings):
    return generate_shards(model, recipe, folder, "tiny", format, shard_size=3, **{"batch_size": 2, **settings})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("format", bulk.FORMATS)
def test_shards_open_as_a_dataset(model, tmp_path, format):
    shards = make(model, tmp_path / "out", format)
    assert len(shards) == 3
    if format == "webdataset":
        rows = []
        for shard in shards:
            with tarfile.open(shard) as file:
                assert all(member.isfile() for member in file)
        for row in load_dataset("webdataset", data_files=list(map(str, shards)), split="train", cache_dir=tmp_path):
            rows.append((row["json"]["seed"], row["json"]["label"], row["png"]))
    elif format == "parquet":
        data = load_dataset(str(tmp_path / "out"), split="train", cache_dir=tmp_path)
        rows = [(row["seed"], row["label"], row["image"]) for row in data]
    else:
        assert len(load_dataset(str(tmp_path / "out"), split="train", cache_dir=tmp_path)) == 7
        rows = []
        for shard in shards:
            for path in sorted(shard.iterdir()):
                image = Image.open(path)
                rows.append((int(image.text["seed"]), json.loads(image.text["class_labels"])[0], image))
    assert [(seed, label) for seed, label, _ in rows] == [(40 + i, i % 3) for i in range(7)]
    for seed, label, image in rows:
        (expected,) = model(1, 3, [torch.Generator().manual_seed(seed)], class_labels=[label]).images
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
    settings = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert (settings["model"], settings["steps"], settings["seed"]) == ("tiny", 3, 40)


@pytest.mark.parametrize("format", bulk.FORMATS)
def test_interrupted_run_resumes_without_a_gap(model, tmp_path, format, monkeypatch):
    make(model, tmp_path / "whole", format)

    class Stopped(BaseException):
        pass

    real, calls = bulk.sample, []

    def interrupted(pipeline, recipe, indices):
        calls.append(list(indices))
        if len(calls) == 4:  # within the second shard
            raise Stopped
        return real(pipeline, recipe, indices)

    monkeypatch.setattr(bulk, "sample", interrupted)
    with pytest.raises(Stopped):
        make(model, tmp_path / "out", format)
    calls.clear()
    monkeypatch.setattr(bulk, "sample", lambda *arguments: calls.append(list(arguments[2])) or real(*arguments))
    make(model, tmp_path / "out", format)
    assert calls == [[3, 4], [5], [6]]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    make(model, tmp_path / "out", format)  # nothing is left to do
    assert len(calls) == 3


def test_an_error_of_the_writer_ends_the_run(model, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bulk, "png_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        make(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == ["generation.json"]


def test_processes_share_the_work(model, tmp_path):
    model.save_pretrained(tmp_path / "tiny")
    options = ["-n", "7", "--seed", "40", "--steps", "3", "--batch-size", "2", "--shard-size", "3", "--format", "png"]
    program = str(Path(sys.executable).with_name("ddpm-faces"))
    command = [program, "generate", str(tmp_path / "tiny"), *options, "--output", str(tmp_path / "two")]
    first, second = run_script(command, {**os.environ, "ACCELERATE_USE_CPU": "true"}, num_processes=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "7 images in 3 shards" in first.stdout
    assert not second.stdout
    recipe = replace(RECIPE, dtype="auto")  # as in the command
    make(DDPMFacesPipeline.from_pretrained(tmp_path / "tiny"), tmp_path / "one", recipe=recipe)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(list((tmp_path / "two").rglob("seed-*.png"))) == 7


@pytest.mark.parametrize(("rank", "seeds"), [(0, [[0, 1], [2], [6]]), (1, [[3, 4], [5]])])
def test_each_process_generates_its_own_shards(model, tmp_path, monkeypatch, rank, seeds):
    state = SimpleNamespace(
        process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=lambda: None
    )
    monkeypatch.setattr(bulk, "Accelerator", lambda: state)
    monkeypatch.setattr(bulk, "broadcast_object_list", lambda values: [[0, 1, 2]])
    real, calls = bulk.sample, []
    monkeypatch.setattr(bulk, "sample", lambda *arguments: calls.append(list(arguments[2])) or real(*arguments))
    make(model, tmp_path / "out")
    assert calls == seeds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "jpeg"}, "`format` must be one of png, webdataset, parquet, got 'jpeg'"),
        ({"shard_size": 0}, "`shard_size` must be an integer from 1"),
        ({"batch_size": 0}, "`batch_size` must be an integer from 1"),
        ({"recipe": Recipe(7, 40, steps=21)}, "`steps` must be at most 20"),
    ],
)
def test_bad_arguments_are_named(model, tmp_path, settings, message):
    arguments = {"recipe": RECIPE, "format": "png", "shard_size": 3, "batch_size": 2, **settings}
    with pytest.raises(ValueError, match=message):
        generate_shards(model, arguments.pop("recipe"), tmp_path / "out", "tiny", **arguments)
    assert not (tmp_path / "out").exists()


def test_folder_of_something_else_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"`output` must be a folder with `format` 'png', got .*grid\.png"):
        make(model, tmp_path / "grid.png")
    make(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    for recipe, format, message in (
        (Recipe(7, 41, steps=3), "png", "holds images with a `seed` of 40, not 41; choose another folder"),
        (Recipe(8, 40, steps=3), "png", "holds images with a `num_images` of 7, not 8"),
        (RECIPE, "parquet", "holds images with a `format` of 'png', not 'parquet'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(model, tmp_path / "out", format, recipe)
    with torch.no_grad():
        model.unet.conv_in.weight.mul_(2)
    with pytest.raises(ValueError, match="holds images with a `weights` of"):
        make(model, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_bytes(io.BytesIO(b"mine").getvalue())
    with pytest.raises(ValueError, match="must be a new or empty folder, or hold an interrupted run"):
        make(model, tmp_path / "other")
