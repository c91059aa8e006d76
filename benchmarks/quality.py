"""How far the samples of models are from real faces, beside how far other real faces are.

Sample i of each model comes from a generator of seed i. The figures are those of `ddpm_faces.metrics`: no FID, to be
compared within a table only. The first row, real faces against real faces, is what a perfect model could reach.
"""

import argparse
import shlex
import sys

import numpy as np
import torch

from ddpm_faces import DDPMFacesPipeline
from ddpm_faces.data import load_faces
from ddpm_faces.extractors import EfficientNetLite0
from ddpm_faces.metrics import evaluate_samples


COLUMNS = ("pictures", "steps", "kernel distance x1000", "Fréchet distance", "mean (R, G, B)", "deviation (R, G, B)")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders of pipelines, all of one picture size")
    parser.add_argument("--dataset_name", help="real faces; default: drawn ones")
    parser.add_argument("--split", default="test", help="split of the reference")
    parser.add_argument(
        "--other_split", default="train", help="split of the real faces that stand for a perfect model"
    )
    parser.add_argument("--num_images", type=int, default=400, help="on each side")
    parser.add_argument("--num_inference_steps", type=int, default=None, help="default: all that were trained")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def generate(pipeline: DDPMFacesPipeline, args: argparse.Namespace) -> torch.Tensor:
    """`num_images` samples, `torch.uint8`, of shape `(num_images, channels, height, width)`."""
    batches = []
    for seeds in torch.arange(args.num_images).split(args.batch_size):
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        images = pipeline(len(seeds), args.num_inference_steps, generators, output_type="np").images
        batches.append(torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2))
    return torch.cat(batches)


def main() -> None:
    """Print the table, a row per model, as it grows."""
    args = parse_args()
    pipelines = [DDPMFacesPipeline.from_pretrained(model, dtype=getattr(torch, args.dtype)) for model in args.models]
    sizes = {pipeline.unet.config.sample_size for pipeline in pipelines} or {64}
    if len(sizes) > 1:
        raise ValueError(f"`models` must be of one picture size, got {sorted(sizes)}.")
    source = {"dataset_name": args.dataset_name, "resolution": sizes.pop()}
    if args.dataset_name is None:  # faces that the default configuration does not train on
        drawn = load_faces(**source, num_drawn_images=4096 + 2 * args.num_images).images[4096:]
        reference, others = drawn.split(args.num_images)
    else:
        reference, others = (
            load_faces(**source, split=split, max_images=args.num_images).images
            for split in (args.split, args.other_split)
        )
    extractor = EfficientNetLite0(args.device)

    print(f"`python {shlex.join(sys.argv)}`, {extractor.name}, {extractor.resize}\n")
    print("| model | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))

    def write(name: str, steps: int | str, images: torch.Tensor) -> None:
        figures = evaluate_samples(images, reference, extractor)
        channels = (figures["channels"][what] for what in ("mean", "deviation"))
        print(
            f"| {name} | {figures['num_images']} | {steps} "
            f"| {figures['kernel_distance_x1000']:.1f} ± {figures['kernel_distance_x1000_error']:.1f} "
            f"| {figures['frechet_distance']:.1f} | "
            + " | ".join(", ".join(f"{value:.2f}" for value in values) for values in channels)
            + " |",
            flush=True,
        )

    write("other real faces", "", others)
    for model, pipeline in zip(args.models, pipelines, strict=True):
        pipeline.to(args.device)
        steps = args.num_inference_steps or pipeline.scheduler.config.num_train_timesteps
        write(model, steps, generate(pipeline, args))


if __name__ == "__main__":
    main()
