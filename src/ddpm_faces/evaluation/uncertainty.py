"""Uncertainty of metrics: standard errors, confidence intervals of a share, and a test between two shares."""

import math
from collections.abc import Callable, Sequence

import torch


def half_split_error(
    function: Callable[[torch.Tensor, torch.Tensor], Sequence[float]],
    features: torch.Tensor,
    reference: torch.Tensor,
    num_splits: int = 20,
    seed: int = 0,
) -> list[float]:
    """Estimate the standard errors of metrics from their difference between two halves of the images.

    Both sides are split at random into halves A and B. No image is in both, so the metric's values on A and on B are
    independent, and half of their mean squared difference is its variance at half the number of images. With a
    variance that falls as 1 / n:

        error^2 = mean over the splits of (metric_A - metric_B)^2 / 4

    The bootstrap is unsound here: it draws images repeatedly, a repeated image is its own nearest neighbor, and the
    errors of precision and recall come out at up to twice their size. Its errors of the Fréchet distance are too
    large as well, because repetition changes its bias.

    Args:
        function (`Callable`): Maps `features` and `reference` to one metric or several.
        features (`torch.Tensor` of shape `(num_images, dim)`): One row per image.
        reference (`torch.Tensor` of shape `(num_reference_images, dim)`): One row per image.
        num_splits (`int`, defaults to 20): Number of random splits to average over, at least 1.
        seed (`int`, defaults to 0): Seed of the splits. Equal seeds give equal results.

    Returns:
        `list[float]`: The standard error of each metric.

    Raises:
        ValueError: `num_splits` is below 1.
    """
    if num_splits < 1:
        raise ValueError(f"`num_splits` must be at least 1, got {num_splits}.")
    generator = torch.Generator().manual_seed(seed)

    def halves(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = len(rows) // 2
        return rows[torch.randperm(len(rows), generator=generator)[: 2 * half]].split(half)

    differences = []
    for _ in range(num_splits):
        of_a, of_b = (function(*sides) for sides in zip(halves(features), halves(reference), strict=True))
        differences.append(torch.tensor(of_a, dtype=torch.float64) - torch.tensor(of_b, dtype=torch.float64))
    return (torch.stack(differences).square().mean(dim=0) / 4).sqrt().tolist()


def wilson_interval(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute Wilson's interval (1927) of the share `count / total`, which is accurate near 0 and 1, too.

    Args:
        count (`int`): Number of hits, 0 to `total`.
        total (`int`): Number of trials, at least 1.
        z (`float`, defaults to 1.959964): Half the width in standard deviations; the default gives 95 %.

    Returns:
        `(float, float)`: Both ends, 0 to 1.
    """
    share = count / total
    centre = share + z**2 / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max((centre - reach) / (1 + z**2 / total), 0.0), min((centre + reach) / (1 + z**2 / total), 1.0)


def share_error(share: float, total: int) -> float:
    """Compute the standard error of a share that was counted among `total` images, never 0.

    It is the distance from the share to the farther end of Wilson's interval of one standard deviation. In the middle
    that is the binomial standard error; at a share of 0 or 1, where the binomial one is 0, it is 1 / (total + 1).
    """
    low, high = wilson_interval(round(share * total), total, z=1.0)
    return max(share - low, high - share)


def exceedance_p_value(count: int, total: int, held_out_count: int, held_out_total: int) -> float:
    """Compute the probability of `count` or more samples below the threshold if they were like held-out faces.

    It is the one-sided p-value of Fisher's exact test. The threshold is itself one of the held-out values, which does
    not bias the test: `count` or more samples lie below that value if and only if at least `count` of the smallest
    `count + held_out_count` values of both sets are samples, and all orders are equally likely.
    """
    ways = sum(
        math.comb(total, count + more) * math.comb(held_out_total, held_out_count - more)
        for more in range(held_out_count + 1)
    )
    return ways / math.comb(total + held_out_total, count + held_out_count)
