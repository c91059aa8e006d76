"""The log of a run: losses, speed and memory, on the disk and in a tracker, and the progress bar."""

import contextlib
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from ..evaluation.held_out import bin_names, timestep_bins
from ..files import replacing
from .checkpoint import list_checkpoints
from .config import TrainingConfig
from .preemption import EXIT_NONFINITE, EXIT_PREEMPTED
from .state import RunState


if TYPE_CHECKING:
    from .batch import Batch

logger = logging.getLogger(__name__)


class TrainingLog:
    """Records each step on its device, and brings the losses of all processes together when an entry is due.

    Args:
        config ([`TrainingConfig`]): Of the run.
        accelerator ([`~accelerate.Accelerator`]): Gathers losses, and holds the trackers.
        state ([`RunState`]): The run's; steps that are not in the log yet are kept there.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, state: RunState) -> None:
        self.config = config
        self.accelerator = accelerator
        self.state = state
        self.path = Path(config.output_dir, "log.jsonl")
        self.skipped_path = Path(config.output_dir, "skipped_steps.jsonl")
        self._steps: list[dict] = []  # since the last exchange; their tensors are still on the device

    def open(self) -> None:
        """Cut off what an interrupted run wrote after its last checkpoint, and open the trackers."""
        # What was written after the last checkpoint will be written again. Skipped steps are written before each save,
        # entries of the log when they are due.
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
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a job's log file keeps every line
            disable=not self.accelerator.is_local_main_process,
        )
        self._restart_clock()

    def _tracker_settings(self, logged: int) -> dict[str, dict]:
        """A resumed run goes on in the same place of the tracker."""
        folder = Path(self.config.output_dir).resolve()
        identity = hashlib.blake2b(str(folder).encode(errors="surrogateescape"), digest_size=8).hexdigest()
        return {
            "tensorboard": {"purge_step": logged + 1},
            "wandb": {"id": identity, "name": folder.name, "resume": "allow", "dir": str(folder)},
            "trackio": {"name": f"{folder.name}-{identity[:6]}", "resume": "allow"},
        }

    # Each step

    def note_wait(self, seconds: float) -> None:
        """Count time that the run has waited for a batch."""
        self._waited += seconds

    def record(self, batch: "Batch", losses: Sequence[torch.Tensor], grad_norm: torch.Tensor) -> None:
        """Count the step, and keep what it measured; this does not wait for the device.

        Args:
            batch ([`Batch`]): The images of this process.
            losses (`list[torch.Tensor]`): Their losses, a tensor for each micro-batch.
            grad_norm (`torch.Tensor` of shape `()`): Norm of the gradient over all processes, before clipping.
        """
        self.state.images_seen += self.config.train_batch_size
        self.state.is_maintained = False
        self.bar.update(self.config.train_batch_size)
        self._steps.append(
            {
                "images_seen": self.state.images_seen,
                "epoch": batch.epoch,
                "losses": torch.cat(list(losses)),
                "timesteps": batch.draws.timesteps,
                "grad_norm": grad_norm.detach(),
                "names": batch.names,
            }
        )

    def collect(self) -> None:
        """Bring the losses of all processes to the host. This waits for the device; nothing else between logs does."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        gather, num_processes = self.accelerator.gather, self.accelerator.num_processes
        losses, timesteps = (
            # (processes * steps, share) -> (steps, images in the order of the batch)
            gather(torch.stack([step[name] for step in steps]))
            .view(num_processes, len(steps), -1)
            .transpose(0, 1)
            .reshape(len(steps), -1)
            .tolist()
            for name in ("losses", "timesteps")
        )
        grad_norms = torch.stack([step["grad_norm"].float() for step in steps]).tolist()
        for step, step_losses, step_timesteps, grad_norm in zip(steps, losses, timesteps, grad_norms, strict=True):
            entry = {
                "images_seen": step["images_seen"],
                "epoch": step["epoch"],
                "losses": step_losses,
                "timesteps": step_timesteps,
                "grad_norm": grad_norm,
            }
            if math.isfinite(grad_norm):
                self.state.nonfinite_in_a_row = 0
            else:
                self._note_skipped(entry, gather_object(list(step["names"])))
            self.state.unlogged_steps.append(entry)

    def _note_skipped(self, entry: dict, names: list[str]) -> None:
        self.state.skipped_steps += 1
        self.state.nonfinite_in_a_row += 1
        if self.accelerator.is_main_process:
            append_jsonl(self.skipped_path, {**entry, "pictures": names})
            culprits = [i for i, loss in enumerate(entry["losses"]) if not math.isfinite(loss)] or range(len(names))
            listed = ", ".join(f"{names[i]} at timestep {entry['timesteps'][i]}" for i in list(culprits)[:5])
            logger.warning(
                "The step that ended at %d images is skipped: its gradient norm is %s. Images with a loss that is "
                "not finite, or all (%d): %s%s. See %s.",
                *(entry["images_seen"], entry["grad_norm"], len(culprits), listed),
                *(", ..." if len(culprits) > 5 else "", self.skipped_path),
            )
        if self.state.nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            newest = list_checkpoints(self.config.output_dir)
            self.leave(
                EXIT_NONFINITE,
                f"{self.state.nonfinite_in_a_row} steps in a row had a gradient that is not finite, and were skipped. "
                f"The last good checkpoint stands: {newest[-1] if newest else 'none yet'}. Try a lower "
                "`learning_rate`, or `mixed_precision` bf16 or no.",
            )

    # Entries

    def write_steps(self) -> None:
        """Write an entry on the steps since the last one."""
        self.collect()
        steps, self.state.unlogged_steps = self.state.unlogged_steps, []
        losses, timesteps = (np.array([step[name] for step in steps]).ravel() for name in ("losses", "timesteps"))
        finite = np.isfinite(losses)
        num_timesteps = self.config.num_train_timesteps
        bins = np.digitize(timesteps, timestep_bins(num_timesteps)[1:-1])
        by_bin = [_mean(losses[finite & (bins == i)]) for i in range(len(bin_names(num_timesteps)))]
        last = steps[-1]
        values = {
            "loss": _mean(losses[finite]),
            "loss_by_timestep": dict(zip(bin_names(num_timesteps), by_bin, strict=True)),
            "grad_norm": _mean([step["grad_norm"] for step in steps if math.isfinite(step["grad_norm"])]),
            "learning_rate": self.config.learning_rate_at(last["images_seen"] - self.config.train_batch_size),
            "epoch": last["epoch"],
            "skipped_steps": self.state.skipped_steps,
        }
        seconds = time.perf_counter() - self._clock_start
        values |= {
            "images_per_second": (self.state.images_seen - self._clock_images) / seconds,
            "data_wait": self._waited / seconds,
            "memory_gb": self._memory_gb(),
        }
        if self.state.images_seen == self._clock_images:
            values["images_per_second"] = values["data_wait"] = None  # after resuming just before the entry
        self.write(values)
        loss = math.nan if values["loss"] is None else values["loss"]
        self.bar.set_postfix(loss=f"{loss:.4f}", epoch=last["epoch"])
        self._restart_clock()

    def write(self, values: dict[str, Any]) -> None:
        """Write an entry after the images seen so far, to the file and the tracker."""
        scalars = {}
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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within does not count as training time."""
        began = time.perf_counter()
        yield
        self._clock_start += time.perf_counter() - began

    def _restart_clock(self) -> None:
        self._clock_start, self._clock_images, self._waited = time.perf_counter(), self.state.images_seen, 0.0

    def _memory_gb(self) -> float:
        """The most memory that was in use so far: of the GPU, or of this process."""
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        try:
            import resource
        except ModuleNotFoundError:  # on Windows
            import psutil

            memory = psutil.Process().memory_info()
            return getattr(memory, "peak_wset", memory.rss) / 1e9
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    # The end

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()

    def leave(self, code: int, message: str) -> NoReturn:
        """End the process with a code of docs/training.md, and say why."""
        self.bar.close()
        if self.accelerator.is_main_process:
            print(message, file=sys.stderr if code != EXIT_PREEMPTED else sys.stdout, flush=True)
        self.accelerator.end_training()
        raise SystemExit(code)


def read_jsonl(path: Path) -> list[dict]:
    """The entries of a log, less a last line that was cut off while it was written."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def append_jsonl(path: Path, entry: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
