"""The log of a run, in a file and in a tracker, and its progress bar."""

import contextlib
import hashlib
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..files import replacing
from .config import TrainingConfig
from .preemption import EXIT_PREEMPTED
from .state import RunState


if TYPE_CHECKING:
    from .distillation import DistillationConfig

logger = logging.getLogger(__name__)


class TrainingLog:
    """Writes entries to log.jsonl and to the tracker, and ends the process when it must stop.

    Args:
        config ([`TrainingConfig`] or [`DistillationConfig`]): The run's configuration.
        accelerator ([`~accelerate.Accelerator`]): Holds the trackers.
        state ([`RunState`]): The run's state, with the number of images seen at each entry.
    """

    def __init__(
        self, config: "TrainingConfig | DistillationConfig", accelerator: Accelerator, state: RunState
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.state = state
        self.path = Path(config.output_dir, "log.jsonl")
        self.skipped_path = Path(config.output_dir, "skipped_steps.jsonl")

    def open(self) -> None:
        """Drop the entries that an interrupted run wrote after its last checkpoint, and open the trackers."""
        # The resumed run writes these entries again. Skipped steps are written before each save, log entries when they
        # are due.
        logged = self.state.images_seen - (0 if self.state.is_maintained else 1)
        if self.accelerator.is_main_process:
            for path, last in {self.path: logged, self.skipped_path: self.state.images_seen}.items():
                if path.exists():
                    entries = [entry for entry in read_jsonl(path) if entry["images_seen"] <= last]
                    with replacing(path) as new:
                        new.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        hyperparameters = {k: v if isinstance(v, (int, float)) else str(v) for k, v in asdict(self.config).items()}
        self.accelerator.init_trackers("training", config=hyperparameters, init_kwargs=self._tracker_settings(logged))
        self.bar = tqdm(
            total=self.config.max_train_steps * self.config.train_batch_size,
            initial=self.state.images_seen,
            unit="img",
            desc="Training",
            mininterval=0.1 if sys.stderr.isatty() else 10,  # in the log file of a job, every update would be a line
            disable=not self.accelerator.is_local_main_process,
        )

    def _tracker_settings(self, logged: int) -> dict[str, dict]:
        """Return the settings that let a resumed run continue its entry in the tracker."""
        folder = Path(self.config.output_dir).resolve()
        identity = hashlib.blake2b(str(folder).encode(errors="surrogateescape"), digest_size=8).hexdigest()
        return {
            "tensorboard": {"purge_step": logged + 1},
            "wandb": {"id": identity, "name": folder.name, "resume": "allow", "dir": str(folder)},
            "trackio": {"name": f"{folder.name}-{identity[:6]}", "resume": "allow"},
        }

    # Entries

    def write(self, values: dict[str, Any]) -> None:
        """Write an entry for the images seen so far to the file and the tracker."""
        scalars: dict[str, Any] = {}
        for name, value in values.items():
            parts = {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
            scalars |= {key: v for key, v in parts.items() if v is not None}
        self.accelerator.log(scalars, step=self.state.images_seen)
        if self.accelerator.is_main_process:
            append_jsonl(self.path, {"images_seen": self.state.images_seen, **values})

    def write_image(self, image: Image.Image) -> None:
        """Show a grid of samples in the tracker. Called by the main process."""
        if self.config.report_to == "none":
            return
        tracker = self.accelerator.get_tracker(self.config.report_to, unwrap=True)
        if self.config.report_to == "tensorboard":
            tracker.add_image("samples", np.asarray(image), self.state.images_seen, dataformats="HWC")
        elif self.config.report_to == "wandb":
            import wandb

            tracker.log({"samples": wandb.Image(image)}, step=self.state.images_seen)
        elif self.config.report_to == "trackio":
            import trackio

            tracker.log({"samples": trackio.Image(image)}, step=self.state.images_seen)

    # Ending the run

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()

    def leave(self, code: int, message: str) -> NoReturn:
        """Print a message and end the process with one of the exit codes of docs/guides/resume.md."""
        self.bar.close()
        if self.accelerator.is_main_process:
            print(message, file=sys.stderr if code != EXIT_PREEMPTED else sys.stdout, flush=True)
        self.accelerator.end_training()
        raise SystemExit(code)


def read_jsonl(path: Path) -> list[dict]:
    """Read the entries of a log, without a last line that was cut off."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def append_jsonl(path: Path, entry: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
