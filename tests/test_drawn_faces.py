"""Tests of the properties of drawn faces that training relies on."""

import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from ddpm_faces.data.drawn_faces import BEARDS, GLASSES, HAIR_STYLES, MOUTHS, DrawnFaces, draw_face, face_attributes


def pixels(image):
    return np.asarray(image, dtype=np.float32) / 255


def test_attributes_are_pinned():
    assert face_attributes(7) == {
        "skin": "olive",
        "hair_color": "brown",
        "hair_style": "bun",
        "eye_color": "brown",
        "mouth": "smile",
        "glasses": "none",
        "beard": "none",
        "lipstick": "none",
        "clothes": "shirt",
        "clothes_color": "red",
        "background": "sand",
    }
    first = json.dumps([face_attributes(index) for index in range(200)])
    assert hashlib.sha256(first.encode()).hexdigest().startswith("c4d17861b1b93472")


def test_colours_are_pinned():
    mean = np.mean([np.asarray(draw_face(index, 32)) for index in range(100)], axis=(0, 1, 2))
    assert mean == pytest.approx([172.43, 154.59, 146.49], abs=0.2)


def test_same_face_in_a_fresh_process_and_in_any_order():
    script = (
        "import hashlib; from ddpm_faces.data.drawn_faces import draw_face; "
        "print(hashlib.sha256(draw_face(7, 32).tobytes()).hexdigest())"
    )
    fresh = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    backwards = [face["image"].tobytes() for face in reversed(DrawnFaces(8, resolution=32))]
    assert hashlib.sha256(backwards[0]).hexdigest() == fresh
    assert backwards == [DrawnFaces(100, resolution=32)[i]["image"].tobytes() for i in range(7, -1, -1)]


def test_faces_differ_by_index_and_seed():
    drawn = {draw_face(index, 32, seed).tobytes() for index in range(50) for seed in range(2)}
    assert len(drawn) == 100


@pytest.mark.parametrize("resolution", [8, 31, 32, 64, 128, 300])
def test_size_and_mode(resolution):
    image = draw_face(0, resolution)
    assert image.size == (resolution, resolution)
    assert image.mode == "RGB"


@pytest.mark.parametrize("index", range(8))
def test_image_does_not_depend_on_resolution(index):
    small, reduced = draw_face(index, 32), draw_face(index, 128).reduce(4)
    other = draw_face(index + 1, 32)
    assert np.abs(pixels(small) - pixels(reduced)).mean() < 0.01
    assert np.abs(pixels(small) - pixels(other)).mean() > 0.05


def test_every_value_occurs_early():
    seen = {}
    for index in range(500):
        for name, value in face_attributes(index).items():
            seen.setdefault(name, set()).add(value)
    assert {name: len(values) for name, values in seen.items()} == {
        "skin": 6,
        "hair_color": 6,
        "hair_style": 12,
        "eye_color": 4,
        "mouth": 5,
        "glasses": 4,
        "beard": 5,
        "lipstick": 3,
        "clothes": 3,
        "clothes_color": 7,
        "background": 6,
    }


def test_caption_contains_the_attributes():
    for face in DrawnFaces(300, resolution=8):
        caption = face["caption"]
        assert caption.startswith(f"a {MOUTHS[face['mouth']]} face with ")
        assert HAIR_STYLES[face["hair_style"]].format(face["hair_color"]) in caption
        for name, words in (("glasses", GLASSES), ("beard", BEARDS)):
            mentioned = [value for value, phrase in words.items() if phrase in caption]
            assert mentioned == [value for value in [face[name]] if value != "none"]


def test_example_holds_image_caption_and_plain_attributes():
    example = DrawnFaces(3, resolution=16, seed=5)[2]
    image, caption = example.pop("image"), example.pop("caption")
    assert image == draw_face(2, 16, seed=5)
    assert isinstance(caption, str)
    assert json.loads(json.dumps(example)) == face_attributes(2, seed=5)


def test_glasses_change_the_eyes_and_little_else(monkeypatch):
    attributes = face_attributes(0)

    def drawn(glasses):
        monkeypatch.setattr(
            "ddpm_faces.data.drawn_faces.face_attributes", lambda *_: {**attributes, "glasses": glasses}
        )
        return pixels(draw_face(0, 64))

    bare = drawn("none")
    for glasses in GLASSES:
        change = np.abs(drawn(glasses) - bare).mean(axis=-1)
        assert change[26:37, 17:47].mean() > 0.05
        assert change[:20].max() == 0
        assert change[42:].max() == 0


def test_faces_are_centred():
    mean = np.mean([pixels(draw_face(index, 32)) for index in range(200)], axis=0)
    brightness = mean.mean(axis=-1)
    left, right = brightness[15:17, 11:13].mean(), brightness[15:17, 19:21].mean()
    cheek = brightness[20:22, 13:19].mean()
    assert max(left, right) < cheek


def test_sequence_protocol():
    faces = DrawnFaces(5, resolution=16)
    assert len(faces) == len(list(faces)) == 5
    assert faces[-1] == faces[4] == faces[np.int64(4)]
    assert faces[1:4:2] == [faces[1], faces[3]]
    for index in (5, -6):
        with pytest.raises(IndexError):
            faces[index]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_face(-1), "`index` must be an integer of at least 0, got -1"),
        (lambda: draw_face(0, resolution=7), "`resolution` must be an integer of at least 8, got 7"),
        (lambda: draw_face(0, resolution=32.0), "`resolution` must be an integer of at least 8, got 32.0"),
        (lambda: face_attributes(0, seed="a"), "`seed` must be an integer of at least 0, got 'a'"),
        (lambda: DrawnFaces(num_images=0), "`num_images` must be an integer of at least 1, got 0"),
        (lambda: DrawnFaces(resolution=True), "`resolution` must be an integer of at least 8, got True"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_global_random_state_is_unchanged():
    before = random.getstate()
    draw_face(3, 16)
    assert random.getstate() == before
