"""Datasets in all supported layouts: the map-style reader and the stream read the same values."""

import io
import tarfile
import zipfile
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from ddpm_faces.data import FaceStream, load_faces, open_stream
from ddpm_faces.errors import HubError


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def read(folder: Path, tmp_path: Path, **settings) -> list[int]:
    """Return the result of the map-style reader, and check that the stream reads the same."""
    name = {} if "dataset_name" in settings else {"train_data_dir": str(folder)}
    dataset = load_faces(**name, resolution=8, cache_dir=str(tmp_path / "cache"), **settings)
    stream = open_stream(**name, resolution=(8, 8), batch_size=len(dataset), **settings)
    for batch in islice(stream.batches(), 2):  # two epochs
        assert sorted(numbers(batch["images"])) == sorted(numbers(dataset.images))
    return numbers(dataset.images)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def rows(values: dict, features: dict) -> Dataset:
    return Dataset.from_dict(values, Features(features))


# Archives


@pytest.mark.parametrize("place", ["", "faces/deep/", "a b/"])
@pytest.mark.parametrize("names", [["faces.zip"], ["a.zip", "b.zip"], ["train.zip"]])
def test_zips_of_images(folder, tmp_path, names, place):
    for first, name in enumerate(names):
        with zipfile.ZipFile(folder / name, "w") as file:
            for number in range(3):
                file.writestr(f"{place}{number}.png", png(10 * first + number))
    expected = [10 * first + number for first in range(len(names)) for number in range(3)]
    assert sorted(read(folder, tmp_path)) == expected
    assert sorted(read(folder, tmp_path, dataset_name=str(folder))) == expected


def test_tars_of_images_and_labels(folder, tmp_path):
    with tarfile.open(folder / "train-000.tar", "w") as file:
        for number in range(3):
            for name, content in ((f"{number}.png", png(number)), (f"{number}.cls", b"%d" % number)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                file.addfile(entry, io.BytesIO(content))
    assert sorted(read(folder, tmp_path)) == [0, 1, 2]


def test_zips_are_named_by_their_members(folder, tmp_path):
    with zipfile.ZipFile(folder / "faces.zip", "w") as file:
        file.writestr("0.png", png(0))
        file.writestr("1.png", b"junk")
    with pytest.raises(ValueError, match=r"1 of 2 .*\n.*1\.png.*: cannot identify"):
        load_faces(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))


# Columns

FILE, PATH = {"bytes": Value("binary"), "path": Value("string")}, {"path": Value("string"), "bytes": Value("binary")}


@pytest.mark.parametrize(
    ("feature", "store"),
    [
        (FILE, lambda content, path: {"bytes": content, "path": "x.png"}),
        (FILE, lambda content, path: {"bytes": None, "path": path}),
        (PATH, lambda content, path: {"path": path, "bytes": content}),
        ({"bytes": Value("binary")}, lambda content, path: {"bytes": content}),
        (Value("binary"), lambda content, path: content),
        (Value("large_binary"), lambda content, path: content),
        (datasets.Image(), lambda content, path: path),
        (datasets.Image(decode=False), lambda content, path: {"bytes": content, "path": None}),
    ],
)
def test_columns_that_hold_images(folder, tmp_path, feature, store):
    values = []
    for number in range(3):
        path = tmp_path / f"{number}.png"
        path.write_bytes(png(number))
        values.append(store(path.read_bytes(), str(path)))
    rows({"id": [0, 1, 2], "face": values}, {"id": Value("int64"), "face": feature}).to_parquet(folder / "a.parquet")
    assert read(folder, tmp_path) == [0, 1, 2]


def test_images_come_before_binary_columns_and_binary_columns_that_hold_none_are_named(folder, tmp_path):
    values = {"mask": [b"junk"] * 2, "face": [png(0), png(1)]}
    rows(values, {"mask": Value("binary"), "face": datasets.Image()}).to_parquet(folder / "a.parquet")
    assert read(folder, tmp_path) == [0, 1]
    with pytest.raises(ValueError, match="2 of 2 images cannot be read"):
        load_faces(train_data_dir=str(folder), image_column="mask", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"row [01]: cannot identify"):
        next(open_stream(train_data_dir=str(folder), image_column="mask", batch_size=1).batches())


# Folders of `save_to_disk`, and damaged ones


def test_output_of_save_to_disk(folder, tmp_path):
    features = {"image": datasets.Image()}
    parts = {
        name: rows({"image": [png(k + number) for number in range(4)]}, features)
        for name, k in (("train", 0), ("test", 50))
    }
    parts["train"].save_to_disk(folder / "one")
    DatasetDict(parts).save_to_disk(folder / "two")
    assert read(folder / "one", tmp_path) == [0, 1, 2, 3]
    assert read(folder / "two", tmp_path) == [0, 1, 2, 3]
    assert read(folder / "two", tmp_path, split="test") == [50, 51, 52, 53]
    assert read(folder / "two", tmp_path, dataset_name=str(folder / "two"), split="train[1:3]") == [1, 2]
    assert read(folder / "two", tmp_path, split="train[75%:]+test[:1]") == [3, 50]
    with pytest.raises(ValueError, match="`split` 'validation' does not exist in .*two'. Splits: train, test"):
        load_faces(str(folder / "two"), split="validation")


@pytest.mark.parametrize("load", [load_faces, open_stream])
def test_damaged_shards_are_named(folder, load):
    table = rows({"image": [png(0)] * 3}, {"image": datasets.Image()})
    for name in ("a", "b", "c"):
        table.to_parquet(folder / f"{name}.parquet")
    (folder / "b.parquet").write_bytes((folder / "b.parquet").read_bytes()[:200])
    (folder / "c.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)are damaged:.*b\.parquet: .*c\.parquet: ") as error:
        load(train_data_dir=str(folder))
    assert "a.parquet" not in str(error.value)


@pytest.mark.parametrize("load", [load_faces, open_stream])
def test_damaged_archives_are_named(folder, load):
    for name in ("a", "b"):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as file:
            file.writestr("0.png", png(0))
    (folder / "b.zip").write_bytes((folder / "b.zip").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"are damaged:\n.*b\.zip: ") as error:
        load(train_data_dir=str(folder))
    assert "a.zip" not in str(error.value)


# Labels


def labelled(folder: Path, feature, values: list) -> str:
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in range(len(values))]
    table = rows({"image": images, "y": values}, {"image": datasets.Image(), "y": feature})
    table.to_parquet(folder / "train.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("feature", "values", "num_class_embeds", "message"),
    [
        (Value("int64"), [0, 1, 3], 3, r"\(2.png\): label 3 is outside 0 to 2"),
        (Value("int8"), [0, 1, -1], 3, r"\(2.png\): label -1 is outside 0 to 2"),
        (Value("int64"), [0, 1, -2], None, r"\(2.png\): label -2 is negative"),
        (Value("uint8"), [0, 1, 255], 2, r"\(2.png\): label 255 is outside 0 to 1"),
        (Value("int64"), [0, 1, None], 2, r"\(2.png\): no label"),
        (ClassLabel(names=["a", "b"]), [0, 1, -1], 2, r"\(2.png\): no label"),
        (ClassLabel(names=["a", "b"]), [0, 1, None], None, r"\(2.png\): no label"),
    ],
)
def test_labels_outside_the_classes_are_named_in_a_stream(folder, feature, values, num_class_embeds, message):
    settings = {"label_column": "y", "num_class_embeds": num_class_embeds, "batch_size": 1}
    source = labelled(folder, feature, values)
    with pytest.raises(ValueError, match=f"An image cannot be read: .*{message}"):
        list(islice(open_stream(source, **settings).batches(), 3))
    batches = list(islice(open_stream(source, **settings, skip_unreadable=True).batches(), 4))
    assert sorted(batch["labels"].item() for batch in batches) == [0, 0, 1, 1]


def test_more_class_names_than_classes_are_refused_before_a_stream_is_read(folder):
    source = labelled(folder, ClassLabel(names=["a", "b", "c"]), [0, 1, 2])
    with pytest.raises(ValueError, match=r"`num_class_embeds` must be at least the number of classes \(3\), got 2"):
        open_stream(source, label_column="y", num_class_embeds=2)
    (batch,) = islice(open_stream(source, label_column="y", num_class_embeds=5, batch_size=3).batches(), 1)
    assert sorted(batch["labels"].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("reader", ["map", "stream"])
def test_class_labels_beyond_their_names_are_named(folder, tmp_path, reader):
    """The file is written by hand, because `datasets` refuses to write one."""
    features = Features({"image": datasets.Image(), "y": ClassLabel(names=["a", "b"])})
    labelled(folder, Value("int64"), [0, 1, 2, -1])
    shards = datasets.load_dataset("parquet", data_files=str(folder / "train.parquet"), streaming=reader == "stream")
    if reader == "stream":
        stream = FaceStream(
            shards["train"].cast(features), lambda image, rng: torch.zeros(1), label_column="y", batch_size=1
        )
        with pytest.raises(ValueError, match=r"\((2.png|3.png)\): (label 2 is outside 0 to 1|no label)"):
            list(islice(stream.batches(), 4))
        return
    shards["train"].cast(features).save_to_disk(folder / "saved")
    with pytest.raises(ValueError, match=r"(?s)2 of 4 .*\(2.png\): label 2 is outside 0 to 1.*\(3.png\): no label"):
        load_faces(str(folder / "saved"), label_column="y", cache_dir=str(tmp_path / "cache"))


def test_booleans_are_labels_in_both_readers(folder, tmp_path):
    source = labelled(folder, Value("bool"), [True, False, True])
    assert load_faces(source, label_column="y", cache_dir=str(tmp_path / "cache")).labels.tolist() == [1, 0, 1]
    (batch,) = islice(open_stream(source, label_column="y", batch_size=3).batches(), 1)
    labels = dict(zip(numbers(batch["images"]), batch["labels"].tolist(), strict=True))
    assert labels == {0: 1, 1: 0, 2: 1}


def test_subfolders_are_classes_in_both_readers(folder, tmp_path):
    for number, name in enumerate(("zoe", "anna", "test", "anna/old")):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{number}.png").write_bytes(png(number))
    settings = {"train_data_dir": str(folder), "label_column": "folder"}
    dataset = load_faces(**settings, resolution=8, cache_dir=str(tmp_path / "cache"))
    expected = dict(zip(numbers(dataset.images), dataset.labels.tolist(), strict=True))
    assert expected == {0: 2, 1: 0, 2: 1, 3: 0}
    stream = open_stream(**settings, resolution=(8, 8), batch_size=4, num_workers=2)
    assert stream.dataset.features["folder"].names == dataset.class_names == ["anna", "test", "zoe"]
    for batch in islice(open_stream(**settings, resolution=(8, 8), batch_size=4).batches(), 2):
        assert dict(zip(numbers(batch["images"]), batch["labels"].tolist(), strict=True)) == expected
    with pytest.raises(ValueError, match="must be 'folder' or None, got 'label'"):
        open_stream(train_data_dir=str(folder), label_column="label")
    (folder / "stray.png").write_bytes(png(9))
    with pytest.raises(ValueError, match="stray.png is in none"):
        open_stream(**settings)


@pytest.mark.parametrize(("arguments", "message"), [({"channels": 2}, "`channels`"), ({"crop": "left"}, "`crop`")])
def test_bad_arguments_of_a_stream(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_stream(train_data_dir=str(folder), **arguments)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
            ValueError,
            "`dataset_name` must be an existing folder or a dataset on the Hub, got 'a/b', which is neither",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. Visit"),
            HubError,
            "Dataset 'a/b' is a gated dataset on the Hub. Visit",
        ),
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)"),
            HubError,
            "There is no folder 'a/b', and the Hub could not be reached for a dataset of that name: check the network",
        ),
    ],
)
def test_neither_a_folder_nor_on_the_hub(monkeypatch, error, kind, message):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for load in (load_faces, open_stream):
        with pytest.raises(kind, match=message):
            load("a/b")
