"""Datasets from `ddpm_faces.data.prepare` on the Hub: publishing, loading, streaming and training."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import OWNER_TOKEN, STRANGER_TOKEN
from PIL import Image


PREPARE = """
from ddpm_faces.data.preparation import prepare
result = prepare(source, push=repo_id, resolution=16, **settings).where
"""
LOAD = """
import datasets, numpy
def pixels(rows):
    return [[numpy.asarray(row["image"]).tolist(), row["label"]] for row in rows]
result = {
    "loaded": {name: pixels(part) for name, part in datasets.load_dataset(repo_id).items()},
    "streamed": pixels(datasets.load_dataset(repo_id, split="train", streaming=True)),
    "names": datasets.load_dataset(repo_id, split="train").features["label"].names,
}
"""
READ = """
from ddpm_faces.data import load_faces
faces = load_faces(repo_id, resolution=16, label_column="label")
result = [[faces[i]["images"].permute(1, 2, 0).tolist(), int(faces[i]["labels"])] for i in range(len(faces))]
"""
# The script without `accelerate launch`, in a process that has already imported most dependencies.
TRAIN = """
import os, runpy, sys
sys.argv = ["train.py", "--dataset_name", repo_id, *flags]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as leaving:
    assert leaving.code == 0
result = sorted(os.listdir("run"))
"""
FLAGS = (
    "--label_column label --num_class_embeds 2 --validation_split test --resolution 16 --max_train_images 32 "
    "--train_batch_size 4 --block_out_channels 8 16 --block_types resnet --norm_num_groups 4 --report_to none "
    "--num_train_timesteps 5 --sample_inference_steps 5 --num_samples 2 --output_dir run"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten images of the requested size, so that they come back unchanged."""
    folder = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(0)
    for i in range(10):
        kind = folder / ("old" if i % 2 else "young")
        kind.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(kind / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def published(client, pictures):
    settings = {"label_column": "folder", "num_test_images": 2, "license": "mit", "private": True}
    outcome = client.run(PREPARE, OWNER_TOKEN, source=str(pictures), repo_id="owner/people", settings=settings)
    assert outcome.error is None, outcome.output
    return outcome


def test_published_files(server, published):
    repo = server.repos["datasets", "owner/people"]
    assert set(repo.files) == {
        ".gitattributes", "README.md", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet",
    }  # fmt: skip
    assert repo.private
    assert published.value == f"{server.endpoint}/datasets/owner/people/commit/{repo.branches['main']}"
    card = repo.files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["size_categories"]) == ("mit", ["n<1K"])
    assert head["configs"][0]["data_files"] == [
        {"split": "train", "path": "data/train-*"},
        {"split": "test", "path": "data/test-*"},
    ]
    for text in (
        "10 faces of 16x16 pixels (RGB)",
        "`train`: 8 images",
        "Classes: old, young",
        "## People in the images",
    ):
        assert text in card
    for text in ("{{", "None", OWNER_TOKEN):
        assert text not in card


def test_load_dataset_reads_it_back(client, published, pictures):
    outcome = client.run(LOAD, OWNER_TOKEN, repo_id="owner/people")
    assert outcome.error is None, outcome.output
    loaded, streamed, names = (outcome.value[name] for name in ("loaded", "streamed", "names"))
    assert names == ["old", "young"]
    assert streamed == loaded["train"]
    assert (len(loaded["train"]), len(loaded["test"])) == (8, 2)
    expected = [
        [np.asarray(Image.open(path)).tolist(), names.index(path.parent.name)] for path in pictures.rglob("*.png")
    ]
    assert sorted(loaded["train"] + loaded["test"]) == sorted(expected)


def test_training_cache_reads_it_back(client, published):
    outcome = client.run(READ, OWNER_TOKEN, repo_id="owner/people")
    assert outcome.error is None, outcome.output
    assert outcome.value == client.run(LOAD, OWNER_TOKEN, repo_id="owner/people").value["streamed"]


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_training_reads_it_back(client, published, streaming):
    home = client.new_home()
    flags = [*FLAGS.split(), "--streaming", streaming]
    code = f"import os\nos.chdir({str(home)!r})\n" + TRAIN
    script = str(Path(__file__).parents[1] / "training" / "train.py")
    outcome = client.run(code, OWNER_TOKEN, home, repo_id="owner/people", flags=flags, script=script)
    assert outcome.error is None, outcome.output
    assert {"model_index.json", "samples.png", "unet"} <= set(outcome.value)
    summary = json.loads((home / "run" / "training_summary.json").read_text())
    assert summary["images_seen"] == 32


@pytest.mark.parametrize("token", [None, STRANGER_TOKEN])
def test_private_dataset_needs_permission(client, published, token):
    for code in (LOAD, READ):
        outcome = client.run(code, token, repo_id="owner/people")
        assert "owner/people" in outcome.error
        assert outcome.value is None


def test_publishing_again_keeps_text_that_a_person_wrote(server, client, pictures):
    """Earlier shards are deleted, but no other files."""
    server.put("datasets", "owner/album", {"data/train-00001-of-00002.parquet": b"PAR1", "thanks.txt": b"mine"})
    publish = {"source": str(pictures), "repo_id": "owner/album", "settings": {}}
    assert client.run(PREPARE, OWNER_TOKEN, **publish).error is None
    repo = server.repos["datasets", "owner/album"]
    assert set(repo.files) == {"README.md", "data/train-00000-of-00001.parquet", "thanks.txt"}
    card = repo.files["README.md"].decode()
    card = card.replace("State here where the images come from", "They are of my family").replace("10 faces", "Many")
    server.put("datasets", "owner/album", {"README.md": card.encode()})
    outcome = client.run(PREPARE, OWNER_TOKEN, **{**publish, "settings": {"num_test_images": 1}})
    assert outcome.error is None, outcome.output
    card = repo.files["README.md"].decode()
    assert "They are of my family" in card
    assert "10 faces of 16x16" in card
    assert "--validation_split test" in card


@pytest.mark.parametrize("fault", [{"status": 503, "times": 1}, {"lose_answer": True, "times": 1}], ids=str)
def test_single_fault_is_recovered(server, client, pictures, fault):
    name = f"owner/once-{next(iter(fault))}"
    broken = server.fail(f"POST /api/datasets/{name}/commit/", **fault)
    outcome = client.run(PREPARE, OWNER_TOKEN, source=str(pictures), repo_id=name, settings={})
    assert outcome.error is None, outcome.output
    assert broken.hits == 1
    assert len(server.repos["datasets", name].commits) == 2


def test_killed_publishing_can_be_repeated(server, client, pictures):
    case = {"source": str(pictures), "repo_id": "owner/killed"}
    case["settings"] = {"channels": 1}  # for a shard that is not there yet
    server.fail("PUT /[0-9a-f]{64}", call=lambda: os.kill(client.pid, signal.SIGKILL), times=1)
    assert client.run(PREPARE, OWNER_TOKEN, **case).killed
    assert list(server.repos["datasets", "owner/killed"].files) == [".gitattributes"]
    assert client.run(PREPARE, OWNER_TOKEN, **case).error is None
    assert "data/train-00000-of-00001.parquet" in server.repos["datasets", "owner/killed"].files


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"output": "set"}, "either `output` or `push`"),
        ({"resolution": 0}, "`resolution`"),
        ({"num_test_images": 10}, "`num_test_images` must be from 0 to 9, got 10"),
        ({"license": "Not A Licence!"}, "`license`"),
    ],
)
def test_bad_input_publishes_nothing(server, client, pictures, settings, says):
    code = PREPARE.replace("resolution=16, **settings", "**{'resolution': 16, **settings}")
    outcome = client.run(code, OWNER_TOKEN, source=str(pictures), repo_id="owner/bad", settings=settings)
    assert outcome.kind == "ValueError", outcome.output
    assert says in outcome.error
    assert ("datasets", "owner/bad") not in server.repos
