"""Measurements of each step: losses, gradient norms, speed and memory."""

import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..evaluation.held_out import bin_names, timestep_bins
from .checkpoint import list_checkpoints
from .config import TrainingConfig
from .log import TrainingLog, append_jsonl
from .preemption import EXIT_NONFINITE
from .state import RunState


if TYPE_CHECKING:
    from .batch import Batch

logger = logging.getLogger(__name__)


class StepRecorder:
    """Keeps the measurements of each step on the device, and gathers them from all processes for a log entry.

    Args:
        config ([`TrainingConfig`]): The run's configuration.
        accelerator ([`~accelerate.Accelerator`]): Gathers the losses.
        state ([`RunState`]): The run's state, which keeps the steps that are not in the log yet.
        log ([`TrainingLog`]): The log that receives the entries.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, state: RunState, log: TrainingLog) -> None:
        self.config = config
        self.accelerator = accelerator
        self.state = state
        self.log = log
        self._steps: list[dict] = []  # since the last `collect`; their tensors are on the device
        self.restart_clock()

    def note_wait(self, seconds: float) -> None:
        """Count the seconds that the run waited for a batch."""
        self._waited += seconds

    def record(self, batch: "Batch", losses: Sequence[torch.Tensor], grad_norm: torch.Tensor) -> None:
        """Count the step and keep its measurements, without waiting for the device.

        Args:
            batch ([`Batch`]): The images of this process.
            losses (`list[torch.Tensor]`): Their losses, one tensor per micro-batch.
            grad_norm (`torch.Tensor` of shape `()`): Norm of the gradient over all processes, before clipping.
        """
        self.state.images_seen += self.config.train_batch_size
        self.state.is_maintained = False
        self.log.bar.update(self.config.train_batch_size)
        self._steps.append(
            {
                "images_seen": self.state.images_seen,
                "epoch": batch.epoch,
                "losses": torch.cat(list(losses)),
                "timesteps": batch.timesteps,
                "grad_norm": grad_norm.detach(),
                "names": batch.names,
            }
        )

    def collect(self) -> None:
        """Gather the losses of all processes on the CPU. Between log entries, only this waits for the device."""
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
            append_jsonl(self.log.skipped_path, {**entry, "pictures": names})
            culprits = [i for i, loss in enumerate(entry["losses"]) if not math.isfinite(loss)] or range(len(names))
            listed = ", ".join(f"{names[i]} at timestep {entry['timesteps'][i]}" for i in list(culprits)[:5])
            logger.warning(
                "Skipped the step that ended at %d images, because its gradient norm is %s. Images with a non-finite "
                "loss, or all if there are none (%d): %s%s. See %s.",
                *(entry["images_seen"], entry["grad_norm"], len(culprits), listed),
                *(", ..." if len(culprits) > 5 else "", self.log.skipped_path),
            )
        if self.state.nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            newest = list_checkpoints(self.config.output_dir)
            self.log.leave(
                EXIT_NONFINITE,
                f"{self.state.nonfinite_in_a_row} steps in a row had a non-finite gradient and were skipped. Last "
                f"good checkpoint: {newest[-1] if newest else 'none yet'}. Try a lower `learning_rate`, or "
                "`mixed_precision` bf16 or no.",
            )

    def write_entry(self) -> None:
        """Write a log entry for the steps since the last one."""
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
            values["images_per_second"] = values["data_wait"] = None  # the run was resumed just before this entry
        self.log.write(values)
        loss = math.nan if values["loss"] is None else values["loss"]
        self.log.bar.set_postfix(loss=f"{loss:.4f}", epoch=last["epoch"])
        self.restart_clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent within this context from training time."""
        began = time.perf_counter()
        yield
        self._clock_start += time.perf_counter() - began

    def restart_clock(self) -> None:
        """Measure speed from now on."""
        self._clock_start, self._clock_images, self._waited = time.perf_counter(), self.state.images_seen, 0.0

    def _memory_gb(self) -> float:
        """Return the peak memory so far, of the GPU or of this process, in GB."""
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


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
