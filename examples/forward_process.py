"""Draw the forward process: a face with increasing noise, as the network sees it in training.

$ python examples/forward_process.py --output forward_process.png
$ python examples/forward_process.py --image portrait.jpg
"""

import argparse

import torch
from PIL import Image

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DrawnFaces
from ddpm_faces.data import picture_to_tensor, to_samples
from ddpm_faces.plots import labelled_strip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", help="image of a face (default: a drawn face)")
    parser.add_argument("--resolution", type=int, default=64, help="side of the images in pixels (default: 64)")
    parser.add_argument("--num_pictures", type=int, default=10, help="number of timesteps to show (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and the drawn face (default: 0)")
    parser.add_argument("--output", default="forward_process.png", help="PNG file to write")
    args = parser.parse_args()

    scheduler = DDPMFacesScheduler()
    face = Image.open(args.image) if args.image else DrawnFaces(resolution=args.resolution)[args.seed]["image"]
    x_0 = to_samples(picture_to_tensor(face, (args.resolution, args.resolution)))[None]

    # The same face and noise at all timesteps in one batch: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise
    timesteps = torch.linspace(0, len(scheduler) - 1, args.num_pictures).long()
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(args.seed))
    x_t = scheduler.add_noise(
        x_0.expand(args.num_pictures, -1, -1, -1), noise.expand(args.num_pictures, -1, -1, -1), timesteps
    )

    labelled_strip([DDPMFacesPipeline.postprocess(x_t)], [f"t = {t}" for t in timesteps], args.output)
    print(args.output)


if __name__ == "__main__":
    main()
