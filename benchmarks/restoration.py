"""Compare restoration with classical methods, RePaint and DPS, on held-out faces.

$ pip install scikit-image
$ python benchmarks/restoration.py models/faces64 user/my-faces --output restoration.json

For each task, noise and number of evaluations of the network, it measures the peak signal-to-noise ratio (PSNR), the
structural similarity (SSIM), the Fréchet distance to the same faces undamaged, and the seconds; also how often the true
pixel is where 20 restorations say that it is. `--pictures FOLDER` draws rows of faces: the truth, the observation, and
each method.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.metrics import structural_similarity
from skimage.restoration import inpaint_biharmonic

from ddpm_faces import DDPMFacesRestorePipeline, Downsample, GaussianBlur, Gray, Inpaint
from ddpm_faces.data import load_faces
from ddpm_faces.evaluation.extractors import MobileNetV2
from ddpm_faces.evaluation.metrics import frechet_distance
from ddpm_faces.operators_ddpm_faces import SpectralOperator
from ddpm_faces.plots import image_grid


NOISES = (0.0, 0.05)


def tasks(size: int) -> dict[str, SpectralOperator]:
    """Return what happens to the faces."""
    shape = (3, size, size)
    random = torch.rand(size, size, generator=torch.Generator().manual_seed(0)) < 0.7
    box = torch.zeros(size, size)
    box[size // 4 : -size // 4, size // 4 : -size // 4] = 1
    return {
        "70 % of the pixels missing": Inpaint(random),
        "the middle missing": Inpaint(box),
        "a quarter of the size": Downsample(4, shape),
        "Gaussian blur": GaussianBlur(1.5, shape),
        "no colors": Gray(shape),
    }


def classical(operator: SpectralOperator, observed: torch.Tensor, noise_level: float) -> torch.Tensor:
    """Restore without a model: biharmonic equation, bicubic interpolation, Tikhonov's deconvolution, or gray."""
    if isinstance(operator, Inpaint):
        mask = operator.is_missing.numpy()
        faces = [inpaint_biharmonic(y.permute(1, 2, 0).numpy(), mask, channel_axis=-1) for y in observed]
        return torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2).float()
    if isinstance(operator, Downsample):
        size = operator.image_shape[1:]
        return torch.nn.functional.interpolate(observed, size=size, mode="bicubic", align_corners=False)
    if isinstance(operator, Gray):
        return observed.expand(-1, 3, -1, -1)
    blurred = observed  # smooth, as faces are: noise and what the blur has erased stay near the observation
    return operator.proximal(blurred, observed, max(noise_level, 0.01) ** 2 / 0.05**2)


class Sampler:
    """The steps that RePaint and DPS share: those of DDPM, at timesteps that divide the noise evenly."""

    def __init__(self, pipeline: DDPMFacesRestorePipeline, num_steps: int) -> None:
        self.pipeline = pipeline
        self.scheduler = pipeline._scheduler_with({"timestep_spacing": "logsnr"})
        self.scheduler.set_timesteps(num_steps)
        self.bars = self.scheduler.alphas_cumprod

    def predict(self, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output = self.pipeline.predict(sample, t)[:, : sample.shape[1]]
        return self.scheduler.predict_original_sample(output, int(t), sample)

    def step(self, x_0: torch.Tensor, t: torch.Tensor, sample: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Draw x_t-1 from the posterior of DDPM, given x_0."""
        previous = int(self.scheduler.previous_timestep(t))
        if previous < 0:
            return x_0
        bar, bar_before = self.bars[int(t)], self.bars[previous]
        beta = 1 - bar / bar_before
        mean = bar_before.sqrt() * beta / (1 - bar) * x_0
        mean = mean + (1 - beta).sqrt() * (1 - bar_before) / (1 - bar) * sample
        return mean + ((1 - bar_before) / (1 - bar) * beta).sqrt() * noise


@torch.no_grad()
def repaint(
    pipeline: DDPMFacesRestorePipeline, operator: Inpaint, observed: torch.Tensor, num_steps: int, repetitions: int = 4
) -> torch.Tensor:
    """Inpaint by RePaint (https://huggingface.co/papers/2201.09865): known pixels are replaced in the noisy images."""
    sampler = Sampler(pipeline, max(1, num_steps // repetitions))
    generator = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(observed.shape, generator=generator)

    sample, missing = noise(), operator.is_missing
    for t in sampler.scheduler.timesteps:
        previous = int(sampler.scheduler.previous_timestep(t))
        for repetition in range(repetitions):
            bar = sampler.bars[previous] if previous >= 0 else torch.tensor(1.0)
            known = bar.sqrt() * observed + (1 - bar).sqrt() * noise()
            unknown = sampler.step(sampler.predict(sample, t), t, sample, noise())
            lower = torch.where(missing, unknown, known)
            if repetition == repetitions - 1 or previous < 0:
                break
            ratio = sampler.bars[int(t)] / bar  # back to the noise of this timestep
            sample = ratio.sqrt() * lower + (1 - ratio).sqrt() * noise()
        sample = lower
    return sample


def dps(
    pipeline: DDPMFacesRestorePipeline,
    operator: SpectralOperator,
    observed: torch.Tensor,
    num_steps: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """Restore by DPS (https://huggingface.co/papers/2209.14687): gradients through the network."""
    sampler = Sampler(pipeline, num_steps)
    generator = torch.Generator().manual_seed(0)
    shape = (len(observed), *operator.image_shape)
    sample = torch.randn(shape, generator=generator)
    for t in sampler.scheduler.timesteps:
        sample.requires_grad_(True)
        x_0 = sampler.predict(sample, t)
        distance = (observed - operator(x_0)).flatten(1).norm(dim=1)
        (gradient,) = torch.autograd.grad(distance.sum(), sample)
        with torch.no_grad():
            noise = torch.randn(shape, generator=generator)
            sample = sampler.step(x_0, t, sample, noise) - scale * gradient
    return sample.detach()


def measure(
    restored: torch.Tensor, truth: torch.Tensor, features: torch.Tensor, extract: MobileNetV2
) -> dict[str, Any]:
    """Return PSNR in decibels (of values in [0, 1]), SSIM, and the Fréchet distance."""
    restored, truth = ((x.clamp(-1, 1) / 2 + 0.5).double() for x in (restored, truth))
    errors = (restored - truth).square().flatten(1).mean(dim=1)
    pairs = zip(restored.numpy(), truth.numpy(), strict=True)
    similarities = [structural_similarity(a, b, data_range=1.0, channel_axis=0) for a, b in pairs]
    found = extract((restored * 255).round().byte())
    return {
        "psnr": (-10 * errors.log10()).mean().item(),
        "ssim": float(np.mean(similarities)),
        "frechet": frechet_distance(found, features),
    }


def calibration(pipeline: DDPMFacesRestorePipeline, operator: SpectralOperator, truth: torch.Tensor) -> float:
    """Return how often the true pixel lies between the 10 % and the 90 % quantile of 20 restorations."""
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(operator(truth), operator, 0.0, None, 20, generator, "latent").images
    drawn = drawn.view(len(truth), 20, *truth.shape[1:])
    low, high = drawn.quantile(0.1, dim=1), drawn.quantile(0.9, dim=1)
    is_open = drawn.std(dim=1) > 1e-3  # known pixels have no interval
    return ((low <= truth) & (truth <= high))[is_open].float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, or its name on the Hub")
    parser.add_argument("data", help="dataset of faces")
    parser.add_argument("--split", default="test")
    parser.add_argument("--num-images", type=int, default=100)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--output", type=Path, default=Path("restoration.json"))
    parser.add_argument("--pictures", type=Path, help="folder for pictures")
    arguments = parser.parse_args()

    pipeline = DDPMFacesRestorePipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    _, height, width = pipeline.image_shape
    size = (height, width)
    faces = load_faces(arguments.data, resolution=size, split=arguments.split, max_images=arguments.num_images)
    truth, extract = faces.images.float() / 127.5 - 1, MobileNetV2()
    features = extract(faces.images)
    results = []
    for name, operator in tasks(height).items():
        for noise_level in NOISES:
            noise = torch.randn(operator(truth).shape, generator=torch.Generator().manual_seed(1))
            observed = operator(truth) + noise_level * noise

            def ours(num_steps: int, y=observed, a=operator, level=noise_level) -> torch.Tensor:
                return pipeline(y, a, level, num_steps, 1, torch.Generator().manual_seed(0), "latent").images

            methods: dict[str, Callable[[int], torch.Tensor]] = {
                "classical": lambda _, y=observed, a=operator, level=noise_level: classical(a, y, level),
                "ours": ours,
                "DPS": lambda n, y=observed, a=operator: dps(pipeline, a, y, n),
            }
            if isinstance(operator, Inpaint):
                methods["RePaint"] = lambda n, y=observed, a=operator: repaint(pipeline, a, y, n)
            rows = [truth, operator.pseudo_inverse(observed)]
            for method, restore in methods.items():
                for num_steps in arguments.steps if method != "classical" else [0]:
                    start = time.perf_counter()
                    restored = restore(num_steps)
                    seconds = time.perf_counter() - start
                    values = measure(restored, truth, features, extract)
                    row = {"task": name, "noise": noise_level, "method": method, "evaluations": num_steps, **values}
                    row["seconds"] = seconds
                    if method == "ours" and num_steps == max(arguments.steps) and not noise_level:
                        row["inside 80 %"] = calibration(pipeline, operator, truth[:10])
                        row["residual"] = (operator(restored) - observed).abs().max().item()
                    results.append(row)
                    print(json.dumps(row), flush=True)
                rows.append(restored)
            if arguments.pictures is not None:
                arguments.pictures.mkdir(parents=True, exist_ok=True)
                columns = torch.stack([row[:10] for row in rows], dim=1).flatten(0, 1)
                images = DDPMFacesRestorePipeline.postprocess(columns)
                path = arguments.pictures / f"{name.replace(' ', '-').replace('%', 'percent')}-{noise_level}.png"
                image_grid(images, columns=len(rows)).save(path)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
