"""What happens before the first step: the folder, the checkpoint, the weights to start from."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ..files import replacing
from ..pipeline_ddpm_faces import DDPMFacesPipeline
from ..scheduling_ddpm_faces import DDPMFacesScheduler
from ..unet_ddpm_faces import DDPMFacesUNet
from .changes import describe_changes
from .checkpoint import CheckpointIO, newest_whole, set_aside
from .config import TrainingConfig
from .run import Run
from .saving import prune


CONFIG_NAME = "training_config.yaml"
LOCK_SECONDS = 60  # in which a run that lost its launcher saves and ends
# What a pretrained network may have other than the one that is trained from it.
FREE_TO_CHANGE = ("sample_size", "dropout", "num_class_embeds", "augment_dim")


class SetupError(ValueError):
    """Bad input that the user can mend, found before the first step (in a stream: when it is read)."""


@contextmanager
def setting_up() -> Iterator[None]:
    """Tell bad input, found within, from what goes wrong in training: each `ValueError` becomes a `SetupError`."""
    try:
        yield
    except SetupError:
        raise
    except ValueError as error:
        raise SetupError(str(error)) from error


@contextmanager
def locked(output_dir: str, is_main_process: bool) -> Iterator[None]:
    """Make `output_dir`, which no other run may write to meanwhile; if nothing comes into it, it goes away again.

    Raises:
        SetupError: Another run holds it.
    """
    if not is_main_process:
        yield
        return
    folder = Path(output_dir)
    lock = _lock(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes no file that is open
            if not any(path.name != ".lock" for path in folder.iterdir()):
                Path(lock.lock_file).unlink(missing_ok=True)
                folder.rmdir()
        lock.release()


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=max(0, deadline - time.monotonic()))
            return lock
        except Timeout as error:
            raise SetupError(f"`output_dir` {str(folder)!r} belongs to a run that is still going on.") from error
        except FileNotFoundError:  # the run that held it has left nothing, and taken its folder away
            continue


def checkpoint_to_resume(config: TrainingConfig, accelerator: Accelerator) -> Path | None:
    """The newest whole checkpoint in `output_dir`, if there is one; what the main process sees holds for all.

    Damaged ones that are newer are named, and set aside under another name.

    Raises:
        ValueError: There is one but the run is not to be resumed, or none is whole.
    """
    newest, problem = None, None
    if accelerator.is_main_process:
        try:
            newest, damaged = newest_whole(config.output_dir)
            if newest is not None and config.resume == "never":
                raise ValueError(
                    f"`output_dir` {config.output_dir!r} holds checkpoints of an earlier run, which `resume=never` "
                    "would overwrite: choose another folder, or delete them."
                )
            for path, reason in damaged.items():
                accelerator.print(f"Warning: {reason} The run resumes from {newest}; see {set_aside(path)}.")
        except (ValueError, OSError) as error:  # said on all processes, or the others would wait
            problem = str(error)
    newest, problem = broadcast_object_list([newest, problem])
    if problem is not None:
        raise ValueError(problem)
    return newest


def load_pretrained(path: str, config: TrainingConfig) -> DDPMFacesUNet:
    """The network that the run starts from.

    Raises:
        ValueError: Another architecture, noise schedule or prediction type.
        OSError: It was not found or could not be downloaded.
    """
    pipeline = DDPMFacesPipeline.from_pretrained(os.path.expanduser(path))
    here = {**config.unet_config(), "prediction_type": config.prediction_type}
    there = {**pipeline.unet.config, "prediction_type": pipeline.scheduler.config.get("prediction_type")}
    differences = [
        f"`{name}` is {there.get(name)} there and {value} here"
        for name, value in here.items()
        if name not in FREE_TO_CHANGE and there.get(name) != value
    ]
    betas_there, betas_here = pipeline.scheduler.betas, DDPMFacesScheduler(**config.scheduler_config()).betas
    if betas_there.shape != betas_here.shape or not torch.allclose(betas_there, betas_here):
        differences.append("its noise schedule is another one")
    if differences:
        raise ValueError(f"`pretrained_model_name_or_path` {path!r} is another model: {'; '.join(differences)}.")
    return pipeline.unet


def copy_weights(pretrained: DDPMFacesUNet, unet: DDPMFacesUNet) -> None:
    """Copy the weights that both have. New layers for classes and augmentation start at zero, and so say nothing."""
    expected, found = unet.state_dict(), pretrained.state_dict()
    same = {k: v for k, v in found.items() if k in expected and v.shape == expected[k].shape}
    new = {k: torch.zeros_like(v) for k, v in expected.items() if k not in same}
    unet.load_state_dict({**same, **new})


def optimizer_settings(config: TrainingConfig) -> dict[str, Any]:
    """The arguments of AdamW, except for the learning rate, which each step sets."""
    return {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }


def start(run: Run, checkpoints: CheckpointIO, resume_from: Path | None) -> None:
    """Resume from a checkpoint, if there is one; save the configuration, and open the log."""
    config, accelerator = run.config, run.accelerator
    if resume_from is not None:
        state, guide_weights, notes = checkpoints.load(resume_from)
        # The log has this state as well. How many images are held out was decided by what the checkpoint says.
        run.state.__dict__.update({**state.__dict__, "num_held_out": run.state.num_held_out})
        # The optimizer came back with the settings that it was saved with; those of the configuration hold.
        for group in run.optimizer.param_groups:
            group.update(optimizer_settings(config))
        notes = [*describe_changes(resume_from, config, run.data.fingerprint, checkpoints.layout()), *notes]
        guide_after = config.guide_after_images
        if guide_after is not None and guide_weights is not None:
            run.set_guide(guide_weights)
        elif guide_after is not None and guide_after <= run.state.images_seen and run.state.is_maintained:
            notes.append(f"No guide was kept after {guide_after} images, and the run is past that point.")
        if config.num_validation_images and run.data.held_out is None:
            notes.append("No images are held out: none were before, so all may have been trained on.")
        accelerator.print(f"Going on from {resume_from}, after {run.state.images_seen} images.")
        for note in notes:
            accelerator.print(f"  Note: {note}")
    if accelerator.is_main_process:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        with replacing(run.output_dir / CONFIG_NAME) as path:
            config.save(path)
    run.log.open()
    run.steps.restart_clock()
    prune(run)
