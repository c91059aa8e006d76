"""How far generated faces are from real ones, by features of a network that was trained on something else.

Compare figures only with those from the same network at the same size of the pictures, and the Frechet distance at the
same number of pictures. The networks are in [`extractors`]; none is the one of the literature.
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data.images import picture_to_tensor
from .extractors import EfficientNetLite0, Extractor


Images = torch.Tensor | Sequence[Image.Image]
NUM_SUBSETS = 10
_ROWS = 1024  # of a matrix of distances at a time


def extract_features(images: Images, extractor: Extractor | None = None, batch_size: int = 64) -> torch.Tensor:
    """Compute the features of pictures.

    Args:
        images (`torch.Tensor` of shape `(num_images, 3, height, width)`, `torch.uint8`, or `list[PIL.Image.Image]`):
            Pictures, 0 to 255. Those in a list are of one size, and are read as RGB.
        extractor (`Callable`, *optional*):
            Takes uint8 pictures of shape `(batch, 3, height, width)`, resizes and normalises them as it needs, and
            returns pooled features of shape `(batch, dim)`. By default [`EfficientNetLite0`] on the CPU: 224x224 by
            antialiased bicubic interpolation, `(pixel - 127) / 128`, 1280 features.
        batch_size (`int`, defaults to 64): Pictures at a time.

    Returns:
        `torch.Tensor` of shape `(num_images, dim)`, `torch.float32`, on the CPU.

    Raises:
        ValueError: Pictures of a wrong type, shape or number, a `batch_size` below 1, or an `extractor` that does not
            return one row per picture.
        ImportError: No `extractor`, and the extra `metrics` is not installed.
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
    """Compute the squared Frechet distance between the Gaussians that are fitted to the two sets of features.

    With the means mu_i and the unbiased covariances S_i, which divide by n - 1 (Heusel et al. 2017, eq. 6,
    https://huggingface.co/papers/1706.08500):

        d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

    Computed in float64 and without a matrix root: for any A_i with S_i = A_i^T A_i, tr (S_1 S_2)^(1/2) is the sum of
    the singular values of A_1 A_2^T. That is exact also with fewer pictures than features, where S_i is singular.

    Args:
        features (`torch.Tensor` of shape `(num_images, dim)`, floating point): At least 2 rows.
        reference (`torch.Tensor` of shape `(num_reference_images, dim)`, floating point): At least 2 rows.

    Returns:
        `float`: The squared distance, 0 or larger. It falls as the number of pictures grows.

    Raises:
        ValueError: Features of a wrong type, shape or number, of different `dim`, or not finite.
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

    in float64. Both sides are shuffled by `seed` and cut into *disjoint* subsets of m rows, so that the estimates are
    independent and the standard error of their mean is honest; the article's subsets overlap. The expectation depends
    neither on m nor on the number of pictures, and the estimate may be negative.

    Args:
        features (`torch.Tensor` of shape `(num_images, dim)`, floating point):
            At least `num_subsets * subset_size` rows.
        reference (`torch.Tensor` of shape `(num_reference_images, dim)`, floating point): The same.
        subset_size (`int`, *optional*): The m above, at least 2; by default the largest that fits.
        num_subsets (`int`, defaults to 10): At least 2.
        seed (`int`, defaults to 0): Which rows meet in a subset. Equal seeds give equal results.

    Returns:
        `(float, float)`: The mean over the subsets and its standard error; publications give them times 1000.

    Raises:
        ValueError: A `subset_size` or `num_subsets` below 2, or features of a wrong type, shape or number, of
            different `dim`, or not finite.
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
    """Estimate how many of the pictures look real, and how many of the real ones could have been generated.

    A set covers what lies within a ball about one of its members, as far as that one's k-th nearest neighbour in the
    set. Precision is the share of `features` that `reference` covers, recall the share of `reference` that `features`
    cover (Kynkaanniemi et al. 2019, eq. 1 and 2, https://huggingface.co/papers/1904.06991).

    Args:
        features (`torch.Tensor` of shape `(num_images, dim)`, floating point): More than `num_neighbours` rows.
        reference (`torch.Tensor` of shape `(num_reference_images, dim)`, floating point): The same.
        num_neighbours (`int`, defaults to 3): The k above, at least 1.

    Returns:
        `(float, float)`: Precision and recall, 0 to 1. Both fall where pictures are few; compare at equal numbers.

    Raises:
        ValueError: A `num_neighbours` below 1, or features of a wrong type, shape or number, of different `dim`, or
            not finite.
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
    """Compute the mean and the standard deviation of each channel over all pixels, which show a drift of colour.

    Args:
        images (`torch.Tensor` of shape `(num_images, 3, height, width)`, `torch.uint8`, or `list[PIL.Image.Image]`):
            Pictures, 0 to 255.

    Returns:
        `dict[str, list[float]]`: `"mean"` and `"deviation"` of red, green and blue, for pixels in [-1, 1].

    Raises:
        ValueError: Pictures of a wrong type, shape or number.
    """
    images = _checked_images(images)
    # Counting the 256 values is exact, and needs no copy of the pictures in floating point.
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(dim=1)]).double()
    shares = counts / counts.sum(dim=1, keepdim=True)  # (3, 256)
    values = torch.arange(256, dtype=torch.float64, device=images.device) / 127.5 - 1.0
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(dim=1)
    return {"mean": mean.tolist(), "deviation": variance.sqrt().tolist()}


def bootstrap_error(
    function: Callable[[torch.Tensor, torch.Tensor], Sequence[float]],
    features: torch.Tensor,
    reference: torch.Tensor,
    num_resamples: int = 20,
    seed: int = 0,
) -> list[float]:
    """Estimate the standard errors of figures, from how they scatter over pictures drawn anew with replacement.

    Both sides are drawn anew (Efron 1979, https://doi.org/10.1214/aos/1176344552). Of the Frechet distance, whose bias
    a repeated picture raises, the error is on the large side: up to twice what it is, with few pictures.

    Args:
        function (`Callable`): From `features` and `reference` to one figure or several.
        features (`torch.Tensor` of shape `(num_images, dim)`): Rows that belong to pictures.
        reference (`torch.Tensor` of shape `(num_reference_images, dim)`): The same.
        num_resamples (`int`, defaults to 20): At least 2; with 20, an error is itself off by a sixth or so.
        seed (`int`, defaults to 0): Which are drawn. Equal seeds give equal results.

    Returns:
        `list[float]`: The standard deviation of each figure over the resamples.

    Raises:
        ValueError: A `num_resamples` below 2.
    """
    if num_resamples < 2:
        raise ValueError(f"`num_resamples` must be at least 2, got {num_resamples}.")
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: torch.Tensor) -> torch.Tensor:
        return rows[torch.randint(len(rows), (len(rows),), generator=generator)]

    figures = [function(drawn(features), drawn(reference)) for _ in range(num_resamples)]
    return torch.tensor(figures, dtype=torch.float64).std(dim=0).tolist()


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Exact also between equal rows, of which sets with repetitions have many."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _squared_discrepancy(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The unbiased estimate of [`kernel_distance`] from one subset: x and y of shape (m, dim)."""

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
        return (matrix.sum() - matrix.trace()) / (len(matrix) * (len(matrix) - 1))

    return mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()


def _checked_images(images: Images) -> torch.Tensor:
    """Pictures as a uint8 tensor of shape (num_images, 3, height, width)."""
    if len(images) == 0:
        raise ValueError("`images` must hold at least 1 picture, got none.")
    if not isinstance(images, torch.Tensor):
        strangers = {type(image).__name__ for image in images if not isinstance(image, Image.Image)}
        if strangers:
            raise ValueError(f"`images` must be a tensor or a list of PIL pictures, got a {strangers.pop()} in it.")
        sizes = sorted({(image.height, image.width) for image in images})
        if len(sizes) > 1:
            raise ValueError(f"`images` must be of one size, got (height, width) of {sizes[0]} and {sizes[-1]}.")
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
    """Both sets of features in float64 on the CPU."""
    for name, rows in (("features", features), ("reference", reference)):
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(
                f"`{name}` must be floating point and of shape (num_images, dim), got {rows.dtype} and "
                f"{tuple(rows.shape)}."
            )
        if len(rows) < min_images:
            raise ValueError(f"`{name}` must hold at least {min_images} rows, got {len(rows)}.")
        if not rows.isfinite().all():
            raise ValueError(f"`{name}` must be finite, but holds NaN or infinity.")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"`features` and `reference` must have as many columns, got {features.shape[1]} and {reference.shape[1]}."
        )
    return features.to("cpu", torch.float64), reference.to("cpu", torch.float64)
