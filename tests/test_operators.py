"""Operators against their explicit matrices in float64, where linear algebra says what is right."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_faces.operators_ddpm_faces import (
    Blur,
    Downsample,
    GaussianBlur,
    Gray,
    Inpaint,
    LinearOperator,
    PhysicsOperator,
    motion_kernel,
)


SHAPE = (3, 8, 12)


def a_mask(shape: tuple[int, int] = SHAPE[1:]) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6


OPERATORS = {
    "inpaint": lambda: Inpaint(a_mask()),
    "average": lambda: Downsample(4, SHAPE),
    "bicubic": lambda: Downsample(2, SHAPE, "bicubic"),
    "gray": lambda: Gray(SHAPE),
    "gaussian": lambda: GaussianBlur(0.6, SHAPE),
    "motion": lambda: Blur(motion_kernel(3, 30), SHAPE),
    "any kernel": lambda: Blur(torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) + 0.1, SHAPE),
    "gray of bicubic": lambda: Gray((3, 4, 6)) @ Downsample(2, SHAPE, "bicubic"),
    "average of gaussian": lambda: Downsample(2, SHAPE) @ GaussianBlur(0.8, SHAPE),
    "mask of gray": lambda: Inpaint(a_mask(), num_channels=1) @ Gray(SHAPE),
    "gray of mask": lambda: Gray(SHAPE) @ Inpaint(a_mask()),
    "motion of gray": lambda: Blur(motion_kernel(3, 80), (1, 8, 12)) @ Gray(SHAPE),
    "two motions": lambda: Blur(motion_kernel(3, 10), SHAPE) @ Blur(motion_kernel(2, 80), SHAPE),
    "two masks": lambda: Inpaint(a_mask()) @ Inpaint(torch.eye(8, 12)),
}


def images(count: int = 2, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_of(operator: LinearOperator) -> torch.Tensor:
    """Apply the operator to each unit image. The columns of the matrix are the results."""
    size = torch.Size(operator.image_shape).numel()
    units = torch.eye(size, dtype=torch.float64).view(size, *operator.image_shape)
    return operator(units).flatten(1).T


def applied(matrix: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return (x.flatten(1) @ matrix.T).view(len(x), *shape)


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint_inverse_and_proximal_step_are_those_of_the_matrix(name):
    operator = OPERATORS[name]()
    matrix, x = matrix_of(operator), images()
    y = images(shape=operator.output_shape, seed=1)
    torch.testing.assert_close(operator(x), applied(matrix, x, operator.output_shape))
    torch.testing.assert_close(operator.adjoint(y), applied(matrix.T, y, SHAPE))

    inverse = torch.linalg.pinv(matrix, rtol=1e-3)
    torch.testing.assert_close(operator.pseudo_inverse(y), applied(inverse, y, SHAPE))
    corrected = x + applied(inverse, y - operator(x), SHAPE)
    torch.testing.assert_close(operator.proximal(x, y, 0.0), corrected)

    for ratio in (0.03, 2.0):  # the normal equations
        normal = matrix.T @ matrix + ratio * torch.eye(matrix.shape[1], dtype=torch.float64)
        right = applied(matrix.T, y, SHAPE) + ratio * x
        expected = torch.linalg.solve(normal, right.flatten(1).T).T.view_as(x)
        torch.testing.assert_close(operator.proximal(x, y, ratio), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_observation_is_explained_exactly_in_float32(name):
    operator = OPERATORS[name]()
    truth, guess = (images(seed=seed).clamp(-1, 1).float() for seed in (2, 3))
    y = operator(truth)
    result = operator.proximal(guess, y, 0.0)
    assert result.dtype == y.dtype == torch.float32
    assert (operator(result) - y).abs().max() < 1e-3


def test_known_pixels_are_the_same_to_the_bit():
    operator, x, y = Inpaint(a_mask()), images().float(), images(seed=1).float()
    result = operator.proximal(x, y, 0.0)
    missing = a_mask().expand_as(x)
    assert (result[~missing] == y[~missing]).all()
    assert (result[missing] == x[missing]).all()


def test_average_is_the_mean_of_blocks():
    x = images()
    torch.testing.assert_close(Downsample(4, SHAPE)(x), torch.nn.functional.avg_pool2d(x, 4))


def test_bicubic_reduces_as_pil():
    pixels = torch.rand(16, 24, generator=torch.Generator().manual_seed(0))
    expected = Image.fromarray(pixels.numpy()).resize((6, 4), Image.Resampling.BICUBIC)
    result = Downsample(4, (1, 16, 24), "bicubic")(pixels[None, None])
    torch.testing.assert_close(result[0, 0], torch.tensor(np.asarray(expected)), atol=1e-5, rtol=0)


def test_gray_is_that_of_pil():
    colors = torch.randint(0, 256, (3, 8, 12), generator=torch.Generator().manual_seed(0))
    expected = Image.fromarray(colors.permute(1, 2, 0).byte().numpy()).convert("L")
    result = Gray(SHAPE)(colors[None].float())
    assert (result.flatten() - torch.tensor(np.asarray(expected)).flatten()).abs().max() <= 0.51  # which rounds


def test_gaussian_blur_is_that_of_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    x = images(1)
    expected = ndimage.gaussian_filter(x[0].numpy(), 1.5, mode="reflect", axes=(1, 2), truncate=4)
    torch.testing.assert_close(GaussianBlur(1.5, SHAPE)(x)[0], torch.from_numpy(expected))


def test_blur_is_the_convolution_of_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    x, kernel = images(1, (1, 8, 12)), torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).double()
    expected = ndimage.convolve(x[0, 0].numpy(), (kernel / kernel.sum()).numpy(), mode="wrap")
    torch.testing.assert_close(Blur(kernel, (1, 8, 12))(x)[0, 0], torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("length", "angle", "size", "extent"), [(1, 0, 3, (1, 3)), (5, 0, 7, (1, 7)), (5, 90, 7, (7, 1))]
)
def test_motion_is_a_line(length, angle, size, extent):
    kernel = motion_kernel(length, angle)
    assert kernel.shape == (size, size)
    assert abs(kernel.sum() - 1) < 1e-12
    rows, columns = (kernel.sum(dim=1) > 1e-9).sum(), (kernel.sum(dim=0) > 1e-9).sum()
    assert rows <= extent[0]
    assert columns <= extent[1]
    torch.testing.assert_close(kernel, kernel.flip(0, 1))


class Physics:
    """What deepinv.physics.LinearPhysics does, for images in [0, 1]: here a matrix."""

    def __init__(self) -> None:
        self.matrix = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def A(self, x):  # noqa: N802
        return x.double().flatten(1) @ self.matrix.T

    def A_adjoint(self, y):  # noqa: N802
        return (y.flatten(1) @ self.matrix).view(-1, 1, 3, 4)

    def A_dagger(self, y):  # noqa: N802
        return (y.flatten(1) @ torch.linalg.pinv(self.matrix).T).view(-1, 1, 3, 4)

    def prox_l2(self, z, y, gamma):
        normal = gamma * self.matrix.T @ self.matrix + torch.eye(12).double()
        right = gamma * self.A_adjoint(y) + z
        return torch.linalg.solve(normal, right.flatten(1).T).T.view_as(z)


def test_operator_of_deepinv():
    physics = Physics()
    operator = PhysicsOperator(physics, (1, 3, 4))
    assert operator.output_shape == (5,)
    x, y = images(2, (1, 3, 4)), images(2, (5,), seed=1)
    torch.testing.assert_close(matrix_of(operator), physics.matrix)
    torch.testing.assert_close(operator(operator.proximal(x, y, 0.0)), y)
    z, ratio = operator.proximal(x, y, 0.3), 0.3
    gradient = operator.adjoint(operator(z) - y) + ratio * (z - x)
    assert gradient.abs().max() < 1e-9
    of_unit_range = physics.A(x / 2 + 0.5)
    torch.testing.assert_close(operator.from_unit_range(of_unit_range), operator(x))


class ListPhysics(Physics):
    """What stacked physics do."""

    def A(self, x):  # noqa: N802
        return [super().A(x)] * 2


def test_a_mask_may_be_an_image():
    mask = a_mask()
    pixels = Image.fromarray(mask.numpy().astype("uint8") * 255)
    for image in (pixels, pixels.convert("RGB"), pixels.convert("1")):
        assert torch.equal(Inpaint(image).is_missing, mask.bool())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Inpaint("mask.png"), "`mask` must be an image or a tensor, got str"),
        (lambda: Inpaint(Image.new("L", (8, 8), 128)), "values from 0.501961 to 0.501961"),
        (lambda: Inpaint(torch.zeros(8, 8)), "all are known"),
        (lambda: Inpaint(torch.ones(8, 8)), "all are missing"),
        (lambda: Inpaint(torch.full((8, 8), 0.5)), "values from 0.5 to 0.5"),
        (lambda: Inpaint(torch.zeros(2, 8, 8)), r"`mask` must be of shape \(height, width\)"),
        (lambda: Downsample(3, SHAPE), "`factor` must be an integer from 2 to 64 that divides"),
        (lambda: Downsample(1, SHAPE), "got 1"),
        (lambda: Downsample(2.0, SHAPE), "got 2.0"),
        (lambda: Downsample(2, SHAPE, "nearest"), "`method` must be"),
        (lambda: Downsample(2, (3, 8)), "`image_shape` must be three positive integers"),
        (lambda: Gray((1, 8, 8)), "3 channels, got 1"),
        (lambda: GaussianBlur(0, SHAPE), "`sigma` must be a positive number of at most 2"),
        (lambda: GaussianBlur(5.0, SHAPE), "got 5.0"),
        (lambda: Blur(torch.ones(9, 3), SHAPE), "not larger than the image"),
        (lambda: Blur(torch.zeros(3, 3), SHAPE), "whose sum is not 0"),
        (lambda: Blur(torch.tensor([[1.0, float("nan")]]), SHAPE), "finite"),
        (lambda: motion_kernel(0.5, 0), "`length` must be a number from 1 to 500, got 0.5"),
        (lambda: motion_kernel(5, float("nan")), "`angle` must be a number of degrees, got nan"),
        (lambda: Gray(SHAPE) @ Downsample(2, SHAPE), r"makes images of the shape \(3, 4, 6\)"),
        (lambda: Downsample(2, SHAPE) @ Inpaint(a_mask()), "Restore in two calls"),
        (lambda: Blur(motion_kernel(3, 0), SHAPE) @ GaussianBlur(1.0, SHAPE), "no closed form"),
        (lambda: PhysicsOperator(object(), SHAPE), "object has no A"),
        (lambda: PhysicsOperator(Physics(), (1, 4, 4)), "does not take images of the shape"),
        (lambda: PhysicsOperator(ListPhysics(), (1, 3, 4)), "one tensor of each image, but it makes a list"),
        (lambda: PhysicsOperator(Physics(), (1, 3, 4)).adjoint(images(2, (4,))), r"`y` must be of shape \(batch, 5\)"),
        (lambda: Gray(SHAPE)(torch.zeros(3, 8, 12)), r"`x` must be of shape \(batch, 3, 8, 12\)"),
        (lambda: Gray(SHAPE).adjoint(images()), r"`y` must be of shape \(batch, 1, 8, 12\)"),
        (lambda: Gray(SHAPE).proximal(images(), images(shape=(1, 8, 12)), -1.0), "`ratio` must be at least 0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
