"""Compare restoration with classical methods, RePaint and DPS, on held-out faces.

    pip install scikit-image
    python benchmarks/restoration.py models/faces64-mini --data my-faces --output docs/reference/restoration.md

For each task, noise and number of network evaluations, it measures the peak signal-to-noise ratio (PSNR), the
structural similarity (SSIM), the Fréchet distance to the same faces before they were damaged, and the seconds. It also
measures how often a pixel lies where twenty restorations say that it does. A step size for DPS and a number of
repetitions for RePaint are chosen on faces of their own. Leave the machine idle.

The pictures beside the page show ten generated faces, of the seeds 0 to 9, so that you can publish them.

`--settings` compares settings of our own method instead, on the faces that are used to choose.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from skimage.metrics import structural_similarity
from skimage.restoration import inpaint_biharmonic
from speed import describe

from ddpm_faces import (
    DDPMFacesPipeline,
    DDPMFacesRestorePipeline,
    Downsample,
    GaussianBlur,
    Gray,
    Inpaint,
    restoration_ddpm_faces,
)
from ddpm_faces.data import load_faces
from ddpm_faces.evaluation.extractors import MobileNetV2
from ddpm_faces.evaluation.metrics import frechet_distance
from ddpm_faces.operators_ddpm_faces import SpectralOperator
from ddpm_faces.plots import image_grid, side_by_side


NOISE_LEVELS = (0.0, 0.05)
STEPS = (20, 50, 100)
DPS_SCALES = (2.0, 4.0, 8.0, 16.0)
REPETITIONS = (1, 2, 5, 10)
NUM_CHOICE, NUM_SHOWN, NUM_CALIBRATED, NUM_DRAWS = 20, 10, 5, 20
SPREAD = 4  # brightness of the spread in pictures: a standard deviation of a quarter of the range is white
SMOOTHNESS = 0.1  # standard deviation of what a blur has removed from a face, for Tikhonov's deconvolution
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no repetition": {"num_resamples": 1},
    "2 repetitions": {"num_resamples": 2},
    "3 repetitions": {"num_resamples": 3},
    "5 repetitions": {"num_resamples": 5},
    "8 repetitions": {"num_resamples": 8},
    "2, no probes": {"num_resamples": 2, "PROBED": (0.0, 0.0)},
    "2, no probes, white errors": {
        "num_resamples": 2,
        "PROBED": (0.0, 0.0),
        "SMOOTHNESS": (0.0, 0.0),
        "CHANNEL_COUPLING": 0.0,
    },
    "DDNM": {"num_resamples": 1, "PROBED": (0.0, 0.0), "SMOOTHNESS": (0.0, 0.0), "CHANNEL_COUPLING": 0.0},
    "2, eta 0.5": {"num_resamples": 2, "eta": 0.5},
    "2, eta 0": {"num_resamples": 2, "eta": 0.0},
    "2, regularization 1": {"num_resamples": 2, "regularization": 1.0},
    "2, regularization 4": {"num_resamples": 2, "regularization": 4.0},
    "2, autoguidance 1.7": {"num_resamples": 2, "autoguidance_scale": 1.7},
}


@dataclass
class Task:
    """A damage, and faces that have it: `observed` is of `truth`, in [-1, 1]."""

    name: str
    operator: SpectralOperator
    noise_level: float
    truth: torch.Tensor
    observed: torch.Tensor

    def part(self, faces: slice) -> "Task":
        return replace(self, truth=self.truth[faces], observed=self.observed[faces])


def tasks(faces: torch.Tensor, noise_levels: Sequence[float]) -> list[Task]:
    """Damage faces in all ways."""
    size = faces.shape[-1]
    shape = tuple(faces.shape[1:])
    is_missing = torch.rand(size, size, generator=torch.Generator().manual_seed(0)) < 0.7
    box = torch.zeros(size, size)
    box[size // 4 : -size // 4, size // 4 : -size // 4] = 1
    operators: dict[str, SpectralOperator] = {
        "70% of the pixels missing": Inpaint(is_missing),
        "center missing": Inpaint(box),
        "4x smaller": Downsample(4, shape),
        "blurred": GaussianBlur(1.5, shape),
        "gray": Gray(shape),
    }
    damaged = []
    for name, operator in operators.items():
        for noise_level in noise_levels:
            clean = operator(faces)
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
            damaged.append(Task(name, operator, noise_level, faces, clean + noise_level * noise))
    return damaged


# Methods


Method = Callable[[Task, int], torch.Tensor]  # (task, number of network evaluations) -> restored faces


def classical(task: Task, num_steps: int = 0) -> torch.Tensor:
    """Restore without a model: the biharmonic equation, bicubic interpolation, deconvolution, or leave it gray."""
    operator, observed = task.operator, task.observed
    if isinstance(operator, Inpaint):
        is_missing = operator.is_missing.numpy()
        faces = [inpaint_biharmonic(y.permute(1, 2, 0).numpy(), is_missing, channel_axis=-1) for y in observed]
        return torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2).float()
    if isinstance(operator, Downsample):
        size = operator.image_shape[1:]
        return torch.nn.functional.interpolate(observed, size=size, mode="bicubic", align_corners=False)
    if isinstance(operator, Gray):
        return observed.expand(-1, 3, -1, -1)
    return operator.proximal(observed, observed, max(task.noise_level, 0.01) ** 2 / SMOOTHNESS**2)


def ours(pipeline: DDPMFacesRestorePipeline, task: Task, num_steps: int, **settings: Any) -> torch.Tensor:
    """Restore by this package."""
    generator = torch.Generator().manual_seed(0)
    arguments = (task.observed, task.operator, task.noise_level, num_steps, 1, generator, "latent")
    constants = {name: settings.pop(name) for name in list(settings) if name.isupper()}
    with patch.dict(vars(restoration_ddpm_faces), constants):
        return pipeline(*arguments, **settings).images


class Ancestral:
    """DDPM's steps, at evenly spaced log-SNRs, for RePaint and DPS."""

    def __init__(self, pipeline: DDPMFacesRestorePipeline, num_steps: int, shape: Sequence[int]) -> None:
        self.pipeline, self.shape = pipeline, shape
        self.scheduler = pipeline._scheduler_with({"timestep_spacing": "logsnr"})
        self.scheduler.set_timesteps(num_steps)
        self.timesteps = self.scheduler.timesteps.tolist()
        self.alphas_cumprod = self.scheduler.alphas_cumprod
        self.generator = torch.Generator().manual_seed(0)

    def noise(self) -> torch.Tensor:
        return torch.randn(self.shape, generator=self.generator)

    def alpha_bar(self, t: int) -> torch.Tensor:
        return self.alphas_cumprod[t] if t >= 0 else torch.tensor(1.0)

    def previous(self, t: int) -> int:
        return int(self.scheduler.previous_timestep(t))

    def predict_x_0(self, sample: torch.Tensor, t: int) -> torch.Tensor:
        output = self.pipeline.predict(sample, t)[:, : sample.shape[1]]
        return self.scheduler.predict_original_sample(output, t, sample)

    def step(self, x_0: torch.Tensor, t: int, sample: torch.Tensor) -> torch.Tensor:
        """Draw the previous sample from DDPM's posterior (eq. 7 of https://huggingface.co/papers/2006.11239)."""
        alpha_bar, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(self.previous(t))
        alpha = alpha_bar / alpha_bar_prev
        mean = alpha_bar_prev.sqrt() * (1 - alpha) * x_0 + alpha.sqrt() * (1 - alpha_bar_prev) * sample
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha)
        return mean / (1 - alpha_bar) + variance.sqrt() * self.noise()


@torch.no_grad()
def repaint(pipeline: DDPMFacesRestorePipeline, task: Task, num_steps: int, repetitions: int) -> torch.Tensor:
    """Inpaint by RePaint (algorithm 1 of https://huggingface.co/papers/2201.09865): known pixels replace predicted."""
    assert isinstance(task.operator, Inpaint)
    ddpm = Ancestral(pipeline, max(1, num_steps // repetitions), task.truth.shape)
    sample = ddpm.noise()
    for t in ddpm.timesteps:
        previous = ddpm.previous(t)
        alpha_bar = ddpm.alpha_bar(previous)
        for repetition in range(repetitions):
            known = alpha_bar.sqrt() * task.observed + (1 - alpha_bar).sqrt() * ddpm.noise()
            unknown = ddpm.step(ddpm.predict_x_0(sample, t), t, sample)
            lower = torch.where(task.operator.is_missing, unknown, known)
            if previous >= 0 and repetition < repetitions - 1:  # back to the noise of t
                alpha = ddpm.alpha_bar(t) / alpha_bar
                sample = alpha.sqrt() * lower + (1 - alpha).sqrt() * ddpm.noise()
            else:
                break
        sample = lower
    return sample


def dps(pipeline: DDPMFacesRestorePipeline, task: Task, num_steps: int, scale: float) -> torch.Tensor:
    """Restore by DPS (algorithm 1 of https://huggingface.co/papers/2209.14687): gradients through the network."""
    ddpm = Ancestral(pipeline, num_steps, task.truth.shape)
    sample = ddpm.noise()
    for t in ddpm.timesteps:
        sample.requires_grad_()
        x_0 = ddpm.predict_x_0(sample, t)
        distances = (task.observed - task.operator(x_0)).flatten(1).norm(dim=1)
        (gradient,) = torch.autograd.grad(distances.sum(), sample)
        sample = (ddpm.step(x_0, t, sample) - scale * gradient).detach()
    return sample


# Metrics


class Metrics:
    """PSNR in decibels of images in [0, 1], SSIM and the Fréchet distance."""

    def __init__(self, truth: torch.Tensor) -> None:
        self.extract = MobileNetV2()
        self.truth = to_unit_range(truth)
        self.features = self.extract(to_bytes(truth))

    def __call__(self, restored: torch.Tensor) -> dict[str, float]:
        images = to_unit_range(restored)
        errors = (images - self.truth).square().flatten(1).mean(dim=1)
        similarities = [
            structural_similarity(a.numpy(), b.numpy(), data_range=1.0, channel_axis=0)
            for a, b in zip(images, self.truth, strict=True)
        ]
        return {
            "psnr": (-10 * errors.log10()).mean().item(),
            "ssim": float(np.mean(similarities)),
            "frechet": frechet_distance(self.extract(to_bytes(restored)), self.features),
        }


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    return (images.double() / 2 + 0.5).clamp(0, 1)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    return (to_unit_range(images) * 255).round().byte()


def draws(pipeline: DDPMFacesRestorePipeline, task: Task) -> torch.Tensor:
    """Return many restorations of each face, of shape `(faces, draws, channels, height, width)`."""
    arguments = (task.observed, task.operator, task.noise_level, None, NUM_DRAWS, torch.Generator().manual_seed(0))
    return pipeline(*arguments, "latent").images.unflatten(0, (len(task.truth), NUM_DRAWS))


def calibration(pipeline: DDPMFacesRestorePipeline, task: Task) -> float:
    """Return how often a pixel lies between the 10% and the 90% quantile of restorations."""
    drawn = draws(pipeline, task)
    # A further draw of the same distribution lies between these in 80 % of the cases (Weibull's plotting positions).
    low, high = np.quantile(drawn.numpy(), (0.1, 0.9), axis=1, method="weibull")
    low, high = torch.from_numpy(low), torch.from_numpy(high)
    is_open = drawn.std(dim=1) > 1e-3  # known pixels have no interval
    return ((low <= task.truth) & (task.truth <= high))[is_open].double().mean().item()


# The page


def choose(methods: dict[Any, Method], task: Task, metrics: Metrics, num_steps: int) -> tuple[Any, Method]:
    """Return the setting with the least Fréchet distance, and its method."""
    distances = {setting: metrics(method(task, num_steps))["frechet"] for setting, method in methods.items()}
    best = min(distances, key=distances.__getitem__)
    return best, methods[best]


def compare(
    pipeline: DDPMFacesRestorePipeline,
    choice: torch.Tensor,
    truth: torch.Tensor,
    shown: torch.Tensor,
    steps: Sequence[int],
    noise_levels: Sequence[float],
    pictures: Path,
) -> list[dict[str, Any]]:
    """Measure all methods on all tasks, and draw pictures of those without noise."""
    rows: list[dict[str, Any]] = []
    metrics, choice_metrics = Metrics(truth), Metrics(choice)
    middle = steps[len(steps) // 2]
    for task, choice_task, shown_task in zip(
        *(tasks(faces, noise_levels) for faces in (truth, choice, shown)), strict=True
    ):
        scales: dict[Any, Method] = {scale: partial(dps, pipeline, scale=scale) for scale in DPS_SCALES}
        methods: dict[str, tuple[Any, Method]] = {
            "classical": (None, classical),
            "DPS": choose(scales, choice_task, choice_metrics, middle),
        }
        if isinstance(task.operator, Inpaint):
            repeats: dict[Any, Method] = {n: partial(repaint, pipeline, repetitions=n) for n in REPETITIONS}
            methods["RePaint"] = choose(repeats, choice_task, choice_metrics, middle)
        methods["ddpm-faces"] = None, partial(ours, pipeline)
        for name, (setting, method) in methods.items():
            for num_steps in steps if name != "classical" else [0]:
                start = time.perf_counter()
                restored = method(task, num_steps)
                seconds = time.perf_counter() - start
                row = {"task": task.name, "noise": task.noise_level, "method": name, "setting": setting}
                row |= {"evaluations": num_steps, "seconds": seconds, **metrics(restored)}
                row["residual"] = (task.operator(restored) - task.observed).square().mean().sqrt().item()
                rows.append(row)
                print(json.dumps(row), flush=True)
        rows[-1]["inside"] = calibration(pipeline, task.part(slice(NUM_CALIBRATED)))
        print(json.dumps({"task": task.name, "noise": task.noise_level, "inside": rows[-1]["inside"]}), flush=True)
        if not task.noise_level:
            draw(pipeline, shown_task, methods, middle, pictures / picture_name(task.name))
    return rows


def draw(
    pipeline: DDPMFacesRestorePipeline, task: Task, methods: dict[str, tuple[Any, Method]], num_steps: int, path: Path
) -> None:
    """Save faces and their restorations, a face in each row."""
    is_full = task.observed.shape[2:] == task.truth.shape[2:]
    observation = task.observed.expand_as(task.truth) if is_full else task.operator.pseudo_inverse(task.observed)
    columns = {"face": task.truth, "observation": observation}
    columns |= {name: method(task, num_steps) for name, (_, method) in methods.items()}
    drawn = draws(pipeline, task)
    columns["mean"] = drawn.mean(dim=1)
    columns["spread"] = SPREAD * drawn.std(dim=1).mean(dim=1, keepdim=True).expand_as(task.truth) - 1
    grids = {
        name: image_grid(DDPMFacesRestorePipeline.postprocess(images.clamp(-1, 1)), columns=1)
        for name, images in columns.items()
    }
    side_by_side(grids).save(path)


def picture_name(task: str) -> str:
    return f"restore-{task.replace('%', '').replace(' ', '-')}.png"


def page(rows: Sequence[dict[str, Any]], command: str, num_images: int, pictures: str) -> str:
    """Return the page of a comparison."""
    noise_levels = list(dict.fromkeys(row["noise"] for row in rows))
    lines = [
        "# Benchmark of restoration",
        "",
        f"This page compares restoration with classical methods, RePaint and DPS on {num_images} held-out faces. Each "
        "method restores the same observations with the same network, once for each face. PSNR (in decibels) and SSIM "
        "are higher for better images, the Fréchet distance is lower. A step of DPS costs more than one evaluation of "
        "the network, because it needs the gradient. The pictures show generated faces, not the measured ones.",
        "",
        "```bash",
        command,
        "```",
        "",
        describe(torch.device("cpu")) + ".",
        "",
        *summary(rows),
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        by_noise = {noise: [row for row in mine if row["noise"] == noise] for noise in noise_levels}
        header = ["method", "evaluations", "seconds"]
        header += [f"{metric}, noise {noise:g}" for noise in noise_levels for metric in ("PSNR", "SSIM", "Fréchet")]
        cells = []
        for pair in zip(*by_noise.values(), strict=True):
            first = pair[0]
            values = [f"{row['psnr']:.1f} | {row['ssim']:.3f} | {row['frechet']:.0f}" for row in pair]
            name = f"**{first['method']}**" if first["method"] == "ddpm-faces" else first["method"]
            cells.append([name, str(first["evaluations"] or ""), f"{first['seconds']:.1f}", *values])
        lines += [f"## {task[0].upper()}{task[1:]}", "", *table(header, cells)]
        notes = []
        for noise, same in by_noise.items():
            chosen = {row["method"]: row["setting"] for row in same}
            words = [f"DPS with step size {chosen['DPS']:g}"]
            if "RePaint" in chosen:
                words.append(f"RePaint with {chosen['RePaint']} repetitions")
            notes.append(
                f"Noise {noise:g}: {', '.join(words)}. With ddpm-faces, {same[-1]['inside']:.0%} of the unknown "
                f"values lie in the central 80% of {NUM_DRAWS} restorations, and the observation is explained up to "
                f"{same[-1]['residual']:.1g} (root mean square)."
            )
        alt = f"Rows of generated faces: the face, the observation, and the restorations of each method; {task}"
        lines += [*(f"- {note}" for note in notes), "", f"![{alt}]({pictures}/{picture_name(task)})", ""]
    return "\n".join(lines)


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Compare our runs, but for those with the fewest evaluations, with the runs that take about as many seconds."""
    steps = sorted({row["evaluations"] for row in rows if row["method"] == "ddpm-faces"})
    methods = ["ddpm-faces", "RePaint", "DPS", "classical"]
    lines = [
        "## At about equal seconds",
        "",
        "PSNR and Fréchet distance, the best ones in bold. RePaint and DPS have the number of evaluations below whose "
        "time is the closest to that of ddpm-faces. Classical methods have the time that they need.",
        "",
    ]
    for num_steps in steps[1:] or steps:
        cells = []
        for task, noise in dict.fromkeys((row["task"], row["noise"]) for row in rows):
            same = [row for row in rows if (row["task"], row["noise"]) == (task, noise)]
            (mine,) = (row for row in same if (row["method"], row["evaluations"]) == ("ddpm-faces", num_steps))
            runs = {
                name: min(
                    [row for row in same if row["method"] == name and (name != "ddpm-faces" or row is mine)],
                    key=lambda row, mine=mine: abs(math.log(row["seconds"] / mine["seconds"])),
                    default=None,
                )
                for name in methods
            }
            found = [run for run in runs.values() if run]
            best_psnr = max(round(run["psnr"], 1) for run in found)
            best_distance = min(round(run["frechet"]) for run in found)
            line = [task, f"{noise:g}"]
            for run in runs.values():
                if run is None:
                    line.append("")
                    continue
                psnr, distance = round(run["psnr"], 1), round(run["frechet"])
                marks = ["**" * (psnr == best_psnr), "**" * (distance == best_distance)]
                seconds = f" ({run['seconds']:.0f} s)" if run["evaluations"] else ""
                line.append(f"{marks[0]}{psnr}{marks[0]}, {marks[1]}{distance}{marks[1]}{seconds}")
            cells.append(line)
        lines += [f"{num_steps} evaluations of ddpm-faces:", "", *table(["task", "noise", *methods], cells)]
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]


def compare_settings(
    pipeline: DDPMFacesRestorePipeline, faces: torch.Tensor, steps: Sequence[int], noise_levels: Sequence[float]
) -> list[str]:
    """Return a table of settings of our method: PSNR and Fréchet distance for each task."""
    metrics, damaged = Metrics(faces), tasks(faces, noise_levels)
    rows = []
    for num_steps in steps:
        for name, settings in SETTINGS.items():
            if "autoguidance_scale" in settings and pipeline.guide is None:
                continue
            cells = []
            for task in damaged:
                found = metrics(ours(pipeline, task, num_steps, **settings))
                cells.append(f"{found['psnr']:.1f}, {found['frechet']:.0f}")
            rows.append([name, str(num_steps), *cells])
            print(*rows[-1], sep=" | ", flush=True)
    return table(["setting", "evaluations", *(f"{task.name}, noise {task.noise_level:g}" for task in damaged)], rows)


def generated(model: str, shape: tuple[int, int, int]) -> torch.Tensor:
    """Return the faces that the pictures show."""
    pipeline = DDPMFacesPipeline.from_pretrained(model)
    if pipeline.image_shape != shape:
        raise ValueError(f"`shown` must make images of the shape {shape}, got {pipeline.image_shape}.")
    generators = [torch.Generator().manual_seed(seed) for seed in range(NUM_SHOWN)]
    return pipeline(NUM_SHOWN, generator=generators, output_type="latent").images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, or its name on the Hub")
    parser.add_argument("--data", required=True, help="dataset of faces")
    parser.add_argument("--split", default="test", help="held-out faces; the last ones are used to choose")
    parser.add_argument("--num-images", type=int, default=100, help="faces to restore")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="evaluations of the network")
    parser.add_argument("--noise-levels", type=float, nargs="+", default=NOISE_LEVELS, help="standard deviations")
    parser.add_argument("--settings", action="store_true", help="compare settings of ddpm-faces")
    parser.add_argument("--output", type=Path, default=Path("restoration.md"), help="Markdown page")
    parser.add_argument(
        "--shown", metavar="MODEL", help="model that makes the faces of the pictures; default: the same"
    )
    parser.add_argument("--pictures", type=Path, help="folder for pictures; default: that of the page")
    arguments = parser.parse_args()

    pipeline = DDPMFacesRestorePipeline.from_pretrained(arguments.model).optimize()
    pipeline.set_progress_bar_config(disable=True)
    resolution = pipeline.image_shape[1:]
    images = load_faces(arguments.data, resolution=resolution, split=arguments.split).images
    if len(images) < arguments.num_images + NUM_CHOICE:
        parser.error(f"--split must have at least {arguments.num_images + NUM_CHOICE} images, has {len(images)}")
    faces = images.float() / 127.5 - 1
    truth, choice = faces[: arguments.num_images], faces[-NUM_CHOICE:]
    steps, noise_levels = sorted(set(arguments.steps)), sorted(set(arguments.noise_levels))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.settings:
        lines = compare_settings(pipeline, choice, steps, noise_levels)
        arguments.output.write_text("\n".join(lines), "utf-8")
        return
    pictures = arguments.pictures or arguments.output.parent
    pictures.mkdir(parents=True, exist_ok=True)
    shown = generated(arguments.shown or arguments.model, pipeline.image_shape)
    rows = compare(pipeline, choice, truth, shown, steps, noise_levels, pictures)
    command = shlex.join(["python", *sys.argv])
    link = Path(os.path.relpath(pictures, arguments.output.parent)).as_posix()
    arguments.output.write_text(page(rows, command, len(truth), link), "utf-8")


if __name__ == "__main__":
    main()
