"""Tune the few-step solvers of a model, measure them, and make presets of them."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..checks import check_integer, check_seed
from ..data.loading import load_faces
from ..files import check_writable, replacing
from ..fitting import check_num_steps, fit_solvers
from ..generation import Recipe, with_own_scheduler
from ..pipeline_ddpm_faces import SOLVER, DDPMFacesPipeline, Guidance
from ..scheduling_ddpm_faces import DDPMFacesScheduler
from .measurements import Measured, MetricNetworks, fingerprint, measure, process_state
from .metrics import frechet_distance
from .quality import compare
from .samples import Generated, select


TUNING_NAME = "tuning.json"
MIN_IMAGES = 100
# Factors on the fitted divisors of the predicted noise, to choose from. The trajectories themselves are slightly too
# smooth, see `epsilon_scaling` of the scheduler.
EPSILON_SCALINGS = (1.0, 1.003, 1.006)
CHOICE_SEED = 2**30  # of the faces that the choice is made on; others are measured


@dataclass
class Tuning:
    """The result of [`tune`].

    Args:
        tuned_steps (`dict[str, dict]`): For the scheduler. Numbers of steps that tuning does not improve are missing.
        presets (`dict[str, dict]`): For the pipeline.
        default_preset (`str`): The preset `"fast"`.
        report (`dict`): How it was measured, and in `rows`, the metrics for each number of steps. Ready for JSON.
    """

    tuned_steps: dict[str, dict[str, Any]]
    presets: dict[str, dict[str, Any]]
    default_preset: str
    report: dict[str, Any]


def tune(
    pipeline: DDPMFacesPipeline,
    data: str,
    split: str = "test",
    choice_split: str = "train",
    num_steps: Sequence[int] = (4, 6, 8, 10),
    fast: int = 8,
    draft: int = 6,
    num_images: int = 400,
    num_trajectories: int = 128,
    guidance_scale: float | None = None,
    autoguidance_scale: float | None = None,
    guidance_interval: tuple[int, int] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    networks: MetricNetworks | None = None,
    cache_dir: str | None = None,
) -> Tuning:
    """Tune the few-step solvers of a model, and measure them beside solvers with even steps in the log-SNR.

    Args:
        pipeline ([`DDPMFacesPipeline`]): The model. It is not changed.
        data (`str`): Real faces, a dataset on the Hub or in a folder.
        split (`str`, defaults to `"test"`): Held-out split on which the solvers are measured.
        choice_split (`str`, defaults to `"train"`): Split on which `epsilon_scaling` is chosen.
        num_steps (`Sequence[int]`, defaults to `(4, 6, 8, 10)`): Numbers of steps, each from 2 to 20.
        fast (`int`, defaults to 8): Steps of the preset `"fast"`, one of `num_steps`.
        draft (`int`, defaults to 6): Steps of the preset `"draft"`, one of `num_steps`.
        num_images (`int`, defaults to 400): Number of generated and of real images of each measurement, at least 100.
        num_trajectories (`int`, defaults to 128): See [`fit_solvers`].
        guidance_scale (`float`, *optional*): Scale of classifier-free guidance; defaults to that of the pipeline.
        autoguidance_scale (`float`, *optional*): Scale of autoguidance; defaults to that of the pipeline.
        guidance_interval (`tuple[int, int]`, *optional*): Lowest and highest timestep with guidance; defaults to that
            of the pipeline.
        seed (`int`, defaults to 0): Seed of the first measured image; image i uses `seed + i`.
        batch_size (`int`, defaults to 16): Number of images at once.
        networks ([`MetricNetworks`], *optional*): By default loaded on the device of the pipeline.
        cache_dir (`str`, *optional*): See [`load_faces`].

    Returns:
        [`Tuning`]: The settings and the measurements.

    Raises:
        ValueError: An argument is out of range, a split has fewer than 100 images, or the model's images cannot be
            measured.
        ImportError: A package that holds weights is not installed.
    """
    numbers = check_num_steps(num_steps)
    for name, number in (("fast", fast), ("draft", draft)):
        if number not in numbers:
            raise ValueError(f"`{name}` must be one of `num_steps` ({', '.join(map(str, numbers))}), got {number}.")
    check_integer("num_images", num_images, MIN_IMAGES)
    check_integer("batch_size", batch_size, 1)
    check_seed(seed)
    if choice_split == split:
        raise ValueError(f"`choice_split` {choice_split!r} must differ from `split`.")
    pipeline = _plain(with_own_scheduler(pipeline))
    if not pipeline.takes_presets:
        raise ValueError(f"`pipeline` must have a scheduler of 'ddpm', got {pipeline.scheduler.config.algorithm!r}.")
    guided = _given(
        guidance_scale=guidance_scale,
        autoguidance_scale=autoguidance_scale,
        guidance_interval=guidance_interval and list(guidance_interval),
    )
    pipeline.set_guidance(**{name: guided.get(name, pipeline.config[name]) for name in Guidance._fields})
    process_state()
    size = pipeline.image_shape[1:]
    real = {}
    for name in (split, choice_split):
        faces = load_faces(data, resolution=size, split=name, cache_dir=cache_dir, max_images=num_images)
        if len(faces) < MIN_IMAGES:
            raise ValueError(f"`data` needs at least {MIN_IMAGES} images in the split {name!r}, has {len(faces)}.")
        real[name] = faces.images[:num_images]
    num_images = min(num_images, len(real[split]))

    # 1. Fit
    tuned = fit_solvers(pipeline, numbers, num_trajectories, batch_size)

    # 2. Choose the factor on the divisors, measure, and keep what is better than even steps
    networks = networks or MetricNetworks(pipeline.unet.device)
    judge = networks.extractors[0]
    chosen_for = torch.cat([judge(part).float().cpu() for part in real[choice_split].split(batch_size)])
    reference = measure(select(real[split]), len(real[split]), networks, batch_size, "Real faces")
    rows, kept = [], {}
    for number in numbers:
        candidates = [_scaled(tuned[str(number)], factor) for factor in EPSILON_SCALINGS]
        distances = []
        for candidate in candidates:
            generated = _sampler(pipeline, number, candidate, CHOICE_SEED)
            # Half as many: between the same seeds, differences show early.
            parts = tqdm(
                torch.arange(num_images // 2).split(batch_size), desc=f"Choosing, {number} steps", disable=None
            )
            features = torch.cat([judge(generated.batches(part.tolist())).float().cpu() for part in parts])
            distances.append(frechet_distance(features, chosen_for))
        best = min(range(len(candidates)), key=distances.__getitem__)
        even = _measured(pipeline, number, None, seed, num_images, networks, batch_size, reference)
        ours = _measured(pipeline, number, candidates[best], seed, num_images, networks, batch_size, reference)
        is_better = ours["frechet_distance"] < even["frechet_distance"]
        if is_better:
            kept[str(number)] = candidates[best]
        rows.append(
            {
                "steps": number,
                "epsilon_scaling": EPSILON_SCALINGS[best],
                "tuned": ours,
                "even": even,
                "kept": "tuned" if is_better else "even",
            }
        )

    # 3. Presets
    presets = {
        name: {**SOLVER, "num_inference_steps": number} | guided for name, number in (("fast", fast), ("draft", draft))
    }
    height, width = size
    folder = Path(data).expanduser()
    report = {
        "rows": rows,
        "n": num_images,
        "n_reference": len(real[split]),
        "image_size": f"{width}x{height}",
        "extractor": getattr(judge, "name", getattr(judge, "__name__", type(judge).__name__)),
        "reference": f"{folder.resolve().name if folder.is_dir() else data}, {split} ({fingerprint(real[split])})",
        "seeds": f"{seed} to {seed + num_images - 1}",
        "autoguidance_scale": pipeline.config.autoguidance_scale,
        "trajectories": num_trajectories,
    }
    if pipeline.config.guidance_interval:
        report["guidance_interval"] = list(pipeline.config.guidance_interval)
    if pipeline.config.guidance_scale != 1:
        report["guidance_scale"] = pipeline.config.guidance_scale
    return Tuning(kept, presets, "fast", report)


def save_tuning(folder: str | os.PathLike, pipeline: DDPMFacesPipeline, tuning: Tuning) -> None:
    """Write the tuned solvers and the presets into the folder of a model, and the report to `tuning.json`.

    Args:
        folder (`str` or `os.PathLike`): Folder of the model.
        pipeline ([`DDPMFacesPipeline`]): The model in it. Its scheduler and presets of the same names are replaced.
        tuning ([`Tuning`]): The result of [`tune`].
    """
    folder = Path(folder)
    check_writable(folder)
    config = with_own_scheduler(pipeline).scheduler.config
    pipeline.register_modules(scheduler=DDPMFacesScheduler.from_config(config, tuned_steps=tuning.tuned_steps or None))
    default = pipeline.config.default_preset
    if default in (None, "exact", *tuning.presets):  # a student stays the default
        default = tuning.default_preset
    pipeline.set_presets({**(pipeline.config.presets or {}), **tuning.presets}, default)
    index = json.loads(pipeline.to_json_string())
    index.pop("_name_or_path", None)
    # The presets come last: without them, nothing uses the tuned steps.
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    with replacing(folder / TUNING_NAME) as path:
        path.write_text(json.dumps(tuning.report, indent=2) + "\n", "utf-8")
    with replacing(folder / "model_index.json") as path:
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _plain(pipeline: DDPMFacesPipeline) -> DDPMFacesPipeline:
    """Return a copy without presets and tuned steps."""
    config = pipeline.scheduler.config
    pipeline = pipeline.with_scheduler(DDPMFacesScheduler.from_config(config, tuned_steps=None))
    pipeline.set_presets(None)
    return pipeline


def _scaled(entry: dict[str, Any], factor: float) -> dict[str, Any]:
    first, *others = entry["epsilon_scaling"]
    return {**entry, "epsilon_scaling": [first, *(round(divisor * factor, 6) for divisor in others)]}


def _sampler(pipeline: DDPMFacesPipeline, steps: int, entry: dict[str, Any] | None, seed: int) -> Generated:
    tuned_steps = entry and {str(steps): entry}
    scheduler = DDPMFacesScheduler.from_config(pipeline.scheduler.config, tuned_steps=tuned_steps)
    pipeline = pipeline.with_scheduler(scheduler)
    recipe = Recipe(1, seed, steps=steps).resolve(pipeline)
    return Generated(pipeline, recipe)


def _measured(
    pipeline: DDPMFacesPipeline,
    steps: int,
    entry: dict[str, Any] | None,
    seed: int,
    num_images: int,
    networks: MetricNetworks,
    batch_size: int,
    reference: Measured,
) -> dict[str, float]:
    faces = _sampler(pipeline, steps, entry, seed)
    measured = measure(faces.batches, num_images, networks, batch_size, f"Measuring, {steps} steps")
    # The face rate, then the metrics of each feature network in turn: those of the first are kept.
    values: dict[str, float] = {}
    for metric in compare(measured, reference, networks):
        values.setdefault(metric["type"], round(metric["value"], 4))
    return values
