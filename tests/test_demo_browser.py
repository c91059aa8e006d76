"""The demo in a browser, at desktop and phone size."""

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_unet
from PIL import Image
from test_prompts import a_prompt_model

import ddpm_faces
from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler


pytest.importorskip("gradio", reason="gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
HERE = "http://127.0.0.1:"
TIMEOUT = 120_000  # ms, for a busy machine
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@contextlib.contextmanager
def served(pipeline, folder):
    """The address of `ddpm-faces demo` with a model."""
    pipeline.save_pretrained(folder / "tiny")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(ddpm_faces.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
    environment["GRADIO_TEMP_DIR"] = str(folder / "gradio")
    command = [sys.executable, "-c", "from ddpm_faces.cli import main; main()"]
    command += ["demo", str(folder / "tiny"), "--port", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line == f"The demo is at http://127.0.0.1:{port}/ and stops with Ctrl-C.\n"
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    pipeline = DDPMFacesPipeline(tiny_unet(), DDPMFacesScheduler(num_train_timesteps=20))
    with served(pipeline, tmp_path_factory.mktemp("demo")) as address:
        yield address


@pytest.fixture(scope="module")
def prompt_address(tmp_path_factory):
    with served(a_prompt_model(), tmp_path_factory.mktemp("prompts")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # As root, which CI is, Chromium starts without its sandbox only.
        with driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def page(request, browser, address):
    with browser.new_page(viewport=request.param) as page:
        page.set_default_timeout(TIMEOUT)
        strangers, errors = [], []
        page.on(
            "request",
            lambda r: strangers.append(r.url) if not r.url.startswith((HERE, f"blob:{HERE}", "data:")) else None,
        )
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(address)
        yield page
        assert errors == []
        assert strangers == []  # the page works without the internet and contacts no other server
        # The page does not scroll sideways.
        assert page.evaluate("document.documentElement.scrollWidth") <= request.param["width"]


def finished(page, place: str) -> list[str]:
    """The images of a finished run."""
    page.wait_for_selector(f"{place} .note:has-text('Made in')")
    assert page.locator(f"{place} img").evaluate_all("images => images.every(i => i.complete && i.naturalWidth > 0)")
    return page.locator(f"{place} img").evaluate_all("images => images.map(i => i.src)")


def throw(page, place: str, dice: str, field: str, old: list[str]) -> list[str]:
    """Click the seed button, and return the images of the run that it starts."""
    seed = page.get_by_label(field).first.input_value()
    page.click(dice)
    page.wait_for_function(
        "([place, old]) => { const image = document.querySelector(place + ' img');"
        "return image && image.src != old && document.querySelector(place).innerText.includes('Made in'); }",
        arg=[place, old[0]],
    )
    assert page.get_by_label(field).first.input_value() != seed
    return finished(page, place)


def download(page, name: str) -> tuple[str, Image.Image]:
    with page.expect_download() as event:
        page.get_by_role("button", name=name).or_(page.get_by_role("link", name=name)).first.click()
    file = event.value
    return file.suggested_filename, Image.open(io.BytesIO(Path(file.path()).read_bytes()))


def test_faces(page):
    page.click("#generate")
    first = finished(page, "#faces")
    assert len(first) == len(set(first)) == 8
    name, image = download(page, "Download PNG")
    assert (name, image.text["seed"], image.text["model"]) == ("faces-42.png", "42 to 49", "tiny")

    second = throw(page, "#faces", "#dice", "Seed", first)
    assert len(second) == 8
    assert not set(first) & set(second)

    # Enter a given seed.
    page.get_by_label("Seed").first.fill("42")
    page.click("#generate")
    page.wait_for_selector("#faces figcaption:text-is('49')")
    assert finished(page, "#faces") == first


def test_walk(page):
    page.get_by_role("tab", name="Walk").click()
    page.click("#walk-run")
    first = finished(page, "#walk")
    animation, *strip = first
    assert len(strip) == len(set(strip)) == 12
    assert animation.startswith("data:image/webp")
    for suffix in ("webp", "gif"):
        name, image = download(page, f"Download {'WebP' if suffix == 'webp' else 'GIF'}")
        assert (name, image.n_frames) == (f"walk-42-47.{suffix}", 22)

    second = throw(page, "#walk", "#walk-dice", "From seed", first)
    assert not set(first) & set(second)

    # An error is explained, and the previous images stay.
    for field in ("From seed", "To seed"):
        page.get_by_label(field).fill("5")
    page.click("#walk-run")
    page.get_by_text("The two seeds must differ.").wait_for()


def test_prompts(page, prompt_address):
    """Examples and buttons fill the field for the prompt."""
    page.goto(prompt_address)
    assert page.get_by_role("button", name="beard", exact=True).count() == 0  # an unknown word
    prompt = page.locator("#face-prompt textarea")
    page.get_by_role("button", name="glasses", exact=True).first.click()
    page.wait_for_function("document.querySelector('#face-prompt textarea').value == 'with glasses'")
    prompt.fill("a young woman")
    page.get_by_role("button", name="glasses", exact=True).first.click()
    page.wait_for_function("document.querySelector('#face-prompt textarea').value == 'a young woman with glasses'")
    page.get_by_text("a smiling woman with brown hair and glasses").first.click()
    page.wait_for_function("document.querySelector('#face-prompt textarea').value.startsWith('a smiling woman with')")
    prompt.fill("a young <i>zebra</i>")
    page.click("#generate")
    finished(page, "#faces")
    page.get_by_text("The model does not know these words and ignores them: <, i, >, zebra").wait_for()
    _, image = download(page, "Download PNG")
    assert image.text["prompt"] == "a young <i>zebra</i>"


def test_restore(page, tmp_path):
    page.get_by_role("tab", name="Restore").click()
    # Gradio's editor has one canvas to paint and one to crop, and cannot take a picture before it has made both.
    page.locator("#restore-face canvas").nth(1).wait_for(state="attached")
    canvas = page.locator("#restore-face canvas").first
    Image.linear_gradient("L").resize((80, 60)).save(tmp_path / "no-face.png")
    page.locator("#restore-face input[type=file]").first.set_input_files(tmp_path / "no-face.png")
    page.get_by_text("This is the middle of the picture").wait_for()

    # Paint over the middle of the face.
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 30, y)
    page.mouse.down()
    page.mouse.move(x + 30, y, steps=5)
    page.mouse.up()
    page.click("#restore-run")
    first = finished(page, "#restored")
    assert len(set(first)) == 4
    name, image = download(page, "Download PNG")
    assert (name, image.text["restored"]) == ("face-42.png", "Repaint what you paint over")

    # The result is replaced by another one.
    page.get_by_label("Add colors").click()
    page.click("#restore-run")
    page.wait_for_function("old => document.querySelector('#restored img').src != old", arg=first[0])
    assert len(set(finished(page, "#restored"))) == 4
    assert not page.get_by_label("Blur").is_visible()
    page.get_by_label("Sharpen").click()
    page.get_by_label("Blur").first.wait_for()


def test_edit(page):
    page.get_by_role("tab", name="Edit").click()
    page.click("#edit-run")
    page.get_by_text("Choose a picture of a face first.").wait_for()
    page.click("#edit-generated")
    face = page.locator("#edit-face img")
    face.wait_for()
    first = face.get_attribute("src")
    page.click("#edit-generated")
    page.wait_for_function("old => document.querySelector('#edit-face img').src != old", arg=first)
    page.click("#edit-run")
    assert len(set(finished(page, "#edited"))) == 4


def test_edit_with_prompts(page, prompt_address):
    page.goto(prompt_address)
    page.get_by_role("tab", name="Edit").click()
    page.click("#edit-generated")
    page.locator("#edit-face img").wait_for()
    page.locator("#edit-source-prompt textarea").fill("a young man")
    page.locator("#edit-prompt textarea").fill("a young woman")
    page.click("#edit-run")
    assert len(set(finished(page, "#edited"))) == 2
    assert page.locator("#edited figcaption").all_inner_texts() == ["before", "after"]
    strength = page.locator("input[aria-label='number input for Strength']")
    assert strength.input_value() == "0.9"
    page.get_by_label("Draw new details").click()
    playwright.expect(strength).to_have_value("0.5")


def test_large_uploads_are_refused(page, address):
    file = {"name": "large.bin", "mimeType": "application/octet-stream", "buffer": b"0" * 10_600_000}
    answer = page.request.post(f"{address}gradio_api/upload", multipart={"files": file})
    assert answer.status == 413
    assert re.search("size", answer.text())


def test_pictures_with_too_many_pixels_are_refused(page, tmp_path):
    """A small file can hold a picture that needs all memory."""
    Image.new("1", (13_000, 13_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 10_000_000
    page.get_by_role("tab", name="Edit").click()
    page.locator("#edit-face input[type=file]").set_input_files(tmp_path / "bomb.png")
    page.get_by_text("exceeds limit").wait_for()
