# Copyright 2026 The ddpm-faces authors. Apache License 2.0, http://www.apache.org/licenses/LICENSE-2.0
"""HTML and grids of images for the page. Only notes contain texts of a visitor."""

import base64
import html
import io
import math
from collections.abc import Sequence

from PIL import Image


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


def show_faces(images: Sequence[Image.Image], labels: Sequence[int | str], note: str) -> str:
    """Return a grid of images, each above its label: a seed, or a word."""
    figures = ""
    for image, label in zip(images, labels, strict=True):
        alt = f"Face {label}" if isinstance(label, str) else f"Face of seed {label}"
        figures += f"<figure>{picture(image, alt)}<figcaption>{label}</figcaption></figure>"
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
