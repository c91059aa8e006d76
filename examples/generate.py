"""Generate faces from a trained model.

$ python examples/generate.py models/faces64 --num_images 16 --num_inference_steps 10 --epsilon_scaling 1.003
"""

import argparse

import torch

from ddpm_faces import DDPMFacesPipeline, fast_solver
from ddpm_faces.plots import image_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model to use: a folder, or a repository on the Hub")
    parser.add_argument("--num_images", type=int, default=16, help="number of faces (default: 16)")
    parser.add_argument(
        "--num_inference_steps",
        type=int,
        default=None,
        help="steps of the fast solver (default: all timesteps, without the fast solver)",
    )
    parser.add_argument(
        "--sigma_min",
        type=float,
        default=None,
        help="noise-to-signal ratio at the last step; 0.1 suits short training runs",
    )
    parser.add_argument(
        "--epsilon_scaling", type=float, default=None, help="divisor of the predicted noise in these steps"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first face; face i uses seed + i")
    parser.add_argument("--output", default="faces.png", help="PNG file to write")
    args = parser.parse_args()
    for name in ("sigma_min", "epsilon_scaling"):
        if getattr(args, name) is not None and args.num_inference_steps is None:
            parser.error(f"--{name} needs --num_inference_steps")

    pipeline = DDPMFacesPipeline.from_pretrained(args.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    if args.num_inference_steps is not None:
        pipeline.scheduler = fast_solver(pipeline.scheduler, args.sigma_min, args.epsilon_scaling)
    # Each image has its own generator, so face i does not depend on the number of images.
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_images)]
    num_classes = pipeline.unet.config.get("num_class_embeds")
    class_labels = None if num_classes is None else [i % num_classes for i in range(args.num_images)]
    images = pipeline(args.num_images, args.num_inference_steps, generators, class_labels=class_labels).images

    image_grid(images, scale=max(1, 128 // images[0].width)).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
