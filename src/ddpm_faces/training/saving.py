"""Checkpoints during training, and preemption."""

import logging
import time

import torch
from accelerate.utils import broadcast_object_list

from .checkpoint import CheckpointIO, all_finite, checkpoint_path, is_sharded, prune_checkpoints
from .preemption import EXIT_NONFINITE, EXIT_PREEMPTED
from .run import Run


logger = logging.getLogger(__name__)


def keep_guide(run: Run) -> None:
    """Keep the current EMA weights (or the raw weights, if there is no EMA) as the guide of the finished pipeline."""
    with run.steps.paused():
        weights = run.whole_weights()
        if is_sharded(run.unet):  # only the main process has all of them
            (weights,) = broadcast_object_list([weights])
        run.set_guide(weights)
    run.state.guide_images_seen = run.state.images_seen
    run.accelerator.print(f"The weights after {run.state.images_seen} images are kept as the guide.")


def save(run: Run, checkpoints: CheckpointIO, required: bool = False) -> bool:
    """Save a checkpoint and delete old ones; return whether it was saved. A failure ends the run if `required`."""
    began, is_saved = time.time(), False
    run.steps.collect()
    path = checkpoint_path(run.output_dir, run.state.images_seen)
    with run.steps.paused():
        try:
            check_finite(run)
            saved = type(run.state)(**{**run.state.to_json(), "seconds": run.seconds})
            checkpoints.save(path, saved, run.guide)
            is_saved = True
            prune(run)
        except OSError as error:
            if required:
                raise
            logger.warning("%s. The run continues and tries again with the next checkpoint.", error)
    run.preemption.note_save(time.time() - began)
    return is_saved


def prune(run: Run) -> None:
    """Delete old checkpoints, except for those that the run may need at its end."""
    if not run.accelerator.is_main_process:
        return
    state, spared = run.state, {run.state.best_images_seen}
    if run.config.stop_on_copies:
        spared.add(state.clean_images_seen)
    paths = [checkpoint_path(run.output_dir, seen) for seen in spared if seen is not None]
    prune_checkpoints(run.output_dir, run.config.checkpoints_total_limit, paths)


def leave_if_asked(run: Run, checkpoints: CheckpointIO) -> None:
    """Save and end the process if a signal or the time limit requires it.

    Raises:
        SystemExit: With `EXIT_PREEMPTED`.
    """
    reason = run.preemption.reason()
    if reason is None or run.is_finished:
        return
    save(run, checkpoints, required=True)
    run.log.leave(
        EXIT_PREEMPTED,
        f"Preempted after {run.state.images_seen} of {run.last_image} images: {reason}. The checkpoint is saved; run "
        "the same command to resume.",
    )


def check_finite(run: Run) -> None:
    """End the process if a weight is NaN or infinite, before it is saved.

    Raises:
        SystemExit: With `EXIT_NONFINITE`.
    """
    weights = list(run.accelerator.unwrap_model(run.unet).state_dict().values())
    weights += [] if run.ema is None else list(run.ema.shadow.values())
    bad = torch.tensor([float(not all_finite(weights))], device=run.accelerator.device)
    if bool(run.accelerator.reduce(bad, reduction="sum")):
        run.log.leave(
            EXIT_NONFINITE,
            f"The weights are not finite after {run.state.images_seen} images and were not saved. The last good "
            "checkpoint is kept. Try a lower `learning_rate`.",
        )
