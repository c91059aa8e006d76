"""Train DDPM on images of faces.

$ accelerate launch training/train.py                                          # on drawn faces
$ accelerate launch training/train.py --train_data_dir my_faces --resolution 64
$ accelerate launch training/train.py --config training/configs/article64.yaml --dataset_name user/faces

Each field of `ddpm_faces.training.config.TrainingConfig` is a flag (see `--help`) and a key of the YAML file that
`--config` takes. docs/guides/resume.md describes how interrupted runs resume.
"""

from ddpm_faces.interruption import handle_interrupts, say_interrupted


if __name__ == "__main__":
    handle_interrupts()  # before the imports below, which take seconds

import importlib.util
import io
import math
import os
import platform
import sys
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, ProjectConfiguration, TorchDynamoPlugin, set_seed

from ddpm_faces import DDPMFacesObjective, DDPMFacesScheduler, DDPMFacesUNet
from ddpm_faces.data import NonLeakingAugmentation, to_samples
from ddpm_faces.errors import HubError
from ddpm_faces.training.arguments import parse_training_config
from ddpm_faces.training.assessment import Assessment, validate
from ddpm_faces.training.batch import Batch, batches
from ddpm_faces.training.changes import check_same_model
from ddpm_faces.training.checkpoint import CheckpointIO, read_state
from ddpm_faces.training.config import TrainingConfig
from ddpm_faces.training.cores import use_all_cores
from ddpm_faces.training.data import load_training_data
from ddpm_faces.training.ema import EMA
from ddpm_faces.training.finish import finish
from ddpm_faces.training.guard import NonFiniteGuard
from ddpm_faces.training.log import TrainingLog
from ddpm_faces.training.preemption import Preemption
from ddpm_faces.training.rehearsal import rehearse
from ddpm_faces.training.run import Run
from ddpm_faces.training.samples import sample_grid
from ddpm_faces.training.saving import keep_guide, leave_if_asked, save
from ddpm_faces.training.schedule import due_after
from ddpm_faces.training.setup import (
    SetupError,
    checkpoint_to_resume,
    copy_weights,
    load_pretrained,
    locked,
    optimizer_settings,
    setting_up,
    start,
)
from ddpm_faces.training.state import RunState
from ddpm_faces.training.steps import StepRecorder
from ddpm_faces.training.sync_batch_norm import convert_sync_batch_norm


X86 = ("x86_64", "AMD64")  # architectures whose CPU capability PyTorch reports

# Networks of multi-process runs stay alive until the process ends. Deleting one makes DistributedDataParallel wait,
# holding the interpreter's lock, for a thread of gloo that may itself be waiting for that lock: a deadlock.
LIVING: list[torch.nn.Module] = []


def main(config: TrainingConfig) -> None:
    with setting_up():
        accelerator = make_accelerator(config)
        if config.push_to_hub and accelerator.is_main_process:
            from ddpm_faces.hub import check_permission

            name = config.hub_model_id or Path(config.output_dir).resolve().name
            config = replace(config, hub_model_id=check_permission(name, config.hub_private_repo))
    with locked(config.output_dir, accelerator.is_main_process):
        if config.dry_run:
            rehearse(config, accelerator, train)
        else:
            train(config, accelerator)


def train(config: TrainingConfig, accelerator: Accelerator) -> Run:
    with setting_up():
        checkpoint = checkpoint_to_resume(config, accelerator)
        pretrained = None
        if config.pretrained_model_name_or_path is not None and checkpoint is None:
            pretrained = load_pretrained(config.pretrained_model_name_or_path, config)
            accelerator.print(f"Starting from the weights of {config.pretrained_model_name_or_path}.")

        # 1. Data
        num_held_out = None if checkpoint is None else read_state(checkpoint)["run"].get("num_held_out")
        data = load_training_data(config, accelerator, num_held_out)
        config = replace(config, num_class_embeds=data.num_classes)
        if checkpoint is not None:
            check_same_model(config, checkpoint)

        # 2. Network and loss
        set_seed(config.seed)
        scheduler = DDPMFacesScheduler(**config.scheduler_config())
        objective = DDPMFacesObjective(scheduler, config.loss_type, config.snr_gamma or None)
        unet = DDPMFacesUNet(**config.unet_config())
    if pretrained is not None:
        copy_weights(pretrained, unet)
    set_seed(config.seed, device_specific=True)  # same weights on all processes, different dropout
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    is_sharded = accelerator.distributed_type == DistributedType.FSDP  # requires contiguous parameters
    # channels_last makes convolutions faster, also on the CPU.
    unet.to(accelerator.device, memory_format=torch.contiguous_format if is_sharded else torch.channels_last)
    if accelerator.num_processes > 1:
        convert_sync_batch_norm(unet)

    # 3. Optimizer and EMA
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True, **optimizer_settings(config))
    compilation = TorchDynamoPlugin()  # the setting of `accelerate launch`
    if compilation.backend != DynamoBackend.NO:
        unet.compile(**compilation.to_kwargs())
    unet, optimizer = accelerator.prepare(unet, optimizer)
    if accelerator.num_processes > 1:
        LIVING.append(unet)
    guard = NonFiniteGuard(accelerator.unwrap_model(unet), optimizer)
    ema = EMA(accelerator.unwrap_model(unet)) if config.use_ema else None

    # 4. Resume
    state = RunState(num_held_out=data.num_held_out)
    log, preemption = TrainingLog(config, accelerator, state), Preemption(config.time_limit_minutes)
    steps = StepRecorder(config, accelerator, state, log)
    run = Run(config, accelerator, unet, optimizer, ema, objective, data, preemption, log, steps, state)
    checkpoints = CheckpointIO(config, accelerator, unet, ema, data)
    try:
        start(run, checkpoints, checkpoint)
        guard.remember()
        describe(run)
        loop(run, guard, checkpoints)
    finally:
        preemption.close()  # `finish` may be interrupted
    finish(run)
    return run


def loop(run: Run, guard: NonFiniteGuard, checkpoints: CheckpointIO) -> None:
    config, accelerator, unet, optimizer = run.config, run.accelerator, run.unet, run.optimizer
    images_per_process = config.train_batch_size // accelerator.num_processes
    augmentation = NonLeakingAugmentation(config.augment_probability)
    assess = Assessment()
    if not run.state.is_maintained:
        maintain(run, checkpoints, assess)

    for batch in batches(run):
        losses = []
        for part in batch.split(run.micro_batch_size):
            with nullcontext() if part.is_last else accelerator.no_sync(unet):  # exchange gradients once per step
                samples, augment_labels = augment(config, augmentation, part)
                part_losses, _ = run.objective(  # noise, predict, compare
                    unet,
                    samples,
                    part.labels,
                    timesteps=part.timesteps,
                    noise=part.noise,
                    augment_labels=augment_labels,
                )
                accelerator.backward(part_losses.sum() / images_per_process)  # averaged over processes
            losses.append(part_losses.detach())
        grad_norm = clip_gradient(accelerator, unet, config.max_grad_norm)
        set_learning_rate(optimizer, config.learning_rate_at(run.state.images_seen))
        is_finite = guard.step(grad_norm)  # skips the step if the gradient is not finite
        optimizer.zero_grad()
        if run.ema is not None:
            run.ema.update(config.ema_decay_at(run.state.images_seen + config.train_batch_size), is_finite)

        run.steps.record(batch, losses, grad_norm)
        leave_if_asked(run, checkpoints)
        maintain(run, checkpoints, assess)


def maintain(run: Run, checkpoints: CheckpointIO, assess: Assessment) -> None:
    """Run the tasks that are due after the last step."""
    state, best = run.state, (run.state.best_loss, run.state.best_images_seen)
    due = due_after(run.config, state.images_seen, run.data.held_out is not None)
    if due.log:
        run.steps.write_entry()
    if due.guide:
        keep_guide(run)
    is_best = due.validate and validate(run)
    if due.sample:
        sample_grid(run)
    is_clean = assess(run, due.evaluate, due.audit)
    state.is_maintained = True
    is_wanted = is_best or (is_clean and run.config.stop_on_copies)
    is_due = due.save or (is_wanted and run.config.checkpoint_every_images)
    if is_due and not save(run, checkpoints, required=due.is_last):
        state.best_loss, state.best_images_seen = best  # the run cannot return to an unsaved checkpoint
        if is_clean:
            state.audits[-1]["is_saved"] = False


def augment(
    config: TrainingConfig, augmentation: NonLeakingAugmentation, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor | None]:
    samples = to_samples(batch.images, batch.draws.flips if config.random_flip else None)
    return augmentation(samples, batch.draws.augmentations) if config.augment_probability else (samples, None)


def clip_gradient(accelerator: Accelerator, unet: torch.nn.Module, max_grad_norm: float) -> torch.Tensor:
    """Clip the gradient unless `max_grad_norm` is 0, and return its norm before clipping, of shape `()`."""
    grad_norm = accelerator.clip_grad_norm_(unet.parameters(), max_grad_norm or math.inf)
    return grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def make_accelerator(config: TrainingConfig) -> Accelerator:
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise ValueError(f"`report_to` {config.report_to!r} is not installed: pip install {config.report_to}.")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" or config.dry_run else config.report_to,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
        dynamo_backend="no",  # it would rename the weights, so `train` compiles in place instead
    )
    if accelerator.device.type == "cpu":
        use_all_cores()
        capability = torch.backends.cpu.get_cpu_capability()
        if accelerator.mixed_precision == "bf16" and platform.machine() in X86 and "AVX512" not in capability:
            accelerator.print(
                f"Warning: this CPU ({capability}) has no bf16 instructions, so bf16 is ten times as slow as float32. "
                "Use --mixed_precision no."
            )
    return accelerator


def describe(run: Run) -> None:
    """Print the data, the network and the layout of the run."""
    config, accelerator = run.config, run.accelerator
    num_parameters = sum(parameter.numel() for parameter in run.unet.parameters())
    num_parts = math.ceil(config.train_batch_size / accelerator.num_processes / run.micro_batch_size)
    accelerator.print(
        f"{run.data.description}, {num_parameters / 1e6:.1f} M parameters, {config.train_batch_size} images per step "
        f"({accelerator.num_processes} x {num_parts} x {run.micro_batch_size}), {config.max_train_steps} steps on "
        f"{accelerator.num_processes} x {accelerator.device.type} ({torch.get_num_threads()} CPU threads each), "
        f"precision: {accelerator.mixed_precision}"
    )
    if num_parts > 1 and any("BatchNorm" in type(module).__name__ for module in run.unet.modules()):
        accelerator.print(
            f"Note: BatchNorm sees the {run.micro_batch_size} images of a micro-batch (on all processes), not those "
            "of a whole step, so the result depends on `device_batch_size`."
        )


def exit_code() -> int:
    """Read the configuration, run `main`, and return the exit code of the process."""
    try:
        main(parse_training_config())
    except SystemExit as leaving:  # with an exit code of docs/guides/resume.md
        return int(leaving.code or 0)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return say_interrupted()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a file name that the terminal cannot show must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = exit_code()
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)  # everything is saved and closed; see LIVING
    sys.exit(code)
