"""Drawn faces: training data with known attributes that needs no download.

A face is a pure function of `(seed, index)`. One random stream chooses its attributes, another the small differences
in proportion and shade. `portrait.py` paints the result.
"""

import random
from bisect import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from numbers import Integral
from typing import Any, overload

from PIL import Image

from .portrait import (
    BACKGROUNDS,
    CLOTHES_COLORS,
    HAIR_COLORS,
    LIGHT,
    SHADOW,
    SKINS,
    Color,
    Portrait,
    mix,
    paint,
)


# fmt: off
# Caption text for each attribute value.
MOUTHS = {"smile": "smiling", "grin": "grinning", "neutral": "calm", "open": "surprised", "frown": "frowning"}
HAIR_STYLES = {
    "bald": "a bald head", "buzz": "buzzed {} hair", "short": "short {} hair", "quiff": "{} hair in a quiff",
    "curly": "short curly {} hair", "afro": "{} afro hair", "bob": "{} hair in a bob", "long": "long {} hair",
    "wavy": "long wavy {} hair", "fringe": "{} hair with a fringe", "bun": "{} hair in a bun",
    "pigtails": "{} hair in pigtails",
}
BEARDS = {"stubble": "stubble", "mustache": "a mustache", "goatee": "a goatee", "full": "a full beard"}
GLASSES = {"round": "round glasses", "square": "square glasses", "sunglasses": "sunglasses"}
# fmt: on


def _integer(name: str, value: Any, minimum: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")
    return int(value)


def _pick(rng: random.Random, weights: Mapping[str, float]) -> str:
    # Only `random()` is guaranteed to give the same numbers in every Python version.
    sums = list(accumulate(weights.values()))
    return list(weights)[bisect(sums, rng.random() * sums[-1], hi=len(sums) - 1)]


def face_attributes(index: int, seed: int = 0) -> dict[str, str]:
    """Return the attributes of a face.

    Some attributes depend on each other, to make faces coherent: blond hair is rare with dark skin, and a beard never
    comes with lipstick. Each value is a plain string, so the dictionary can be written as JSON.

    Args:
        index (`int`): Number of the face, at least 0; there is no upper limit.
        seed (`int`, *optional*, defaults to 0): Number of the family of faces, at least 0.

    Returns:
        `dict[str, str]`: The values of `skin`, `hair_color`, `hair_style`, `eye_color`, `mouth`, `glasses`, `beard`,
        `lipstick`, `clothes`, `clothes_color` and `background`.

    Raises:
        ValueError: `index` or `seed` is not an integer or is negative.
    """
    rng = random.Random(f"{_integer('seed', seed, 0)}/{_integer('index', index, 0)}/attributes")
    skin = _pick(rng, dict.fromkeys(SKINS, 1))
    feminine = rng.random() < 0.5
    hair = {"black": 3, "brown": 4, "auburn": 3, "blond": 4, "gray": 1.2, "pink": 0.6}
    eyes = {"brown": 4, "blue": 3, "green": 2, "gray": 1}
    if feminine:
        styles = {"short": 1, "curly": 1, "afro": 1, "pigtails": 2}
        styles |= dict.fromkeys(("bob", "long", "wavy", "fringe", "bun"), 3)
    else:
        styles = {"bald": 2, "buzz": 3, "short": 5, "quiff": 4, "curly": 3, "afro": 1, "long": 1, "bun": 1}
    if skin in ("brown", "dark"):
        hair = {"black": 8, "auburn": 1.5, "gray": 1, "pink": 0.7}
        eyes = {"brown": 8, "green": 1}
        styles |= {"curly": 3, "afro": 3}
    return {
        "skin": skin,
        "hair_color": _pick(rng, hair),
        "hair_style": _pick(rng, styles),
        "eye_color": _pick(rng, eyes),
        "mouth": _pick(rng, {"smile": 4, "grin": 3, "neutral": 2, "open": 1.2, "frown": 1.2}),
        "glasses": _pick(rng, {"none": 6, "round": 1.5, "square": 1.5, "sunglasses": 0.8}),
        "beard": "none" if feminine else _pick(rng, {"none": 5, "stubble": 1, "mustache": 1, "goatee": 1, "full": 2}),
        "lipstick": _pick(rng, {"none": 1, "rose": 2, "red": 1}) if feminine else "none",
        "clothes": _pick(rng, dict.fromkeys(("t-shirt", "shirt", "turtleneck"), 1)),
        "clothes_color": _pick(rng, dict.fromkeys(CLOTHES_COLORS, 1)),
        "background": _pick(rng, dict.fromkeys(BACKGROUNDS, 1)),
    }


def _face(index: int, seed: int) -> Portrait:
    attributes = face_attributes(index, seed)
    rng = random.Random(f"{int(seed)}/{int(index)}/proportions")

    def between(low: float, high: float) -> float:
        return low + (high - low) * rng.random()

    def jitter(color: Color) -> Color:
        return mix(color, LIGHT if rng.random() < 0.5 else SHADOW, between(0, 0.1))

    soft = attributes["lipstick"] != "none"
    return Portrait(
        attributes=attributes,
        skin=jitter(SKINS[attributes["skin"]]),
        hair=jitter(HAIR_COLORS[attributes["hair_color"]]),
        x=0.5 + between(-0.012, 0.012),
        y=between(-0.006, 0.012),
        width=between(0.245, 0.265) - 0.008 * soft,
        jaw=between(0.68, 0.76) if soft else between(0.74, 0.86),
        chin=between(0.805, 0.825),
        turn=between(-0.022, 0.022),
        eye_gap=between(0.114, 0.124),
        eye_size=between(0.94, 1.04) + 0.06 * soft,
        brow=between(-0.014, 0.008),
        flip=-1 if rng.random() < 0.5 else 1,
    )


def draw_face(index: int, resolution: int = 64, seed: int = 0) -> Image.Image:
    """Draw a face.

    Args:
        index (`int`): Number of the face, at least 0; there is no upper limit.
        resolution (`int`, *optional*, defaults to 64): Height and width of the image in pixels, at least 8.
        seed (`int`, *optional*, defaults to 0): Number of the family of faces, at least 0.

    Returns:
        `PIL.Image.Image`: RGB image of the face that [`face_attributes`] describes.

    Raises:
        ValueError: An argument is not an integer, `index` or `seed` is negative, or `resolution` is below 8.
    """
    resolution = _integer("resolution", resolution, 8)
    return paint(_face(index, seed), resolution)


def _caption(attributes: dict[str, str]) -> str:
    traits = [HAIR_STYLES[attributes["hair_style"]].format(attributes["hair_color"])]
    if attributes["beard"] != "none":
        traits.append(BEARDS[attributes["beard"]])
    if attributes["glasses"] != "none":
        traits.append(GLASSES[attributes["glasses"]])
    *most, last = traits
    return f"a {MOUTHS[attributes['mouth']]} face with {', '.join(most)}{' and ' if most else ''}{last}"


def face_caption(index: int, seed: int = 0) -> str:
    """Return the caption of a face, such as "a smiling face with long brown hair and round glasses"."""
    return _caption(face_attributes(index, seed))


class DrawnFaces(Sequence[dict[str, Any]]):
    """Dataset of drawn faces with captions. Each face is drawn when it is accessed.

    An example has the keys `"image"`, `"caption"` and those of [`face_attributes`]. Face `i` depends only on `seed`
    and `i`, so a larger dataset starts with the same faces. A slice returns a list of examples.

    Args:
        num_images (`int`, *optional*, defaults to 4096): Number of faces, at least 1.
        resolution (`int`, *optional*, defaults to 64): Height and width of the images in pixels, at least 8.
        seed (`int`, *optional*, defaults to 0): Number of the family of faces, at least 0.

    Raises:
        ValueError: An argument is not an integer or is too small.

    Examples:
        >>> faces = DrawnFaces(num_images=8, resolution=32)
        >>> faces[0]["image"].size
        (32, 32)
    """

    def __init__(self, num_images: int = 4096, resolution: int = 64, seed: int = 0):
        self.num_images = _integer("num_images", num_images, 1)
        self.resolution = _integer("resolution", resolution, 8)
        self.seed = _integer("seed", seed, 0)

    def __len__(self) -> int:
        return self.num_images

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        # A range handles slices, negative numbers, NumPy integers and the end.
        number = range(self.num_images)[index]
        if isinstance(number, range):
            return [self[i] for i in number]
        attributes = face_attributes(number, self.seed)
        image = draw_face(number, self.resolution, self.seed)
        return {"image": image, "caption": _caption(attributes), **attributes}
