# Copyright 2026 The ddpm-faces authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What happened to an image that is to be restored: linear operators A with y = A x.

Restoration needs four things of an operator: A itself, its adjoint, its pseudo-inverse, and the proximal step. All of
them are exact and cheap where the singular value decomposition A = U diag(s) V^H is known. A mask has it in the pixels
themselves, a convolution in the Fourier domain, and an operator that acts on channels, rows and columns separately in
the decompositions of three small matrices.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image


RCOND = 1e-3  # singular values below this part of the largest count as 0 in the pseudo-inverse
ROUNDING = 1 / (255 * math.sqrt(3))  # standard deviation of the rounding to 8 bits, for values in [-1, 1]
GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in PIL's conversion to "L"
MAX_FACTOR, MAX_KERNEL = 64, 511
# The operation that turns an image upright, by its EXIF orientation (1 is upright already).
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class LinearOperator:
    """A linear map from images x to observations y.

    x are tensors of shape `(batch, channels, height, width)` in [-1, 1], and y are tensors of shape
    `(batch, *output_shape)`.

    Args:
        image_shape (`tuple[int, int, int]`): Channels, height and width of x.
    """

    def __init__(self, image_shape: Sequence[int]) -> None:
        shape = tuple(image_shape)
        if len(shape) != 3 or not all(type(length) is int and length > 0 for length in shape):
            raise ValueError(
                f"`image_shape` must be three positive integers (channels, height, width), got {image_shape!r}."
            )
        self.image_shape: tuple[int, ...] = shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one y: channels, height and width, if it is an image."""
        raise NotImplementedError

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return A x.

        Raises:
            ValueError: `x` is not of shape `(batch, *image_shape)`.
        """
        raise NotImplementedError

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """Return A^T y.

        Raises:
            ValueError: `y` is not of shape `(batch, *output_shape)`.
        """
        raise NotImplementedError

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        """Return A^+ y, the image of the least norm among those for which A x is the closest to y.

        Raises:
            ValueError: `y` is not of shape `(batch, *output_shape)`.
        """
        raise NotImplementedError

    def proximal(self, x: torch.Tensor, y: torch.Tensor, ratio: float) -> torch.Tensor:
        """Return the image z with the least |A z - y|^2 + ratio |z - x|^2, which is near `x` and explains `y`.

        Args:
            x (`torch.Tensor` of shape `(batch, *image_shape)`): The image to stay close to.
            y (`torch.Tensor` of shape `(batch, *output_shape)`): The observation.
            ratio (`float`):
                Variance of the noise of `y`, divided by that of the error of `x`. With 0, the result is
                x + A^+ (y - A x), the image closest to `x` that explains `y` exactly.

        Raises:
            ValueError: A tensor is not of its shape, or `ratio` is negative.
        """
        raise NotImplementedError

    def _check(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape[1:]) != shape:
            allowed = ", ".join(map(str, shape))
            raise ValueError(f"`{name}` must be of shape (batch, {allowed}), got {tuple(tensor.shape)}.")


class SpectralOperator(LinearOperator):
    """An operator with a known singular value decomposition.

    It acts on the channels by a matrix, and on all channels alike by a `_Spatial` part.
    """

    def __init__(self, image_shape: Sequence[int], channels: torch.Tensor | None, spatial: "_Spatial") -> None:
        super().__init__(image_shape)
        self._matrix = torch.eye(self.image_shape[0]).double() if channels is None else channels.double()
        self._spatial = spatial
        left, values, right = torch.linalg.svd(self._matrix, full_matrices=False)
        self._channels_out, self._channel_values, self._channels_in = left, values, right

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self._matrix.shape[0], *self._spatial.output_size)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._check("x", x, self.image_shape)
        return self._leave(self._enter(x) * self._values(x), x)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        self._check("y", y, self.output_shape)
        return self._back(self._observed(y) * self._values(y).conj(), y)

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        self._check("y", y, self.output_shape)
        return self._back(self._observed(y) * self._inverse(y, 0.0), y)

    def proximal(self, x: torch.Tensor, y: torch.Tensor, ratio: float) -> torch.Tensor:
        self._check("x", x, self.image_shape)
        self._check("y", y, self.output_shape)
        if not ratio >= 0:
            raise ValueError(f"`ratio` must be at least 0, got {ratio}.")
        return x + self._back((self._observed(y) - self._enter(x) * self._values(x)) * self._inverse(x, ratio), x)

    def __matmul__(self, other: "SpectralOperator") -> "SpectralOperator":
        """Return the operator that applies `other` first, and then this one.

        Raises:
            ValueError: The shapes do not fit, or the decomposition of the composition is not known.
        """
        if not isinstance(other, SpectralOperator):
            return NotImplemented
        if self.image_shape != other.output_shape:
            raise ValueError(
                f"The first operator makes images of the shape {other.output_shape}, the second one takes "
                f"{self.image_shape}."
            )
        spatial = self._spatial.after(other._spatial)
        if spatial is None:
            raise ValueError(
                f"The composition of {self._spatial.name} and {other._spatial.name} has no closed form. Restore in "
                "two calls."
            )
        return SpectralOperator(other.image_shape, self._matrix @ other._matrix, spatial)

    # x = V c, y = U d. The spectra c and d are of shape (batch, channels, ...).
    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        return self._spatial.enter(_mix(self._channels_in, x))

    def _back(self, spectrum: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return _mix(self._channels_in.T, self._spatial.back(spectrum)).to(like.dtype)

    def _observed(self, y: torch.Tensor) -> torch.Tensor:
        return self._spatial.observed(_mix(self._channels_out.T, y))

    def _leave(self, spectrum: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return _mix(self._channels_out, self._spatial.leave(spectrum)).to(like.dtype)

    def _values(self, like: torch.Tensor) -> torch.Tensor:
        values = self._channel_values.view(-1, 1, 1) * self._spatial.values
        dtype = torch.promote_types(like.dtype, torch.complex64) if values.is_complex() else like.dtype
        return values.to(dtype).to(like.device)  # in this order, because some devices have no float64

    def _inverse(self, like: torch.Tensor, ratio: float) -> torch.Tensor:
        """Return conj(s) / (|s|^2 + ratio), or 1 / s where that is not too small."""
        values = self._values(like)
        magnitudes = values.abs()
        if ratio > 0:
            return values.conj() / (magnitudes**2 + ratio)
        is_large = magnitudes > RCOND * magnitudes.max()
        return torch.where(is_large, values.conj() / torch.where(is_large, magnitudes, 1) ** 2, 0)


class _Spatial:
    """The part of an operator that acts on each channel alike: `leave(values * enter(x))`.

    `enter` and `observed` are the transposes of unitary `back` and `leave`.
    """

    name: str
    values: torch.Tensor  # singular values, float64 or complex128, broadcastable to (channels, ...)
    output_size: tuple[int, int]

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def back(self, spectrum: torch.Tensor) -> torch.Tensor:
        return spectrum

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def leave(self, spectrum: torch.Tensor) -> torch.Tensor:
        return spectrum

    def after(self, first: "_Spatial") -> "_Spatial | None":
        """Return the composition with a part that is applied before this one, or `None` if it has no closed form."""
        if isinstance(first, _Mask) and first.is_identity:
            return self
        return None


class _Mask(_Spatial):
    """Keep some pixels."""

    name = "a mask"

    def __init__(self, mask: torch.Tensor) -> None:
        self.values = mask.double()
        self.output_size = (mask.shape[-2], mask.shape[-1])
        self.is_identity = bool((mask == 1).all())

    def after(self, first: _Spatial) -> _Spatial | None:
        if self.is_identity:
            return first
        return _Mask(self.values * first.values) if isinstance(first, _Mask) else None


class _Separable(_Spatial):
    """Multiply the rows and the columns of pixels by a matrix each: y = rows x columns^T."""

    name = "resizing or Gaussian blur"

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        self.rows, self.columns = rows.double(), columns.double()
        self.output_size = (rows.shape[0], columns.shape[0])
        self._rows, self._columns = (
            torch.linalg.svd(matrix, full_matrices=False) for matrix in (self.rows, self.columns)
        )
        self.values = self._rows.S[:, None] * self._columns.S

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return self._rows.Vh.to(x) @ x @ self._columns.Vh.T.to(x)

    def back(self, spectrum: torch.Tensor) -> torch.Tensor:
        return self._rows.Vh.T.to(spectrum) @ spectrum @ self._columns.Vh.to(spectrum)

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        return self._rows.U.T.to(y) @ y @ self._columns.U.to(y)

    def leave(self, spectrum: torch.Tensor) -> torch.Tensor:
        return self._rows.U.to(spectrum) @ spectrum @ self._columns.U.T.to(spectrum)

    def after(self, first: _Spatial) -> _Spatial | None:
        if isinstance(first, _Separable):
            return _Separable(self.rows @ first.rows, self.columns @ first.columns)
        return super().after(first)


class _Convolution(_Spatial):
    """Convolve with a kernel, as if the image repeated itself beyond its borders."""

    name = "blur"

    def __init__(self, values: torch.Tensor, size: tuple[int, int]) -> None:
        self.values, self.output_size = values, size

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft2(x, norm="ortho")

    def back(self, spectrum: torch.Tensor) -> torch.Tensor:
        return torch.fft.ifft2(spectrum, norm="ortho").real

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        return self.enter(y)

    def leave(self, spectrum: torch.Tensor) -> torch.Tensor:
        return self.back(spectrum)

    def after(self, first: _Spatial) -> _Spatial | None:
        if isinstance(first, _Convolution):
            return _Convolution(self.values * first.values, self.output_size)
        return super().after(first)


class Inpaint(SpectralOperator):
    """Some pixels are missing.

    Args:
        mask (`PIL.Image.Image`, or `torch.Tensor` of shape `(height, width)` or `(1, height, width)`):
            White, 1 or `True` where pixels are missing; black, 0 or `False` where they are known, as in diffusers.
        num_channels (`int`, defaults to 3): Channels of the images.

    Raises:
        ValueError: The mask is of another shape, has values other than 0 and 1, or covers no pixel or all of them.
    """

    def __init__(self, mask: Image.Image | torch.Tensor, num_channels: int = 3) -> None:
        if isinstance(mask, Image.Image):
            mask = torch.from_numpy(np.array(mask.convert("L"), dtype=np.float32) / 255)
        try:
            mask = torch.as_tensor(mask)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"`mask` must be an image or a tensor, got {type(mask).__name__}.") from error
        if mask.ndim == 3 and mask.shape[0] == 1:
            mask = mask[0]
        if mask.ndim != 2:
            raise ValueError(f"`mask` must be of shape (height, width), got {tuple(mask.shape)}.")
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(
                f"`mask` must be 1 where pixels are missing and 0 elsewhere, got values from {mask.min():g} to "
                f"{mask.max():g}."
            )
        if (mask == 0).all() or (mask == 1).all():
            state = "missing" if mask.flatten()[0] == 1 else "known"
            raise ValueError(f"`mask` must leave some pixels missing and some known, but all are {state}.")
        self.is_missing = mask.bool()
        super().__init__((num_channels, *mask.shape), None, _Mask((~self.is_missing).double()))

    def proximal(self, x: torch.Tensor, y: torch.Tensor, ratio: float) -> torch.Tensor:
        explained = super().proximal(x, y, ratio)
        # Rounding would change the last bits of known pixels.
        return explained if ratio else torch.where(self.is_missing.to(x.device), explained, y.to(x))


class Downsample(SpectralOperator):
    """The image is smaller by an integer factor.

    Args:
        factor (`int`): Factor, at least 2; the height and width must be multiples of it.
        image_shape (`tuple[int, int, int]`): Channels, height and width of the full image.
        method (`str`, defaults to `"average"`):
            `"average"` (mean of each block of pixels) or `"bicubic"` (as PIL reduces images, with antialiasing).

    Raises:
        ValueError: An argument is not allowed.
    """

    def __init__(self, factor: int, image_shape: Sequence[int], method: str = "average") -> None:
        if method not in ("average", "bicubic"):
            raise ValueError(f"`method` must be 'average' or 'bicubic', got {method!r}.")
        LinearOperator.__init__(self, image_shape)
        _, height, width = self.image_shape
        if type(factor) is not int or not 2 <= factor <= MAX_FACTOR or height % factor or width % factor:
            raise ValueError(
                f"`factor` must be an integer from 2 to {MAX_FACTOR} that divides the height and width of the image, "
                f"{height} and {width}, got {factor!r}."
            )
        super().__init__(
            image_shape, None, _Separable(*(_reduction(size, factor, method) for size in (height, width)))
        )


class Gray(SpectralOperator):
    """The image has lost its colors.

    Args:
        image_shape (`tuple[int, int, int]`): Channels (3), height and width of the colored image.

    Raises:
        ValueError: The image does not have three channels.
    """

    def __init__(self, image_shape: Sequence[int]) -> None:
        LinearOperator.__init__(self, image_shape)
        if self.image_shape[0] != 3:
            raise ValueError(f"`image_shape` must have 3 channels, got {self.image_shape[0]}.")
        super().__init__(image_shape, torch.tensor([GRAY_WEIGHTS]), _Mask(torch.ones(self.image_shape[1:])))


class GaussianBlur(SpectralOperator):
    """The image is blurred by a Gaussian, and mirrored at its borders.

    Args:
        sigma (`float`): Standard deviation in pixels, at most a quarter of the image.
        image_shape (`tuple[int, int, int]`): Channels, height and width of the image.

    Raises:
        ValueError: `sigma` is not positive, or too large.
    """

    def __init__(self, sigma: float, image_shape: Sequence[int]) -> None:
        LinearOperator.__init__(self, image_shape)
        _, height, width = self.image_shape
        largest = min(height, width) / 4
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma <= largest:
            raise ValueError(
                f"`sigma` must be a positive number of at most {largest:g}, a quarter of the image, got {sigma!r}."
            )
        super().__init__(image_shape, None, _Separable(*(_gaussian_matrix(size, sigma) for size in (height, width))))


class Blur(SpectralOperator):
    """The image is convolved with a kernel, as if it repeated itself beyond its borders.

    Args:
        kernel (`torch.Tensor` of shape `(height, width)`): Kernel, not larger than the image; its sum must not be 0.
        image_shape (`tuple[int, int, int]`): Channels, height and width of the image.

    Raises:
        ValueError: The kernel has another shape, is larger than the image, not finite or sums to 0.
    """

    def __init__(self, kernel: torch.Tensor, image_shape: Sequence[int]) -> None:
        LinearOperator.__init__(self, image_shape)
        height, width = self.image_shape[1:]
        kernel = torch.as_tensor(kernel).double()
        if kernel.ndim != 2 or kernel.shape[0] > height or kernel.shape[1] > width:
            raise ValueError(
                f"`kernel` must be of two dimensions and not larger than the image ({height}, {width}), got "
                f"{tuple(kernel.shape)}."
            )
        if not kernel.isfinite().all() or kernel.sum() == 0:
            raise ValueError("`kernel` must be finite numbers whose sum is not 0.")
        kernel = kernel / kernel.sum()  # a blur keeps the brightness
        padded = F.pad(kernel, (0, width - kernel.shape[1], 0, height - kernel.shape[0]))
        centered = padded.roll((-(kernel.shape[0] // 2), -(kernel.shape[1] // 2)), dims=(0, 1))
        super().__init__(image_shape, None, _Convolution(torch.fft.fft2(centered), (height, width)))


def motion_kernel(length: float, angle: float) -> torch.Tensor:
    """Return the kernel of a straight motion, for [`Blur`].

    Args:
        length (`float`): Length of the motion in pixels, from 1 to 500.
        angle (`float`): Its direction in degrees, counterclockwise from the right.

    Returns:
        `torch.Tensor` of shape `(size, size)`, an odd size: It sums to 1.
    """
    if isinstance(length, bool) or not isinstance(length, int | float) or not 1 <= length <= MAX_KERNEL - 11:
        raise ValueError(f"`length` must be a number from 1 to {MAX_KERNEL - 11}, got {length!r}.")
    if isinstance(angle, bool) or not isinstance(angle, int | float) or not math.isfinite(angle):
        raise ValueError(f"`angle` must be a number of degrees, got {angle!r}.")
    radius = math.ceil(length / 2)
    size = 2 * radius + 1
    kernel = torch.zeros(size, size, dtype=torch.float64)
    num_points = 16 * size
    for i in range(num_points):  # each point of the path is shared by the four pixels around it
        distance = length * ((i + 0.5) / num_points - 0.5)
        column = radius + distance * math.cos(math.radians(angle))
        row = radius - distance * math.sin(math.radians(angle))
        top, left = math.floor(row), math.floor(column)
        for y, share_y in ((top, top + 1 - row), (top + 1, row - top)):
            for x, share_x in ((left, left + 1 - column), (left + 1, column - left)):
                if 0 <= y < size and 0 <= x < size:
                    kernel[y, x] += share_y * share_x
    return kernel / kernel.sum()


class PhysicsOperator(LinearOperator):
    """An operator of deepinv, https://deepinv.github.io.

    deepinv's images lie in [0, 1]. If your observation y was made of such an image, [`from_unit_range`] converts it.
    Observations may have any shape. Tensors are moved to the device of the physics, and their results back.

    Args:
        physics (`deepinv.physics.LinearPhysics`): Its `A`, `A_adjoint`, `A_dagger` and `prox_l2` are used.
        image_shape (`tuple[int, int, int]`): Channels, height and width of x.

    Raises:
        ValueError: The object is not such a physics, or does not take images of this shape.
    """

    def __init__(self, physics: Any, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        missing = [name for name in ("A", "A_adjoint", "A_dagger", "prox_l2") if not hasattr(physics, name)]
        if missing:
            raise ValueError(
                f"`physics` must be a deepinv.physics.LinearPhysics, but {type(physics).__name__} has no {missing[0]}."
            )
        self.physics = physics
        tensors = [*physics.parameters(), *physics.buffers()] if isinstance(physics, torch.nn.Module) else []
        self._device = tensors[0].device if tensors else None
        try:
            self._of_ones = self._apply("A", torch.ones(1, *self.image_shape))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"`physics` does not take images of the shape {self.image_shape}: {error}") from error
        if not isinstance(self._of_ones, torch.Tensor):
            kind = type(self._of_ones).__name__
            raise ValueError(f"`physics` must make one tensor of each image, but it makes a {kind}.")

    @property
    def output_shape(self) -> tuple[int, ...]:
        return tuple(self._of_ones.shape[1:])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._check("x", x, self.image_shape)
        return self._apply("A", x)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        self._check("y", y, self.output_shape)
        return self._apply("A_adjoint", y)

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        self._check("y", y, self.output_shape)
        return self._apply("A_dagger", y)

    def proximal(self, x: torch.Tensor, y: torch.Tensor, ratio: float) -> torch.Tensor:
        self._check("x", x, self.image_shape)
        self._check("y", y, self.output_shape)
        if not ratio >= 0:
            raise ValueError(f"`ratio` must be at least 0, got {ratio}.")
        if ratio == 0:
            return x + self.pseudo_inverse(y - self(x))
        return self._apply("prox_l2", x, y, 1 / ratio)  # gamma / 2 |A z - y|^2 + 1 / 2 |z - x|^2

    def _apply(self, name: str, *arguments: Any) -> torch.Tensor:
        device = arguments[0].device
        moved = (value.to(self._device) if isinstance(value, torch.Tensor) else value for value in arguments)
        result = getattr(self.physics, name)(*moved)
        return result.to(device) if isinstance(result, torch.Tensor) else result

    def from_unit_range(self, y: torch.Tensor) -> torch.Tensor:
        """Convert an observation of images in [0, 1] to that of the same images in [-1, 1]."""
        return 2 * y - self._of_ones.to(y)


def observations(image: Any, shape: tuple[int, ...]) -> tuple[torch.Tensor, bool]:
    """Return observations as a tensor, and whether they are rounded to 8 bits.

    Args:
        image (`PIL.Image.Image`, a list of them, or `torch.Tensor`): Images.
        shape (`tuple[int, ...]`): Shape that each of them must have; for `PIL` images, channels, height and width.

    Raises:
        ValueError: They are of another type or shape, have transparent pixels, or contain other than finite numbers.
    """
    if isinstance(image, torch.Tensor):
        if not image.ndim or tuple(image.shape[1:]) != shape or not len(image):
            allowed = ", ".join(map(str, shape))
            raise ValueError(f"`image` must be of shape (batch, {allowed}), got {tuple(image.shape)}.")
        if not image.is_floating_point() or not image.isfinite().all():
            raise ValueError("`image` must contain finite floating-point numbers, with pixels in [-1, 1].")
        return image.float(), False
    images = image if isinstance(image, list) else [image]
    if not images or not all(isinstance(one, Image.Image) for one in images):
        raise ValueError(f"`image` must be a PIL image, a list of them or a tensor, got {type(image).__name__}.")
    return torch.stack([_to_tensor(one, shape) for one in images]), True


def _to_tensor(image: Image.Image, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"`image` must be a tensor of shape (batch, {', '.join(map(str, shape))}), got a PIL image.")
    channels, height, width = shape
    image = turned_upright(image)
    if image.size != (width, height):
        raise ValueError(f"`image` must be of {width}x{height} pixels, got {image.size[0]}x{image.size[1]}.")
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError("`image` must be opaque, but some of its pixels are transparent.")
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image, dtype=np.float32) / 257  # 65535 is white
        array = np.repeat(pixels[..., None], channels, axis=2)
    elif image.mode in ("I", "F"):
        raise ValueError(f"`image` of mode {image.mode!r} has no defined white: convert it to 8 or 16 bits.")
    else:
        array = np.asarray(image.convert("RGB" if channels == 3 else "L"), dtype=np.float32)
        array = array.reshape(height, width, channels)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous()


def turned_upright(image: Image.Image) -> Image.Image:
    """Turn or mirror an image as its EXIF orientation says. Damaged metadata are ignored.

    `PIL.ImageOps.exif_transpose` would rewrite all other tags, and fail if one of them is unusual.
    """
    image.load()  # metadata may follow the pixels
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # PIL raises many kinds of errors on damaged metadata
        return image
    if isinstance(orientation, int) and orientation in TRANSPOSES:
        return image.transpose(TRANSPOSES[orientation])
    return image


def _mix(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Multiply the channels of `x` by a matrix."""
    if matrix.shape[0] == matrix.shape[1] and bool((matrix == torch.eye(len(matrix)).to(matrix)).all()):
        return x
    return torch.einsum("oc,bchw->bohw", matrix.to(x.device, x.dtype), x)


def _reduction(size: int, factor: int, method: str) -> torch.Tensor:
    """Return the matrix that reduces `size` pixels to `size / factor`."""
    if method == "average":
        return torch.eye(size // factor, dtype=torch.float64).repeat_interleave(factor, dim=1) / factor
    # Each column is what becomes of one bright pixel.
    pixels = torch.eye(size, dtype=torch.float64)[None, None]
    return F.interpolate(pixels, size=(size // factor, size), mode="bicubic", antialias=True)[0, 0]


def _gaussian_matrix(size: int, sigma: float) -> torch.Tensor:
    """Return the matrix that blurs `size` pixels, whose borders are mirrored."""
    radius = max(1, math.ceil(4 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    weights = weights / weights.sum()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for offset, weight in zip(range(-radius, radius + 1), weights.tolist(), strict=True):
        for pixel in range(size):
            place = (pixel + offset) % (2 * size)
            matrix[pixel, min(place, 2 * size - 1 - place)] += weight
    return matrix
