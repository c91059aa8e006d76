"""Restore or edit faces in photos of any size: find them, change them at the size of the model, and put them back."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..checks import check_seed
from ..editing_ddpm_faces import DDPMFacesEditPipeline, naming
from ..files import check_writable, replacing
from ..operators_ddpm_faces import GRAY_WEIGHTS, Downsample, GaussianBlur, Gray, Inpaint, LinearOperator
from ..pipeline_ddpm_faces import DDPMFacesPipeline
from ..restoration_ddpm_faces import DDPMFacesRestorePipeline
from .alignment import DETECTION_SIDE, MIN_SCORE, Frame, find_frames
from .detection import MTCNN
from .images import open_image, upright


MIN_BLUR = 0.3  # standard deviation, in pixels of the model; a smaller one is not visible
MAX_FACTOR = 8  # of `upscale`
_SOFT = 0.08  # width of the soft edge, in sides of the frame
_CHANGE = 16.0  # of the 255 levels: where an edit changes a face by so much, few of its finer details stay


@dataclass(frozen=True)
class Damage:
    """What happened to a photo. Exactly one of the first four is given.

    Args:
        inpaint (`PIL.Image.Image`, *optional*): Mask of the size of the photo: white where it is repainted.
        upscale (`int`, *optional*): Factor by which the photo is enlarged, 2 to 8.
        colorize (`bool`, defaults to `False`): Whether the faces have lost their colors; what is left is replaced.
        deblur (`float`, *optional*): Standard deviation of a Gaussian blur, in pixels of the photo.
        noise_level (`float`, defaults to 0.0):
            Standard deviation of the noise of the photo, independent in each of its pixels, which are in [-1, 1]: 0.05
            is 6.4 of the 255 levels.

    Raises:
        ValueError: Not exactly one is given, or a value is not allowed.
    """

    inpaint: Image.Image | None = None
    upscale: int | None = None
    colorize: bool = False
    deblur: float | None = None
    noise_level: float = 0.0

    def __post_init__(self) -> None:
        kinds = ("inpaint", "upscale", "colorize", "deblur")
        given = [name for name in kinds if not (getattr(self, name) is None or getattr(self, name) is False)]
        if len(given) != 1:
            names = "`inpaint`, `upscale`, `colorize` or `deblur`"
            raise ValueError(f"Give exactly one of {names}, got {' and '.join(given) or 'none of them'}.")
        factor = self.upscale
        if factor is not None and (type(factor) is not int or not 2 <= factor <= MAX_FACTOR):
            raise ValueError(f"`upscale` must be an integer from 2 to {MAX_FACTOR}, got {factor!r}.")
        if self.deblur is not None and not 0 < self.deblur < math.inf:
            raise ValueError(f"`deblur` must be a positive number of pixels, got {self.deblur}.")
        if not 0 <= self.noise_level <= 2:
            raise ValueError(f"`noise_level` must be from 0 to 2, got {self.noise_level}.")


@dataclass(frozen=True)
class ChangedPhoto:
    """Result of [`restore_photo`] and [`edit_photo`].

    Args:
        image (`PIL.Image.Image`): The photo with the changed faces.
        faces (`list[PIL.Image.Image]`): The changed faces at the size of the model.
        sides (`list[float]`): Sides of their frames in the given photo, in pixels.
        skipped (`list[str]`): Why other faces were not changed.
    """

    image: Image.Image
    faces: list[Image.Image]
    sides: list[float]
    skipped: list[str]


def restore_photo(
    pipeline: DDPMFacesRestorePipeline,
    photo: Image.Image,
    damage: Damage,
    is_aligned: bool = False,
    seed: int = 0,
    num_inference_steps: int | None = None,
    prompt: str | None = None,
    guidance_scale: float | None = None,
    class_label: int | None = None,
    detector: MTCNN | None = None,
) -> ChangedPhoto:
    """Restore the faces in a photo.

    Each face is found, cut out in the frame of FFHQ (eyes at 47 % of the height), restored at the size of the model
    and blended into the photo with a soft edge. Everything else keeps its pixels, or is enlarged (`upscale`). Of a
    color or a blur that a face had lost, only the difference is added, so that details finer than the model knows
    stay.

    Args:
        pipeline ([`DDPMFacesRestorePipeline`]): A model of aligned faces, square and in color.
        photo (`PIL.Image.Image`): The photo. It is not changed.
        damage ([`Damage`]): What happened to it.
        is_aligned (`bool`, defaults to `False`): Whether the photo shows just one face, as the model expects it.
        seed (`int`, defaults to 0): Seed of the first face; face i uses `seed + i`.
        num_inference_steps (`int`, *optional*): As in [`DDPMFacesRestorePipeline.__call__`].
        prompt (`str`, *optional*): What the faces should show, for a model with captions.
        guidance_scale (`float`, *optional*): As in [`DDPMFacesRestorePipeline.__call__`].
        class_label (`int`, *optional*): Class of the faces, for a model with classes.
        detector ([`MTCNN`], *optional*): By default loaded on the CPU.

    Returns:
        [`ChangedPhoto`]

    Raises:
        ValueError: No face is found or can be restored, the mask does not fit, or an argument is not allowed.
        ImportError: The face detector is not installed.
    """
    check_seed(seed)
    photo = _upright(photo, "photo")
    size = _model_size(pipeline)
    if damage.upscale is not None and size % damage.upscale:
        raise ValueError(f"`upscale` must divide {size}, the size of the model, got {damage.upscale}.")
    mask = None if damage.inpaint is None else _check_mask(damage.inpaint, photo)
    frames = _frames(photo, is_aligned, detector, mask)

    if damage.upscale is None:
        canvas = _Canvas(photo)
    else:
        enlarged = photo.width * damage.upscale, photo.height * damage.upscale
        canvas = _Canvas(photo.resize(enlarged, Image.Resampling.BICUBIC))
    faces, sides, skipped = [], [], []
    for i, frame in enumerate(frames):
        try:
            operator, observed = _problem(photo, frame, damage, mask, size)
        except _CannotBeRestoredError as error:
            skipped.append(str(error))
            continue
        with naming("class_labels", "class_label"):
            (face,), *_ = pipeline(
                observed,
                operator,
                # Reducing the photo averages its noise.
                damage.noise_level * min(1.0, observed.width / frame.side),
                num_inference_steps,
                generator=torch.Generator().manual_seed(seed + i),
                class_labels=None if class_label is None else [class_label],
                guidance_scale=guidance_scale,
                prompt=prompt,
                return_dict=False,
            )
        _put_restored(canvas, frame.scaled(damage.upscale or 1), face, observed, damage, mask)
        faces.append(face)
        sides.append(frame.side)
    if not faces:
        raise ValueError(f"No face can be restored: {'; '.join(skipped)}.")
    return ChangedPhoto(canvas.image, faces, sides, skipped)


def edit_photo(
    pipeline: DDPMFacesEditPipeline,
    photo: Image.Image,
    prompt: str | None = None,
    source_prompt: str | None = None,
    strength: float | None = None,
    method: str = "inversion",
    faces: Sequence[int] | None = None,
    is_aligned: bool = False,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    class_label: int | None = None,
    source_class_label: int | None = None,
    detector: MTCNN | None = None,
) -> ChangedPhoto:
    """Edit the faces in a photo.

    Each face is found and cut out as in [`restore_photo`], edited at the size of the model, and blended into the photo
    with a soft edge. Where a face does not change, the photo keeps its pixels. Where it changes much, the photo loses
    details that are too fine for the model.

    Args:
        pipeline ([`DDPMFacesEditPipeline`]): A model of aligned faces, square and in color.
        photo (`PIL.Image.Image`): The photo. It is not changed.
        prompt (`str`, *optional*): What the faces should show, for a model with captions.
        source_prompt (`str`, *optional*): What they show now, for `"inversion"`.
        strength (`float`, *optional*): As in [`DDPMFacesEditPipeline.__call__`].
        method (`str`, defaults to `"inversion"`): As in [`DDPMFacesEditPipeline.__call__`].
        faces (`Sequence[int]`, *optional*): Which faces to edit, from the left; 1 is the first. By default, all.
        is_aligned (`bool`, defaults to `False`): Whether the photo shows just one face, as the model expects it.
        seed (`int`, defaults to 0): Seed of the first face, for the method `"noise"`; face i uses `seed + i`.
        num_inference_steps (`int`, *optional*): As in [`DDPMFacesEditPipeline.__call__`].
        guidance_scale (`float`, *optional*): As in [`DDPMFacesEditPipeline.__call__`].
        class_label (`int`, *optional*): Class that the faces should show, for a model with classes.
        source_class_label (`int`, *optional*): Class that they show now.
        detector ([`MTCNN`], *optional*): By default loaded on the CPU.

    Returns:
        [`ChangedPhoto`]

    Raises:
        ValueError: No face is found, there are fewer than `faces` says, or an argument is not allowed.
        ImportError: The face detector is not installed.
    """
    check_seed(seed)
    photo = _upright(photo, "photo")
    size = _model_size(pipeline)
    frames = sorted(_frames(photo, is_aligned, detector), key=lambda frame: frame.center[0])
    if faces is not None:
        if not faces or any(type(face) is not int or not 1 <= face <= len(frames) for face in faces):
            raise ValueError(f"`faces` must be integers from 1 to {len(frames)}, the number of faces, got {faces}.")
        frames = [frames[face - 1] for face in sorted(set(faces))]
    before = [frame.cut(photo, size) for frame in frames]
    labels, source_labels = (
        None if label is None else [label] * len(frames) for label in (class_label, source_class_label)
    )
    with naming("class_labels", "class_label"), naming("source_class_labels", "source_class_label"):
        after, *_ = pipeline(
            before,
            prompt,
            source_prompt,
            strength,
            method,
            num_inference_steps,
            guidance_scale,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(len(frames))],
            class_labels=labels,
            source_class_labels=source_labels,
            return_dict=False,
        )
    canvas = _Canvas(photo)
    for frame, *pair in zip(frames, before, after, strict=True):
        _put_edited(canvas, frame, *pair)
    return ChangedPhoto(canvas.image, after, [frame.side for frame in frames], [])


def open_photo(path: str | os.PathLike, argument: str = "photo") -> Image.Image:
    """Open a file of an image.

    Raises:
        ValueError: There is no such file, or it is not an image. The message names `argument`.
    """
    if not Path(path).is_file():
        raise ValueError(f"`{argument}` {str(path)!r} is not a file.")
    try:
        image = open_image(path)
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # PIL raises many kinds of errors on damaged images
        raise ValueError(f"`{argument}` {str(path)!r} cannot be read as an image: {error}.") from error
    return image


def save_photo(
    path: str | os.PathLike, sources: Sequence[str | os.PathLike], overwrite: bool = False
) -> Callable[[Image.Image], None]:
    """Check where a result is to be saved, and return a function that saves it, completely or not at all.

    Args:
        path (`str` or `os.PathLike`): File to save to. Its name ends with a format of PIL, such as .png or .jpg.
        sources (`list[str | os.PathLike]`): Files that are never overwritten.
        overwrite (`bool`, defaults to `False`): Whether to replace an existing file.

    Raises:
        ValueError: The file is one of the sources, exists, cannot be written, or its format is unknown.
    """
    path = Path(path)
    if any(path.exists() and path.samefile(source) for source in sources):
        raise ValueError(f"`output` {str(path)!r} must differ from the files that are read.")
    if path.exists() and not overwrite:
        raise ValueError(f"`output` {str(path)!r} exists: choose another file, or overwrite it.")
    format = Image.registered_extensions().get(path.suffix.lower())
    if format not in Image.SAVE:
        raise ValueError(f"`output` {str(path)!r} must end with the format of the image, such as .png or .jpg.")
    check_writable(path.parent)

    options = {"quality": 95} if format in ("JPEG", "WEBP") else {}

    def save(image: Image.Image) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            image.save(unfinished, format, icc_profile=image.info.get("icc_profile"), **options)

    return save


class _Canvas:
    """A photo into which faces are blended. Where their frames overlap, the earlier ones come first."""

    def __init__(self, photo: Image.Image) -> None:
        self.before = np.asarray(photo, dtype=np.float32)
        self._after = self.before.copy()
        self._rest = np.ones(self.before.shape[:2], dtype=np.float32)
        self._profile = photo.info.get("icc_profile")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.before.shape[1], self.before.shape[0]

    @property
    def image(self) -> Image.Image:
        """The photo with all changes, in the colors of the same profile."""
        image = _to_image(self._after)
        if self._profile is not None:
            image.info["icc_profile"] = self._profile
        return image

    def add(self, place: tuple[slice, slice], change: np.ndarray, weights: np.ndarray) -> None:
        """Add a change to a part of the photo, with weights from 0 to 1."""
        weights = np.minimum(weights.clip(0, 1), self._rest[place])
        self._rest[place] -= weights
        self._after[place] += weights[..., None] * change


def _upright(image: Image.Image, name: str, mode: str = "RGB") -> Image.Image:
    """Return an image upright and in a mode, without the color profile of another mode."""
    try:
        result = upright(image, mode)
    except ValueError as error:
        raise ValueError(f"`{name}` cannot be read: {error}.") from error
    if image.mode not in ("RGB", "RGBA", "P") and "icc_profile" in result.info:
        result = result.copy()
        del result.info["icc_profile"]
    return result


def _model_size(pipeline: DDPMFacesPipeline) -> int:
    channels, height, width = pipeline.image_shape
    if channels != 3 or height != width:
        raise ValueError(f"`pipeline` must be of square images in color, got {width}x{height}, {channels} channels.")
    return height


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


class _CannotBeRestoredError(ValueError):
    """A reason why one of several faces is left as it is."""


def _check_mask(mask: Image.Image, photo: Image.Image) -> np.ndarray:
    """Return where the photo is repainted, as booleans."""
    if mask.has_transparency_data and np.asarray(mask.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError("`inpaint` must be opaque: white where the photo is repainted, black elsewhere.")
    mask = _upright(mask, "inpaint", "L")
    if mask.size != photo.size:
        raise ValueError(
            f"`inpaint` must be of the size of the photo, {photo.width}x{photo.height} pixels, got "
            f"{mask.width}x{mask.height}."
        )
    values = np.asarray(mask)
    is_white, is_gray = values >= 223, (values > 32) & (values < 223)
    if is_gray.sum() > min(is_white.sum(), 0.1 * is_gray.size):  # edges may be soft
        raise ValueError("`inpaint` must be black and white: white where the photo is repainted.")
    is_missing = values > 127
    if is_missing.all() or not is_missing.any():
        color = "white" if is_missing.all() else "black"
        raise ValueError(f"`inpaint` must be white where the photo is repainted, but it is {color} everywhere.")
    return is_missing


def _filled(photo: Image.Image, mask: np.ndarray) -> Image.Image:
    """Fill what is repainted with the colors around it, so that the detector sees no object there."""
    pixels, known = np.asarray(photo, dtype=np.float32), ~mask[..., None]
    filled, share = pixels * known, known.astype(np.float32)
    sigma = 1.0
    while (share < 0.01).any() and sigma < max(photo.size):  # ever wider, until the whole hole is reached
        wider = _blurred(share, sigma)
        filled = np.where(share < 0.01, _blurred(filled, sigma), filled)
        share = np.where(share < 0.01, wider, share)
        sigma *= 1.5
    filled /= np.maximum(share, 1e-6)
    return _to_image(np.where(known, pixels, filled))


def _frames(
    photo: Image.Image, is_aligned: bool, detector: MTCNN | None, mask: np.ndarray | None = None
) -> Sequence[Frame]:
    """Find the faces of a photo, a part of which may be missing."""
    if is_aligned:
        if photo.width != photo.height:
            raise ValueError(f"`photo` of an aligned face must be square, got {photo.width}x{photo.height} pixels.")
        return [Frame((0.0, 0.0), (float(photo.width), 0.0))]
    scale = max(1.0, max(photo.size) / DETECTION_SIDE)
    searched = photo
    if mask is not None:
        size = [max(1, round(side / scale)) for side in photo.size]
        small_mask = Image.fromarray(mask.astype(np.uint8) * 255).resize(size)
        searched = _filled(photo.resize(size), np.asarray(small_mask) > 0)
    found = find_frames(searched, detector or MTCNN())
    frames = [frame.scaled(photo.width / searched.width) for frame in found if frame.score >= MIN_SCORE]
    if not frames:
        raise ValueError(
            f"`photo` ({photo.width}x{photo.height} pixels) shows no face of at least {20 * scale:.0f} pixels that "
            "could be found. If it is a single aligned face, say so with `is_aligned`."
        )
    return frames


def _problem(
    photo: Image.Image, frame: Frame, damage: Damage, mask: np.ndarray | None, size: int
) -> tuple[LinearOperator, Image.Image]:
    """Return what happened to a face, and the face as observed, for a model of `size` pixels."""
    shape = (3, size, size)
    place = f"the face of {frame.side:.0f} pixels at ({frame.center[0]:.0f}, {frame.center[1]:.0f})"
    if damage.upscale is not None:
        small = size // damage.upscale
        if frame.side > 1.5 * small:
            raise _CannotBeRestoredError(
                f"{place} has more detail than the model adds: it enlarges faces of {small} pixels to {size}"
            )
        return Downsample(damage.upscale, shape), frame.cut(photo, small)
    observed = frame.cut(photo, size)
    if mask is not None:
        missing = np.asarray(frame.cut(Image.fromarray(mask.astype(np.uint8) * 255), size)) > 8
        if not missing.any():
            raise _CannotBeRestoredError(f"no part of {place} is to be repainted")
        if missing.all():
            raise _CannotBeRestoredError(f"nothing of {place} is left")
        return Inpaint(torch.from_numpy(missing)), observed
    if damage.deblur is not None:
        sigma = damage.deblur * size / frame.side
        if not MIN_BLUR <= sigma <= size / 4:
            extent = "too fine" if sigma < MIN_BLUR else "too coarse"
            raise _CannotBeRestoredError(
                f"the blur of {place} is {extent} for the model: {sigma:.2g} of its {size} pixels"
            )
        return GaussianBlur(sigma, shape), observed
    return Gray(shape), observed


def _put_restored(
    canvas: _Canvas, frame: Frame, face: Image.Image, observed: Image.Image, damage: Damage, mask: np.ndarray | None
) -> None:
    """Blend a restored face into the photo."""
    values = np.asarray(face, dtype=np.float32)
    is_difference = damage.colorize or damage.deblur is not None
    if is_difference:
        observed = observed.convert("L") if damage.colorize else observed
        values = values - np.asarray(observed.convert("RGB"), dtype=np.float32)
    place, values = frame.spread(values, canvas.size)
    _, weights = frame.spread(_soft_square(), canvas.size)
    before = canvas.before[place]
    if mask is not None:
        known = ~mask[place]
        values = _seamless(before, values, known[..., None], frame.side / face.width)
        weights = np.where(known, 0.0, weights > 0)
    if damage.colorize:
        values = values + before @ np.array(GRAY_WEIGHTS, dtype=np.float32)[:, None]
    elif is_difference:
        values = values + before
    canvas.add(place, values - before, weights)


def _put_edited(canvas: _Canvas, frame: Frame, before: Image.Image, after: Image.Image) -> None:
    """Blend an edited face into the photo."""
    old = np.asarray(before, dtype=np.float32)
    change = np.asarray(after, dtype=np.float32) - old
    amount = _blurred(np.abs(change).mean(axis=2, keepdims=True), 1.0)
    place, values = frame.spread(np.concatenate([old, change, amount], axis=2), canvas.size)
    _, weights = frame.spread(_soft_square(), canvas.size)
    old, change, amount = values[..., :3], values[..., 3:6], values[..., 6:]
    details = canvas.before[place] - old
    lost = 1 - np.exp(-np.square(amount / _CHANGE))
    canvas.add(place, change - lost * details, weights)


def _seamless(before: np.ndarray, values: np.ndarray, known: np.ndarray, width: float) -> np.ndarray:
    """Correct new pixels by the differences to the known ones beside them."""
    share = _blurred(known, 2 * width)
    difference = _blurred((before - values) * known, 2 * width) / np.maximum(share, 1e-3)
    return values + difference * np.clip(2 * share, 0, 1)


def _blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    radius = math.ceil(3 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).view(1, 1, -1, 1)
    planes = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[:, None]
    planes = F.pad(planes, [radius] * 4, mode="replicate")
    return F.conv2d(F.conv2d(planes, weights), weights.transpose(2, 3))[:, 0].permute(1, 2, 0).numpy()


def _soft_square(size: int = 64) -> np.ndarray:
    """Return weights that rise from 0 at the edges of a square to 1 inside."""
    distance = np.minimum(np.arange(size), size - 1 - np.arange(size)) / size
    rise = np.clip(distance / _SOFT, 0, 1)
    rise = rise * rise * (3 - 2 * rise)
    return np.outer(rise, rise).astype(np.float32)
