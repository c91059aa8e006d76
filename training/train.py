"""Train DDPM on pictures of faces.

$ accelerate launch training/train.py                                          # faces that the program draws
$ accelerate launch training/train.py --train_data_dir my_faces --resolution 64
$ accelerate launch training/train.py --config training/configs/article64.yaml --dataset_name user/faces

All fields of `ddpm_faces.training.config.TrainingConfig` are flags (`--help`), or keys of the YAML file of `--config`.
What happens when a run is interrupted, and by what, is in docs/training.md.
"""

import importlib.util
import math
import os
import platform
import shutil
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    ProjectConfiguration,
    TorchDynamoPlugin,
    broadcast_object_list,
    set_seed,
)
from diffusers import EMAModel

from ddpm_faces import DDPMFacesObjective, DDPMFacesPipeline, DDPMFacesScheduler, DDPMFacesUNet
from ddpm_faces.data import to_samples
from ddpm_faces.data.augmentation import NonLeakingAugmentation
from ddpm_faces.data.draws import StepDraws, draw_step
from ddpm_faces.training.checkpoint import list_checkpoints, read_state
from ddpm_faces.training.config import TrainingConfig, parse_training_config
from ddpm_faces.training.data import load_training_data
from ddpm_faces.training.guard import NonFiniteGuard
from ddpm_faces.training.run import TrainingRun, locked, optimizer_settings, read_jsonl
from ddpm_faces.training.sync_batch_norm import convert_sync_batch_norm


# What a pretrained network may have other than the one that is trained from it
FREE_TO_CHANGE = ("sample_size", "dropout", "num_class_embeds", "augment_dim")
X86 = ("x86_64", "AMD64")  # where PyTorch tells what a CPU can do

# Networks in here are not taken apart before the process ends. DistributedDataParallel would, with the interpreter's
# lock held, wait for a thread of gloo, which now and then waits for that lock: for ever.
LIVING: list[torch.nn.Module] = []


def main(config: TrainingConfig) -> None:
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise ValueError(f"`report_to` {config.report_to!r} needs a package: pip install {config.report_to}.")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" or config.dry_run else config.report_to,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
        dynamo_backend="no",  # by which it would wrap the network and rename its weights: `train` compiles in place
    )
    if accelerator.device.type == "cpu":
        use_all_cores()
        capability = torch.backends.cpu.get_cpu_capability()
        if accelerator.mixed_precision == "bf16" and platform.machine() in X86 and "AVX512" not in capability:
            accelerator.print(
                f"Warning: this CPU ({capability}) does not calculate in bf16, which makes it ten times as slow as "
                "float32: --mixed_precision no."
            )
    if config.push_to_hub and accelerator.is_main_process:
        from ddpm_faces.hub import check_permission

        name = config.hub_model_id or Path(config.output_dir).resolve().name
        config = replace(config, hub_model_id=check_permission(name, config.hub_private_repo))
    with locked(config.output_dir, accelerator.is_main_process):
        if config.dry_run:
            rehearse(config, accelerator)
        else:
            train(config, accelerator)


def train(config: TrainingConfig, accelerator: Accelerator) -> TrainingRun:
    checkpoint = checkpoint_to_resume(config, accelerator)
    pretrained = None
    if config.pretrained_model_name_or_path is not None and checkpoint is None:
        pretrained = load_pretrained(config)
        accelerator.print(f"Starting from the weights of {config.pretrained_model_name_or_path}.")

    # 1. Data
    data = load_training_data(config, accelerator)
    config = replace(config, num_class_embeds=data.num_classes)
    if checkpoint is not None:
        check_same_model(config, checkpoint)
    augmentation = NonLeakingAugmentation(config.augment_probability)

    # 2. Network and loss
    set_seed(config.seed)
    scheduler = DDPMFacesScheduler(**config.scheduler_config())
    objective = DDPMFacesObjective(scheduler, config.loss_type, config.snr_gamma or None)
    unet = DDPMFacesUNet(**config.unet_config())
    if pretrained is not None:
        copy_weights(pretrained, unet)
    set_seed(config.seed, device_specific=True)  # equal weights on all processes, but each its own dropout
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    is_sharded = accelerator.distributed_type == DistributedType.FSDP  # which takes contiguous parameters only
    # Faster convolutions, on the CPU too
    unet.to(accelerator.device, memory_format=torch.contiguous_format if is_sharded else torch.channels_last)
    if accelerator.num_processes > 1:
        convert_sync_batch_norm(unet)

    # 3. Optimizer and EMA
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True, **optimizer_settings(config))
    compilation = TorchDynamoPlugin()  # what `accelerate launch` says
    if compilation.backend != DynamoBackend.NO:
        unet.compile(**compilation.to_kwargs())
    unet, optimizer = accelerator.prepare(unet, optimizer)
    LIVING.append(unet)
    guard = NonFiniteGuard(accelerator.unwrap_model(unet), optimizer)
    ema = EMAModel(unet.parameters(), update_after_step=-1, foreach=not is_sharded) if config.use_ema else None

    # 4. Resume
    run = TrainingRun(config, accelerator, unet, optimizer, ema, objective, data)
    run.start(checkpoint)
    guard.remember()
    describe(run, unet)

    # 5. Train
    images_per_process = config.train_batch_size // accelerator.num_processes
    while not run.is_finished:
        batch = run.next_batch()
        draws = draw_step(
            *(config.seed, run.images_seen, config.train_batch_size, data.share, len(scheduler)),
            *(batch["images"].shape[1:], accelerator.device, config.low_discrepancy_timesteps),
        )
        losses = []
        for images, labels, drawn, is_last in passes(batch, draws, run.images_per_pass):
            # Gradients are exchanged once in a step.
            with nullcontext() if is_last else accelerator.no_sync(unet):
                samples, augment_labels = augment(config, augmentation, images, drawn)
                pass_losses, _ = objective(  # noise, predict, compare
                    unet, samples, labels, timesteps=drawn.timesteps, noise=drawn.noise, augment_labels=augment_labels
                )
                accelerator.backward(pass_losses.sum() / images_per_process)  # of which the processes take the mean
            losses.append(pass_losses.detach())
        grad_norm = clip_gradient(accelerator, unet, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(run.images_seen)
        guard.step(grad_norm)  # unless it is not finite
        optimizer.zero_grad()
        if ema is not None:
            ema.decay = ema.min_decay = config.ema_decay_at(run.images_seen + config.train_batch_size)
            ema.step(unet.parameters())
        run.after_step(losses, draws.timesteps, grad_norm, batch["names"])

    # 6. Finish
    run.finish()
    return run


def passes(batch: dict, draws: StepDraws, size: int):
    """Parts of a process's share that a forward pass takes: pictures, labels, draws, and whether it is the last."""
    images = batch["images"].split(size)
    labels = batch["labels"].split(size) if "labels" in batch else [None] * len(images)
    is_last = [i == len(images) - 1 for i in range(len(images))]
    return zip(images, labels, draws.split(size), is_last, strict=True)


def augment(
    config: TrainingConfig, augmentation: NonLeakingAugmentation, images: torch.Tensor, draws: StepDraws
) -> tuple[torch.Tensor, torch.Tensor | None]:
    samples = to_samples(images, draws.flips if config.random_flip else None)
    return augmentation(samples, draws.augmentations) if config.augment_probability else (samples, None)


def clip_gradient(accelerator: Accelerator, unet: torch.nn.Module, max_grad_norm: float) -> torch.Tensor:
    """Clip, unless `max_grad_norm` is 0, and return the norm that it had, of shape `()`."""
    grad_norm = accelerator.clip_grad_norm_(unet.parameters(), max_grad_norm or math.inf)
    return grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm


def checkpoint_to_resume(config: TrainingConfig, accelerator: Accelerator) -> Path | None:
    """The newest checkpoint in `output_dir`, if there is one; what the main process sees holds for all.

    Raises:
        ValueError: There is one, but the run is not to be resumed.
    """
    newest = broadcast_object_list([next(reversed(list_checkpoints(config.output_dir)), None)])[0]
    if newest is not None and config.resume == "never":
        raise ValueError(
            f"`output_dir` {config.output_dir!r} holds checkpoints of an earlier run, which `resume=never` would "
            "overwrite: choose another folder, or delete them."
        )
    return newest


def load_pretrained(config: TrainingConfig) -> DDPMFacesUNet:
    """The network that the run starts from.

    Raises:
        ValueError: It is of another architecture, or has learned another noise schedule or prediction.
        OSError: There is none, or it cannot be had.
    """
    name = config.pretrained_model_name_or_path
    pipeline = DDPMFacesPipeline.from_pretrained(os.path.expanduser(name))
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
        raise ValueError(f"`pretrained_model_name_or_path` {name!r} is another model: {'; '.join(differences)}.")
    return pipeline.unet


def copy_weights(pretrained: DDPMFacesUNet, unet: DDPMFacesUNet) -> None:
    """Take over what both have. Layers for classes and augmentation that are new start by saying nothing."""
    expected, found = unet.state_dict(), pretrained.state_dict()
    same = {k: v for k, v in found.items() if k in expected and v.shape == expected[k].shape}
    new = {k: torch.zeros_like(v) for k, v in expected.items() if k not in same}
    unet.load_state_dict({**same, **new})


def check_same_model(config: TrainingConfig, checkpoint: Path) -> None:
    """Raise a `ValueError` where the checkpoint is of another network or schedule, or of what is not known."""
    saved = TrainingConfig(**read_state(checkpoint)["config"])
    then, now = ({**c.unet_config(), **c.scheduler_config()} for c in (saved, config))
    changed = [f"{name}: {then[name]} there, {now[name]} now" for name in now if then[name] != now[name]]
    if changed:
        raise ValueError(
            f"`output_dir` {config.output_dir!r} holds a run of another model ({'; '.join(changed)}): choose another "
            "folder, or delete its checkpoints."
        )


def describe(run: TrainingRun, unet: torch.nn.Module) -> None:
    """Say in a few lines what is going to be trained."""
    config, accelerator = run.config, run.accelerator
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    num_passes = math.ceil(config.train_batch_size / accelerator.num_processes / run.images_per_pass)
    accelerator.print(
        f"{run.data.description}, {num_parameters / 1e6:.1f} M parameters, {config.train_batch_size} images per step "
        f"({accelerator.num_processes} x {num_passes} x {run.images_per_pass}), {config.max_train_steps} steps on "
        f"{accelerator.num_processes} x {accelerator.device.type} ({torch.get_num_threads()} CPU threads each), "
        f"precision: {accelerator.mixed_precision}"
    )
    if num_passes > 1 and any("BatchNorm" in type(module).__name__ for module in unet.modules()):
        accelerator.print(
            f"Note: BatchNorm sees the {run.images_per_pass} pictures of a pass (on all processes), not those of a "
            "step: with another `device_batch_size` the same run learns something else."
        )


def rehearse(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Try each thing that the run will do (data, a step, validation, a sample, a save), and print the plan."""
    folder = Path(config.output_dir, "dry-run")
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
    rehearsal = replace(
        config,
        output_dir=str(folder),
        max_train_images=3 * config.train_batch_size,  # the first is slower than all others
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
        guide_images=None,  # a quarter of the rehearsal
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


def plan(config: TrainingConfig, run: TrainingRun, seconds: float) -> str:
    """What the run will do and take, from what a rehearsal of `seconds` has measured."""
    step_images, last_image = config.train_batch_size, config.max_train_steps * config.train_batch_size
    log = [entry for entry in read_jsonl(run.log_path) if "loss" in entry]
    speed = log[-1]["images_per_second"]
    checkpoint = list_checkpoints(run.output_dir)[-1]
    checkpoint_gb = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) / 1e9
    kept = config.checkpoints_total_limit + bool(run.data.held_out)
    free_gb = shutil.disk_usage(config.output_dir).free / 1e9
    num_parameters = sum(parameter.numel() for parameter in run.unet.parameters())
    # In float32: weights, gradient, two moments of Adam, and the average with a place for the weights meanwhile.
    state_gb = 4 * num_parameters * (6 if config.use_ema else 4) / 1e9

    def every(images: int, otherwise: str = "only at the end") -> str:
        return f"every {images} images, {last_image // images} times" if images else otherwise

    lines = [
        f"All of it works: data, steps, validation, samples, a checkpoint, a pipeline. That took {seconds:.0f} s.",
        f"  data         {run.data.description}; fingerprint {run.data.fingerprint[:12]}",
        f"  run          {last_image} images in {config.max_train_steps} steps of {step_images}",
        f"  time         {last_image / speed / 3600:.1f} h at {speed:.0f} images/s, without validation and samples",
        f"  memory       {log[-1]['memory_gb']:.1f} GB in use, {state_gb:.1f} GB of it weights, optimizer and average",
        f"  disk         {kept} checkpoints of {checkpoint_gb:.2f} GB; {free_gb:.0f} GB free in {config.output_dir}",
        f"  checkpoints  {every(config.checkpoint_every_images, 'never')}",
        f"  validation   {every(config.validate_every_images) if run.data.held_out else 'none'}",
        f"  samples      {every(config.sample_every_images)}",
    ]
    if config.push_to_hub:
        lines.append(f"  Hub          {config.hub_model_id}, at the end; this token may write there")
    if (kept + 1) * checkpoint_gb > free_gb:
        lines.append("  Warning: that does not fit on the disk.")
    return "\n".join(lines)


def use_all_cores() -> None:
    """Undo the threads of `accelerate launch`: one for each process, or as many as the machine has cores.

    The former leaves cores idle, the latter wait for one another where the process may use fewer. One thread that a
    user asked for looks the same from here: to keep a process on one core, use `taskset`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if torch.get_num_threads() == 1 or torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def exit_code_of(config: TrainingConfig) -> int:
    """Run `main`, and return what the process is to end with."""
    try:
        main(config)
    except SystemExit as leaving:  # with a code of docs/training.md
        return leaving.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end a run
        stream.reconfigure(errors="backslashreplace")
    code = exit_code_of(parse_training_config())
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)  # all is saved and closed; see LIVING
    sys.exit(code)
