"""Painting of a drawn face: its colors, its outlines, and the order of its layers.

All positions are unit coordinates (x to the right, y down), so a face looks the same at every resolution.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw


Color = tuple[int, ...]
Points = list[tuple[float, float]]

# fmt: off
SKINS = {
    "porcelain": (255, 224, 206), "fair": (249, 205, 174), "olive": (229, 181, 138),
    "tan": (204, 146, 103), "brown": (160, 104, 70), "dark": (116, 74, 54),
}
HAIR_COLORS = {
    "black": (43, 36, 42), "brown": (101, 62, 40), "auburn": (166, 74, 36),
    "blond": (232, 184, 92), "gray": (178, 178, 186), "pink": (233, 120, 160),
}
EYE_COLORS = {"brown": (104, 62, 34), "blue": (58, 128, 196), "green": (66, 140, 88), "gray": (112, 130, 148)}
LIPSTICKS = {"rose": (214, 84, 104), "red": (196, 36, 52)}
CLOTHES_COLORS = {
    "red": (206, 70, 66), "blue": (62, 106, 180), "green": (70, 142, 104), "yellow": (238, 184, 70),
    "white": (240, 238, 234), "purple": (122, 88, 160), "navy": (48, 58, 92),
}
BACKGROUNDS = {
    "sky": (150, 200, 232), "mint": (162, 216, 190), "peach": (250, 196, 160),
    "lilac": (196, 180, 228), "sand": (232, 214, 176), "slate": (116, 136, 158),
}
INK, WHITE, GOLD, TONGUE = (44, 36, 44), (255, 255, 255), (240, 190, 84), (226, 96, 104)
SHADOW, LIGHT = (50, 20, 60), (255, 246, 226)  # tinted, because shades mixed with black and white look dull

# Outlines of hair: x in half head widths from the middle, y in image heights. Symmetric ones list their right half.
BACK_HAIR = {
    "bob": [(0, .07), (.72, .11), (1.20, .28), (1.32, .50), (1.38, .64), (1.10, .74), (.4, .72)],
    "fringe": [(0, .07), (.72, .11), (1.20, .28), (1.32, .50), (1.40, .76), (1.10, .86), (.4, .84)],
    "long": [(0, .07), (.72, .11), (1.20, .28), (1.30, .50), (1.40, .72), (1.44, .90), (1.40, 1.08)],
    "wavy": [
        (0, .07), (.72, .11), (1.20, .28), (1.28, .40), (1.24, .48), (1.48, .58), (1.34, .67), (1.58, .77),
        (1.40, .86), (1.58, .95), (1.44, 1.08),
    ],
}
FRONT_HAIR = {
    "buzz": [(0, .135), (.56, .165), (.97, .30), (1.04, .46), (.95, .44), (.86, .33), (.6, .265), (0, .255)],
    "curly": [(0, .14), (.7, .17), (1.05, .36), (.92, .40), (.76, .30), (0, .26)],
    "afro": [(0, .08), (.8, .12), (1.2, .36), (1.06, .46), (.80, .34), (.4, .26), (0, .24)],
    "fringe": [
        (0, .085), (.72, .12), (1.13, .28), (1.18, .50), (1.10, .68), (.97, .60), (.92, .42), (.80, .375), (.4, .39),
        (0, .38),
    ],
    "bun": [(0, .085), (.80, .145), (1.08, .30), (1.02, .46), (.90, .36), (.48, .26), (0, .205)],
    "pigtails": [(0, .085), (.80, .145), (1.08, .30), (1.02, .46), (.90, .36), (.48, .26), (0, .205)],
}
PARTED_HAIR = {
    "short": [
        (-1.04, .46), (-1.08, .30), (-.82, .15), (-.30, .085), (.30, .08), (.82, .14), (1.08, .30), (1.04, .46),
        (.93, .38), (.72, .335), (.1, .30), (-.52, .215), (-.78, .28), (-.93, .38),
    ],
    "quiff": [
        (-1.03, .44), (-1.07, .30), (-.92, .17), (-.74, .07), (-.1, .03), (.5, .055), (.92, .17), (1.07, .30),
        (1.03, .44), (.93, .36), (.78, .27), (.2, .24), (-.4, .22), (-.80, .29), (-.93, .36),
    ],
    "long": [
        (-1.12, .66), (-1.20, .46), (-1.12, .28), (-.82, .15), (-.30, .085), (.30, .085), (.82, .15), (1.12, .28),
        (1.20, .46), (1.12, .66), (1.0, .56), (.90, .42), (.40, .31), (-.38, .19), (-.74, .30), (-.92, .42),
        (-1.0, .56),
    ],
}
PARTED_HAIR |= dict.fromkeys(("bob", "wavy"), PARTED_HAIR["long"])
LOCKS = {
    "long": [(.98, .50), (.98, .68), (1.0, .84), (1.2, .97), (1.42, .86), (1.40, .68), (1.30, .52), (1.1, .42)],
    "wavy": [
        (.98, .50), (.90, .61), (1.06, .72), (.94, .83), (1.16, .98), (1.50, .88), (1.34, .77), (1.52, .66),
        (1.30, .56), (1.1, .42),
    ],
    "pigtails": [(1.0, .45), (1.35, .40), (1.72, .52), (1.66, .72), (1.36, .86), (1.30, .70), (1.12, .58)],
}
# Arcs of tufts: half width in half head widths, middle and height of the arc, angles in degrees, radius of a tuft.
CURLS = {
    "curly": [(.98, .34, .20, range(-16, 200, 21), .075), (.58, .27, .07, range(0, 181, 36), .060)],
    "afro": [(.62, .31, .16, range(0, 181, 30), .095), (.82, .36, .14, range(0, 181, 20), .068)],
}
# fmt: on


class _Canvas:
    """A supersampled image with drawing operations in unit coordinates."""

    def __init__(self, size: int):
        self.size = size
        self.image = Image.new("RGB", (size, size))
        self.draw = ImageDraw.Draw(self.image, "RGBA")

    def pixels(self, points: Points) -> Points:
        return [(x * self.size, y * self.size) for x, y in points]

    def box(self, x: float, y: float, rx: float, ry: float) -> list[float]:
        return [value * self.size for value in (x - rx, y - ry, x + rx, y + ry)]

    def fill(self, points: Points, color: Color) -> None:
        self.draw.polygon(self.pixels(points), fill=color)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color) -> None:
        self.draw.ellipse(self.box(x, y, rx, ry), fill=color)

    def shade(self, points: Points, top: Color, bottom: Color) -> None:
        """Fill a shape with a vertical gradient."""
        xs, ys = zip(*self.pixels(points), strict=True)
        left, upper = max(0, int(min(xs))), max(0, int(min(ys)))
        right, lower = min(self.size, int(max(xs)) + 1), min(self.size, int(max(ys)) + 1)
        mask = Image.new("L", (right - left, lower - upper))
        ImageDraw.Draw(mask).polygon([(x - left, y - upper) for x, y in zip(xs, ys, strict=True)], fill=255)
        gradient = Image.new("RGB", (1, 16))
        gradient.putdata([mix(top, bottom, step / 15) for step in range(16)])
        self.image.paste(gradient.resize(mask.size, Image.Resampling.BILINEAR), (left, upper), mask)

    def glow(self, x: float, y: float, rx: float, ry: float, color: Color, strength: float) -> None:
        """Add a soft spot of color that fades toward its rim."""
        left, upper, right, lower = (round(value) for value in self.box(x, y, rx, ry))
        mask = _spot(round(255 * strength)).resize((right - left, lower - upper), Image.Resampling.BILINEAR)
        self.image.paste(color, (left, upper, right, lower), mask)


@lru_cache(maxsize=16)
def _spot(peak: int) -> Image.Image:
    # Pillow's radial gradient reaches 255 in the corners, and 178 at the inscribed circle.
    fade = [max(0.0, 1 - level / 178) for level in range(256)]
    return Image.radial_gradient("L").resize((64, 64)).point([round(peak * t * t * (3 - 2 * t)) for t in fade])


@dataclass
class Portrait:
    """Attributes, colors and proportions of one face. Lengths are fractions of the image's side."""

    attributes: dict[str, str]
    skin: Color
    hair: Color
    x: float  # middle of the head
    y: float  # shift of the whole head, downwards
    width: float  # half width of the head
    jaw: float  # half width of the jaw relative to `width`
    chin: float  # height of the chin
    turn: float  # sideways shift of the features, as of a head that looks a little to one side
    eye_gap: float  # half the distance between the eyes
    eye_size: float  # relative size of the eyes
    brow: float  # tilt of the brows
    flip: int  # side of the parting, -1 or 1

    def curve(self, points: Points, flip: int = 1) -> Points:
        """Return a smooth closed outline through points in half head widths and image heights."""
        return _smooth([(self.x + flip * u * self.width, self.y + y) for u, y in points])

    def mirrored(self, half: Points) -> Points:
        return self.curve([*half, *[(-u, y) for u, y in reversed(half) if u]])

    def head(self, lit: float = 1.0) -> Points:
        """Return the outline of the head. `lit` below 1 pulls in the side that is turned away from the light."""
        half = [(0.56, 0.195), (0.90, 0.305), (1.0, 0.45), (0.96, 0.60), (self.jaw, 0.715), (0.36, self.chin - 0.02)]
        right = [(u * lit, y) for u, y in half]
        return self.curve([(0, 0.155), *right, (0, self.chin), *[(-u, y) for u, y in reversed(half)]])

    @property
    def deep(self) -> bool:
        return self.attributes["skin"] in ("brown", "dark")


def mix(first: Color, second: Color, amount: float) -> Color:
    return tuple(round(a + (b - a) * amount) for a, b in zip(first, second, strict=True))


def _darker(color: Color, amount: float) -> Color:
    return mix(color, SHADOW, amount)


def _lighter(color: Color, amount: float) -> Color:
    return mix(color, LIGHT, amount)


def _smooth(points: Points, steps: int = 6) -> Points:
    """Return a closed Catmull-Rom spline through the points."""
    curve = []
    for i in range(len(points)):
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = (points[(i + k) % len(points)] for k in range(4))
        for step in range(steps):
            t = step / steps
            a, b = t * (t * (1 - t / 2) - 0.5), 1 + t * t * (1.5 * t - 2.5)
            c, d = t * (0.5 + t * (2 - 1.5 * t)), t * t * (t - 1) / 2
            curve.append((a * ax + b * bx + c * cx + d * dx, a * ay + b * by + c * cy + d * dy))
    return curve


def _crescent(x: float, y: float, half: float, upper: float, lower: float, tilt: float = 0.0) -> Points:
    """Return the region between two arcs from `x - half` to `x + half` that sag by `upper` and `lower`."""
    steps = [step / 8 for step in range(-8, 9)]
    top = [(x + half * t, y + upper * (1 - t * t) + tilt * t) for t in steps]
    return top + [(x + half * t, y + lower * (1 - t * t) + tilt * t) for t in reversed(steps)]


def _draw_background(canvas: _Canvas, face: Portrait) -> None:
    color = BACKGROUNDS[face.attributes["background"]]
    canvas.shade([(0, 0), (1, 0), (1, 1), (0, 1)], _lighter(color, 0.15), _darker(color, 0.22))
    canvas.glow(0.44, 0.40, 0.72, 0.72, _lighter(color, 0.75), 0.8)


def _draw_hair_back(canvas: _Canvas, face: Portrait) -> None:
    style, dark, darkest = face.attributes["hair_style"], _darker(face.hair, 0.22), _darker(face.hair, 0.42)
    if style in BACK_HAIR:
        canvas.shade(face.mirrored(BACK_HAIR[style]), dark, darkest)
    elif style == "pigtails":
        for side in (-1, 1):
            canvas.shade(face.curve(LOCKS["pigtails"], side), face.hair, darkest)
            canvas.ellipse(face.x + side * 1.13 * face.width, face.y + 0.47, 0.03, 0.045, CLOTHES_COLORS["red"])
    elif style == "bun":
        canvas.ellipse(face.x, face.y + 0.085, 0.115, 0.085, dark)
        canvas.ellipse(face.x - 0.012, face.y + 0.075, 0.095, 0.068, face.hair)
        canvas.fill(_crescent(face.x - 0.015, face.y + 0.055, 0.06, -0.026, -0.010), _lighter(face.hair, 0.25))
    elif style == "afro":
        canvas.ellipse(face.x, face.y + 0.36, 1.2 * face.width, 0.29, dark)
        _draw_curls(canvas, face, 1.22, 0.36, 0.27, range(-44, 225, 22), 0.105)


def _draw_curls(
    canvas: _Canvas, face: Portrait, u: float, y: float, height: float, angles: Iterable[int], radius: float
) -> None:
    """Draw round tufts of hair along an arc around the head."""
    for shade, angle in enumerate(angles):
        x = face.x + u * face.width * math.cos(math.radians(angle))
        top = face.y + y - height * math.sin(math.radians(angle))
        canvas.ellipse(x, top, radius, radius, _darker(face.hair, 0.05 + 0.15 * (shade % 2)))
        shine = _crescent(x - 0.2 * radius, top - 0.3 * radius, 0.5 * radius, -0.45 * radius, -0.2 * radius)
        canvas.fill(shine, _lighter(face.hair, 0.12))


def _draw_body(canvas: _Canvas, face: Portrait) -> None:
    clothes, cloth = face.attributes["clothes"], CLOTHES_COLORS[face.attributes["clothes_color"]]
    x, neck, shadow, chest = face.x, 0.12 * face.jaw, _darker(face.skin, 0.30), _darker(face.skin, 0.14)
    half = [(0, 0.90), (0.11, 0.885), (0.25, 0.915), (0.39, 0.955), (0.46, 1.04)]
    shoulders = _smooth([(x + u, y) for u, y in half] + [(x - u, y) for u, y in reversed(half[1:])])
    canvas.shade(shoulders, _lighter(cloth, 0.10), _darker(cloth, 0.28))
    canvas.shade([(x - neck, 0.66), (x + neck, 0.66), (x + neck, 0.92), (x - neck, 0.92)], shadow, chest)
    canvas.ellipse(x, face.y + face.chin - 0.05, neck * 1.2, 0.095, shadow)
    if clothes == "t-shirt":
        canvas.fill(_crescent(x, 0.905, neck + 0.02, 0, 0.075), chest)
        canvas.fill(_crescent(x, 0.90, neck + 0.035, 0.075, 0.115), _darker(cloth, 0.30))
    elif clothes == "shirt":
        canvas.fill([(x - neck, 0.90), (x + neck, 0.90), (x, 1.02)], chest)
        for side in (-1, 1):
            wing = [(neck, 0.875), (neck + 0.045, 0.90), (0.075, 1.03), (0, 1.01)]
            canvas.fill([(x + side * u, y) for u, y in wing], _lighter(cloth, 0.45))
    else:
        top, base = neck + 0.02, neck + 0.04
        roll = [(x - top, 0.865), (x + top, 0.865), (x + base, 0.96), (x - base, 0.96)]
        canvas.shade(roll, cloth, _darker(cloth, 0.30))
        canvas.fill(_crescent(x, 0.868, top, -0.006, 0.025), _lighter(cloth, 0.18))


def _draw_head(canvas: _Canvas, face: Portrait) -> None:
    for side in (-1, 1):
        ear = face.x + side * face.width
        canvas.ellipse(ear, face.y + 0.50, 0.042, 0.066, _darker(face.skin, 0.08 if side < 0 else 0.20))
        canvas.ellipse(ear, face.y + 0.505, 0.022, 0.040, _darker(face.skin, 0.28))
    canvas.fill(face.head(), _darker(face.skin, 0.20))
    canvas.shade(face.head(lit=0.88), _lighter(face.skin, 0.16), face.skin)
    blush = mix(face.skin, (236, 74, 82), 0.4 if face.deep else 0.55)
    for side in (-1, 1):
        canvas.glow(face.x + face.turn + side * 0.148, face.y + 0.605, 0.085, 0.07, blush, 0.7)


def _draw_eyes(canvas: _Canvas, face: Portrait) -> None:
    iris, lid = EYE_COLORS[face.attributes["eye_color"]], mix(face.hair, INK, 0.65)
    made_up, mouth = face.attributes["lipstick"] != "none", face.attributes["mouth"]
    size, y = face.eye_size, face.y + 0.485
    wide = 0.010 if mouth == "open" else 0.0
    for side in (-1, 1):
        x = face.x + face.turn + side * face.eye_gap
        canvas.glow(x, y - 0.015, 0.12, 0.10, _darker(face.skin, 0.35), 0.5)
        canvas.ellipse(x, y, 0.070 * size, 0.054 * size, WHITE)
        iris_x = x + 0.4 * face.turn
        canvas.ellipse(iris_x, y + 0.002, 0.043 * size, 0.048 * size, _darker(iris, 0.35))
        canvas.ellipse(iris_x, y + 0.008, 0.034 * size, 0.036 * size, _lighter(iris, 0.15))
        canvas.ellipse(iris_x, y + 0.002, 0.023 * size, 0.026 * size, INK)
        canvas.ellipse(iris_x - 0.016, y - 0.014, 0.0135, 0.0135, WHITE)
        if mouth == "grin":
            canvas.fill(_crescent(x, y + 0.044, 0.068 * size, -0.012, 0.022), _lighter(face.skin, 0.05))
        canvas.fill(_crescent(x, y - 0.004, 0.078 * size, -0.068 * size, -0.032 * size - wide), lid)
        if made_up:
            tip = x + side * 0.070 * size
            canvas.fill([(tip - side * 0.03, y - 0.040), (tip + side * 0.028, y - 0.042), (tip, y - 0.004)], lid)
        tilt = side * (0.02 if mouth == "frown" else face.brow)
        thick = 0.048 if made_up else 0.056
        brow = _crescent(x + side * 0.005, y - 0.080 - 2.5 * wide, 0.080, -thick, -0.026, tilt)
        canvas.fill(brow, _darker(face.hair, 0.25))


def _draw_nose(canvas: _Canvas, face: Portrait) -> None:
    x, y = face.x + 1.5 * face.turn, face.y + 0.605
    canvas.fill(_crescent(x, y - 0.008, 0.044, 0.0, 0.040), _darker(face.skin, 0.32))
    canvas.ellipse(x, y - 0.014, 0.035, 0.027, mix(_lighter(face.skin, 0.10), (236, 110, 96), 0.14))
    canvas.ellipse(x - 0.010, y - 0.024, 0.011, 0.008, _lighter(face.skin, 0.55))


def _draw_mouth(canvas: _Canvas, face: Portrait) -> None:
    mouth, lipstick = face.attributes["mouth"], face.attributes["lipstick"]
    x, y = face.x + 1.2 * face.turn, face.y + 0.70
    lips = LIPSTICKS.get(lipstick, mix(face.skin, (176, 48, 56), 0.55))
    gap = mix(lips, (70, 12, 24), 0.75)
    if mouth == "smile":
        canvas.fill(_crescent(x, y - 0.026, 0.098, 0.020, 0.090), lips)
        canvas.fill(_crescent(x, y - 0.026, 0.110, 0.040, 0.064), gap)
    elif mouth == "grin":
        canvas.fill(_crescent(x, y - 0.022, 0.114, -0.012, 0.110), lips)
        canvas.fill(_crescent(x, y - 0.018, 0.102, 0.004, 0.090), gap)
        canvas.fill(_crescent(x, y - 0.017, 0.092, 0.004, 0.050), WHITE)
        canvas.ellipse(x, y + 0.054, 0.036, 0.014, TONGUE)
    elif mouth == "open":
        canvas.ellipse(x, y + 0.008, 0.055, 0.060, lips)
        canvas.ellipse(x, y + 0.008, 0.041, 0.046, gap)
        canvas.ellipse(x, y + 0.036, 0.026, 0.015, TONGUE)
    elif mouth == "neutral":
        canvas.fill(_crescent(x, y, 0.078, -0.028, 0.038), lips)
        canvas.fill(_crescent(x, y, 0.088, -0.007, 0.010), gap)
    else:
        canvas.fill(_crescent(x, y + 0.032, 0.088, -0.076, -0.012), lips)
        canvas.fill(_crescent(x, y + 0.032, 0.100, -0.056, -0.034), gap)


def _draw_beard(canvas: _Canvas, face: Portrait) -> None:
    beard, chin, dark = face.attributes["beard"], face.chin, _darker(face.hair, 0.28)
    # Stubble ends exactly at the outline of the face, through the points of `head`; a full beard stands out from it.
    out, down = (0.0, 0.0) if beard == "stubble" else (0.03, 0.028)
    cheek = [(0, 0.632), (0.42, 0.640), (0.66, 0.660), (0.86, 0.58), (0.93, 0.46), (1.0, 0.45), (0.96 + out / 2, 0.60)]
    jaw = [(face.jaw + out, 0.715 + 0.7 * down), (0.36, chin - 0.02 + down), (0, chin + down)]
    patch = [(0, 0.636), (0.36, 0.645), (0.50, 0.69), (0.44, 0.76), (0.30, chin), (0, chin + 0.022)]
    if beard == "stubble":
        canvas.fill(face.mirrored(cheek + jaw), (*_darker(face.hair, 0.6), 64))
        return
    if beard != "mustache":
        canvas.shade(face.mirrored(cheek + jaw if beard == "full" else patch), face.hair, dark)
    for side in (-1, 1):
        x = face.x + 1.2 * face.turn + side * 0.055
        canvas.fill(_crescent(x, face.y + 0.664, 0.068, -0.042, 0.012, side * 0.018), _darker(face.hair, 0.12))


def _draw_locks(canvas: _Canvas, face: Portrait) -> None:
    """Draw the strands that fall over the shoulders."""
    for side in (-1, 1):
        lock = face.curve(LOCKS[face.attributes["hair_style"]], side)
        canvas.shade(lock, face.hair, _darker(face.hair, 0.30))


def _draw_hair_front(canvas: _Canvas, face: Portrait) -> None:
    style, hair = face.attributes["hair_style"], face.hair
    if style == "bald":
        canvas.glow(face.x - 0.07, face.y + 0.25, 0.11, 0.06, WHITE, 0.45)
        return
    if style == "buzz":
        hair = mix(hair, face.skin, 0.2)
    outline = face.curve(PARTED_HAIR[style], face.flip) if style in PARTED_HAIR else face.mirrored(FRONT_HAIR[style])
    canvas.fill([(x, y + 0.016) for x, y in outline], (*SHADOW, 60))
    if style in ("curly", "afro"):
        canvas.fill(outline, _darker(hair, 0.12))
        for u, y, height, angles, radius in CURLS[style]:
            _draw_curls(canvas, face, u, y, height, angles, radius)
        return
    canvas.shade(outline, _lighter(hair, 0.10), _darker(hair, 0.28))
    if style != "buzz":
        canvas.fill(_crescent(face.x - 0.05, face.y + 0.165, 0.16, -0.045, -0.018), _lighter(hair, 0.28))
    if style == "fringe":
        for u in (-0.5, -0.1, 0.35):
            x = face.x + face.flip * u * face.width
            canvas.fill([(x, 0.29), (x + 0.012, 0.40), (x - 0.004, 0.40)], _darker(hair, 0.40))


def _draw_glasses(canvas: _Canvas, face: Portrait) -> None:
    glasses, y = face.attributes["glasses"], face.y + 0.49
    frame = GOLD if face.deep and glasses != "sunglasses" else INK
    width = round(0.019 * canvas.size)
    for side in (-1, 1):
        x, ear = face.x + face.turn + side * face.eye_gap, face.x + side * face.width
        temple = x + side * 0.09
        canvas.fill([(temple, y - 0.03), (ear, y - 0.025), (ear, y - 0.005), (temple, y - 0.012)], frame)
        if glasses == "sunglasses":
            rim = [(-0.102, -0.05), (0.102, -0.05), (0.088, 0.05), (0, 0.08), (-0.088, 0.05)]
            canvas.shade(_smooth([(x + u, y + v) for u, v in rim]), (30, 28, 44), (92, 74, 104))
            glint = [(-0.055, -0.03), (-0.015, -0.035), (-0.045, 0.045), (-0.065, 0.03)]
            canvas.fill([(x + u, y + v) for u, v in glint], (*WHITE, 90))
        elif glasses == "round":
            canvas.draw.ellipse(canvas.box(x, y, 0.102, 0.096), (*WHITE, 34), frame, width)
        else:
            box = canvas.box(x, y, 0.101, 0.078)
            canvas.draw.rounded_rectangle(box, 0.025 * canvas.size, (*WHITE, 34), frame, width)
    canvas.fill(_crescent(face.x + face.turn, y - 0.012, 0.03, -0.026, -0.004), frame)


def paint(face: Portrait, resolution: int) -> Image.Image:
    """Paint a face, from back to front.

    Args:
        face ([`Portrait`]): The face.
        resolution (`int`): Height and width in pixels.

    Returns:
        `PIL.Image.Image`: An RGB image.
    """
    oversampling = max(3, math.ceil(256 / resolution))
    canvas = _Canvas(resolution * oversampling)
    _draw_background(canvas, face)
    _draw_hair_back(canvas, face)
    _draw_body(canvas, face)
    _draw_head(canvas, face)
    if face.attributes["beard"] != "none":
        _draw_beard(canvas, face)
    _draw_mouth(canvas, face)
    _draw_nose(canvas, face)
    _draw_eyes(canvas, face)
    if face.attributes["hair_style"] in ("long", "wavy"):
        _draw_locks(canvas, face)
    _draw_hair_front(canvas, face)
    if face.attributes["glasses"] != "none":
        _draw_glasses(canvas, face)
    return canvas.image.reduce(oversampling)
