"""Train DDPM on images of faces.

$ accelerate launch training/train.py                                          # on drawn faces
$ accelerate launch training/train.py --train_data_dir my_faces --resolution 64
$ accelerate launch training/train.py --config training/configs/article64.yaml --dataset_name user/faces

Each field of `ddpm_faces.training.config.TrainingConfig` is a flag (see `--help`) and a key of the YAML file that
`--config` takes. docs/guides/resume.md describes how interrupted runs resume.
"""

from ddpm_faces.interruption import handle_interrupts


if __name__ == "__main__":
    handle_interrupts()  # before the imports below, which take seconds

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, TorchDynamoPlugin, set_seed

from ddpm_faces import DDPMFacesObjective, DDPMFacesScheduler, DDPMFacesUNet
from ddpm_faces.data import NonLeakingAugmentation, to_samples
from ddpm_faces.training.arguments import parse_training_config
from ddpm_faces.training.assessment import Assessment, validate
from ddpm_faces.training.batch import Batch, batches
from ddpm_faces.training.changes import check_same_model
from ddpm_faces.training.checkpoint import CheckpointIO, read_state
from ddpm_faces.training.config import TrainingConfig
from ddpm_faces.training.data import load_training_data
from ddpm_faces.training.ema import EMA
from ddpm_faces.training.finish import finish
from ddpm_faces.training.guard import GradientGuard
from ddpm_faces.training.log import TrainingLog
from ddpm_faces.training.preemption import Preemption
from ddpm_faces.training.rehearsal import rehearse
from ddpm_faces.training.run import Run
from ddpm_faces.training.samples import sample_grid
from ddpm_faces.training.saving import keep_guide, leave_if_asked, save
from ddpm_faces.training.schedule import due_after
from ddpm_faces.training.scripts import clip_gradient, make_accelerator, run_script, set_learning_rate
from ddpm_faces.training.setup import (
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
from ddpm_faces.training.text import PromptedUNet, make_text_side, parameter_groups, sample_prompts


# Networks of multi-process runs stay alive until the process ends, because deleting one may never return.
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
        set_seed(config.seed)
        text = make_text_side(config, data, pretrained, checkpoint)
        if text is None and pretrained is not None and pretrained.text_encoder is not None:
            accelerator.print("Note: the new model understands no prompts, because the run has no `caption_column`.")
        config = replace(config, num_class_embeds=data.num_classes)
        if text is not None:
            prompts = config.sample_prompts or sample_prompts(data.all_captions(), config.num_samples)
            config = replace(config, text_embed_dim=text.dim, sample_prompts=prompts)
        if checkpoint is not None:
            check_same_model(config, checkpoint)

        # 2. Network and loss
        set_seed(config.seed)
        scheduler = DDPMFacesScheduler(**config.scheduler_config())
        objective = DDPMFacesObjective(
            scheduler, config.loss_type, config.snr_gamma or None, snr_floor=config.snr_floor
        )
        unet = DDPMFacesUNet(**config.unet_config())
    if pretrained is not None:
        copy_weights(pretrained.unet, unet)
    set_seed(config.seed, device_specific=True)  # same weights on all processes, different dropout
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    is_sharded = accelerator.distributed_type == DistributedType.FSDP  # requires contiguous parameters
    # channels_last makes convolutions faster, also on the CPU.
    unet.to(accelerator.device, memory_format=torch.contiguous_format if is_sharded else torch.channels_last)
    if accelerator.num_processes > 1:
        convert_sync_batch_norm(unet)

    compilation = TorchDynamoPlugin()  # the setting of `accelerate launch`
    if compilation.backend != DynamoBackend.NO:
        unet.compile(**compilation.to_kwargs())
    if text is not None:
        text.text_encoder.to(accelerator.device)
        unet = PromptedUNet(unet, text.text_encoder if text.is_trained else None)

    # 3. Optimizer and EMA
    optimizer = torch.optim.AdamW(parameter_groups(unet), fused=True, **optimizer_settings(config))
    unet, optimizer = accelerator.prepare(unet, optimizer)
    if accelerator.num_processes > 1:
        LIVING.append(unet)
    guard = GradientGuard(accelerator.unwrap_model(unet), optimizer)
    ema = EMA(accelerator.unwrap_model(unet)) if config.use_ema else None

    # 4. Resume
    state = RunState(num_held_out=data.num_held_out)
    log, preemption = TrainingLog(config, accelerator, state), Preemption(config.time_limit_minutes)
    steps = StepRecorder(config, accelerator, state, log)
    run = Run(config, accelerator, unet, optimizer, ema, objective, data, preemption, log, steps, state, text=text)
    checkpoints = CheckpointIO(config, accelerator, unet, ema, data, text)
    try:
        start(run, checkpoints, checkpoint)
        guard.remember()
        describe(run)
        loop(run, guard, checkpoints)
    finally:
        preemption.close()  # `finish` may be interrupted
    finish(run)
    return run


def loop(run: Run, guard: GradientGuard, checkpoints: CheckpointIO) -> None:
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
                    condition=part.text,
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


if __name__ == "__main__":
    run_script(lambda: main(parse_training_config()))
