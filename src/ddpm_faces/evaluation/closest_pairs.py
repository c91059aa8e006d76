"""The image of an audit: the closest pairs of faces and training images."""

import math

import torch
from PIL import Image, ImageDraw

from ..checks import check_integer
from ..plots import image_grid
from .audit_report import AuditReport, Pair


NUM_PAIRS = 32  # the closest pairs that a report keeps
_COLUMNS, _MIN_SIDE, _GAP, _FONT_SIZE = 4, 96, 12, 16  # pairs in a row, pixels


def closest_pairs_picture(
    report: AuditReport, samples: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor, num_pairs: int = 8
) -> Image.Image:
    """Draw the closest pairs of each space, of the generated faces and, for comparison, of the held-out faces.

    Args:
        report ([`AuditReport`]): Report of [`audit`] on these images.
        samples (`torch.Tensor` of shape `(num_samples, 3, height, width)`, `torch.uint8`): Generated faces.
        train (`torch.Tensor` of shape `(num_train, 3, height, width)`, `torch.uint8`): Training images.
        held_out (`torch.Tensor` of shape `(num_held_out, 3, height, width)`, `torch.uint8`): Held-out faces.
        num_pairs (`int`, defaults to 8): Number of pairs of each kind, 1 to 32.

    Returns:
        `PIL.Image.Image`: Four pairs in a row. Each shows the face on the left, its nearest training image on the
        right (mirrored if the mirror image is nearer), and the relative distance below.

    Raises:
        ValueError: The images do not match the report, or `num_pairs` is out of range.
    """
    check_integer("num_pairs", num_pairs, 1, NUM_PAIRS)
    sides = (("samples", samples, report.num_samples), ("train", train, report.num_train))
    for name, images, number in (*sides, ("held_out", held_out, report.num_held_out)):
        check_images(name, images)
        if images.shape != (number, 3, *report.image_size):
            raise ValueError(
                f"`{name}` must be the images of `report`, of shape {(number, 3, *report.image_size)}, got "
                f"{tuple(images.shape)}."
            )
    blocks = []
    for space in report.spaces:
        for kind, faces, pairs in (("generated", samples, space.pairs), ("held-out", held_out, space.held_out_pairs)):
            title = f"by {space.name}: {kind} | nearest training image"
            blocks.append(_block(title, faces, train, pairs[:num_pairs]))
    picture = Image.new("RGB", (max(block.width for block in blocks), sum(block.height for block in blocks)), "white")
    top = 0
    for block in blocks:
        picture.paste(block, (0, top))
        top += block.height
    return picture


def _block(title: str, faces: torch.Tensor, train: torch.Tensor, pairs: list[Pair]) -> Image.Image:
    """Draw rows of pairs under a title."""
    tiles = []
    for pair in pairs:
        original = train[pair.train_index]
        both = (faces[pair.index], original.flip(-1) if pair.is_mirrored else original)
        images = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in both]
        tiles.append(image_grid(images, columns=2, scale=-(-_MIN_SIDE // min(images[0].size)), gap=2))
    width, height = tiles[0].width + _GAP, tiles[0].height + _FONT_SIZE + _GAP  # of a tile with its label
    columns, rows = min(_COLUMNS, len(tiles)), -(-len(tiles) // _COLUMNS)
    top = _FONT_SIZE + 2 * _GAP
    title_width = math.ceil(ImageDraw.Draw(tiles[0]).textlength(title, font_size=_FONT_SIZE))
    block = Image.new("RGB", (max(columns * width, title_width + _GAP) + _GAP, top + rows * height), "white")
    draw = ImageDraw.Draw(block)
    draw.text((_GAP, top - _GAP / 2), title, fill="black", font_size=_FONT_SIZE, anchor="ls")
    for i, (pair, tile) in enumerate(zip(pairs, tiles, strict=True)):
        corner = _GAP + i % _COLUMNS * width, top + i // _COLUMNS * height
        block.paste(tile, corner)
        label = f"{pair.relative_distance:.2f}{', mirrored' if pair.is_mirrored else ''}"
        middle = corner[0] + tile.width / 2, corner[1] + tile.height + 4
        draw.text(middle, label, fill="black", font_size=_FONT_SIZE, anchor="mt")
    return block


def check_images(name: str, images: torch.Tensor) -> None:
    """Raise a `ValueError` that names the argument unless it is `torch.uint8` of `(num, 3, height, width)`."""
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor of images, got {type(images).__name__}.")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"`{name}` must be of type uint8 and shape (num, 3, height, width), got {images.dtype} and "
            f"{tuple(images.shape)}."
        )
