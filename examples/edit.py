"""Change one attribute of a face and keep the rest.

$ python examples/edit.py my-prompt-model "a smiling woman" "an old woman" --source_prompt "a woman"
$ python examples/edit.py my-prompt-model "a man with glasses" --source_prompt "a man" --image me.png you.png

In the first row are the faces: pictures, or generated ones of the source prompt. Each further row shows them changed
towards a prompt.
"""

import argparse

import torch
from PIL import Image

from ddpm_faces import DDPMFacesEditPipeline, DDPMFacesPipeline
from ddpm_faces.plots import labelled_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model with a text encoder: a folder, or a repository on the Hub")
    parser.add_argument("prompts", nargs="+", help="what the faces should show")
    parser.add_argument("--source_prompt", required=True, help="what they show now")
    parser.add_argument("--image", nargs="+", help="pictures of faces (default: generated faces)")
    parser.add_argument("--num_images", type=int, default=6, help="generated faces (default: 6)")
    parser.add_argument("--strength", type=float, default=0.9, help="how much may change, up to 1 (default: 0.9)")
    parser.add_argument("--guidance_scale", type=float, default=None, help="default: that of the model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first face; face i uses seed + i")
    parser.add_argument("--output", default="edited.png", help="PNG file to write")
    args = parser.parse_args()

    pipeline = DDPMFacesPipeline.from_pretrained(args.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    edit = DDPMFacesEditPipeline.from_pipe(pipeline)
    channels, height, width = pipeline.image_shape

    if args.image is None:
        generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_images)]
        faces = pipeline(args.source_prompt, num_images_per_prompt=args.num_images, generator=generators).images
    else:
        mode = "RGB" if channels == 3 else "L"
        faces = [Image.open(path).convert(mode).resize((width, height)) for path in args.image]
    rows = [faces]
    for prompt in args.prompts:
        arguments = {"strength": args.strength, "guidance_scale": args.guidance_scale}
        rows.append(edit(faces, prompt, args.source_prompt, **arguments).images)

    labels = [args.source_prompt, *args.prompts]
    labelled_rows(rows, labels, scale=max(1, 128 // width)).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
