"""Releases: one version everywhere, a wheel and a source distribution."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

import ddpm_faces


ROOT = Path(__file__).parents[1]


def test_citation_and_changelog_state_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ddpm_faces.__version__

    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", f"{citation['version']} - {citation['date-released']}"]


# The workflows. Only GitHub can run them, so these tests check that the names in them exist.


WORKFLOWS = {path.name: path.read_text() for path in (ROOT / ".github" / "workflows").iterdir()}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_names_targets_and_files_that_exist(name):
    text = re.sub(r"https?://\S+", "", WORKFLOWS[name])
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([\w-]+)", text)) <= set(targets)
    for path in re.findall(r"[\w/-]+\.(?:cff|md|py|toml|txt)\b", text):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_are_read_only_unless_a_job_needs_more(name):
    workflow = yaml.safe_load(WORKFLOWS[name])
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "timeout-minutes" in job
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step.get("uses", "a/b@v1"))


def test_each_python_version_that_is_declared_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [name.split(" :: ")[-1] for name in project["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    tested = yaml.safe_load(WORKFLOWS["tests.yml"])["jobs"]["newest"]["strategy"]["matrix"]["python"]
    assert declared == tested
    assert project["requires-python"] == f">={declared[0]}"


# Wheel and source distribution. These slow tests share one build, and therefore one process.


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution and the wheel built from it."""
    folder = tmp_path_factory.mktemp("built")
    build(ROOT, folder)
    return folder


def build(source: Path, folder: Path, *arguments: str) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, *arguments, source)


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a command without access to this clone, and return its output."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """A new environment with the wheel. It shares the dependencies of this one, but not its ddpm-faces."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    (wheel,) = built.glob("*.whl")
    run(
        sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel
    )
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


@pytest.mark.slow
def test_wheels_from_source_distribution_and_repository_are_equal(built, tmp_path):
    build(ROOT, tmp_path, "--wheel")
    (from_repository,), (from_source_distribution,) = tmp_path.glob("*.whl"), built.glob("*.whl")
    assert from_repository.read_bytes() == from_source_distribution.read_bytes()


@pytest.mark.slow
def test_source_distribution_contains_its_tests_and_their_data(built, tmp_path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    some = ["tests/test_config.py", "tests/test_models.py"]
    run(sys.executable, "-m", "pytest", "-n", "0", *some, cwd=source, PYTHONPATH=str(source / "src"))
    for test in (ROOT / "tests").rglob("*.py"):
        assert (source / test.relative_to(ROOT)).is_file()
    for name in ("Makefile", "constraints.txt", ".ci/run", "training/configs/drawn32.yaml", "examples/generate.py"):
        assert (source / name).is_file()
    assert not (source / "models").exists()
    assert archive.stat().st_size < 10e6


@pytest.mark.slow
def test_installed_wheel_runs(installed, tmp_path):
    python = installed / "bin" / "python"
    home = Path(run(python, "-c", "import ddpm_faces; print(ddpm_faces.__file__)", cwd=tmp_path).strip()).parent
    assert home.is_relative_to(installed)
    assert "evaluate" in run(installed / "bin" / "ddpm-faces", "--help", cwd=tmp_path)

    assert (home / "py.typed").is_file()
    for path in (ROOT / "training").rglob("*.*"):
        if path.suffix in (".py", ".yaml"):
            assert (home / "_training" / path.relative_to(ROOT / "training")).read_bytes() == path.read_bytes()
    template = run(python, "-c", "from ddpm_faces.hub import card; print(card.template_path())", cwd=tmp_path).strip()
    assert Path(template) == home / "model_card.md"
    assert "--train-data-dir" in run(python, home / "_training" / "train.py", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_type_checkers_see_the_types_of_the_installed_package(installed, tmp_path):
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-accelerate.*,diffusers.*,torch.*]\nfollow_imports = skip\n")
    (tmp_path / "code.py").write_text(
        "from ddpm_faces import DDPMFacesScheduler\n"
        "from ddpm_faces.data import load_faces\n"
        "reveal_type(load_faces)\n"
        "def ten(scheduler: DDPMFacesScheduler) -> None:\n"
        "    scheduler.set_timesteps('ten')\n"
    )
    command = ["mypy", "--python-executable", installed / "bin" / "python", "code.py"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True)
    revealed, mistake, summary = done.stdout.splitlines()
    assert "-> ddpm_faces.data.dataset.FaceDataset" in revealed
    assert 'code.py:5: error: Argument 1 to "set_timesteps"' in mistake
    assert summary.startswith("Found 1 error")
