"""Examples and benchmarks run as documented, with correct output."""

import contextlib
import io
import re
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from test_prompts import a_prompt_model

from ddpm_faces import DrawnFaces
from ddpm_faces.data.alignment import find_frames
from ddpm_faces.data.detection import MTCNN


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


def test_prompts(run, tmp_path):
    a_prompt_model().save_pretrained(tmp_path / "model")
    prompts = ["a young woman", "an older man"]
    rows, walk = tmp_path / "rows.png", tmp_path / "walk.png"
    run("examples/prompts.py", tmp_path / "model", *prompts, "--num_images", 3, "--output", rows)
    run("examples/prompts.py", tmp_path / "model", *prompts, "--walk", "--num_images", 3, "--output", walk)
    rows, walk = (np.asarray(Image.open(path)).astype(int) for path in (rows, walk))
    assert rows.shape == (2 * 98 - 2, 180 + 3 * 98 - 2, 3)
    assert rows[:, :180].min() < 50  # the prompts
    assert walk.shape == (96, 180 + 3 * 98 - 2, 3)
    faces = [walk[:, 180 + 98 * i : 180 + 98 * i + 96] for i in range(3)]
    assert abs(faces[0] - rows[:96, 180:276]).max() <= 1  # the noise of the first seed, with both prompts
    assert abs(faces[2] - rows[98:, 180:276]).max() <= 1
    assert abs(faces[1] - faces[0]).max() > 1
    with pytest.raises(SystemExit):
        run("examples/prompts.py", tmp_path / "model", "a woman", "--walk")


def test_restore(run, model, tmp_path):
    DrawnFaces(1, resolution=64)[0]["image"].save(tmp_path / "face.png")
    for name, options in (("generated", ()), ("given", ("--image", tmp_path / "face.png", "--noise_level", 0.1))):
        path = tmp_path / f"{name}.png"
        run("examples/restore.py", model, "--num_images", 2, "--output", path, *options)
        rows = np.asarray(Image.open(path)).astype(int)
        assert rows.shape == (5 * 130 - 2, 180 + 5 * 130 - 2, 3)  # damaged, two answers, mean, spread
        tiles = [rows[:128, 180 + 130 * i : 180 + 130 * i + 128] for i in range(5)]
        assert abs(tiles[1] - tiles[2]).max() > 20
        assert abs((tiles[1] + tiles[2]) / 2 - tiles[3]).max() <= 1
        is_known = (tiles[1] == tiles[2]).all(axis=-1)
        assert is_known.mean() > 0.5 or name == "given"
        assert (tiles[4][is_known] == 0).all()


def test_edit(run, tmp_path):
    a_prompt_model().save_pretrained(tmp_path / "model")
    DrawnFaces(1, resolution=64)[0]["image"].save(tmp_path / "face.png")
    arguments = (tmp_path / "model", "a woman", "an older man", "--source_prompt", "a woman")
    for name, options in (("generated", ("--num_images", 2)), ("given", ("--image", *[tmp_path / "face.png"] * 2))):
        path = tmp_path / f"{name}.png"
        run("examples/edit.py", *arguments, "--guidance_scale", 1, "--output", path, *options)
        rows = np.asarray(Image.open(path)).astype(int)
        assert rows.shape == (3 * 130 - 2, 180 + 2 * 130 - 2, 3)
        before, same, changed = (rows[130 * i : 130 * i + 128, 180:308] for i in range(3))
        assert abs(same - before).max() <= 1  # the prompt is that of the face
        assert abs(changed - before).max() > 1


def test_interpolate(run, model, tmp_path):
    for i, face in enumerate(DrawnFaces(3, resolution=64)):
        face["image"].save(tmp_path / f"{i}.png")
    given = [tmp_path / f"{i}.png" for i in range(3)]
    for name, options in (("generated", ("--num_rows", 2)), ("given", ("--image", *given))):
        path = tmp_path / f"{name}.png"
        run("examples/interpolate.py", model, "--num_images", 3, "--output", path, *options)
        rows = np.asarray(Image.open(path)).astype(int)
        assert rows.shape == (2 * 130 - 2, 3 * 130 - 2, 3)
        if name == "given":
            faces = [np.asarray(Image.open(path).resize((16, 16))).astype(int) for path in given]
            for row, pair in enumerate(pairwise(faces)):
                ends = [rows[130 * row : 130 * row + 128 : 8, left : left + 128 : 8] for left in (0, 260)]
                for end, face in zip(ends, pair, strict=True):
                    assert abs(end - face).max() <= 1


def test_write_captions(run, tmp_path):
    columns = {
        "image": [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(4)],
        "caption": ["a smiling older man", None, "a young woman with glasses", "a face"],
        "gender": ["male", "female", "female", None],
        "age": [72.0, 8.0, None, None],
        "smile": [True, False, False, None],
        "hair": ["bald", "blond", None, None],
        "glasses": ["none", "none", "glasses", None],
        "beard": [True, False, False, None],
    }
    (tmp_path / "faces").mkdir()
    for split in ("train", "test"):
        Dataset.from_dict(columns).to_parquet(tmp_path / "faces" / f"{split}.parquet")
    output = tmp_path / "written"
    run("examples/write_captions.py", tmp_path / "faces", output, "--num_captions", 40)
    written = load_dataset(str(output))
    assert set(written) == {"train", "test"}
    rows = written["train"]
    assert [row["image"].getpixel((0, 0)) for row in rows] == [image.getpixel((0, 0)) for image in columns["image"]]
    old, girl, woman, face = rows["captions"]
    assert old[0] == "a smiling older man"
    assert len(old) == len(set(old)) > 20
    words = [{*" ".join(texts[1:]).replace(",", "").split()} for texts in (old, girl, woman, face)]
    assert {"old", "elderly", "seventies", "bearded", "bald", "cheerful", "gentleman"} < words[0]
    assert not {"woman", "glasses", "young", "her"} & (words[0] - {"glasses"})
    assert all("without glasses" in text for text in old if "glasses" in text)
    assert {"girl", "child", "blonde", "fair", "serious"} < words[1]
    assert not {"boy", "woman", "beard", "old", "smiling"} & words[1]
    assert {"lady", "young", "spectacles"} < words[2]
    assert not {"without", "hair", "guy"} & words[2]
    assert words[3] == {"a", "person"}
    again = tmp_path / "again"
    run("examples/write_captions.py", tmp_path / "faces", again, "--num_captions", 40)
    assert load_dataset(str(again))["train"]["captions"][:] == rows["captions"][:]

    with pytest.raises(SystemExit):  # it would be overwritten
        run("examples/write_captions.py", tmp_path / "faces", output)
    Dataset.from_dict({"image": columns["image"]}).to_parquet(tmp_path / "faces" / "train.parquet")
    (tmp_path / "faces" / "test.parquet").unlink()
    with pytest.raises(SystemExit):
        run("examples/write_captions.py", tmp_path / "faces", tmp_path / "none")
    assert not (tmp_path / "none").exists()


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


@pytest.fixture
def faces(tmp_path) -> Path:
    """A dataset of drawn faces in the split "test"."""
    drawn = DrawnFaces(24, resolution=64)
    faces = Dataset.from_dict({"image": [drawn[i]["image"] for i in range(24)]}, Features({"image": ImageFeature()}))
    faces.to_parquet(tmp_path / "faces" / "data" / "test-00000.parquet")
    return tmp_path / "faces"


def test_alignment_benchmark(run, tmp_path):
    photos, detector = [DrawnFaces(3, resolution=64)[i]["image"].convert("RGB") for i in range(3)], MTCNN()
    aligned = [find_frames(photo, detector)[0].cut(photo, 64) for photo in photos]
    dataset = Dataset.from_dict({"image": aligned}, Features({"image": ImageFeature()}))
    dataset.to_parquet(tmp_path / "data" / "test-00000.parquet")
    text = run("benchmarks/alignment.py", tmp_path, "--size", 64, "--num-images", 3)
    # Drawn faces are not as easily found as photos.
    found = re.fullmatch(r"(\d) of 3 faces are found. Quantiles of the error in pixels: 50% (\S+), 90% .*\n", text)
    assert found, text
    assert int(found[1]) >= 2
    assert 0 < float(found[2]) < 3


def test_prediction_errors(run, pipeline, faces, tmp_path, monkeypatch):
    """If the prediction is the noisy face itself, errors of all patterns have the variance sigma^2."""

    def predict_original_sample(scheduler, output, timestep, sample):
        return sample / scheduler.alphas_cumprod[timestep].sqrt()

    pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("ddpm_faces.DDPMFacesScheduler.predict_original_sample", predict_original_sample)
    monkeypatch.setattr("ddpm_faces.restoration_ddpm_faces.SMOOTHNESS", (0.0, 0.0))
    text = run("benchmarks/prediction_errors.py", tmp_path / "model", "--data", faces, "--num-images", 3)
    rows = [re.findall(r"[\d.]+", line) for line in text.splitlines()[2:]]
    assert len(rows) == 5
    for sigma, *cells, correlation in rows:
        expected = pytest.approx([float(sigma) ** -2] * 3, rel=0.3)
        assert [float(cell) for cell in cells[4::2]] == expected  # measured, where there are many patterns
        assert [float(cell) for cell in cells[5::2]] == expected  # assumed
        assert float(correlation) < 0.1


@pytest.mark.slow
def test_restoration_benchmark(run, pipeline, faces, tmp_path, monkeypatch):
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    model = tmp_path / "model"
    pipeline.save_pretrained(model)
    small = ("--data", faces, "--num-images", 3, "--steps", 2, 4)
    run("benchmarks/restoration.py", model, *small, "--output", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text("utf-8")
    assert len(re.findall(r"^## ", text, re.MULTILINE)) == 6
    assert len(re.findall(r"^\| [^|]+ \| 0(?:.05)? \|(?: (?:[\d.]+, \d+)? \|){4}$", text, re.MULTILINE)) == 10
    for name, count in (("classical", 5), ("DPS", 10), ("RePaint", 4), (r"\*\*ddpm-faces\*\*", 10)):
        rows = re.findall(rf"^\| {name} \| \d* \|( [\d.]+ \| \d+\.\d \| 0\.\d+ \| \d+ \| ).*$", text, re.MULTILINE)
        assert len(rows) == count, text
    for picture in re.findall(r"\]\(\./(restore-.*?\.png)\)", text):
        assert Image.open(tmp_path / picture).width > 6 * 16
    run("benchmarks/restoration.py", model, *small, "--settings", "--output", tmp_path / "settings.md")
    assert "| 5 repetitions | 4 |" in (tmp_path / "settings.md").read_text("utf-8")


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
