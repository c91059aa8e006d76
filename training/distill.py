"""Distill a model into a student that samples in a few steps, without a guide.

$ accelerate launch training/distill.py --teacher my-model --output_dir my-model-fast
$ accelerate launch training/distill.py --teacher user/faces --student_steps 2 4 --mixed_precision bf16

`ddpm-faces distill` starts this script, too.

No images are needed; for a model of prompts, a dataset gives the captions. Each field of
`ddpm_faces.training.distillation.DistillationConfig` is a flag (see `--help`) and a key of the YAML file that
`--config` takes. If the run stops, the same command resumes it.
"""

from ddpm_faces.interruption import handle_interrupts


if __name__ == "__main__":
    handle_interrupts()  # before the imports below, which take seconds

import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin, set_seed

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler
from ddpm_faces.data.sources import read_captions
from ddpm_faces.files import replacing
from ddpm_faces.generation import with_own_scheduler
from ddpm_faces.models import load_pipeline
from ddpm_faces.pipeline_ddpm_faces import Guidance
from ddpm_faces.plots import image_grid
from ddpm_faces.training.checkpoint import (
    CheckpointIO,
    checkpoint_path,
    prune_checkpoints,
    read_state,
    save_pipeline,
)
from ddpm_faces.training.distillation import (
    DistillationConfig,
    StudentSchedule,
    Teacher,
    draw_condition,
    draw_noise,
    finished_pipeline,
    initial_student,
    parse_distillation_config,
    student_preset,
    student_schedules,
)
from ddpm_faces.training.guard import GradientGuard
from ddpm_faces.training.log import TrainingLog
from ddpm_faces.training.preemption import EXIT_NONFINITE, EXIT_PREEMPTED, Preemption
from ddpm_faces.training.scripts import clip_gradient, make_accelerator, run_script, set_learning_rate
from ddpm_faces.training.setup import checkpoint_to_resume, locked, setting_up
from ddpm_faces.training.state import RunState
from ddpm_faces.training.text import sample_prompts


logger = logging.getLogger(__name__)

CONFIG_NAME = "distillation_config.yaml"
MAX_NONFINITE = 20
LIVING: list[torch.nn.Module] = []  # as in train.py


@dataclass
class Distillation:
    """The objects of a run."""

    config: DistillationConfig
    accelerator: Accelerator
    pipeline: DDPMFacesPipeline
    teacher: Teacher
    captions: list[list[str]] | None
    schedules: dict[int, StudentSchedule]
    student: torch.nn.Module
    optimizer: torch.optim.Optimizer
    checkpoints: CheckpointIO
    state: RunState
    log: TrainingLog
    preemption: Preemption
    began: float

    @property
    def last_image(self) -> int:
        return self.config.max_train_steps * self.config.train_batch_size

    def solver(self, number: int) -> DDPMFacesScheduler:
        """Return the student's scheduler for a number of steps, as it will be when sampling."""
        preset = student_preset(self.schedules)
        names = ("algorithm", "clip_sample", "epsilon_scaling", "tuned_steps")
        scheduler = DDPMFacesScheduler.from_config(
            self.pipeline.scheduler.config, **{name: preset[name] for name in names}
        )
        scheduler.set_timesteps(number)
        return scheduler


def main(config: DistillationConfig) -> None:
    with setting_up():
        accelerator = make_accelerator(config)
    with locked(config.output_dir, accelerator.is_main_process):
        distill(config, accelerator)


def distill(config: DistillationConfig, accelerator: Accelerator) -> None:
    with setting_up():
        # 1. Teacher
        if config.teacher is None:
            raise ValueError("`teacher` must be given: the folder of a model, or `user/name` on the Hub.")
        checkpoint = checkpoint_to_resume(config, accelerator)
        if checkpoint is not None:
            config.check_same_run(read_state(checkpoint)["config"])
        if config.train_batch_size % accelerator.num_processes:
            raise ValueError(
                f"`train_batch_size` ({config.train_batch_size}) must be a multiple of the number of processes, "
                f"{accelerator.num_processes}."
            )
        try:
            pipeline = with_own_scheduler(load_pipeline(config.teacher, device=accelerator.device))
        except ValueError as error:
            raise ValueError(f"`teacher` cannot be loaded: {error}") from error
        if pipeline.student is not None and config.pretrained_student is None:
            raise ValueError(
                f"`teacher` {config.teacher!r} has a student already: give the model that it was distilled from, or "
                "pass it as `pretrained_student`, too, to train its student further."
            )
        if not pipeline.takes_presets:
            raise ValueError(f"`teacher` {config.teacher!r} must have a scheduler of 'ddpm', as after training.")
        captions = read_prompts(config, pipeline)
        asked = {"guidance_scale": config.guidance_scale, "autoguidance_scale": config.autoguidance_scale}
        scales: dict[str, Any] = {
            name: pipeline.config[name] if scale is None else scale for name, scale in asked.items()
        }
        pipeline.set_guidance(**scales, guidance_interval=pipeline.config.guidance_interval)
        schedules = student_schedules(pipeline.scheduler, config.student_steps)
        teacher = Teacher(pipeline, Guidance(**scales), schedules, config.teacher_steps)
        pretrained = config.pretrained_student
        try:
            earlier = None if pretrained is None else load_pipeline(pretrained, device=accelerator.device)
            student = initial_student(pipeline, earlier, schedules)
        except ValueError as error:
            raise ValueError(f"`pretrained_student` {pretrained!r} cannot be trained further: {error}") from error

    # 2. Networks
    set_seed(config.seed)
    teachers = [network for network in (pipeline.unet, pipeline.guide) if network is not None]
    for network in teachers:
        network.requires_grad_(False).eval()
        network.forward = accelerator.autocast()(network.forward)
    student.eval()  # without dropout
    for network in (student, *teachers):
        network.to(accelerator.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    compilation = TorchDynamoPlugin()  # the setting of `accelerate launch`
    if compilation.backend != DynamoBackend.NO:
        for network in (student, *teachers):
            network.compile(**compilation.to_kwargs())
    student, optimizer = accelerator.prepare(student, optimizer)
    if accelerator.num_processes > 1:
        LIVING.append(student)
    guard = GradientGuard(accelerator.unwrap_model(student), optimizer)

    # 3. Resume
    state = RunState()
    log, preemption = TrainingLog(config, accelerator, state), Preemption(config.time_limit_minutes)
    checkpoints = CheckpointIO(config, accelerator, student, None, None)
    run = Distillation(
        *(config, accelerator, pipeline, teacher, captions, schedules, student, optimizer, checkpoints, state, log),
        preemption=preemption,
        began=time.time(),
    )
    try:
        if checkpoint is not None:
            state.__dict__.update(checkpoints.load(checkpoint)[0].__dict__)
            accelerator.print(f"Resuming from {checkpoint}, after {state.images_seen} images.")
        if accelerator.is_main_process:
            with replacing(Path(config.output_dir, CONFIG_NAME)) as path:
                config.save(path)
        log.open()
        steps = " and ".join(map(str, config.student_steps))
        guided = " and ".join(f"`{name}` {scale:g}" for name, scale in scales.items())
        accelerator.print(f"Distilling {config.teacher} with {guided} into {steps} steps.")
        loop(run, guard)
    finally:
        preemption.close()
    finish(run)


def read_prompts(config: DistillationConfig, pipeline: DDPMFacesPipeline) -> list[list[str]] | None:
    """Return the captions of the dataset, or `None` for a teacher without texts.

    Raises:
        ValueError: There must be a dataset and is none, or the other way round, or it has no captions.
    """
    takes_prompts = pipeline.text_encoder is not None
    if takes_prompts != (config.dataset_name is not None):
        kind, expected = ("takes prompts", "given") if takes_prompts else ("takes no prompts", "None")
        raise ValueError(f"`dataset_name` must be {expected} because `teacher` {config.teacher!r} {kind}.")
    if config.dataset_name is None:
        return None
    captions = [texts for texts in read_captions(config.dataset_name, config.caption_column) if texts]
    if not captions:
        raise ValueError(f"`dataset_name` {config.dataset_name!r} has no captions in {config.caption_column!r}.")
    return captions


def loop(run: Distillation, guard: GradientGuard) -> None:
    config, accelerator, state = run.config, run.accelerator, run.state
    share = config.train_batch_size // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    unet = accelerator.unwrap_model(run.student)
    solvers = {number: run.solver(number) for number in config.student_steps}
    entries: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    while state.images_seen < run.last_image:
        # Each batch is of one number of steps, in turn, and depends only on the images seen.
        number = config.student_steps[(state.images_seen // config.train_batch_size) % len(config.student_steps)]
        noise = draw_noise(config.seed, state.images_seen, config.train_batch_size, run.pipeline.image_shape)[mine]
        x = noise.to(accelerator.device)
        condition = draw_condition(run.pipeline, run.captions, config, state.images_seen, mine)
        solver = solvers[number]
        losses, norms = [], []
        for target, t, sigma in zip(
            run.teacher.targets(x, number, condition), solver.timesteps, solver.sigmas[1:].tolist(), strict=True
        ):
            output = run.student(x, t, **condition.arguments(unet)).sample.float()
            landed, _ = solver.step(output, t, x, return_dict=False)
            loss = (landed * math.hypot(1, sigma) - target).abs().mean()
            accelerator.backward(loss)
            norms.append(clip_gradient(accelerator, run.student, config.max_grad_norm))
            set_learning_rate(run.optimizer, config.learning_rate_at(state.images_seen))
            guard.step(norms[-1])  # skips the step if the gradient is not finite
            run.optimizer.zero_grad()
            losses.append(loss.detach())
            x = landed.detach()

        state.images_seen += config.train_batch_size
        state.is_maintained = False
        run.log.bar.update(config.train_batch_size)
        entries.append((number, torch.stack(losses), torch.stack(norms)))
        maintain(run, entries)


def maintain(run: Distillation, entries: list) -> None:
    """Log, sample and save where it is due, and leave if a signal or the time limit asks for it."""
    config, state = run.config, run.state

    def due(every: int) -> bool:
        return every > 0 and state.images_seen // every > (state.images_seen - config.train_batch_size) // every

    is_last = state.images_seen >= run.last_image
    if due(config.log_every_images) or is_last:
        write_entry(run, entries)
    if due(config.sample_every_images) and not is_last:
        try:
            draw_samples(run, Path(config.output_dir, "samples", f"{state.images_seen:010d}.png"))
        except OSError as error:
            logger.warning("The samples could not be saved: %s", error)
    state.is_maintained = True
    reason = None if is_last else run.preemption.reason()
    if reason is not None or due(config.checkpoint_every_images) or (is_last and config.checkpoint_every_images):
        if entries:  # a resumed run would not have them
            write_entry(run, entries)
        save(run, required=is_last or reason is not None)
    if reason is not None:
        run.log.leave(
            EXIT_PREEMPTED,
            f"Preempted after {state.images_seen} of {run.last_image} images: {reason}. The checkpoint is saved; run "
            "the same command to resume.",
        )


def write_entry(run: Distillation, entries: list) -> None:
    """Write the mean losses of each schedule since the last entry."""
    state, accelerator = run.state, run.accelerator
    norms = torch.cat([norm for _, _, norm in entries]).float().cpu()
    skipped = int((~norms.isfinite()).sum())
    state.skipped_steps += skipped
    state.nonfinite_in_a_row = state.nonfinite_in_a_row + skipped if skipped == len(norms) else 0
    losses: dict[str, float] = {}
    for number in run.config.student_steps:
        rows = [loss for steps, loss, _ in entries if steps == number]
        if rows:
            mean = accelerator.reduce(torch.stack(rows).float().mean(dim=0), reduction="mean")
            losses |= {f"{number}_steps_{i + 1}": value for i, value in enumerate(mean.tolist())}
    entries.clear()
    average = sum(losses.values()) / len(losses)
    run.log.write(
        {
            "loss": average,
            "losses": losses,
            "grad_norm": norms[norms.isfinite()].mean().item() if skipped < len(norms) else None,
            "learning_rate": run.config.learning_rate_at(state.images_seen - run.config.train_batch_size),
            "skipped_steps": state.skipped_steps,
        }
    )
    run.log.bar.set_postfix(loss=f"{average:.4f}")
    if state.nonfinite_in_a_row >= MAX_NONFINITE:
        run.log.leave(
            EXIT_NONFINITE,
            f"{state.nonfinite_in_a_row} steps in a row had a non-finite gradient and were skipped. Try a lower "
            "`learning_rate`, or `mixed_precision` bf16 or no.",
        )


def save(run: Distillation, required: bool) -> None:
    """Save a checkpoint and delete old ones. A failure, such as a full disk, ends the run only if `required`."""
    began, state = time.time(), run.state
    saved = RunState(**{**state.to_json(), "seconds": state.seconds + time.time() - run.began})
    try:
        run.checkpoints.save(checkpoint_path(run.config.output_dir, state.images_seen), saved)
        if run.accelerator.is_main_process:
            prune_checkpoints(run.config.output_dir, run.config.checkpoints_total_limit)
    except OSError as error:
        if required:
            raise
        logger.warning("%s. The run continues and tries again with the next checkpoint.", error)
    run.preemption.note_save(time.time() - began)


def student_pipeline(run: Distillation) -> DDPMFacesPipeline:
    """Return the finished pipeline, on the CPU, in float32."""
    weights = {k: v.cpu() for k, v in run.accelerator.unwrap_model(run.student).state_dict().items()}
    student = type(run.pipeline.unet).from_config(run.pipeline.unet.config)
    student.load_state_dict(weights)
    teacher = with_own_scheduler(load_pipeline(str(run.config.teacher), device="cpu"))
    return finished_pipeline(teacher, student.eval(), run.schedules)


def draw_samples(run: Distillation, path: Path) -> None:
    """Draw a grid of the student's samples, on the main process."""
    if not run.accelerator.is_main_process:
        return
    pipeline = student_pipeline(run).to(run.accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    classes = pipeline.unet.config.get("num_class_embeds")
    count = run.config.num_samples
    labels = None if classes is None else [i % classes for i in range(count)]
    generators = [torch.Generator().manual_seed(run.config.seed + i) for i in range(count)]
    prompts = None
    if run.captions is not None:
        frequent = sample_prompts((text for texts in run.captions for text in texts), count)
        prompts = [frequent[i % len(frequent)] for i in range(count)]
    batch_size = count if prompts is None else None
    images = pipeline(batch_size, generator=generators, class_labels=labels, prompt=prompts).images
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as unfinished:
        image_grid(images, scale=max(1, 128 // images[0].width)).save(unfinished, "PNG")


def finish(run: Distillation) -> None:
    """Save the model with its student, and the records of the teacher's training."""
    run.log.bar.close()
    if run.accelerator.is_main_process:
        folder = Path(run.config.output_dir)
        save_pipeline(student_pipeline(run), folder)
        home = Path(str(run.config.teacher)).expanduser()
        for name in ("training_config.yaml", "training_summary.json", "metrics.json", "tuning.json", "loss_curve.png"):
            if (home / name).is_file():
                shutil.copyfile(home / name, folder / name)
        draw_samples(run, folder / "samples.png")
        print(f"The model is in {folder}. Its preset student takes {max(run.config.student_steps)} steps.")
    run.accelerator.wait_for_everyone()
    run.log.close()  # it ends the communication between processes


if __name__ == "__main__":
    run_script(lambda: main(parse_distillation_config()))
