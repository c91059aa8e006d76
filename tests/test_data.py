import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from ddpm_faces.data import load_faces, picture_to_tensor, to_samples
from ddpm_faces.drawn_faces import draw_face


FFHQ = Path(__file__).parents[2] / "shared" / "data" / "ffhq-faces-128"


def noise_picture(seed: int = 0, size: tuple[int, int] = (24, 24), mode: str = "RGB") -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, len(mode)), dtype=np.uint8)
    return PILImage.fromarray(pixels.squeeze())


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    noise_picture(0).save(folder / "b" / "2.png")
    noise_picture(1).save(folder / "1.PNG")
    noise_picture(2).save(folder / "a.webp", lossless=True)
    (folder / "notes.txt").write_text("no picture")
    noise_picture(3).save(folder / ".hidden.png")
    return folder


def png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# Sources


def test_nothing_is_drawn_faces():
    dataset = load_faces(num_drawn_images=5, resolution=32)
    assert dataset.images.shape == (5, 3, 32, 32)
    assert dataset.images.dtype == torch.uint8
    np.testing.assert_array_equal(dataset[3]["images"].permute(1, 2, 0), draw_face(3, 32))


@pytest.mark.parametrize("argument", ["train_data_dir", "dataset_name"])
def test_folder_of_pictures(folder, argument):
    dataset = load_faces(**{argument: str(folder)}, resolution=24)
    expected = [np.asarray(noise_picture(seed)) for seed in (1, 2, 0)]  # files of a folder first, sorted
    np.testing.assert_array_equal(dataset.images.permute(0, 2, 3, 1), np.stack(expected))
    assert len(load_faces(train_data_dir=str(folder), resolution=24, max_images=2)) == 2


@pytest.mark.parametrize("image_column", [None, "face"])
def test_data_set_folder(tmp_path, image_column):
    pictures = [noise_picture(seed) for seed in range(3)]
    columns = {"caption": ["a", "b", "c"], "face": pictures}
    features = Features({"caption": Value("string"), "face": Image()})
    os.makedirs(tmp_path / "set" / "data")
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    dataset = load_faces(
        str(tmp_path / "set"), resolution=24, image_column=image_column, cache_dir=str(tmp_path / "c")
    )
    np.testing.assert_array_equal(dataset.images.permute(0, 2, 3, 1), np.stack(pictures))


@pytest.mark.skipif(not FFHQ.is_dir(), reason="the FFHQ subset is development data and not part of the project")
def test_real_faces(tmp_path):
    dataset = load_faces(str(FFHQ), resolution=64, split="test", max_images=50, cache_dir=str(tmp_path))
    assert dataset.images.shape == (50, 3, 64, 64)
    mean = to_samples(dataset.images).mean(dim=0)
    # Aligned faces: skin in the middle is redder and brighter than the corners of the picture.
    assert mean[0, 24:48, 24:40].mean() > mean[2, 24:48, 24:40].mean() + 0.2


# Pictures


def test_samples_are_minus_one_to_one_and_flips_are_exact():
    images = torch.stack([torch.zeros(3, 2, 4), torch.full((3, 2, 4), 255)]).to(torch.uint8)
    assert to_samples(images).unique().tolist() == [-1.0, 1.0]
    ramp = torch.arange(4, dtype=torch.uint8).expand(64, 1, 2, 4)
    flipped = to_samples(ramp, random_flip=True)
    is_mirrored = (flipped == to_samples(ramp).flip(-1)).all(dim=(1, 2, 3))
    is_same = (flipped == to_samples(ramp)).all(dim=(1, 2, 3))
    assert (is_mirrored ^ is_same).all()
    assert 16 < is_mirrored.sum() < 48


def test_picture_is_cropped_about_its_centre_and_not_stretched():
    image = PILImage.new("RGB", (60, 20), "black")
    image.paste("white", (20, 0, 40, 20))  # a white square in the middle of a wide picture
    assert picture_to_tensor(image, (10, 10)).min() > 230  # the filter reaches a little beyond the crop
    assert picture_to_tensor(image, (10, 30)).shape == (3, 10, 30)


def test_reducing_is_antialiased():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    reduced = picture_to_tensor(PILImage.fromarray(stripes), (16, 16)).float()
    assert (reduced - 127.5).abs().max() < 20


def test_camera_rotation_is_undone(tmp_path):
    image = PILImage.new("RGB", (20, 20), "black")
    image.paste("white", (0, 0, 20, 10))  # upper half white
    exif = PILImage.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = load_faces(train_data_dir=str(tmp_path), resolution=20).images[0, 0]
    assert pixels[:, 15].min() == 255
    assert pixels[:, 5].max() == 0


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels_and_modes(tmp_path, channels, mode):
    noise_picture().convert("P").save(tmp_path / "palette.png")
    noise_picture(mode="L").save(tmp_path / "grey.png")
    noise_picture(mode="RGBA").save(tmp_path / "transparent.png")
    assert load_faces(train_data_dir=str(tmp_path), resolution=24, channels=channels).images.shape[1] == channels


def test_sixteen_bit_grey_is_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    PILImage.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = load_faces(train_data_dir=str(tmp_path), resolution=16, channels=1).images
    np.testing.assert_allclose(pixels.flatten(), np.arange(256), atol=1)


# Bad input


def test_broken_pictures_are_all_named(folder):
    (folder / "cut.png").write_bytes((folder / "1.PNG").read_bytes()[:900])
    (folder / "empty.jpg").touch()
    (folder / "text.jpeg").write_text("not a picture")
    with pytest.raises(ValueError, match="3 of 6 pictures cannot be read") as error:
        load_faces(train_data_dir=str(folder), resolution=24)
    assert all(name in str(error.value) for name in ("cut.png", "empty.jpg", "text.jpeg"))
    assert "1.PNG" not in str(error.value)


def test_broken_row_is_named(tmp_path):
    rows = {"image": [{"bytes": png(noise_picture()), "path": None}, {"bytes": b"junk", "path": "x/17.png"}, None]}
    Dataset.from_dict(rows, Features({"image": Image()})).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"(?s)2 of 3 .*row 1 \(.*17.png\): cannot.*row 2: no picture"):
        load_faces(str(tmp_path), resolution=24, cache_dir=str(tmp_path / "c"))


def test_column_without_pictures(tmp_path):
    features = Features({"caption": Value("string"), "face": Image()})
    (tmp_path / "set").mkdir()
    rows = {"caption": ["a"], "face": [noise_picture()]}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match="'caption' of .* Columns with pictures: face; all columns: caption, face"):
        load_faces(str(tmp_path / "set"), image_column="caption", cache_dir=str(tmp_path / "c"))
    with pytest.raises(ValueError, match="'picture' of .* Columns with pictures: face"):
        load_faces(str(tmp_path / "set"), image_column="picture", cache_dir=str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_data_dir": "no/such/folder"}, "existing folder, got 'no/such/folder'"),
        ({"dataset_name": "./no_such_folder"}, "neither a folder nor a name on the Hub"),
        ({"dataset_name": "a", "train_data_dir": "b"}, "not both"),
        ({"channels": 2}, "one of 1, 3, 4, got 2"),
        ({"resolution": (8, 8, 8)}, "`resolution`"),
        ({"resolution": 0}, "`resolution`"),
        ({"max_images": 0}, "`max_images`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_faces(**arguments)


def test_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="holds no pictures"):
        load_faces(train_data_dir=str(tmp_path))
