"""Generate faces from a trained model.

$ python examples/generate.py models/faces64 --num_images 16 --num_inference_steps 10
"""

import argparse

import torch

from ddpm_faces import DDPMFacesPipeline
from ddpm_faces.plots import image_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model to use: a folder, or a repository on the Hub")
    parser.add_argument("--num_images", type=int, default=16, help="number of faces (default: 16)")
    parser.add_argument("--preset", default=None, help="preset of the model, such as fast or exact")
    parser.add_argument(
        "--num_inference_steps", type=int, default=None, help="steps to take (default: those of the preset)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first face; face i uses seed + i")
    parser.add_argument("--output", default="faces.png", help="PNG file to write")
    args = parser.parse_args()

    pipeline = DDPMFacesPipeline.from_pretrained(args.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    # Each image has its own generator, so face i does not depend on the number of images.
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_images)]
    num_classes = pipeline.unet.config.get("num_class_embeds")
    class_labels = None if num_classes is None else [i % num_classes for i in range(args.num_images)]
    images = pipeline(
        args.num_images, args.num_inference_steps, generators, class_labels=class_labels, preset=args.preset
    ).images

    image_grid(images, scale=max(1, 128 // images[0].width)).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
