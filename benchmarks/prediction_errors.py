"""Measure the errors of predicted faces, which restoration must know, at several noise levels.

    python benchmarks/prediction_errors.py models/faces64-mini --data my-faces

The table shows the precision (1 / variance) of the errors of smooth to rough patterns (cosines, sorted by their
eigenvalue of the negative Laplacian), and in brackets the one that restoration assumes:
1 / sigma^2 + smoothness * eigenvalue. The last column shows how correlated the errors of two channels are.
"""

import argparse
import math

import numpy as np
import torch
from scipy.fft import dctn

from ddpm_faces import DDPMFacesRestorePipeline
from ddpm_faces.data import load_faces
from ddpm_faces.restoration_ddpm_faces import SMOOTHNESS


SIGMAS = (0.1, 0.3, 1.0, 3.0, 10.0)
EDGES = (0.0, 0.02, 0.1, 0.5, 2.0, 8.0)  # of the eigenvalues, the largest of which is nearly 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, or its name on the Hub")
    parser.add_argument("--data", required=True, help="dataset of faces")
    parser.add_argument("--split", default="test", help="held-out faces")
    parser.add_argument("--num-images", type=int, default=100, help="faces")
    arguments = parser.parse_args()

    pipeline = DDPMFacesRestorePipeline.from_pretrained(arguments.model).optimize()
    _, height, width = pipeline.image_shape
    images = load_faces(arguments.data, resolution=(height, width), split=arguments.split).images
    faces = images[: arguments.num_images].float() / 127.5 - 1
    noise = torch.randn(faces.shape, generator=torch.Generator().manual_seed(0))
    rows, columns = (2 - 2 * np.cos(np.pi * np.arange(size) / size) for size in (height, width))
    eigenvalues = rows[:, None] + columns
    bars = pipeline.scheduler.alphas_cumprod
    ratios = ((1 - bars) / bars).sqrt()

    header = ["sigma", *(f"{low:g} to {high:g}" for low, high in zip(EDGES[:-1], EDGES[1:], strict=True)), "channels"]
    print(f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", sep="\n")
    for wanted in SIGMAS:
        t = int((ratios - wanted).abs().argmin())
        sigma = float(ratios[t])
        sample = (faces + sigma * noise) / math.hypot(1, sigma)
        with torch.no_grad():
            output = pipeline.predict(sample, t)[:, : faces.shape[1]]
        errors = (pipeline.scheduler.predict_original_sample(output, t, sample) - faces).double().numpy()
        powers = (dctn(errors, axes=(-2, -1), norm="ortho") ** 2).mean(axis=(0, 1))
        cells = [f"{sigma:.2f}"]
        for low, high in zip(EDGES[:-1], EDGES[1:], strict=True):
            within = (low <= eigenvalues) & (eigenvalues < high)
            assumed = 1 / sigma**2 + (SMOOTHNESS[0] + SMOOTHNESS[1] / sigma) * eigenvalues[within]
            cells.append(f"{1 / powers[within].mean():.3g} ({1 / (1 / assumed).mean():.3g})")
        correlation = np.corrcoef(errors.transpose(1, 0, 2, 3).reshape(errors.shape[1], -1))
        cells.append(f"{correlation[np.triu_indices(len(correlation), 1)].mean():.2f}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
