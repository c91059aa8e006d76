import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from PIL import Image

from ddpm_faces.data import picture_to_tensor
from ddpm_faces.data.stream import FaceStream


datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no `load_dataset` asks the Hub to count a download

NUM_SHARDS, SHARD_SIZE = 4, 6
NUM_PICTURES = NUM_SHARDS * SHARD_SIZE
FEATURES = Features({"image": datasets.Image(), "label": ClassLabel(names=["young", "middle", "old"])})


def picture(number: int) -> bytes:
    """An image whose colour is its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def row(number: int) -> dict[str, Any]:
    return {"image": {"bytes": picture(number), "path": f"{number}.png"}, "label": number % 3}


def parquet(
    folder: Path, rows: list[dict[str, Any]], num_shards: int = 1, features: Features = FEATURES
) -> datasets.IterableDataset:
    files = []
    for shard in range(num_shards):
        files.append(str(folder / f"{shard}-of-{num_shards}.parquet"))
        shard_rows = rows[shard * len(rows) // num_shards : (shard + 1) * len(rows) // num_shards]
        # Two groups of rows, so that positions lie within a group, between groups, and between files.
        columns = {name: [row[name] for row in shard_rows] for name in features}
        Dataset.from_dict(columns, features).to_parquet(files[-1], batch_size=4)
    return load_dataset("parquet", data_files=files, split="train", streaming=True)


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> datasets.IterableDataset:
    return parquet(tmp_path_factory.mktemp("faces"), [row(number) for number in range(NUM_PICTURES)], NUM_SHARDS)


def decode(image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
    """Return the number of the image in red, and a random number in green."""
    pixels = picture_to_tensor(image, (4, 4)).clone()
    pixels[1] = int(rng.integers(256))
    return pixels


def make_stream(dataset: datasets.IterableDataset, **overrides) -> FaceStream:
    return FaceStream(dataset, **{"decode": decode, "batch_size": 5, "block_size": 4, **overrides})


def first(stream: FaceStream, num_batches: int) -> list[dict[str, Any]]:
    return list(islice(stream.batches(), num_batches))


def numbers(batches: list[dict[str, Any]]) -> list[int]:
    return [number for batch in batches for number in batch["images"][:, 0, 0, 0].tolist()]


def numbers_of_epoch(epoch: int, batches: list[dict[str, Any]]) -> list[int]:
    names = [name for batch in batches for name in batch["names"]]
    return [number for name, number in zip(names, numbers(batches), strict=True) if name.startswith(f"epoch {epoch},")]


def assert_same(batches: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        assert torch.equal(batch["images"], other["images"])
        assert (batch["names"], batch["skipped"]) == (other["names"], other["skipped"])


# Order and contents


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [1, 2, 3])  # three processes share four files by taking turns at the rows
def test_each_epoch_reads_each_image_once(faces, num_processes, num_workers):
    batches = []
    for process in range(num_processes):
        stream = make_stream(faces, num_workers=num_workers, process_index=process, num_processes=num_processes)
        assert stream.num_workers == num_workers
        batches += first(stream, 18 // num_processes + 2)
    for epoch in range(3):
        assert sorted(numbers_of_epoch(epoch, batches)) == list(range(NUM_PICTURES))


def test_batches_contain_images_labels_and_names(faces):
    stream = make_stream(faces, label_column="label")
    for batch in first(stream, 6):
        assert batch.keys() == {"images", "labels", "names", "skipped"}
        assert batch["images"].shape == (5, 3, 4, 4)
        assert batch["images"].dtype == torch.uint8
        assert batch["labels"].dtype == torch.int64
        read = batch["images"][:, 0, 0, 0].tolist()
        assert batch["labels"].tolist() == [number % 3 for number in read]
        assert all(name.endswith(f"({number}.png)") for name, number in zip(batch["names"], read, strict=True))
    assert stream.epoch == 1


def test_orders_differ_by_epoch_and_seed(faces):
    batches = first(make_stream(faces), 10)
    assert_same(first(make_stream(faces), 10), batches)
    orders = [numbers_of_epoch(epoch, batches) for epoch in (0, 1)]
    orders.append(numbers_of_epoch(0, first(make_stream(faces, seed=1), 10)))
    starts = [order[:4] for order in orders]  # the order of the files and that within a block
    assert len({tuple(sorted(start)) for start in starts}) > 1
    assert all(start != sorted(start) for start in starts)
    assert len({tuple(order) for order in orders}) == 3


def test_one_block_shuffles_all(faces):
    order = numbers_of_epoch(0, first(make_stream(faces, block_size=1000), 5))
    shards = [number // SHARD_SIZE for number in order]
    assert sum(a != b for a, b in zip(shards[:-1], shards[1:], strict=True)) > 2 * NUM_SHARDS


def test_folder_of_images(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    folder = load_dataset("imagefolder", data_dir=str(tmp_path), split="train", streaming=True)
    batches = first(make_stream(folder, batch_size=6), 2)
    for batch in batches:
        assert sorted(numbers([batch])) == list(range(6))
        assert all(f"{number}.png" in name for number, name in zip(numbers([batch]), batch["names"], strict=True))
    assert numbers(batches[:1]) != numbers(batches[1:])  # the same files, in another order in each epoch


def test_fewer_files_than_workers_and_processes(tmp_path):
    dataset = parquet(tmp_path, [row(number) for number in range(10)])
    streams = [make_stream(dataset, num_workers=3, process_index=i, num_processes=2) for i in range(2)]
    assert [stream.num_workers for stream in streams] == [1, 1]
    assert sorted(numbers([batch for stream in streams for batch in first(stream, 1)])) == list(range(10))


# Resuming


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_resumes_exactly(faces, num_workers):
    stream = make_stream(faces, num_workers=num_workers)
    expected, states = [], [stream.state_dict()]
    for batch in islice(stream.batches(), 14):
        expected.append(batch)
        states.append(json.loads(json.dumps(stream.state_dict())))
    assert states[13]["places"][0]["epoch"] > states[3]["places"][0]["epoch"]
    # Within a block, at its end, and over the end of an epoch. With two workers, also when the second is next.
    for consumed in (0, 1, 3, 4, 5, 8, 11):
        resumed = make_stream(faces, num_workers=num_workers)
        assert resumed.load_state_dict(states[consumed]) is None
        assert_same(first(resumed, 14 - consumed), expected[consumed:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumes_exactly_after_each_batch(faces, num_workers):
    state, batches = None, []
    for _ in range(12):
        stream = make_stream(faces, num_workers=num_workers)
        if state is not None:
            assert stream.load_state_dict(state) is None
        batches += first(stream, 1)
        state = stream.state_dict()
    assert_same(batches, first(make_stream(faces, num_workers=num_workers), 12))


def test_resumes_exactly_where_processes_take_turns_at_rows(faces):
    def one_of_three() -> FaceStream:
        return make_stream(faces, process_index=1, num_processes=3)

    stream = one_of_three()
    expected = first(stream, 3)
    resumed = one_of_three()
    assert resumed.load_state_dict(stream.state_dict()) is None
    assert_same(first(resumed, 3), first(stream, 3))
    assert_same(first(one_of_three(), 3), expected)


def test_iterating_again_continues_the_stream(faces):
    stream = make_stream(faces, num_workers=2)
    assert_same(first(stream, 3) + first(stream, 4), first(make_stream(faces, num_workers=2), 7))


def test_zero_and_one_worker_read_alike_and_the_batch_size_may_change(faces):
    stream = make_stream(faces, num_workers=1)
    first(stream, 3)
    resumed = make_stream(faces, batch_size=10)
    assert resumed.load_state_dict(stream.state_dict()) is None
    assert numbers(first(resumed, 1)) == numbers(first(stream, 2))


def test_readers_of_one_stream_do_not_disturb_each_other(faces):
    stream = make_stream(faces)
    ahead, behind = iter(stream), iter(stream)
    places = [next(ahead)["place"] for _ in range(3)]
    for place in places:
        assert next(behind)["place"] == place
        next(ahead)


def test_resuming_reads_one_block_again_and_decodes_nothing_twice():
    opened, read, decoded = [], [], []

    def generate(shards: list[int]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            opened.append(shard)
            for number in range(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE):
                read.append(number)
                yield row(number)

    def counted_decode(image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        pixels = decode(image, rng)
        decoded.append(int(pixels[0, 0, 0]))
        return pixels

    shards = {"shards": list(range(NUM_SHARDS))}
    dataset = datasets.IterableDataset.from_generator(generate, gen_kwargs=shards, features=FEATURES)
    stream = make_stream(dataset, decode=counted_decode)
    first(stream, 2)
    assert len(decoded) == 10
    rows_of_epoch = list(read)
    opened.clear(), read.clear(), decoded.clear()

    resumed = make_stream(dataset, decode=counted_decode)
    resumed.load_state_dict(stream.state_dict())
    batches = first(resumed, 1)  # of rows 8 to 11, the third block, and of 12 to 15, the fourth
    # The file of row 8 begins with row 6, so `datasets` skips rows 6 and 7.
    assert read[: 12 - 6] == rows_of_epoch[6:]
    assert len(read) == 16 - 6
    assert len(opened) == 2
    assert decoded == numbers(batches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_workers": 1}, "epoch 1, because `num_workers` was 2 and is 1"),
        ({"num_processes": 2}, "`num_processes` was 1 and is 2"),
        ({"num_processes": 2, "process_index": 1}, "`process_index` was 0 and is 1"),
        ({"block_size": 8}, "`block_size` was 4 and is 8"),
        ({"seed": 3}, "`seed` was 0 and is 3"),
    ],
)
def test_epoch_restarts_if_the_split_has_changed(faces, change, message):
    stream = make_stream(faces, num_workers=2)
    first(stream, 6)
    assert stream.epoch == 1
    arguments = {"num_workers": 2, **change}
    resumed = make_stream(faces, **arguments)
    assert message in resumed.load_state_dict(stream.state_dict())
    begun = make_stream(faces, **arguments)
    begun.start_epoch(1)
    batches = first(resumed, 2)
    assert batches[0]["names"][0].startswith("epoch 1,")
    assert_same(batches, first(begun, 2))


def test_reading_leaves_the_global_random_state_unchanged(faces):
    state = torch.get_rng_state()
    first(make_stream(faces), 2)
    assert torch.equal(torch.get_rng_state(), state)


# Bad input


@pytest.fixture
def broken(tmp_path) -> datasets.IterableDataset:
    rows = [row(number) for number in range(10)]
    rows[3]["image"]["bytes"] = picture(3)[:45]
    rows[5]["image"]["bytes"] = b"junk"
    rows[7]["image"] = None
    return parquet(tmp_path, rows)


def test_unreadable_image_is_named(broken):
    with pytest.raises(ValueError, match=r"An image cannot be read: epoch 0, process 0, worker 0, row [357]"):
        first(make_stream(broken), 2)


def test_unreadable_images_are_skipped_counted_and_named(broken):
    stream = make_stream(broken, skip_unreadable=True, batch_size=3, block_size=3)
    batches = first(stream, 3)
    state = stream.state_dict()
    batches += first(stream, 2)
    assert sorted(numbers_of_epoch(0, batches)) == [0, 1, 2, 4, 6, 8, 9]
    skipped = [name for batch in batches for name in batch["skipped"]]
    assert stream.num_skipped == len(skipped)
    reasons = sorted(name.split("row ")[1] for name in skipped if name.startswith("epoch 0,"))
    assert [reason[0] for reason in reasons] == ["3", "5", "7"]
    assert "(5.png): cannot identify" in reasons[1]
    assert reasons[2] == "7: the image is missing"

    resumed = make_stream(broken, skip_unreadable=True, batch_size=3, block_size=3)
    resumed.load_state_dict(state)
    going_on = first(resumed, 2)
    assert numbers(going_on) == numbers(batches[3:])
    assert [len(batch["skipped"]) for batch in going_on] == [len(batch["skipped"]) for batch in batches[3:]]
    assert resumed.num_skipped == stream.num_skipped


def test_epoch_without_readable_image(tmp_path):
    rows = [{"image": {"bytes": b"junk", "path": None}, "label": 0}] * 6
    stream = make_stream(parquet(tmp_path, rows), skip_unreadable=True)
    with pytest.raises(ValueError, match="no readable image in its 6 rows of epoch 0"):
        first(stream, 1)


def test_epoch_that_is_readable_only_before_the_position(tmp_path):
    rows = [row(0)] + [{"image": {"bytes": b"junk", "path": None}, "label": 0}] * 5
    arguments = {"skip_unreadable": True, "batch_size": 1, "block_size": 1}
    stream = make_stream(parquet(tmp_path, rows), **arguments)
    first(stream, 1)
    resumed = make_stream(parquet(tmp_path, rows), **arguments)
    resumed.load_state_dict(stream.state_dict())
    (batch,) = first(resumed, 1)
    assert batch["names"][0].startswith("epoch 1,")
    assert len(batch["skipped"]) == 5


def test_empty_stream(tmp_path):
    with pytest.raises(ValueError, match="no readable image in its 0 rows"):
        first(make_stream(parquet(tmp_path, [])), 1)
    with pytest.raises(ValueError, match="The dataset is empty"):
        make_stream(datasets.IterableDataset.from_generator(lambda: iter(())))


def test_process_without_a_row(tmp_path):
    dataset = parquet(tmp_path, [row(0)])
    with pytest.raises(ValueError, match="Process 1, worker 0 found no readable image in its 0 rows"):
        first(make_stream(dataset, process_index=1, num_processes=2), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "at least 1, got 0 and 4"),
        ({"block_size": 0}, "at least 1, got 5 and 0"),
        ({"process_index": 2, "num_processes": 2}, "must be 0 to 1, got 2"),
        ({"image_column": "label"}, "'label' of .* Columns with images: image; all columns: image, label"),
        ({"label_column": "image"}, "'image' of .* contains no integers or class labels. Columns that do: label"),
        ({"label_column": "age"}, "'age' of .* Columns that do: label"),
    ],
)
def test_bad_arguments(faces, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_stream(faces, **arguments)


# Columns


def test_labels_are_whole_numbers_and_none_is_missing(tmp_path):
    features = Features({"age": Value("int32"), "image": datasets.Image()})
    rows = [{"age": 10 * number, "image": row(number)["image"]} for number in range(5)]
    (batch,) = first(make_stream(parquet(tmp_path, rows, features=features), label_column="age"), 1)
    assert batch["labels"].tolist() == [10 * number for number in numbers([batch])]
    assert batch["labels"].dtype == torch.int64

    rows[2]["age"] = None
    with pytest.raises(ValueError, match=r"\(2.png\): no label"):
        first(make_stream(parquet(tmp_path, rows, features=features), label_column="age"), 1)


@pytest.mark.parametrize("as_picture", [lambda image: image, lambda image: Image.open(io.BytesIO(image["bytes"]))])
def test_stream_without_types_is_known_by_its_first_row(as_picture: Callable):
    def generate() -> Iterator[dict[str, Any]]:
        for number in range(10):
            yield {"caption": "a face", "face": as_picture(row(number)["image"]), "label": number % 3}

    dataset = datasets.IterableDataset.from_generator(generate)
    assert dataset.features is None
    batches = first(make_stream(dataset, label_column="label"), 2)
    assert sorted(numbers(batches)) == list(range(10))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [number % 3 for number in numbers(batches)]
    with pytest.raises(ValueError, match="'caption' .* Columns with images: face; all columns: caption, face, label"):
        make_stream(dataset, image_column="caption")


def test_other_image_columns_are_not_read(tmp_path):
    features = Features({"image": datasets.Image(), "mask": datasets.Image()})
    rows = [{"image": row(number)["image"], "mask": {"bytes": b"junk", "path": None}} for number in range(5)]
    dataset = parquet(tmp_path, rows, features=features)
    assert sorted(numbers(first(make_stream(dataset), 1))) == list(range(5))
    with pytest.raises(ValueError, match="cannot be read"):
        first(make_stream(dataset, image_column="mask"), 1)
