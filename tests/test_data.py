import io
import logging
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps

from ddpm_faces.data import (
    FaceDataset,
    hold_out,
    load_faces,
    picture_to_tensor,
    random_crop,
    resize_to_cover,
    to_samples,
)
from ddpm_faces.data import cache as data
from ddpm_faces.data.drawn_faces import draw_face, face_attributes


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


def test_default_source_is_drawn_faces():
    dataset = load_faces(num_drawn_images=5, resolution=32)
    assert dataset.images.shape == (5, 3, 32, 32)
    assert dataset.images.dtype == torch.uint8
    np.testing.assert_array_equal(dataset[3]["images"].permute(1, 2, 0), draw_face(3, 32))


@pytest.mark.parametrize("argument", ["train_data_dir", "dataset_name"])
def test_folder_of_images(folder, argument):
    dataset = load_faces(**{argument: str(folder)}, resolution=24)
    expected = [np.asarray(noise_picture(seed)) for seed in (1, 2, 0)]  # files of a folder first, sorted
    np.testing.assert_array_equal(dataset.images.permute(0, 2, 3, 1), np.stack(expected))
    assert len(load_faces(train_data_dir=str(folder), resolution=24, max_images=2)) == 2


@pytest.mark.parametrize("image_column", [None, "face"])
def test_dataset_folder(tmp_path, image_column):
    pictures = [noise_picture(seed) for seed in range(3)]
    columns = {"caption": ["a", "b", "c"], "face": pictures}
    features = Features({"caption": Value("string"), "face": Image()})
    os.makedirs(tmp_path / "set" / "data")
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    dataset = load_faces(
        str(tmp_path / "set"), resolution=24, image_column=image_column, cache_dir=str(tmp_path / "c")
    )
    np.testing.assert_array_equal(dataset.images.permute(0, 2, 3, 1), np.stack(pictures))


@pytest.mark.parametrize("split", ["", "train[:5", "train[:200%]"])
def test_a_split_that_cannot_be_read_is_named(tmp_path, split):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train-00000-of-00001.parquet").touch()
    with pytest.raises(ValueError, match=rf"`split` must be .* got {re.escape(repr(split))}"):
        load_faces(str(tmp_path / "set"), split=split, cache_dir=str(tmp_path / "c"))


@pytest.mark.skipif(not FFHQ.is_dir(), reason="the FFHQ subset is development data and not part of the project")
def test_real_faces(tmp_path):
    dataset = load_faces(str(FFHQ), resolution=64, split="test", max_images=50, cache_dir=str(tmp_path))
    assert dataset.images.shape == (50, 3, 64, 64)
    mean = to_samples(dataset.images).mean(dim=0)
    # Aligned faces: skin in the middle is redder and brighter than the corners of the image.
    assert mean[0, 24:48, 24:40].mean() > mean[2, 24:48, 24:40].mean() + 0.2


# Images


def test_samples_are_minus_one_to_one_and_flips_are_exact():
    images = torch.stack([torch.zeros(3, 2, 4), torch.full((3, 2, 4), 255)]).to(torch.uint8)
    assert to_samples(images).unique().tolist() == [-1.0, 1.0]
    ramp = torch.arange(4, dtype=torch.uint8).expand(64, 1, 2, 4)
    flips = torch.arange(64) % 3 == 0
    flipped = to_samples(ramp, flips)
    assert torch.equal(flipped[flips], to_samples(ramp)[flips].flip(-1))
    assert torch.equal(flipped[~flips], to_samples(ramp)[~flips])


def test_image_is_center_cropped_and_not_stretched():
    image = PILImage.new("RGB", (60, 20), "black")
    image.paste("white", (20, 0, 40, 20))  # a white square in the middle of a wide image
    assert picture_to_tensor(image, (10, 10)).min() > 230  # the filter reaches a little beyond the crop
    assert picture_to_tensor(image, (10, 30)).shape == (3, 10, 30)


def test_downscaling_is_antialiased():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    reduced = picture_to_tensor(PILImage.fromarray(stripes), (16, 16)).float()
    assert (reduced - 127.5).abs().max() < 20


def test_camera_rotation_is_undone(tmp_path):
    image = PILImage.new("RGB", (20, 20), "black")
    image.paste("white", (0, 0, 20, 10))  # upper half white
    exif = PILImage.Exif()
    exif[0x0112] = 6  # the camera was rotated: show the image rotated by 90 degrees clockwise
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


def test_sixteen_bit_colours_are_scaled():
    pixels = np.random.default_rng(0).integers(0, 65536, (4, 5, 3))
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)  # PIL cannot write such a file
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    decoded = picture_to_tensor(PILImage.open(io.BytesIO(file)), (4, 5)).permute(1, 2, 0)
    np.testing.assert_allclose(decoded, pixels / 257, atol=1)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((8, 8), 0.5, dtype=np.float32), "floating-point"),
        (np.full((8, 8), 70_000, dtype=np.int32), "beyond 16 bits"),
        (np.full((8, 8), -1, dtype=np.int32), "beyond 16 bits"),
    ],
)
def test_pixels_of_unknown_range_are_unreadable(tmp_path, pixels, message):
    PILImage.fromarray(pixels).save(tmp_path / "measured.tiff")
    with pytest.raises(ValueError, match=f"measured.tiff: .*{message}"):
        load_faces(train_data_dir=str(tmp_path), resolution=8)


def test_cmyk_is_converted_to_rgb():
    cyan = PILImage.new("CMYK", (8, 8), (255, 0, 0, 0))
    for kind in ("JPEG", "TIFF"):
        buffer = io.BytesIO()
        cyan.save(buffer, kind)
        red, green, blue = picture_to_tensor(PILImage.open(buffer), (8, 8)).float().mean(dim=(1, 2))
        assert red < 5
        assert min(green, blue) > 250


def test_first_frame_of_an_animation(tmp_path):
    frames = [PILImage.new("RGB", (8, 8), color) for color in ("blue", "red")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    images = load_faces(train_data_dir=str(tmp_path), resolution=8).images
    assert images.shape == (1, 3, 8, 8)
    assert images[0, :, 4, 4].tolist() == [0, 0, 255]


# Bad input


def test_all_unreadable_images_are_named(folder):
    (folder / "cut.png").write_bytes((folder / "1.PNG").read_bytes()[:900])
    (folder / "empty.jpg").touch()
    (folder / "text.jpeg").write_text("not a picture")
    with pytest.raises(ValueError, match="3 of 6 images cannot be read") as error:
        load_faces(train_data_dir=str(folder), resolution=24)
    assert all(name in str(error.value) for name in ("cut.png", "empty.jpg", "text.jpeg"))
    assert "1.PNG" not in str(error.value)
    assert "Set `skip_unreadable` to skip such images" in str(error.value)


def test_broken_link_is_named(folder):
    (folder / "lost.png").symlink_to(folder / "gone.png")
    with pytest.raises(ValueError, match="(?s)1 of 4 images cannot be read.*lost.png: .*No such file"):
        load_faces(train_data_dir=str(folder), resolution=24)


def test_unreadable_row_is_named(tmp_path):
    rows = {"image": [{"bytes": png(noise_picture()), "path": None}, {"bytes": b"junk", "path": "x/17.png"}, None]}
    Dataset.from_dict(rows, Features({"image": Image()})).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"(?s)2 of 3 .*row 1 \(.*17.png\): cannot.*row 2: the image is missing"):
        load_faces(str(tmp_path), resolution=24, cache_dir=str(tmp_path / "c"))


def test_column_without_images(tmp_path):
    features = Features({"caption": Value("string"), "face": Image()})
    (tmp_path / "set").mkdir()
    rows = {"caption": ["a"], "face": [noise_picture()]}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match="'caption' of .* Columns with images: face; all columns: caption, face"):
        load_faces(str(tmp_path / "set"), image_column="caption", cache_dir=str(tmp_path / "c"))
    with pytest.raises(ValueError, match="'picture' of .* Columns with images: face"):
        load_faces(str(tmp_path / "set"), image_column="picture", cache_dir=str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_data_dir": "no/such/folder"}, "existing folder, got 'no/such/folder'"),
        *(
            ({"dataset_name": name}, "`dataset_name` must be an existing folder or a dataset on the Hub, got")
            for name in (
                "./no_such_folder",
                "/no/folder",
                "~/none",
                "a/b/c",
                "no folder",
                r"C:\faces",
                "Fotos/Ärger",
                "",
            )
        ),
        ({"train_data_dir": ""}, "`train_data_dir` must be an existing folder, got ''"),
        ({"dataset_name": "a", "train_data_dir": "b"}, "not both"),
        ({"channels": 2}, "one of 1, 3, 4, got 2"),
        ({"resolution": (8, 8, 8)}, "`resolution`"),
        ({"resolution": 0}, "`resolution`"),
        ({"max_images": 0}, "`max_images`"),
        ({"crop": "left"}, "`crop` must be one of 'center', 'random', got 'left'"),
        ({"label_column": "age"}, "must be an attribute of drawn faces: .*hair"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_faces(**arguments)


def test_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="contains no images"):
        load_faces(train_data_dir=str(tmp_path))


# The cache


def files_of(cache_dir: Path) -> list[Path]:
    return sorted(path for path in cache_dir.iterdir() if path.is_dir())


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("decoded again")

    return lambda: monkeypatch.setattr(data, "picture_to_tensor", refuse)


def test_images_are_decoded_once(folder, tmp_path, no_decoding):
    settings = {"train_data_dir": str(folder), "resolution": 24, "cache_dir": str(tmp_path / "cache")}
    first = load_faces(**settings)
    no_decoding()
    second = load_faces(**settings)
    assert torch.equal(first.images, second.images)
    assert first.fingerprint == second.fingerprint
    assert second.names([2, 0]) == [str(folder / "b" / "2.png"), str(folder / "1.PNG")]
    assert len(files_of(tmp_path / "cache")) == 1


def test_existing_cache_is_opened_without_writing(folder, tmp_path, monkeypatch):
    settings = {"train_data_dir": str(folder), "resolution": 24, "cache_dir": str(tmp_path / "cache")}
    first = load_faces(**settings)
    monkeypatch.setattr(data, "FileLock", None)
    assert torch.equal(load_faces(**settings).images, first.images)


def test_chunks_are_in_order(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 2)
    for number in range(5):
        noise_picture(10 + number).save(folder / f"z{number}.png")
    images = load_faces(train_data_dir=str(folder), resolution=24, cache_dir=str(tmp_path / "cache")).images
    expected = [np.asarray(noise_picture(seed)) for seed in (1, 2, 10, 11, 12, 13, 14, 0)]
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1), np.stack(expected))


def test_images_are_mapped_and_the_file_never_changes(folder, tmp_path):
    settings = {"train_data_dir": str(folder), "resolution": 24, "cache_dir": str(tmp_path / "cache")}
    images = load_faces(**settings).images
    (pixels,) = (tmp_path / "cache").glob("*/pixels.bin")
    before = pixels.read_bytes()
    assert before == images.numpy().tobytes()
    images.zero_()
    assert pixels.read_bytes() == before
    assert load_faces(**settings).images.any()


def test_another_file_or_setting_makes_another_cache(folder, tmp_path):
    settings = {"train_data_dir": str(folder), "resolution": 24, "cache_dir": str(tmp_path / "cache")}
    load_faces(**settings)
    noise_picture(9).save(folder / "1.PNG")
    assert torch.equal(load_faces(**settings).images[0].permute(1, 2, 0), torch.tensor(np.array(noise_picture(9))))
    changes = ("resolution", 8), ("channels", 1), ("crop", "random"), ("max_images", 2), ("skip_unreadable", True)
    for number, (name, value) in enumerate(changes, 3):
        load_faces(**{**settings, name: value})
        assert len(files_of(tmp_path / "cache")) == number


def test_another_dataset_or_column_makes_another_cache(tmp_path):
    def write(seeds: list[int]) -> None:
        columns = {"image": [noise_picture(seed) for seed in seeds], "age": [30, 20], "sex": ["f", "m"]}
        features = Features({"image": Image(), "age": Value("int64"), "sex": Value("string")})
        Dataset.from_dict(columns, features).to_parquet(tmp_path / "set" / "train.parquet")

    (tmp_path / "set").mkdir()
    write([0, 1])
    settings = {"dataset_name": str(tmp_path / "set"), "resolution": 24, "cache_dir": str(tmp_path / "c")}
    assert load_faces(**settings).labels is None
    assert load_faces(**settings, label_column="age").labels.tolist() == [1, 0]
    assert load_faces(**settings, label_column="sex").labels.tolist() == [0, 1]
    write([5, 6])
    expected = np.stack([noise_picture(5), noise_picture(6)])
    np.testing.assert_array_equal(load_faces(**settings).images.permute(0, 2, 3, 1), expected)


def test_damaged_cache_is_rebuilt(folder, tmp_path):
    settings = {"train_data_dir": str(folder), "resolution": 24, "cache_dir": str(tmp_path / "cache")}
    expected = load_faces(**settings).images.clone()
    for name in ("pixels.bin", "table.npy", "names.json", "info.json"):
        path = files_of(tmp_path / "cache")[0] / name
        for damaged in (path.read_bytes()[:-10], b"", None):
            path.write_bytes(damaged) if damaged is not None else path.unlink()
            assert torch.equal(load_faces(**settings).images, expected)
            assert path.stat().st_size > 10


def test_interrupted_caching_leaves_no_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data.np, "save", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        load_faces(train_data_dir=str(folder), resolution=24, cache_dir=str(tmp_path / "cache"))
    assert files_of(tmp_path / "cache") == []


def test_disk_full_while_caching(folder, tmp_path):
    """A limit on the size of files has the same effect as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = {"train_data_dir": str(folder), "resolution": 512, "cache_dir": str(tmp_path / "cache")}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            load_faces(**settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(tmp_path / "cache") == []
    assert len(load_faces(**settings)) == 3


def test_disk_without_enough_space(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3 * 3 * 24 * 24 - 1})())
    with pytest.raises(ValueError, match="`cache_dir` .* has 5,183 bytes free, and the decoded images need 5,184"):
        load_faces(train_data_dir=str(folder), resolution=24, cache_dir=str(tmp_path / "cache"))


def test_processes_share_the_work(folder, tmp_path):
    """Two processes start with an empty cache: one decodes (its progress bar shows this), the other waits."""
    code = f"from ddpm_faces.data import load_faces; print(load_faces(train_data_dir={str(folder)!r}, resolution=24, "
    code += f"cache_dir={str(tmp_path / 'cache')!r}).fingerprint)"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert outputs[0][0] == outputs[1][0] != b""
    assert sum(b"Reading images" in errors for _, errors in outputs) == 1


@pytest.mark.parametrize("crop", ["center", "random"])
def test_dataset_can_be_pickled_for_workers(folder, crop):
    for number in range(40):
        shutil.copy(folder / "1.PNG", folder / f"z{number}.png")
    dataset = load_faces(train_data_dir=str(folder), resolution=(24, 20), crop=crop).subset([2, 0])
    message = pickle.dumps(dataset)
    assert len(message) < 2000
    crops = np.array([[0.1, 0.7], [0.9, 0.2]])
    copy = pickle.loads(message)
    assert torch.equal(copy.fetch(np.arange(2), crops)["images"], dataset.fetch(np.arange(2), crops)["images"])
    assert copy.fingerprint == dataset.fingerprint
    assert copy.names([1]) == dataset.names([1]) == [str(folder / "1.PNG")]


def test_fingerprint_depends_on_the_content(folder, tmp_path):
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other)
    datasets = [load_faces(train_data_dir=str(path), resolution=24) for path in (folder, other)]
    assert datasets[0].fingerprint == datasets[1].fingerprint == FaceDataset(datasets[0].images).fingerprint
    noise_picture(9).save(other / "1.PNG")
    assert load_faces(train_data_dir=str(other), resolution=24).fingerprint != datasets[0].fingerprint
    assert datasets[0].subset([0, 1]).fingerprint != datasets[0].subset([1, 0]).fingerprint
    assert datasets[0].subset([2, 0]).fingerprint == FaceDataset(datasets[0].images[[2, 0]]).fingerprint


def test_fingerprint_depends_on_shapes_and_labels():
    images = torch.zeros(2, 1, 4, 6, dtype=torch.uint8)
    fingerprints = {
        FaceDataset(images).fingerprint,
        FaceDataset(images.view(2, 1, 6, 4)).fingerprint,
        FaceDataset(images, labels=torch.tensor([0, 1])).fingerprint,
        FaceDataset(images, labels=torch.tensor([1, 0])).fingerprint,
    }
    assert len(fingerprints) == 4


@pytest.mark.parametrize("subset", [[0, 1, 2], [2], [1, 0]])
def test_channel_statistics_are_those_of_the_samples(folder, subset):
    PILImage.new("RGB", (24, 24), (0, 128, 255)).save(folder / "1.PNG")
    dataset = load_faces(train_data_dir=str(folder), resolution=24).subset(subset)
    samples = to_samples(dataset.images).double().transpose(0, 1).flatten(1)
    mean, deviation = dataset.channel_statistics()
    torch.testing.assert_close(mean.double(), samples.mean(dim=1))
    torch.testing.assert_close(deviation.double(), samples.std(dim=1, correction=0))


# Held-out images, crops, classes


def numbered(numbers) -> FaceDataset:
    """Images whose pixels say which one it is, of 16 bits."""
    numbers = np.asarray(list(numbers), dtype=np.uint16)
    return FaceDataset(torch.from_numpy(numbers.view(np.uint8).copy()).view(-1, 1, 1, 2))


def numbers_of(dataset: FaceDataset) -> list[int]:
    return dataset.images.contiguous().numpy().view(np.uint16).flatten().tolist()


def test_held_out_images_depend_only_on_the_content():
    rest, held_out = (numbers_of(part) for part in hold_out(numbered(range(50)), 7))
    assert sorted(rest + held_out) == list(range(50))
    assert (len(rest), len(held_out)) == (43, 7)
    assert (rest, held_out) == (sorted(rest), sorted(held_out))  # in their order
    assert held_out != list(range(7))
    shuffled = np.random.default_rng(0).permutation(50)
    assert set(numbers_of(hold_out(numbered(shuffled), 7)[1])) == set(held_out)
    assert set(numbers_of(hold_out(numbered(range(50)), 8)[1])) > set(held_out)
    assert hold_out(numbered(range(50)), 7)[0].names([0]) == [f"image {rest[0]}"]
    for wrong in (50, -1):
        with pytest.raises(ValueError, match=f"from 0 to 49, got {wrong}"):
            hold_out(numbered(range(50)), wrong)


def test_images_that_were_trained_on_are_never_held_out_as_a_folder_grows():
    rng = np.random.default_rng(0)
    pool = rng.permutation(5000)
    have, trained, held_before = list(pool[:300]), set(), None
    for grown in (300, 310, 700, 5000):
        new = set(pool[len(have) : grown].tolist())
        have = rng.permutation(pool[:grown]).tolist()  # the names of new files sort between the old ones
        rest, held_out = (set(numbers_of(part)) for part in hold_out(numbered(have), 40))
        assert len(held_out) == 40
        assert not held_out & trained
        if held_before is not None:
            assert held_out <= held_before | new
        trained, held_before = trained | rest, held_out
    assert held_out & set(pool[300:].tolist())  # and some new images are held out


@pytest.mark.parametrize("copies", [2, 5, 60])
def test_duplicates_are_held_out_together(copies):
    have = [*range(50), *range(10), *[7] * copies, *[30] * copies]
    for num_images in (1, 10, 49):
        rest, held_out = (numbers_of(part) for part in hold_out(numbered(have), num_images))
        assert len(set(held_out)) == num_images
        assert not set(rest) & set(held_out)
        assert sorted(rest + held_out) == sorted(have)
    # A copy that comes later changes nothing.
    before = set(numbers_of(hold_out(numbered(range(50)), 10)[1]))
    assert set(numbers_of(hold_out(numbered(have), 10)[1])) == before
    with pytest.raises(ValueError, match="from 0 to 0, got 1: there are 1 distinct images"):
        hold_out(numbered([3] * 20), 1)


def test_random_crops_cover_the_whole_image(tmp_path):
    ramp = np.tile(np.arange(30, dtype=np.uint8), (10, 1))
    PILImage.fromarray(ramp).save(tmp_path / "wide.png")
    dataset = load_faces(train_data_dir=str(tmp_path), resolution=10, channels=1, crop="random")
    crops = np.stack([np.zeros(21), np.arange(21) / 21], axis=1)
    images = dataset.fetch(np.zeros(21, dtype=int), crops)["images"]
    assert images.shape == (21, 1, 10, 10)
    assert images[:, 0, 0, 0].tolist() == list(range(21))
    assert dataset[0]["images"][0, 0, 0] == 10  # the centre
    with pytest.raises(ValueError, match="use `fetch`"):
        _ = dataset.images
    mean, deviation = dataset.channel_statistics()  # of all pixels, regardless of the crops
    np.testing.assert_allclose([mean[0], deviation[0]], [ramp.mean() / 127.5 - 1, ramp.std() / 127.5], rtol=1e-5)
    without_room = load_faces(train_data_dir=str(tmp_path), resolution=(10, 30), channels=1, crop="random")
    np.testing.assert_array_equal(without_room.images[0, 0], ramp)


@pytest.mark.parametrize(("size", "shape"), [((10, 10), (10, 30)), ((20, 10), (20, 60)), ((4, 60), (20, 60))])
def test_resizing_covers_without_stretching(size, shape):
    pixels = resize_to_cover(noise_picture(size=(20, 60)), size)
    assert pixels.shape == (3, *shape)
    assert random_crop(pixels, size, (0.99, 0.99)).shape == (3, *size)


def test_subfolders_are_classes(tmp_path):
    for number, name in enumerate(("dogs", "cats", "dogs/puppies")):
        (tmp_path / name).mkdir(parents=True)
        noise_picture(number).save(tmp_path / name / f"{number}.png")
    dataset = load_faces(train_data_dir=str(tmp_path), resolution=8, label_column="folder")
    assert dataset.class_names == ["cats", "dogs"]
    assert dataset.labels.tolist() == [0, 1, 1]
    assert dataset.subset([2, 0]).labels.tolist() == [1, 0]
    assert dataset[0]["labels"] == 0
    noise_picture().save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="stray.png is in none"):
        load_faces(train_data_dir=str(tmp_path), resolution=8, label_column="folder")
    with pytest.raises(ValueError, match="must be 'folder' or None, got 'kind'"):
        load_faces(train_data_dir=str(tmp_path), resolution=8, label_column="kind")


@pytest.mark.parametrize(
    ("feature", "values", "labels", "names"),
    [
        (ClassLabel(names=["young", "old", "ageless"]), [1, 0, 1], [1, 0, 1], ["young", "old", "ageless"]),
        (Value("string"), ["old", "young", "old"], [0, 1, 0], ["old", "young"]),
        (Value("int64"), [7, 3, 7], [1, 0, 1], ["3", "7"]),
        (Value("bool"), [True, False, True], [1, 0, 1], ["False", "True"]),
    ],
)
def test_columns_of_classes(tmp_path, feature, values, labels, names):
    rows = {"image": [noise_picture(seed) for seed in range(3)], "kind": values}
    (tmp_path / "set").mkdir()
    columns = Features({"image": Image(), "kind": feature})
    Dataset.from_dict(rows, columns).to_parquet(tmp_path / "set" / "train.parquet")
    settings = {"resolution": 8, "cache_dir": str(tmp_path / "c")}
    dataset = load_faces(str(tmp_path / "set"), label_column="kind", **settings)
    assert dataset.labels.tolist() == labels
    assert dataset.class_names == names
    first = load_faces(str(tmp_path / "set"), label_column="kind", max_images=1, **settings)
    assert (first.labels.tolist(), first.class_names) == (labels[:1], names)  # those of all images


@pytest.mark.parametrize("column", ["age", "image", "score", "places"])
def test_columns_without_classes_are_refused(tmp_path, column):
    columns = {"image": Image(), "kind": Value("string"), "score": Value("float32"), "places": [Value("int64")]}
    rows = {"image": [noise_picture()], "kind": ["a"], "score": [0.5], "places": [[1, 2]]}
    Dataset.from_dict(rows, Features(columns)).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=f"`label_column` '{column}' .* Columns that may: kind\\."):
        load_faces(str(tmp_path), label_column=column, resolution=8, cache_dir=str(tmp_path / "c"))


def test_classes_are_numbered_as_in_another_dataset():
    dataset = FaceDataset(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), labels=torch.tensor([0, 1, 0]))
    dataset.class_names = ["cats", "dogs"]
    relabelled = dataset.subset([2, 1]).relabelled(["bees", "cats", "dogs"])
    assert relabelled.labels.tolist() == [1, 2]
    assert dataset.labels.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="Classes cats are not among the training classes"):
        dataset.relabelled(["bees", "dogs"])
    assert dataset.subset([1]).relabelled(["bees", "dogs"]).labels.tolist() == [1]  # the class cat does not exist


def test_drawn_faces_have_classes():
    dataset = load_faces(num_drawn_images=20, resolution=16, label_column="mouth")
    expected = [face_attributes(index)["mouth"] for index in range(20)]
    assert [dataset.class_names[label] for label in dataset.labels] == expected


# Unreadable images


def test_unreadable_images_are_skipped_and_listed(folder, caplog):
    (folder / "cut.png").write_bytes((folder / "1.PNG").read_bytes()[:900])
    for _ in range(2):  # from the files, and from the cache
        dataset = load_faces(train_data_dir=str(folder), resolution=24, skip_unreadable=True)
        assert len(dataset) == 3
        assert len(dataset.unreadable) == 1
        assert "cut.png: " in dataset.unreadable[0]
        assert "cut.png" in caplog.text
        caplog.clear()


def test_log_names_at_most_ten_unreadable_images(folder, caplog):
    for number in range(12):
        (folder / f"cut{number}.png").touch()
    with caplog.at_level(logging.WARNING):
        dataset = load_faces(train_data_dir=str(folder), resolution=24, skip_unreadable=True)
    assert (len(dataset), len(dataset.unreadable)) == (3, 12)
    assert "Skipped 12 images that cannot be read" in caplog.text
    assert caplog.text.count(".png: ") == 10
    assert "and 2 more" in caplog.text


def test_no_readable_image(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="1 of 1 images cannot be read"):
        load_faces(train_data_dir=str(tmp_path), resolution=24, skip_unreadable=True)


def test_image_without_a_label_is_unreadable(tmp_path):
    rows = {"image": [noise_picture(seed) for seed in range(2)], "kind": ["a", None]}
    features = Features({"image": Image(), "kind": Value("string")})
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="row 1.*: no label"):
        load_faces(str(tmp_path), resolution=8, label_column="kind", cache_dir=str(tmp_path / "c"))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_unreadable_file_is_reported_with_a_reason(suffix):
    """Files that are cut off or have random bytes either decode or are reported as unreadable."""
    buffer = io.BytesIO()
    noise_picture(size=(40, 40)).save(buffer, suffix)
    whole = buffer.getvalue()
    rng = np.random.default_rng(0)
    broken = 0
    for _ in range(150):
        content = np.frombuffer(whole, dtype=np.uint8).copy()
        places = rng.integers(0, min(len(content), 400), size=rng.integers(1, 9))
        content[places] = rng.integers(0, 256, size=len(places))
        content = content[: rng.integers(20, len(content))] if rng.random() < 0.3 else content
        try:
            assert picture_to_tensor(PILImage.open(io.BytesIO(content.tobytes())), (8, 8)).shape == (3, 8, 8)
        except Exception:
            broken += 1
    assert broken > 0


def test_transparent_parts_become_white():
    image = PILImage.new("RGBA", (8, 8), (200, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    for picture in (image, image.quantize()):
        pixels = picture_to_tensor(picture, (8, 8))
        assert pixels[:, 0, 6].tolist() == [255, 255, 255]
        assert pixels[:, 0, 1].tolist() == [0, 0, 255]
    assert picture_to_tensor(image, (8, 8), "RGBA")[:, 0, 6].tolist() == [200, 0, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_applied_as_in_pillow(orientation):
    image = PILImage.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3))
    image.getexif()[0x0112] = orientation
    expected = torch.from_numpy(np.array(ImageOps.exif_transpose(image))).permute(2, 0, 1)
    assert picture_to_tensor(image, tuple(expected.shape[1:])).equal(expected)


@pytest.mark.parametrize(
    "entry",
    [
        (0x11A, 10, 1, struct.pack("<I", 38)),  # XResolution of -1/0
        (0x11A, 2, 3, b"72\0\0"),  # XResolution as text
        (0x100, 9, 1, struct.pack("<i", -5)),  # a negative ImageWidth
        (0x8769, 4, 1, struct.pack("<I", 2**32 - 1)),  # an Exif directory beyond the end
    ],
    ids=["ratio", "text", "negative", "beyond"],
)
def test_odd_exif_tag_does_not_make_an_image_unreadable(entry):
    entries = [(0x112, 3, 1, struct.pack("<HH", 6, 0)), entry]
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", 0) + struct.pack("<ii", -1, 0)
    file = io.BytesIO()
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :12] = 255
    PILImage.fromarray(pixels).save(file, "JPEG", exif=exif, quality=95)
    upright = picture_to_tensor(PILImage.open(file), (24, 16))  # rotated clockwise, white on the left moves to the top
    assert upright[:, :8].min() > 200
    assert upright[:, -8:].max() < 50


def test_invalid_metadata_does_not_make_an_image_unreadable():
    file = io.BytesIO()
    PILImage.new("RGB", (8, 8), "red").save(file, "PNG", exif=b"Exif\0\0\0\x08\0\x02\x01\x12\0\x03")
    assert picture_to_tensor(PILImage.open(file), (8, 8))[0].eq(255).all()
