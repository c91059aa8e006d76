"""Distillation of a model into a student for very few steps (SFD, https://huggingface.co/papers/2409.19681).

The teacher follows the probability flow in small steps, with its guide. The student learns to take several of these
steps at once: from each of a few noise levels, a single step of DDIM must land where the teacher is at the next level.

    teacher   x_0 -o-o-o-> x_1 -o-o-o-> x_2 -o-o-o-> ... -> image
    student   x_0 -------> x_1'-------> x_2'-------> ...      |x_i' - x_i| is the loss, one optimizer step per interval

Each step starts where the student itself has landed, so that it also learns to correct its errors. No image is needed.
"""

import copy
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
import torch

from ..generation import with_own_scheduler
from ..pipeline_ddpm_faces import NOTHING, SOLVER, Condition, DDPMFacesPipeline, Guidance
from ..scheduling_ddpm_faces import DDPMFacesScheduler
from ..unet_ddpm_faces import DDPMFacesUNet
from .arguments import parse_config
from .config import _check_value, _field
from .text import choose_captions


MAX_STUDENT_STEPS = 8
# The student is told timesteps that are lower by this much for each shorter schedule, so that it knows which one it
# follows: several begin at the same noise level, but with steps of different lengths.
TOLD_OFFSET = 0.25
WITHOUT_PROMPT = 0.1  # share of the images
_PROMPTS = 4  # key of the random stream, beside those of `text` and `data.draws`


@dataclass
class DistillationConfig:
    """Everything that determines a distillation. Lengths are in images; each starts from a noise of its own.

    Raises:
        ValueError: A field has an invalid value. The message names the field and the allowed values.
    """

    teacher: str | None = _field(
        None, "Distillation", "Model to distill, with its guide: a folder or `user/name` on the Hub."
    )
    guidance_scale: float | None = _field(
        None, "Distillation", "Scale of the teacher's classifier-free guidance (default: that of the model)."
    )
    autoguidance_scale: float | None = _field(
        None, "Distillation", "Scale of the teacher's autoguidance (default: that of the model)."
    )
    pretrained_student: str | None = _field(
        None,
        "Distillation",
        "Model whose student to train further, with the same numbers of steps (default: start from the teacher).",
    )
    dataset_name: str | None = _field(
        None,
        "Distillation",
        "For a model of prompts: dataset, on the Hub or in a folder, whose captions are the prompts. Its images are "
        "not used.",
    )
    caption_column: str = _field("caption", "Distillation", "Column of the captions, or `txt` in a folder of images.")
    student_steps: list[int] = _field([4], "Distillation", "Numbers of steps that the student learns, from 1 to 8.")
    teacher_steps: int = _field(4, "Distillation", "Steps that the teacher takes for each step of the student.")

    seed: int = _field(0, "Optimization", "Seed of the noise that the images start from.")
    train_batch_size: int = _field(
        64, "Optimization", "Number of images per batch, shared equally among all processes."
    )
    max_train_images: int = _field(100_000, "Optimization", "Length of the run in images.")
    learning_rate: float = _field(2e-4, "Optimization", "Learning rate at the start; it falls to 0 along a cosine.")
    max_grad_norm: float = _field(
        1.0, "Optimization", "Maximum norm of the gradient, to which larger ones are clipped; 0 turns clipping off."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = _field(
        "no", "Optimization", "Precision of both networks; weights and losses are always float32."
    )

    sample_every_images: int = _field(20_000, "Validation", "Draw a grid of the student's samples at this interval.")
    num_samples: int = _field(16, "Validation", "Number of samples in a grid.")

    output_dir: str = _field("student", "Run", "Folder for the model with its student, and for checkpoints.")
    resume: Literal["auto", "never"] = _field(
        "auto",
        "Run",
        "Checkpoints already in `output_dir`: auto resumes from the newest, never refuses to start.",
    )
    checkpoint_every_images: int = _field(10_000, "Run", "Save a checkpoint at this interval; 0 saves none.")
    checkpoints_total_limit: int = _field(2, "Run", "Number of checkpoints to keep.")
    time_limit_minutes: float | None = _field(
        None, "Run", "Save and stop before the process is this old; the same command resumes."
    )
    log_every_images: int = _field(640, "Run", "Write a log entry at this interval.")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = _field("none", "Run", "Tracker for the log.")

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _check_value(name, getattr(self, name), hint)
        self.output_dir = os.path.expanduser(self.output_dir)
        if any(number > MAX_STUDENT_STEPS for number in self.student_steps):
            raise ValueError(f"`student_steps` must be from 1 to {MAX_STUDENT_STEPS}, got {self.student_steps}.")
        self.student_steps = sorted(set(self.student_steps), reverse=True)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be positive and finite, got {self.learning_rate}.")
        if not 0 <= self.max_grad_norm < math.inf:
            raise ValueError(f"`max_grad_norm` must be at least 0 and finite, got {self.max_grad_norm}.")
        if self.time_limit_minutes is not None and not 0 < self.time_limit_minutes < math.inf:
            raise ValueError(f"`time_limit_minutes` must be positive and finite, got {self.time_limit_minutes}.")

    @property
    def max_train_steps(self) -> int:
        """Number of batches; the last may slightly exceed `max_train_images`."""
        return math.ceil(self.max_train_images / self.train_batch_size)

    @property
    def device_batch_size(self) -> None:
        """Batches are not divided into micro-batches."""
        return None

    def learning_rate_at(self, images_seen: int) -> float:
        """Return the learning rate of the steps that begin after `images_seen` images."""
        done = images_seen / (self.max_train_steps * self.train_batch_size)
        return self.learning_rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    def check_same_run(self, earlier: dict[str, Any]) -> None:
        """Raise a `ValueError` if a checkpoint with the configuration `earlier` belongs to another distillation."""
        for name in (
            *("teacher", "guidance_scale", "autoguidance_scale", "pretrained_student"),
            *("dataset_name", "caption_column"),
            *("student_steps", "teacher_steps", "seed", "train_batch_size"),
        ):
            if earlier.get(name) != getattr(self, name):
                raise ValueError(
                    f"`{name}` must be {earlier.get(name)!r} to resume the run in `output_dir` {self.output_dir!r}, "
                    f"got {getattr(self, name)!r}; choose another folder for another run."
                )

    def save(self, path: str | Path) -> None:
        """Write all fields to a YAML file that `--config` accepts."""
        import yaml

        Path(path).write_text(yaml.safe_dump(asdict(self), sort_keys=False), "utf-8")


def parse_distillation_config(
    argv: Sequence[str] | None = None, command: str = "accelerate launch training/distill.py"
) -> DistillationConfig:
    """Read the configuration of a distillation, see [`parse_config`]."""
    return parse_config(DistillationConfig, argv, command, "Distill a model into a student for very few steps.")


@dataclass(frozen=True)
class StudentSchedule:
    """The noise levels at which a student of n steps predicts.

    Args:
        timesteps (`list[int]`): The timesteps of these levels in training, descending.
        told (`list[float]`): The timesteps that the student is told.
        sigmas (`list[float]`): Their noise-to-signal ratios.
    """

    timesteps: list[int]
    told: list[float]
    sigmas: list[float]


def student_schedules(scheduler: DDPMFacesScheduler, student_steps: Sequence[int]) -> dict[int, StudentSchedule]:
    """Return the schedule of each number of steps: levels of SFD's grid (rho = 7), each at a timestep of training.

    Raises:
        ValueError: The model has too few timesteps.
    """
    solver = DDPMFacesScheduler.from_config(scheduler.config, **SOLVER)
    solver.set_timesteps(2)
    highest, lowest = solver.sigmas[0].item(), 0.006
    solver = DDPMFacesScheduler.from_config(scheduler.config, algorithm="ddim", tuned_steps=None)
    all_sigmas = solver.sigmas[:-1].flip(0)  # of each timestep, rising
    schedules = {}
    for place, number in enumerate(sorted(set(student_steps), reverse=True)):
        roots = torch.linspace(highest ** (1 / 7), lowest ** (1 / 7), number + 1, dtype=torch.float64)[:-1]
        timesteps = [int((all_sigmas.log() - sigma.log()).abs().argmin()) for sigma in roots**7]
        if len(set(timesteps)) < number:
            raise ValueError(f"`student_steps` ({number}) must be fewer: this model has {len(solver)} timesteps.")
        told = [max(0.0, t - place * TOLD_OFFSET) for t in timesteps]
        schedules[number] = StudentSchedule(timesteps, told, [all_sigmas[t].item() for t in timesteps])
    return schedules


class Teacher:
    """Knows where the probability flow of a model leads from a noise.

    Args:
        pipeline ([`DDPMFacesPipeline`]): The model, in evaluation mode.
        guidance ([`Guidance`]): How it is guided.
        schedules (`dict[int, StudentSchedule]`): By [`student_schedules`].
        steps (`int`): Steps between two levels of the student; fewer where there are not as many timesteps.
    """

    def __init__(
        self, pipeline: DDPMFacesPipeline, guidance: Guidance, schedules: dict[int, StudentSchedule], steps: int
    ) -> None:
        config = with_own_scheduler(pipeline).scheduler.config
        self.pipeline, self.guidance, self.steps = pipeline, guidance, steps
        self.solver = DDPMFacesScheduler.from_config(config, algorithm="dpmsolver++", solver_order=3, tuned_steps=None)
        sigmas = self.solver.sigmas[:-1].flip(0).log()  # of each timestep, rising
        # From here, the model's own solver goes straight to x_0. Further steps would add the errors of a weak network.
        lowest = max(sigmas[0].item(), math.log(config.sigma_min))
        self.timesteps: dict[int, list[int]] = {}
        self.stops: dict[int, list[int]] = {}  # the number of steps after which the teacher is at each level
        for number, schedule in schedules.items():
            fine: list[int] = []
            stops = []
            for start, end in itertools.pairwise([*schedule.timesteps, -1]):
                last = lowest if end < 0 else sigmas[end].item()
                wanted = torch.linspace(sigmas[start].item(), last, steps + 1)[1:-1]
                near = (sigmas - wanted[:, None]).abs().argmin(dim=1).tolist()
                # The same timestep may be the nearest to several points.
                fine += [start, *(t for t in dict.fromkeys(near) if end < t < start)]
                stops.append(len(fine))
            self.timesteps[number], self.stops[number] = fine, stops

    @torch.no_grad()
    def targets(self, noise: torch.Tensor, number: int, condition: Condition = NOTHING) -> list[torch.Tensor]:
        """Return where the student's `number` steps from `noise` must land: x_0 + sigma epsilon at each next level."""
        self.solver.set_timesteps(timesteps=self.timesteps[number])
        targets, x = [], noise
        for count, t in enumerate(self.solver.timesteps, start=1):
            output = self.pipeline.predict(x, t, condition, self.guidance)
            x = self.solver.step(output, t, x).prev_sample
            if count in self.stops[number]:
                targets.append(x * math.hypot(1, self.solver.sigmas[count].item()))
        return targets


def student_preset(schedules: dict[int, StudentSchedule]) -> dict[str, Any]:
    """Return the preset that samples with the student."""
    steps = {str(n): {"timesteps": list(s.told), "sigmas": list(s.sigmas)} for n, s in sorted(schedules.items())}
    return {
        "network": "student",
        "algorithm": "ddim",
        "clip_sample": False,
        "epsilon_scaling": 1.0,
        "guidance_scale": 1.0,
        "autoguidance_scale": 1.0,
        "num_inference_steps": max(schedules),
        "tuned_steps": steps,
    }


def initial_student(
    teacher: DDPMFacesPipeline, pretrained: DDPMFacesPipeline | None, schedules: dict[int, StudentSchedule]
) -> DDPMFacesUNet:
    """Return the network to train: the student of `pretrained`, or a copy of the teacher's network.

    Raises:
        ValueError: `pretrained` has no student, or one that does not fit the teacher or the schedules.
    """
    if pretrained is None:
        return copy.deepcopy(teacher.unet)
    student = pretrained.student
    if student is None:
        raise ValueError("the model has no student.")
    preset = (pretrained.config.presets or {}).get("student", {})
    learned = {int(number): entry for number, entry in (preset.get("tuned_steps") or {}).items()}
    if list(schedules) != sorted(learned, reverse=True):
        raise ValueError(f"`student_steps` must be {sorted(learned)}, which it has learned, got {sorted(schedules)}.")
    for number, schedule in schedules.items():
        levels = learned[number]
        if levels["timesteps"] != schedule.told or not np.allclose(levels["sigmas"], schedule.sigmas):
            raise ValueError(f"its student must start each of {number} steps at the noise levels of this teacher.")
    expected = {name: weight.shape for name, weight in teacher.unet.state_dict().items()}
    if {name: weight.shape for name, weight in student.state_dict().items()} != expected:
        raise ValueError("its student must have the architecture of the teacher.")
    return student


def draw_noise(seed: int, first: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw the noises of `count` images from image `first` on. They depend on nothing but their numbers."""
    generator = torch.Generator().manual_seed(seed + first)
    return torch.randn((count, *shape), generator=generator)


def draw_condition(
    pipeline: DDPMFacesPipeline,
    captions: Sequence[Sequence[str]] | None,
    config: DistillationConfig,
    images_seen: int,
    share: slice,
) -> Condition:
    """Choose the classes and prompts of a batch. They depend only on the number of images seen.

    One prompt in ten is empty, so that the student also generates faces without a prompt.

    Args:
        pipeline ([`DDPMFacesPipeline`]): The teacher.
        captions (`list[list[str]]`, *optional*): The captions of images, for a teacher of prompts.
        config ([`DistillationConfig`]): The run's configuration.
        images_seen (`int`): Images before this batch.
        share (`slice`): The part of the batch that belongs to this process.
    """
    classes = pipeline.unet.config.get("num_class_embeds")
    labels = None
    if classes is not None:
        labels = (torch.arange(share.start, share.stop) + images_seen).remainder(classes).to(pipeline.unet.device)
    if captions is None:
        return Condition(labels)
    rng = np.random.default_rng((config.seed, images_seen, _PROMPTS))
    chosen = rng.integers(len(captions), size=config.train_batch_size)[share]
    is_hidden = rng.random(config.train_batch_size)[share] < WITHOUT_PROMPT
    texts = choose_captions([captions[i] for i in chosen], config.seed, images_seen, share)
    prompts = ["" if hidden else text for text, hidden in zip(texts, is_hidden, strict=True)]
    return Condition(labels, pipeline.encode_texts(prompts))


def finished_pipeline(
    teacher: DDPMFacesPipeline, student: DDPMFacesUNet, schedules: dict[int, StudentSchedule]
) -> DDPMFacesPipeline:
    """Return the teacher's pipeline with the student and its preset, which becomes the default."""
    settings = {name: teacher.config[name] for name in ("weights", *Guidance._fields)}
    presets = {**(teacher.config.presets or {}), "student": student_preset(schedules)}
    components = {**teacher.components, "student": student}
    return DDPMFacesPipeline(**components, **settings, presets=presets, default_preset="student")
