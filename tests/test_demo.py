"""The demo: its page, the limits for visitors, and its publication as a Space."""

import base64
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
from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler
from ddpm_faces.cli import demo as cli


gr = pytest.importorskip("gradio", reason="gradio is not installed")
app = pytest.importorskip("ddpm_faces.demo.app")
ROOT = Path(__file__).parents[1]
COMMAND = """
import sys
from ddpm_faces.cli import main
sys.argv = ["ddpm-faces", *arguments]
main()
"""


@pytest.fixture
def maker(pipeline):
    return app.FaceMaker(pipeline, "user/tiny")


@pytest.fixture
def maker_of_classes():
    pipeline = DDPMFacesPipeline(tiny_unet(num_class_embeds=3), DDPMFacesScheduler(num_train_timesteps=20))
    return app.FaceMaker(pipeline, "user/classes")


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
    assert Image.open(path).convert("RGB").tobytes() == app.grid(faces).tobytes()
    assert [image.size for image in pictures(html)] == [(16, 16)] * 3
    assert re.findall(r"<figcaption>(\d+)</figcaption>", html) == ["7", "8", "9"]
    assert next(events, None) is None
    assert not Path(path).exists()


def test_previews_come_before_the_faces(maker, monkeypatch):
    # With a visitor who receives every event at once, every step is shown.
    monkeypatch.setattr(app, "newest", lambda items: items.get())
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
    assert app.FaceMaker(pipeline, "user/tiny").default_steps == 4
    pipeline.set_presets(None)
    assert app.FaceMaker(pipeline, "user/tiny").default_steps == 15


def test_code_without_presets_is_refused(pipeline):
    class Old:
        unet, scheduler = pipeline.unet, pipeline.scheduler

    with pytest.raises(ValueError, match="`model` user/old has code of an earlier version"):
        app.FaceMaker(Old(), "user/old")


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
    torch.testing.assert_close(app.slerp(start, end, 0.0), start)
    torch.testing.assert_close(app.slerp(start, end, 1.0), end)
    middle = app.slerp(start, end, 0.5)
    torch.testing.assert_close(middle.norm(), (start.norm() + end.norm()) / 2, rtol=0.01, atol=0)
    torch.testing.assert_close(
        (middle * start).sum() / start.norm(), (middle * end).sum() / end.norm(), rtol=0.2, atol=0
    )


# Prompts


@pytest.fixture
def maker_of_prompts():
    pipeline = a_prompt_model()
    pipeline.set_guidance(guidance_scale=2.0)
    return app.FaceMaker(pipeline, "user/prompts")


def test_faces_of_a_prompt_are_those_of_the_pipeline(maker_of_prompts):
    html, path = last(maker_of_prompts.faces(7, 3, 4, prompt="a young woman", guidance_scale=3))
    generators = [torch.Generator().manual_seed(7 + i) for i in range(3)]
    pipeline = a_prompt_model().optimize()
    faces = pipeline(["a young woman"] * 3, 4, generators, guidance_scale=3).images
    image = Image.open(path)
    assert image.convert("RGB").tobytes() == app.grid(faces).tobytes()
    assert (image.text["prompt"], image.text["guidance_scale"]) == ("a young woman", "3.0")
    assert "know" not in html

    # Without a prompt, nothing guides.
    image = Image.open(last(maker_of_prompts.faces(7, 3, 4))[1])
    faces = pipeline(3, 4, [torch.Generator().manual_seed(7 + i) for i in range(3)]).images
    assert image.convert("RGB").tobytes() == app.grid(faces).tobytes()
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
    ours = {"Prompt", "From prompt", "To prompt", "Guidance scale"}
    for model, expected in ((maker_of_prompts, ours), (maker, set())):
        blocks = app.build(model).blocks.values()
        assert ours & {getattr(block, "label", None) for block in blocks} == expected


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
    assert len(steps) <= 3


def test_an_error_of_the_pipeline_reaches_the_visitor(maker, monkeypatch):
    def forward(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(maker.pipeline.unet, "forward", forward)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(maker.faces(0, 1, 3))


def test_one_run_at_a_time_and_a_bounded_queue(maker):
    page = app.build(maker)
    runs = [fn for fn in page.fns.values() if fn.fn is not None and fn.outputs and fn.js is None]
    assert len(runs) == 4
    assert {(fn.concurrency_id, fn.concurrency_limit) for fn in runs} == {("model", 1)}
    assert page._queue.max_size == app.MAX_WAITING
    assert page._queue.default_concurrency_limit == 1


def test_models_that_a_browser_cannot_show_are_refused():
    pipeline = DDPMFacesPipeline(tiny_unet(in_channels=4, out_channels=4), DDPMFacesScheduler(num_train_timesteps=20))
    with pytest.raises(ValueError, match="grey or RGB images, got 4 channels"):
        app.FaceMaker(pipeline, "user/four")


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
    assert set(files) == {".gitattributes", "README.md", "app.py", "requirements.txt"}
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
    code = """
        import os, runpy
        page = runpy.run_path(app)
        pipeline = DiffusionPipeline.from_pretrained(page["MODEL"], revision=page["REVISION"], trust_remote_code=True)
        maker = page["FaceMaker"](pipeline, page["MODEL"])
        page["build"](maker)
        events = maker.faces(0, 2, 3)
        html, path = next(event for event in events if event[1])
        from PIL import Image
        result = [page["MODEL"], Image.open(path).text["Software"], Image.open(path).tobytes().hex()]
    """
    (tmp_path / "app.py").write_text(files["app.py"])
    # Later changes to the model do not run in the Space.
    pinned = server.repos["models", published].branches["main"]
    assert f'MODEL, REVISION = "{published}", "{pinned}"' in files["app.py"]
    server.put("models", published, {"pipeline_ddpm_faces.py": b"raise SystemExit('somebody else')"})
    outcome = bare_client.run(textwrap.dedent(code), OWNER_TOKEN, app=str(tmp_path / "app.py"))
    assert outcome.error is None, outcome.output
    maker = app.FaceMaker(DDPMFacesPipeline.from_pretrained(tmp_path / "tiny"), published)
    ours = Image.open(last(maker.faces(0, 2, 3))[1]).tobytes().hex()
    assert outcome.value == [published, "ddpm-faces", ours]

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
        ("owner/other", OWNER_TOKEN, "`model` owner/other was not published by `ddpm-faces push`"),
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
