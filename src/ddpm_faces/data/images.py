"""One image: opened, turned upright, resized, cropped, and scaled for the network."""

import io
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CROPS = ("center", "random")
MAX_IMAGE_PIXELS = 2**29  # by default: 2 GiB as PIL holds them

# PIL's limits are meant for images that strangers upload, and refuse the photos of some phones and PNGs with a long
# comment or a large colour profile. They belong to the whole process and must not change while threads decode, so they
# are set here, once. `open_image` checks the number of pixels instead; texts and profiles keep a limit.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = 2**26
PngImagePlugin.MAX_TEXT_MEMORY = 2**28

# Above this, which was PIL's limit, images are decoded one at a time, and JPEGs at a part of their size.
LARGE = 2 * (2**30 // 4 // 3)
_ONE_AT_A_TIME = threading.Lock()


def open_image(value: Any, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Open an image from whatever a folder or a column of a dataset holds, without decoding its pixels.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str`, `os.PathLike` or `dict`):
            An image; the content of its file; its path, which may be one within an archive, as `datasets` writes it
            (`zip://face.png::faces.zip`); or content and path, `{"bytes": ..., "path": ...}`, of which one may be
            missing.
        max_image_pixels (`int`, defaults to 2**29): Width times height at most.

    Returns:
        `PIL.Image.Image`

    Raises:
        ValueError: There is no image, or one of too many pixels. Whatever PIL raises on a file that is no image.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ValueError("no picture")
    if isinstance(value, str) and "://" in value:
        from datasets.utils.file_utils import xopen  # only now, for importing it takes time

        with xopen(value, "rb") as file:
            value = file.read()
    if not isinstance(value, Image.Image):
        value = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    if value.width * value.height > max_image_pixels:
        raise ValueError(
            f"{value.width}x{value.height} pixels are more than `max_image_pixels`, {max_image_pixels:,}, allows"
        )
    return value


def to_samples(images: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
    """Turn pictures into x_0.

    Args:
        images (`torch.Tensor` of shape `(batch, channels, height, width)`, `torch.uint8`): Pictures, 0 to 255.
        flips (`torch.Tensor` of shape `(batch,)`, `torch.bool`, *optional*): Which to mirror.

    Returns:
        `torch.Tensor` of the same shape, `torch.float32`, in [-1, 1].
    """
    samples = images.float() / 127.5 - 1.0
    return samples if flips is None else torch.where(flips[:, None, None, None], samples.flip(-1), samples)


def picture_to_tensor(image: Image.Image, size: tuple[int, int], mode: str = "RGB") -> torch.Tensor:
    """Decode one picture the way [`load_faces`] does.

    Args:
        image (`PIL.Image.Image`):
            A picture of any size, the first of an animation. Transparent parts lie on white, unless `mode` keeps them;
            16 bits are scaled to 8.
        size (`(int, int)`): Height and width in pixels.
        mode (`str`, defaults to `"RGB"`): `"L"`, `"RGB"` or `"RGBA"`.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`, `torch.uint8`: Upright, cropped about its centre to the
        shape of `size`, and resized with an antialiasing filter.

    Raises:
        ValueError: Pixels whose range is unknown: floating-point numbers, or integers beyond 16 bits.
    """
    height, width = size
    with _memory_for(image):
        image = _upright(image, size, mode)
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
        return _pixels(image)


def resize_to_cover(image: Image.Image, size: tuple[int, int], mode: str = "RGB") -> torch.Tensor:
    """Decode one picture as [`picture_to_tensor`] does, but uncropped.

    Args:
        image (`PIL.Image.Image`): A picture.
        size (`(int, int)`): Height and width in pixels.
        mode (`str`, defaults to `"RGB"`): `"L"`, `"RGB"` or `"RGBA"`.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`, `torch.uint8`: As small as still covers `size`, so that
        [`random_crop`] can cut that out.
    """
    height, width = size
    with _memory_for(image):
        image = _upright(image, size, mode)
        scale = max(height / image.height, width / image.width)
        covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        if image.size != covering:
            image = image.resize(covering, Image.Resampling.LANCZOS)
        return _pixels(image)


def random_crop(pixels: torch.Tensor, size: tuple[int, int], crop: Sequence[float]) -> torch.Tensor:
    """Cut out a part.

    Args:
        pixels (`torch.Tensor` of shape `(channels, height, width)`): A picture that covers `size`.
        size (`(int, int)`): Height and width in pixels.
        crop (`(float, float)`): Where, in [0, 1), vertically and horizontally: 0 is at the upper left.

    Returns:
        `torch.Tensor` of shape `(channels, *size)`: A view of `pixels`.
    """
    top, left = (int(part * (have - want + 1)) for part, have, want in zip(crop, pixels.shape[1:], size, strict=True))
    return pixels[:, top : top + size[0], left : left + size[1]]


# What to do with an image of each EXIF orientation, 2 to 8 (1 is upright).
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, or None where the metadata has none or is damaged: the pixels are whole all the same."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # Pillow raises many kinds on damaged metadata
        return None


def _memory_for(image: Image.Image) -> AbstractContextManager:
    """Keeps threads from decoding several large images at a time."""
    return _ONE_AT_A_TIME if image.width * image.height > LARGE else nullcontext()


def _upright(image: Image.Image, size: tuple[int, int], mode: str) -> Image.Image:
    if image.width * image.height > LARGE:
        side = 2 * max(size)  # of what is decoded, at least: enough for the antialiasing filter
        image.draft(None, (side, side))  # which JPEGs alone know
    # Not by ImageOps.exif_transpose, which writes all other tags anew and fails where one of them is odd.
    image.load()  # metadata may follow the pixels
    orientation = _orientation(image)
    if isinstance(orientation, int) and orientation in _TRANSPOSES:
        image = image.transpose(_TRANSPOSES[orientation])
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip it instead of scaling
        pixels = np.asarray(image, dtype=np.float64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("integer pixels beyond 16 bits, whose range is unknown")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    if image.mode == "F":  # PIL would clip this to 0..255, so that a range of 0 to 1 would become black
        raise ValueError("floating-point pixels, whose range is unknown")
    if mode != "RGBA" and image.has_transparency_data:
        # What lies under transparent pixels is arbitrary.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _pixels(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]
