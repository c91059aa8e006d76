import logging
import os
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ddpm_faces.data import FaceDataset
from ddpm_faces.data import batches as module
from ddpm_faces.data.batches import FaceBatches


@pytest.fixture
def dataset() -> FaceDataset:
    """Thirty images. The pixels of each are its number."""
    return FaceDataset(torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1))


def take(batches: FaceBatches, number: int) -> list[list[int]]:
    return [batch["images"].flatten().tolist() for batch in islice(batches.batches(), number)]


def test_an_epoch_is_a_permutation_in_full_batches(dataset):
    batches = FaceBatches(dataset, 8, slice(0, 8))
    taken = take(batches, 6)
    assert batches.images_seen == 48
    assert batches.epoch == 2
    epochs = [sum(taken[:3], []), sum(taken[3:], [])]
    assert all(len(set(epoch)) == 24 for epoch in epochs)
    assert set(epochs[0]) != set(epochs[1])  # other images are left out
    assert epochs[0] != sorted(epochs[0])
    assert take(FaceBatches(dataset, 8, slice(0, 8), seed=1), 6) != taken


def test_shares_make_up_the_batch_with_matching_names(dataset):
    whole = take(FaceBatches(dataset, 8, slice(0, 8)), 4)
    parts = [take(FaceBatches(dataset, 8, slice(first, first + 4)), 4) for first in (0, 4)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    batch = next(FaceBatches(dataset, 8, slice(4, 8)).batches())
    assert batch["names"] == [f"image {number}" for number in batch["images"].flatten().tolist()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumes_anywhere_without_fetching_earlier_images(dataset, monkeypatch, num_workers):
    expected = take(FaceBatches(dataset, 8, slice(0, 8)), 7)
    batches = FaceBatches(dataset, 8, slice(0, 8), num_workers=num_workers)
    batches.images_seen = 32
    fetched = []
    original = FaceDataset.fetch
    monkeypatch.setattr(FaceDataset, "fetch", lambda self, *args: fetched.append(args) or original(self, *args))
    assert take(batches, 3) == expected[4:]
    assert batches.images_seen == 56
    assert num_workers or len(fetched) == 3


def test_batch_size_can_change_within_an_epoch(dataset):
    batches = FaceBatches(dataset, 6, slice(0, 6))
    batches.images_seen = 16
    assert all(len(set(batch)) == 6 for batch in take(batches, 5))


def test_global_random_state_is_untouched(dataset):
    state = torch.get_rng_state()
    take(FaceBatches(dataset, 8, slice(0, 8), num_workers=1), 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_too_few_images(dataset):
    with pytest.raises(ValueError, match=r"`train_batch_size` must be at most the number of images \(30\), got 32"):
        FaceBatches(dataset, 32, slice(0, 32))


class DyingOnce(FaceDataset):
    """A dataset whose worker dies at a request, but only once: a file records it."""

    def fetch(self, indices: np.ndarray, crops: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        if indices[0] == self.deadly and not os.path.exists(self.marker):
            if self.marker:
                open(self.marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fetch(indices, crops)


def test_dead_worker_is_replaced_and_no_image_is_lost(dataset, tmp_path, caplog):
    expected = take(FaceBatches(dataset, 8, slice(0, 8)), 6)
    dying = DyingOnce(dataset.images)
    dying.deadly, dying.marker = expected[2][0], str(tmp_path / "died")
    with caplog.at_level(logging.WARNING):
        assert take(FaceBatches(dying, 8, slice(0, 8), num_workers=1), 6) == expected
    assert caplog.text.count("A data worker died") == 1


def test_workers_that_always_die_are_an_error(dataset):
    dying = DyingOnce(dataset.images)
    dying.deadly, dying.marker = take(FaceBatches(dataset, 8, slice(0, 8)), 1)[0][0], ""
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        take(FaceBatches(dying, 8, slice(0, 8), num_workers=1), 1)


@pytest.mark.parametrize("error", [RuntimeError("no"), ConnectionResetError("no"), EOFError("no")])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_errors_do_not_count_as_dead_workers(dataset, caplog, error, num_workers):
    class Failing(FaceDataset):
        def fetch(self, *args):
            raise error

    with pytest.raises(type(error), match="no"):
        take(FaceBatches(Failing(dataset.images), 8, slice(0, 8), num_workers=num_workers), 1)
    assert "died" not in caplog.text


class BrokenPipe:
    """A loader whose worker died while sending a batch. The broken pipe shows this before the system does."""

    num_workers = 1

    def __iter__(self):
        yield 1
        raise EOFError


def test_worker_that_dies_while_sending_a_batch(caplog):
    loaders = iter([BrokenPipe(), DataLoader([2, 3], batch_size=None)])
    assert list(module.restarting(lambda: next(loaders))) == [1, 2, 3]
    assert caplog.text.count("A data worker died") == 1


def test_workers_ignore_signals_to_the_process_group(dataset):
    """Ctrl-C is sent to all processes of a terminal."""

    class Signalled(FaceDataset):
        def fetch(self, *args):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGUSR1)
            return super().fetch(*args)

    before = signal.getsignal(signal.SIGINT)  # background jobs of a shell ignore it
    batches = FaceBatches(Signalled(dataset.images), 8, slice(0, 8), num_workers=1)
    assert take(batches, 2) == take(FaceBatches(dataset, 8, slice(0, 8)), 2)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_sigchld_handler_is_restored(dataset, num_workers):
    def handler(*_):
        pass

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        batches = FaceBatches(dataset, 10, slice(0, 10), num_workers=num_workers).batches()
        next(batches)
        assert signal.getsignal(signal.SIGCHLD) is handler
        batches.close()
    finally:
        signal.signal(signal.SIGCHLD, before)
