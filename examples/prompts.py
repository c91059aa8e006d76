"""Draw a row of faces for each prompt: the same noise with another prompt, or a walk from one prompt to the next.

$ python examples/prompts.py my-prompt-model "a smiling woman" "a smiling woman with glasses" --num_images 8
$ python examples/prompts.py my-prompt-model "a young man" "an older man" --walk
"""

import argparse

import torch

from ddpm_faces import DDPMFacesPipeline
from ddpm_faces.plots import labelled_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model with a text encoder: a folder, or a repository on the Hub")
    parser.add_argument("prompts", nargs="+", help="what the faces should show")
    parser.add_argument("--num_images", type=int, default=8, help="faces in a row (default: 8)")
    parser.add_argument("--walk", action="store_true", help="walk from each prompt to the next with one noise")
    parser.add_argument("--guidance_scale", type=float, default=None, help="default: that of the model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first face; face i uses seed + i")
    parser.add_argument("--output", default="prompts.png", help="PNG file to write")
    args = parser.parse_args()
    if args.walk and len(args.prompts) < 2:
        parser.error("--walk needs at least two prompts.")

    pipeline = DDPMFacesPipeline.from_pretrained(args.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    def faces(prompt_embeds: torch.Tensor, seeds: list[int]) -> list:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(prompt_embeds=prompt_embeds, generator=generators, guidance_scale=args.guidance_scale).images

    embeds = pipeline.encode_prompt(args.prompts)  # (num_prompts, text_embed_dim)
    if args.walk:
        fractions = torch.linspace(0, 1, args.num_images)
        labels = [f"{first} → {last}" for first, last in zip(args.prompts, args.prompts[1:], strict=False)]
        rows = [
            faces(torch.stack([first.lerp(last, fraction) for fraction in fractions]), [args.seed] * args.num_images)
            for first, last in zip(embeds, embeds[1:], strict=False)
        ]
    else:
        seeds = list(range(args.seed, args.seed + args.num_images))
        labels = args.prompts
        rows = [faces(embed.expand(args.num_images, -1), seeds) for embed in embeds]

    labelled_rows(rows, labels, scale=max(1, 96 // rows[0][0].width)).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
