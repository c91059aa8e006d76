"""Publishing and loading over HTTP, with the real clients and a local Hub."""

import email.message
import io
import json
import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_unet
from hub_server import OWNER_TOKEN, READER_TOKEN, STRANGER_TOKEN
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load, load_file, save

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DDPMFacesUNet, hub
from ddpm_faces.guidance import save_guide
from ddpm_faces.hub.card import merge_cards
from ddpm_faces.plots import image_grid
from ddpm_faces.solvers import fast_solver
from ddpm_faces.text import make_text_encoder, make_tokenizer
from ddpm_faces.training.distillation import student_preset, student_schedules


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The output folder of a training run: a pipeline and other files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("home") / "my-model"
    DDPMFacesPipeline(tiny_unet(), DDPMFacesScheduler(num_train_timesteps=20), weights="ema").save_pretrained(folder)
    config = {"dataset_name": "user/people", "train_batch_size": 8, "seed": 5, "output_dir": "/home/alice/secret/run"}
    config |= {"pretrained_model_name_or_path": "user/base"}
    (folder / "training_config.yaml").write_text(yaml.safe_dump({**config, "cache_dir": "/home/alice/cache"}))
    summary = {"data": "40 pictures", "images_seen": 96_000, "hours": 1.5, "processes": 2, "device": "NVIDIA H100"}
    (folder / "training_summary.json").write_text(json.dumps(summary))
    metrics = {"name": "Frechet distance", "type": "fd", "value": 12.5, "error": 0.4, "n": 512, "seed": 0}
    metrics |= {"extractor": "efficientnet-lite0", "reference": "user/people, test", "sampler": "DDPM", "steps": 20}
    verdict = {"verdict": "No copies were found among 512 faces."}
    (folder / "metrics.json").write_text(json.dumps({"metrics": [metrics], "memorisation": verdict}))
    for name in ("samples.png", "loss_curve.png"):
        notes = PngInfo()
        notes.add_text("Made by", f"/home/alice with {OWNER_TOKEN}")
        Image.new("RGB", (8, 8), "red").save(folder / name, pnginfo=notes)
    (folder / "checkpoint-0000000096").mkdir()
    (folder / "checkpoint-0000000096" / "optimizer.bin").write_bytes(b"moments")
    (folder / "log.jsonl").write_text('{"loss": 1.0}\n')
    (folder / ".env").write_text(f"HF_TOKEN={OWNER_TOKEN}\n")
    return folder


@pytest.fixture(scope="session")
def exported(folder, tmp_path_factory) -> Path:
    """The files of this folder that are published."""
    exported = tmp_path_factory.mktemp("exported") / "model"
    exported.mkdir()
    hub.export(folder, exported, "owner/faces", license="cc-by-nc-sa-4.0", dataset_license="cc-by-4.0")
    return exported


@pytest.fixture(scope="session")
def published(server, client, folder):
    """`owner/faces`, published as a user does it, the private `owner/secret`, and `owner/gated`."""
    settings = {"license": "cc-by-nc-sa-4.0", "dataset_license": "cc-by-4.0"}
    code = "result = hub.push(folder, 'owner/faces', **settings)"
    outcome = client.run(code, OWNER_TOKEN, is_checked=True, folder=str(folder), settings=settings)
    assert outcome.error is None, outcome.output
    repo = server.repos["models", "owner/faces"]
    repo.tags["v1"] = repo.branches["main"]
    server.put("models", "owner/secret", repo.files, private=True)
    server.put("models", "owner/gated", repo.files, gated=True)
    return outcome


PUBLISH = """
import shutil
def write(folder, old_card):
    shutil.copytree(source, folder, dirs_exist_ok=True)
result = hub.publish(write, repo_id, "model", hub.MODEL_FILES, "Publish", private=private)
"""


@pytest.fixture
def publish(client, exported):
    """Return a function that publishes the exported files with a token."""

    def publish(repo_id, token=OWNER_TOKEN, code=PUBLISH, private=None, **settings):
        return client.run(code, token, source=str(exported), repo_id=repo_id, private=private, **settings)

    return publish


# Published files and the card


def test_exactly_the_needed_files_are_published(server, published, folder):
    files = server.repos["models", "owner/faces"].files
    weights = [f"unet/diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".bf16", ".fp16")]
    assert set(files) == {
        ".gitattributes", "README.md", "model_index.json", "pipeline_ddpm_faces.py", "restoration_ddpm_faces.py",
        "editing_ddpm_faces.py", "operators_ddpm_faces.py", "scheduler/scheduler_config.json",
        "scheduler/scheduling_ddpm_faces.py", "unet/config.json", "unet/unet_ddpm_faces.py", *weights, "samples.png",
        "denoising_strip.png", "loss_curve.png", "training_config.yaml", "training_summary.json", "metrics.json",
    }  # fmt: skip
    weights = load(files["unet/diffusion_pytorch_model.safetensors"])
    expected = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    text = b"".join(files.values())
    assert Image.open(io.BytesIO(files["samples.png"])).getpixel((0, 0)) == (255, 0, 0)
    for secret in (OWNER_TOKEN, "/home/alice", str(folder), str(ROOT)):
        assert secret.encode() not in text
    assert (
        published.value
        == f"{server.endpoint}/owner/faces/commit/{server.repos['models', 'owner/faces'].branches['main']}"
    )
    assert len(server.repos["models", "owner/faces"].commits) == 2  # the first commit is the Hub's own


def test_card(server, published):
    card = server.repos["models", "owner/faces"].files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "cc-by-nc-sa-4.0"
    assert head["datasets"] == ["user/people"]
    assert head["base_model"] == "user/base"
    assert (head["library_name"], head["pipeline_tag"]) == ("diffusers", "unconditional-image-generation")
    (result,) = head["model-index"][0]["results"]
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"], result["dataset"]["name"]) == ("fd", 12.5, "user/people, test")
    assert metric["args"]["n"] == 512
    for text in (
        "| training images | user/people: 40 pictures |", "| base model | user/base |",
        "| images seen | 96,000 |", "| training time | 1.5 h on 2 x NVIDIA H100 |",
        "| license of the training images | cc-by-4.0 |",
        "| Frechet distance | 12.5 ± 0.4 |  |  |", "All metrics were measured with: number of samples 512; seed 0;",
        "EMA weights", "No copies were found among 512 faces.", "seeds 5, 6, 7 and so on, in all 20 steps",
        "loss_curve.png", 'DDPMFacesPipeline.from_pretrained("owner/faces")', "## Limits and misuse",
    ):  # fmt: skip
        assert text in card, text
    assert "{{" not in card
    assert "None" not in card


def test_local_folders_are_not_taken_for_repositories(pipeline, tmp_path):
    """Even if their names look like repositories."""
    pipeline.save_pretrained(tmp_path / "model")
    config = {"dataset_name": "user/people", "pretrained_model_name_or_path": "user/base"}
    (tmp_path / "model" / "training_config.yaml").write_text(yaml.safe_dump(config))
    summary = {"hours": 1, "processes": 1, "device": "CPU", "is_local_data": True, "is_local_pretrained": True}
    (tmp_path / "model" / "training_summary.json").write_text(json.dumps(summary))
    (tmp_path / "out").mkdir()
    hub.export(tmp_path / "model", tmp_path / "out", "owner/faces", variants=())
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "| training images | people |" in card
    assert "| base model | base |" in card
    head = yaml.safe_load(card.split("---")[1])
    assert "datasets" not in head
    assert "base_model" not in head


def test_code_in_the_card_runs(client, bare_client, published, server):
    card = server.repos["models", "owner/faces"].files["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 6
    alone, with_package, parts, auto, fast, solver = blocks
    for code in (with_package, parts, f"{with_package}\n{fast}", f"{alone}\n{solver}"):
        assert client.run(code).error is None
    for code in (alone, f"{alone}\n{solver}", auto):
        assert bare_client.run(code).error is None


def test_publishing_again_keeps_text_that_a_person_wrote(server, client, published, folder, exported):
    repo_id = "owner/edited"
    old = (exported / "README.md").read_text()
    edited = old.replace("## Limits and misuse", "## Thanks\n\nTo my neighbours.\n\n## Limits and misuse")
    edited = edited.replace("license: cc-by-nc-sa-4.0", "license: cc-by-nc-sa-4.0\nco2_eq_emissions: 12")
    edited = edited.replace("12.5 ± 0.4", "much better than it is")
    files = {"README.md": edited.encode(), "notes.txt": b"mine", "unet/old.safetensors": b"old shard"}
    server.put("models", repo_id, files)
    code = "result = hub.push(folder, repo_id, license='mit', variants=())"
    outcome = client.run(code, OWNER_TOKEN, folder=str(folder), repo_id=repo_id)
    assert outcome.error is None, outcome.output
    files = server.repos["models", repo_id].files
    card = files["README.md"].decode()
    assert "To my neighbours." in card
    assert "much better" not in card
    assert "12.5 ± 0.4" in card
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["co2_eq_emissions"]) == ("mit", 12)
    assert card.count("<!-- generated: ") == 5
    assert files["notes.txt"] == b"mine"
    assert "unet/old.safetensors" not in files


def test_pipeline_without_a_training_run(server, client, published):
    """`pipeline.push_to_hub`, as in diffusers, generates the images of the card."""
    code = """
pipeline = DDPMFacesPipeline.from_pretrained("owner/faces")
result = pipeline.push_to_hub("owner/again", commit_message="Once more", private=True)
"""
    outcome = client.run(code, OWNER_TOKEN)
    assert outcome.error is None, outcome.output
    repo = server.repos["models", "owner/again"]
    assert repo.private
    assert repo.commits[repo.branches["main"]].title == "Once more"
    card = repo.files["README.md"].decode()
    assert "seeds 0, 1, 2 and so on, in 20 steps of DPM-Solver++" in card
    assert "Assume that the model can reproduce training images." in card
    assert client.run('pipeline = DDPMFacesPipeline.from_pretrained("owner/again")', OWNER_TOKEN).error is None


@pytest.mark.parametrize("is_guided", [False, True])
def test_card_images_come_from_the_published_weights(tmp_path, is_guided):
    """The images come from the float32 weights, so a user can reproduce them from the seeds on the card."""
    torch.manual_seed(1)
    pipeline = DDPMFacesPipeline(tiny_unet(), DDPMFacesScheduler(num_train_timesteps=20))
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(300)  # so that half precision makes a difference
    if is_guided:
        pipeline.set_guide(DDPMFacesPipeline(tiny_unet(), pipeline.scheduler), autoguidance_scale=1.5)
    hub.export(pipeline, tmp_path, "owner/faces")
    published = Image.open(tmp_path / "samples.png")
    pipeline.scheduler = fast_solver(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(16, 20, [torch.Generator().manual_seed(seed) for seed in range(16)]).images
    assert np.array_equal(np.asarray(published), np.asarray(image_grid(drawn, scale=6)))
    state = DDPMFacesUNet.from_pretrained(tmp_path, subfolder="unet").state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in pipeline.unet.state_dict().items())


GUIDED = """
import torch
def faces(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    return images.double().mean(dim=(1, 2, 3))
"""


def test_guide_is_published(server, client, bare_client, published, folder, tmp_path):
    torch.manual_seed(1)
    pipeline = DDPMFacesPipeline.from_pretrained(folder)
    guide = DDPMFacesPipeline(tiny_unet(block_out_channels=(4, 8)), DDPMFacesScheduler(num_train_timesteps=20))
    pipeline.set_guide(guide, autoguidance_scale=1.5)
    home = shutil.copytree(folder, tmp_path / "home")
    pipeline.save_pretrained(home)  # into the output folder of the training run, which has more records
    metrics = json.loads((home / "metrics.json").read_text())
    metrics["metrics"].append({**metrics["metrics"][0], "steps": 19, "autoguidance_scale": 1.5})
    (home / "metrics.json").write_text(json.dumps(metrics))
    code = "result = hub.push(folder, 'owner/guided')"
    outcome = client.run(code, OWNER_TOKEN, is_checked=True, folder=str(home))
    assert outcome.error is None, outcome.output
    files = server.repos["models", "owner/guided"].files
    weights = [f"guide/diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".bf16", ".fp16")]
    assert {name for name in files if name.startswith("guide/")} == {
        "guide/config.json", "guide/unet_ddpm_faces.py", *weights
    }  # fmt: skip
    assert load(files[weights[1]])["conv_in.weight"].dtype == torch.bfloat16
    card = files["README.md"].decode()
    assert "| guide | DDPMFacesUNet, 0.0 M parameters |\n| guidance | autoguidance scale 1.5 |" in card
    assert "steps 20; autoguidance scale 1 |" in card  # of a metric that was measured without the guide
    assert "steps 19; autoguidance scale 1.5 |" in card
    assert "seeds 0, 1, 2 and so on, in 20 steps of DPM-Solver++" in card  # the training samples had no guide
    expected = pipeline(2, generator=torch.Generator().manual_seed(0), output_type="pt").images.double()
    for code, by in (
        ("from ddpm_faces import DDPMFacesPipeline as P; pipeline = P.from_pretrained('owner/guided')", client),
        ("pipeline = DiffusionPipeline.from_pretrained('owner/guided', trust_remote_code=True)", bare_client),
    ):
        code = f"{GUIDED}\nfrom diffusers import DiffusionPipeline\n{code}\nresult = faces(pipeline).tolist()"
        outcome = by.run(code)
        assert outcome.error is None, outcome.output
        assert outcome.value == pytest.approx(expected.mean(dim=(1, 2, 3)).tolist(), abs=1e-6)

    # Without the guide again
    outcome = client.run("result = hub.push(folder, 'owner/guided')", OWNER_TOKEN, folder=str(folder))
    assert outcome.error is None, outcome.output
    files = server.repos["models", "owner/guided"].files
    assert not [name for name in files if name.startswith("guide/")]
    assert json.loads(files["model_index.json"]) == json.loads(
        server.repos["models", "owner/faces"].files["model_index.json"]
    )


PRESETS = """
import torch
def faces(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return [
        pipeline(2, generator=torch.Generator().manual_seed(0), output_type="pt", preset=preset).images.tolist()
        for preset in (None, "fast", "student")
    ]
"""


def test_presets_and_student_are_published(server, client, bare_client, tmp_path):
    """The same pixels from the Hub with this package and without it."""
    torch.manual_seed(1)
    tuned = {"timesteps": [19, 11.5, 4], "weights": [[], [-0.3], [-0.2]]}
    scheduler = DDPMFacesScheduler(20, prediction_type="v_prediction", tuned_steps={"3": tuned})
    pipeline = DDPMFacesPipeline(tiny_unet(), scheduler, student=tiny_unet())
    schedules = student_schedules(scheduler, [2])
    fast = {"algorithm": "dpmsolver++", "num_inference_steps": 3}
    pipeline.set_presets({"fast": fast, "student": student_preset(schedules)}, "student")
    pipeline.save_pretrained(tmp_path)
    outcome = client.run("result = hub.push(folder, 'owner/fast')", OWNER_TOKEN, folder=str(tmp_path))
    assert outcome.error is None, outcome.output
    files = server.repos["models", "owner/fast"].files
    assert {"student/config.json", "student/unet_ddpm_faces.py"} < set(files)
    card = files["README.md"].decode()
    assert "| `fast` | 3 | dpmsolver++, tuned to this model |" in card
    assert "| `student` | 2 | ddim, a distilled network |" in card
    scope: dict = {}
    exec(PRESETS, scope)
    expected = scope["faces"](pipeline)
    assert expected[0] == expected[2] != expected[1]
    for code, by in (
        ("from ddpm_faces import DDPMFacesPipeline as P; pipeline = P.from_pretrained('owner/fast')", client),
        ("pipeline = DiffusionPipeline.from_pretrained('owner/fast', trust_remote_code=True)", bare_client),
    ):
        outcome = by.run(f"{PRESETS}\nfrom diffusers import DiffusionPipeline\n{code}\nresult = faces(pipeline)")
        assert outcome.error is None, outcome.output
        assert outcome.value == expected


def test_a_prompt_model_is_published(server, client, bare_client, tmp_path):
    """The same pixels from the Hub with this package and without it, and a card that shows how to prompt."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer(["an older man with a hat", "a woman"])
    unet = tiny_unet(text_embed_dim=16)
    torch.nn.init.normal_(unet.text_embedding.weight)
    encoder = make_text_encoder(tokenizer, dim=16).eval()
    pipeline = DDPMFacesPipeline(unet, DDPMFacesScheduler(20), tokenizer=tokenizer, text_encoder=encoder,
                                 guidance_scale=2.0)  # fmt: skip
    pipeline.save_pretrained(tmp_path)
    config = {"sample_prompts": ['a "woman"', "an older man"], "caption_column": "caption"}
    (tmp_path / "training_config.yaml").write_text(yaml.safe_dump(config))
    outcome = client.run("result = hub.push(folder, 'owner/prompts')", OWNER_TOKEN, folder=str(tmp_path))
    assert outcome.error is None, outcome.output
    files = server.repos["models", "owner/prompts"].files
    assert {"tokenizer/tokenizer.json", "text_encoder/model.safetensors"} < set(files)
    assert not [name for name in files if name.endswith(".json") and str(tmp_path).encode() in files[name]]
    card = files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["pipeline_tag"] == "text-to-image"
    assert 'image = pipeline("a \\"woman\\"", generator=' in card
    assert "It knows these words, and names others in a warning: a, an, hat, man, older, with, woman." in card
    assert "| text encoder | DistilBertModel, 0.0 M parameters |" in card
    assert "diffusers torch transformers" in card
    # Samples of the training show its prompts; a grid for the card has none.
    assert "Their prompts" not in card
    image_grid(pipeline(2, output_type="pil").images).save(tmp_path / "samples.png")
    summary = {"guidance_scale": 2.0, "autoguidance_scale": 1.0, "hours": 1, "processes": 1, "device": "CPU"}
    (tmp_path / "training_summary.json").write_text(json.dumps(summary))
    (tmp_path / "again").mkdir()
    hub.export(tmp_path, tmp_path / "again", "owner/prompts", variants=())
    assert 'Their prompts, in turn: a "woman"; an older man.' in (tmp_path / "again" / "README.md").read_text()
    call = """
images = pipeline("an older man", generator=[torch.Generator().manual_seed(3)], output_type="pt").images
result = images.tolist()
"""
    expected = pipeline("an older man", generator=[torch.Generator().manual_seed(3)], output_type="pt").images
    found = []
    for code, by in (
        ("from ddpm_faces import DDPMFacesPipeline as P; pipeline = P.from_pretrained('owner/prompts')", client),
        ("pipeline = DiffusionPipeline.from_pretrained('owner/prompts', trust_remote_code=True)", bare_client),
    ):
        outcome = by.run(f"import torch\nfrom diffusers import DiffusionPipeline\n{code}\n{call}")
        assert outcome.error is None, outcome.output
        found.append(outcome.value)
    assert found[0] == found[1]
    # The encoder of transformers rounds differently with weights at other addresses.
    torch.testing.assert_close(torch.tensor(found[0]), expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("changed", [None, "guide", "no guide"])
def test_training_samples_are_published_only_with_the_same_guide(folder, tmp_path, changed):
    home = shutil.copytree(folder, tmp_path / "home")
    pipeline = DDPMFacesPipeline(tiny_unet(), DDPMFacesScheduler(num_train_timesteps=50))
    pipeline.set_guide(DDPMFacesPipeline(tiny_unet(), pipeline.scheduler), autoguidance_scale=1.5)
    pipeline.save_pretrained(home)
    summary = json.loads((home / "training_summary.json").read_text())
    summary |= {"guide_images_seen": 24_000, "autoguidance_scale": 1.5}  # as in a training run that kept a guide
    (home / "training_summary.json").write_text(json.dumps(summary))
    config = yaml.safe_load((home / "training_config.yaml").read_text())
    (home / "training_config.yaml").write_text(yaml.safe_dump({**config, "sample_sigma_min": 0.5}))
    if changed is not None:
        save_guide(home, pipeline if changed == "guide" else None, 1.5 if changed == "guide" else 1.0)
    exported = tmp_path / "exported"
    exported.mkdir()
    hub.export(home, exported, "owner/faces")
    card = (exported / "README.md").read_text()
    picture = Image.open(exported / "samples.png")
    if changed is None:
        assert picture.getpixel((0, 0)) == (255, 0, 0)
        assert "| guide | this network after 24,000 images |\n| guidance | autoguidance scale 1.5 |" in card
        return
    assert "this network after" not in card
    pipeline = DDPMFacesPipeline.from_pretrained(home)
    pipeline.scheduler = fast_solver(pipeline.scheduler, sigma_min=0.5)  # as in the grids during training
    drawn = pipeline(16, 20, [torch.Generator().manual_seed(seed) for seed in range(16)]).images
    assert np.array_equal(np.asarray(picture), np.asarray(image_grid(drawn, scale=6)))


def test_guide_whose_weights_are_not_finite_is_not_published(folder, tmp_path):
    pipeline = DDPMFacesPipeline.from_pretrained(folder)
    pipeline.set_guide(DDPMFacesPipeline(tiny_unet(), pipeline.scheduler), autoguidance_scale=1.5)
    with torch.no_grad():
        pipeline.guide.conv_in.weight[0] = float("inf")
    with pytest.raises(ValueError, match="weights are not finite: conv_in.weight"):
        hub.export(pipeline, tmp_path, "owner/faces")
    assert not list(tmp_path.iterdir())


def test_saved_and_published_under_the_name_of_the_folder(server, client, published, tmp_path):
    """`save_pretrained(..., push_to_hub=True)`, as in diffusers."""
    code = """
pipeline = DDPMFacesPipeline.from_pretrained("owner/faces")
result = pipeline.save_pretrained(folder, push_to_hub=True, private=True)
"""
    outcome = client.run(code, OWNER_TOKEN, folder=str(tmp_path / "named"))
    assert outcome.error is None, outcome.output
    assert server.repos["models", "owner/named"].private
    assert (tmp_path / "named" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (
            "pipeline.save_pretrained(folder, repo_id='owner/x')",
            "TypeError",
            "arguments of `push_to_hub=True`: repo_id",
        ),
        ("pipeline.save_pretrained(folder, push_to_hub=True, licence='mit')", "TypeError", "licence"),
        (
            "pipeline.save_pretrained(folder, push_to_hub=True, repo_id='strange/x')",
            "HubError",
            "may only publish as owner",
        ),
        ("pipeline.unet.save_pretrained(folder, push_to_hub=True)", "NotImplementedError", "A pipeline is published"),
        (
            "pipeline.scheduler.save_pretrained(folder, push_to_hub=True)",
            "NotImplementedError",
            "A pipeline is publish",
        ),
        ("pipeline.unet.push_to_hub('owner/x')", "NotImplementedError", "A pipeline is published, not its network"),
        ("pipeline.scheduler.push_to_hub('owner/x')", "NotImplementedError", "A pipeline is published, not its sched"),
        ("pipeline.push_to_hub('owner/x', token=False)", "ValueError", "`token` must be a token of the Hub, or None"),
        ("pipeline.push_to_hub('owner/faces', revision='')", "ValueError", "`revision` must be a branch of"),
        ("pipeline.push_to_hub('owner/faces', revision='v1')", "ValueError", "`revision` must be a branch of"),
        ("pipeline.push_to_hub('owner/faces', revision=sha)", "ValueError", "`revision` must be a branch of"),
        ("pipeline.push_to_hub('owner/faces', revision='v9')", "ValueError", "'v9' must be a branch of owner/faces"),
        (
            "pipeline.scheduler = EDMEulerScheduler()\npipeline.push_to_hub('owner/x')",
            "ValueError",
            "not defined by betas",
        ),
        (
            "pipeline.scheduler = PNDMScheduler(3)\npipeline.push_to_hub('owner/x')",
            "ValueError",
            "cannot be generated with PNDM",
        ),
    ],
)
def test_invalid_publishing_arguments_save_nothing(server, client, published, tmp_path, code, kind, says):
    repo = server.repos["models", "owner/faces"]
    before = "from diffusers import EDMEulerScheduler, PNDMScheduler\n"
    before += "pipeline = DDPMFacesPipeline.from_pretrained('owner/faces')\n"
    folder = tmp_path / "folder"
    outcome = client.run(before + code, OWNER_TOKEN, folder=str(folder), sha=next(iter(repo.commits)))
    assert (outcome.kind, says in outcome.error) == (kind, True), outcome.output
    assert not folder.exists()
    assert ("models", "owner/x") not in server.repos


# Loading methods


@dataclass
class Way:
    """Code that loads `source`, a folder or a repository, as pipeline `p`. LOAD is the usual loader."""

    name: str
    code: str
    bare: str | None = None  # the code without the package if it differs; "" if there is none
    token: str | None = None
    hub_only: bool = False


WAYS = [
    Way("`DDPMFacesPipeline.from_pretrained`", "p = DDPMFacesPipeline.from_pretrained(source)", bare=""),
    Way("`DiffusionPipeline`, `trust_remote_code=True`", "p = USUAL(source)"),
    Way(
        "`DDPMFacesUNet` and `DDPMFacesScheduler`, `subfolder=`",
        "p = DDPMFacesPipeline(DDPMFacesUNet.from_pretrained(source, subfolder='unet'), "
        "DDPMFacesScheduler.from_pretrained(source, subfolder='scheduler'))",
        bare="",
    ),
    Way(
        '`AutoModel`, `subfolder="unet"`, `trust_remote_code=True`',
        "p = LOAD(source)\np.unet = AutoModel.from_pretrained(source, subfolder='unet', trust_remote_code=True)",
    ),
    Way(
        "components passed in (1)",
        "u = DDPMFacesUNet.from_pretrained(source, subfolder='unet')\np = LOAD(source, unet=u)\nassert p.unet is u",
        bare="",
    ),
    Way(
        "another scheduler, by `from_config`",
        "q = LOAD(source)\nq.scheduler = DDIMScheduler.from_config(q.scheduler.config)\n"
        "assert len(q.scheduler.betas) == 20\npicture(q)\np = LOAD(source)",
    ),
    Way("`device_map`", "p = LOAD(source, device_map='cpu')"),
    Way("saved again, loaded from there", "LOAD(source).save_pretrained(HOME + '/c')\np = LOAD(HOME + '/c')"),
    Way('`variant="bf16"`', "p = LOAD(source, variant='bf16', dtype=torch.bfloat16)", hub_only=True),
    Way('`variant="fp16"`', "p = LOAD(source, variant='fp16', dtype=torch.float16)", hub_only=True),
    Way("`revision=`, a tag", "p = LOAD(source, revision='v1')", hub_only=True),
    Way("`cache_dir=`", "p = LOAD(source, cache_dir=HOME + '/elsewhere')", hub_only=True),
    Way("`snapshot_download`, then the folder", "p = LOAD(snapshot_download(source))", hub_only=True),
    Way(
        "`local_files_only=True`, from the cache",
        "LOAD(source)\np = LOAD(source, local_files_only=True)",
        hub_only=True,
    ),
    Way(
        "offline, from the cache (2)",
        "LOAD(source)\nconstants.HF_HUB_OFFLINE = True\np = LOAD(source)",
        bare="snapshot_download(source)\nconstants.HF_HUB_OFFLINE = True\np = LOAD(snapshot_download(source))",
        hub_only=True,
    ),
    Way("a private repository, logged in", "p = LOAD('owner/secret')", token=OWNER_TOKEN, hub_only=True),
    Way("a gated repository, logged in", "p = LOAD('owner/gated')", token=OWNER_TOKEN, hub_only=True),
    Way("the same with `token=` (3)", f"p = LOAD('owner/secret', token={OWNER_TOKEN!r})", bare="", hub_only=True),
]
LOADERS = """
import functools
USUAL = functools.partial(DiffusionPipeline.from_pretrained, trust_remote_code=True)
LOAD = DDPMFacesPipeline.from_pretrained if package else USUAL
HOME = os.path.dirname(constants.HF_HUB_CACHE)
"""
COMMAND = "UPDATE_DOCS=1 python -m pytest tests/test_hub.py -k every_loading_method"


def test_every_loading_method(client, bare_client, published, folder):
    """Each method gives the same image, with and without the package. The table is in docs/guides/publish.md."""
    pictures = {}
    lines = ["| method | folder | Hub | folder, no package | Hub, no package |", "|---|---|---|---|---|"]
    problems = []
    for way in WAYS:
        cells = [way.name]
        for runner in (client, bare_client):
            code = way.code if runner is client or way.bare is None else way.bare
            for source in (str(folder), "owner/faces"):
                if not code or (way.hub_only and source == str(folder)):
                    cells.append("")
                    continue
                result = "result = [picture(p).flatten().tolist(), str(p.unet.dtype)]"
                outcome = runner.run(f"{LOADERS}\n{code}\n{result}", way.token, source=source)
                cells.append("no" if outcome.error else "yes")
                if outcome.error:
                    problems.append(f"{way.name}, {source}, {runner is client}\n{outcome.output[-2000:]}")
                else:
                    pixels, dtype = outcome.value
                    np.testing.assert_array_equal(pixels, pictures.setdefault(dtype, pixels), way.name)
        lines.append("| " + " | ".join(cells) + " |")
    assert not problems, "\n\n".join(problems)
    np.testing.assert_allclose(pictures["torch.bfloat16"], pictures["torch.float32"], atol=0.1)
    np.testing.assert_allclose(pictures["torch.float16"], pictures["torch.float32"], atol=0.01)
    page = ROOT / "docs" / "guides" / "publish.md"
    update(page, f"<!-- written by `{COMMAND}` -->\n", "\n".join(lines), "\n<!-- end -->")


def update(page: Path, begin: str, text: str, end: str) -> None:
    """Compare a page with the results, or write them to it if UPDATE_DOCS is set."""
    before, _, rest = page.read_text().partition(begin)
    written, _, after = rest.partition(end)
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(before + begin + text + end + after)
    else:
        assert written == text, f"{page} says something else"


@pytest.mark.parametrize(
    ("code", "token", "says"),
    [
        ("DiffusionPipeline.from_pretrained('owner/faces')", None, "trust_remote_code=True"),
        ("DDPMFacesPipeline.from_pretrained('owner/secret')", None, "owner/secret"),
        ("DDPMFacesPipeline.from_pretrained('owner/secret')", STRANGER_TOKEN, "owner/secret"),
        ("DDPMFacesPipeline.from_pretrained('owner/gated')", STRANGER_TOKEN, "owner/gated"),
        ("DDPMFacesPipeline.from_pretrained('owner/faces', revision='v2')", None, "v2"),
        ("DDPMFacesPipeline.from_pretrained('owner/faces', local_files_only=True)", None, "cache"),
        ("DDPMFacesPipeline.from_pretrained('owner/none')", OWNER_TOKEN, "owner/none"),
        ("DDPMFacesPipeline.from_pretrained('owner/faces', variant='int8')", None, "int8"),
        ("DDPMFacesPipeline.from_pretrained('owner/faces', use_safetensors=False)", None, "pickles"),
        ("DDPMFacesUNet.from_pretrained('owner/faces', subfolder='unet', use_safetensors=False)", None, "pickles"),
    ],
)
def test_failed_loading_explains_why(client, published, code, token, says):
    outcome = client.run(code, token)
    assert says in outcome.output
    assert outcome.kind in ("ValueError", "OSError", "LocalEntryNotFoundError", "GatedRepoError"), outcome.output
    for secret in (OWNER_TOKEN, STRANGER_TOKEN):
        assert secret not in outcome.output


# Faults while publishing


def is_whole(server, repo_id: str, exported: Path) -> bool:
    """Whether the repository contains all exported files, from one commit."""
    repo = server.repos["models", repo_id]
    there = {name: content for name, content in repo.files.items() if name != ".gitattributes"}
    files = {
        path.relative_to(exported).as_posix(): path.read_bytes() for path in exported.rglob("*") if path.is_file()
    }
    return there == files and len(repo.commits) == 2


STEPS = {
    "whoami": r"GET /api/whoami-v2",
    "look": r"GET /api/models/owner/{name}$",
    "create": r"POST /api/repos/create",
    "list": r"GET /api/models/owner/{name}/tree/",
    "yaml": r"POST /api/validate-yaml",
    "preupload": r"POST /api/models/owner/{name}/preupload/",
    "batch": r"POST /owner/{name}\.git/info/lfs/objects/batch",
    "put": r"PUT /[0-9a-f]{{64}}",
    "verify": r"POST /owner/{name}\.git/info/lfs/verify",
    "commit": r"POST /api/models/owner/{name}/commit/",
}


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"cut": "fin"}, {"cut": "reset"}], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_single_fault_is_recovered(server, publish, exported, step, fault):
    server.objects.clear()
    name = f"once-{step}-{'-'.join(map(str, fault.values()))}"
    broken = server.fail(STEPS[step].format(name=name), times=1, **fault)
    outcome = publish(f"owner/{name}")
    assert broken.hits == 1
    if step == "yaml" and outcome.error:
        # The client asks once, and takes any answer but yes as a no.
        assert "owner/" in outcome.error
        server.heal()
        assert publish(f"owner/{name}").error is None
    else:
        assert outcome.error is None, outcome.output
    assert is_whole(server, f"owner/{name}", exported)


def test_card_is_not_lost_while_the_hub_is_busy(server, publish):
    server.put("models", "owner/carded", {"README.md": b"Mine"})
    server.fail("HEAD /owner/carded/resolve/[^/]+/README.md", status=503)
    outcome = publish("owner/carded")
    assert outcome.kind == "HubError", outcome.output
    assert "its README.md could not be read" in outcome.error
    assert server.repos["models", "owner/carded"].files == {"README.md": b"Mine"}


def test_concurrent_publishing_overwrites_nothing(server, publish):
    """Somebody else creates and fills the repository during publishing."""
    server.fail("POST /api/repos/create", call=lambda: server.put("models", "owner/meanwhile", {"README.md": b"T"}))
    outcome = publish("owner/meanwhile")
    assert "somebody else changed the repository in the meantime" in outcome.error
    assert server.repos["models", "owner/meanwhile"].files == {"README.md": b"T"}


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"cut": "reset"}], ids=str)
@pytest.mark.parametrize("step", ["look", "create", "preupload", "put", "commit"])
def test_persistent_fault_publishes_nothing(server, publish, exported, step, fault):
    """The error says that nothing was published, and the same command succeeds once the Hub is back."""
    server.objects.clear()
    name = f"ever-{step}-{'-'.join(map(str, fault.values()))}"
    server.fail(STEPS[step].format(name=name), **fault)
    outcome = publish(f"owner/{name}")
    assert outcome.kind == "HubError"
    repo = server.repos.get(("models", f"owner/{name}"))
    nothing = "Nothing was published" + (". The new repository exists and is empty." if repo else ".")
    assert re.fullmatch(rf"owner/{name}: .+\. {nothing}", outcome.error), outcome.error
    assert 0 < sum(outcome.waited) < 200  # of all threads
    if repo:
        assert list(repo.files) == [".gitattributes"]
    server.heal()
    assert publish(f"owner/{name}").error is None
    assert is_whole(server, f"owner/{name}", exported)


def test_publishing_the_same_again_changes_nothing(server, publish, exported):
    first = publish("owner/same")
    assert publish("owner/same").value == first.value
    assert is_whole(server, "owner/same", exported)


def test_server_down(publish):
    outcome = publish("owner/down", code="constants.ENDPOINT = 'http://127.0.0.1:9'\n" + PUBLISH)
    assert outcome.kind == "HubError"
    assert re.fullmatch(r"owner/down: .*refused.* Nothing was published\.", outcome.error)


def test_offline(publish):
    outcome = publish("owner/offline", code="constants.HF_HUB_OFFLINE = True\n" + PUBLISH)
    assert outcome.kind == "HubError"
    assert "offline" in outcome.error.lower()
    assert outcome.waited == []


def test_lost_answer_does_not_publish_twice(server, publish, exported):
    """The commit arrived, but its answer was lost: it is not sent again or taken for somebody else's commit."""
    server.fail(STEPS["commit"].format(name="lost"), lose_answer=True, times=1)
    outcome = publish("owner/lost")
    assert outcome.error is None, outcome.output
    assert outcome.value.endswith(server.repos["models", "owner/lost"].branches["main"])
    assert is_whole(server, "owner/lost", exported)


def test_lost_answer_and_unreachable_hub_is_reported(server, publish, exported):
    """The result is unknown, so the error does not claim that nothing was published."""
    server.fail(STEPS["commit"].format(name="unsure"), lose_answer=True, times=1)
    server.fail(STEPS["commit"].format(name="unsure"), cut="reset")
    server.fail(r"GET /api/models/owner/unsure/tree/main", cut="reset")
    outcome = publish("owner/unsure")
    url = f"{server.endpoint}/owner/unsure"
    assert outcome.error.endswith(f"The commit may or may not have been published: check {url}, or run this again.")
    assert is_whole(server, "owner/unsure", exported)
    server.heal()
    assert publish("owner/unsure").error is None
    assert is_whole(server, "owner/unsure", exported)


PROPOSE = PUBLISH.replace("private=private", "create_pr=True").replace("result =", "info =")
PROPOSE = PROPOSE.replace("ok=True)\n", "ok=True)\n    (folder / 'metrics.json').write_text(proposal)\n")
PROPOSE += "result = [info.pr_url, info.pr_revision]\n"


def test_pull_request(server, published, publish, client):
    """A reader can open one. The published model stays the same until the owner merges it."""
    repo = server.repos["models", "owner/faces"]
    before = dict(repo.branches)
    outcome = publish("owner/faces", STRANGER_TOKEN, PROPOSE, proposal="{}")
    assert outcome.error is None, outcome.output
    assert outcome.value == [f"{server.endpoint}/owner/faces/discussions/1", "refs/pr/1"]
    assert repo.branches == before | {"refs/pr/1": repo.branches["refs/pr/1"]}
    code = "picture(DDPMFacesPipeline.from_pretrained('owner/faces', revision='refs/pr/1'))"
    loaded = client.run(code)
    assert loaded.error is None, loaded.output


def test_pull_request_is_not_opened_twice(server, published, publish):
    repo = server.repos["models", "owner/faces"]
    before = len(repo.branches)
    server.fail(STEPS["commit"].format(name="faces"), lose_answer=True, times=1)
    outcome = publish("owner/faces", STRANGER_TOKEN, PROPOSE, proposal="[]")
    url = f"{server.endpoint}/owner/faces/discussions"
    assert outcome.error.endswith(f"Check at {url} whether the pull request exists.")
    assert len(repo.branches) == before + 1


def test_branch(server, publish, exported):
    """Publishing to an existing branch does not change the main branch."""
    server.put("models", "owner/branched", {"a.txt": b"a"})
    code = "HfApi().create_branch(repo_id, branch='next')\n" + PUBLISH.replace("private=private", "revision='next'")
    outcome = publish("owner/branched", code=code)
    assert outcome.error is None, outcome.output
    repo = server.repos["models", "owner/branched"]
    assert set(repo.files) == {"a.txt"}
    assert "model_index.json" in repo.commits[repo.branches["next"]].files
    outcome = publish("owner/branched", code=PUBLISH.replace("private=private", "revision='none'"))
    assert outcome.error == "`revision` 'none' must be a branch of owner/branched."


def test_rate_limit_is_respected(server, publish, exported):
    server.fail(STEPS["commit"].format(name="busy"), status=429, headers={"Retry-After": "7"}, times=2)
    outcome = publish("owner/busy")
    assert outcome.error is None, outcome.output
    assert outcome.waited.count(7) == 2
    server.fail(STEPS["commit"].format(name="busier"), status=429, headers={"Retry-After": "7"})
    outcome = publish("owner/busier")
    assert "the Hub received too many requests: run this again later [HTTP 429]" in outcome.error


@pytest.mark.parametrize(
    ("token", "repo_id", "says"),
    [
        (
            "hf_wrongWrongWrongWrongWrongWrongWron",
            "owner/denied",
            "the token is missing or invalid: .+ [HTTP 401]. Nothing was published.",
        ),
        (None, "owner/denied", "you are not logged in: run `hf auth login`, or set HF_TOKEN."),
        (READER_TOKEN, "owner/denied", "the token of owner is read-only: use one with write access."),
        (READER_TOKEN, "owner/faces", "the token of owner is read-only: use one with write access."),
        (STRANGER_TOKEN, "owner/denied", "stranger may only publish as stranger."),
        (STRANGER_TOKEN, "owner/faces", "the token has no permission for this: .+ [HTTP 403]. Nothing was published."),
    ],
)
def test_missing_permission_is_reported(server, published, publish, token, repo_id, says):
    """The permission is checked before the export."""
    before = server.repos["models", "owner/faces"].branches["main"]
    code = PUBLISH.replace("    shutil.copytree", "    print('the work')\n    shutil.copytree")
    outcome = publish(repo_id, token, code)
    assert outcome.kind == "HubError"
    assert re.fullmatch(re.escape(f"{repo_id}: {says}").replace(r"\.\+", ".+"), outcome.error), outcome.error
    assert "the work" not in outcome.output.splitlines()
    assert ("models", "owner/denied") not in server.repos
    assert server.repos["models", "owner/faces"].branches["main"] == before


@pytest.mark.parametrize("step", ["create", "batch", "commit"])
def test_permission_revoked_while_publishing(server, publish, step):
    """The token is revoked during publishing, or is valid for other repositories only."""
    server.fail(STEPS[step].format(name="forbidden"), status=403)
    server.objects.clear()
    outcome = publish("owner/forbidden")
    assert re.search(r"has no permission for this.*\[HTTP 403\]. Nothing was published", outcome.error), outcome.error
    if repo := server.repos.pop(("models", "owner/forbidden"), None):
        assert list(repo.files) == [".gitattributes"]


def test_repository_deleted_while_publishing(server, publish):
    server.fail(STEPS["commit"].format(name="gone"), call=lambda: server.repos.pop(("models", "owner/gone")))
    outcome = publish("owner/gone")
    assert "owner/gone: the repository was not found, or is private" in outcome.error
    assert "[HTTP 404]" in outcome.error


def test_repository_created_by_somebody_else_while_publishing(server, publish, exported):
    """The Hub answers 409, and the existing repository is used."""
    server.fail("POST /api/repos/create", call=lambda: server.put("models", "owner/race", {"a.txt": b"a"}), times=1)
    assert publish("owner/race").error is None
    assert set(server.repos["models", "owner/race"].files) > {"a.txt", "model_index.json"}


def test_two_publishers_at_once(server, publish):
    """The second does not overwrite a commit that it has not seen."""

    def somebody_else():
        server.put("models", "owner/two", {"README.md": b"Theirs"})

    server.fail(STEPS["commit"].format(name="two"), call=somebody_else, times=1)
    outcome = publish("owner/two")
    assert "somebody else changed the repository in the meantime" in outcome.error
    assert "[HTTP 412]" in outcome.error
    assert server.repos["models", "owner/two"].files["README.md"] == b"Theirs"
    assert "model_index.json" not in server.repos["models", "owner/two"].files


@pytest.mark.parametrize("step", ["put", "commit"])
def test_killed_publishing_can_be_repeated(server, client, publish, exported, step):
    server.objects.clear()
    name = f"killed-{step}"
    broken = server.fail(STEPS[step].format(name=name), call=lambda: os.kill(client.pid, signal.SIGKILL), times=1)
    assert publish(f"owner/{name}").killed
    # A commit that has arrived is applied even if the client was killed.
    is_empty = list(server.repos["models", f"owner/{name}"].files) == [".gitattributes"]
    assert is_empty or (step == "commit" and is_whole(server, f"owner/{name}", exported))
    sent = len(server.objects)
    before = len(server.requests)
    assert broken.hits == 1
    assert publish(f"owner/{name}").error is None
    assert is_whole(server, f"owner/{name}", exported)
    assert len([r for r in server.requests[before:] if r.method == "PUT"]) <= len(server.objects) - sent + (
        step == "put"
    )


def test_disk_full_while_exporting(server, client, folder):
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
hub.push(folder, "owner/full")
"""
    outcome = client.run(code, OWNER_TOKEN, folder=str(folder))
    assert outcome.kind is not None
    assert re.search("File too large|No space", outcome.error), outcome.error
    assert ("models", "owner/full") not in server.repos


# Privacy


def test_private_repositories_stay_private(server, publish):
    assert publish("owner/mine", private=True).error is None
    assert server.repos["models", "owner/mine"].private
    assert publish("owner/mine", private=False).error is None
    assert server.repos["models", "owner/mine"].private
    assert publish("owner/mine").error is None
    assert server.repos["models", "owner/mine"].private


def test_private_is_refused_for_a_public_repository(server, publish):
    server.put("models", "owner/open", {"README.md": b"Open"})
    outcome = publish("owner/open", private=True)
    assert outcome.kind == "ValueError"
    assert "owner/open is public: make it private" in outcome.error
    assert list(server.repos["models", "owner/open"].files) == ["README.md"]


def test_tokens_are_never_published(server, publish, exported, tmp_path):
    leaking = tmp_path / "leaking"
    shutil.copytree(exported, leaking)
    (leaking / "README.md").write_text(f"My token is {OWNER_TOKEN}.")
    outcome = publish("owner/leak", code="source = leaking\n" + PUBLISH, leaking=str(leaking))
    assert "README.md contains a token of the Hub and cannot be published" in outcome.error
    assert OWNER_TOKEN not in outcome.output
    assert ("models", "owner/leak") not in server.repos


@pytest.mark.parametrize("repo_id", ["faces", "a/b/c", "owner/fa ces", "owner/--", ""])
def test_bad_names(repo_id, folder):
    with pytest.raises(ValueError, match=re.escape(repr(repo_id)) if repo_id else "(?i)repo"):
        hub.push(folder, repo_id)


def test_malformed_token_is_not_shown(folder):
    with pytest.raises(ValueError, match="without spaces") as error:
        hub.push(folder, "owner/faces", token="secret\n")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "says"),
    [
        ("---\n{{ x\n---\nMine", "cannot be read"),
        ("---\ntags: [[\n---\nMine", "cannot be read"),
        ("---\ntags: one\ndatasets: user/people\nmodel-index: [1]\n---\nMine", None),
        ("---\nbase_model: user/former\nlicense: other\nlicense_name: mine\n---\n<!-- generated: use -->\nMine", None),
    ],
)
def test_unusual_cards(old, says, exported):
    new = (exported / "README.md").read_text()
    if says:
        with pytest.raises(ValueError, match=says):
            merge_cards(old, new)
        return
    merged = merge_cards(merge_cards(old, new), new)
    assert "Mine" in merged
    assert merged.count("<!-- end: summary -->") == 1
    head = yaml.safe_load(merged.split("---")[1])
    assert "license_name" not in head
    assert head["base_model"] == "user/base"
    if "one" in old:
        assert head["tags"][0] == "one"
        assert head["datasets"] == ["user/people"]


TRAINING = "<!-- generated: training -->\n| | |\n|---|---|\n{rows}\n<!-- end: training -->\n"


@pytest.mark.parametrize(
    ("head", "rows", "expected"),
    [
        # Entries that the old card's table names were generated. They are removed or replaced.
        ({"base_model": "user/former"}, "| base model | user/former |", {}),
        ({"datasets": ["user/former"]}, "| training images | user/former: 40 pictures |", {}),
        ({"datasets": ["user/former", "user/b"]}, "| training images | user/former |", {"datasets": ["user/b"]}),
        ({"base_model": ["user/former", "user/x"]}, "| base model | user/former |", {"base_model": ["user/x"]}),
        # All other entries were written by a person.
        ({"base_model": "user/theirs"}, "| base model | user/former |", {"base_model": "user/theirs"}),
        ({"base_model": "user/theirs"}, "| batch size | 8 |", {"base_model": "user/theirs"}),
        ({"datasets": "user/theirs"}, "| training images | people |", {"datasets": "user/theirs"}),
    ],
)
def test_metadata_of_an_earlier_publishing_is_replaced(head, rows, expected):
    old = f"---\n{yaml.safe_dump(head)}---\n{TRAINING.format(rows=rows)}"
    new = f"---\nlibrary_name: diffusers\n---\n{TRAINING.format(rows='| batch size | 16 |')}"
    merged = yaml.safe_load(merge_cards(old, new).split("---")[1])
    assert {key: merged[key] for key in ("base_model", "datasets") if key in merged} == expected
    datasets = new.replace("library_name: diffusers", "datasets:\n- user/next\nbase_model: user/next")
    merged = yaml.safe_load(merge_cards(old, datasets).split("---")[1])
    theirs = expected.get("datasets", [])
    assert merged["datasets"] == ["user/next", *([theirs] if isinstance(theirs, str) else theirs)]
    assert merged["base_model"] == "user/next"


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ([], "from a clone of its source with `pip install .`"),
        (["Homepage, https://x.org", "Repository, https://git.org/a/b"], "`pip install git+https://git.org/a/b`"),
    ],
)
def test_card_says_how_to_install_the_package(pipeline, tmp_path, monkeypatch, urls, says):
    """The package is not on PyPI: with the address in pyproject.toml, or without one."""
    message = email.message.Message()
    for url in urls:
        message["Project-URL"] = url
    monkeypatch.setattr("ddpm_faces.hub.card.metadata", lambda name: message)
    hub.export(pipeline, tmp_path, "owner/faces", variants=())
    card = (tmp_path / "README.md").read_text()
    assert says in card
    assert "pip install ddpm-faces" not in card


def test_broken_pipelines_are_refused(folder, tmp_path, exported):
    with pytest.raises(ValueError, match="it has no model_index.json"):
        hub.export(tmp_path, tmp_path / "out", "owner/faces")
    with pytest.raises(ValueError, match="`variants` must be among bf16, fp16, got int8"):
        hub.push(folder, "owner/faces", variants=["int8"])  # before any request to the Hub
    with pytest.raises(ValueError, match="`variants` must be among bf16, fp16, got 3"):
        hub.push(folder, "owner/faces", variants=[3])
    unet = tiny_unet()
    unet.conv_in.bias.data[0] = 1e30
    with pytest.raises(ValueError, match="fp16 overflows in conv_in.bias; leave it out"):
        hub.export(DDPMFacesPipeline(unet, DDPMFacesScheduler()), tmp_path / "a", "owner/faces")
    unet.conv_in.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"weights are not finite: conv_in.bias \(1 in all\)"):
        hub.export(DDPMFacesPipeline(unet, DDPMFacesScheduler()), tmp_path / "b", "owner/faces")
    shutil.copytree(exported, tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="does not load in a new process"):
        hub.check(tmp_path / "broken")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.json", '{"metrics": [{}]}'), ("metrics.json", "{"), ("metrics.json", "[]"),
        ("training_summary.json", '{"hours": 1}'), ("training_config.yaml", "a: ["), ("training_config.yaml", ""),
    ],
)  # fmt: skip
def test_damaged_training_records_are_named(pipeline, tmp_path, name, text):
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).write_text(text)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=name):
        hub.export(tmp_path / "model", tmp_path / "out", "owner/faces", variants=())


def test_pipelines_that_do_not_generate_are_not_published(server, client, folder):
    """The weights are finite but the images are not, which only the check in a new process finds."""
    code = """
pipeline = DDPMFacesPipeline.from_pretrained(folder)
for parameter in pipeline.unet.parameters():
    parameter.data *= 1e20
hub.push(pipeline, "owner/broken", variants=())
"""
    outcome = client.run(code, OWNER_TOKEN, is_checked=True, folder=str(folder))
    assert outcome.kind == "ValueError", outcome.output
    assert outcome.error.endswith("the image is not finite")
    assert ("models", "owner/broken") not in server.repos


# Faults while loading

LOAD = "result = picture(DDPMFacesPipeline.from_pretrained(repo_id)).flatten().tolist()"
GETS = {
    "info": r"GET /api/models/owner/faces$",
    "head": r"HEAD /owner/faces/resolve/[^/]+/unet/diffusion",
    "get": r"GET /owner/faces/resolve/[^/]+/unet/config.json",
    "object": r"GET /[0-9a-f]{64}",
}


@pytest.mark.parametrize("fault", [{"status": 503}, {"cut": "fin"}, {"cut": "reset"}], ids=str)
@pytest.mark.parametrize("step", GETS)
def test_single_download_fault_is_recovered(server, client, published, step, fault):
    """Loading succeeds at once, or reports an error and succeeds at the second try."""
    expected = client.run(LOAD, repo_id="owner/faces").value
    broken = server.fail(GETS[step], times=1, **fault)
    home = client.new_home()
    outcome = client.run(LOAD, repo_id="owner/faces", home=home)
    assert broken.hits == 1
    if outcome.error is not None:
        assert outcome.kind in ("OSError", "LocalEntryNotFoundError", "HfHubHTTPError"), outcome.output
        outcome = client.run(LOAD, repo_id="owner/faces", home=home)
    assert outcome.value == expected


def test_model_loads_from_the_cache_while_the_server_is_down(server, client, published):
    home = client.new_home()
    expected = client.run(LOAD, repo_id="owner/faces", home=home)
    server.fail(".*", status=503)
    assert client.run(LOAD, repo_id="owner/faces", home=home).value == expected.value
    outcome = client.run(LOAD, repo_id="owner/faces")
    assert outcome.kind in ("OSError", "LocalEntryNotFoundError")


@pytest.mark.parametrize("fault", ["killed", "disk full"])
def test_interrupted_download_resumes(server, client, published, fault):
    home, code = client.new_home(), LOAD
    if fault == "killed":
        server.fail(GETS["object"], call=lambda: os.kill(client.pid, signal.SIGKILL), times=1)
    else:
        code = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        code += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n" + LOAD
    outcome = client.run(code, repo_id="owner/faces", home=home)
    assert outcome.killed or re.search("File too large|No space", outcome.output)
    outcome = client.run(LOAD, repo_id="owner/faces", home=home)
    assert outcome.value == client.run(LOAD, repo_id="owner/faces").value


def test_corrupted_download_is_found_and_repaired(server, client, published):
    """The file has the right size, which is all that the client checks."""
    home = client.new_home()
    server.fail(GETS["object"], corrupt=True, times=1)
    wrong = client.run(LOAD, repo_id="owner/faces", home=home)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert client.run("result = hub.verify('owner/faces')", home=home).value == [name]
    assert client.run("result = hub.verify('owner/faces', repair=True)", home=home).value == []
    right = client.run(LOAD, repo_id="owner/faces", home=home).value
    assert right == client.run(LOAD, repo_id="owner/faces").value
    assert wrong.value != right
    assert "owner/faces cannot be verified" in client.run("hub.verify('owner/faces')").error


# Untrusted files


@pytest.fixture
def strange(server, client, exported):
    """Publish the export with some files replaced, and try to load it."""

    def strange(changes: dict[str, dict | bytes | None], code: str = LOAD):
        files = {p.relative_to(exported).as_posix(): p.read_bytes() for p in exported.rglob("*") if p.is_file()}
        for name, change in changes.items():
            if change is None:
                del files[name]
            elif isinstance(change, dict):
                files[name] = json.dumps({**json.loads(files[name]), **change}).encode()
            else:
                files[name] = change
        server.repos.pop(("models", "owner/strange"), None)
        server.put("models", "owner/strange", files)
        before = "import resource\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\ntry:\n    "
        after = (
            "\nfinally:\n"
            "    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
            "    print('grown by', grown, 'KB', flush=True)"
        )
        return client.run(before + code + after, repo_id="owner/strange")

    return strange


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("unet/config.json", {"block_out_channels": [8, 10**9]}, "`block_out_channels` must be 2 to 12 widths"),
        ("unet/config.json", {"block_out_channels": [1] * 40, "block_types": ["conv"] * 39}, "must be 2 to 12 widths"),
        ("unet/config.json", {"layers_per_block": 10**9}, "`layers_per_block` must be"),
        ("unet/config.json", {"sample_size": 10**9}, "`sample_size` must be"),
        ("unet/config.json", {"num_class_embeds": 10**12}, "`num_class_embeds` must be"),
        ("unet/config.json", {"block_out_channels": ["8", "16"]}, "`block_out_channels` must be 2 to 12 widths"),
        ("unet/config.json", {"block_out_channels": [8000, 16000]}, "shape"),
        ("unet/config.json", {"new_trick": 1}, "does not know: new_trick. It belongs to another network"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "`num_train_timesteps` must be at most"),
        ("model_index.json", {"_format_version": 5}, "saved in format 5, by a later version of ddpm-faces"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "of another kind of pipeline: it has vae"),
        ("model_index.json", b'{"_class_name": "DDPMPipeline"}', "of another kind of pipeline: it has no unet"),
        ("model_index.json", {"unet": ["../../evil", "DDPMFacesUNet"]}, "`unet` must name a library and a class"),
        ("model_index.json", {"unet": ["os", "system"]}, "`unet` must name a library and a class"),
        ("model_index.json", {"unet": ["diffusers", "AutoencoderKL"]}, "`unet` must name a library and a class"),
        ("model_index.json", {"unet": {}}, "`unet` must name a library and a class"),
        ("model_index.json", {"scheduler": ["diffusers", "DiffusionPipeline"]}, "`scheduler` must name a library"),
        ("model_index.json", {"scheduler": ["diffusers", ["DDPMScheduler"]]}, "`scheduler` must name a library"),
        ("model_index.json", {"weights": ["diffusers", "UNet2DModel"]}, "`weights` must be 'ema', 'raw' or nothing"),
        ("model_index.json", {"guide": ["os", "system"]}, "`guide` must name a library and a class"),
        (
            "model_index.json",
            {"autoguidance_scale": 1.5},
            "`autoguidance_scale` must be 1 for a model without a guide",
        ),
        ("model_index.json", {"autoguidance_scale": ["a", "b"]}, "`autoguidance_scale` must be a number"),
        ("model_index.json", b"[]", "must contain a JSON object"),
        ("unet/config.json", b"[1]", "must contain a JSON object"),
        ("scheduler/scheduler_config.json", b"[1]", "must contain a JSON object"),
        ("model_index.json", b"{", "JSON"),
        ("model_index.json", DEEP, "is not valid JSON"),
        ("unet/config.json", DEEP, "nested too deeply"),
        ("scheduler/scheduler_config.json", DEEP, "nested too deeply"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:40],
)  # fmt: skip
def test_malicious_configurations_allocate_no_memory(strange, file, change, says):
    outcome = strange({file: change})
    assert outcome.kind in ("ValueError", "OSError"), outcome.output
    assert says in outcome.error, outcome.error
    assert int(re.search(r"grown by (\d+) KB", outcome.output)[1]) < 100_000


@pytest.mark.parametrize(
    ("name", "class_name", "config", "says"),
    [
        (
            "scheduler",
            "DDPMScheduler",
            {"num_train_timesteps": 10**8},
            "`num_train_timesteps` must be at most 1000000",
        ),
        ("scheduler", "DDIMScheduler", {"trained_betas": [0.5] * 1_000_001}, "`trained_betas` has 1000001 entries"),
        ("unet", "UNet2DModel", {"layers_per_block": 10**6}, "`layers_per_block` must be at most 64"),
        ("unet", "UNet2DModel", {"block_out_channels": [32, 10**9]}, "`block_out_channels` must be at most 16384"),
        ("unet", "UNet2DModel", {"down_block_types": ["DownBlock2D"] * 99}, "`down_block_types` has 99 entries"),
        ("guide", "UNet2DModel", {"block_out_channels": [32, 10**9]}, "`block_out_channels` must be at most 16384"),
        ("unet", "UNet2DModel", DEEP, "is not valid JSON"),
        ("scheduler", "DDPMScheduler", b"[]", "must contain a JSON object"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:40],
)
def test_malicious_configurations_of_diffusers_classes_are_refused(strange, name, class_name, config, says):
    """diffusers itself does not check them, and would allocate gigabytes."""
    file = "scheduler/scheduler_config.json" if name == "scheduler" else f"{name}/config.json"
    config = config if isinstance(config, bytes) else json.dumps(config).encode()
    outcome = strange({"model_index.json": {name: ["diffusers", class_name]}, file: config})
    assert outcome.kind == "ValueError", outcome.output
    assert says in outcome.error, outcome.error
    assert int(re.search(r"grown by (\d+) KB", outcome.output)[1]) < 100_000


def test_weights_outside_the_repository_are_refused(strange, tmp_path):
    """An index of shards points outside the repository."""
    index = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": "../../../../../../../etc/passwd"}}
    weights = "unet/diffusion_pytorch_model.safetensors"
    outcome = strange({weights: None, f"{weights}.index.json": json.dumps(index).encode()})
    assert outcome.kind in ("ValueError", "OSError", "FileNotFoundError", "SafetensorError"), outcome.output


def test_pickles_among_the_shards_are_refused(strange, exported):
    weights = "unet/diffusion_pytorch_model.safetensors"
    names = load_file(exported / weights)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "w.bin")}
    changes = {weights: None, f"{weights}.index.json": json.dumps(index).encode(), "unet/w.bin": b"pickle"}
    outcome = strange(changes, "DDPMFacesUNet.from_pretrained(repo_id, subfolder='unet')")
    assert "not safetensors and cannot be loaded" in outcome.error, outcome.output


def test_missing_weights_are_refused(strange, exported):
    weights = "unet/diffusion_pytorch_model.safetensors"
    state = load_file(exported / weights)
    state["extra"] = state.pop("conv_in.weight")
    outcome = strange({weights: save(state, {"format": "pt"})})
    assert outcome.kind == "ValueError", outcome.output
    assert "1 are missing (conv_in.weight), 1 are unknown (extra)" in outcome.error


def test_pickles_are_refused(strange, tmp_path):
    """The only weights are a pickle that leaves a file behind when it is opened."""
    mark = tmp_path / "mark"
    pickle = b"cposix\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."
    weights = "unet/diffusion_pytorch_model"
    names = [f"{weights}{kind}.safetensors" for kind in ("", ".bf16", ".fp16")]
    for code in (LOAD, "DDPMFacesUNet.from_pretrained(repo_id, subfolder='unet')"):
        outcome = strange({**dict.fromkeys(names), f"{weights}.bin": pickle}, code)
        assert outcome.kind == "OSError", outcome.output
        assert not mark.exists()


def test_code_runs_only_with_trust_remote_code(strange, tmp_path):
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w').close()\n".encode()
    names = ["pipeline_ddpm_faces.py", "unet/unet_ddpm_faces.py", "scheduler/scheduling_ddpm_faces.py"]
    outcome = strange(dict.fromkeys(names, code))
    assert outcome.error is None, outcome.output
    outcome = strange(dict.fromkeys(names, code), "DiffusionPipeline.from_pretrained(repo_id)")
    assert "trust_remote_code=True" in outcome.error
    outcome = strange(dict.fromkeys(names, code), "AutoModel.from_pretrained(repo_id, subfolder='unet')")
    assert outcome.kind == "ValueError"
    assert not mark.exists()
    strange(dict.fromkeys(names, code), "DiffusionPipeline.from_pretrained(repo_id, trust_remote_code=True)")
    assert mark.exists()
