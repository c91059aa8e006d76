"""The demo: its page, the limits for visitors, and its publication as a Space."""

import base64
import copy
import errno
import io
import re
import socket
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import tiny_unet
from hub_server import OWNER_TOKEN, READER_TOKEN
from lowest_versions import lowest_versions
from PIL import Image
from test_prompts import a_prompt_model

import ddpm_faces
from ddpm_faces import (
    DDPMFacesEditPipeline,
    DDPMFacesPipeline,
    DDPMFacesRestorePipeline,
    DDPMFacesScheduler,
    Downsample,
    GaussianBlur,
    Gray,
    Inpaint,
)
from ddpm_faces.cli import demo as cli


gr = pytest.importorskip("gradio", reason="gradio is not installed")
app = pytest.importorskip("ddpm_faces.demo.app")
changing = pytest.importorskip("ddpm_faces.demo.changer")
making = pytest.importorskip("ddpm_faces.demo.maker")
grid = pytest.importorskip("ddpm_faces.demo.show").grid
ROOT = Path(__file__).parents[1]
COMMAND = """
import sys
from ddpm_faces.cli import main
sys.argv = ["ddpm-faces", *arguments]
main()
"""


@pytest.fixture
def maker(pipeline):
    return making.FaceMaker(pipeline, "user/tiny")


@pytest.fixture
def maker_of_classes():
    pipeline = DDPMFacesPipeline(tiny_unet(num_class_embeds=3), DDPMFacesScheduler(num_train_timesteps=20))
    return making.FaceMaker(pipeline, "user/classes")


def changer_of(maker, pipeline=None, find_face=None):
    pipeline = pipeline or maker.pipeline
    restorer = DDPMFacesRestorePipeline.from_pipe(copy.deepcopy(pipeline))  # its networks are converted to bfloat16
    return changing.FaceChanger(maker, restorer, DDPMFacesEditPipeline.from_pipe(pipeline), find_face)


def pictures(html: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", html)]


def last(events):
    """The last event, with its files as they are before the next would be asked for."""
    for html, *paths in events:
        if paths[-1] is not None:
            return html, *(io.BytesIO(Path(path).read_bytes()) for path in paths)
    raise AssertionError("no file")


# Faces


def test_grid_shows_the_denoising_and_ends_with_the_faces_of_the_seeds(maker, pipeline):
    events = maker.faces(seed=7, num_images=3, steps=4)
    html, path = next(event for event in events if event[1])
    generators = [torch.Generator().manual_seed(7 + i) for i in range(3)]
    # The same images as with the package, so that a seed always gives the same face.
    faces = pipeline(3, 4, generators).images
    assert Image.open(path).convert("RGB").tobytes() == grid(faces).tobytes()
    assert [image.size for image in pictures(html)] == [(16, 16)] * 3
    assert re.findall(r"<figcaption>(\d+)</figcaption>", html) == ["7", "8", "9"]
    assert next(events, None) is None
    assert not Path(path).exists()


def test_previews_come_before_the_faces(maker, monkeypatch):
    # With a visitor who receives every event at once, every step is shown.
    monkeypatch.setattr(making, "newest", lambda items: items.get())
    shown = [html for html, _ in maker.faces(seed=0, num_images=1, steps=3)]
    assert [re.search(r"Step \d of \d|Made in \d", html)[0] for html in shown] == [
        "Step 1 of 3",
        "Step 2 of 3",
        "Made in 3",
    ]
    assert len({pictures(html)[0].tobytes() for html in shown}) == 3


def test_png_metadata_records_how_the_images_were_made(maker, maker_of_classes):
    text = Image.open(last(maker.faces(41, 2, 3))[1]).text
    assert text == {
        "Software": f"ddpm-faces {ddpm_faces.__version__}",
        "model": "user/tiny",
        "seed": "41 to 42",
        "steps": "3",
    }
    assert Image.open(last(maker_of_classes.faces(41, 4, 3))[1]).text["class_labels"] == "[0, 1, 2, 0]"
    assert Image.open(last(maker_of_classes.faces(41, 2, 3, label=2))[1]).text["class_labels"] == "[2, 2]"


def test_steps_are_those_of_the_default_preset(pipeline):
    pipeline.set_presets({"fast": {"num_inference_steps": 4}}, "fast")
    assert making.FaceMaker(pipeline, "user/tiny").default_steps == 4
    pipeline.set_presets(None)
    assert making.FaceMaker(pipeline, "user/tiny").default_steps == 15


def test_code_without_presets_is_refused(pipeline):
    class Old:
        unet, scheduler = pipeline.unet, pipeline.scheduler

    with pytest.raises(ValueError, match="`model` user/old has code of an earlier version"):
        making.FaceMaker(Old(), "user/old")


# Walk


def test_walk_goes_from_one_face_to_the_other(maker):
    html, webp, gif = last(maker.walk(3, 9, num_frames=5, steps=4))
    ends = [pictures(last(maker.faces(seed, 1, 4))[0])[0] for seed in (3, 9)]
    animation, *strip = pictures(html)
    assert [image.tobytes() for image in (strip[0], strip[-1])] == [image.tobytes() for image in ends]
    assert len({image.tobytes() for image in strip}) == 5
    for image in map(Image.open, (webp, gif)):
        assert (image.n_frames, image.size, image.info["loop"]) == (8, (256, 256), 0)  # forwards and backwards
    assert animation.n_frames == 8
    comment = f"ddpm-faces {ddpm_faces.__version__}, model user/tiny, seeds 3 to 9, 4 steps"
    assert Image.open(gif).info["comment"].decode() == comment
    assert Image.open(webp).getexif()[0x010E] == comment


def test_slerp_keeps_the_norm_of_the_noise():
    start, end = torch.randn(2, 3, 16, 16).unbind()
    torch.testing.assert_close(making.slerp(start, end, 0.0), start)
    torch.testing.assert_close(making.slerp(start, end, 1.0), end)
    middle = making.slerp(start, end, 0.5)
    torch.testing.assert_close(middle.norm(), (start.norm() + end.norm()) / 2, rtol=0.01, atol=0)
    torch.testing.assert_close(
        (middle * start).sum() / start.norm(), (middle * end).sum() / end.norm(), rtol=0.2, atol=0
    )


# Prompts


@pytest.fixture
def maker_of_prompts():
    pipeline = a_prompt_model()
    pipeline.set_guidance(guidance_scale=2.0)
    return making.FaceMaker(pipeline, "user/prompts")


def test_faces_of_a_prompt_are_those_of_the_pipeline(maker_of_prompts):
    html, path = last(maker_of_prompts.faces(7, 3, 4, prompt="a young woman", guidance_scale=3))
    generators = [torch.Generator().manual_seed(7 + i) for i in range(3)]
    pipeline = a_prompt_model().optimize()
    faces = pipeline(["a young woman"] * 3, 4, generators, guidance_scale=3).images
    image = Image.open(path)
    assert image.convert("RGB").tobytes() == grid(faces).tobytes()
    assert (image.text["prompt"], image.text["guidance_scale"]) == ("a young woman", "3.0")
    assert "know" not in html

    # Without a prompt, nothing guides.
    image = Image.open(last(maker_of_prompts.faces(7, 3, 4))[1])
    faces = pipeline(3, 4, [torch.Generator().manual_seed(7 + i) for i in range(3)]).images
    assert image.convert("RGB").tobytes() == grid(faces).tobytes()
    assert "prompt" not in image.text


def test_unknown_words_are_named_and_escaped(maker_of_prompts):
    html, _ = last(maker_of_prompts.faces(7, 1, 2, prompt="a <b>zebra</b> woman"))
    assert "zebra" in html
    assert "ignores them: &lt;, b, &gt;, zebra" in html
    assert "<b>" not in html


def test_a_walk_between_prompts_keeps_the_noise(maker_of_prompts):
    prompts = {"prompt": "a young woman", "other_prompt": "an older man"}
    html, webp, gif = last(maker_of_prompts.walk(3, 3, num_frames=5, steps=4, **prompts))
    _, *strip = pictures(html)
    ends = [pictures(last(maker_of_prompts.faces(3, 1, 4, prompt=text))[0])[0] for text in prompts.values()]
    assert [image.tobytes() for image in (strip[0], strip[-1])] == [image.tobytes() for image in ends]
    assert len({image.tobytes() for image in strip}) == 5
    comment = "seeds 3 to 3, 4 steps, prompts 'a young woman' to 'an older man', guidance scale 2"
    assert Image.open(gif).info["comment"].decode().endswith(comment)
    # from any face to one of the prompt
    html, *_ = last(maker_of_prompts.walk(3, 3, 3, 4, other_prompt="an older man"))
    assert len({image.tobytes() for image in pictures(html)[1:]}) == 3
    with pytest.raises(gr.Error, match="The two seeds or the two prompts must differ."):
        next(maker_of_prompts.walk(3, 3, 5, 4, prompt="a woman", other_prompt="a woman"))


def test_prompts_outside_the_limits_are_refused(maker, maker_of_prompts):
    for values, message in (
        ({"prompt": "a" * 201}, "A prompt must be a text of at most 200 characters."),
        ({"prompt": 3}, "A prompt must be a text"),
        ({"prompt": "a woman", "guidance_scale": 0.9}, "The guidance scale must be a number from 1 to 5, got 0.9."),
        ({"prompt": "a woman", "guidance_scale": "2"}, "The guidance scale must be a number from 1 to 5, got '2'."),
    ):
        with pytest.raises(gr.Error, match=re.escape(message)):
            next(maker_of_prompts.faces(0, 1, 3, **values))
    with pytest.raises(gr.Error, match="This model does not take prompts."):
        next(maker.faces(0, 1, 3, prompt="a woman"))


def test_only_words_that_the_model_knows_are_offered(maker, maker_of_prompts):
    assert maker_of_prompts.known(["a smiling woman", "a zebra"]) == ["a smiling woman"]
    assert maker.known(["a smiling woman"]) == []
    ours = {"Prompt", "From prompt", "To prompt", "What it should show", "Guidance scale"}
    for model, expected in ((maker_of_prompts, ours), (maker, set())):
        blocks = app.build(changer_of(model)).blocks.values()
        assert ours & {getattr(block, "label", None) for block in blocks} == expected


# Given faces


@pytest.fixture
def changer(pipeline):
    pipeline.set_guide(DDPMFacesPipeline(tiny_unet(), pipeline.scheduler), 1.5)
    return changer_of(making.FaceMaker(pipeline, "user/tiny"))


def a_face(size=(16, 16)):
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0)).byte()
    return Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.NEAREST)


def painted(box=(4, 4, 12, 8), size=(16, 16), face=None):
    """The value of the editor: a face that is painted over in a box."""
    layer = Image.new("RGBA", size)
    layer.paste((239, 68, 68, 255), box)
    return {"background": face or a_face(size), "layers": [layer], "composite": None}


def tiles(path, count) -> list[Image.Image]:
    """The images of a grid, in their own size."""
    image, columns = Image.open(path).convert("RGB"), {2: 2, 3: 3, 4: 2}[count]
    side = (image.width + 2) // columns
    boxes = [(i % columns * side, i // columns * side) for i in range(count)]
    return [image.crop((x, y, x + side - 2, y + side - 2)).resize((16, 16), Image.Resampling.BOX) for x, y in boxes]


def test_repainting_changes_only_what_is_painted_over(changer):
    html, path = last(changer.restore(painted(), changing.REPAINT, 1.0, 0.0, 5, 2, 8))
    _, *answers = pictures(html)
    assert re.findall(r"<figcaption>(\w+)</figcaption>", html) == ["before", "5", "6"]
    mask = torch.zeros(16, 16)
    mask[4:8, 4:12] = 1
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = changer.restorer([a_face()] * 2, Inpaint(mask), 0.0, 8, generator=generators)
    assert len({image.tobytes() for image in expected.images}) == len(answers) == 2
    image = Image.open(path)
    assert image.convert("RGB").tobytes() == grid([expected_before(), *expected.images]).tobytes()
    assert (image.text["restored"], image.text["seed"], image.text["steps"]) == (changing.REPAINT, "5, 6", "8")
    assert "autoguidance_scale" not in image.text  # it is off in restorations


def expected_before():
    face = a_face()
    face.paste((128, 128, 128), (4, 4, 12, 8))
    return face


def test_a_large_painting_is_reduced_to_the_model(changer):
    small, large = (
        last(changer.restore(picture, changing.REPAINT, 1.0, 0.0, 5, 1, 5))[1].getvalue()
        for picture in (
            painted(face=Image.new("RGB", (16, 16), "teal")),
            painted((128, 128, 384, 256), (512, 512), Image.new("RGB", (512, 512), "teal")),
        )
    )
    assert Image.open(io.BytesIO(small)).tobytes() == Image.open(io.BytesIO(large)).tobytes()


@pytest.mark.parametrize("damage", [changing.ENLARGE, changing.COLORIZE, changing.SHARPEN])
def test_restorations_explain_the_face(changer, damage):
    shape = (3, 16, 16)
    operator = {
        changing.ENLARGE: Downsample(4, shape),
        changing.COLORIZE: Gray(shape),
        changing.SHARPEN: GaussianBlur(0.6, shape),
    }[damage]
    smooth = a_face((4, 4)).resize((16, 16), Image.Resampling.BICUBIC)
    picture = {"background": smooth, "layers": [], "composite": None}
    _, path = last(changer.restore(picture, damage, 0.6, 0.0, 0, 1, 20))
    _, restored = tiles(path, 2)
    face, restored = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in (smooth, restored))
    face, restored = (x.view(1, 16, 16, 3).permute(0, 3, 1, 2) / 127.5 - 1 for x in (face, restored))
    observed = face if damage == changing.SHARPEN else operator(face)
    assert (operator(restored) - observed).abs().mean() < 0.05
    assert (restored - face).abs().mean() > 0.01


def test_changes_without_a_prompt(changer):
    html, path = last(changer.change(a_face(), changing.VARY, 0.4, 7, 3, 6))
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    expected = changer.editor(
        [a_face()] * 3, strength=0.4, method="noise", num_inference_steps=6, generator=generators
    )
    assert Image.open(path).convert("RGB").tobytes() == grid([a_face(), *expected.images]).tobytes()


def test_changes_towards_a_prompt(maker_of_prompts):
    changer = changer_of(maker_of_prompts, a_prompt_model())
    prompts = {"prompt": "a woman", "source_prompt": "an older man", "guidance_scale": 2.0}
    html, path = last(changer.change(a_face(), changing.KEEP, 0.4, 7, 3, 20, **prompts))
    assert re.findall(r"<figcaption>(\w+)</figcaption>", html) == ["before", "after"]
    values = {"strength": 0.4, "num_inference_steps": 20, "guidance_scale": 2.0}
    expected = changer.editor(a_face(), "a woman", "an older man", **values).images
    assert Image.open(path).convert("RGB").tobytes() == grid([a_face(), *expected]).tobytes()
    assert Image.open(path).text["prompt"] == "a woman"
    with pytest.raises(gr.Error, match="Say what the face should show"):
        next(changer.change(a_face(), changing.KEEP, 0.4, 7, 3, 6))


def test_the_face_in_a_photo_is_shown(maker):
    found = Image.new("RGB", (30, 30), "teal")
    photo = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
    seen = []
    face, note = changer_of(maker, find_face=lambda photo: seen.append(photo) or found).open(photo)
    assert (face.size, face.getpixel((9, 9)), note) == ((512, 512), (0, 128, 128), "")
    assert (seen[0].mode, seen[0].getpixel((3, 3))) == ("RGB", (255, 255, 255))
    face, note = changer_of(maker, find_face=lambda _: None).open(photo)
    assert face.size == (512, 512)
    assert note.startswith("No face was found")
    _, note = changer_of(maker).open(photo)
    assert "The face should fill it" in note


def test_a_generated_face_can_be_changed(changer):
    face = changer.generated(3)
    (expected,) = changer.maker.pipeline(1, changer.maker.default_steps, torch.Generator().manual_seed(3)).images
    assert face.tobytes() == expected.resize((512, 512), Image.Resampling.LANCZOS).tobytes()


def test_faces_of_a_class(maker_of_classes):
    changer = changer_of(maker_of_classes)
    assert changer.generated(4).size == (512, 512)
    one, two = (
        last(changer.restore(painted(), changing.REPAINT, 1.0, 0.0, 5, 1, 8, label=label))[1] for label in (0, 2)
    )
    assert Image.open(one).tobytes() != Image.open(two).tobytes()
    one, two = (last(changer.change(a_face(), changing.VARY, 0.4, 7, 1, 6, label=label))[1] for label in (0, 2))
    assert Image.open(one).tobytes() != Image.open(two).tobytes()


def test_pictures_outside_the_limits_are_refused(changer):
    whole = {"background": a_face(), "layers": []}
    for values, message in (
        ((None, changing.REPAINT, 1.0, 0.0, 0, 1, 5), "Choose a picture of a face first."),
        (({"background": None, "layers": []}, changing.REPAINT, 1.0, 0.0, 0, 1, 5), "Choose a picture"),
        ((whole, changing.REPAINT, 1.0, 0.0, 0, 1, 5), "Paint over a part of the face first."),
        ((painted((0, 0, 16, 16)), changing.REPAINT, 1.0, 0.0, 0, 1, 5), "Paint over only a part"),
        ((whole, "Beautify", 1.0, 0.0, 0, 1, 5), "The damage must be one of"),
        ((whole, changing.SHARPEN, 9, 0.0, 0, 1, 5), "The blur must be a number from 0.3 to 4, got 9."),
        ((whole, changing.SHARPEN, 1.0, None, 0, 1, 5), "The noise must be a number from 0 to 0.5, got None."),
        ((whole, changing.SHARPEN, 1.0, 0.0, -1, 1, 5), "The seed"),
        ((whole, changing.SHARPEN, 1.0, 0.0, 0, 9, 5), "The number of images must be a whole number from 1 to 8"),
        ((whole, changing.SHARPEN, 1.0, 0.0, 0, 1, 0), "The number of steps"),
        ((whole, changing.SHARPEN, 1.0, 0.0, 0, 1, 5, "a woman"), "This model does not take prompts."),
    ):
        with pytest.raises(gr.Error, match=re.escape(message)):
            next(changer.restore(*values))
    for values, message in (
        ((None, changing.VARY, 0.5, 0, 1, 5), "Choose a picture of a face first."),
        ((a_face(), "Improve", 0.5, 0, 1, 5), "The method must be one of"),
        ((a_face(), changing.VARY, 0, 0, 1, 5), "The strength must be a number from 0.05 to 1, got 0."),
    ):
        with pytest.raises(gr.Error, match=re.escape(message)):
            next(changer.change(*values))


# Limits for visitors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1, 1, 3), "The seed must be a whole number from 0 to 2147483647, got -1."),
        ((2**31, 1, 3), "The seed"),
        ((1.5, 1, 3), "The seed"),
        (("1", 1, 3), "The seed"),
        ((None, 1, 3), "The seed"),
        ((float("nan"), 1, 3), "The seed"),
        ((0, 17, 3), "The number of images must be a whole number from 1 to 16, got 17."),
        ((0, 0, 3), "The number of images"),
        ((0, float("inf"), 3), "The number of images"),
        ((0, True, 3), "The number of images"),
        ((0, 1, 21), "The number of steps must be a whole number from 1 to 20, got 21."),
        ((0, 1, 0), "The number of steps"),
    ],
)
def test_values_outside_the_limits_of_the_widgets_are_refused(maker, values, message):
    with pytest.raises(gr.Error, match=re.escape(message)):
        next(maker.faces(*values))


def test_walks_outside_the_limits_of_the_widgets_are_refused(maker, maker_of_classes):
    for values, message in (
        ((1, 1, 5, 3), "The two seeds must differ."),
        ((1, 2, 17, 3), "The number of images must be a whole number from 3 to 16, got 17."),
        ((1, -2, 5, 3), "The second seed"),
    ):
        with pytest.raises(gr.Error, match=re.escape(message)):
            next(maker.walk(*values))
    with pytest.raises(gr.Error, match="The class must be a whole number from -1 to 2, got 3."):
        next(maker_of_classes.faces(0, 1, 3, label=3))


def test_pipeline_stops_when_the_visitor_leaves(maker, monkeypatch):
    steps, may_go_on = [], threading.Event()
    predict = maker.pipeline.unet.forward

    def forward(*args, **kwargs):
        steps.append(len(steps))
        if len(steps) > 1:
            may_go_on.wait(60)
        return predict(*args, **kwargs)

    monkeypatch.setattr(maker.pipeline.unet, "forward", forward)
    events = maker.faces(0, 1, 20)
    next(events)
    threading.Timer(0, may_go_on.set).start()
    events.close()  # as Gradio does; returns once the pipeline has stopped
    assert len(steps) < 20  # how many fit in before it is told depends on the machine


def test_an_error_of_the_pipeline_reaches_the_visitor(maker, monkeypatch):
    def forward(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(maker.pipeline.unet, "forward", forward)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(maker.faces(0, 1, 3))


def test_one_run_at_a_time_and_a_bounded_queue(maker):
    page = app.build(changer_of(maker))
    runs = [fn for fn in page.fns.values() if fn.fn is not None and fn.outputs and fn.name != "<lambda>"]
    assert len(runs) == 12
    assert {(fn.concurrency_id, fn.concurrency_limit) for fn in runs} == {("model", 1)}
    assert page._queue.max_size == app.MAX_WAITING
    assert page._queue.default_concurrency_limit == 1


def test_models_that_a_browser_cannot_show_are_refused():
    pipeline = DDPMFacesPipeline(tiny_unet(in_channels=4, out_channels=4), DDPMFacesScheduler(num_train_timesteps=20))
    with pytest.raises(ValueError, match="grey or RGB images, got 4 channels"):
        making.FaceMaker(pipeline, "user/four")


# The command, and the Space


@pytest.fixture
def command(client):
    """Returns a function that runs a command and returns its exit code and its output."""

    def command(*arguments, token=OWNER_TOKEN, before=""):
        outcome = client.run(before + COMMAND, token, arguments=arguments)
        assert outcome.kind == "SystemExit", outcome.output
        return int(outcome.error), outcome.output

    return command


@pytest.fixture
def published(server, pipeline, tmp_path):
    """`owner/tiny`, as `push` publishes it: with the code files."""
    pipeline.save_pretrained(tmp_path / "tiny")
    files = (path for path in (tmp_path / "tiny").rglob("*") if path.is_file())
    server.put("models", "owner/tiny", {str(path.relative_to(tmp_path / "tiny")): path.read_bytes() for path in files})
    return "owner/tiny"


def test_push_space(server, command, published, bare_client, tmp_path):
    code, output = command("push-space", published, "owner/faces-demo", "--private")
    assert code == 0, output
    repo = server.repos["spaces", "owner/faces-demo"]
    assert f"{server.endpoint}/spaces/owner/faces-demo/commit/{repo.branches['main']}" in output
    assert repo.private
    files = {name: content.decode() for name, content in repo.files.items()}
    code = {name for name in files if name.endswith(".py")}
    assert code == {"app.py", "changer.py", "maker.py", "show.py"}
    assert set(files) == {".gitattributes", "README.md", "requirements.txt", *code}
    metadata = yaml.safe_load(files["README.md"].split("---")[1])
    assert metadata["models"] == [published]
    assert metadata["python_version"] == "3.11"  # as text: 3.10 as a number would be 3.1
    assert (metadata["sdk"], metadata["app_file"], metadata["title"]) == ("gradio", "app.py", "faces-demo")
    assert f"gradio=={metadata['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()
    lowest = lowest_versions() | {"torch": "2.6"}
    for requirement in files["requirements.txt"].split():
        name, version = requirement.split(">=")
        assert lowest[name] == version

    # The published app runs as in a Space: without this package, with the model from the Hub.
    script = """
        import runpy, sys
        from PIL import Image
        sys.path.insert(0, folder)
        page = runpy.run_path(f"{folder}/app.py")
        changer = page["from_hub"](page["MODEL"], page["REVISION"])
        page["build"](changer)
        face = {"background": Image.new("RGB", (40, 40), "teal"), "layers": []}
        events = [
            changer.maker.faces(0, 2, 3),
            changer.restore(face, "Add colors", 1.0, 0.0, 0, 1, 5),
            changer.change(face["background"], "Draw new details", 0.5, 0, 1, 5),
        ]
        paths = [next(path for _, path in those if path) for those in events]
        result = [page["MODEL"], *(Image.open(path).text["Software"] for path in paths)]
        result.append(Image.open(paths[0]).tobytes().hex())
    """
    (tmp_path / "space").mkdir()
    for name in code:
        (tmp_path / "space" / name).write_text(files[name])
    # Later changes to the model do not run in the Space.
    pinned = server.repos["models", published].branches["main"]
    assert f'MODEL, REVISION = "{published}", "{pinned}"' in files["app.py"]
    names = ("pipeline_ddpm_faces.py", "restoration_ddpm_faces.py", "editing_ddpm_faces.py")
    server.put("models", published, dict.fromkeys(names, b"raise SystemExit('somebody else')"))
    outcome = bare_client.run(textwrap.dedent(script), OWNER_TOKEN, folder=str(tmp_path / "space"))
    assert outcome.error is None, outcome.output
    maker = making.FaceMaker(DDPMFacesPipeline.from_pretrained(tmp_path / "tiny"), published)
    ours = Image.open(last(maker.faces(0, 2, 3))[1]).tobytes().hex()
    assert outcome.value == [published, *["ddpm-faces"] * 3, ours]

    # Publishing again updates the same repository and keeps files that a person added.
    server.put("spaces", "owner/faces-demo", {"notes.txt": b"mine"})
    code, output = command("push-space", published, "owner/faces-demo", "--title", "My faces")
    assert code == 0, output
    assert repo.files["notes.txt"] == b"mine"
    assert "title: My faces\n" in repo.files["README.md"].decode()


def test_space_of_a_model_of_prompts_installs_transformers(server, command, published):
    files = {**server.repos["models", published].files, "text_encoder/config.json": b"{}"}
    server.put("models", "owner/prompts", files)
    code, output = command("push-space", "owner/prompts", "owner/prompts-demo")
    assert code == 0, output
    requirements = server.repos["spaces", "owner/prompts-demo"].files["requirements.txt"].decode().split()
    assert f"transformers>={lowest_versions()['transformers']}" in requirements
    assert command("push-space", published, "owner/plain-demo")[0] == 0
    assert b"transformers" not in server.repos["spaces", "owner/plain-demo"].files["requirements.txt"]


def test_space_of_a_private_model_needs_a_token(server, command, published):
    server.put("models", "owner/hidden", server.repos["models", published].files, private=True)
    code, output = command("push-space", "owner/hidden", "owner/hidden-demo")
    assert code == 0, output
    assert "owner/hidden is private: add a token with read access as the secret HF_TOKEN" in output


@pytest.mark.parametrize(
    ("model", "token", "message"),
    [
        ("models/faces64/unet", OWNER_TOKEN, "`model` must be USER/NAME of a model on the Hub"),
        ("owner/none", OWNER_TOKEN, "`model` owner/none does not exist on the Hub"),
        ("owner/other", OWNER_TOKEN, "`model` owner/other was not published by this version of `ddpm-faces push`"),
        ("owner/tiny", READER_TOKEN, "the token of owner is read-only"),
        ("owner/tiny", None, "you are not logged in"),
    ],
)
def test_no_space_is_created_without_a_model(server, command, published, model, token, message):
    server.put("models", "owner/other", {"model_index.json": b"{}"})
    code, output = command("push-space", model, "owner/never", token=token)
    assert code in (1, 2)
    assert message in output
    assert len(output.splitlines()) == 1
    assert ("spaces", "owner/never") not in server.repos


def test_port_in_use_is_refused(command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, output = command("demo", "user/model", "--port", str(port))
    assert code == 2
    assert output == (
        f"error: `port` {port} cannot be used on 127.0.0.1 (Address already in use): stop the program that uses it, "
        f"or choose another one, such as --port {port + 1}.\n"
    )


@pytest.mark.parametrize("host", ["8.8.8.8", "a..b", "no such host", ""])
def test_host_of_another_machine_is_refused(host):
    with pytest.raises(
        ValueError, match=f"`host` must be an address of this machine, such as 127.0.0.1, got '{host}'"
    ):
        cli.check_port(host, free_port())


@pytest.mark.parametrize(("system", "expected"), [("posix", 1), ("nt", 0)])
def test_port_is_not_shared_with_another_program(monkeypatch, system, expected):
    """On Windows, SO_REUSEADDR would let two programs listen on one port."""
    calls = []

    class Socket(socket.socket):
        def setsockopt(self, *arguments):
            calls.append(arguments)

    monkeypatch.setattr(cli.socket, "socket", Socket)
    monkeypatch.setattr(cli, "os", SimpleNamespace(name=system))
    cli.check_port("127.0.0.1", 0)
    assert len(calls) == expected


def test_privileged_port_is_refused(monkeypatch):
    def bind(self, address):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cli.socket, "socket", type("Socket", (socket.socket,), {"bind": bind}))
    with pytest.raises(ValueError, match="`port` 80 needs administrator rights: choose a port above 1023"):
        cli.check_port("127.0.0.1", 80)


def test_missing_gradio_is_reported(command):
    missing = "import sys\nsys.modules['gradio'] = None\n"
    code, output = command("demo", "user/model", "--port", str(free_port()), before=missing)
    assert (code, output) == (1, 'error: The demo needs gradio: run `pip install "ddpm-faces[demo]"`.\n')


def test_model_must_be_given_where_none_ships(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "SHIPPED_MODEL", tmp_path / "faces64")
    with pytest.raises(ValueError, match="`model` must be given: the folder of a model, or USER/NAME on the Hub"):
        cli.demo()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
