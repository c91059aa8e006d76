"""The end of a run: save the pipeline, then its images and summary, then publish it."""

import json
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from accelerate.utils import broadcast_object_list

from .. import __version__
from ..evaluation.quality import METRICS_NAME, write_metrics
from ..files import replacing
from ..pipeline_ddpm_faces import DDPMFacesPipeline
from ..plots import loss_curve
from ..scheduling_ddpm_faces import DDPMFacesScheduler
from .checkpoint import any_failed, check_whole, checkpoint_path, load_weights, save_pipeline
from .log import read_jsonl
from .run import Run
from .samples import draw_share, gather_shares, show
from .saving import check_finite


logger = logging.getLogger(__name__)


def finish(run: Run) -> None:
    """Save the pipeline with a grid of samples in all T steps, the loss curve and a summary; publish it.

    If the grid or the loss curve cannot be drawn, this is only a warning.
    """
    run.log.bar.close()
    returns_to = _choose_weights(run)
    check_finite(run)
    _choose_guide(run, returns_to)
    weights = run.whole_weights()
    scheduler = DDPMFacesScheduler(**run.config.scheduler_config())
    if run.accelerator.is_main_process:
        for name in ("samples.png", "loss_curve.png"):  # they show earlier weights
            (run.output_dir / name).unlink(missing_ok=True)
        pipeline = DDPMFacesPipeline(
            run.network(weights),
            scheduler,
            weights="ema" if run.config.use_ema else "raw",
            guide=run.guide and run.network(run.guide.state_dict()),
            **run.text_components(weights),
            **run.scales,
        )
        save_pipeline(pipeline, run.output_dir)
        summarize(run, returns_to)
    run.accelerator.wait_for_everyone()
    _draw_last_grid(run, scheduler)
    if run.accelerator.is_main_process:
        with _only_warning("The loss curve could not be drawn"):
            draw_loss_curve(run)
        grid = run.output_dir / "samples.png"
        samples = f", and samples from it are in {grid}" if grid.exists() else ""
        print(f"The pipeline is in {run.output_dir}{samples}.")
        if not run.config.dry_run:  # which deletes its folder
            print(next_commands(run))
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    if run.config.push_to_hub and run.accelerator.is_main_process:
        publish(run)


def next_commands(run: Run) -> str:
    """Return the commands that a user may want to run next."""
    folder, data = shlex.quote(str(run.output_dir)), run.config.dataset_name
    commands = [f"ddpm-faces generate {folder}"]
    if data is not None:  # both need a dataset with splits
        commands += [f"ddpm-faces {verb} {folder} {shlex.quote(data)}" for verb in ("evaluate", "audit")]
    if not run.config.push_to_hub:
        commands.append(f"ddpm-faces push {folder} USER/NAME")
    return "\n  ".join(["Next:", *commands])


@contextmanager
def _only_warning(message: str) -> Iterator[None]:
    """Turn any exception into a warning, because the model is saved already."""
    try:
        yield
    except Exception as error:  # no error of drawing or plotting may fail a finished run
        logger.warning("%s: %s: %s", message, type(error).__name__, error)


def _draw_last_grid(run: Run, scheduler: DDPMFacesScheduler) -> None:
    """Draw samples in all T steps. If one process fails, the others do not wait for it."""
    share = None
    with _only_warning("The last grid of samples could not be drawn"):
        share = draw_share(run, scheduler=scheduler)
    if any_failed(run.accelerator, share is None):
        return
    samples = gather_shares(run, share)
    with _only_warning("The last grid of samples could not be saved"):
        grid = show(run, {"weights": samples})
        if run.accelerator.is_main_process:
            grid.save(run.output_dir / "samples.png")


def _choose_weights(run: Run) -> int | None:
    """If the run stopped early, return to the best or last clean checkpoint, and return its number of images."""
    state = run.state
    if run.stopped_on_copies:
        images_seen, reason = state.clean_images_seen, "samples are copies of training images"
    elif run.stopped_early:
        images_seen = state.best_images_seen
        best = "never finite" if images_seen is None else f"best after {images_seen} images, {state.best_loss:.4f}"
        reason = f"the held-out loss was {best}"
    else:
        return None
    path = None if images_seen is None else checkpoint_path(run.output_dir, images_seen)
    problem = None
    if run.accelerator.is_main_process:
        if path is None or not path.is_dir():
            problem = "There is no earlier checkpoint to return to"
        else:
            try:
                check_whole(path)
            except ValueError as error:
                problem = str(error).removesuffix(".")
    (problem,) = broadcast_object_list([problem])
    if problem is not None or path is None:
        run.accelerator.print(f"Stopped early: {reason}. {problem}; the pipeline has the latest weights.")
        return None
    run.accelerator.print(f"Stopped early: {reason}. The pipeline has the weights after {images_seen} images.")
    load_weights(run.accelerator, path, run.unet)
    run.ema = None  # the network itself has the EMA weights now
    return images_seen


def _choose_guide(run: Run, returns_to: int | None) -> None:
    """Drop a guide that is not weaker than the pipeline's weights, and tell the user if there is no guide."""
    guide_after = run.config.guide_after_images
    images_seen = run.state.images_seen if returns_to is None else returns_to
    if run.guide is not None and (run.state.guide_images_seen or 0) >= images_seen:
        run.guide = None
    if guide_after is not None and run.guide is None:
        run.accelerator.print(
            f"Note: the pipeline has no guide, because the run kept none after {guide_after} images, or ends with "
            "weights that are not later than the guide."
        )


def publish(run: Run) -> None:
    """Publish the finished pipeline on the Hub. A failure leaves the local pipeline intact.

    Raises:
        SystemExit: With code 1 if publishing failed, after printing the command that tries again.
    """
    from ..hub import push

    config = run.config
    repo_id = config.hub_model_id or run.output_dir.resolve().name
    try:
        url = push(
            run.output_dir,
            repo_id,
            private=config.hub_private_repo or None,
            license=config.hub_license,
            dataset_license=config.hub_dataset_license,
        )
    except (OSError, ValueError) as error:
        command = ["ddpm-faces", "push", str(run.output_dir), repo_id]
        command += ["--private"] if config.hub_private_repo else []
        command += ["--license", config.hub_license] if config.hub_license else []
        command += ["--dataset-license", config.hub_dataset_license] if config.hub_dataset_license else []
        print(
            f"{error}\nThe pipeline is saved. To publish it later: {shlex.join(command)}", file=sys.stderr, flush=True
        )
        raise SystemExit(1) from error
    print(f"Published: {url}")


def summarize(run: Run, returns_to: int | None) -> None:
    """Write training_summary.json, which the model card uses."""
    is_cuda = run.accelerator.device.type == "cuda"
    source = run.config.dataset_name or run.config.train_data_dir
    pretrained = run.config.pretrained_model_name_or_path
    threads = f"CPU ({torch.get_num_threads()} threads)"
    precision = run.accelerator.mixed_precision
    summary = {
        "data": run.data.description,
        "is_local_data": source is not None and Path(source).expanduser().is_dir(),
        "is_local_pretrained": pretrained is not None and Path(pretrained).expanduser().is_dir(),
        "fingerprint": run.data.fingerprint,
        "images_seen": run.state.images_seen if returns_to is None else returns_to,
        "guide_images_seen": None if run.guide is None else run.state.guide_images_seen,
        **run.scales,  # used for samples.png
        "skipped_steps": run.state.skipped_steps,
        "held_out_loss": _held_out_loss(run, returns_to),
        "hours": run.seconds / 3600,
        "processes": run.accelerator.num_processes,
        "device": torch.cuda.get_device_name() if is_cuda else threads,
        "precision": "fp32" if precision == "no" else precision,
        "versions": f"ddpm-faces {__version__}, diffusers {diffusers.__version__}, torch {torch.__version__}",
    }
    with replacing(run.output_dir / "training_summary.json") as path:
        path.write_text(json.dumps(summary, indent=2) + "\n")
    verdicts = {audit["images_seen"]: audit["verdict"] for audit in run.state.audits}
    if summary["images_seen"] in verdicts:  # an audit of exactly these weights
        verdict = {"verdict": verdicts[summary["images_seen"]]}
        write_metrics(run.output_dir / METRICS_NAME, {"memorisation": verdict})


def _held_out_loss(run: Run, images_seen: int | None) -> float | None:
    """Return the held-out loss after `images_seen` images, or the last one measured."""
    entries = [entry for entry in read_jsonl(run.log.path) if "held_out_loss" in entry]
    losses = [entry["held_out_loss"] for entry in entries if images_seen in (None, entry["images_seen"])]
    return losses[-1] if losses else None


def draw_loss_curve(run: Run) -> None:
    """Draw the losses and held-out losses in the log."""
    log = read_jsonl(run.log.path)
    curves = {
        name: [(entry["images_seen"], entry[name]) for entry in log if entry.get(name) is not None]
        for name in ("loss", "held_out_loss")
    }
    if curves["loss"]:
        held_out = None
        if curves["held_out_loss"]:
            held_out_seen, held_out_losses = zip(*curves["held_out_loss"], strict=True)
            held_out = (held_out_seen, held_out_losses)
        images_seen, losses = zip(*curves["loss"], strict=True)
        loss_curve(images_seen, losses, run.output_dir / "loss_curve.png", held_out)
