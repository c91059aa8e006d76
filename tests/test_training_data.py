from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_faces.training.config import TrainingConfig
from ddpm_faces.training.data import load_training_data


ALONE = SimpleNamespace(num_processes=1, process_index=0)


@pytest.fixture
def folder(tmp_path) -> str:
    for number in range(30):
        Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(tmp_path / f"{number:02d}.png")
    return str(tmp_path)


def load(folder: str, **overrides):
    settings = {"train_data_dir": folder, "resolution": [8], "train_batch_size": 4, **overrides}
    return load_training_data(TrainingConfig(**settings), ALONE)


def test_at_most_a_tenth_is_held_out_and_never_trained_on(folder):
    data = load(folder)
    seen = [int(images[0, 0, 0]) for images in data.batches.dataset.images]
    held_out = [int(images[0, 0, 0]) for images in data.held_out.images]
    assert (len(seen), len(held_out)) == (27, 3)
    assert sorted(seen + held_out) == list(range(30))


def test_nothing_is_held_out_of_too_few_images(folder):
    data = load(folder, max_train_samples=9)
    assert data.held_out is None
    assert len(data.batches.dataset) == 9


def test_held_out_faces_are_drawn_in_addition():
    data = load_training_data(TrainingConfig(num_drawn_images=40, num_validation_images=8, resolution=[16]), ALONE)
    assert (len(data.batches.dataset), len(data.held_out)) == (40, 8)


def test_folder_of_images_has_no_splits(folder):
    with pytest.raises(ValueError, match="`validation_split` 'test': a folder of images has no splits"):
        load(folder, validation_split="test")


def test_growing_folder_never_holds_out_training_images(tmp_path):
    """Resuming keeps the number of held-out images. Earlier ones stay held out or are replaced by new images."""

    def add(names: range) -> None:
        for name in names:
            pixels = np.random.default_rng(name).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "faces" / f"{name:03d}.png")

    def digests(images: torch.Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    (tmp_path / "faces").mkdir()
    add(range(100, 140))
    settings = {"resolution": [8], "train_batch_size": 4, "num_validation_images": 64}
    config = TrainingConfig(train_data_dir=str(tmp_path / "faces"), cache_dir=str(tmp_path / "cache"), **settings)
    before = load_training_data(config, ALONE)
    assert len(before.held_out) == 4
    add(range(0, 100))
    after = load_training_data(config, ALONE, num_held_out=len(before.held_out))
    assert len(after.held_out) == 4
    assert not digests(after.held_out.images) & digests(before.batches.dataset.images)


def test_duplicates_count_once_among_the_held_out_images(tmp_path):
    for number in range(50):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        for copy in "ab":
            Image.fromarray(pixels).save(tmp_path / f"{number:02d}{copy}.png")
    first = load(str(tmp_path), num_validation_images=64)
    config = TrainingConfig(train_data_dir=str(tmp_path), resolution=[8], train_batch_size=4, num_validation_images=64)
    again = load_training_data(config, ALONE, first.num_held_out)
    assert (first.num_held_out, len(first.held_out)) == (5, 10)
    assert again.fingerprint == first.fingerprint
