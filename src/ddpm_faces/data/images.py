"""Operations on one image: open, turn upright, resize, crop, and scale for the network."""

import io
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from ..operators_ddpm_faces import turned_upright


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CROPS = ("center", "random")
MAX_IMAGE_PIXELS = 2**29  # the default: 2 GiB in PIL's memory

# PIL's limits are meant for untrusted uploads. They refuse photos of some phones, and PNGs with a long comment or a
# large color profile. The limits are global and must not change while threads decode, so they are set here, once.
# `open_image` checks the number of pixels instead; texts and profiles keep a limit.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = 2**26
PngImagePlugin.MAX_TEXT_MEMORY = 2**28

# Images above this size (PIL's own limit) are decoded one at a time, and JPEGs among them at reduced size.
LARGE = 2 * (2**30 // 4 // 3)
_ONE_AT_A_TIME = threading.Lock()


def open_image(value: Any, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Open an image from a folder or from a dataset column, without decoding its pixels.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str`, `os.PathLike` or `dict`):
            An image, the content of its file, its path (also within an archive, as `datasets` writes it:
            `zip://face.png::faces.zip`), or `{"bytes": ..., "path": ...}`, where either may be missing.
        max_image_pixels (`int`, defaults to 2**29): Upper limit of width times height.

    Returns:
        `PIL.Image.Image`

    Raises:
        ValueError: The image is missing or has too many pixels. PIL raises other errors on files that are not images.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ValueError("the image is missing")
    if isinstance(value, str) and "://" in value:
        from datasets.utils.file_utils import xopen  # importing it takes time

        with xopen(value, "rb") as file:
            value = file.read()
    if not isinstance(value, Image.Image):
        value = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    if value.width * value.height > max_image_pixels:
        raise ValueError(f"{value.width}x{value.height} pixels exceed `max_image_pixels` ({max_image_pixels:,})")
    return value


def to_samples(images: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
    """Turn images into x_0.

    Args:
        images (`torch.Tensor` of shape `(batch, channels, height, width)`, `torch.uint8`): Images, 0 to 255.
        flips (`torch.Tensor` of shape `(batch,)`, `torch.bool`, *optional*): Whether to mirror each image.

    Returns:
        `torch.Tensor` of the same shape, `torch.float32`, in [-1, 1].
    """
    samples = images.float() / 127.5 - 1.0
    return samples if flips is None else torch.where(flips[:, None, None, None], samples.flip(-1), samples)


def picture_to_tensor(image: Image.Image, size: tuple[int, int], mode: str = "RGB") -> torch.Tensor:
    """Decode one image as [`load_faces`] does.

    Args:
        image (`PIL.Image.Image`):
            An image of any size. Only the first frame of an animation is used. Transparent areas become white unless
            `mode` is "RGBA". 16 bits are scaled to 8.
        size (`(int, int)`): Height and width in pixels.
        mode (`str`, defaults to `"RGB"`): `"L"`, `"RGB"` or `"RGBA"`.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`, `torch.uint8`: The upright image, center-cropped to the
        aspect ratio of `size` and resized with an antialiasing filter.

    Raises:
        ValueError: The range of the pixels is unknown, because they are floating-point numbers or have over 16 bits.
    """
    height, width = size
    with _memory_for(image):
        image = upright(image, mode, size)
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
        return _pixels(image)


def resize_to_cover(image: Image.Image, size: tuple[int, int], mode: str = "RGB") -> torch.Tensor:
    """Decode one image as [`picture_to_tensor`] does, but without cropping.

    Args:
        image (`PIL.Image.Image`): An image.
        size (`(int, int)`): Height and width in pixels.
        mode (`str`, defaults to `"RGB"`): `"L"`, `"RGB"` or `"RGBA"`.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`, `torch.uint8`: The smallest version that covers `size`,
        for [`random_crop`].
    """
    height, width = size
    with _memory_for(image):
        image = upright(image, mode, size)
        scale = max(height / image.height, width / image.width)
        covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        if image.size != covering:
            image = image.resize(covering, Image.Resampling.LANCZOS)
        return _pixels(image)


def random_crop(pixels: torch.Tensor, size: tuple[int, int], crop: Sequence[float]) -> torch.Tensor:
    """Crop an image at a given position.

    Args:
        pixels (`torch.Tensor` of shape `(channels, height, width)`): An image that covers `size`.
        size (`(int, int)`): Height and width in pixels.
        crop (`(float, float)`): Vertical and horizontal position in [0, 1); (0, 0) is the upper left.

    Returns:
        `torch.Tensor` of shape `(channels, *size)`: A view of `pixels`.
    """
    top, left = (int(part * (have - want + 1)) for part, have, want in zip(crop, pixels.shape[1:], size, strict=True))
    return pixels[:, top : top + size[0], left : left + size[1]]


def _memory_for(image: Image.Image) -> AbstractContextManager:
    """Keep threads from decoding several large images at a time."""
    return _ONE_AT_A_TIME if image.width * image.height > LARGE else nullcontext()


def upright(image: Image.Image, mode: str = "RGB", size: tuple[int, int] | None = None) -> Image.Image:
    """Decode one image in its own size.

    Args:
        image (`PIL.Image.Image`): An image, as for [`picture_to_tensor`].
        mode (`str`, defaults to `"RGB"`): `"L"`, `"RGB"` or `"RGBA"`.
        size (`(int, int)`, *optional*): Height and width that are needed; a very large JPEG may be decoded smaller.

    Returns:
        `PIL.Image.Image`: The upright image with this mode.

    Raises:
        ValueError: As for [`picture_to_tensor`].
    """
    if size is not None and image.width * image.height > LARGE:
        side = 2 * max(size)  # the least to decode, enough for the antialiasing filter
        image.draft(None, (side, side))  # affects only JPEGs
    image = turned_upright(image)
    if image.mode.startswith("I"):  # 16-bit grayscale: PIL would clip it instead of scaling
        pixels = np.asarray(image, dtype=np.float64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("the range of integer pixels beyond 16 bits is unknown")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    if image.mode == "F":  # PIL would clip to 0..255, and turn a range of 0 to 1 into black
        raise ValueError("the range of floating-point pixels is unknown")
    if mode != "RGBA" and image.has_transparency_data:
        # The colors of transparent pixels are arbitrary.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _pixels(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]
