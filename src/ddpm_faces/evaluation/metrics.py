"""Distances between generated and real faces, by the features of a network that was trained for another task.

Compare metrics only with those of the same network at the same image size, and the Frechet distance only at the same
number of images. The networks are in [`extractors`].
"""

from collections.abc import Sequence

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data.images import picture_to_tensor
from .extractors import EfficientNetLite0, Extractor


Images = torch.Tensor | Sequence[Image.Image]
NUM_SUBSETS = 10
_ROWS = 1024  # rows of a distance matrix that are computed at a time


def extract_features(images: Images, extractor: Extractor | None = None, batch_size: int = 64) -> torch.Tensor:
    """Compute the features of images.

    Args:
        images (`torch.Tensor` of shape `(num_images, 3, height, width)`, `torch.uint8`, or `list[PIL.Image.Image]`):
            Images, 0 to 255. Images in a list must have the same size, and are converted to RGB.
        extractor (`Callable`, *optional*):
            Takes uint8 images of shape `(batch, 3, height, width)`, resizes and normalizes them as it needs, and
            returns pooled features of shape `(batch, dim)`. By default [`EfficientNetLite0`] on the CPU: 224x224 by
            antialiased bicubic interpolation, `(pixel - 127) / 128`, 1280 features.
        batch_size (`int`, defaults to 64): Images in a batch.

    Returns:
        `torch.Tensor` of shape `(num_images, dim)`, `torch.float32`, on the CPU.

    Raises:
        ValueError: The images have a wrong type, shape or number, `batch_size` is below 1, or `extractor` does not
            return one row per image.
        ImportError: `extractor` is `None`, and the packages of the default one are not installed.
    """
    images = _checked_images(images)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    extractor = extractor or EfficientNetLite0()
    features = []
    with tqdm(total=len(images), desc="Extracting features", unit="img") as progress:
        for batch in images.split(batch_size):
            rows = extractor(batch)
            if rows.ndim != 2 or len(rows) != len(batch):
                raise ValueError(
                    f"`extractor` must return features of shape ({len(batch)}, dim), got {tuple(rows.shape)}."
                )
            features.append(rows.detach().to("cpu", torch.float32))
            progress.update(len(batch))
    return torch.cat(features)


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Compute the squared Frechet distance between Gaussians fitted to two sets of features.

    With the means mu_i and the unbiased covariances S_i, which divide by n - 1 (Heusel et al. 2017, eq. 6,
    https://huggingface.co/papers/1706.08500):

        d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

    Computed in float64 and without a matrix root: for any A_i with S_i = A_i^T A_i, tr (S_1 S_2)^(1/2) is the sum of
    the singular values of A_1 A_2^T. This is exact even with fewer images than features, where S_i is singular.

    Args:
        features (`torch.Tensor` of shape `(num_images, dim)`, floating point): At least 2 rows.
        reference (`torch.Tensor` of shape `(num_reference_images, dim)`, floating point): At least 2 rows.

    Returns:
        `float`: The squared distance, at least 0. It decreases as the number of images grows.

    Raises:
        ValueError: The features have a wrong type, shape or number, differ in `dim`, or are not finite.
    """
    features, reference = _checked_features(features, reference, min_images=2)
    mean_difference = features.mean(dim=0) - reference.mean(dim=0)
    factors = [(rows - rows.mean(dim=0)) / (len(rows) - 1) ** 0.5 for rows in (features, reference)]  # A_i
    traces = sum(factor.square().sum() for factor in factors)
    factors = [torch.linalg.qr(factor, mode="r").R for factor in factors]  # the same S_i, from at most dim rows
    trace_of_root = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return max((mean_difference.square().sum() + traces - 2 * trace_of_root).item(), 0.0)


def kernel_distance(
    features: torch.Tensor,
    reference: torch.Tensor,
    subset_size: int | None = None,
    num_subsets: int = NUM_SUBSETS,
    seed: int = 0,
) -> tuple[float, float]:
    """Estimate the squared maximum mean discrepancy of the features under a cubic polynomial kernel.

    With the kernel k(x, y) = (x . y / dim + 1)^3, and m rows x_i, y_i of either side, the unbiased estimate is
    (Binkowski et al. 2018, https://huggingface.co/papers/1801.01401)

        sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 sum_{i, j} k(x_i, y_j) / m^2

    in float64. Both sides are shuffled by `seed` and cut into *disjoint* subsets of m rows, which makes the estimates
    independent and the standard error of their mean unbiased; the subsets of the article overlap. The expectation
    depends neither on m nor on the number of images, and the estimate may be negative.

    Args:
        features (`torch.Tensor` of shape `(num_images, dim)`, floating point):
            At least `num_subsets * subset_size` rows.
        reference (`torch.Tensor` of shape `(num_reference_images, dim)`, floating point): The same.
        subset_size (`int`, *optional*): The m above, at least 2; by default the largest that fits.
        num_subsets (`int`, defaults to 10): Number of subsets, at least 2.
        seed (`int`, defaults to 0): Seed of the shuffling. Equal seeds give equal results.

    Returns:
        `(float, float)`: The mean over the subsets and its standard error; publications multiply both by 1000.

    Raises:
        ValueError: `subset_size` or `num_subsets` is below 2, or the features have a wrong type, shape or number,
            differ in `dim`, or are not finite.
    """
    for name, value in (("subset_size", subset_size), ("num_subsets", num_subsets)):
        if value is not None and value < 2:
            raise ValueError(f"`{name}` must be at least 2, got {value}.")
    features, reference = _checked_features(features, reference, min_images=num_subsets * (subset_size or 2))
    subset_size = subset_size or min(len(features), len(reference)) // num_subsets

    generator = torch.Generator().manual_seed(seed)
    sides = []
    for rows in (features, reference):
        chosen = torch.randperm(len(rows), generator=generator)[: num_subsets * subset_size]
        sides.append(rows[chosen].split(subset_size))
    estimates = torch.stack([_squared_discrepancy(x, y) for x, y in zip(*sides, strict=True)])  # (num_subsets,)
    return estimates.mean().item(), (estimates.std() / num_subsets**0.5).item()


def precision_recall(features: torch.Tensor, reference: torch.Tensor, num_neighbours: int = 3) -> tuple[float, float]:
    """Estimate the share of images that look real, and the share of real images that could have been generated.

    Each member of a set has a ball whose radius is the distance to its k-th nearest neighbor in the set. The set
    covers all points inside its balls. Precision is the share of `features` that `reference` covers, recall the share
    of `reference` that `features` cover (Kynkaanniemi et al. 2019, eq. 1 and 2,
    https://huggingface.co/papers/1904.06991).

    Args:
        features (`torch.Tensor` of shape `(num_images, dim)`, floating point): More than `num_neighbours` rows.
        reference (`torch.Tensor` of shape `(num_reference_images, dim)`, floating point): The same.
        num_neighbours (`int`, defaults to 3): The k above, at least 1.

    Returns:
        `(float, float)`: Precision and recall, 0 to 1. Both depend on the numbers of images; compare at equal numbers.

    Raises:
        ValueError: `num_neighbours` is below 1, or the features have a wrong type, shape or number, differ in `dim`,
            or are not finite.
    """
    if not isinstance(num_neighbours, int) or num_neighbours < 1:
        raise ValueError(f"`num_neighbours` must be an integer of at least 1, got {num_neighbours!r}.")
    features, reference = _checked_features(features, reference, min_images=num_neighbours + 1)

    def radii(rows: torch.Tensor) -> torch.Tensor:
        distances = torch.cat([_distances(part, rows) for part in rows.split(_ROWS)])
        return distances.kthvalue(num_neighbours + 1, dim=1).values  # the nearest is the row itself

    def covered(rows: torch.Tensor, others: torch.Tensor, radii: torch.Tensor) -> float:
        inside = [(_distances(part, others) <= radii).any(dim=1) for part in rows.split(_ROWS)]
        return torch.cat(inside).double().mean().item()

    return covered(features, reference, radii(reference)), covered(reference, features, radii(features))


def channel_statistics(images: Images) -> dict[str, list[float]]:
    """Compute mean and standard deviation of each channel over all pixels, which reveal a color shift.

    Args:
        images (`torch.Tensor` of shape `(num_images, 3, height, width)`, `torch.uint8`, or `list[PIL.Image.Image]`):
            Images, 0 to 255.

    Returns:
        `dict[str, list[float]]`: `"mean"` and `"deviation"` (the standard deviation) of red, green and blue, for
        pixels in [-1, 1].

    Raises:
        ValueError: The images have a wrong type, shape or number.
    """
    images = _checked_images(images)
    # Counting the 256 values is exact and needs no floating-point copy of the images.
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(dim=1)]).double()
    shares = counts / counts.sum(dim=1, keepdim=True)  # (3, 256)
    values = torch.arange(256, dtype=torch.float64, device=images.device) / 127.5 - 1.0
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(dim=1)
    return {"mean": mean.tolist(), "deviation": variance.sqrt().tolist()}


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Compute distances that are exactly 0 between equal rows, because sets may repeat images."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _squared_discrepancy(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Compute the unbiased estimate of [`kernel_distance`] for one subset, x and y of shape (m, dim)."""

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
        return (matrix.sum() - matrix.trace()) / (len(matrix) * (len(matrix) - 1))

    return mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()


def _checked_images(images: Images) -> torch.Tensor:
    """Return images as a uint8 tensor of shape (num_images, 3, height, width)."""
    if len(images) == 0:
        raise ValueError("`images` must contain at least 1 image, got none.")
    if not isinstance(images, torch.Tensor):
        strangers = {type(image).__name__ for image in images if not isinstance(image, Image.Image)}
        if strangers:
            raise ValueError(f"`images` must be a tensor or a list of PIL images, got a {strangers.pop()} in it.")
        sizes = sorted({(image.height, image.width) for image in images})
        if len(sizes) > 1:
            raise ValueError(f"`images` must have the same size, got (height, width) of {sizes[0]} and {sizes[-1]}.")
        images = torch.stack([picture_to_tensor(image, sizes[0]) for image in images])
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"`images` must be of type uint8 and shape (num_images, 3, height, width), got {images.dtype} and "
            f"{tuple(images.shape)}."
        )
    return images


def _checked_features(
    features: torch.Tensor, reference: torch.Tensor, min_images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both sets of features in float64 on the CPU."""
    for name, rows in (("features", features), ("reference", reference)):
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(
                f"`{name}` must be floating point and of shape (num_images, dim), got {rows.dtype} and "
                f"{tuple(rows.shape)}."
            )
        if len(rows) < min_images:
            raise ValueError(f"`{name}` must have at least {min_images} rows, got {len(rows)}.")
        if not rows.isfinite().all():
            raise ValueError(f"`{name}` must be finite, but contains NaN or infinity.")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"`features` and `reference` must have the same number of columns, got {features.shape[1]} and "
            f"{reference.shape[1]}."
        )
    return features.to("cpu", torch.float64), reference.to("cpu", torch.float64)
