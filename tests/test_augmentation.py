"""The augmentation is compared with exact flips, shifts and rotations, and with images defined by a formula."""

import math

import numpy as np
import pytest
import torch

from ddpm_faces import DrawnFaces
from ddpm_faces.data.augmentation import AUGMENT_DIM, NonLeakingAugmentation


# The columns of `draw`, in the order of its documentation.
UNIFORM = ("flip_x", "flip_y", "do_scale", "do_rotate", "do_stretch", "do_translate", "has_axis", "angle", "axis")
NORMAL = ("scale", "stretch", "right", "down")
X_FLIP, Y_FLIP, SCALE, COS, SIN, STRETCH_X, STRETCH_Y, RIGHT, DOWN = range(AUGMENT_DIM)


def draws_of(**columns):
    """Return a row of draws. Other columns are 0.75, so at `probability` 0.5 their transformations are not applied."""
    return torch.tensor([[columns.get(name, 0.75) for name in (*UNIFORM, *NORMAL)]])


def turn(radians):
    """Return the uniform number of an angle in [-pi, pi)."""
    return (radians / math.pi + 1) / 2


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def wave(x, y):
    """Return the values of an image at points given in pixels from its centre. It is smooth enough for resampling."""
    return 0.5 * torch.sin(0.21 * x + 0.13 * y + 0.3) + 0.3 * torch.cos(0.05 * x - 0.17 * y)


def coordinates(height, width):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return x - (width - 1) / 2, y - (height - 1) / 2


def assert_wave(picture, x, y, inside):
    """Assert that an image equals the wave at points (x, y), except for those near or beyond the border."""
    height, width = picture.shape[-2:]
    inside = inside & (x.abs() < width / 2 - 2) & (y.abs() < height / 2 - 2)
    assert inside.float().mean() > 0.25
    torch.testing.assert_close(
        picture[..., inside], wave(x, y)[inside].expand_as(picture[..., inside]), atol=1.5e-2, rtol=0
    )


@pytest.fixture
def augmentation():
    return NonLeakingAugmentation(0.5)


# What each transformation does


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("column", "dim", "label"), [("flip_x", 3, X_FLIP), ("flip_y", 2, Y_FLIP)])
def test_flips_are_exact(augmentation, channels, column, dim, label):
    samples = noise(1, channels, 12, 10)
    flipped, labels = augmentation(samples, draws_of(**{column: 0.2}))
    assert torch.equal(flipped, samples.flip(dim))
    expected = torch.zeros(1, AUGMENT_DIM)
    expected[0, label] = 1
    assert torch.equal(labels, expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -5), (-4, 2), (20, 0)])
def test_translation_by_whole_pixels(augmentation, channels, right, down):
    height, width = 16, 24
    samples = noise(2, channels, height, width)
    draws = draws_of(do_translate=0, right=8 * right / width, down=8 * down / height)
    translated, labels = augmentation(samples, draws.expand(2, -1))
    # The translated image is a crop of the image and its reflection side by side.
    padded = np.pad(samples, ((0, 0), (0, 0), (height, height), (width, width)), mode="symmetric")
    expected = padded[:, :, height - down : 2 * height - down, width - right : 2 * width - right]
    torch.testing.assert_close(translated, torch.from_numpy(expected), atol=1e-4, rtol=0)
    expected_labels = torch.zeros(2, AUGMENT_DIM)
    expected_labels[:, RIGHT], expected_labels[:, DOWN] = 8 * right / width, 8 * down / height
    torch.testing.assert_close(labels, expected_labels)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("quarters", "cos", "sin"), [(1, 0, 1), (2, -1, 0), (-1, 0, -1)])
def test_rotation_by_quarter_turns(augmentation, channels, quarters, cos, sin):
    samples = noise(1, channels, 16, 16)
    angle = turn(quarters * math.pi / 2) % 1  # half a turn is -pi
    rotated, labels = augmentation(samples, draws_of(do_rotate=0, angle=angle))
    torch.testing.assert_close(rotated, samples.rot90(quarters, dims=(2, 3)), atol=1e-4, rtol=0)
    expected = torch.zeros(1, AUGMENT_DIM)
    expected[0, COS], expected[0, SIN] = cos - 1, sin
    torch.testing.assert_close(labels, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48), (48, 24)])
@pytest.mark.parametrize("degrees", [20, -75, 160])
def test_rotation_does_not_shear(augmentation, height, width, degrees):
    x, y = coordinates(height, width)
    rotated, labels = augmentation(wave(x, y)[None, None], draws_of(do_rotate=0, angle=turn(math.radians(degrees))))
    # With y upwards, the opposite rotation takes (x + iy) back to its source.
    origin = torch.complex(x, -y) * np.exp(-1j * math.radians(degrees))
    assert_wave(rotated[0], origin.real, -origin.imag, torch.ones_like(x, dtype=torch.bool))
    assert labels[0, COS].item() == pytest.approx(math.cos(math.radians(degrees)) - 1, abs=1e-6)
    assert labels[0, SIN].item() == pytest.approx(math.sin(math.radians(degrees)), abs=1e-6)


@pytest.mark.parametrize("factor", [0.75, 1.5])
def test_scale(augmentation, factor):
    x, y = coordinates(32, 40)
    scaled, labels = augmentation(wave(x, y)[None, None], draws_of(do_scale=0, scale=math.log2(factor) / 0.2))
    assert_wave(scaled[0], x / factor, y / factor, torch.ones_like(x, dtype=torch.bool))
    expected = torch.zeros(1, AUGMENT_DIM)
    expected[0, SCALE] = math.log2(factor) / 0.2
    torch.testing.assert_close(labels, expected)


@pytest.mark.parametrize("factor", [0.75, 1.5])
@pytest.mark.parametrize("degrees", [None, 90, 35, -120])
def test_stretch(augmentation, factor, degrees):
    x, y = coordinates(32, 40)
    draws = {"do_stretch": 0, "stretch": math.log2(factor) / 0.2}
    if degrees is not None:
        draws |= {"has_axis": 0, "axis": turn(math.radians(degrees))}
    stretched, labels = augmentation(wave(x, y)[None, None], draws_of(**draws))
    # Split a point into its components along and across the axis; y points down.
    along_x, along_y = math.cos(math.radians(degrees or 0)), -math.sin(math.radians(degrees or 0))
    along, across = x * along_x + y * along_y, y * along_x - x * along_y
    along, across = along / factor, across * factor
    origin_x, origin_y = along * along_x - across * along_y, along * along_y + across * along_x
    assert_wave(stretched[0], origin_x, origin_y, torch.ones_like(x, dtype=torch.bool))
    expected = torch.zeros(1, AUGMENT_DIM)
    expected[0, STRETCH_X] = math.log2(factor) / 0.2 * math.cos(math.radians(2 * (degrees or 0)))
    expected[0, STRETCH_Y] = math.log2(factor) / 0.2 * math.sin(math.radians(2 * (degrees or 0)))
    torch.testing.assert_close(labels, expected, atol=1e-5, rtol=0)


def test_labels_describe_every_transformation():
    # Follow the points of an image through all transformations in turn, as the labels describe them.
    augmentation = NonLeakingAugmentation(1.0)
    height, width = 48, 64
    x, y = coordinates(height, width)
    draws = augmentation.draw(24, torch.Generator().manual_seed(5))
    pictures, labels = augmentation(wave(x, y).expand(24, 1, -1, -1), draws)
    checked = 0
    for picture, label in zip(pictures, labels.double(), strict=True):
        points = torch.complex(x.double(), -y.double())
        points = points - torch.complex(label[RIGHT] * width / 8, -label[DOWN] * height / 8)
        stretch = torch.complex(label[STRETCH_X], label[STRETCH_Y])
        axis, factor = (stretch / stretch.abs()).sqrt(), 2 ** (0.2 * stretch.abs())
        points = points * axis.conj()
        points = torch.complex(points.real / factor, points.imag * factor) * axis
        points = points * torch.complex(label[COS] + 1, -label[SIN])
        points = points / 2 ** (0.2 * label[SCALE])
        inside = (points.real.abs() < width / 2 - 2) & (points.imag.abs() < height / 2 - 2)
        origin_x = torch.where(label[X_FLIP] == 1, -points.real, points.real)
        origin_y = torch.where(label[Y_FLIP] == 1, points.imag, -points.imag)
        error = (picture[0] - wave(origin_x, origin_y)).abs()[inside]
        assert error.max() < 1.5e-2
        checked += inside.sum()
    assert checked > 24 * height * width / 3


# Nothing drawn


def test_images_without_transformations_are_unchanged(augmentation):
    samples = noise(2, 3, 12, 16) * 3  # also out of range
    draws = draws_of().repeat(2, 1)
    draws[1, UNIFORM.index("do_rotate")] = 0.2  # next to an image that is transformed
    results, labels = augmentation(samples, draws)
    assert torch.equal(results[0], samples[0])
    assert not labels[0].any()
    assert not torch.equal(results[1], samples[1])
    assert labels[1].any()


def test_probability_zero_leaves_images_unchanged():
    augmentation = NonLeakingAugmentation(0)
    samples = noise(64, 1, 8, 8)
    results, labels = augmentation(samples, augmentation.draw(64))
    assert torch.equal(results, samples)
    assert not labels.any()
    assert torch.equal(augmentation(samples, torch.zeros(64, 13))[0], samples)  # the smallest numbers of all


# How often, and how much


@pytest.mark.parametrize("probability", [0.15, 0.6, 1.0])
def test_frequencies_and_magnitudes(probability):
    number = 40_000
    augmentation = NonLeakingAugmentation(probability)
    draws = augmentation.draw(number, torch.Generator().manual_seed(0))
    _, labels = augmentation(torch.zeros(number, 1, 1, 1), draws)
    done = {
        "x-flip": (labels[:, X_FLIP] != 0, 0.5),
        "y-flip": (labels[:, Y_FLIP] != 0, 0.5 * probability),
        "scale": (labels[:, SCALE] != 0, probability),
        "rotate": (labels[:, SIN] != 0, probability),
        "stretch": (labels[:, STRETCH_X : STRETCH_Y + 1].any(dim=1), probability),
        "translate": (labels[:, RIGHT : DOWN + 1].any(dim=1), probability),
    }
    for name, (happened, expected) in done.items():
        assert happened.double().mean().item() == pytest.approx(expected, abs=0.012), name
    # Independence: the frequency of two together is the product of both.
    names = list(done)
    for i, first in enumerate(names):
        for second in names[:i]:
            together = (done[first][0] & done[second][0]).double().mean().item()
            assert together == pytest.approx(done[first][1] * done[second][1], abs=0.012), (first, second)

    scale, stretch, translate = (done[name][0] for name in ("scale", "stretch", "translate"))
    strengths = labels[stretch, STRETCH_X : STRETCH_Y + 1].norm(dim=1)
    for values in (labels[scale, SCALE], labels[translate, RIGHT], labels[translate, DOWN]):
        assert values.mean().item() == pytest.approx(0, abs=0.06)
        assert values.std().item() == pytest.approx(1, abs=0.05)
    assert strengths.square().mean().item() == pytest.approx(1, abs=0.08)
    angles = torch.atan2(labels[:, SIN], labels[:, COS] + 1)[done["rotate"][0]]
    axes = torch.atan2(labels[:, STRETCH_Y], labels[:, STRETCH_X])[stretch & (labels[:, STRETCH_Y] != 0)]
    for values in (angles, axes):  # uniform over the circle
        counts = torch.histc(values, bins=8, min=-math.pi, max=math.pi) / len(values)
        torch.testing.assert_close(counts, torch.full((8,), 0.125), atol=0.025, rtol=0)
    assert (labels[stretch, STRETCH_Y] != 0).double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_draws():
    augmentation = NonLeakingAugmentation(0.3)
    draws = augmentation.draw(30_000, torch.Generator().manual_seed(0))
    assert draws.shape == (30_000, augmentation.num_random)
    assert draws.dtype == torch.float32
    uniform, normal = draws[:, : len(UNIFORM)], draws[:, len(UNIFORM) :]
    assert uniform.min() >= 0
    assert uniform.max() < 1
    torch.testing.assert_close(uniform.mean(dim=0), torch.full((9,), 1 / 2), atol=0.01, rtol=0)
    torch.testing.assert_close(uniform.var(dim=0), torch.full((9,), 1 / 12), atol=0.01, rtol=0)
    torch.testing.assert_close(normal.mean(dim=0), torch.zeros(4), atol=0.03, rtol=0)
    torch.testing.assert_close(normal.std(dim=0), torch.ones(4), atol=0.03, rtol=0)


def test_generator_determines_the_draws():
    augmentation = NonLeakingAugmentation(0.5)
    first, again, other = (augmentation.draw(8, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    samples = noise(8, 3, 16, 16)
    results = [augmentation(samples, first) for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(torch.get_rng_state(), state)  # neither has used the global generator


# Images


def test_rows_are_independent():
    augmentation = NonLeakingAugmentation(0.7)
    samples = noise(6, 3, 16, 20)
    draws = augmentation.draw(6, torch.Generator().manual_seed(2))
    results, labels = augmentation(samples, draws)
    for rows in ([0], [3], [4, 1], [5, 4, 3, 2, 1, 0]):
        some_results, some_labels = augmentation(samples[rows], draws[rows])
        torch.testing.assert_close(some_results, results[rows], atol=1e-4, rtol=0)
        torch.testing.assert_close(some_labels, labels[rows], atol=1e-6, rtol=0)


def test_results_stay_in_range():
    augmentation = NonLeakingAugmentation(1.0)
    checkers = noise(64, 3, 16, 16).sign()
    results, labels = augmentation(checkers, augmentation.draw(64, torch.Generator().manual_seed(0)))
    assert results.shape == checkers.shape
    assert labels.shape == (64, AUGMENT_DIM)
    assert results.dtype == labels.dtype == torch.float32
    assert results.abs().max() <= 1


def test_faces_stay_sharp():
    # The expected images: large ones, rotated first and downscaled afterwards.
    augmentation = NonLeakingAugmentation(0.5)
    large = np.stack([np.asarray(face["image"]) for face in DrawnFaces(4, resolution=512)])
    large = torch.from_numpy(large).permute(0, 3, 1, 2).float() / 127.5 - 1
    draws = draws_of(do_rotate=0, angle=turn(math.radians(30)), do_translate=0, right=0.37, down=-0.61).repeat(4, 1)
    expected = torch.nn.functional.avg_pool2d(augmentation(large, draws)[0], 8)
    actual, _ = augmentation(torch.nn.functional.avg_pool2d(large, 8), draws)
    psnr = -10 * (actual - expected).square().mean().div(4).log10().item()
    assert psnr > 34
    detail_expected, detail_actual = (x.diff(dim=-1).square().mean() for x in (expected, actual))
    assert detail_actual / detail_expected == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    augmentation = NonLeakingAugmentation(1.0)
    samples, draws = noise(4, 3, 32, 32), augmentation.draw(4)
    expected, expected_labels = augmentation(samples, draws)
    with torch.autocast("cpu", dtype):
        results, labels = augmentation(samples, draws)
    assert torch.equal(results, expected)
    assert torch.equal(labels, expected_labels)
    assert results.dtype == labels.dtype == torch.float32


# The meta device has no values, so it fails on `.item()` or on a mask as an index, which would wait for a GPU.
def test_runs_on_the_meta_device():
    augmentation = NonLeakingAugmentation(0.5)
    draws = augmentation.draw(4, device="meta")
    results, labels = augmentation(torch.empty(4, 3, 16, 16, device="meta"), draws)
    assert results.device.type == labels.device.type == "meta"
    assert results.shape == (4, 3, 16, 16)
    assert labels.shape == (4, AUGMENT_DIM)


# Bad input


@pytest.mark.parametrize("probability", [-0.1, 1.01, math.nan])
def test_bad_probability(probability):
    with pytest.raises(ValueError, match=rf"`probability` must lie in \[0, 1\], got {probability}"):
        NonLeakingAugmentation(probability)


def test_bad_shapes(augmentation):
    with pytest.raises(ValueError, match=r"\(batch, channels, height, width\), got \(3, 16, 16\)"):
        augmentation(torch.zeros(3, 16, 16), augmentation.draw(3))
    for draws in (augmentation.draw(3), torch.zeros(2, 12), torch.zeros(13)):
        with pytest.raises(ValueError, match=r"`draws` must be of shape \(2, 13\), got"):
            augmentation(torch.zeros(2, 3, 16, 16), draws)
