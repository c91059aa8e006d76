# Copyright 2026 The ddpm-faces authors. Apache License 2.0, http://www.apache.org/licenses/LICENSE-2.0
"""A web page that generates faces, walks between them, restores them and changes them.

`ddpm-faces demo` runs this file on your machine. `ddpm-faces push-space` publishes it as the `app.py` of a Space, with
the files beside it. The ddpm-faces package is not installed there: the code of the pipelines comes with the model.
"""

import json
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .changer import (
    CANVAS,
    KEEP,
    MAX_ANSWERS,
    MAX_BLUR,
    MAX_NOISE,
    METHODS,
    MIN_BLUR,
    REPAINT,
    SHARPEN,
    STRENGTHS,
    FaceChanger,
)
from .maker import IN_TURN, MAX_FRAMES, MAX_IMAGES, MAX_PROMPT, MAX_SEED, MIN_FRAMES, FaceMaker
from .show import placeholder


# `push-space` writes the model and its commit here, so that later changes to the model's code do not run unreviewed.
MODEL, REVISION = "", ""
MAX_WAITING = 20  # visitors in the queue
MAX_UPLOAD = "10mb"
MAX_PIXELS = 2**26  # of an upload; PIL warns above it, and refuses pictures with twice as many
# Those whose words the model knows are offered.
EXAMPLES = (
    "a smiling woman with brown hair and glasses",
    "an old man with a beard and sunglasses",
    "a serious young man with black hair",
    "a cheerful girl with blond hair",
    "a smiling face with long brown hair and round glasses",
    "a face with short gray hair",
)
ADVICE = (
    "The result is a guess of what a face may look like, not the truth: do not use it to recognize people. Your "
    "picture is deleted within two hours."
)
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # of events that are not in the API
ATTRIBUTES = ("a smile", "glasses", "sunglasses", "a beard", "a hat", "blond hair", "black hair", "gray hair")
CSS = """
.gradio-container { max-width: 1120px !important; width: 100%; margin: 0 auto !important; }
.faces { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 10px; }
.faces figure { margin: 0; }
.faces img, .walk img, .strip img { display: block; width: 100%; border-radius: 8px; }
.faces figcaption { text-align: center; font-size: 12px; color: var(--body-text-color-subdued); padding-top: 2px; }
#faces, #faces > div, #walk, #walk > div { padding: 0; }
.empty figure { aspect-ratio: 1; border-radius: 8px; background: var(--block-border-color); opacity: 0.5; }
.walk, #walk .empty { max-width: 320px; margin: 0 auto 12px; }
.strip img { border-radius: 4px; }
.strip { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 4px; }
.chips { gap: 6px !important; }
.chips button { flex: 0 0 auto; min-width: 0 !important; padding: 2px 10px; font-weight: normal; border-radius: 99px; }
.note { display: flex; align-items: center; gap: 12px; min-height: 32px; font-size: 13px; }
.bar { flex: 1; height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.bar div { height: 100%; background: var(--color-accent); }
@media (max-width: 640px) { .strip { grid-template-columns: repeat(var(--half), 1fr); } }
"""
THEME = gr.themes.Default(
    primary_hue="teal",
    neutral_hue="stone",
    radius_size="lg",
    font=["system-ui", "sans-serif"],  # installed fonts, so that the page works without the internet
    font_mono=["ui-monospace", "monospace"],
).set(button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800")


def build(changer: FaceChanger) -> gr.Blocks:
    """Lay out the page."""
    maker, model = changer.maker, changer.maker.model
    link = f"[{model}](https://huggingface.co/{model})" if "/" in model else f"`{model}`"
    with gr.Blocks(title="Generated faces", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(f"# Generated faces\n{link} generates faces from noise. None of these people exist.")
        with gr.Tab("Faces"):
            faces_tab(maker)
        with gr.Tab("Walk"):
            walk_tab(maker)
        with gr.Tab("Restore"):
            restore_tab(changer)
        with gr.Tab("Edit"):
            edit_tab(changer)
    # One run at a time, over all tabs.
    return demo.queue(default_concurrency_limit=1, max_size=MAX_WAITING)


def faces_tab(maker: FaceMaker) -> None:
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(placeholder(8, columns=4), elem_id="faces")
            file = gr.DownloadButton("Download PNG", size="sm", interactive=False)
        with gr.Column(scale=2, min_width=300):
            prompt = prompt_box(maker, "Prompt", "face-prompt")
            if examples := maker.known(EXAMPLES):
                gr.Examples(examples, prompt, label="Examples", **PRIVATE)
            seed = seed_number(42, "Seed", "Seed of the first face; the next faces use the next seeds.")
            num_images = gr.Slider(1, MAX_IMAGES, 8, step=1, label="Number of faces", buttons=[])
            steps = steps_slider(maker)
            label, scale = class_dropdown(maker, IN_TURN), guidance_slider(maker)
            with gr.Row():
                dice = gr.Button("🎲 New seed", min_width=120, elem_id="dice")
                run = gr.Button("Generate", variant="primary", min_width=120, elem_id="generate")

    starts = [run.click, seed.submit, *submits(prompt)]
    inputs = [seed, num_images, steps, label, prompt, scale]
    listen(maker.faces, "faces", starts, dice, [seed], inputs, [shown, file])


def walk_tab(maker: FaceMaker) -> None:
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(placeholder(1, columns=1), elem_id="walk")
            with gr.Row():
                webp = gr.DownloadButton("Download WebP", size="sm", min_width=120, interactive=False)
                gif = gr.DownloadButton("Download GIF", size="sm", min_width=120, interactive=False)
        with gr.Column(scale=2, min_width=300):
            prompts = [
                prompt_box(maker, "From prompt", "walk-prompt"),
                prompt_box(maker, "To prompt", "walk-other-prompt"),
            ]
            with gr.Row():
                seeds = [seed_number(42, "From seed"), seed_number(47, "To seed")]
            num_frames = gr.Slider(MIN_FRAMES, MAX_FRAMES, 12, step=1, label="Number of images", buttons=[])
            steps = steps_slider(maker)
            label, scale = class_dropdown(maker, 0), guidance_slider(maker)
            with gr.Row():
                dice = gr.Button("🎲 New seeds", min_width=120, elem_id="walk-dice")
                run = gr.Button("Walk", variant="primary", min_width=120, elem_id="walk-run")

    starts = [run.click, *(seed.submit for seed in seeds), *submits(*prompts)]
    inputs = [*seeds, num_frames, steps, label, *prompts, scale]
    listen(maker.walk, "walk", starts, dice, seeds, inputs, [shown, webp, gif])


def restore_tab(changer: FaceChanger) -> None:
    maker = changer.maker
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            picture = gr.ImageEditor(
                label="Face",
                type="pil",
                sources=["upload", "clipboard"],
                brush=gr.Brush(28, ["#ef4444"], "#ef4444", "fixed"),
                transforms=(),
                layers=False,
                buttons=[],
                canvas_size=(CANVAS, CANVAS),
                elem_id="restore-face",
            )
            shown = gr.HTML(elem_id="restored", padding=False)
            file = gr.DownloadButton("Download PNG", size="sm", interactive=False)
        with gr.Column(scale=2, min_width=300):
            generated = gr.Button("🎲 Take a generated face", size="sm", elem_id="restore-generated")
            damage = gr.Radio(changer.damages, value=REPAINT, label="What to do")
            blur = gr.Slider(
                *(MIN_BLUR, MAX_BLUR, 1.5),
                step=0.1,
                label="Blur",
                info=f"Standard deviation, in pixels of the model ({maker.shape[2]}x{maker.shape[1]}).",
                buttons=[],
                visible=False,
            )
            noise = gr.Slider(
                *(0, MAX_NOISE, 0),
                step=0.01,
                label="Noise",
                info="Standard deviation of the noise of the photo, of pixels in [-1, 1].",
                buttons=[],
            )
            prompt, label = prompt_box(maker, "Prompt", "restore-prompt"), class_dropdown(maker, 0)
            num_images = gr.Slider(1, MAX_ANSWERS, 3, step=1, label="Number of answers", buttons=[])
            steps = steps_slider(maker, changer.default_steps, "Evaluations of the network")
            seed = seed_number(42, "Seed")
            with gr.Row():
                dice = gr.Button("🎲 New seed", min_width=120, elem_id="restore-dice")
                run = gr.Button("Restore", variant="primary", min_width=120, elem_id="restore-run")
    gr.Markdown(ADVICE)

    damage.change(lambda name: gr.Slider(visible=name == SHARPEN), damage, blur, show_progress="hidden", **PRIVATE)
    take_faces(changer, picture, generated, shown, run)
    inputs = [picture, damage, blur, noise, seed, num_images, steps, prompt, label]
    listen(changer.restore, "restore", [run.click, *submits(prompt)], dice, [seed], inputs, [shown, file])


def edit_tab(changer: FaceChanger) -> None:
    maker = changer.maker
    methods = list(METHODS) if maker.is_prompted else [name for name in METHODS if name != KEEP]
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            picture = gr.Image(
                label="Face", type="pil", sources=["upload", "clipboard"], height=360, buttons=[], elem_id="edit-face"
            )
            shown = gr.HTML(elem_id="edited", padding=False)
            file = gr.DownloadButton("Download PNG", size="sm", interactive=False)
        with gr.Column(scale=2, min_width=300):
            generated = gr.Button("🎲 Take a generated face", size="sm", elem_id="edit-generated")
            info = "Keep the face: only what differs between the two prompts changes."
            method = gr.Radio(methods, value=methods[0], label="Method", info=info, visible=len(methods) > 1)
            source_prompt = prompt_box(maker, "What the face shows", "edit-source-prompt")
            prompt = prompt_box(maker, "What it should show", "edit-prompt")
            info = "Small values change details, large ones the whole face."
            strength = gr.Slider(*(0.05, 1, STRENGTHS[methods[0]]), step=0.05, label="Strength", info=info, buttons=[])
            label, scale = class_dropdown(maker, 0), guidance_slider(maker)
            num_images = gr.Slider(
                *(1, MAX_ANSWERS, 3), step=1, label="Number of answers", buttons=[], visible=methods[0] != KEEP
            )
            steps, seed = steps_slider(maker, changer.default_steps), seed_number(42, "Seed")
            with gr.Row():
                dice = gr.Button("🎲 New seed", min_width=120, elem_id="edit-dice")
                run = gr.Button("Change", variant="primary", min_width=120, elem_id="edit-run")
    gr.Markdown(ADVICE)

    method.change(
        lambda name: (gr.Slider(value=STRENGTHS[name]), gr.Slider(visible=name != KEEP)),
        method,
        [strength, num_images],
        show_progress="hidden",
        **PRIVATE,
    )
    take_faces(changer, picture, generated, shown, run)
    inputs = [picture, method, strength, seed, num_images, steps, prompt, source_prompt, scale, label]
    listen(changer.change, "edit", [run.click, *submits(prompt)], dice, [seed], inputs, [shown, file])


def take_faces(
    changer: FaceChanger, picture: gr.ImageEditor | gr.Image, generated: gr.Button, shown: gr.HTML, run: gr.Button
) -> None:
    """Show the face of a photo that is uploaded, or a generated face."""
    is_painted = isinstance(picture, gr.ImageEditor)

    def value(face: Image.Image) -> dict[str, Any] | Image.Image:
        return {"background": face, "layers": [], "composite": None} if is_painted else face

    def find(given: dict[str, Any] | Image.Image | None) -> tuple[Any, str]:
        photo = given["background"] if isinstance(given, dict) else given
        if photo is None:
            return given, ""
        face, note = changer.open(photo)
        return value(face), f'<div class="note">{note}</div>'

    def generate() -> tuple[Any, str]:
        return value(changer.generated(random.randrange(MAX_SEED))), ""

    settings: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, **PRIVATE}
    # A click before the face is found would take the whole photo.
    picture.upload(lambda: gr.Button(interactive=False), None, run, show_progress="hidden", queue=False, **PRIVATE)
    found = picture.upload(find, picture, [picture, shown], show_progress="minimal", **settings)
    found.then(lambda: gr.Button(interactive=True), None, run, show_progress="hidden", **PRIVATE)
    generated.click(generate, None, [picture, shown], show_progress="minimal", **settings)


def listen(function, name: str, starts: list, dice: gr.Button, seeds: list, inputs: list, outputs: list) -> None:
    """Run a function when its button is clicked, or with new seeds when the seed button is clicked.

    The function yields HTML and files, which become the values of the download buttons among the outputs.
    """

    def run(*values) -> Iterator[tuple]:
        for content, *paths in function(*values):
            yield content, *(gr.DownloadButton(value=path, interactive=path is not None) for path in paths)

    settings: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
    gr.on(starts, run, inputs, outputs, api_name=name, **settings)
    numbers = ", ".join([f"Math.floor(Math.random() * {MAX_SEED})"] * len(seeds))
    thrown = dice.click(None, None, seeds, js=f"() => [{numbers}]", **PRIVATE)
    thrown.then(run, inputs, outputs, **PRIVATE, **settings)


def seed_number(value: int, label: str, info: str | None = None) -> gr.Number:
    return gr.Number(value, label=label, info=info, precision=0, minimum=0, maximum=MAX_SEED, min_width=120)


def steps_slider(maker: FaceMaker, default: int | None = None, label: str = "Denoising steps") -> gr.Slider:
    return gr.Slider(1, maker.max_steps, default or maker.default_steps, step=1, label=label, buttons=[])


def class_dropdown(maker: FaceMaker, value: int) -> gr.Dropdown | gr.State:
    if not maker.num_classes:
        return gr.State(IN_TURN)
    choices = [("All in turn", IN_TURN), *((f"Class {i}", i) for i in range(maker.num_classes))]
    return gr.Dropdown(choices, value=value, label="Class")


def prompt_box(maker: FaceMaker, label: str, name: str) -> gr.Textbox | gr.State:
    """Return a field for a prompt, with examples and with buttons that add attributes to it."""
    if not maker.is_prompted:
        return gr.State("")
    box = gr.Textbox(
        label=label,
        placeholder="Faces of any kind",
        max_length=MAX_PROMPT,
        max_lines=2,
        elem_id=name,
        submit_btn=False,
    )
    attributes = maker.known(ATTRIBUTES)
    with gr.Row(elem_classes="chips"):
        for attribute in attributes:
            chip = gr.Button(attribute.removeprefix("a "), size="sm", variant="secondary")
            # "a man" + "glasses" = "a man with glasses", and then "... and a hat"
            add = f"""text => {{
                text = text.trim() || {json.dumps(maker.known(["a face", "a person", ""])[0])};
                return (text + (/\\bwith\\b/.test(text) ? " and " : " with ") + {json.dumps(attribute)}).trim();
            }}"""
            chip.click(None, box, box, js=add, **PRIVATE)
    return box


def submits(*boxes: gr.Textbox | gr.State) -> list:
    return [box.submit for box in boxes if isinstance(box, gr.Textbox)]


def guidance_slider(maker: FaceMaker) -> gr.Slider | gr.State:
    if not maker.is_prompted:
        return gr.State(None)
    info = "Larger values follow the prompt more closely, with less variety."
    return gr.Slider(1, maker.max_scale, maker.guidance_scale, step=0.1, label="Guidance scale", info=info, buttons=[])


def launch(changer: FaceChanger, **settings: Any) -> gr.Blocks:
    """Serve the page; `settings` are those of `gradio.Blocks.launch`."""
    demo = build(changer)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # the package has no such limit, but files of strangers need one
    settings = {"theme": THEME, "css": CSS, "ssr_mode": False, "max_file_size": MAX_UPLOAD, **settings}
    demo.launch(footer_links=["api", "gradio", "settings"], **settings)
    return demo


def from_hub(model: str, revision: str) -> FaceChanger:
    """Load a published model with its own code."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = partial(DiffusionPipeline.from_pretrained, model, revision=revision, trust_remote_code=True)
    maker = FaceMaker(load().to(device), model)
    codes = "restoration_ddpm_faces", "editing_ddpm_faces"
    return FaceChanger(maker, *(load(custom_pipeline=code).to(device) for code in codes))


if __name__ == "__main__":
    launch(from_hub(MODEL, REVISION))
