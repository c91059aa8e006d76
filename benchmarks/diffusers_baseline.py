"""Train diffusers' UNet2DModel with its usual recipe, as a baseline.

The recipe and its defaults come from diffusers' examples/unconditional_image_generation/train_unconditional.py:
T = 1000, linear betas, noise prediction, AdamW (0.95, 0.999) with weight decay 1e-6, learning rate 1e-4 with 500
steps of warm-up and a cosine to 0, gradients clipped to 1, mirrored images, and an EMA of the weights that warms
up with power 3/4. The network is smaller than the example's: it has about as many GFLOP as the article's.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, EMAModel, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from speed import SMALL

from ddpm_faces.data import load_faces, to_samples


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", help="dataset of faces (default: drawn faces)")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--block_out_channels", type=int, nargs=4, default=SMALL["block_out_channels"])
    parser.add_argument("--max_train_images", type=int, default=300_000)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="run the network under bf16 autocast")
    return parser.parse_args()


def main() -> None:
    """Train, and save a `DDPMPipeline` with the EMA weights."""
    args = parse_args()
    torch.manual_seed(args.seed)
    images = load_faces(dataset_name=args.dataset_name, resolution=args.resolution).images
    unet = UNet2DModel(sample_size=args.resolution, **{**SMALL, "block_out_channels": tuple(args.block_out_channels)})
    unet.to(args.device)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    num_steps = args.max_train_images // args.train_batch_size
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, min(500, num_steps // 10), num_steps)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    order = torch.empty(0, dtype=torch.int64)
    began, losses = time.perf_counter(), []
    for step in range(num_steps):
        if len(order) < args.train_batch_size:
            order = torch.randperm(len(images))
        indices, order = order[: args.train_batch_size], order[args.train_batch_size :]
        flips = torch.rand(len(indices)) < 0.5
        samples = to_samples(images[indices].to(args.device), flips.to(args.device))
        noise = torch.randn_like(samples)
        timesteps = torch.randint(1000, (len(samples),), device=args.device)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            prediction = unet(scheduler.add_noise(samples, noise, timesteps), timesteps).sample
        loss = F.mse_loss(prediction.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        losses.append(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            seconds, seen = time.perf_counter() - began, (step + 1) * args.train_batch_size
            loss = torch.stack(losses[-100:]).mean().item()
            print(json.dumps({"images_seen": seen, "seconds": round(seconds, 1), "loss": round(loss, 5)}), flush=True)

    ema.copy_to(unet.parameters())
    DDPMPipeline(unet, scheduler).save_pretrained(args.output_dir)
    summary = {"images_seen": num_steps * args.train_batch_size, "seconds": round(time.perf_counter() - began, 1)}
    Path(args.output_dir, "training_summary.json").write_text(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
