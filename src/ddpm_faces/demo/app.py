# Copyright 2026 The ddpm-faces authors. Apache License 2.0, http://www.apache.org/licenses/LICENSE-2.0
"""A web page that generates faces and walks between them.

`ddpm-faces demo` runs this file on your machine. `ddpm-faces push-space` publishes it as the `app.py` of a Space. The
ddpm-faces package is not installed there: the code of the pipeline comes with the model.
"""

import base64
import contextlib
import html
import io
import json
import math
import queue
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo


# `push-space` writes the model and its commit here, so that later changes to the model's code do not run unreviewed.
MODEL, REVISION = "", ""
# The limits of a run, and of the queue.
MAX_IMAGES, MAX_FRAMES, MAX_STEPS, MAX_WAITING = 16, 16, 50, 20
MIN_FRAMES, DEFAULT_STEPS = 3, 15
MAX_SEED = 2**31 - 1
MAX_PROMPT, MAX_SCALE = 200, 5.0  # characters, and guidance scale
IN_TURN = -1  # each image has the next class
# Those whose words the model knows are offered.
EXAMPLES = (
    "a smiling woman with brown hair and glasses",
    "an old man with a beard and sunglasses",
    "a serious young man with black hair",
    "a cheerful girl with blond hair",
    "a smiling face with long brown hair and round glasses",
    "a face with short gray hair",
)
ATTRIBUTES = ("a smile", "glasses", "sunglasses", "a beard", "a hat", "blond hair", "black hair", "gray hair")
FRAME_MS, PAUSE_MS = 90, 700  # durations in a walk: of each image, and at both ends
Event = tuple[str, str | None]  # HTML to show, and the file to download once it exists
SOFTWARE = "ddpm-faces"
with contextlib.suppress(ImportError):  # a Space does not install the package
    from ddpm_faces import __version__

    SOFTWARE += f" {__version__}"


class Stopped(Exception):
    """The visitor has left."""


class FaceMaker:
    """Generates the contents of the page: each method yields HTML to show, and at the end a file to download.

    Args:
        pipeline ([`DDPMFacesPipeline`]): The model. Its networks are optimized for their device.
        model (`str`): Its name, for the page and for the metadata of the images.

    Raises:
        ValueError: The model generates images that a browser cannot show, or its code is of an earlier version.
    """

    def __init__(self, pipeline: DiffusionPipeline, model: str) -> None:
        config, scheduler = pipeline.unet.config, pipeline.scheduler
        if config.in_channels not in (1, 3):
            raise ValueError(f"`model` must make grey or RGB images, got {config.in_channels} channels.")
        if not hasattr(pipeline, "presets"):
            raise ValueError(
                f"`model` {model} has code of an earlier version, without fast sampling: publish it again."
            )
        self.pipeline, self.model = pipeline.with_scheduler(scheduler).optimize(), model
        self.pipeline.set_progress_bar_config(disable=True)
        height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        self.shape = (config.in_channels, height, width)
        self.num_classes = config.get("num_class_embeds") or 0
        self.is_prompted = pipeline.components.get("text_encoder") is not None
        self.guidance_scale = max(1.0, pipeline.config.get("guidance_scale", 1.0))
        self.max_scale = max(MAX_SCALE, self.guidance_scale)
        self.max_steps = min(MAX_STEPS, scheduler.config.num_train_timesteps)
        has_default = pipeline.config.default_preset not in (None, "exact")
        self.default_steps = min(pipeline.num_timesteps if has_default else DEFAULT_STEPS, self.max_steps)

    def known(self, prompts: Sequence[str]) -> list[str]:
        """Return those prompts of which the model knows all words."""
        return [prompt for prompt in prompts if self.is_prompted and not self.pipeline.prompt_notes(prompt)]

    def faces(
        self,
        seed: int,
        num_images: int,
        steps: int,
        label: int = IN_TURN,
        prompt: str = "",
        guidance_scale: float | None = None,
    ) -> Iterator[Event]:
        """Generate a grid; image i has the seed `seed` + i."""
        seed = whole_number("The seed", seed, 0, MAX_SEED)
        num_images = whole_number("The number of images", num_images, 1, MAX_IMAGES)
        labels, steps = self._labels(label, num_images), self._steps(steps)
        text, notes = self._text([prompt], guidance_scale)
        seeds = [seed + i for i in range(num_images)]
        latents = torch.cat([self._noise(seed) for seed in seeds])
        if text:
            text["prompt_embeds"] = text["prompt_embeds"].expand(num_images, -1)
        for step, images in self._denoise(latents, steps, labels, text):
            if step < steps:
                yield show_faces(images, seeds, progress(step, steps)), None
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies the file before it asks for more
            path = Path(folder, f"faces-{seed}.png")
            seeds_text = f"{seeds[0]} to {seeds[-1]}" if num_images > 1 else str(seed)
            values = {"seed": seeds_text, "steps": steps, "class_labels": labels}
            values |= {"prompt": prompt, "guidance_scale": text["guidance_scale"]} if text else {}
            grid(images).save(path, pnginfo=self._metadata(**values))
            yield show_faces(images, seeds, finished(steps, notes)), str(path)

    def walk(
        self,
        seed: int,
        other_seed: int,
        num_frames: int,
        steps: int,
        label: int = 0,
        prompt: str = "",
        other_prompt: str = "",
        guidance_scale: float | None = None,
    ) -> Iterator[tuple[str, str | None, str | None]]:
        """Generate the faces between those of two seeds and two prompts.

        The noise is interpolated spherically (section 4.2 of https://huggingface.co/papers/2006.11239), the embeddings
        of the prompts linearly.
        """
        seed = whole_number("The first seed", seed, 0, MAX_SEED)
        other_seed = whole_number("The second seed", other_seed, 0, MAX_SEED)
        num_frames = whole_number("The number of images", num_frames, MIN_FRAMES, MAX_FRAMES)
        labels, steps = self._labels(label, num_frames), self._steps(steps)
        text, notes = self._text([prompt, other_prompt], guidance_scale)
        if seed == other_seed and (not text or prompt == other_prompt):
            also = " or the two prompts" if self.is_prompted else ""
            raise gr.Error(f"The two seeds{also} must differ.", print_exception=False)
        fractions = [i / (num_frames - 1) for i in range(num_frames)]
        start, end = self._noise(seed), self._noise(other_seed)
        latents = start.repeat(num_frames, 1, 1, 1)
        if seed != other_seed:
            latents = torch.cat([slerp(start, end, fraction) for fraction in fractions])
        if text:
            first_text, last_text = text["prompt_embeds"]
            text["prompt_embeds"] = torch.stack([first_text.lerp(last_text, fraction) for fraction in fractions])
        for step, images in self._denoise(latents, steps, labels, text):
            if step < steps:
                yield show_walk(images, seed, other_seed, progress(step, steps)), None, None
        there_and_back = [*images, *images[-2:0:-1]]
        durations = [PAUSE_MS if i in (0, num_frames - 1) else FRAME_MS for i in range(len(there_and_back))]
        scale = max(1, 256 // images[0].width)
        first, *others = [enlarged(image, scale) for image in there_and_back]
        comment = f"{SOFTWARE}, model {self.model}, seeds {seed} to {other_seed}, {steps} steps"
        if text:
            comment += f", prompts {prompt!r} to {other_prompt!r}, guidance scale {text['guidance_scale']:g}"
        with tempfile.TemporaryDirectory() as folder:
            webp, gif = (Path(folder, f"walk-{seed}-{other_seed}.{suffix}") for suffix in ("webp", "gif"))
            exif = Image.Exif()
            exif[0x0131], exif[0x010E] = SOFTWARE, comment  # Software, ImageDescription
            animation: dict[str, Any] = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
            first.save(webp, quality=90, exif=exif, **animation)
            first.save(gif, comment=comment.encode(), **animation)
            shown = show_walk(images, seed, other_seed, finished(steps, notes), webp.read_bytes())
            yield shown, str(webp), str(gif)

    def _noise(self, seed: int) -> torch.Tensor:
        """Return the initial noise of the face of a seed, of shape `(1, channels, height, width)`."""
        return torch.randn((1, *self.shape), generator=torch.Generator().manual_seed(seed))

    def _labels(self, label: int, num_images: int) -> list[int] | None:
        if not self.num_classes:
            return None
        label = whole_number("The class", label, IN_TURN, self.num_classes - 1)
        return [i % self.num_classes if label == IN_TURN else label for i in range(num_images)]

    def _steps(self, steps: int) -> int:
        return whole_number("The number of steps", steps, 1, self.max_steps)

    def _text(self, prompts: list[str], guidance_scale: float | None) -> tuple[dict[str, Any], list[str]]:
        """Return arguments of the pipeline for prompts, or none without any, and what the visitor should know."""
        for prompt in prompts:
            if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
                raise gr.Error(f"A prompt must be a text of at most {MAX_PROMPT} characters.", print_exception=False)
        if not any(prompt.strip() for prompt in prompts):
            return {}, []
        if not self.is_prompted:
            raise gr.Error("This model does not take prompts.", print_exception=False)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale <= self.max_scale:
            message = f"The guidance scale must be a number from 1 to {self.max_scale:g}, got {scale!r}."
            raise gr.Error(message, print_exception=False)
        text = {"prompt_embeds": self.pipeline.encode_prompt(prompts), "guidance_scale": float(scale)}
        return text, self.pipeline.prompt_notes(prompts)

    def _metadata(self, **values: Any) -> PngInfo:
        info = PngInfo()
        scales = {name: self.pipeline.config.get(name, 1.0) for name in ("guidance_scale", "autoguidance_scale")}
        scales = {name: scale for name, scale in scales.items() if scale != 1}
        values = {"Software": SOFTWARE, "model": self.model, **scales, **values}
        for name, value in values.items():
            if value is not None:
                info.add_text(name, str(value))
        return info

    def _denoise(
        self, latents: torch.Tensor, steps: int, labels: list[int] | None, text: dict[str, Any]
    ) -> Iterator[tuple[int, list[Image.Image]]]:
        """Yield (number of steps taken, images) while the pipeline runs. The last are the faces.

        Steps that end while earlier images are still being sent are not shown. When the visitor leaves, Gradio closes
        this generator, and the pipeline stops at its next step.
        """
        previews: queue.SimpleQueue = queue.SimpleQueue()
        has_left = threading.Event()

        def on_step_end(pipeline, i: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict:
            if has_left.is_set():
                raise Stopped
            if i + 1 < pipeline.num_timesteps:
                previews.put((i + 1, tensors["latents"]))
            return {}

        with ThreadPoolExecutor(1) as executor:
            result = executor.submit(
                self.pipeline,
                batch_size=None if text else len(latents),
                num_inference_steps=steps,
                latents=latents,
                class_labels=labels,
                callback_on_step_end=on_step_end,
                **text,
            )
            result.add_done_callback(lambda _: previews.put(None))
            try:
                while (preview := newest(previews)) is not None:
                    yield preview[0], self.pipeline.postprocess(preview[1])
                yield steps, result.result().images
            finally:
                has_left.set()


def newest(items: queue.SimpleQueue) -> Any:
    """Wait for an item, and drop all but the last."""
    item = items.get()
    while not items.empty():
        item = items.get()
    return item


def whole_number(name: str, value: Any, smallest: int, largest: int) -> int:
    """Check a value from a visitor, who may bypass the widgets and their limits through the API."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not smallest <= value <= largest or value != int(value):
        message = f"{name} must be a whole number from {smallest} to {largest}, got {value!r}."
        raise gr.Error(message, print_exception=False)
    return int(value)


def slerp(start: torch.Tensor, end: torch.Tensor, fraction: float) -> torch.Tensor:
    """Interpolate spherically between two noise tensors. A mean would have a smaller norm and give greyish faces."""
    cosine = (start * end).sum() / (start.norm() * end.norm())
    angle = cosine.clamp(-1, 1).acos()
    return (((1 - fraction) * angle).sin() * start + (fraction * angle).sin() * end) / angle.sin()


def enlarged(image: Image.Image, scale: int) -> Image.Image:
    return image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """Arrange images in rows of at most four, enlarged as `ddpm-faces generate` does, with white lines between."""
    columns, gap, scale = columns_of(len(images)), 2, max(1, 128 // images[0].width)
    width, height = images[0].width * scale + gap, images[0].height * scale + gap
    rows = math.ceil(len(images) / columns)
    canvas = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for i, image in enumerate(images):
        canvas.paste(enlarged(image, scale), (i % columns * width, i // columns * height))
    return canvas


def columns_of(num_images: int) -> int:
    """Return the number of columns: at most four, with few gaps in the last row."""
    return {1: 1, 2: 2, 4: 2, 3: 3, 5: 3, 6: 3, 9: 3}.get(num_images, 4)


# HTML. Only notes contain texts of a visitor.


def show_faces(images: Sequence[Image.Image], seeds: Sequence[int], note: str) -> str:
    """Return a grid of images, each above its seed."""
    figures = "".join(
        f"<figure>{picture(image, f'Face of seed {seed}')}<figcaption>{seed}</figcaption></figure>"
        for image, seed in zip(images, seeds, strict=True)
    )
    return f'<div class="faces" style="--columns: {columns_of(len(images))}">{figures}</div>{note}'


def show_walk(
    images: Sequence[Image.Image], seed: int, other_seed: int, note: str, animation: bytes | None = None
) -> str:
    """Return the animation (or the middle image until it is finished), above the strip of images."""
    alt = f"Walk from the face of seed {seed} to that of seed {other_seed}"
    large = picture(images[len(images) // 2], alt) if animation is None else img("webp", animation, alt)
    small = "".join(picture(image, f"Image {i} of the walk") for i, image in enumerate(images, start=1))
    columns = f"--columns: {len(images)}; --half: {math.ceil(len(images) / 2)}"
    return f'<div class="walk">{large}</div><div class="strip" style="{columns}">{small}</div>{note}'


def placeholder(num_images: int, columns: int) -> str:
    """Return placeholders for images."""
    figures = "<figure></figure>" * num_images
    return f'<div class="faces empty" style="--columns: {columns}">{figures}</div><div class="note"></div>'


def progress(step: int, steps: int) -> str:
    bar = f'<div class="bar"><div style="width: {100 * step / steps:.0f}%"></div></div>'
    return f'<div class="note">{bar}Step {step} of {steps}</div>'


def finished(steps: int, notes: Sequence[str]) -> str:
    return f'<div class="note">{html.escape(". ".join([f"Made in {steps} steps", *notes]))}</div>'


def picture(image: Image.Image, alt: str) -> str:
    data = io.BytesIO()
    image.save(data, "WEBP", quality=92)
    return img("webp", data.getvalue(), alt)


def img(suffix: str, data: bytes, alt: str) -> str:
    return f'<img alt="{alt}" src="data:image/{suffix};base64,{base64.b64encode(data).decode()}">'


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


def build(maker: FaceMaker) -> gr.Blocks:
    """Lay out the page."""
    model = maker.model
    link = f"[{model}](https://huggingface.co/{model})" if "/" in model else f"`{model}`"
    with gr.Blocks(title="Generated faces", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(f"# Generated faces\n{link} generates faces from noise. None of these people exist.")
        with gr.Tab("Faces"):
            faces_tab(maker)
        with gr.Tab("Walk"):
            walk_tab(maker)
    # One run at a time, over both tabs.
    return demo.queue(default_concurrency_limit=1, max_size=MAX_WAITING)


def faces_tab(maker: FaceMaker) -> None:
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(placeholder(8, columns=4), elem_id="faces")
            file = gr.DownloadButton("Download PNG", size="sm", interactive=False)
        with gr.Column(scale=2, min_width=300):
            prompt = prompt_box(maker, "Prompt", "face-prompt")
            if examples := maker.known(EXAMPLES):
                gr.Examples(examples, prompt, label="Examples", api_visibility="private")
            seed = seed_number(42, "Seed", "Seed of the first face; the next faces use the next seeds.")
            num_images = gr.Slider(1, MAX_IMAGES, 8, step=1, label="Number of faces", buttons=[])
            steps = steps_slider(maker)
            label, scale = class_dropdown(maker, IN_TURN), guidance_slider(maker)
            with gr.Row():
                dice = gr.Button("🎲 New seed", min_width=120, elem_id="dice")
                run = gr.Button("Generate", variant="primary", min_width=120, elem_id="generate")

    def generate(*values) -> Iterator[tuple]:
        for content, path in maker.faces(*values):
            yield content, gr.DownloadButton(value=path, interactive=path is not None)

    starts = [run.click, seed.submit, *submits(prompt)]
    inputs = [seed, num_images, steps, label, prompt, scale]
    listen(generate, "faces", starts, dice, [seed], inputs, [shown, file])


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

    def walk(*values) -> Iterator[tuple]:
        for content, *paths in maker.walk(*values):
            yield content, *(gr.DownloadButton(value=path, interactive=path is not None) for path in paths)

    starts = [run.click, *(seed.submit for seed in seeds), *submits(*prompts)]
    inputs = [*seeds, num_frames, steps, label, *prompts, scale]
    listen(walk, "walk", starts, dice, seeds, inputs, [shown, webp, gif])


def listen(function, name: str, starts: list, dice: gr.Button, seeds: list, inputs: list, outputs: list) -> None:
    """Run a function when its button is clicked, or with new seeds when the seed button is clicked."""
    settings: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
    gr.on(starts, function, inputs, outputs, api_name=name, **settings)
    numbers = ", ".join([f"Math.floor(Math.random() * {MAX_SEED})"] * len(seeds))
    thrown = dice.click(None, None, seeds, js=f"() => [{numbers}]", api_visibility="private")
    thrown.then(function, inputs, outputs, api_visibility="private", **settings)


def seed_number(value: int, label: str, info: str | None = None) -> gr.Number:
    return gr.Number(value, label=label, info=info, precision=0, minimum=0, maximum=MAX_SEED, min_width=120)


def steps_slider(maker: FaceMaker) -> gr.Slider:
    return gr.Slider(1, maker.max_steps, maker.default_steps, step=1, label="Denoising steps", buttons=[])


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
            chip.click(None, box, box, js=add, api_visibility="private")
    return box


def submits(*boxes: gr.Textbox | gr.State) -> list:
    return [box.submit for box in boxes if isinstance(box, gr.Textbox)]


def guidance_slider(maker: FaceMaker) -> gr.Slider | gr.State:
    if not maker.is_prompted:
        return gr.State(None)
    info = "Larger values follow the prompt more closely, with less variety."
    return gr.Slider(1, maker.max_scale, maker.guidance_scale, step=0.1, label="Guidance scale", info=info, buttons=[])


def launch(maker: FaceMaker, **settings: Any) -> gr.Blocks:
    """Serve the page; `settings` are those of `gradio.Blocks.launch`."""
    demo = build(maker)
    # The page accepts no files, so that nobody can fill the disk with uploads.
    settings = {"theme": THEME, "css": CSS, "ssr_mode": False, "max_file_size": 1, **settings}
    demo.launch(footer_links=["api", "gradio", "settings"], **settings)
    return demo


if __name__ == "__main__":
    pipeline = DiffusionPipeline.from_pretrained(MODEL, revision=REVISION, trust_remote_code=True)
    launch(FaceMaker(pipeline.to("cuda" if torch.cuda.is_available() else "cpu"), MODEL))
