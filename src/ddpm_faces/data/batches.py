"""The order in which training sees the images, and the loading of batches."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from .dataset import FaceDataset
from .draws import draw_crops


logger = logging.getLogger(__name__)


class FaceBatches:
    """Endless batches of a [`FaceDataset`], shared among processes, from any position.

    Each epoch is a new permutation, cut into full batches. The images that are left over differ from epoch to
    epoch. The order depends only on (seed, images seen), so resuming needs no state and decodes nothing twice.

    Args:
        dataset ([`FaceDataset`]): The images.
        batch_size (`int`): Number of images per optimizer step, over all processes.
        share (`slice`): The part of the batch that belongs to this process.
        seed (`int`, defaults to 0): Seed of the order and the crops.
        num_workers (`int`, defaults to 0): Number of worker processes; 0 loads in this process, which is fast enough
            for images in memory.

    Raises:
        ValueError: There are fewer images than `batch_size`.
    """

    def __init__(
        self, dataset: FaceDataset, batch_size: int, share: slice, seed: int = 0, num_workers: int = 0
    ) -> None:
        if len(dataset) < batch_size:
            raise ValueError(
                f"`train_batch_size` must be at most the number of images ({len(dataset)}), got {batch_size}."
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.share = share
        self.seed = seed
        self.num_workers = num_workers
        self.images_seen = 0

    @property
    def images_per_epoch(self) -> int:
        return len(self.dataset) // self.batch_size * self.batch_size

    @property
    def epoch(self) -> int:
        return self.images_seen // self.images_per_epoch

    def batches(self, pin_memory: bool = False) -> Iterator[dict[str, Any]]:
        """Iterate endlessly from `images_seen` on.

        Args:
            pin_memory (`bool`, defaults to `False`): Whether to copy batches to pinned memory, for transfer to a GPU.

        Yields:
            `dict`:
            - **images** (`torch.Tensor` of shape `(share, channels, height, width)`, `torch.uint8`) -- 0 to 255.
            - **labels** (`torch.Tensor` of shape `(share,)`, `torch.int64`) -- Class labels, if the dataset has them.
            - **captions** (`list[list[str]]`) -- The captions of each image, if the dataset has them.
            - **names** (`list[str]`) -- The file or row of each image.
        """

        def make_loader() -> DataLoader:
            return make_data_loader(_Fetch(self.dataset), self.num_workers, pin_memory, sampler=self._requests())

        for batch in restarting(make_loader):
            self.images_seen += self.batch_size
            yield {**batch, "names": self.dataset.names(batch.pop("indices").tolist())}

    def _requests(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the indices and crops of each batch."""
        images_seen = self.images_seen
        order, order_epoch = np.empty(0, np.int64), -1
        while True:
            epoch, first = divmod(images_seen, self.images_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset)), epoch
            first -= first % self.batch_size  # in case the batch size has changed within an epoch
            crops = draw_crops(self.seed, images_seen, self.batch_size, self.share)
            yield order[first : first + self.batch_size][self.share], crops
            images_seen += self.batch_size


class _Fetch:
    """Dataset for a `DataLoader` in which each item is this process's share of a batch."""

    def __init__(self, dataset: FaceDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, request: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        indices, crops = request
        return {**self.dataset.fetch(indices, crops), "indices": torch.from_numpy(indices)}


def make_data_loader(dataset: Any, num_workers: int, pin_memory: bool, sampler: Any = None) -> DataLoader:
    """Make a loader for a dataset whose items are batches."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
        # The loader draws a seed that is never used. Without a generator, it would draw from the global random state.
        generator=torch.Generator(),
    )


def restarting(make_loader: Callable[[], DataLoader], max_deaths: int = 3) -> Iterator[Any]:
    """Iterate over the batches of a loader. If a worker dies, continue with a new loader.

    Args:
        make_loader (`Callable`): Makes a loader that continues after the batches taken so far.
        max_deaths (`int`, defaults to 3): Number of deaths without a batch in between that raises an error.

    Raises:
        RuntimeError: Workers died `max_deaths` times without a batch in between.
    """
    deaths = 0
    while True:
        loader = make_loader()
        with _without_death_handler(loader.num_workers):
            batches = iter(loader)
        try:
            for batch in batches:
                yield batch
                deaths = 0
            return
        except (RuntimeError, EOFError, ConnectionError) as error:
            deaths += 1
            if not _is_death(error, loader) or deaths == max_deaths:
                raise
            logger.warning(
                "A data worker died (%s). It was restarted, and no image is lost.", error or "reason unknown"
            )
        del batches


@contextmanager
def _without_death_handler(num_workers: int) -> Iterator[None]:
    """Start workers without torch's handler of SIGCHLD.

    The handler would raise an error anywhere in the training, such as in the middle of a step or a save. Without it,
    the loader notices the death when it next waits for a batch.
    """
    is_main = threading.current_thread() is threading.main_thread()  # other threads may not set handlers
    if num_workers == 0 or not hasattr(signal, "SIGCHLD") or not is_main:
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


def _is_death(error: Exception, loader: DataLoader) -> bool:
    """Whether a worker died, as opposed to raising an error that the loader passes on."""
    if loader.num_workers == 0 or str(error).startswith("Caught "):
        return False
    # A worker that dies while it hands over a batch leaves a broken pipe.
    return "DataLoader worker" in str(error) or isinstance(error, EOFError | ConnectionError)


def _leave_signals_to_the_trainer(worker_id: int) -> None:
    """Ignore signals to the process group, such as Ctrl-C, because the last step still needs its data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
