"""A folder of images: the files that are read, their order, and the reports of skipped files."""

import logging
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from ddpm_faces.data import load_faces, open_stream


def picture(path: Path, number: int = 0, kind: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (number, 100, 50)).save(path, kind)


def read(folder: Path | str, tmp_path: Path, **settings) -> list[str]:
    """Return the names from the map-style reader, and check that the stream reads the same."""
    name = {"train_data_dir": str(folder)} if "dataset_name" not in settings else {}
    dataset = load_faces(**name, resolution=8, cache_dir=str(tmp_path / "cache"), **settings)
    names = dataset.names(range(len(dataset)))
    stream = open_stream(**name, resolution=(8, 8), batch_size=len(names), **settings)
    (batch,) = islice(stream.batches(), 1)
    streamed = [name.partition(" (")[2].removesuffix(")") for name in batch["names"]]
    assert sorted(streamed) == sorted(names)
    return [str(Path(name).relative_to(Path(folder).resolve())) for name in names]


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, name in enumerate(("a.jpg", "b.png", "c/d.webp")):
        picture(tmp_path / "photos" / name, number)
    return tmp_path / "photos"


READ = ["a.jpg", "b.png", "c/d.webp"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("x.jfif", "JPEG"), ("x.jpe", "JPEG"), ("x.AVIF", "AVIF"), ("x.jp2", "JPEG2000"), ("x.ppm", "PPM")),
        *(("x.tga", "TGA"), ("x.pcx", "PCX"), ("x.qoi", "QOI"), ("x.apng", "PNG"), ("x.dib", "DIB")),
        *(("IMG_0001", "JPEG"), ("IMG_0002", "PNG"), ("IMG_0003", "WEBP"), ("IMG_0004", "GIF"), ("x", "AVIF")),
        *(("Photo at 10.30.45", "PNG"), ("me.2020", "JPEG")),
    ],
)
def test_all_formats_that_pillow_reads(folder, tmp_path, name, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip("this Pillow does not write it")
    picture(folder / name, kind=kind)
    assert sorted(read(folder, tmp_path)) == sorted([*READ, name])


def test_images_are_ordered_by_name_with_files_before_subfolders(tmp_path):
    """The order must not change, because caches and checkpoints identify images by it."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for number in range(30):
        parts = [f"{rng.choice(list('abZé_1'))}{rng.integers(3)}" for _ in range(rng.integers(3))]
        picture(root.joinpath(*parts) / f"{rng.choice(list('aB-9'))}{number}.png", number)
    (root / ".trash").mkdir()
    picture(root / ".trash" / "x.png")
    picture(root / "._a.png")

    def walk(place: Path) -> list[Path]:
        entries = sorted((path for path in place.iterdir() if path.name[0] != "."), key=lambda path: path.name)
        files = [path for path in entries if path.is_file()]
        return files + [path for entry in entries if entry.is_dir() for path in walk(entry)]

    assert read(root, tmp_path) == [str(path.relative_to(root)) for path in walk(root)]


# Links and unreadable folders


def test_linked_folders_are_followed_and_loops_are_not(folder, tmp_path):
    picture(tmp_path / "elsewhere" / "deep" / "e.png", 9)
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder / "c")  # read only under its own name
    (folder / "c" / "up").symlink_to(folder)
    (folder / "c" / "all").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (tmp_path / "elsewhere" / "deep" / "self").symlink_to(tmp_path / "elsewhere" / "deep")
    assert read(folder, tmp_path) == [*READ, "more/deep/e.png"]


def test_a_link_into_a_hidden_folder_is_followed(folder, tmp_path):
    picture(folder / ".store" / "f.png", 9)
    (folder / "stored").symlink_to(folder / ".store")
    (tmp_path / "name").symlink_to(folder)
    assert read(folder, tmp_path) == [*READ, "stored/f.png"]
    assert read(tmp_path / "name", tmp_path) == [*READ, "stored/f.png"]


def test_unreadable_folders_are_named(folder, tmp_path, monkeypatch, caplog):
    for name in ("private", "c/secret"):
        picture(folder / name / "g.png")
    scan = os.scandir

    def scandir(place):  # the tests may run as root, who can read everything
        if os.path.basename(place) in ("private", "secret"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    assert read(folder, tmp_path) == READ
    assert "2 folders that cannot be read (c/secret, private)" in caplog.text
    with pytest.raises(ValueError, match="private' cannot be read: .*Permission denied"):
        load_faces(train_data_dir=str(folder / "private"))


# Other files

BESIDE = (
    *("metadata.csv", "metadata.jsonl", "notes.csv", "a.jpg.json", "list_eval_partition.csv", "annotations.json"),
    *(
        "log.jsonl",
        "training_summary.json",
        "backup.zip",
        "old.tar",
        "features.parquet",
        "README.md",
        "dataset_infos.json",
    ),
)


@pytest.mark.parametrize("name", BESIDE)
def test_a_folder_of_images_may_contain_other_files(folder, tmp_path, name):
    (folder / name).write_text("file_name,split\na.jpg,1\n" if name.endswith("csv") else "{}")
    assert read(folder, tmp_path) == READ


def test_skipped_files_are_counted_and_named_in_one_line(folder, tmp_path, caplog):
    for name in ("1.HEIC", "2.heic", "3.CR2", "4.svg", "5.zip", "6.txt", "7"):
        (folder / name).write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "run").mkdir()
    (folder / "run" / "training_config.yaml").touch()
    with caplog.at_level(logging.INFO):
        load_faces(train_data_dir=str(folder), resolution=8, cache_dir=str(tmp_path / "cache"))
    (record,) = [record for record in caplog.records if "Not read from" in record.message]
    assert record.levelno == logging.WARNING
    assert record.message == (
        f"Not read from {folder}: 1 without an extension, 1 .cr2 (raw photos: export them as JPEG or TIFF), "
        "2 .heic (install pillow-heif), 1 .svg, 1 .txt, 1 .zip (`dataset_name` reads these), "
        "1 folder with output of training or of a pipeline (run)"
    )


def test_files_without_images_give_no_warning(folder, tmp_path, caplog):
    (folder / "notes.txt").touch()
    (folder / "a.jpg.json").touch()
    with caplog.at_level(logging.WARNING):
        load_faces(train_data_dir=str(folder), resolution=8, cache_dir=str(tmp_path / "cache"))
    assert "Not read from" not in caplog.text


@pytest.mark.parametrize("name", ["x.heic", "x.NEF", "x"])
def test_error_for_a_folder_without_images_lists_its_contents(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"contains no images .* Not read: 1 (\.heic \(install|\.nef \(raw|without)"):
        load_faces(train_data_dir=str(tmp_path))


def test_heic_is_read_where_its_package_is_installed(tmp_path):
    """A package that registers PNG with another extension stands in for pillow-heif."""
    picture(tmp_path / "photos" / "IMG_1.HEIC", kind="PNG")
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image, PngImagePlugin\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', PngImagePlugin.PngImageFile)\n"
        "    Image.register_extension('HEIF', '.heic')\n"
    )
    code = (
        f"from ddpm_faces.data import load_faces; print(len(load_faces(train_data_dir={str(tmp_path / 'photos')!r})))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize(
    "marker", ["model_index.json", "training_config.yaml", "checkpoint-0000000008/log.jsonl", "checkpoint-500/x.bin"]
)
def test_output_of_a_run_within_the_folder_is_not_trained_on(folder, tmp_path, caplog, marker):
    output = folder / "c" / "ddpm-faces-model"
    (output / marker).parent.mkdir(parents=True)
    (output / marker).touch()
    picture(output / "samples.png")
    picture(output / "samples" / "0000000008.png")
    assert read(folder, tmp_path) == READ
    assert "1 folder with output of training or of a pipeline (c/ddpm-faces-model)" in caplog.text


def test_output_of_a_run_in_the_folder_itself_is_not_trained_on(folder, tmp_path):
    (folder / "training_config.yaml").touch()
    for name in ("samples.png", "loss_curve.png", "samples/1.png", "audits/1.png", "checkpoint-0000000008/x.png"):
        picture(folder / name)
    assert read(folder, tmp_path) == READ


def test_names_that_only_look_like_output_are_read(folder, tmp_path):
    for name in ("samples/1.png", "checkpoint-charlie/2.png", "samples.png"):
        picture(folder / name)
    assert read(folder, tmp_path) == [
        "a.jpg",
        "b.png",
        "samples.png",
        "c/d.webp",
        "checkpoint-charlie/2.png",
        "samples/1.png",
    ]


# Splits, names of folders, datasets


@pytest.mark.parametrize("word", ["train", "test", "val", "dev", "eval", "validation", "training", "testing"])
def test_names_of_files_and_folders_are_not_splits(folder, tmp_path, word):
    picture(folder / f"me {word} 1.jpg", 8)
    picture(folder / word / "x.png", 9)
    picture(folder / f"{word}-00000-of-00001.png", 10)
    assert len(read(folder, tmp_path)) == 6


@pytest.mark.parametrize("split", ["test", "train[:2]", "all"])
def test_a_folder_of_images_has_no_splits(folder, split):
    for load in (load_faces, open_stream):
        with pytest.raises(ValueError, match="`split` must be 'train', got .* has no splits"):
            load(train_data_dir=str(folder), split=split)


@pytest.mark.parametrize("name", [".", "./", "../photos", "..", "c/.."])
def test_relative_folders_of_images(folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(folder / "c" if name == ".." else folder)
    assert read(name, tmp_path) == READ


@pytest.mark.parametrize("argument", ["dataset_name", "train_data_dir"])
@pytest.mark.parametrize("name", [".", "./", "..", "../set"])
def test_relative_folders_of_shards(tmp_path, monkeypatch, argument, name):
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows = {"image": [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(3)]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path / "set" / ("data" if name == ".." else ""))
    faces = load_faces(**{argument: name}, resolution=8, cache_dir=str(tmp_path / "cache"))
    assert faces.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    (batch,) = islice(open_stream(**{argument: name}, resolution=(8, 8), batch_size=3).batches(), 1)
    assert sorted(batch["images"][:, 0, 0, 0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("name", ["a.jpg.json", "notes.csv", "log.jsonl"])
def test_a_dataset_name_may_be_a_folder_of_images_with_sidecars(folder, tmp_path, name):
    (folder / name).write_text("{}")
    assert read(folder, tmp_path, dataset_name=str(folder)) == READ


def test_metadata_files_are_used_only_with_a_dataset_name(folder, tmp_path):
    (folder / "metadata.csv").write_text("file_name,age\na.jpg,30\nb.png,20\nc/d.webp,30\n")
    settings = {"resolution": 8, "label_column": "age", "cache_dir": str(tmp_path / "cache")}
    assert sorted(load_faces(str(folder), **settings).labels.tolist()) == [0, 1, 1]
    with pytest.raises(ValueError, match="must be 'folder' or None, got 'age'"):
        load_faces(train_data_dir=str(folder), **settings)


@pytest.mark.parametrize("name", ["x.jpg_large", "y.jpg!d", "z.jpeg_1", "q.jpg~", "J.Smith", "a.JPG.1"])
def test_an_image_with_an_unknown_extension_is_found_by_its_first_bytes(tmp_path, name):
    picture(tmp_path / "faces" / "a.png")
    picture(tmp_path / "faces" / name, 7, "JPEG")
    (tmp_path / "faces" / "notes.backup").write_text("no image")
    assert len(read(tmp_path / "faces", tmp_path)) == 2
