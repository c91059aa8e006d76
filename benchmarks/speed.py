"""Measure images per second in training and sampling, and compare them with diffusers' UNet2DModel.

Every number is a median of repetitions after a warm-up. A multiply-add counts as 2 FLOP, and a training step as
three forward passes. Shares are relative to the rate at which the machine multiplies large square matrices in the same
dtype, measured in the same run.
"""

import argparse
import gc
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_faces import DDPMFacesUNet
from ddpm_faces.training.config import TrainingConfig


# diffusers' examples/unconditional_image_generation/train_unconditional.py: 113.7 million parameters
USUAL = {
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    "layers_per_block": 2,
}
# Close to the article's network in FLOP: 20.8 million parameters
SMALL = {
    "block_out_channels": (64, 128, 192, 256),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
}
COLUMNS = (
    *("network", "M parameters", "size", "GFLOP/image", "dtype", "batch", "train images/s", "train share"),
    *("forward images/s", "forward share", "finished images/s ({steps} steps)"),
)
MIN_SECONDS = 0.5
MAX_SECONDS = 12
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_networks(resolution: int) -> dict[str, tuple[Callable[[], torch.nn.Module], int]]:
    """Return the networks to compare, each as a function that makes it and the side of its images."""
    ours = TrainingConfig().unet_config()
    return {
        "article": (lambda: DDPMFacesUNet(sample_size=resolution), resolution),
        "default": (lambda: DDPMFacesUNet(**ours), ours["sample_size"]),
        "UNet2DModel, small": (lambda: UNet2DModel(sample_size=resolution, **SMALL), resolution),
        "UNet2DModel, usual": (lambda: UNet2DModel(sample_size=resolution, **USUAL), resolution),
    }


def seconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median duration of a call over `repeats` repetitions, or fewer if they exceed MAX_SECONDS."""

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    warm_up = run(1)
    # A repetition consists of many calls if they are short, to average out timer noise and fill the GPU's queue.
    calls = 1 if warm_up > MIN_SECONDS else 1 + int(MIN_SECONDS / run(1))
    durations: list[float] = []
    while not durations or (len(durations) < repeats and sum(durations) < MAX_SECONDS):
        durations.append(run(calls))
    return statistics.median(durations) / calls


def matmul_rate(dtype: torch.dtype, repeats: int, device: torch.device) -> float:
    """Measure the FLOP per second of a large square matrix multiplication."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, repeats, device)


def forward_flop(make: Callable[[], torch.nn.Module], size: int) -> int:
    """Count the FLOP of one image, on the meta device because the counter misses the fused attention of the CPU."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        make()(torch.empty(1, 3, size, size), torch.zeros(1))
    return counter.get_total_flops()


def measure(
    unet: torch.nn.Module, size: int, batch_size: int, dtype: str, args: argparse.Namespace
) -> tuple[float, float]:
    """Measure images per second of a training step (forward, backward, AdamW) and of the forward pass alone."""
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    unet = unet.to(args.device, memory_format=memory_format)
    sample, target = (torch.randn(batch_size, 3, size, size, device=args.device) for _ in range(2))
    sample = sample.to(memory_format=memory_format)
    timesteps = torch.randint(300, (batch_size,), device=args.device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)

    def autocast():
        return nullcontext() if dtype == "fp32" else torch.autocast(args.device.type, DTYPES[dtype])

    def train_step() -> None:
        with autocast():
            prediction = unet(sample, timesteps).sample
        torch.nn.functional.mse_loss(prediction.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def evaluate() -> None:
        with autocast():
            unet(sample, timesteps)

    unet.train()
    train = batch_size / seconds(train_step, args.repeats, args.device)
    optimizer.zero_grad()
    unet.eval()
    return train, batch_size / seconds(evaluate, args.repeats, args.device)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--resolution", type=int, default=64, help="side of the images in pixels; the default network has 32"
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="precision; bf16 uses autocast"
    )
    parser.add_argument("--networks", nargs="+", choices=make_networks(64), help="networks to measure (default: all)")
    parser.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=50, help="network evaluations per finished image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Markdown file to write in addition")
    return parser.parse_args()


def describe(device: torch.device) -> str:
    """Describe the machine in one line."""
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)} (TF32 in fp32)"
    else:
        flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
        names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
        best = next((f" with {name}" for flag, name in names.items() if flag in flags), "")
        where = f"{os.cpu_count()} CPU cores ({platform.machine()}{best}), {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}"


def main() -> None:
    """Measure every network in every dtype and batch size, and print the table as it grows."""
    args = parse_args()
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def write(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if args.output is not None:
            args.output.write_text("\n".join(lines) + "\n")

    # 1. Machine
    if args.device.type == "cuda":
        # fp32 convolutions use TF32 on GPUs by default, so the matrix multiplication must use it, too.
        torch.set_float32_matmul_precision("high")
    layout = "channels_last" if args.channels_last else "contiguous"
    write(f"{describe(args.device)}, {layout}: `python {shlex.join(sys.argv)}`\n")
    rates = {dtype: matmul_rate(DTYPES[dtype], args.repeats, args.device) for dtype in args.dtypes}
    write("Matrix multiplication: " + ", ".join(f"{r / 1e9:,.0f} GFLOP/s {d}" for d, r in rates.items()) + "\n")

    # 2. Networks
    write("| " + " | ".join(COLUMNS).format(steps=args.steps) + " |")
    write("|" + "---|" * len(COLUMNS))
    for name, (make, size) in make_networks(args.resolution).items():
        if args.networks is not None and name not in args.networks:
            continue
        flop = forward_flop(make, size)
        unet = make()
        million = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
        for dtype in args.dtypes:
            for batch_size in args.batch_sizes:
                train, forward = measure(unet, size, batch_size, dtype, args)
                row = [name, f"{million:.1f}", f"{size}x{size}", f"{flop / 1e9:.2f}", dtype, f"{batch_size}"]
                row += [f"{train:.2f}", f"{3 * flop * train / rates[dtype]:.0%}"]
                row += [f"{forward:.2f}", f"{flop * forward / rates[dtype]:.0%}", f"{forward / args.steps:.3f}"]
                write("| " + " | ".join(row) + " |")
        del unet
        gc.collect()


if __name__ == "__main__":
    main()
