"""In which order pictures are trained on, and how their batches are fetched."""

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
    """Endless batches of a [`FaceDataset`], of which this process takes its share, that begin anywhere.

    Each epoch is a permutation of its own, cut into whole batches; the pictures that are left over are other ones in
    each epoch. All of it follows from (seed, images seen): going on decodes nothing and needs no state.

    Args:
        dataset ([`FaceDataset`]): The pictures.
        batch_size (`int`): Pictures of an optimizer step, over all processes.
        share (`slice`): Those of this process, within the batch.
        seed (`int`, defaults to 0): Seed of order and crops.
        num_workers (`int`, defaults to 0): Processes that fetch; at 0 this one does, which suffices in memory.

    Raises:
        ValueError: Fewer pictures than a batch holds.
    """

    def __init__(
        self, dataset: FaceDataset, batch_size: int, share: slice, seed: int = 0, num_workers: int = 0
    ) -> None:
        if len(dataset) < batch_size:
            raise ValueError(f"`train_batch_size` {batch_size} needs as many pictures, and there are {len(dataset)}.")
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
        """Go on from `images_seen`, for ever.

        Args:
            pin_memory (`bool`, defaults to `False`): Copy the batches to memory from which a GPU reads faster.

        Yields:
            `dict`:
            - **images** (`torch.Tensor` of shape `(share, channels, height, width)`, `torch.uint8`) -- 0 to 255.
            - **labels** (`torch.Tensor` of shape `(share,)`, `torch.int64`) -- Where the data set has them.
            - **names** (`list[str]`) -- What each picture is called.
        """

        def make_loader() -> DataLoader:
            return make_data_loader(_Fetch(self.dataset), self.num_workers, pin_memory, sampler=self._requests())

        for batch in restarting(make_loader):
            self.images_seen += self.batch_size
            yield {**batch, "names": self.dataset.names(batch.pop("indices").tolist())}

    def _requests(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Which pictures, and where to crop them."""
        images_seen = self.images_seen
        order, order_epoch = np.empty(0, np.int64), -1
        while True:
            epoch, first = divmod(images_seen, self.images_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset)), epoch
            first -= first % self.batch_size  # where the batch size has changed within an epoch
            crops = draw_crops(self.seed, images_seen, self.batch_size, self.share)
            yield order[first : first + self.batch_size][self.share], crops
            images_seen += self.batch_size


class _Fetch:
    """For a `DataLoader`, whose workers each fetch a whole share at once."""

    def __init__(self, dataset: FaceDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, request: tuple[np.ndarray, np.ndarray]) -> dict[str, torch.Tensor]:
        indices, crops = request
        return {**self.dataset.fetch(indices, crops), "indices": torch.from_numpy(indices)}


def make_data_loader(dataset: Any, num_workers: int, pin_memory: bool, sampler: Any = None) -> DataLoader:
    """A loader of samples that are batches already."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
        # It draws a seed that nobody uses; without its own generator it would draw from that of the training.
        generator=torch.Generator(),
    )


def restarting(make_loader: Callable[[], DataLoader], max_deaths: int = 3) -> Iterator[Any]:
    """The batches of a loader, and of another one where a worker has died, which has to go on after the last batch.

    Args:
        make_loader (`Callable`): Makes a loader that begins where the batches taken so far end.
        max_deaths (`int`, defaults to 3): Deaths without a batch in between that are an error.

    Raises:
        RuntimeError: Too many deaths.
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
            logger.warning("A data worker died (%s); it is started anew, and no picture is lost.", error or "unseen")
        del batches


@contextmanager
def _without_death_handler(num_workers: int) -> Iterator[None]:
    """Start workers without torch's handler of SIGCHLD.

    It would raise the death of a worker wherever the trainer is: in the middle of a step, or of a save. Without it,
    the loader notices when it next waits for a batch.
    """
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    if num_workers == 0 or not hasattr(signal, "SIGCHLD") or not is_main:
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


def _is_death(error: Exception, loader: DataLoader) -> bool:
    """Whether it is about a worker that died, and not an error of its own that the loader passes on."""
    if loader.num_workers == 0 or str(error).startswith("Caught "):
        return False
    # One that dies while it hands a batch over leaves a broken pipe.
    return "DataLoader worker" in str(error) or isinstance(error, EOFError | ConnectionError)


def _leave_signals_to_the_trainer(worker_id: int) -> None:
    """What is sent to a whole group of processes, as Ctrl-C is, ends the step; its data must still come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
