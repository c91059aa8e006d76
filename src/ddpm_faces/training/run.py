"""What happens beside the training loop: the log, validation, sample grids, checkpoints, the end."""

import contextlib
import hashlib
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import EMAModel
from filelock import FileLock, Timeout
from PIL import Image
from tqdm.auto import tqdm

from .. import __version__
from ..data.batches import FaceBatches
from ..evaluation.held_out import bin_names, held_out_losses, timestep_bins
from ..evaluation.quality import METRICS_NAME, write_metrics
from ..files import replacing
from ..objective import DDPMFacesObjective
from ..pipeline_ddpm_faces import DDPMFacesPipeline
from ..plots import image_grid, loss_curve, side_by_side
from ..scheduling_ddpm_faces import DDPMFacesScheduler
from ..solvers import fast_solver
from ..unet_ddpm_faces import DDPMFacesUNet
from . import checkpoint as checkpoints
from .config import TrainingConfig
from .data import TrainingData
from .preemption import EXIT_NONFINITE, EXIT_PREEMPTED, Preemption


logger = logging.getLogger(__name__)

CONFIG_NAME = "training_config.yaml"
# What it means that a field of a group is another one than before.
MEANING = {
    "Data": "from here on it sees other pictures",
    "Network": "nothing that is learned changes",  # a change of the architecture is refused
    "Diffusion": "losses before and after cannot be compared",  # as is one of the schedule
    "Optimisation": "holds from here on, so the run is no longer one that had it from the start",
    "Validation": "held-out losses or grids before and after may not compare",
    "Run": "nothing that is learned changes",
    "Hub": "nothing that is learned changes",
}


@dataclass
class RunState:
    """How far a run has come; saved with each checkpoint."""

    images_seen: int = 0
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0
    best_loss: float | None = None
    best_images_seen: int | None = None
    validations_since_best: int = 0
    audits: list[dict] = field(default_factory=list)
    guide_images_seen: int | None = None  # by the weights that are kept as a guide
    is_maintained: bool = True  # whether what is due after `images_seen` has been done
    unlogged_steps: list[dict] = field(default_factory=list)
    seconds: float = 0.0  # that its processes have been at work, up to the last save

    @property
    def clean_images_seen(self) -> int | None:
        """Of the last audit that found no copies."""
        return next((audit["images_seen"] for audit in reversed(self.audits) if not audit["found_copies"]), None)


@contextmanager
def locked(output_dir: str, is_main_process: bool) -> Iterator[None]:
    """Make `output_dir`, which no other run may write to meanwhile; if nothing comes into it, it goes away again."""
    if not is_main_process:
        yield
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        # A run that lost its launcher saves and ends within this time.
        lock.acquire(timeout=60)
    except Timeout as error:
        raise ValueError(f"`output_dir` {output_dir!r} belongs to a run that is still going on.") from error
    try:
        yield
    finally:
        if not any(path.name != ".lock" for path in folder.iterdir()):
            Path(lock.lock_file).unlink(missing_ok=True)
            folder.rmdir()
        lock.release()


class TrainingRun:
    """A run of training: what it has seen, and all that it does but learn.

    Args:
        config ([`TrainingConfig`]): With the number of classes resolved.
        accelerator ([`~accelerate.Accelerator`]): Of the prepared objects.
        unet, optimizer: As prepared.
        ema ([`~diffusers.EMAModel`], *optional*): Of the parameters of `unet`.
        objective ([`DDPMFacesObjective`]): The loss.
        data ([`TrainingData`]): Where the pictures come from.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        unet: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMAModel | None,
        objective: DDPMFacesObjective,
        data: TrainingData,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.unet = unet
        self.optimizer = optimizer
        self.ema = ema
        self.objective = objective
        self.data = data
        self.output_dir = Path(config.output_dir)
        self.log_path = self.output_dir / "log.jsonl"
        self.skipped_path = self.output_dir / "skipped_steps.jsonl"
        self.state = RunState()
        self.last_image = config.max_train_steps * config.train_batch_size
        self.preemption = Preemption(config.time_limit_minutes)
        self._began = time.time()
        self._guide: DDPMFacesUNet | None = None
        self._reference: tuple | None = None  # what samples are measured with and beside
        self._steps: list[dict] = []  # since the last exchange; tensors are still on the device

    # Start

    def start(self, resume_from: Path | None) -> None:
        """Go on from a checkpoint, if there is one; open log and trackers."""
        if resume_from is not None:
            self._load(resume_from)
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with replacing(self.output_dir / CONFIG_NAME) as path:
                self.config.save(path)
            # What an interrupted run wrote after its last checkpoint will be written again. Skipped steps are written
            # before each save, entries of the log where they are due.
            last_entries = {self.log_path: self._logged_images_seen, self.skipped_path: self.state.images_seen}
            for path, last in last_entries.items():
                entries = [entry for entry in read_jsonl(path) if entry["images_seen"] <= last]
                if path.exists():
                    with replacing(path) as new:
                        new.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
            checkpoints.prune_checkpoints(self.output_dir, self.config.checkpoints_total_limit, self._spared)
        hyperparameters = {k: v if isinstance(v, (int, float)) else str(v) for k, v in asdict(self.config).items()}
        self.accelerator.init_trackers("training", config=hyperparameters, init_kwargs=self._tracker_settings())
        self.bar = tqdm(
            total=self.last_image,
            initial=self.state.images_seen,
            unit="img",
            desc="Training",
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a file of a job keeps every line
            disable=not self.accelerator.is_local_main_process,
        )
        self._batches = self.data.batches.batches(pin_memory=self.accelerator.device.type == "cuda")
        self._restart_clock()
        if not self.state.is_maintained:
            self._maintain()

    def _tracker_settings(self) -> dict[str, dict]:
        """A resumed run goes on in the same place of the tracker."""
        folder = self.output_dir.resolve()
        identity = hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest()
        return {
            "tensorboard": {"purge_step": self._logged_images_seen + 1},
            "wandb": {"id": identity, "name": folder.name, "resume": "allow", "dir": str(folder)},
            "trackio": {"name": f"{folder.name}-{identity[:6]}", "resume": "allow"},
        }

    @property
    def _logged_images_seen(self) -> int:
        """Up to where entries of the log belong to the state."""
        return self.state.images_seen - (0 if self.state.is_maintained else 1)

    @property
    def _spared(self) -> list[Path]:
        """Checkpoints that the run may end with."""
        state, config = self.state, self.config
        of_images = {state.best_images_seen} | ({state.clean_images_seen} if config.stop_on_copies else set())
        return [checkpoints.checkpoint_path(self.output_dir, seen) for seen in of_images - {None}]

    def _load(self, checkpoint: Path) -> None:
        saved = checkpoints.read_state(checkpoint)
        process_state = checkpoints.load_checkpoint(self.accelerator, checkpoint, self._ema_weights())
        # The optimizer came back with the settings that it was saved with; those of the configuration hold.
        for group in self.optimizer.param_groups:
            group.update(optimizer_settings(self.config))
        self.state = RunState(**saved["run"])
        notes = self._differences(saved)
        guide_after, guide_weights = self.config.guide_after_images, checkpoints.load_guide_weights(checkpoint)
        if guide_after is not None and guide_weights is not None:
            self._set_guide(guide_weights)
        elif guide_after is not None and guide_after <= self.state.images_seen and self.state.is_maintained:
            notes.append(f"No guide was kept after {guide_after} images, and it is too late for one.")
        if isinstance(self.data.batches, FaceBatches):
            self.data.batches.images_seen = self.state.images_seen
        else:
            stream_note = self.data.batches.load_state_dict(process_state)
            notes += [] if stream_note is None else [stream_note]
        self.accelerator.print(f"Going on from {checkpoint}, after {self.state.images_seen} images.")
        for note in notes:
            self.accelerator.print(f"  Note: {note}")

    def _differences(self, saved: dict) -> list[str]:
        """What is other than it was when the checkpoint was saved, and what that means."""
        notes = []
        then, now = saved["config"], asdict(self.config)
        groups = {f.name: f.metadata["group"] for f in fields(TrainingConfig)}
        for name, value in now.items():
            if name in ("output_dir", "resume", "dry_run") or then.get(name, value) == value:
                continue
            notes.append(f"`{name}` was {then[name]} and is {value}: {MEANING[groups[name]]}.")
        if saved["fingerprint"] != self.data.fingerprint:
            notes.append("The pictures are not those that it has learned from so far: from here on it sees others.")
        layout = self._layout()
        if saved["layout"] != layout:
            changes = [f"{key} {old} -> {layout[key]}" for key, old in saved["layout"].items() if old != layout[key]]
            kept = "noise and learning rates" if self.config.streaming else "pictures, noise and learning rates"
            notes.append(
                f"Another layout ({', '.join(changes)}): {kept} stay what they would have been, weights differ by "
                "rounding (and by dropout, if there is any)."
            )
        return notes

    def _layout(self) -> dict:
        return {
            "processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "precision": self.accelerator.mixed_precision,
            "device_batch_size": self.config.device_batch_size,
        }

    # Beside each step

    @property
    def images_seen(self) -> int:
        return self.state.images_seen

    @property
    def stopped_early(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.validations_since_best >= patience

    @property
    def stopped_on_copies(self) -> bool:
        return self.config.stop_on_copies and bool(self.state.audits) and self.state.audits[-1]["found_copies"]

    @property
    def is_finished(self) -> bool:
        return self.stopped_early or self.stopped_on_copies or self.state.images_seen >= self.last_image

    def next_batch(self) -> dict[str, Any]:
        """The pictures of this process for the next step, on their way to the device."""
        began = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - began
        for skipped in batch.get("skipped", ()):
            logger.warning("A picture cannot be read and is left out: %s", skipped)
        device = self.accelerator.device
        return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def after_step(
        self, losses: Sequence[torch.Tensor], timesteps: torch.Tensor, grad_norm: torch.Tensor, names: list[str]
    ) -> None:
        """Count the step, and do what is due after it.

        Args:
            losses (`list[torch.Tensor]`): Of this process's pictures.
            timesteps (`torch.Tensor` of shape `(share,)`): Theirs.
            grad_norm (`torch.Tensor` of shape `()`): Of the gradient over all processes, before clipping.
            names (`list[str]`): What the pictures are called.

        Raises:
            SystemExit: The run has to make room and is saved, or it does not learn any more.
        """
        self.state.images_seen += self.config.train_batch_size
        self.state.is_maintained = False
        self.bar.update(self.config.train_batch_size)
        self._steps.append(
            {
                "images_seen": self.state.images_seen,
                "epoch": self._epoch,
                "losses": torch.cat(list(losses)),
                "timesteps": timesteps,
                "grad_norm": grad_norm.detach(),
                "names": names,
            }
        )
        reason = self.preemption.reason()
        if reason is not None and not self.is_finished:
            self._preempt(reason)
        self._maintain()
        self._epoch = self.data.batches.epoch

    def _maintain(self) -> None:
        """Log, validate, sample and save, as far as these are due."""
        config, is_last = self.config, self.state.images_seen >= self.last_image
        if self._is_due(config.log_every_images) or is_last:
            self._log()
        guide_after = config.guide_after_images
        if guide_after is not None and self._is_passed(guide_after):
            self._keep_guide()
        is_best = False
        if self.data.held_out is not None and (self._is_due(config.validate_every_images) or is_last):
            is_best = self._validate()
        if self._is_due(config.sample_every_images) and not is_last:  # `finish` draws the last
            self._sample()
        is_clean = self._assess(is_last)
        self.state.is_maintained = True
        is_wanted = is_last or is_best or (is_clean and config.stop_on_copies)
        if config.checkpoint_every_images and (self._is_due(config.checkpoint_every_images) or is_wanted):
            self._save(required=is_last)

    def _is_due(self, every_images: int) -> bool:
        """Whether the last step passed a multiple of `every_images`; 0 is never."""
        return every_images > 0 and self._is_passed(self.state.images_seen // every_images * every_images)

    def _is_passed(self, images_seen: int) -> bool:
        """Whether it was the last step that reached `images_seen`."""
        return self.state.images_seen - self.config.train_batch_size < images_seen <= self.state.images_seen

    def _keep_guide(self) -> None:
        """Keep the weights of now, averaged ones where there are any, to guide what comes out of this run."""
        with self._paused():
            weights = self._whole_weights()
            if checkpoints.is_sharded(self.unet):  # of which the main process alone has all
                (weights,) = broadcast_object_list([weights])
            self._set_guide(weights)
        self.state.guide_images_seen = self.state.images_seen
        self.accelerator.print(f"The weights after {self.state.images_seen} images are kept as the guide.")

    def _set_guide(self, weights: dict[str, torch.Tensor]) -> None:
        guide = self._network(weights).to(self.accelerator.device, memory_format=torch.channels_last)
        guide.forward = self.accelerator.autocast()(guide.forward)  # in the precision of what it guides
        self._guide = guide

    @property
    def _guidance_scale(self) -> float:
        return 1.0 if self._guide is None else self.config.guidance_scale

    def _network(self, weights: dict[str, torch.Tensor]) -> DDPMFacesUNet:
        """One of its own beside the one that learns."""
        with torch.random.fork_rng(devices=[]):  # the weights that it is made with draw nothing of the training's
            unet = DDPMFacesUNet(**self.config.unet_config())
        unet.load_state_dict(weights)
        return unet.eval().requires_grad_(False)

    def _whole_weights(self) -> dict[str, torch.Tensor]:
        """The averaged weights where there are some, copied to the CPU; whole on the main process."""
        with self.evaluating():
            return {k: v.cpu().clone() for k, v in self.accelerator.get_state_dict(self.unet).items()}

    # Log

    def _collect(self) -> None:
        """Bring the losses of all processes to the host. This waits for the device; nothing else between logs does."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        gather, num_processes = self.accelerator.gather, self.accelerator.num_processes
        losses, timesteps = (
            # (processes * steps, share) -> (steps, pictures in the order of the batch)
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
                self._note_skipped(entry, gather_object(step["names"]))
            self.state.unlogged_steps.append(entry)

    def _note_skipped(self, entry: dict, names: list[str]) -> None:
        self.state.skipped_steps += 1
        self.state.nonfinite_in_a_row += 1
        if self.accelerator.is_main_process:
            append_jsonl(self.skipped_path, {**entry, "pictures": names})
            culprits = [i for i, loss in enumerate(entry["losses"]) if not math.isfinite(loss)] or range(len(names))
            listed = ", ".join(f"{names[i]} at timestep {entry['timesteps'][i]}" for i in list(culprits)[:5])
            logger.warning(
                "The step that ended at %d images is skipped: its gradient norm is %s. Pictures with a loss that is "
                "not finite, or all (%d): %s%s. See %s.",
                *(entry["images_seen"], entry["grad_norm"], len(culprits), listed),
                *(", ..." if len(culprits) > 5 else "", self.skipped_path),
            )
        if self.state.nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            newest = checkpoints.list_checkpoints(self.output_dir)
            self._leave(
                EXIT_NONFINITE,
                f"{self.state.nonfinite_in_a_row} steps in a row had a gradient that is not finite, and were skipped. "
                f"The last good checkpoint stands: {newest[-1] if newest else 'none yet'}. Try a lower "
                "`learning_rate`, or `mixed_precision` bf16 or no.",
            )

    def _log(self) -> None:
        self._collect()
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
        self._write(values)
        loss = math.nan if values["loss"] is None else values["loss"]
        self.bar.set_postfix(loss=f"{loss:.4f}", epoch=last["epoch"])
        self._restart_clock()

    def _write(self, values: dict[str, Any]) -> None:
        """An entry of the log, and of the tracker."""
        scalars = {}
        for name, value in values.items():
            parts = {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
            scalars |= {key: v for key, v in parts.items() if v is not None}
        self.accelerator.log(scalars, step=self.state.images_seen)
        if self.accelerator.is_main_process:
            append_jsonl(self.log_path, {"images_seen": self.state.images_seen, **values})

    def _memory_gb(self) -> float:
        """The most that was in use so far: on the GPU, or of this process."""
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

    def _restart_clock(self) -> None:
        self._clock_start, self._clock_images, self._waited = time.perf_counter(), self.state.images_seen, 0.0
        self._epoch = self.data.batches.epoch

    # Validation

    def _validate(self) -> bool:
        """Measure the held-out loss; whether it is the best so far."""
        with self._paused(), self.evaluating() as unet:
            losses = held_out_losses(self.accelerator, unet, self.objective, self.data.held_out, self.images_per_pass)
        by_bin = losses.mean(dim=0).tolist()
        loss = sum(by_bin) / len(by_bin)
        names = bin_names(self.config.num_train_timesteps)
        self._write({"held_out_loss": loss, "held_out_loss_by_timestep": dict(zip(names, by_bin, strict=True))})
        state = self.state
        is_best = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        if is_best:
            state.best_loss, state.best_images_seen, state.validations_since_best = loss, state.images_seen, 0
        else:
            state.validations_since_best += 1
        return is_best

    def _assess(self, is_last: bool) -> bool:
        """Measure samples and search them for copies, where either is due; whether they were searched in vain."""
        every = self.config.evaluate_every_images, self.config.audit_every_images
        evaluates, audits = (images > 0 and (self._is_due(images) or is_last) for images in every)
        if not (evaluates or audits):
            return False
        with self._paused():
            drawn = self._draw_samples(averaged=True, num_samples=self.config.num_evaluation_samples)
            samples = ((drawn.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            if evaluates:
                self._evaluate(samples.expand(-1, 3, -1, -1))
            return audits and self._audit(samples)

    def _evaluate(self, samples: torch.Tensor) -> None:
        from ..evaluation.extractors import MobileNetV2
        from ..evaluation.measurements import MetricNetworks, measure
        from ..evaluation.quality import compare
        from ..evaluation.samples import select

        if self._reference is None:
            networks = MetricNetworks(self.accelerator.device, [MobileNetV2(self.accelerator.device)])
            held_out = self.data.held_out.images.expand(-1, 3, -1, -1)
            self._reference = networks, measure(select(held_out), len(held_out), networks, self.images_per_pass)
        networks, reference = self._reference
        measured = measure(select(samples), len(samples), networks, self.images_per_pass)
        self._write(
            {"evaluation": {figure["type"]: figure["value"] for figure in compare(measured, reference, networks)}}
        )

    def _audit(self, samples: torch.Tensor) -> bool:
        from ..evaluation.copies import audit, closest_pairs_picture

        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            train, held_out = self.data.batches.dataset.images, self.data.held_out.images
            report = audit(samples, train, held_out)
            (pixels,) = report.spaces
            outcome = [(report.found_copies, report.verdict, pixels.copy_rate, pixels.held_out_copy_rate)]
            folder = self.output_dir / "audits"
            folder.mkdir(exist_ok=True)
            with replacing(folder / f"{self.state.images_seen:010d}.png") as path:
                closest_pairs_picture(report, samples, train, held_out).save(path, "PNG")
        found, verdict, copy_rate, held_out_copy_rate = broadcast_object_list(outcome)[0]
        self._write({"copy_rate": copy_rate, "held_out_copy_rate": held_out_copy_rate, "copies_found": float(found)})
        self.state.audits.append({"images_seen": self.state.images_seen, "found_copies": found, "verdict": verdict})
        return not found

    @property
    def images_per_pass(self) -> int:
        """Pictures of a forward pass in training, which memory suffices for."""
        share = self.config.train_batch_size // self.accelerator.num_processes
        return min(share, self.config.device_batch_size or share)

    @contextmanager
    def evaluating(self, averaged: bool = True) -> Iterator[torch.nn.Module]:
        """The network in evaluation mode, with the averaged weights where there are some, for as long as it lasts."""
        unet = self.accelerator.unwrap_model(self.unet)
        swap = averaged and self.ema is not None
        unet.eval()
        if swap:
            self.ema.store(unet.parameters())
            self.ema.copy_to(unet.parameters())
        try:
            # A compiled network would be compiled anew for evaluation, and for each size of a batch.
            with torch.compiler.set_stance("force_eager"):
                yield unet
        finally:
            for module in unet.modules():
                if hasattr(module, "reshard"):  # FSDP, after a forward pass without a backward one
                    module.reshard()
            if swap:
                self.ema.restore(unet.parameters())
            unet.train()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """What is done within does not count as training time."""
        began = time.perf_counter()
        yield
        self._clock_start += time.perf_counter() - began

    # Samples

    def _sample(self) -> None:
        """Draw the grid on the way: few steps of a fast solver, raw and averaged weights side by side."""
        samples = {}
        with self._paused():
            if self.ema is not None:
                samples["weights"] = self._draw_samples(averaged=False)
            samples["averaged weights"] = self._draw_samples(averaged=True)
            self._show(samples)

    def _show(self, samples: dict[str, torch.Tensor]) -> Image.Image:
        """Log grids and colours of samples, `(num_samples, channels, height, width)` in [-1, 1]; return the last."""
        drawn = list(samples.values())[-1]
        self._write(self._color_drift(drawn))
        scale = max(1, 128 // max(self.config.image_size))
        grids = {name: image_grid(DDPMFacesPipeline.postprocess(s), scale=scale) for name, s in samples.items()}
        if self.accelerator.is_main_process:
            picture = side_by_side(grids)
            folder = self.output_dir / "samples"
            folder.mkdir(exist_ok=True)
            with replacing(folder / f"{self.state.images_seen:010d}.png") as path:
                picture.save(path, "PNG")
            self._log_picture(picture)
        return list(grids.values())[-1]

    def _draw_samples(
        self, averaged: bool, num_samples: int | None = None, scheduler: DDPMFacesScheduler | None = None
    ) -> torch.Tensor:
        """x_0, `(num_samples, channels, height, width)`, on the CPU of each process.

        By all T steps of `scheduler`, or by few of a fast solver.
        """
        config, num_processes = self.config, self.accelerator.num_processes
        num_inference_steps = None
        if scheduler is None:
            scheduler = fast_solver(self.objective.scheduler, config.sample_sigma_min)
            num_inference_steps = config.sample_inference_steps
        num_samples = num_samples or config.num_samples
        per_process = -(-num_samples // num_processes)
        mine = [(k * num_processes + self.accelerator.process_index) % num_samples for k in range(per_process)]
        samples = []
        with self.evaluating(averaged) as unet:
            pipeline = DDPMFacesPipeline(unet, scheduler, guide=self._guide, guidance_scale=self._guidance_scale)
            pipeline.set_progress_bar_config(
                desc="Sampling", leave=False, disable=not self.accelerator.is_main_process
            )
            for first in range(0, per_process, self.images_per_pass):
                numbers = mine[first : first + self.images_per_pass]
                generators = [torch.Generator().manual_seed(config.seed + number) for number in numbers]
                classes = config.num_class_embeds and [number % config.num_class_embeds for number in numbers]
                samples.append(
                    pipeline(
                        len(numbers),
                        num_inference_steps,
                        generators,
                        output_type="latent",
                        class_labels=classes,
                    ).images
                )
        gathered = self.accelerator.gather(torch.cat(samples).contiguous())
        gathered = gathered.view(num_processes, per_process, *gathered.shape[1:]).transpose(0, 1)
        return gathered.flatten(0, 1)[:num_samples].cpu()

    def _color_drift(self, samples: torch.Tensor) -> dict[str, dict[str, float]]:
        """Mean and deviation of each channel, in [-1, 1], beside those of the training pictures."""
        channels = "rgba" if samples.shape[1] > 1 else "y"
        values = {}
        pixels = samples.clamp(-1, 1).transpose(0, 1).flatten(1)
        statistics = {"samples": (pixels.mean(dim=1), pixels.std(dim=1)), "data": self.data.color_statistics}
        for source, of_channels in statistics.items():
            if of_channels is None:
                continue
            for name, per_channel in zip(("mean", "deviation"), of_channels, strict=True):
                parts = zip(channels, per_channel.tolist(), strict=False)
                values[f"{source}_{name}"] = dict(parts)
        return values

    def _log_picture(self, picture: Image.Image) -> None:
        if self.config.report_to == "none":
            return
        tracker = self.accelerator.get_tracker(self.config.report_to, unwrap=True)
        if self.config.report_to == "tensorboard":
            tracker.add_image("samples", np.asarray(picture), self.state.images_seen, dataformats="HWC")
        elif self.config.report_to == "wandb":
            import wandb

            tracker.log({"samples": wandb.Image(picture)}, step=self.state.images_seen)
        elif self.config.report_to == "trackio":
            import trackio

            tracker.log({"samples": trackio.Image(picture)}, step=self.state.images_seen)

    # Save and end

    def _save(self, required: bool = False) -> None:
        """Save a checkpoint, and prune the old ones. Where it fails and is not `required`, the run goes on."""
        began = time.time()
        self._collect()
        path = checkpoints.checkpoint_path(self.output_dir, self.state.images_seen)
        with self._paused():
            try:
                self._check_finite()
                checkpoints.save_checkpoint(
                    self.accelerator,
                    path,
                    {
                        "run": {**asdict(self.state), "seconds": self._seconds},
                        "config": asdict(self.config),
                        "fingerprint": self.data.fingerprint,
                        "layout": self._layout(),
                    },
                    self._ema_weights(),
                    None if isinstance(self.data.batches, FaceBatches) else self.data.batches.state_dict(),
                    None if self._guide is None else self._guide.state_dict(),
                )
                if self.accelerator.is_main_process:
                    keep = self.config.checkpoints_total_limit
                    checkpoints.prune_checkpoints(self.output_dir, keep, self._spared)
            except OSError as error:
                if required:
                    raise
                logger.warning("%s. The run goes on, and tries again with the next checkpoint.", error)
        self.preemption.note_save(time.time() - began)

    @property
    def _seconds(self) -> float:
        return self.state.seconds + time.time() - self._began

    def _check_finite(self) -> None:
        weights = list(self.accelerator.unwrap_model(self.unet).state_dict().values())
        weights += list((self._ema_weights() or {}).values())
        bad = torch.tensor([float(not checkpoints.all_finite(weights))], device=self.accelerator.device)
        if bool(self.accelerator.reduce(bad, reduction="sum")):
            self._leave(
                EXIT_NONFINITE,
                f"Weights are not finite after {self.state.images_seen} images. They are not saved; the last good "
                "checkpoint stands. Try a lower `learning_rate`.",
            )

    def _ema_weights(self) -> dict[str, torch.Tensor] | None:
        if self.ema is None:
            return None
        names = [name for name, _ in self.accelerator.unwrap_model(self.unet).named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))

    def _preempt(self, reason: str) -> None:
        self._save(required=True)
        self._leave(
            EXIT_PREEMPTED,
            f"Stopped after {self.state.images_seen} of {self.last_image} images, for {reason}. The same command goes "
            "on from here.",
        )

    def _leave(self, code: int, message: str) -> None:
        self.bar.close()
        if self.accelerator.is_main_process:
            print(message, file=sys.stderr if code != EXIT_PREEMPTED else sys.stdout, flush=True)
        self.accelerator.end_training()
        raise SystemExit(code)

    def finish(self) -> None:
        """Save the pipeline, and beside it a grid of samples in all T steps and the loss curve."""
        self.bar.close()
        returns_to = self._choose_weights()
        self._check_finite()
        self._choose_guide(returns_to)
        weights = self._whole_weights()
        scheduler = DDPMFacesScheduler(**self.config.scheduler_config())
        grid = self._show({"weights": self._draw_samples(averaged=True, scheduler=scheduler)})
        if self.accelerator.is_main_process:
            pipeline = DDPMFacesPipeline(
                self._network(weights),
                scheduler,
                weights="ema" if self.config.use_ema else "raw",
                guide=self._guide and self._network(self._guide.state_dict()),
                guidance_scale=self._guidance_scale,
            )
            checkpoints.save_pipeline(pipeline, self.output_dir)
            grid.save(self.output_dir / "samples.png")
            self._summarize(returns_to)
            try:
                self._draw_loss_curve()
            except Exception as error:  # a picture, and not the model: no reason for a finished run to fail
                logger.warning("The loss curve could not be drawn: %s", error)
            print(f"The pipeline is in {self.output_dir}, pictures from it in {self.output_dir / 'samples.png'}")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.config.push_to_hub and self.accelerator.is_main_process:
            self._publish()

    def _choose_weights(self) -> int | None:
        """Go back to the checkpoint for whose sake the run stopped, if it did; after how many images that was."""
        state = self.state
        images_seen = None
        if self.stopped_on_copies:
            images_seen, reason = state.clean_images_seen, "samples are copies of training pictures"
        elif self.stopped_early:
            images_seen = state.best_images_seen
            best = "never finite" if images_seen is None else f"best after {images_seen} images, {state.best_loss:.4f}"
            reason = f"the held-out loss was {best}"
        else:
            return None
        path = None if images_seen is None else checkpoints.checkpoint_path(self.output_dir, images_seen)
        if path is None or not path.is_dir():
            self.accelerator.print(f"Stopped early: {reason}. There is no checkpoint from before; these weights stay.")
            return None
        self.accelerator.print(f"Stopped early: {reason}. The pipeline has the weights after {images_seen} images.")
        checkpoints.load_weights(self.accelerator, path, self.unet)
        self.ema = None  # the network itself has the averaged weights now
        return images_seen

    def _choose_guide(self, returns_to: int | None) -> None:
        """Go without a guide that is no weaker than the weights of the pipeline, and say why there is none."""
        guide_after = self.config.guide_after_images
        images_seen = self.state.images_seen if returns_to is None else returns_to
        if self._guide is not None and self.state.guide_images_seen >= images_seen:
            self._guide = None
        if guide_after is not None and self._guide is None:
            self.accelerator.print(
                f"Note: the pipeline has no guide: none was kept after {guide_after} images, or not before the "
                "weights that it has."
            )

    def _publish(self) -> None:
        """Put the finished pipeline on the Hub; what was trained stays whole if that fails."""
        from ..hub.model_folder import push

        config, repo_id = self.config, self.config.hub_model_id
        try:
            url = push(
                self.output_dir,
                repo_id,
                private=config.hub_private_repo or None,
                license=config.hub_license,
                dataset_license=config.hub_dataset_license,
            )
        except (OSError, ValueError) as error:
            command = ["ddpm-faces", "push", str(self.output_dir), repo_id]
            command += ["--private"] if config.hub_private_repo else []
            command += ["--license", config.hub_license] if config.hub_license else []
            command += ["--dataset-license", config.hub_dataset_license] if config.hub_dataset_license else []
            print(
                f"{error}\nThe pipeline is whole. To publish it later: {shlex.join(command)}",
                file=sys.stderr,
                flush=True,
            )
            raise SystemExit(1) from error
        print(f"Published: {url}")

    def _summarize(self, returns_to: int | None) -> None:
        """What the card says of the training, and a person may want to know years later."""
        is_cuda = self.accelerator.device.type == "cuda"
        source = self.config.dataset_name or self.config.train_data_dir
        pretrained = self.config.pretrained_model_name_or_path
        threads = f"CPU ({torch.get_num_threads()} threads)"
        summary = {
            "data": self.data.description,
            "is_local_data": source is not None and Path(source).expanduser().is_dir(),
            "is_local_pretrained": pretrained is not None and Path(pretrained).expanduser().is_dir(),
            "fingerprint": self.data.fingerprint,
            "images_seen": self.state.images_seen if returns_to is None else returns_to,
            "guide_images_seen": None if self._guide is None else self.state.guide_images_seen,
            "guidance_scale": self._guidance_scale,  # by which samples.png is drawn
            "skipped_steps": self.state.skipped_steps,
            "held_out_loss": self._held_out_loss(returns_to),
            "hours": self._seconds / 3600,
            "processes": self.accelerator.num_processes,
            "device": torch.cuda.get_device_name() if is_cuda else threads,
            "precision": {"no": "fp32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision),
            "versions": f"ddpm-faces {__version__}, diffusers {diffusers.__version__}, torch {torch.__version__}",
        }
        with replacing(self.output_dir / "training_summary.json") as path:
            path.write_text(json.dumps(summary, indent=2) + "\n")
        verdicts = {audit["images_seen"]: audit["verdict"] for audit in self.state.audits}
        if summary["images_seen"] in verdicts:  # of these weights, and not of others on the way
            verdict = {"verdict": verdicts[summary["images_seen"]]}
            write_metrics(self.output_dir / METRICS_NAME, {"memorisation": verdict})

    def _held_out_loss(self, images_seen: int | None) -> float | None:
        """The last one that was measured, or that after `images_seen` images."""
        entries = [entry for entry in read_jsonl(self.log_path) if "held_out_loss" in entry]
        losses = [entry["held_out_loss"] for entry in entries if images_seen in (None, entry["images_seen"])]
        return losses[-1] if losses else None

    def _draw_loss_curve(self) -> None:
        log = read_jsonl(self.log_path)
        curves = {
            name: [(entry["images_seen"], entry[name]) for entry in log if entry.get(name) is not None]
            for name in ("loss", "held_out_loss")
        }
        if curves["loss"]:
            held_out = tuple(zip(*curves["held_out_loss"], strict=True)) or None
            loss_curve(*zip(*curves["loss"], strict=True), self.output_dir / "loss_curve.png", held_out)


def optimizer_settings(config: TrainingConfig) -> dict[str, Any]:
    """The arguments of AdamW, but for the learning rate, which each step sets."""
    return {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }


def read_jsonl(path: Path) -> list[dict]:
    """The entries of a log; a last line that was cut off while it was written is not there."""
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
