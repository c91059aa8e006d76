import datasets
import numpy as np
import pytest
from PIL import Image

from ddpm_faces import DrawnFaces
from ddpm_faces.data import load_faces
from ddpm_faces.data.preparation import prepare


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for i in range(6):
            image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
            exif = Image.Exif()
            exif[0x010F] = "A camera"
            image.save(tmp_path / "pictures" / kind / f"{i}.jpg", exif=exif)
    return tmp_path / "pictures"


def test_load_dataset_and_training_read_the_same_images(pictures, tmp_path):
    result = prepare(
        str(pictures), tmp_path / "set", resolution=16, label_column="folder", num_test_images=2, license="mit",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    where = result.where
    assert result == (str(tmp_path / "set"), 12, None)
    expected = load_faces(
        train_data_dir=str(pictures), resolution=16, label_column="folder", cache_dir=str(tmp_path / "cache")
    )
    loaded = datasets.load_dataset(where, cache_dir=str(tmp_path / "hf"))
    assert {name: len(part) for name, part in loaded.items()} == {"train": 10, "test": 2}
    assert loaded["train"].features["label"].names == ["cats", "dogs"]
    streamed = list(datasets.load_dataset(where, split="train", streaming=True))
    assert [row["label"] for row in streamed] == loaded["train"]["label"][:]
    assert all(not row["image"].getexif() for row in streamed)
    pixels = {np.asarray(row["image"]).tobytes() for part in loaded.values() for row in part}
    assert pixels == {image.permute(1, 2, 0).numpy().tobytes() for image in expected.images}

    faces = load_faces(where, resolution=16, label_column="label", split="test", cache_dir=str(tmp_path / "cache"))
    assert len(faces) == 2
    assert "license: mit" in (tmp_path / "set" / "README.md").read_text()
    assert "A camera" not in "".join(p.read_bytes().decode("latin1") for p in (tmp_path / "set" / "data").iterdir())


def test_many_images_make_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_faces.data.preparation._MANY_IMAGES", 8)
    (tmp_path / "p").mkdir()
    for i in range(9):
        Image.new("L", (8, 8), i).save(tmp_path / "p" / f"{i}.png")
    prepare(str(tmp_path / "p"), tmp_path / "set", resolution=8, channels=1, cache_dir=str(tmp_path / "cache"))
    assert len(list((tmp_path / "set" / "data").glob("train-*-of-00008.parquet"))) == 8
    loaded = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "hf"))
    assert [row["image"].getpixel((0, 0)) for row in loaded] == list(range(9))


@pytest.fixture
def photos(tmp_path):
    """Photos of one person each, of two people, of nobody, and a damaged file, in the folders of two classes."""
    faces = [DrawnFaces(10, resolution=128, seed=0)[index]["image"] for index in (3, 9)]
    for name in ("cats/one.png", "cats/two.png", "dogs/nobody.png", "dogs/three.png"):
        photo = Image.new("RGB", (400, 200), (128, 128, 128))
        if "nobody" not in name:
            photo.paste(faces[0], (20, 30))
        if "two" in name:
            photo.paste(faces[1].resize((160, 160)), (220, 10))
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path)
    (tmp_path / "photos/dogs/damaged.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_faces_are_found_in_photos(photos, tmp_path):
    cache = str(tmp_path / "cache")
    result = prepare(str(photos), tmp_path / "set", resolution=64, label_column="folder", cache_dir=cache, align=True)
    found = result.aligner
    assert (result.num_images, found.num_photos, found.num_faces) == (4, 5, 4)
    reasons = sorted(line.removeprefix(str(photos) + "/") for line in found.skipped)
    assert reasons[0].startswith("dogs/damaged.png: cannot identify image file")
    assert reasons[1:] == ["dogs/nobody.png: no face"]
    rows = datasets.load_dataset(result.where, split="train", cache_dir=str(tmp_path / "hf"))
    assert [rows.features["label"].names[label] for label in rows["label"]] == ["cats", "cats", "cats", "dogs"]
    assert all(row["image"].size == (64, 64) for row in rows)
    # The same person in three photos looks the same, and the other person is the largest of the second photo.
    pixels = np.stack([np.asarray(row["image"], dtype=float) for row in rows])
    assert np.abs(pixels[0] - pixels[2]).mean() < 3 > np.abs(pixels[0] - pixels[3]).mean()
    assert np.abs(pixels[0] - pixels[1]).mean() > 10
    card = (tmp_path / "set" / "README.md").read_text()
    assert "each found in a photo and cut out as in FFHQ" in card
    assert "- Photos: 5, with 4 faces" in card


def test_faces_that_are_too_small_are_skipped(photos, tmp_path):
    with pytest.raises(ValueError, match=r"No face of 512 pixels or more was found:\n.*a face of \d+ pixels"):
        prepare(str(photos), tmp_path / "set", resolution=512, cache_dir=str(tmp_path / "cache"), align=True)
    assert not (tmp_path / "set").exists()
    with pytest.raises(ValueError, match="`resolution` of aligned faces must be square, got 32x64"):
        prepare(str(photos), tmp_path / "set", resolution=(32, 64), cache_dir=str(tmp_path / "cache"), align=True)


def test_bad_input(pictures, tmp_path):
    with pytest.raises(ValueError, match="either `output` or `push`"):
        prepare(str(pictures))
    with pytest.raises(ValueError, match="`num_test_images` must be from 0 to 11, got 12"):
        prepare(str(pictures), tmp_path / "set", num_test_images=12, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="`num_test_images` must be at least 0, got -1"):
        prepare("no/such/set", tmp_path / "set", num_test_images=-1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        prepare(str(pictures), tmp_path / "full", cache_dir=str(tmp_path / "cache"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "set").exists()
