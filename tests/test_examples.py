"""Examples and benchmarks run as documented, with correct output."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_faces import DrawnFaces


ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch):
    """Run a script like `python SCRIPT ARGUMENTS`, but in this process; return its output."""

    def run(script: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.chdir(ROOT)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            runpy.run_path(script, run_name="__main__")
        return output.getvalue()

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def model(pipeline, tmp_path) -> Path:
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_generate(run, model, tmp_path):
    for count in (1, 4):
        assert str(tmp_path / f"{count}.png") in run(
            "examples/generate.py", model, "--num_images", count, "--output", tmp_path / f"{count}.png"
        )
    one, four = (np.asarray(Image.open(tmp_path / f"{count}.png")).astype(int) for count in (1, 4))
    assert one.shape == (128, 128, 3)
    assert four.shape == (258, 258, 3)
    assert abs(four[:128, :128] - one).max() <= 1  # face 0 does not depend on the number of faces


def test_denoising_strip(run, model, tmp_path):
    run("examples/denoising_strip.py", model, "--num_images", 2, "--output", tmp_path / "strip.png")
    width, height = Image.open(tmp_path / "strip.png").size
    assert width > 3 * height


def test_forward_process(run, tmp_path):
    DrawnFaces(1, resolution=48)[0]["image"].save(tmp_path / "face.png")
    run("examples/forward_process.py", "--output", tmp_path / "drawn.png")
    run("examples/forward_process.py", "--image", tmp_path / "face.png", "--output", tmp_path / "given.png")
    for name in ("drawn.png", "given.png"):
        strip = np.asarray(Image.open(tmp_path / name).convert("L")).astype(float)
        middle = strip[strip.shape[0] // 2 - 20 : strip.shape[0] // 2 + 40]
        first, last = middle[:, 20:100], middle[:, -100:-20]
        # Neighbouring pixels of a face are alike; those of noise are not.
        assert abs(np.diff(last, axis=0)).mean() > 2 * abs(np.diff(first, axis=0)).mean()


def test_benchmark(run, tmp_path):
    run(
        *("benchmarks/speed.py", "--networks", "default", "--dtypes", "fp32", "--batch_sizes", "1", "--repeats", "1"),
        *("--output", tmp_path / "speed.md"),
    )
    assert re.search(r"\| default \| 1\.\d \| 32x32 \| 0\.\d\d \| fp32 \| 1 \|", (tmp_path / "speed.md").read_text())


@pytest.mark.slow
def test_comparison(run, model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = tmp_path / "page.md"
    run("benchmarks/compare.py", "--quick", "--model", model, "--output", page)
    text = page.read_text("utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["Start-up", "Training step", "Sampling", "Data", "Memory", "Growth"]
    assert len(re.findall(r"^\| (ddpm-faces|diffusers) \| [\w-]+ \| \d+x\d+ \|", text, re.MULTILINE)) == 10
    assert not re.search(r"\bnan\b|\binf\b", text)
