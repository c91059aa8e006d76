"""The documentation: links and commands are valid, and code blocks run when pasted."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import typer
from conftest import tiny_unet
from hub_server import OWNER_TOKEN

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DrawnFaces
from ddpm_faces.cli.app import app
from ddpm_faces.text import make_text_encoder, make_tokenizer
from ddpm_faces.training.arguments import parse_training_config
from ddpm_faces.training.distillation import parse_distillation_config


ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {ROOT / "model_card.md"})  # a template
USED = [ROOT / "README.md", ROOT / "README.zh-TW.md", ROOT / "docs/index.md", ROOT / "docs/tutorial.md"]
USED += sorted(ROOT.glob("docs/guides/*.md"))
FENCE = re.compile(r"^ *```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    """Return the code blocks of a language, without the indentation of tabs and notes."""
    found = FENCE.finditer(path.read_text())
    return [textwrap.dedent(match["code"]) for match in found if match["language"] == language]


def commands(path: Path) -> list[list[str]]:
    """Return the commands of the bash blocks, split into words."""
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line]


# Links


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings, as in GitHub and MkDocs."""
    text = FENCE.sub("", path.read_text())
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_are_valid(path):
    text = FENCE.sub("", path.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    assert links or path.parent.name == "reference"
    broken = []
    for link in links:
        target, _, anchor = link.partition("#")
        page = (path.parent / target).resolve() if target else path
        if "://" not in link and not (page.exists() and (not anchor or anchor in anchors(page))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_named_tests_exist(path):
    files = list((ROOT / "tests").glob("*.py"))
    existing = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert set(re.findall(r"`(test_\w+?)`", path.read_text())) - {file.stem for file in files} <= existing


def test_every_page_is_in_the_navigation():
    navigation = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert navigation == {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}


def test_site_builds_strictly(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    configuration = (tmp_path / "reference/config/index.html").read_text()
    assert "<code>train_batch_size</code>" in configuration
    assert "<code>--num-images</code>" in (tmp_path / "reference/cli/index.html").read_text()
    assert 'href="../..' in configuration  # without links to files outside of the site
    assert "training/configs</a>" not in configuration


# Commands


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with small versions of all files that the commands and the code in the documentation use."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("models", "examples", "training"):
        (folder / name).symlink_to(ROOT / name)
    for name, num_timesteps in {"my-model": 20, "my-guide": 20, "my-model-fast": 20, "small-model": 300}.items():
        pipeline = DDPMFacesPipeline(tiny_unet(), DDPMFacesScheduler(num_train_timesteps=num_timesteps))
        if name == "small-model":  # stands in for models/faces64
            pipeline.set_presets({"fast": {"num_inference_steps": 3}, "draft": {"num_inference_steps": 2}}, "fast")
        pipeline.save_pretrained(folder / name)
    scheduler = DDPMFacesScheduler(num_train_timesteps=20)
    DDPMFacesPipeline(tiny_unet(num_class_embeds=2, null_class=True), scheduler).save_pretrained(
        folder / "my-class-model"
    )
    tokenizer = make_tokenizer(["a smiling woman with brown hair"])
    texts = {"tokenizer": tokenizer, "text_encoder": make_text_encoder(tokenizer, dim=16)}
    prompted = DDPMFacesPipeline(tiny_unet(text_embed_dim=16), scheduler, **texts)
    prompted.save_pretrained(folder / "my-prompt-model")
    for name in ("my_faces", "my_photos"):
        (folder / name).mkdir()
        DrawnFaces(1, resolution=16)[0]["image"].save(folder / name / "0.png")
    DrawnFaces(1, resolution=64)[0]["image"].save(folder / "my-face.png")
    for name in ("fast.json", "model.pt"):
        (folder / name).write_text("{}")
    return folder


def check(words: list[str]) -> None:
    """Check a command with the parser of the program that it starts."""
    program, *arguments = words
    if program == "ddpm-faces":
        check_ddpm_faces(arguments)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert arguments[0] == "launch"
        launched = launch_command_parser().parse_args(arguments[1:])
        parse = {"train.py": parse_training_config, "distill.py": parse_distillation_config}
        if (script := Path(launched.training_script).name) in parse:
            parse[script](launched.training_script_args)
        else:
            assert launched.training_script == "$(which", words
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for named in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
            assert set(named.split(",")) <= set(extras)
    elif program in ("python", "python3"):
        assert arguments[0] in ("-m", "-") or (ROOT / arguments[0]).is_file(), words
    else:
        assert program in ("source", "tensorboard"), f"What is {words}? Teach `check` to check it."


def check_ddpm_faces(arguments: list[str]) -> None:
    name, *rest = arguments
    group = typer.main.get_command(app)
    assert name in group.commands, f"ddpm-faces has no command {name!r}"
    settings = {"obj": None, "token_normalize_func": lambda option: option.replace("_", "-")}
    context = group.commands[name].make_context(name, rest, **settings)
    if name in ("train", "distill"):
        (parse_training_config if name == "train" else parse_distillation_config)(context.args)


@pytest.mark.parametrize("path", USED, ids=name_of)
def test_commands_are_valid(path, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    for words in commands(path):
        check(words)


@pytest.mark.parametrize(
    "words",
    [
        "ddpm-faces generate my-model --number 3",
        "ddpm-faces evalute my-model",
        "ddpm-faces train --rezolution 64",
        "ddpm-faces distill --techer my-model",
        "accelerate launch --mixed bf17 training/train.py",
        "accelerate launch training/train.py --rezolution 64",
        "make everything",
        "pip install .[everything]",
        "python examples/none.py",
        "frobnicate",
    ],
)
def test_invalid_commands_are_found(words, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    with pytest.raises(BaseException, match=r".*") as raised:
        check(words.split())
    assert not isinstance(raised.value, KeyboardInterrupt)


# Code

OPTIONAL = ("deepinv",)  # packages that are no dependencies: their code runs where they are installed
WITH_CODE = [path for path in USED if blocks(path, "python")]
PAGE = """
import os
os.chdir(folder)
exec(compile(text, "page", "exec"), {"__name__": "__main__"})
"""


@pytest.fixture(scope="module")
def published(client, workplace) -> None:
    code = "DDPMFacesPipeline.from_pretrained(model).push_to_hub('owner/pasted')"
    assert client.run(code, OWNER_TOKEN, model=str(workplace / "my-model")).error is None


@pytest.mark.parametrize("is_real", [pytest.param(True, marks=pytest.mark.slow), False], ids=["faces64", "stand-in"])
@pytest.mark.parametrize("path", WITH_CODE, ids=name_of)
def test_code_blocks_run(path, is_real, workplace, published, client, tmp_path):
    """Uses the model of this repository, or in `make test` a tiny model of the same kind."""
    for entry in workplace.iterdir():
        if entry.name not in ("my_photos", "models"):  # the tutorial creates my_photos
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/faces64").symlink_to(ROOT / "models/faces64" if is_real else workplace / "small-model")
    missing = [f"import {name}" for name in OPTIONAL if importlib.util.find_spec(name) is None]
    text = "\n".join(code for code in blocks(path, "python") if not any(line in code for line in missing))
    # The local Hub has the user `owner` with one model, and a few faces are enough.
    names = {"user/my-faces": "owner/pasted", "user/faces": "owner/pasted", "user/": "owner/"}
    for part, ours in {**names, "num_images=1200": "num_images=12"}.items():
        text = text.replace(part, ours)
    outcome = client.run(PAGE, OWNER_TOKEN, text=text, folder=str(tmp_path))
    assert outcome.error is None, outcome.output


# Replacements that shorten the tutorial for the test. Each must occur in its text.
SMALLER = {
    "num_images=1200": "num_images=260",
    "--num-test-images 200": "--num-test-images 110",
    "--output-dir my-model": "--output-dir my-model "
    "--max-train-images 256 --block-out-channels 8 16 --block-types resnet --norm-num-groups 4 --lr-warmup-images 0 "
    "--num-validation-images 20 --num-samples 2 --num-train-timesteps 20 --sample-inference-steps 2 "
    "--validate-every-images 128 --sample-every-images 128",
    "--num-images 16": "--num-images 2",
    "--num-images 200": "--num-images 110",
    "user/": "owner/",
}


@pytest.mark.slow
def test_tutorial(server, tmp_path):
    """Runs every command of the tutorial, from installation to a published model on the local Hub."""
    text = (ROOT / "docs/tutorial.md").read_text()
    for part, smaller in SMALLER.items():
        assert part in text
        text = text.replace(part, smaller)
    page = tmp_path / "tutorial.md"
    page.write_text(text)
    work = tmp_path / "work"
    work.mkdir()
    (work / "models").symlink_to(ROOT / "models")
    environment = server.environment(tmp_path / "home")
    environment |= {"PYTHONPATH": str(ROOT / "src"), "HF_TOKEN": OWNER_TOKEN, "OMP_NUM_THREADS": "1"}
    run = "from ddpm_faces.cli import main; main()"
    for match in FENCE.finditer(text):
        if match["language"] == "python":
            programs = [[sys.executable, "-c", match["code"]]]
        elif match["language"] == "bash":
            lines = match["code"].replace("\\\n", " ").splitlines()
            words = [shlex.split(line) for line in lines]
            programs = [[sys.executable, "-c", run, *line[1:]] for line in words if line[0] == "ddpm-faces"]
        else:
            continue
        for program in programs:
            result = subprocess.run(program, cwd=work, env=environment, capture_output=True, text=True)
            # 3: the audit may report copies of drawn faces, as the tutorial explains.
            allowed = (0, 3) if "audit" in program else (0,)
            assert result.returncode in allowed, f"{program}\n{result.stdout}\n{result.stderr}"
    files = server.repos["models", "owner/my-faces"].files
    assert {"README.md", "model_index.json", "samples.png", "metrics.json"} <= set(files)
    for name in ("faces.png", "my-faces.png", "face.png", "my-model/audit.png"):
        assert (work / name).is_file()


def test_notebook(client, tmp_path):
    """The code cells run from top to bottom, with the small settings of QUICK."""
    notebook = json.loads((ROOT / "examples/article.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    # Plots are saved to a file instead of shown.
    text = "\n".join("".join(cell["source"]) for cell in code).replace("plt.show()", 'plt.savefig("last.png")')
    settings = 'os.environ["QUICK"] = "1"\nimport matplotlib\nmatplotlib.use("agg")\n'
    outcome = client.run(settings + PAGE, text=text, folder=str(tmp_path))
    assert outcome.error is None, outcome.output
    assert "21.9% of the amplitude is left" in outcome.output  # as on the article page
    assert (tmp_path / "last.png").stat().st_size > 10_000
