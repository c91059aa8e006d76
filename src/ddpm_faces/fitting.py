"""Find the few steps in which a solver stays closest to a model's own trajectories.

Without noise, sampling follows a curve from each x_T to an image. A solver with few steps cuts its corners. For one
model, three things can be measured that a general solver has to assume:

1. where the curves bend. Dynamic programming finds the noise levels whose straight steps deviate least from the curves
   (GITS, https://huggingface.co/papers/2405.11326).
2. how to extrapolate over such a step. The weights of the last predictions are fitted by least squares.
3. how much noise a step leaves that it should have removed. It is fitted along with the weights, as the divisor of the
   predicted noise.

All fits are closed forms, made from step to step on the solver's own states, so that a step also corrects what the
steps before it did wrong. No gradient is needed.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .checks import check_integer, check_seed
from .generation import with_own_scheduler
from .pipeline_ddpm_faces import SOLVER, Condition, DDPMFacesPipeline, Guidance, evaluating
from .scheduling_ddpm_faces import DDPMFacesScheduler


GRID = 60  # steps of the exact trajectories
# The factor of GITS by which an error counts more with each step that came before it.
ERROR_GROWTH = 1.15
MIN_TRAJECTORIES = 16
MAX_BYTES = 2**30  # of all states on the trajectories


@dataclass
class Trajectories:
    """Solutions of the probability flow of a model, from noise to images.

    Args:
        timesteps (`list[int]`): The timesteps of the grid, descending.
        sigmas (`list[float]`): Their noise-to-signal ratios, and 0 at the end.
        states (`torch.Tensor` of shape `(len(sigmas), num, channels, height, width)`, float16):
            x_t, and at the end x_0.
        predictions (`torch.Tensor` of shape `(len(timesteps), num, channels, height, width)`, float16):
            x_0 as predicted at each x_t.
        class_labels (`torch.Tensor` of shape `(num,)`, *optional*): Class of each image.
    """

    timesteps: list[int]
    sigmas: list[float]
    states: torch.Tensor
    predictions: torch.Tensor
    class_labels: torch.Tensor | None = None

    def noisy(self, index: int) -> torch.Tensor:
        """Return x_t / sqrt(alpha_bar_t) = x_0 + sigma epsilon at a point of the grid, in float32."""
        return self.states[index].float() * math.hypot(1, self.sigmas[index])


@torch.no_grad()
def fit_solvers(
    pipeline: DDPMFacesPipeline,
    num_steps: Sequence[int] = (4, 5, 6, 8, 10),
    num_trajectories: int = 128,
    batch_size: int = 16,
    seed: int = 2**31,
) -> dict[str, dict[str, Any]]:
    """Fit solvers to a model, one for each number of steps.

    Args:
        pipeline ([`DDPMFacesPipeline`]): The model, guided as in its configuration. It is not changed.
        num_steps (`Sequence[int]`, defaults to `(4, 5, 6, 8, 10)`): Numbers of steps, each from 2 to 20.
        num_trajectories (`int`, defaults to 128):
            Number of images to learn from, at least 16. Large images are fewer, so that they fit into 1 GiB.
        batch_size (`int`, defaults to 16): Number of images at once.
        seed (`int`, defaults to 2**31): Seed of the first image, far from the seeds that people use.

    Returns:
        `dict[str, dict]`: The argument `tuned_steps` of [`DDPMFacesScheduler`].

    Raises:
        ValueError: An argument is out of range, or the model's scheduler has too few timesteps.
    """
    numbers = check_num_steps(num_steps)
    check_integer("num_trajectories", num_trajectories, MIN_TRAJECTORIES)
    check_integer("batch_size", batch_size, 1)
    check_seed(seed)
    grid = min(GRID, pipeline.scheduler.config.num_train_timesteps - 1)  # the last timestep may be pure noise
    if max(numbers) >= grid:
        raise ValueError(f"`num_steps` must be below {grid} for this model, got {max(numbers)}.")
    guidance = Guidance(**{name: pipeline.config[name] for name in Guidance._fields})
    with evaluating(pipeline.unet, pipeline.guide):
        exact = follow(pipeline, num_trajectories, guidance, batch_size, seed)
        errors = straight_step_errors(exact)
        return {
            str(number): fit(pipeline, exact, cheapest_path(errors, number), guidance, batch_size)
            for number in tqdm(numbers, desc="Fitting solvers", unit="solver", disable=None, leave=False)
        }


def check_num_steps(num_steps: Sequence[int]) -> list[int]:
    """Return the numbers of steps in ascending order, each once, or raise a `ValueError`."""
    if not num_steps or any(type(number) is not int or not 2 <= number <= 20 for number in num_steps):
        raise ValueError(f"`num_steps` must be numbers from 2 to 20, got {list(num_steps)}.")
    return sorted(set(num_steps))


def follow(
    pipeline: DDPMFacesPipeline, num_images: int, guidance: Guidance, batch_size: int, seed: int
) -> Trajectories:
    """Follow the probability flow from `num_images` noises in small steps of third order."""
    config = with_own_scheduler(pipeline).scheduler.config
    solver = DDPMFacesScheduler.from_config(config, **SOLVER, solver_order=3, tuned_steps=None)
    grid = min(GRID, len(solver) - 1)
    solver.set_timesteps(grid)
    shape, device = pipeline.image_shape, pipeline.unet.device
    num_images = max(MIN_TRAJECTORIES, min(num_images, MAX_BYTES // (4 * grid * math.prod(shape))))
    classes = pipeline.unet.config.get("num_class_embeds")
    labels = None if classes is None else (torch.arange(num_images) % classes).to(device)
    states = torch.empty(grid + 1, num_images, *shape, dtype=torch.float16)
    predictions = torch.empty(grid, num_images, *shape, dtype=torch.float16)
    with tqdm(total=num_images, desc="Following trajectories", unit="image", disable=None, leave=False) as bar:
        for part in torch.arange(num_images).split(batch_size):
            noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in part.tolist()]
            x = torch.stack(noises).to(device)
            for index, t in enumerate(solver.timesteps):
                states[index, part] = x.cpu().half()
                output = pipeline.predict(x, t, Condition(None if labels is None else labels[part]), guidance)
                x, x_0 = solver.step(output, t, x, return_dict=False)
                predictions[index, part] = x_0.cpu().half()
            states[grid, part] = x.cpu().half()
            bar.update(len(part))
    return Trajectories(solver.timesteps.tolist(), solver.sigmas.tolist(), states, predictions, labels)


def straight_step_errors(exact: Trajectories) -> torch.Tensor:
    """Return the error of a single straight (DDIM) step between any two points of the grid.

    Returns:
        `torch.Tensor` of shape `(points, points)`, float64: The mean distance from the exact state in
        x_0 + sigma epsilon; infinite unless the step goes forward.
    """
    points = len(exact.sigmas)
    scales = torch.tensor([math.hypot(1, sigma) for sigma in exact.sigmas])
    products = []  # inner products of states and predictions, from which all distances follow
    for image in range(exact.states.shape[1]):
        noisy = exact.states[:, image].flatten(1).float() * scales[:, None]
        vectors = torch.cat([noisy, exact.predictions[:, image].flatten(1).float()])
        products.append((vectors @ vectors.T).double())
    of_all = torch.stack(products)  # (num, points + timesteps, points + timesteps)
    errors = torch.full((points, points), math.inf, dtype=torch.float64)
    for start, end in itertools.combinations(range(points), 2):
        ratio = exact.sigmas[end] / exact.sigmas[start]
        used = [start, points + start, end]
        step = torch.tensor([ratio, 1 - ratio, -1], dtype=torch.float64)
        errors[start, end] = (step @ of_all[:, used][:, :, used] @ step).clamp(min=0).sqrt().mean()
    return errors


def cheapest_path(errors: torch.Tensor, num_steps: int) -> list[int]:
    """Return the points of the grid, from the first to the last, that `num_steps` steps with the least error visit."""
    remaining = torch.full((len(errors),), math.inf, dtype=errors.dtype)  # error from each point to the end
    remaining[-1] = 0
    choices = []
    for _ in range(num_steps):
        remaining, choice = (errors + ERROR_GROWTH * remaining).min(dim=1)
        choices.append(choice)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return path


def fit(
    pipeline: DDPMFacesPipeline, exact: Trajectories, path: Sequence[int], guidance: Guidance, batch_size: int
) -> dict[str, Any]:
    """Fit the weights and divisors of a solver that visits the points `path` of the grid.

    Returns:
        `dict`: An entry of `tuned_steps`, see [`DDPMFacesScheduler`].
    """
    points = list(path[:-1])
    entry: dict[str, list] = {
        "timesteps": [exact.timesteps[point] for point in points],
        "sigmas": [_rounded(exact.sigmas[point]) for point in points],
        "weights": [],
        "epsilon_scaling": [],
    }
    config = with_own_scheduler(pipeline).scheduler.config
    denoiser = DDPMFacesScheduler.from_config(config, clip_sample=False)
    noisy = exact.noisy(0)  # the solver's own state
    earlier: list[torch.Tensor] = []
    for start, end in itertools.pairwise(path):
        sigma, ratio = exact.sigmas[start], exact.sigmas[end] / exact.sigmas[start]
        x_0 = torch.empty_like(noisy)
        for part in torch.arange(len(noisy)).split(batch_size):
            x = noisy[part].to(pipeline.unet.device) / math.hypot(1, sigma)
            labels = None if exact.class_labels is None else exact.class_labels[part]
            output = pipeline.predict(x, exact.timesteps[start], Condition(labels), guidance)[:, : x.shape[1]]
            x_0[part] = denoiser.predict_original_sample(output, exact.timesteps[start], x).cpu()

        weights, excess = _fit_step(noisy, x_0, earlier, ratio, exact.noisy(end))
        x_0 = x_0 + excess * (noisy - x_0)
        denoised = (1 - sum(weights)) * x_0
        for weight, prediction in zip(weights, earlier, strict=False):
            denoised = denoised + weight * prediction
        noisy, earlier = ratio * noisy + (1 - ratio) * denoised, [x_0, *earlier][:2]
        entry["weights"].append([_rounded(weight) for weight in weights])
        entry["epsilon_scaling"].append(_rounded(1 / (1 - excess)))
    return entry


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _fit_step(
    noisy: torch.Tensor, x_0: torch.Tensor, earlier: Sequence[torch.Tensor], ratio: float, target: torch.Tensor
) -> tuple[list[float], float]:
    """Return the weights of the earlier predictions, and how much of the predicted noise x_0 still contains."""
    for used in range(len(earlier), -1, -1):
        # target = x_0 + factor (noisy - x_0) + sum of shares (earlier - x_0)
        columns = [noisy - x_0, *(prediction - x_0 for prediction in earlier[:used])]
        factor, *shares = _least_squares(columns, target - x_0)
        # In the terms of the scheduler: D = (1 - sum of weights) x_0' + sum of weights earlier, where x_0' =
        # x_0 + excess (noisy - x_0), excess = 1 - 1 / divisor, and the next state is ratio noisy + (1 - ratio) D.
        weights = [share / (1 - ratio) for share in shares]
        excess = (factor - ratio) / ((1 - ratio) * (1 - sum(weights)))
        if all(abs(weight) <= 10 for weight in weights) and abs(excess) <= 0.5:  # what the scheduler accepts
            return weights, excess
    return [], 0.0  # a step of DDIM


def _least_squares(columns: Sequence[torch.Tensor], target: torch.Tensor) -> list[float]:
    """Return the factors of `columns` whose sum is closest to `target`."""
    vectors = [vector.flatten() for vector in (*columns, target)]
    products = torch.tensor([[float(a.double() @ b.double()) for a in vectors] for b in vectors], dtype=torch.float64)
    return torch.linalg.lstsq(products[:-1, :-1], products[:-1, -1:]).solution.flatten().tolist()
