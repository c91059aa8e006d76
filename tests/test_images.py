"""Reading single images: files that PIL would refuse, unreadable files, and their error messages."""

import io
import os
import struct
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, PngImagePlugin

from ddpm_faces.data import images, load_faces, open_stream, picture_to_tensor, resize_to_cover
from ddpm_faces.data.images import open_image


def face(size: tuple[int, int] = (20, 16)) -> Image.Image:
    return Image.new("RGB", size, (128, 100, 50))


def save(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or face()).save(path, **options)
    return path.parent


def long_text(compressed: bool) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "x" * 3_000_000, zip=compressed)
    return info


def international_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompt", "ß" * 2_000_000, zip=True)
    return info


@pytest.mark.parametrize(
    "options",
    [
        {"pnginfo": long_text(True)},
        {"pnginfo": long_text(False)},
        {"pnginfo": international_text()},
        {"icc_profile": bytes(2_000_000)},
        {"icc_profile": np.random.default_rng(0).bytes(5_000_000)},
    ],
    ids=["text", "plain", "international", "profile", "large profile"],
)
def test_large_metadata_do_not_make_an_image_unreadable(tmp_path, options):
    folder = save(tmp_path / "faces" / "face.png", **options)
    dataset = load_faces(train_data_dir=str(folder), resolution=8, cache_dir=str(tmp_path / "cache"))
    assert dataset.images[0, :, 4, 4].tolist() == [128, 100, 50]
    (batch,) = islice(open_stream(train_data_dir=str(folder), resolution=(8, 8), batch_size=1).batches(), 1)
    assert torch.equal(batch["images"], dataset.images)


def test_text_that_fills_the_memory_is_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "x" * 2**27, zip=True)
    save(tmp_path / "bomb.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"bomb\.png: .*(MAX_TEXT_CHUNK|Too Large)"):
        load_faces(train_data_dir=str(tmp_path))


# Many pixels


@pytest.fixture(scope="module")
def huge(tmp_path_factory) -> Path:
    """A photo of 182 megapixels, above PIL's limit, that is light on the left, and turned by its EXIF."""
    pixels = np.full((12_000, 15_200), 40, dtype=np.uint8)
    pixels[:, :7_600] = 220
    exif = Image.Exif()
    exif[0x0112] = 6  # show it rotated by 90 degrees clockwise: the left side moves to the top
    path = tmp_path_factory.mktemp("huge") / "20240101_120000.jpg"
    Image.fromarray(pixels).save(path, exif=exif, quality=50)
    return path


@pytest.mark.filterwarnings("error")
def test_huge_photos_are_read_without_being_decoded_at_full_size(huge):
    image = open_image(huge)
    pixels = picture_to_tensor(image, (32, 32))
    assert max(image.size) < 2_000  # an eighth of the size of the file
    assert pixels[:, :14].min() > 210
    assert pixels[:, 18:].max() < 50
    assert resize_to_cover(open_image(huge), (30, 20)).shape == (3, 30, 24)


def test_images_of_normal_size_are_decoded_at_full_size(tmp_path):
    """At a reduced size, JPEGs would have other pixels, and the fingerprint of a run would change."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8))
    save(tmp_path / "face.jpg", image)
    decoded = Image.open(tmp_path / "face.jpg")
    expected = np.asarray(decoded.resize((16, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(
        picture_to_tensor(open_image(tmp_path / "face.jpg"), (16, 16)).permute(1, 2, 0), expected
    )


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(images, "LARGE", 16 * 20 - 1)
    active, most, lock = 0, 0, threading.Lock()
    enough = threading.Event()

    class Counted(Image.Image):
        def load(self):
            nonlocal active, most
            with lock:
                active += 1
                most = max(most, active)
            enough.wait(0.05)
            with lock:
                active -= 1
            return super().load()

    def decode():
        image = face()
        image.__class__ = Counted
        picture_to_tensor(image, (20, 16))

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_max_image_pixels_is_the_limit_of_both_readers(tmp_path):
    save(tmp_path / "faces" / "a.png", face((20, 16)))
    folder = save(tmp_path / "faces" / "b.png", face((20, 17)))
    settings = {"train_data_dir": str(folder), "resolution": (8, 8), "max_image_pixels": 320}
    cache = {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"b\.png: 20x17 pixels exceed `max_image_pixels` \(320\)"):
        load_faces(**settings, **cache)
    assert len(load_faces(**settings, **cache, skip_unreadable=True)) == 1
    assert len(load_faces(**{**settings, "max_image_pixels": 340}, **cache, skip_unreadable=True)) == 2
    with pytest.raises(ValueError, match=r"b\.png\): 20x17 pixels exceed `max_image_pixels` \(320\)"):
        list(islice(open_stream(**settings, batch_size=1).batches(), 2))
    with pytest.raises(ValueError, match="`max_image_pixels` must be at least 1, got 0"):
        load_faces(**{**settings, "max_image_pixels": 0})
    with pytest.raises(ValueError, match="`max_image_pixels` must be at least 1, got 0"):
        open_stream(**{**settings, "max_image_pixels": 0})


def test_default_limit_refuses_images_larger_than_memory(tmp_path):
    file = io.BytesIO()
    Image.new("L", (64, 48)).save(file, "JPEG")
    content = bytearray(file.getvalue())
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", 60_000, 60_000)
    (tmp_path / "bomb.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"bomb\.jpg: 60000x60000 pixels exceed .* \(536,870,912\)"):
        load_faces(train_data_dir=str(tmp_path))


# Errors of decoders


class Odd(Exception):
    """An error of a kind that PIL is not known to raise."""


@pytest.mark.parametrize("error", [Odd("bad"), RuntimeError("bad"), RecursionError("bad"), AttributeError("bad")])
def test_any_error_of_a_decoder_names_the_image(tmp_path, monkeypatch, error):
    save(tmp_path / "faces" / "good.png")
    folder = save(tmp_path / "faces" / "odd.pcx")
    load = Image.Image.load
    plugin = type(Image.open(folder / "odd.pcx"))

    def fail(self):
        raise error

    assert plugin.load is not load
    monkeypatch.setattr(plugin, "load", lambda self: fail(self) if self.format == "PCX" else load(self))
    settings = {"train_data_dir": str(folder), "resolution": (8, 8)}
    cache = {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"1 of 2 images cannot be read:\n.*odd\.pcx: bad"):
        load_faces(**settings, **cache)
    assert len(load_faces(**settings, **cache, skip_unreadable=True)) == 1
    with pytest.raises(ValueError, match=r"odd\.pcx\): bad"):
        list(islice(open_stream(**settings, batch_size=1).batches(), 2))
    batches = list(islice(open_stream(**settings, batch_size=1, skip_unreadable=True).batches(), 3))
    assert all("good.png" in batch["names"][0] for batch in batches)


def test_out_of_memory_does_not_make_an_image_unreadable(tmp_path, monkeypatch):
    folder = save(tmp_path / "faces" / "face.pcx")

    def fail(self):
        raise MemoryError

    monkeypatch.setattr(type(Image.open(folder / "face.pcx")), "load", fail)
    settings = {"train_data_dir": str(folder), "resolution": (8, 8), "skip_unreadable": True}
    with pytest.raises(MemoryError):
        load_faces(**settings, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(MemoryError):
        next(open_stream(**settings, batch_size=1).batches())


# The cache folder


@pytest.mark.parametrize("variable", [True, False])
def test_a_cache_that_cannot_be_written_is_named(tmp_path, variable):
    folder = save(tmp_path / "faces" / "face.png")
    (tmp_path / "file").touch()  # nobody can create a folder below it
    argument = "" if variable else f", cache_dir={str(tmp_path / 'file' / 'cache')!r}"
    code = f"from ddpm_faces.data import load_faces; load_faces(train_data_dir={str(folder)!r}{argument})"
    environment = {**os.environ, **({"HF_HOME": str(tmp_path / "file" / "home")} if variable else {})}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    place = tmp_path / "file" / ("home/ddpm-faces" if variable else "cache")
    assert f"ValueError: `cache_dir` '{place}' cannot be written" in done.stderr


def test_a_cache_of_a_dataset_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "set").mkdir()
    rows = {"image": [face()]}
    Dataset.from_dict(rows, Features({"image": ImageFeature()})).to_parquet(tmp_path / "set" / "train.parquet")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`cache_dir` '.*file/cache' cannot be written .*choose another"):
        load_faces(str(tmp_path / "set"), cache_dir=str(tmp_path / "file" / "cache"))


def test_a_lock_that_cannot_be_created_is_named(tmp_path, monkeypatch):
    """Act like a read-only folder. Root, as which the tests may run, can write everywhere."""
    folder = save(tmp_path / "faces" / "face.png")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ddpm_faces.data.cache.FileLock.acquire", refuse)
    with pytest.raises(
        ValueError, match="`cache_dir` '.*cache' cannot be written .*Permission denied.*choose another"
    ):
        load_faces(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
