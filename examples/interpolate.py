"""Draw the way from one face to another.

$ python examples/interpolate.py models/faces64-mini
$ python examples/interpolate.py models/faces64-mini --image me.png you.png

Each row leads from one picture to the next one, or from one generated face to another. Inversion finds the noise that
leads to the two faces; the images between them come from noise between the two.
"""

import argparse
from itertools import pairwise

import torch
from PIL import Image

from ddpm_faces import DDPMFacesEditPipeline, DDPMFacesPipeline
from ddpm_faces.plots import image_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model, or a repository on the Hub")
    parser.add_argument("--image", nargs="+", help="two or more pictures of faces (default: generated faces)")
    parser.add_argument("--num_rows", type=int, default=3, help="rows, for generated faces (default: 3)")
    parser.add_argument("--num_images", type=int, default=8, help="images in a row (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first face; face i uses seed + i")
    parser.add_argument("--output", default="interpolated.png", help="PNG file to write")
    args = parser.parse_args()
    if args.image is not None and len(args.image) < 2:
        parser.error("--image must name two or more pictures")

    pipeline = DDPMFacesPipeline.from_pretrained(args.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    edit = DDPMFacesEditPipeline.from_pipe(pipeline)
    channels, height, width = pipeline.image_shape

    if args.image is None:
        generators = [torch.Generator().manual_seed(args.seed + i) for i in range(2 * args.num_rows)]
        faces = pipeline(len(generators), generator=generators).images
        pairs = list(zip(faces[::2], faces[1::2], strict=True))
    else:
        mode = "RGB" if channels == 3 else "L"
        faces = [Image.open(path).convert(mode).resize((width, height)) for path in args.image]
        pairs = list(pairwise(faces))

    images = []
    for pair in pairs:
        start, end = edit.invert(list(pair))
        weights = torch.linspace(0, 1, args.num_images).view(-1, 1, 1, 1).to(start.device)
        mixed = torch.lerp(start, end, weights)
        # Mixed noise is weaker: scale it to the norm between those of its two ends.
        norms = torch.lerp(start.norm(), end.norm(), weights)
        mixed *= norms / mixed.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        images += edit.reconstruct(mixed).images

    image_grid(images, columns=args.num_images, scale=max(1, 128 // width)).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
