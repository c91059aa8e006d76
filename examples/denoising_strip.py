"""Draw the article's strip of ten images from noise to face, for one or more faces.

$ python examples/denoising_strip.py demo --num_images 3 --output denoising_strip.png
"""

import argparse

import torch

from ddpm_faces import DDPMFacesPipeline
from ddpm_faces.plots import labelled_strip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model to use: a folder, or a repository on the Hub")
    parser.add_argument("--num_images", type=int, default=1, help="number of faces (default: 1)")
    parser.add_argument("--num_pictures", type=int, default=10, help="images per face (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first face; face i uses seed + i")
    parser.add_argument("--output", default="denoising_strip.png", help="PNG file to write")
    args = parser.parse_args()

    pipeline = DDPMFacesPipeline.from_pretrained(args.model)
    num_steps = pipeline.scheduler.config.num_train_timesteps
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_images)]

    # The callback sees the latents after each step. Keep those of evenly spaced steps, including the last.
    kept_steps = torch.linspace(0, num_steps - 1, args.num_pictures).long().tolist()
    strip, labels = [], []

    def keep(pipeline: DDPMFacesPipeline, step: int, timestep: int, tensors: dict) -> dict:
        if step in kept_steps:
            strip.append(pipeline.postprocess(tensors["latents"]))
            labels.append(f"t = {int(timestep)}")
        return tensors

    pipeline(args.num_images, generator=generators, callback_on_step_end=keep)

    labelled_strip(list(zip(*strip, strict=True)), labels, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
