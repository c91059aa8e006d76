"""Plots of results: image grids, denoising strips, loss curves."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw


def image_grid(images: Sequence[Image.Image], columns: int | None = None, scale: int = 1, gap: int = 2) -> Image.Image:
    """Arrange images of the same size in a grid.

    Args:
        images (`list[PIL.Image.Image]`): At least one image, all of the same size.
        columns (`int`, *optional*): Images in a row; by default, as many as rows or one more.
        scale (`int`, defaults to 1): Factor by which each pixel is enlarged.
        gap (`int`, defaults to 2): White pixels between the images.

    Raises:
        ValueError: There are no images, or they differ in size.
    """
    if not images:
        raise ValueError("`images` must contain at least one image.")
    if len({image.size for image in images}) > 1:
        raise ValueError(f"`images` must have the same size, got {sorted({image.size for image in images})}.")
    columns = columns or next(n for n in range(1, len(images) + 1) if n * n >= len(images))
    rows = -(-len(images) // columns)
    width, height = (side * scale for side in images[0].size)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        image = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        grid.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return grid


def labelled_strip(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], path: str | os.PathLike, title: str | None = None
) -> None:
    """Save rows of images under one line of labels, such as the timesteps of a denoising run.

    Args:
        rows (`list[list[PIL.Image.Image]]`): Rows of images, each as long as `labels`.
        labels (`list[str]`): Label of each column.
        path (`str` or `os.PathLike`): File to write.
        title (`str`, *optional*): Title above the labels.
    """
    plt = _pyplot()
    fig, axes = plt.subplots(
        len(rows), len(labels), squeeze=False, figsize=(1.2 * len(labels), 1.2 * len(rows) + (0.6 if title else 0.3))
    )
    for row_axes, row in zip(axes, rows, strict=True):
        for axis, image in zip(row_axes, row, strict=True):
            axis.imshow(image.convert("RGB"), interpolation="nearest")
            axis.set_axis_off()
    for axis, label in zip(axes[0], labels, strict=True):
        axis.set_title(label, fontsize=9)
    if title:
        fig.suptitle(title, fontsize=11)
    fig.tight_layout(pad=0.4)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def labelled_rows(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], scale: int = 1, label_width: int = 180
) -> Image.Image:
    """Arrange rows of images, each beside its label, such as the prompt of these images.

    Args:
        rows (`list[list[PIL.Image.Image]]`): Rows of images, all of the same size.
        labels (`list[str]`): Label of each row. Long ones are broken into lines.
        scale (`int`, defaults to 1): Factor by which each pixel is enlarged.
        label_width (`int`, defaults to 180): Width of the labels in pixels.
    """
    grids = [image_grid(row, columns=len(row), scale=scale) for row in rows]
    height = grids[0].height + 2
    canvas = Image.new("RGB", (label_width + grids[0].width, len(grids) * height - 2), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (grid, label) in enumerate(zip(grids, labels, strict=True)):
        canvas.paste(grid, (label_width, i * height))
        text = "\n".join(textwrap.wrap(label, width=label_width // 8))
        draw.text(
            (label_width - 10, i * height + grid.height / 2), text, "black", anchor="rm", align="right", font_size=14
        )
    return canvas


def side_by_side(grids: Mapping[str, Image.Image], margin: int = 12) -> Image.Image:
    """Arrange grids side by side, each under its name. A single grid is returned unchanged.

    Args:
        grids (`dict[str, PIL.Image.Image]`): At least one grid, by name.
        margin (`int`, defaults to 12): White pixels between the grids.
    """
    if len(grids) == 1:
        return next(iter(grids.values()))
    title_height = 18
    width = sum(grid.width + margin for grid in grids.values()) - margin
    canvas = Image.new("RGB", (width, title_height + max(grid.height for grid in grids.values())), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for name, grid in grids.items():
        draw.text((left + 2, 2), name, fill="black", font_size=12)
        canvas.paste(grid, (left, title_height))
        left += grid.width + margin
    return canvas


def loss_curve(
    images_seen: Sequence[int],
    losses: Sequence[float],
    path: str | os.PathLike,
    held_out: tuple[Sequence[int], Sequence[float]] | None = None,
) -> None:
    """Plot the loss and its running mean over the images seen.

    Args:
        images_seen (`list[int]`): Images seen at each log entry, ascending.
        losses (`list[float]`): Mean loss since the previous entry.
        path (`str` or `os.PathLike`): File to write.
        held_out (`(list[int], list[float])`, *optional*): Images seen and held-out loss at each validation.
    """
    plt = _pyplot()
    window = max(len(losses) // 20, 1)
    fig, axis = plt.subplots(figsize=(6.4, 3.6))
    if window == 1:
        axis.plot(images_seen, losses, color="C0", linewidth=1.8, label="loss")
    else:
        smooth = [sum(losses[max(i - window + 1, 0) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        axis.plot(images_seen, losses, color="0.75", linewidth=1, label="loss")
        axis.plot(images_seen, smooth, color="C0", linewidth=1.8, label=f"mean of the last {window} entries")
    if held_out is not None and len(held_out[0]):
        axis.plot(*held_out, color="C1", linewidth=1.4, marker="o", markersize=4, label="held-out images")
    # Without a limit, the high losses at the start would flatten the rest of the curve.
    axis.set_ylim(0, min(1.05 * max(losses), 4 * losses[-1]))
    axis.set_xlabel("images seen")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(Path(path), dpi=120)
    plt.close(fig)


def _pyplot():
    # The Agg backend writes files without a screen. A notebook's MPLBACKEND may name a backend that is not installed,
    # and matplotlib could not even be imported.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend

    return plt
