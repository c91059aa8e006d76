import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddpm_faces.plots import image_grid, labelled_strip, loss_curve, side_by_side


def tile(value: int, size: tuple[int, int] = (4, 3)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def test_grid_is_in_reading_order():
    grid = np.asarray(image_grid([tile(value) for value in (10, 20, 30, 40, 50)], columns=3, scale=2, gap=1))[..., 0]
    assert grid.shape == (2 * 6 + 1, 3 * 8 + 2)
    assert grid[[0, 0, 0, 7, 7], [0, 9, 18, 0, 9]].tolist() == [10, 20, 30, 40, 50]
    assert (grid[6] == 255).all()  # the gap
    assert (grid[7:, 18:] == 255).all()  # no sixth image


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (4, 2), (5, 3), (16, 4)])
def test_grid_is_square_or_wider(count, columns):
    assert image_grid([tile(0)] * count, gap=0).width == columns * 4


@pytest.mark.parametrize(
    ("images", "message"),
    [([], "at least one"), ([tile(0), tile(0, (4, 4))], r"have the same size, got \[\(4, 3\), \(4, 4\)")],
)
def test_grid_of_bad_input(images, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images)


def test_strip_has_a_row_per_face(tmp_path):
    for rows in (1, 3):
        labelled_strip([[tile(0)] * 4] * rows, list("abcd"), tmp_path / f"{rows}.png")
    one, three = (Image.open(tmp_path / f"{rows}.png").size for rows in (1, 3))
    assert one[0] == three[0]
    assert three[1] > 2 * one[1]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        labelled_strip([[tile(0)] * 2], list("abc"), tmp_path / "uneven.png")


def test_loss_curve_is_drawn_from_one_entry_on(tmp_path):
    for count in (1, 100):
        loss_curve(range(count), [1.0 / (i + 1) for i in range(count)], tmp_path / f"{count}.png")
        assert len(np.unique(np.asarray(Image.open(tmp_path / f"{count}.png")))) > 10


def test_grids_side_by_side_under_their_names():
    grids = {name: Image.new("RGB", (40, 30), name) for name in ("red", "blue")}
    picture = side_by_side(grids, margin=10)
    assert picture.size == (90, 48)
    assert picture.getpixel((0, 47)) == (255, 0, 0)
    assert picture.getpixel((89, 47)) == (0, 0, 255)
    assert picture.getpixel((45, 47)) == (255, 255, 255)
    assert side_by_side({"red": grids["red"]}) is grids["red"]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_loss_curve_does_not_depend_on_the_backend_of_a_notebook(tmp_path, backend):
    code = f"from ddpm_faces.plots import loss_curve; loss_curve([1, 2], [1.0, 0.5], {str(tmp_path / 'curve.png')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "MPLBACKEND": backend})
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size[0] > 100
