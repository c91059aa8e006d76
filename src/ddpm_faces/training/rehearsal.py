"""`--dry_run`: try every part of a run, and print the plan."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from .checkpoint import list_checkpoints
from .config import TrainingConfig
from .log import read_jsonl
from .run import Run


def rehearse(
    config: TrainingConfig, accelerator: Accelerator, train: Callable[[TrainingConfig, Accelerator], Run]
) -> None:
    """Try data, steps, validation, a sample, a save and a pipeline, print the plan, and leave nothing behind.

    Args:
        config ([`TrainingConfig`]): The configuration of the planned run.
        accelerator ([`~accelerate.Accelerator`]): The processes of the run.
        train (`Callable`): Trains with a configuration and returns the finished run.
    """
    folder = Path(config.output_dir, "dry-run")
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # left behind by a dry run that was killed
    rehearsal = replace(
        config,
        output_dir=str(folder),
        max_train_images=3 * config.train_batch_size,  # the first step is the slowest
        log_every_images=config.train_batch_size,
        checkpoint_every_images=3 * config.train_batch_size,
        num_samples=min(config.num_samples, accelerator.num_processes),
        sample_every_images=0,
        report_to="none",
        push_to_hub=False,
        hub_model_id=None,
        hub_private_repo=False,
        hub_license=None,
        hub_dataset_license=None,
        time_limit_minutes=None,
        early_stopping_patience=None,
        guide_images=None,  # the default: a quarter of the dry run
        audit_every_images=0,
        stop_on_copies=False,
        num_evaluation_samples=20,
    )
    began = time.perf_counter()
    try:
        run = train(rehearsal, accelerator)
        if accelerator.is_main_process:
            print(plan(config, run, time.perf_counter() - began))
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def plan(config: TrainingConfig, run: Run, seconds: float) -> str:
    """Describe what the run will do and need, from the measurements of a dry run that took `seconds`."""
    step_images, last_image = config.train_batch_size, config.max_train_steps * config.train_batch_size
    log = [entry for entry in read_jsonl(run.log.path) if "loss" in entry]
    speed = log[-1]["images_per_second"]
    checkpoint = list_checkpoints(run.output_dir)[-1]
    checkpoint_gb = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) / 1e9
    kept = config.checkpoints_total_limit + bool(run.data.held_out)
    free_gb = shutil.disk_usage(config.output_dir).free / 1e9
    num_parameters = sum(parameter.numel() for parameter in run.unet.parameters())
    # Weights, gradient, Adam's two moments and the EMA, all in float32.
    state_gb = 4 * num_parameters * (5 if config.use_ema else 4) / 1e9

    def every(images: int, otherwise: str = "only at the end") -> str:
        return f"every {images} images, {last_image // images} times" if images else otherwise

    lines = [
        f"Everything works: data, steps, validation, samples, checkpoint and pipeline. This took {seconds:.0f} s.",
        f"  data         {run.data.description}; fingerprint {run.data.fingerprint[:12]}",
        f"  run          {last_image} images in {config.max_train_steps} steps of {step_images}",
        f"  time         {last_image / speed / 3600:.1f} h at {speed:.0f} images/s, without validation and samples",
        f"  memory       {log[-1]['memory_gb']:.1f} GB in use, {state_gb:.1f} GB of it weights, optimizer and EMA",
        f"  disk         {kept} checkpoints of {checkpoint_gb:.2f} GB; {free_gb:.0f} GB free in {config.output_dir}",
        f"  checkpoints  {every(config.checkpoint_every_images, 'never')}",
        f"  validation   {every(config.validate_every_images) if run.data.held_out else 'none'}",
        f"  samples      {every(config.sample_every_images)}",
    ]
    if config.push_to_hub:
        lines.append(f"  Hub          {config.hub_model_id}, at the end; this token has write access")
    if (kept + 1) * checkpoint_gb > free_gb:
        lines.append("  Warning: the checkpoints do not fit on the disk.")
    return "\n".join(lines)
