"""Preparations before the first step: the output folder, the checkpoint to resume, pretrained weights."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


if TYPE_CHECKING:
    from .distillation import DistillationConfig

CONFIG_NAME = "training_config.yaml"
LOCK_SECONDS = 60  # a run whose launcher was killed saves and ends within this time
# Arguments in which the network may differ from the pretrained one.
FREE_TO_CHANGE = ("sample_size", "dropout", "num_class_embeds", "null_class", "text_embed_dim", "augment_dim")


class SetupError(ValueError):
    """Bad input that the user can correct, found before the first step (in a stream, when it is read)."""


@contextmanager
def setting_up() -> Iterator[None]:
    """Turn each `ValueError` into a `SetupError`, to tell bad input from errors during training."""
    try:
        yield
    except SetupError:
        raise
    except ValueError as error:
        raise SetupError(str(error)) from error


@contextmanager
def locked(output_dir: str, is_main_process: bool) -> Iterator[None]:
    """Create `output_dir` and lock it against other runs. If it stays empty, it is removed at the end.

    Raises:
        SetupError: Another run is using the folder.
    """
    if not is_main_process:
        yield
        return
    folder = Path(output_dir)
    lock = _lock(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not delete open files
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
            raise SetupError(f"`output_dir` {str(folder)!r} is in use by another run.") from error
        except FileNotFoundError:  # the other run has removed its empty folder
            continue


def checkpoint_to_resume(config: "TrainingConfig | DistillationConfig", accelerator: Accelerator) -> Path | None:
    """Return the newest complete checkpoint in `output_dir`, if there is one, as the main process sees it.

    Newer checkpoints that are damaged are reported and renamed.

    Raises:
        ValueError: There is a checkpoint but `resume` is "never", or all checkpoints are damaged.
    """
    newest, problem = None, None
    if accelerator.is_main_process:
        try:
            newest, damaged = newest_whole(config.output_dir)
            if newest is not None and config.resume == "never":
                raise ValueError(
                    f"`output_dir` {config.output_dir!r} holds checkpoints of an earlier run, and `resume` is "
                    "'never': choose another folder, or delete the checkpoints."
                )
            for path, reason in damaged.items():
                accelerator.print(f"Warning: {reason} It is now {set_aside(path)}; the run resumes from {newest}.")
        except (ValueError, OSError) as error:  # raised on all processes, or the others would wait
            problem = str(error)
    newest, problem = broadcast_object_list([newest, problem])
    if problem is not None:
        raise ValueError(problem)
    return newest


def load_pretrained(path: str, config: TrainingConfig) -> DDPMFacesPipeline:
    """Load the pretrained pipeline.

    Raises:
        ValueError: Its network has a different architecture, noise schedule or prediction type.
        OSError: It was not found or could not be downloaded.
    """
    pipeline = DDPMFacesPipeline.from_pretrained(os.path.expanduser(path))
    here = {**config.unet_config(), "prediction_type": config.prediction_type}
    there = {**pipeline.unet.config, "prediction_type": pipeline.scheduler.config.get("prediction_type")}
    differences = [
        f"its `{name}` is {there.get(name)}, not {value}"
        for name, value in here.items()
        if name not in FREE_TO_CHANGE and there.get(name) != value
    ]
    betas_there, betas_here = pipeline.scheduler.betas, DDPMFacesScheduler(**config.scheduler_config()).betas
    if betas_there.shape != betas_here.shape or not torch.allclose(betas_there, betas_here):
        differences.append("its noise schedule is different")
    if differences:
        raise ValueError(
            f"`pretrained_model_name_or_path` {path!r} does not fit the configuration: {'; '.join(differences)}."
        )
    return pipeline


def copy_weights(pretrained: DDPMFacesUNet, unet: DDPMFacesUNet) -> None:
    """Copy the weights that both networks have. New layers for classes, texts and augmentation have no effect yet."""
    expected, found = unet.state_dict(), pretrained.state_dict()
    same = {k: v for k, v in found.items() if k in expected and v.shape == expected[k].shape}
    new = {k: torch.zeros_like(v) for k, v in expected.items() if k not in same}
    if "null_text_embed" in new:  # which has no effect anyway, and must not start at zero
        new["null_text_embed"] = expected["null_text_embed"]
    classes = "class_embedding.weight"
    if classes in new and classes in found and pretrained.config.num_class_embeds == unet.config.num_class_embeds:
        count = unet.config.num_class_embeds  # the class for no class comes last
        new[classes][:count] = found[classes][:count]
    unet.load_state_dict({**same, **new})


def optimizer_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the arguments of AdamW, except for the learning rate, which each step sets."""
    return {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }


def start(run: Run, checkpoints: CheckpointIO, resume_from: Path | None) -> None:
    """Resume from a checkpoint if there is one, save the configuration, and open the log."""
    config, accelerator = run.config, run.accelerator
    if resume_from is not None:
        state, guide_weights, notes = checkpoints.load(resume_from)
        # The log shares this object. The number of held-out images was set when the data was loaded.
        run.state.__dict__.update({**state.__dict__, "num_held_out": run.state.num_held_out})
        # Loading restored the optimizer's old settings; those of the configuration take precedence.
        for group in run.optimizer.param_groups:
            group.update(optimizer_settings(config))
        notes = [*describe_changes(resume_from, config, run.data.fingerprint, checkpoints.layout()), *notes]
        guide_after = config.guide_after_images
        if guide_after is not None and guide_weights is not None:
            run.set_guide(guide_weights)
        elif guide_after is not None and guide_after <= run.state.images_seen and run.state.is_maintained:
            notes.append(f"The run kept no guide after {guide_after} images, and it is past that point.")
        if config.num_validation_images and run.data.held_out is None:
            notes.append(
                "No images are held out, because none were before and the run may have trained on all of them."
            )
        accelerator.print(f"Resuming from {resume_from}, after {run.state.images_seen} images.")
        for note in notes:
            accelerator.print(f"  Note: {note}")
    if accelerator.is_main_process:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        with replacing(run.output_dir / CONFIG_NAME) as path:
            config.save(path)
    run.log.open()
    run.steps.restart_clock()
    prune(run)
