"""Compare ddpm-faces with diffusers and with lucidrains' denoising_diffusion_pytorch, in one run.

    python benchmarks/compare.py --data my-faces --output docs/reference/benchmarks.md

The programs take turns, so that a slow moment of the machine affects all of them. Each number is a median, with the
smallest and the largest value in parentheses. Leave the machine idle. On two CPU cores, everything takes about half an
hour. `--sections` measures some parts only, and `--quick` tries all of them with numbers that mean nothing.
"""

import argparse
import copy
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, EMAModel, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from speed import DTYPES, SMALL, describe, forward_flop, matmul_rate

from ddpm_faces import DDPMFacesObjective, DDPMFacesPipeline, DDPMFacesScheduler, DDPMFacesUNet
from ddpm_faces.data import FaceBatches, load_faces
from ddpm_faces.data.drawn_faces import draw_face
from ddpm_faces.data.draws import draw_step
from ddpm_faces.files import check_writable
from ddpm_faces.models import check_model
from ddpm_faces.training.config import TrainingConfig
from ddpm_faces.training.ema import EMA
from ddpm_faces.training.guard import GradientGuard


ROOT = Path(__file__).parents[1]
NUM_FACES = 16
LONG = 20


@dataclass
class Settings:
    """Options of the command line that the sections share."""

    device: torch.device
    repeats: int
    model: Path
    data: str | None
    quick: bool


# Measuring


def take_turns(cases: Mapping[Any, Callable[[], object]], settings: Settings) -> dict[Any, list[float]]:
    """Measure the seconds of each case `repeats` times, one case after the other in each round.

    The first round is a warm-up. A case that takes longer than LONG seconds needs none, and runs once.
    """
    times: dict[Any, list[float]] = {name: [] for name in cases}
    for round_ in range(settings.repeats + 1):
        for name, run in cases.items():
            if times[name] and times[name][0] > LONG:
                continue
            start = time.perf_counter()
            run()
            if settings.device.type == "cuda":
                torch.cuda.synchronize(settings.device)
            seconds = time.perf_counter() - start
            if round_ > 0 or seconds > LONG:
                times[name].append(seconds)
    return times


def shown(values: Sequence[float], scale: float = 1.0) -> str:
    """Format a median with its range, to three digits."""
    values = sorted(value * scale for value in values)
    digits = max(0, 2 - math.floor(math.log10(max(values[len(values) // 2], 1e-9))))
    low, middle, high = (f"{value:,.{digits}f}" for value in (values[0], statistics.median(values), values[-1]))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a Markdown table, with an empty line after it."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]


def child(*arguments: object) -> dict[str, float]:
    """Run a part of this script in a process of its own, which returns its measurements and its peak memory."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


# Start-up


def start_up(settings: Settings) -> list[str]:
    """Measure how long a new process takes until it can work."""
    ours = f"from ddpm_faces import DDPMFacesPipeline as P; P.from_pretrained({str(settings.model)!r})"
    with tempfile.TemporaryDirectory() as folder:
        DDPMPipeline(UNet2DModel(64, **SMALL), DDPMScheduler()).save_pretrained(folder)
        theirs = f"from diffusers import DDPMPipeline as P; P.from_pretrained({folder!r})"
        command = Path(sys.executable).with_name("ddpm-faces")
        commands = {
            "`python -c pass`": [sys.executable, "-c", "pass"],
            "ddpm-faces: `import ddpm_faces`": [sys.executable, "-c", "import ddpm_faces"],
            "diffusers: `import diffusers`": [sys.executable, "-c", "import diffusers"],
            "ddpm-faces: `ddpm-faces --help`": [str(command), "--help"],
            "ddpm-faces: load a pipeline": [sys.executable, "-c", ours],
            "diffusers: load a pipeline": [sys.executable, "-c", theirs],
        }

        def run(arguments: list[str]) -> Callable[[], object]:
            return lambda: subprocess.run(arguments, capture_output=True, check=True)

        times = take_turns({name: run(arguments) for name, arguments in commands.items()}, settings)
    lines = ["## Start-up", "", "Seconds of a whole process:", ""]
    return lines + table(("", "seconds"), [(name, shown(values)) for name, values in times.items()])


# Training step


@contextmanager
def accelerator_of(dtype: str, device: torch.device) -> Iterator[Accelerator]:
    """Make an accelerator of a precision, which is a setting of the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield Accelerator(mixed_precision="bf16" if dtype == "bf16" else "no", cpu=device.type == "cpu")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def our_step(unet: torch.nn.Module, batch_size: int, size: int, accelerator: Accelerator) -> Callable[[], object]:
    """Make the step of training/train.py."""
    device = accelerator.device
    unet.to(device, memory_format=torch.channels_last)
    objective = DDPMFacesObjective(DDPMFacesScheduler())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    guard, ema = GradientGuard(unet, optimizer), EMA(unet)
    samples = torch.rand(batch_size, 3, size, size, device=device) * 2 - 1
    seen = 0

    def step() -> None:
        nonlocal seen
        draws = draw_step(0, seen, batch_size, slice(batch_size), 300, samples.shape[1:], device)
        losses, _ = objective(unet, samples, None, timesteps=draws.timesteps, noise=draws.noise)
        accelerator.backward(losses.mean())
        is_finite = guard.step(accelerator.clip_grad_norm_(unet.parameters(), 1.0))
        optimizer.zero_grad()
        ema.update(0.999, is_finite)
        seen += batch_size

    return step


def their_step(unet: torch.nn.Module, batch_size: int, size: int, accelerator: Accelerator) -> Callable[[], object]:
    """Make the step of diffusers' examples/unconditional_image_generation/train_unconditional.py."""
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, 500, 100_000)
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(accelerator.device)
    images = torch.rand(batch_size, 3, size, size, device=accelerator.device) * 2 - 1

    def step() -> None:
        noise = torch.randn(images.shape, device=images.device)
        timesteps = torch.randint(0, 1000, (batch_size,), device=images.device)
        with accelerator.accumulate(unet):
            prediction = unet(scheduler.add_noise(images, noise, timesteps), timesteps).sample
            accelerator.backward(F.mse_loss(prediction.float(), noise.float()))
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        ema.step(unet.parameters())

    return step


def lucidrains_step(
    unet: torch.nn.Module, batch_size: int, size: int, accelerator: Accelerator
) -> Callable[[], object]:
    """Make the step of lucidrains' Trainer."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA as TheirEMA

    diffusion = GaussianDiffusion(unet, image_size=size, timesteps=1000).to(accelerator.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    diffusion, optimizer = accelerator.prepare(diffusion, optimizer)
    ema = TheirEMA(diffusion, beta=0.995, update_every=10)
    images = torch.rand(batch_size, 3, size, size, device=accelerator.device)

    def step() -> None:
        with accelerator.autocast():
            loss = diffusion(images)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return step


def training_step(settings: Settings) -> list[str]:
    """Measure whole training steps, with the same network in two trainers and with each one's own."""
    batch_size, size = (2, 32) if settings.quick else (32, 64)
    small, mini = _configuration("drawn32"), _configuration("faces64-mini")
    trained: list[tuple[str, str, Callable, int, Callable[[], torch.nn.Module]]] = [
        ("ddpm-faces", "UNet2DModel", our_step, size, lambda: UNet2DModel(size, **SMALL)),
        ("diffusers", "UNet2DModel", their_step, size, lambda: UNet2DModel(size, **SMALL)),
        ("ddpm-faces", "article64", our_step, size, lambda: DDPMFacesUNet(size)),
        ("ddpm-faces", "faces64-mini", our_step, 64, lambda: DDPMFacesUNet(**mini)),
        ("ddpm-faces", "default", our_step, 32, lambda: DDPMFacesUNet(**small)),
    ]
    note = []
    try:
        from denoising_diffusion_pytorch import Unet
    except ImportError as error:
        note = [f"lucidrains' denoising_diffusion_pytorch is left out, because it cannot be imported: {error}.", ""]
    else:
        trained.append(("lucidrains", "Unet", lucidrains_step, size, lambda: Unet(dim=64, dim_mults=(1, 2, 4, 8))))

    rows, profiles = [], []
    for dtype in DTYPES:
        rate = matmul_rate(DTYPES[dtype], 3, settings.device)
        with accelerator_of(dtype, settings.device) as accelerator:
            steps, flops = {}, {}
            for trainer, network, make_step, side, make in trained:
                flops[trainer, network, side] = forward_flop(make, side)
                steps[trainer, network, side] = make_step(make(), batch_size, side, accelerator)
            for key, seconds in take_turns(steps, settings).items():
                trainer, network, side = key
                speeds = [batch_size / value for value in seconds]
                share = 3 * flops[key] * statistics.median(speeds) / rate
                gflop = f"{flops[key] / 1e9:.2f}"
                rows.append((trainer, network, f"{side}x{side}", gflop, dtype, shown(speeds), f"{share:.0%}"))
                profiles.append((trainer, network, dtype, *_profile(steps[key])))
    return [
        *("## Training step", ""),
        f"Batches of {batch_size}, with the noise, the loss, the gradient, its clipping, the optimizer and the EMA. "
        "GFLOP are those of a forward pass for one image; a step takes three times as many. The share is relative to "
        "the rate at which the machine multiplies matrices of the same dtype.",
        "",
        *table(("trainer", "network", "size", "GFLOP", "dtype", "images/s", "share"), rows),
        *note,
        "What a step spends its time on:",
        "",
        *table(("trainer", "network", "dtype", *PARTS, "other"), profiles),
    ]


# Parts of a training step, by the names of PyTorch's operations.
PARTS = {
    "convolution, forward": r"mkldnn_convolution|_convolution$|cudnn_convolution",
    "convolution, backward": r"convolution_backward",
    "linear": r"addmm|::mm$|::bmm$|linear$",
    "attention": r"scaled_dot_product",
    "normalization": r"(group|batch|layer)_norm",
    "activation": r"silu|relu|threshold|clamp_min|gelu|sigmoid",
    "copy": r"::copy_$|::cat$|::clone$|::contiguous$|_to_copy$",
    "optimizer": r"adam",
}


def _profile(step: Callable[[], object]) -> list[str]:
    """Return the share of each part of a step."""
    step()
    with torch.profiler.profile() as profiler:
        step()
    times = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profiler.key_averages():
        duration = event.self_device_time_total or event.self_cpu_time_total
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, event.key)), "other")
        times[part] += duration
    return [f"{duration / sum(times.values()):.0%}" for duration in times.values()]


def _configuration(name: str) -> dict[str, Any]:
    import yaml

    settings = yaml.safe_load((ROOT / "training" / "configs" / f"{name}.yaml").read_text())
    settings["resolution"] = np.atleast_1d(settings.get("resolution", 32)).tolist()
    return TrainingConfig(**settings).unet_config()


# Sampling


def sampling(settings: Settings) -> list[str]:
    """Measure the seconds to sixteen faces, and their quality, with the same network in every program."""
    pipeline = DDPMFacesPipeline.from_pretrained(settings.model).to(settings.device)
    optimized = DDPMFacesPipeline.from_pretrained(settings.model).to(settings.device).optimize()
    config = dict(pipeline.scheduler.config)
    known = {name: config[name] for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")}
    scheduler = DDPMScheduler(**known, prediction_type=config["prediction_type"])
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    total = 4 if settings.quick else config["num_train_timesteps"]
    theirs = {
        f"diffusers: DDPMPipeline, {total} steps": (scheduler, total),
        "diffusers: DPMSolverMultistepScheduler, 20 steps": (solver, 4 if settings.quick else 20),
    }

    Generate = Callable[[int, int], torch.Tensor]

    def diffusers(scheduler: Any, steps: int) -> Generate:
        their_pipeline = DDPMPipeline(pipeline.unet, scheduler)
        their_pipeline.set_progress_bar_config(disable=True)

        def generate(count: int, seed: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed)
            images = their_pipeline(count, generator, num_inference_steps=steps, output_type="np").images
            return torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)

        return generate

    def ours(our_pipeline: DDPMFacesPipeline, **arguments: Any) -> Generate:
        our_pipeline.set_progress_bar_config(disable=True)

        def generate(count: int, seed: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed)
            images = our_pipeline(count, generator=generator, output_type="pt", **arguments).images
            return (images * 255).round().to("cpu", torch.uint8)

        return generate

    cases = {name: diffusers(*value) for name, value in theirs.items()}
    cases["ddpm-faces: as loaded"] = ours(pipeline)
    fast = {f'ddpm-faces: `optimize()`, `preset="{name}"`': name for name in pipeline.presets if name != "exact"}
    cases |= {name: ours(optimized, preset=preset) for name, preset in fast.items()}
    # The quality is that of the sampler, so the optimized pipeline may sample in place of diffusers'.
    same = {
        name: ours(optimized.with_scheduler(scheduler), num_inference_steps=steps, autoguidance_scale=1)
        for name, (scheduler, steps) in theirs.items()
    }
    same["ddpm-faces: as loaded"] = ours(optimized)
    with torch.inference_mode():
        times = take_turns({name: lambda run=run: run(NUM_FACES, 0) for name, run in cases.items()}, settings)
        measure = _quality_against(settings, pipeline.image_shape[1:])
        qualities = {name: measure(same.get(name, run)) for name, run in cases.items()}
    slowest = statistics.median(next(iter(times.values())))
    rows = [
        (name, shown(values), f"{slowest / statistics.median(values):,.0f}x", *qualities[name])
        for name, values in times.items()
    ]
    quality_columns = ("Fréchet distance", "recall", "faces") if settings.data else ()
    network = f"`{settings.model.name}`"
    lines = [
        *("## Sampling", ""),
        f"Seconds to {NUM_FACES} faces with the network of {network}. Only ddpm-faces uses its guide.",
        "",
        *table(("", "seconds", "speed", *quality_columns), rows),
    ]
    if settings.data:
        lines += ["Quality: 400 samples against 400 held-out faces, with the features of MobileNetV2.", ""]
    lines += _overhead(optimized, settings) + _difference(pipeline, optimized, settings)
    return lines if settings.quick else lines + _compilation(optimized, settings)


def _quality_against(
    settings: Settings, size: tuple[int, int]
) -> Callable[[Callable[[int, int], torch.Tensor]], tuple[str, ...]]:
    """Return a function that measures the quality of generated faces: Fréchet distance, recall, share of faces."""
    from ddpm_faces.data.detection import MTCNN
    from ddpm_faces.evaluation.extractors import MobileNetV2
    from ddpm_faces.evaluation.metrics import frechet_distance, precision_recall

    if settings.data is None:
        return lambda generate: ()
    count, batch_size = (32, 16) if settings.quick else (400, 40)
    extractor, detector = MobileNetV2(settings.device), MTCNN(settings.device)

    def apply(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(part.to(settings.device)).cpu() for part in images.split(50)])

    real = apply(extractor, load_faces(settings.data, split="test", resolution=size, max_images=count).images)

    def measure(generate: Callable[[int, int], torch.Tensor]) -> tuple[str, ...]:
        batches = [generate(min(batch_size, count - first), first) for first in range(0, count, batch_size)]
        faces = torch.cat(batches)
        features = apply(extractor, faces)
        distance, recall = frechet_distance(features, real), precision_recall(features, real)[1]
        return f"{distance:.1f}", f"{recall:.2f}", f"{apply(detector, faces).double().mean():.3f}"

    return measure


def _overhead(pipeline: DDPMFacesPipeline, settings: Settings) -> list[str]:
    """Measure the share of a call that the networks do not take."""
    rows = []
    for batch_size in (1, NUM_FACES):
        inside = 0.0

        def timed(network: torch.nn.Module) -> Callable:
            forward = network.forward

            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                start = time.perf_counter()
                output = forward(*args, **kwargs)
                if settings.device.type == "cuda":
                    torch.cuda.synchronize(settings.device)
                inside += time.perf_counter() - start
                return output

            return run

        networks = [network for network in (pipeline.unet, pipeline.guide, pipeline.student) if network is not None]
        for network in networks:
            network.forward = timed(network)
        shares = []
        for _ in range(settings.repeats + 1):
            inside, start = 0.0, time.perf_counter()
            pipeline(batch_size)
            total = time.perf_counter() - start
            shares.append(1 - inside / total)
        for network in networks:
            del network.forward
        rows.append((f"{batch_size}", shown(shares[1:], 100) + " %"))
    return ["Share of the time that a call spends outside the networks:", "", *table(("batch", "share"), rows)]


def _difference(pipeline: DDPMFacesPipeline, optimized: DDPMFacesPipeline, settings: Settings) -> list[str]:
    """Compare the pixels before and after `optimize()`."""
    count = 4 if settings.quick else 64
    generators = [[torch.Generator().manual_seed(seed) for seed in range(count)] for _ in range(2)]
    before, after = (
        255 * model(count, generator=generator, output_type="pt").images.cpu()
        for model, generator in zip((pipeline, optimized), generators, strict=True)
    )
    difference = (before.round() - after.round()).abs()
    dtype, most = str(optimized.unet.dtype).removeprefix("torch."), np.quantile(difference.numpy(), 0.99)
    return [
        f"`optimize()` (here to {dtype}) changes the pixels of {count} faces, which have values from 0 to 255, by "
        f"{difference.mean():.2f} on average, and 99 % of them by at most {most:.0f}.",
        "",
    ]


def _compilation(optimized: DDPMFacesPipeline, settings: Settings) -> list[str]:
    """Measure what `torch.compile` gives."""
    networks = {name: copy.deepcopy(optimized.unet).eval() for name in ("", "compile()", "compile_repeated_blocks()")}
    sample = torch.randn(NUM_FACES, *optimized.image_shape, device=settings.device, dtype=optimized.unet.dtype)
    first = {}
    with torch.inference_mode():
        for method, network in networks.items():
            if method:
                getattr(network, method.removesuffix("()"))()
            start = time.perf_counter()
            network(sample, 100)
            first[method] = time.perf_counter() - start
        cases = {method: lambda network=network: network(sample, 100) for method, network in networks.items()}
        times = take_turns(cases, settings)
    rows = [
        (f"`unet.{method}`" if method else "not compiled", shown([first[method]]), shown(seconds, 1000))
        for method, seconds in times.items()
    ]
    return [
        f"Compilation of the optimized network: seconds of the first pass for {NUM_FACES} images, and milliseconds of "
        "each further one.",
        "",
        *table(("", "first, s", "further, ms"), rows),
    ]


# Data


def data(settings: Settings) -> list[str]:
    """Measure the time to the first batch, the wait for each batch, and the memory, for growing datasets."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (100, 200) if settings.quick else (1_000, 10_000, 100_000):
            source = Path(folder, f"{count}")
            _write_dataset(source, count)
            ours = [child("data-ours", source, Path(folder, f"cache-{count}-{i // 2}")) for i in range(4)]
            theirs = [child("data-theirs", source, Path(folder, f"their-cache-{count}-{i // 2}")) for i in range(4)]
            for name, runs in (("ddpm-faces", ours), ("diffusers", theirs)):
                first, again = runs[::2], runs[1::2]
                rows.append(
                    (
                        f"{count:,}",
                        name,
                        shown([run["first"] for run in first]),
                        shown([run["first"] for run in again]),
                        shown([run["wait"] for run in runs], 1000),
                        shown([run["memory"] for run in again]),
                    )
                )
            for path in Path(folder).iterdir():
                shutil.rmtree(path)
    return [
        *("## Data", ""),
        "Images of 64x64 in a Parquet file, in batches of 32: seconds to the first batch of the first run and of "
        "later runs, milliseconds of waiting for each further batch, and peak memory of the process in GB. The "
        "transforms of diffusers' script are written with Pillow here, because torchvision is not installed.",
        "",
        *table(("images", "", "first run, s", "later runs, s", "wait, ms", "memory, GB"), rows),
    ]


def _write_dataset(folder: Path, count: int) -> None:
    import io

    import datasets

    encoded = []
    for index in range(min(count, 1000)):
        file = io.BytesIO()
        draw_face(index).save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [encoded[index % len(encoded)] for index in range(count)]}
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "data" / "train-00000-of-00001.parquet")


def child_data_ours(source: str, cache: str) -> dict[str, float]:
    began = time.perf_counter()
    dataset = load_faces(source, resolution=64, cache_dir=cache)
    batches = FaceBatches(dataset, 32, slice(32)).batches()
    return _waits(began, lambda: next(batches)["images"])


def child_data_theirs(source: str, cache: str) -> dict[str, float]:
    import datasets

    began = time.perf_counter()
    dataset = datasets.load_dataset(source, split="train", cache_dir=cache)

    def augmentations(image: Any) -> torch.Tensor:
        scale = 64 / min(image.size)
        image = image.resize([round(side * scale) for side in image.size])
        left, top = (image.width - 64) // 2, (image.height - 64) // 2
        pixels = torch.from_numpy(np.asarray(image.crop((left, top, left + 64, top + 64))).copy()).permute(2, 0, 1)
        pixels = pixels.flip(-1) if torch.rand(()) < 0.5 else pixels
        return pixels / 127.5 - 1

    dataset.set_transform(lambda rows: {"input": [augmentations(image.convert("RGB")) for image in rows["image"]]})
    batches = iter(torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True))
    return _waits(began, lambda: next(batches)["input"])


def _waits(began: float, next_batch: Callable[[], torch.Tensor]) -> dict[str, float]:
    assert next_batch().shape == (32, 3, 64, 64)
    first, waits = time.perf_counter() - began, []
    for _ in range(2):
        start = time.perf_counter()
        next_batch()
        waits.append(time.perf_counter() - start)
    return {"first": first, "wait": statistics.median(waits), "memory": _peak_memory()}


def _peak_memory() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, `ru_maxrss` may be that of the parent process
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    import resource  # missing on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # in bytes on macOS


# Memory and growth


def memory(settings: Settings) -> list[str]:
    """Measure the peak memory of processes that generate or train."""
    batch_sizes, train_batch_size = ((2,), 2) if settings.quick else ((16, 256), 16)
    rows = []
    for batch_size in batch_sizes:
        for program in ("ddpm-faces", "diffusers"):
            used = child("sample", program, settings.model, batch_size)["memory"]
            rows.append((f"generate {batch_size} faces", program, shown([used])))
    for program in ("ddpm-faces", "diffusers"):
        used = child("train", program, train_batch_size)["memory"]
        rows.append((f"train on batches of {train_batch_size} images", program, shown([used])))
    return [
        *("## Memory", ""),
        f"Peak memory of a process in GB, with the network of `{settings.model.name}` in float32 and with "
        "`UNet2DModel` for training:",
        "",
        *table(("", "", "memory, GB"), rows),
    ]


def child_sample(program: str, model: str, batch_size: str) -> dict[str, float]:
    pipeline = DDPMFacesPipeline.from_pretrained(model)
    if program == "ddpm-faces":
        pipeline(int(batch_size), num_inference_steps=2, autoguidance_scale=1)
    else:
        DDPMPipeline(pipeline.unet, DDPMScheduler())(int(batch_size), num_inference_steps=2)
    return {"memory": _peak_memory()}


def child_train(program: str, batch_size: str) -> dict[str, float]:
    make = {"ddpm-faces": our_step, "diffusers": their_step}[program]
    step = make(UNet2DModel(64, **SMALL), int(batch_size), 64, Accelerator(cpu=True))
    for _ in range(2):
        step()
    return {"memory": _peak_memory()}


def growth(settings: Settings) -> list[str]:
    """Measure how times grow with the batch, the size of the images, the steps and the processes."""
    pipeline = DDPMFacesPipeline.from_pretrained(settings.model).to(settings.device).optimize()
    pipeline.set_progress_bar_config(disable=True)
    batches, sizes, steps = (
        ([1, 2], [32, 64], [1, 2])
        if settings.quick
        else (
            [1, 4, 16, 64, 256],
            [32, 64, 128, 256],
            [1, 2, 4, 8, 16, 32],
        )
    )

    def forward(size: int) -> Callable[[], object]:
        sample = torch.randn(4, 3, size, size, device=settings.device)
        return lambda: pipeline.predict(sample, 100)

    with torch.inference_mode():
        curves = {
            "images in a batch (4 steps)": {
                count: lambda count=count: pipeline(count, 4, output_type="pt") for count in batches
            },
            "height and width of 4 images (1 step)": {size: forward(size) for size in sizes},
            "steps (batch of 4)": {count: lambda count=count: pipeline(4, count, output_type="pt") for count in steps},
        }
        measured = {name: take_turns(cases, settings) for name, cases in curves.items()}
    with tempfile.TemporaryDirectory() as folder:
        count = 8 if settings.quick else 256
        program = str(Path(sys.executable).with_name("ddpm-faces"))
        command = [program, "generate", str(settings.model), "-n", f"{count}"]
        launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--main_process_port", "0"]
        # `--multi_gpu` starts several processes on CPUs too, whereas `--cpu` always starts one.
        environment = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if settings.device.type == "cpu" else {})}
        places = iter(range(1000))

        def generate(processes: int) -> Callable[[], object]:
            def run() -> None:
                start = [*launcher, *(["--multi_gpu"] if processes > 1 else [])]
                start += ["--num_processes", f"{processes}", *command, "--format", "png", "--shard-size", "32"]
                start += ["--output", str(Path(folder, f"{next(places)}"))]
                subprocess.run(start, env=environment, capture_output=True, check=True)

            return run

        cases = {1: generate(1), 2: generate(2)}
        measured[f"processes for {count} faces"] = take_turns(cases, settings)
    _plot(measured, settings)
    rows = [(name, f"{value}", shown(seconds)) for name, curve in measured.items() for value, seconds in curve.items()]
    return [
        *("## Growth", ""),
        f"Seconds with `{settings.model.name}` after `optimize()`:",
        "",
        *table(("", "", "seconds"), rows),
        "![Growth of the time](../images/benchmark_growth.png)",
        "",
    ]


def _plot(measured: Mapping[str, Mapping[int, Sequence[float]]], settings: Settings) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {name: curve for name, curve in measured.items() if len(curve) > 2 or settings.quick}
    fig, axes = plt.subplots(1, len(curves), figsize=(3 * len(curves), 2.6))
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        x, y = list(curve), [statistics.median(seconds) for seconds in curve.values()]
        axis.plot(x, y, marker="o", markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(x, [f"{value}" for value in x])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_ylim(10 ** math.floor(math.log10(min(y))), 10 ** math.ceil(math.log10(max(y))))
        axis.set_xlabel(name, fontsize=8)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("seconds")
    fig.tight_layout()
    fig.savefig(_image_folder(settings) / "benchmark_growth.png", dpi=120)
    plt.close(fig)


def _image_folder(settings: Settings) -> Path:
    return Path(tempfile.mkdtemp()) if settings.quick else ROOT / "docs" / "images"


# Command line

SECTIONS = {
    "start-up": start_up,
    "training": training_step,
    "sampling": sampling,
    "data": data,
    "memory": memory,
    "growth": growth,
}
CHILDREN = {
    "data-ours": child_data_ours,
    "data-theirs": child_data_theirs,
    "sample": child_sample,
    "train": child_train,
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "faces64", help="folder of a model")
    parser.add_argument("--data", help="dataset of real faces with a split `test`, for the quality of the samples")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="Markdown file to write in addition")
    parser.add_argument("--quick", action="store_true", help="try everything with small numbers")
    return parser.parse_args()


def main() -> None:
    """Run the sections, and print the page as it grows."""
    args = parse_args()
    if args.repeats < 1:
        raise SystemExit(f"error: `repeats` must be at least 1, got {args.repeats}.")
    check_model(args.model)
    if args.data is not None:
        load_faces(args.data, split="test", resolution=64, max_images=1)
    if args.output is not None:
        check_writable(args.output.parent)
    settings = Settings(args.device, 1 if args.quick else args.repeats, args.model.resolve(), args.data, args.quick)
    lines = [
        "# Benchmarks",
        "",
        "This page compares the speed of ddpm-faces with that of diffusers' `train_unconditional.py` and pipelines. "
        "One command measures everything, and the programs take turns. Each number is a median, with the smallest and "
        f"the largest value in parentheses. Whatever takes longer than {LONG} seconds runs once.",
        "",
        f"```bash\npython {shlex.join(sys.argv)}\n```",
        "",
        f"{describe(args.device)}.",
        "",
    ]
    print("\n".join(lines), flush=True)
    for name in args.sections:
        section = SECTIONS[name](settings)
        print("\n".join(section), flush=True)
        lines += section
        if args.output is not None:
            args.output.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
