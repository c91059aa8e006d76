"""The nearest training image of each query, and how unusually near it is."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..checks import check_integer


_ROWS, _NUMBERS = 1024, 2**24  # limits on rows at a time, and on their float64 numbers (128 MiB)


class Nearest(NamedTuple):
    """The result of [`nearest`]. All tensors have the shape `(num_queries,)`.

    Attributes:
        indices (`torch.Tensor`, `torch.int64`): Index of the nearest training image.
        is_mirrored (`torch.Tensor`, `torch.bool`): Whether its mirror image is nearer.
        distances (`torch.Tensor`, `torch.float64`): Distance to it, 0 to 2.
        relative_distances (`torch.Tensor`, `torch.float64`): 0 (an exact copy) to 1.
    """

    indices: torch.Tensor
    is_mirrored: torch.Tensor
    distances: torch.Tensor
    relative_distances: torch.Tensor


def nearest(
    queries: torch.Tensor, train: torch.Tensor, mirrored_train: torch.Tensor, num_neighbours: int = 50
) -> Nearest:
    """Find the training image that is nearest to each query, and how unusually near it is.

    Images are compared by their direction from the mean of all training images and mirror images. With the distances
    d_1 <= d_2 <= ... to the training images (the smaller of the image and its mirror image) and k neighbors, the
    *relative distance* is

        d_1 / mean(d_1, ..., d_k)

    This is the measure behind the adaptive threshold of Carlini et al. 2023
    (https://huggingface.co/papers/2301.13188), who use k = 50 and raw pixels.

    Args:
        queries (`torch.Tensor` of shape `(num_queries, dim)`, floating point or `torch.uint8`):
            Features, or flattened images of 0 to 255, whose brightness and contrast are removed.
        train (`torch.Tensor` of shape `(num_train, dim)`, of the same type): The training images.
        mirrored_train (`torch.Tensor` of shape `(num_train, dim)`, of the same type): Their mirror images.
        num_neighbours (`int`, defaults to 50): The k above, at least 2 and below `num_train`.

    Returns:
        [`Nearest`]: One entry per query.

    Raises:
        ValueError: The rows differ in shape or type or are not finite, or `num_neighbours` is out of range.
    """
    for name, rows in (("train", train), ("mirrored_train", mirrored_train), ("queries", queries)):
        num_rows = len(queries) if name == "queries" else len(train)
        if rows.ndim != 2 or rows.shape != (num_rows, train.shape[1]) or rows.dtype != train.dtype:
            raise ValueError(
                f"`{name}` must be of shape (num, dim), with the dim and type of `train` ({tuple(train.shape)} and "
                f"{train.dtype}), got {tuple(rows.shape)} and {rows.dtype}."
            )
        if rows.dtype != torch.uint8 and not (rows.is_floating_point() and rows.isfinite().all()):
            raise ValueError(f"`{name}` must be uint8, or floating point and finite, got {rows.dtype} or NaN in it.")
    check_integer("num_neighbours", num_neighbours, 2, len(train) - 1)

    size = max(1, min(_ROWS, _NUMBERS // train.shape[1]))
    blocks = range(0, len(train), size)
    sides = (train, mirrored_train)
    sums = (_points(side[start : start + size]).sum(dim=0) for side in sides for start in blocks)
    centre = sum(sums, start=train.new_zeros(train.shape[1], dtype=torch.float64)) / len(train) / 2
    found = []
    with tqdm(total=len(queries) * len(train), desc="Comparing", unit="pair", unit_scale=True) as progress:
        for rows in queries.split(size):
            rows = _directions(rows, centre)
            squares = rows.new_zeros(len(rows), 0)  # the smallest squared distances so far, in ascending order
            codes = squares.long()  # their images: i, or num_train + i for the mirror image of i
            for start in blocks:
                # In float64, the distance of a copy is 0. In float32 it would not be.
                upright, mirrored = (
                    2 - 2 * rows @ _directions(side[start : start + size], centre).T for side in sides
                )
                indices = torch.arange(start, start + upright.shape[1], device=rows.device)
                codes = torch.cat([codes, torch.where(mirrored < upright, len(train) + indices, indices)], dim=1)
                squares = torch.cat([squares, torch.minimum(mirrored, upright)], dim=1)
                squares, order = squares.topk(min(num_neighbours, squares.shape[1]), largest=False)
                codes = codes.gather(1, order)
                progress.update(upright.numel())
            distances = squares.clamp(min=0).sqrt()  # (rows, num_neighbours)
            # Near 1 for a smooth or average face, which is near to every image. The clamp makes it 0 for a copy of an
            # image that the dataset repeats so often that the mean is 0.
            relative_distances = distances[:, 0] / distances.mean(dim=1).clamp(min=1e-12)
            code = codes[:, 0]
            found.append((code % len(train), code >= len(train), distances[:, 0], relative_distances))
    return Nearest(*(torch.cat(values) for values in zip(*found, strict=True)))


def _points(rows: torch.Tensor) -> torch.Tensor:
    """Return rows in float64. Images lose their brightness and contrast, because a brighter copy is still a copy."""
    rows, is_picture = rows.double(), rows.dtype == torch.uint8
    return F.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1) if is_picture else rows


def _directions(rows: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Return unit vectors from the mean. From another origin, dull images would be near to every average face."""
    return F.normalize(_points(rows) - centre, dim=1)
