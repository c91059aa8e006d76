"""Damage a face in several ways and restore it: several answers, their mean, and their spread.

$ python examples/restore.py models/faces64-mini
$ python examples/restore.py models/faces64-mini --image my-face.png --noise_level 0.1

In each row are the damaged face, the answers, their mean, which has the smallest error, and their spread, which is
bright where the answers differ.
"""

import argparse

import torch
from PIL import Image

from ddpm_faces import DDPMFacesPipeline, DDPMFacesRestorePipeline, Downsample, GaussianBlur, Gray, Inpaint
from ddpm_faces.plots import labelled_rows


BRIGHTNESS = 4  # of the spread: a standard deviation of a quarter of the range is white


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, or a repository on the Hub")
    parser.add_argument("--image", help="picture of a face, as the model makes them (default: a generated face)")
    parser.add_argument("--noise_level", type=float, default=0.0, help="standard deviation of noise (default: 0)")
    parser.add_argument("--num_images", type=int, default=4, help="answers (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the face and of the answers")
    parser.add_argument("--output", default="restored.png", help="PNG file to write")
    args = parser.parse_args()

    pipeline = DDPMFacesPipeline.from_pretrained(args.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    restore = DDPMFacesRestorePipeline.from_pipe(pipeline)
    shape = channels, height, width = pipeline.image_shape

    # 1. A face, as a tensor in [-1, 1]
    if args.image is None:
        face = pipeline(generator=torch.Generator().manual_seed(args.seed), output_type="latent").images
    else:
        image = Image.open(args.image).convert("RGB" if channels == 3 else "L").resize((width, height))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        face = (pixels.view(1, height, width, channels).permute(0, 3, 1, 2) / 127.5 - 1).to(pipeline.device)

    # 2. What happens to it
    middle = torch.zeros(height, width)
    middle[height // 4 : height // 2, width // 5 : -width // 5] = 1
    random = torch.rand(height, width, generator=torch.Generator().manual_seed(args.seed)) < 0.7
    operators = {
        "the eyes are missing": Inpaint(middle, channels),
        "70% of the pixels are missing": Inpaint(random, channels),
        "four times smaller": Downsample(4, shape),
        "blurred": GaussianBlur(1.5, shape),
    }
    if channels == 3:
        operators["gray"] = Gray(shape)

    # 3. Restorations
    rows = []
    for operator in operators.values():
        observed = operator(face)
        noise = torch.randn(observed.shape, generator=torch.Generator().manual_seed(args.seed + 1)).to(observed)
        observed = observed + args.noise_level * noise
        generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_images)]
        answers = restore(
            observed,
            operator,
            args.noise_level,
            num_images_per_prompt=args.num_images,
            generator=generators,
            output_type="latent",
        ).images
        damaged = (
            observed.expand_as(face) if observed.shape[2:] == face.shape[2:] else operator.pseudo_inverse(observed)
        )
        spread = BRIGHTNESS * answers.std(dim=0, correction=0).mean(dim=0).expand_as(face) - 1
        shown = torch.cat([damaged, answers, answers.mean(dim=0, keepdim=True), spread])
        rows.append(restore.postprocess(shown))

    labelled_rows(rows, list(operators), scale=max(1, 128 // width)).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
