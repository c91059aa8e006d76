"""Faces in photos: found, cut out, restored or edited, and put back."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from PIL import Image, ImageDraw
from test_prompts import a_prompt_model
from typer.testing import CliRunner

from ddpm_faces import DDPMFacesEditPipeline, DDPMFacesRestorePipeline, DDPMFacesScheduler, DrawnFaces
from ddpm_faces.cli.app import app
from ddpm_faces.data.alignment import Frame, find_frames
from ddpm_faces.data.detection import MTCNN
from ddpm_faces.data.photos import (
    Damage,
    _Canvas,
    _put_edited,
    _seamless,
    edit_photo,
    open_photo,
    restore_photo,
    save_photo,
)


@pytest.fixture(scope="module")
def detector() -> MTCNN:
    return MTCNN()


@pytest.fixture
def restore(pipeline) -> DDPMFacesRestorePipeline:
    restore = DDPMFacesRestorePipeline.from_pipe(pipeline)
    restore.set_progress_bar_config(disable=True)
    return restore


def a_face(side: int = 128, index: int = 3) -> Image.Image:
    return DrawnFaces(index + 1, resolution=side, seed=0)[index]["image"]


def a_photo(*frames: Frame, size: tuple[int, int] = (300, 220), faces: tuple[int, ...] = (3, 9)) -> Image.Image:
    """Put drawn faces into a gray photo."""
    pixels = np.full((size[1], size[0], 3), 128, dtype=np.float32)
    for frame, index in zip(frames, faces, strict=False):
        place, values = frame.spread(np.asarray(a_face(index=index)), size)
        _, inside = frame.spread(np.pad(np.ones((126, 126)), 1), size)
        pixels[place] = np.where(inside[..., None] > 0.5, values, pixels[place])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def turned(x: float, y: float, side: float, degrees: float = 0) -> Frame:
    angle = math.radians(degrees)
    return Frame((x, y), (side * math.cos(angle), side * math.sin(angle)))


def distance(one: Frame, other: Frame) -> float:
    """Return the mean distance of the corners, in sides."""
    corners = []
    for (x, y), (dx, dy) in ((one.corner, one.edge), (other.corner, other.edge)):
        corners.append(np.array([(x, y), (x + dx, y + dy), (x - dy, y + dx), (x + dx - dy, y + dy + dx)]))
    return float(np.hypot(*(corners[0] - corners[1]).T).mean() / one.side)


# Frames


def test_frame_of_landmarks_is_that_of_ffhq():
    """Eyes and mouth of an upright face, by the formulas of the data set: the square is around them."""
    landmarks = torch.tensor([[40.0, 50.0], [60.0, 50.0], [50.0, 60.0], [42.0, 72.0], [58.0, 72.0]])
    frame = Frame.from_landmarks(landmarks, 0.9)
    assert frame.side == pytest.approx(2 * max(2.0 * 20, 1.8 * 22))
    assert frame.center == pytest.approx((50, 50 + 0.1 * 22))
    assert (frame.edge[1], frame.score) == (0, 0.9)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # the same, a quarter turn
    other = Frame.from_landmarks(landmarks @ turn)
    assert other.side == pytest.approx(frame.side)
    assert other.edge == pytest.approx((0.0, frame.side), abs=1e-4)


def test_a_frame_cuts_pixels_exactly():
    photo = a_photo(turned(80, 40, 128))
    whole = Frame((0.0, 0.0), (128.0, 0.0)).cut(a_face(), 128)
    assert np.array_equal(np.asarray(whole), np.asarray(a_face()))
    inner = Frame((80.0, 40.0), (128.0, 0.0)).cut(photo, 128)
    assert np.array_equal(np.asarray(inner), np.asarray(photo.crop((80, 40, 208, 168))))
    half = Frame((80.0, 40.0), (128.0, 0.0)).cut(photo, 64)
    blocks = np.asarray(inner, dtype=float).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(half) - blocks).max() <= 1


@pytest.mark.parametrize("degrees", [-30, 10, 90])
def test_what_is_put_into_a_photo_is_cut_out_again(degrees):
    frame = turned(150, 60, 120, degrees)
    back = frame.cut(a_photo(frame, size=(400, 300)), 128)
    error = np.abs(np.asarray(back, dtype=float) - np.asarray(a_face()))[8:-8, 8:-8]
    assert error.mean() < 4


def test_a_frame_may_reach_beyond_the_photo():
    photo = a_face()
    wide = Frame((-64.0, -64.0), (256.0, 0.0)).cut(photo, 256)
    assert np.array_equal(np.asarray(wide)[64:192, 64:192], np.asarray(photo))
    assert np.array_equal(np.asarray(wide)[64:192, 63], np.asarray(photo)[:, 0])  # mirrored
    (rows, columns), values = Frame((-64.0, -64.0), (256.0, 0.0)).spread(np.ones((64, 64)), photo.size)
    assert (rows, columns, values.shape) == (slice(0, 128), slice(0, 128), (128, 128))


# Detection


@pytest.mark.parametrize("degrees", [0, 15])
def test_frames_follow_the_face(detector, degrees):
    """The frame in a photo is that of the face alone, moved, turned and scaled with it."""
    (alone,) = find_frames(a_face(), detector)
    put = turned(90, 50, 110, degrees)
    (found,) = find_frames(a_photo(put), detector)
    scale, (dx, dy) = put.side / 128, put.edge
    (x, y), (ex, ey) = alone.corner, alone.edge
    c, s = dx / put.side, dy / put.side
    expected = Frame(
        (put.corner[0] + scale * (c * x - s * y), put.corner[1] + scale * (s * x + c * y)),
        (scale * (c * ex - s * ey), scale * (s * ex + c * ey)),
    )
    assert distance(expected, found) < 0.06


def test_several_faces_the_largest_first(detector):
    photo = a_photo(turned(10, 60, 90), turned(130, 40, 150))
    frames = find_frames(photo, detector)
    assert len(frames) == 2
    assert frames[0].center[0] > 130 > frames[1].center[0]
    enlarged = find_frames(photo.resize((3000, 2200)), detector)
    for frame, large in zip(frames, enlarged, strict=True):
        assert distance(frame.scaled(10), large) < 0.06


def test_the_frame_of_a_mirrored_photo_is_mirrored(detector):
    """Landmarks are averaged over the face and its mirror image, so neither side is preferred."""
    photo = a_photo(turned(90, 50, 110, 10))
    (frame,) = find_frames(photo, detector)
    (mirrored,) = find_frames(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), detector)
    (x, y), (dx, dy) = mirrored.corner, mirrored.edge
    back = Frame((photo.width - x - dx, y + dy), (dx, -dy))
    assert distance(frame, back) < 0.02


def test_no_face(detector):
    assert find_frames(Image.new("RGB", (200, 100)), detector) == []


# Restoration


@pytest.fixture
def two_frames(monkeypatch):
    frames = [turned(120, 50, 100, 10), turned(10, 60, 80)]
    monkeypatch.setattr("ddpm_faces.data.photos.find_frames", lambda *_: frames)
    return frames


@pytest.fixture
def photo(two_frames) -> Image.Image:
    return a_photo(*two_frames)


def far_from(frames, shape) -> np.ndarray:
    """Return which pixels are outside the frames."""
    outside = np.ones(shape, dtype=bool)
    for frame in frames:
        place, inside = frame.spread(np.pad(np.ones((62, 62)), 1), (shape[1], shape[0]))
        outside[place] &= inside <= 0
    return outside


@pytest.mark.parametrize("damage", [Damage(colorize=True), Damage(deblur=5.0, noise_level=0.05)])
def test_only_faces_change(restore, photo, two_frames, damage):
    result = restore_photo(restore, photo, damage, num_inference_steps=3, detector=object())
    assert result.image.size == photo.size
    assert (result.sides, result.skipped) == ([pytest.approx(100), pytest.approx(80)], [])
    assert [face.size for face in result.faces] == [(16, 16), (16, 16)]
    before, after, outside = np.asarray(photo), np.asarray(result.image), far_from(two_frames, (220, 300))
    assert (after[outside] == before[outside]).all()
    assert (after[~outside] != before[~outside]).mean() > 0.5


def test_details_stay_where_only_colors_are_added(restore, photo, two_frames):
    result = restore_photo(restore, photo, Damage(colorize=True), num_inference_steps=3, detector=object())
    gray = np.asarray(result.image.convert("L"), dtype=float) - np.asarray(photo.convert("L"))
    assert np.abs(gray).mean() < 3  # clipped colors lose some


def test_colors_of_faces_are_replaced(restore, photo, two_frames):
    """A face in color is restored as its gray version. The rest of the photo keeps its colors."""
    arguments = {"damage": Damage(colorize=True), "num_inference_steps": 3, "detector": object()}
    of_color, of_gray = (
        np.asarray(restore_photo(restore, given, **arguments).image, dtype=int)
        for given in (photo, photo.convert("L").convert("RGB"))
    )
    inside = np.zeros((220, 300), dtype=bool)
    for frame in two_frames:
        place, weights = frame.spread(np.pad(np.ones((40, 40)), 12), (300, 220))
        inside[place] |= weights > 0.99
    assert inside.sum() > 3000
    assert np.abs(of_color - of_gray)[inside].max() <= 2


def test_inpaint_changes_what_is_white_and_nothing_else(restore, photo):
    mask = Image.new("L", photo.size)
    ImageDraw.Draw(mask).rectangle((140, 80, 180, 110), fill=255)
    result = restore_photo(restore, photo, Damage(inpaint=mask), num_inference_steps=3, detector=object())
    before, after, white = np.asarray(photo), np.asarray(result.image), np.asarray(mask) > 0
    assert (after[~white] == before[~white]).all()
    assert (after[white] != before[white]).any(axis=1).mean() > 0.95
    assert result.sides == [pytest.approx(100)]
    assert result.skipped == ["no part of the face of 80 pixels at (50, 100) is to be repainted"]


def test_new_pixels_continue_the_known_ones():
    """The error at the edge of the hole is removed, and that in its middle stays."""
    known = np.ones((60, 60, 1), dtype=bool)
    known[10:50, 10:50] = False
    before = np.full((60, 60, 3), 100.0, dtype=np.float32)
    result = _seamless(before, before + 30, known, width=3.0)
    assert np.abs(result[10, 12:48] - 100).max() < 5
    assert np.abs(result[30, 30] - 130).max() < 1


def test_upscale_enlarges_photo_and_faces(restore, monkeypatch):
    frames = [turned(5, 5, 8)]
    monkeypatch.setattr("ddpm_faces.data.photos.find_frames", lambda *_: frames)
    photo = a_photo(frames[0], size=(40, 30))
    result = restore_photo(restore, photo, Damage(upscale=2), num_inference_steps=3, detector=object())
    assert result.image.size == (80, 60)
    plain = np.asarray(photo.resize((80, 60), Image.Resampling.BICUBIC))
    outside = far_from([frames[0].scaled(2)], (60, 80))
    assert (np.asarray(result.image)[outside] == plain[outside]).all()
    assert (np.asarray(result.image)[~outside] != plain[~outside]).mean() > 0.5


def test_an_aligned_face_needs_no_detector(restore):
    result = restore_photo(restore, a_face(), Damage(colorize=True), is_aligned=True, num_inference_steps=2)
    assert result.sides == [128]
    with pytest.raises(ValueError, match="must be square, got 300x220 pixels"):
        restore_photo(restore, a_photo(), Damage(colorize=True), is_aligned=True)


def test_faces_have_their_own_seeds(restore, photo, two_frames, monkeypatch):
    def call(seed):
        damage = Damage(colorize=True)
        return restore_photo(restore, photo, damage, seed=seed, num_inference_steps=2, detector=object()).faces

    one, same, other = call(1), call(1), call(2)
    assert np.array_equal(one[0], same[0])
    assert not np.array_equal(one[0], other[0])
    monkeypatch.setattr("ddpm_faces.data.photos.find_frames", lambda *_: two_frames[1:])
    assert np.array_equal(call(2)[0], one[1])  # its seed was 1 + 1


class Brighter:
    """A pipeline that brightens each face, and remembers how it was called."""

    image_shape = (3, 16, 16)

    def __call__(self, image, *arguments, **options):
        self.arguments, self.options = arguments, options
        faces = image if isinstance(image, list) else [image]
        return ([face.convert("RGB").point(lambda value: value + 30) for face in faces],)


def test_noise_is_reduced_with_the_photo(monkeypatch):
    """Pixels of the model are means of those of the photo, and less noisy."""
    noise = np.random.default_rng(0).normal(size=(200, 200, 3))
    photo = Image.fromarray((127.5 + 25.5 * noise).round().clip(0, 255).astype(np.uint8))
    for side in (160, 32, 16):
        frame, pipeline = turned(10, 20, side), Brighter()
        monkeypatch.setattr("ddpm_faces.data.photos.find_frames", lambda *_, frame=frame: [frame])
        restore_photo(pipeline, photo, Damage(deblur=side / 16, noise_level=0.2), detector=object())
        noise_of_face = (np.asarray(frame.cut(photo, 16)) / 127.5).std()
        assert pipeline.arguments[1] == pytest.approx(noise_of_face, rel=0.1)


@pytest.mark.parametrize("kind", ["restored", "edited"])
def test_faces_that_overlap_are_changed_once(monkeypatch, kind):
    frames = [turned(40, 20, 100), turned(90, 30, 100)]
    monkeypatch.setattr("ddpm_faces.data.photos.find_frames", lambda *_: frames)
    photo = Image.new("RGB", (220, 160), (100, 100, 100))
    if kind == "edited":
        result = edit_photo(Brighter(), photo, detector=object())
    else:
        result = restore_photo(Brighter(), photo, Damage(deblur=6.0), detector=object())
    after = np.asarray(result.image)
    assert after.max() == after[75, 115].max() == 130


@pytest.mark.parametrize("kind", ["restored", "edited"])
def test_any_photo_is_read_or_refused(monkeypatch, kind):
    """Turned by EXIF, of another mode, transparent: the result is that of the upright photo on white."""
    monkeypatch.setattr("ddpm_faces.data.photos.find_frames", lambda *_: [turned(100, 50, 100)])
    photo = a_photo(turned(100, 50, 100))

    def change(photo):
        if kind == "edited":
            return edit_photo(Brighter(), photo, detector=object()).image
        return restore_photo(Brighter(), photo, Damage(deblur=7.0), detector=object()).image

    expected = np.asarray(change(photo), dtype=int)
    rotated = photo.transpose(Image.Transpose.ROTATE_90)
    rotated.getexif()[0x0112] = 6
    clear = photo.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 20, 20))
    for other in (rotated, photo.convert("CMYK"), clear):
        result = np.asarray(change(other), dtype=int)
        assert np.abs(result[20:] - expected[20:]).max() <= 2
    assert (result[:20, :20] == 255).all()
    gray = photo.convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    assert np.array_equal(change(deep), change(gray))
    with pytest.raises(ValueError, match="`photo` cannot be read: the range of floating-point pixels is unknown"):
        change(photo.convert("F"))


def test_colors_keep_their_profile(restore, tmp_path):
    photo = a_face()
    photo.info["icc_profile"] = b"wide"
    damage, arguments = Damage(colorize=True), {"is_aligned": True, "num_inference_steps": 2}
    for name in ("a.png", "a.jpg"):
        save_photo(tmp_path / name, [])(restore_photo(restore, photo, damage, **arguments).image)
        assert Image.open(tmp_path / name).info["icc_profile"] == b"wide"
    of_print = photo.convert("CMYK")
    of_print.info["icc_profile"] = b"print"
    assert "icc_profile" not in restore_photo(restore, of_print, damage, **arguments).image.info


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give exactly one of .*, got none of them"),
        ({"upscale": 2, "colorize": True}, "got upscale and colorize"),
        ({"upscale": 1}, "`upscale` must be an integer from 2 to 8, got 1"),
        ({"deblur": 0}, "`deblur` must be a positive number"),
        ({"deblur": math.nan}, "got nan"),
        ({"colorize": True, "noise_level": -1}, "`noise_level` must be from 0 to 2"),
    ],
)
def test_bad_damage(arguments, message):
    with pytest.raises(ValueError, match=message):
        Damage(**arguments)


def a_mask(value: int, box: tuple[int, ...], mode: str = "L", size: tuple[int, int] = (300, 220)) -> Image.Image:
    mask = Image.new(mode, size)
    mask.paste(value if mode == "L" else (value, 255), box)
    return mask


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Damage(deblur=0.5), "the blur of the face of 100 pixels .* is too fine for the model: 0.08 of its 16 pixels"),
        (Damage(deblur=50.0), "too coarse for the model"),
        (Damage(upscale=2), "has more detail than the model adds: it enlarges faces of 8 pixels to 16"),
        (Damage(upscale=3), "`upscale` must divide 16"),
        (Damage(inpaint=Image.new("L", (10, 10))), "must be of the size of the photo, 300x220 pixels, got 10x10"),
        (Damage(inpaint=Image.new("L", (300, 220))), "black everywhere"),
        (Damage(inpaint=Image.new("L", (300, 220), 255)), "but it is white everywhere"),
        (Damage(inpaint=a_mask(255, (1, 1, 299, 219))), "nothing of the face .* is left"),
        (Damage(inpaint=a_mask(160, (9, 9, 60, 60))), "must be black and white"),
        (Damage(inpaint=a_mask(255, (9, 9, 60, 60), "LA")), "`inpaint` must be opaque"),
        (Damage(inpaint=Image.linear_gradient("L").resize((300, 220))), "must be black and white"),
    ],
)
def test_photos_that_cannot_be_restored(restore, photo, damage, message):
    with pytest.raises(ValueError, match=message):
        restore_photo(restore, photo, damage, num_inference_steps=2, detector=object())


def test_photo_without_a_face(restore, detector):
    with pytest.raises(ValueError, match=r"`photo` \(90x80 pixels\) shows no face of at least 20 pixels"):
        restore_photo(restore, Image.new("RGB", (90, 80)), Damage(colorize=True), detector=detector)


def test_the_photo_is_searched_without_what_is_missing(restore, monkeypatch):
    """The detector sees the hole filled, and a large photo at a smaller size."""
    seen = []

    def find(photo, _):
        seen.append(photo)
        return [turned(128, 64, 640)]

    monkeypatch.setattr("ddpm_faces.data.photos.find_frames", find)
    photo = Image.new("RGB", (2560, 1280), (100, 120, 140))
    photo.paste((255, 0, 0), (1000, 400, 1100, 500))
    mask = a_mask(255, (990, 390, 1110, 510), size=photo.size)
    result = restore_photo(restore, photo, Damage(inpaint=mask), num_inference_steps=2, detector=object())
    assert seen[0].size == (1280, 640)
    assert np.abs(np.asarray(seen[0], dtype=int) - (100, 120, 140)).max() <= 8
    assert result.sides == [1280]


# Editing


@pytest.fixture
def edit(pipeline) -> DDPMFacesEditPipeline:
    edit = DDPMFacesEditPipeline.from_pipe(pipeline)
    edit.set_progress_bar_config(disable=True)
    return edit


def test_only_faces_are_edited(edit, photo, two_frames):
    result = edit_photo(edit, photo, method="noise", strength=0.8, num_inference_steps=3, detector=object())
    assert (result.sides, result.skipped) == ([pytest.approx(80), pytest.approx(100)], [])  # from the left
    assert [face.size for face in result.faces] == [(16, 16), (16, 16)]
    before, after, outside = np.asarray(photo), np.asarray(result.image), far_from(two_frames, (220, 300))
    assert (after[outside] == before[outside]).all()
    assert (after[~outside] != before[~outside]).mean() > 0.5


def test_chosen_faces_are_edited_alone(edit, photo, two_frames):
    arguments = {"method": "noise", "num_inference_steps": 2, "seed": 5, "detector": object()}
    (left, right) = two_frames[::-1]
    for chosen, other, number in ((left, right, 1), (right, left, 2)):
        result = edit_photo(edit, photo, faces=[number, number], **arguments)
        assert result.sides == [pytest.approx(chosen.side)]
        changed = np.asarray(result.image) != np.asarray(photo)
        assert changed[~far_from([chosen], (220, 300)) & far_from([other], (220, 300))].mean() > 0.5
        assert not changed[far_from([chosen], (220, 300))].any()
    for faces in ([0], [3], [], [True]):
        with pytest.raises(ValueError, match="`faces` must be integers from 1 to 2, the number of faces, got"):
            edit_photo(edit, photo, faces=faces, **arguments)


def test_a_photo_stays_where_nothing_is_to_change(edit, photo):
    """Inversion is exact, so without a prompt the photo stays, with details that the model does not know."""
    result = edit_photo(edit, photo, strength=0.4, num_inference_steps=12, detector=object())
    assert np.abs(np.asarray(result.image, dtype=int) - np.asarray(photo)).max() <= 2


def test_details_go_where_the_face_changes():
    """The left half changes and loses its stripes. The right half keeps them."""
    stripes = np.zeros((64, 64, 3), dtype=np.float32)
    stripes[::2] = 60
    canvas = _Canvas(Image.fromarray((stripes + 60).astype(np.uint8)))
    before = Image.new("RGB", (16, 16), (90, 90, 90))
    after = before.copy()
    after.paste((180, 180, 180), (0, 0, 8, 16))
    _put_edited(canvas, Frame((0.0, 0.0), (64.0, 0.0)), before, after)
    pixels = np.asarray(canvas.image, dtype=float)
    assert np.abs(pixels[12:52, 12:24] - 180).max() < 1
    assert np.abs(pixels[:, 48:] - stripes[:, 48:] - 60).max() < 1


def test_prompts_and_seeds_reach_each_face(photo, two_frames):
    edit = DDPMFacesEditPipeline.from_pipe(a_prompt_model())
    edit.set_progress_bar_config(disable=True)
    arguments = {"strength": 0.8, "num_inference_steps": 12, "detector": object()}
    result = edit_photo(edit, photo, prompt="an older man", source_prompt="a woman", guidance_scale=3.0, **arguments)
    cut = [frame.cut(photo, 16) for frame in two_frames[::-1]]
    del arguments["detector"]
    expected = edit(cut, "an older man", "a woman", guidance_scale=3.0, **arguments).images
    for face, other in zip(result.faces, expected, strict=True):
        assert np.array_equal(face, other)
    seeds = {"method": "noise", "num_inference_steps": 2, "detector": object()}
    first, second = (edit_photo(edit, photo, seed=seed, **seeds).faces for seed in (7, 8))
    (alone,) = edit_photo(edit, photo, faces=[2], seed=8, **seeds).faces
    assert np.array_equal(first[1], alone)  # its seed is 7 + 1
    assert not np.array_equal(first[1], second[1])


def test_classes_reach_each_face(photo):
    torch.manual_seed(0)
    edit = DDPMFacesEditPipeline(tiny_unet(num_class_embeds=3), DDPMFacesScheduler())
    edit.set_progress_bar_config(disable=True)
    arguments = {"strength": 0.5, "num_inference_steps": 10, "detector": object()}
    same = edit_photo(edit, photo, class_label=1, **arguments).faces
    other = edit_photo(edit, photo, class_label=2, source_class_label=1, **arguments).faces
    assert np.abs(np.asarray(same[0], dtype=int) - np.asarray(other[0])).max() > 2
    for name in ("class_label", "source_class_label"):
        with pytest.raises(ValueError, match=f"`{name}` must be 2 .* integers from 0 to 2"):
            edit_photo(edit, photo, **{"class_label": 1, name: 3}, **arguments)


def test_edit_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_prompt_model().save_pretrained("model")
    a_face().save("photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    command = ["edit", "model", "photo.png", "--aligned", "--steps", "12"]
    prompts = ["an older man", "--source-prompt", "a woman", "--strength", "0.4", "--guidance-scale", "2"]
    result = CliRunner().invoke(app, [*command, *prompts, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"file": "photo-edited.png", "sides": [128.0], "model_size": 16}
    assert (tmp_path / "photo.png").read_bytes() == before
    result = CliRunner().invoke(app, [*command, "-o", "varied.png"])  # without a prompt, at random
    assert "varied.png: 1 face of 128 pixels, edited at the size of the model, 16x16." in result.output
    assert (np.asarray(Image.open("varied.png")) != np.asarray(Image.open("photo-edited.png"))).any()
    for arguments, message in (
        (command, "exists"),
        ([*command, "-o", "photo.png", "--overwrite"], "must differ from the files that are read"),
        ([*command, "-o", "b.png", "--face", "2"], "`faces` must be integers from 1 to 1"),
        ([*command, "-o", "b.png", "--method", "magic"], "`method` must be one of 'inversion', 'noise'"),
        ([*command, "-o", "b.png", "--strength", "0"], "`strength` must be a number above 0"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert message in str(result.exception)


# Files


def test_result_is_saved_completely_or_not_at_all(tmp_path):
    source = tmp_path / "photo.png"
    a_face().save(source)
    (tmp_path / "other.png").write_bytes(b"mine")
    for path, message in (
        (source, "must differ from the files that are read"),
        (tmp_path / "other.png", "exists: choose another file"),
        (tmp_path / "result.xyz", "must end with the format"),
        (source / "result.png", "is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            save_photo(path, [source])
    save_photo(tmp_path / "other.png", [source], overwrite=True)(a_face())
    save_photo(tmp_path / "new" / "result.jpg", [source])(a_face())
    assert Image.open(tmp_path / "other.png").size == Image.open(tmp_path / "new/result.jpg").size == (128, 128)

    class Damaged(Image.Image):
        def save(self, *_args, **_kwargs):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_photo(tmp_path / "lost.png", [source])(Damaged())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other.png", "photo.png"]


def test_files_that_are_no_photos(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        open_photo(tmp_path / "text.png")
    with pytest.raises(ValueError, match="`inpaint` .* is not a file"):
        open_photo(tmp_path / "missing.png", "inpaint")


def test_command(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline.save_pretrained("model")
    a_face().save("photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    command = ["restore", "model", "photo.png", "--colorize", "--aligned", "--steps", "3"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told == {"file": "photo-restored.png", "sides": [128.0], "model_size": 16, "skipped": []}
    assert Image.open("photo-restored.png").size == (128, 128)
    assert (tmp_path / "photo.png").read_bytes() == before
    result = CliRunner().invoke(app, [*command, "--overwrite"])
    assert "photo-restored.png: 1 face of 128 pixels, restored at the size of the model, 16x16." in result.output
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ValueError)
    assert "exists" in str(result.exception)
    result = CliRunner().invoke(app, [*command, "-o", "photo.png", "--overwrite"])
    assert "must differ from the files that are read" in str(result.exception)


def test_model_must_be_square():
    tall = DDPMFacesRestorePipeline(tiny_unet(sample_size=(16, 8)), DDPMFacesScheduler())
    with pytest.raises(ValueError, match="must be of square images in color, got 8x16"):
        restore_photo(tall, a_face(), Damage(colorize=True), is_aligned=True)
    with pytest.raises(ValueError, match="must be of square images in color, got 8x16"):
        edit_photo(DDPMFacesEditPipeline.from_pipe(tall), a_face(), is_aligned=True)
