"""Non-leaking augmentation: images are transformed at random, and the network is told how.

The network learns the effect of each transformation, and so learns from all transformed images. In sampling, it is
told that there was no transformation, and generates images like the originals (section 5 and appendix F.2 of
https://huggingface.co/papers/2206.00364).
"""

import math

import torch
import torch.nn.functional as F


AUGMENT_DIM = 9


class NonLeakingAugmentation:
    """Transform images at random, and return labels that describe the transformations.

    The transformations are those that EDM uses for faces, in this order; n is N(0, 1), drawn separately for each:

    | transformation                                                       | probability       | labels             |
    |----------------------------------------------------------------------|-------------------|--------------------|
    | x-flip (mirror left and right)                                       | 1/2               | 1                  |
    | y-flip (mirror top and bottom)                                       | `probability` / 2 | 1                  |
    | scale by 2^(0.2 n)                                                   | `probability`     | n                  |
    | rotate by a in [-pi, pi), counter-clockwise                          | `probability`     | cos a - 1, sin a   |
    | stretch by 2^(0.2 n) along an axis at angle b, and by its inverse    | `probability`     | n cos 2b, n sin 2b |
    | across it; b is 0 for half of them, else in [-pi, pi)                |                   |                    |
    | translate by n / 8 of the width to the right, n' / 8 of the height   | `probability`     | n, n'              |
    | down                                                                 |                   |                    |

    Each transformation is drawn for each image separately. Labels of transformations that are not drawn are 0. The
    x-flip has the same probability for every `probability` above 0, as in EDM: a mirrored face is still a face, so
    there is no reason to make it rare. It still has a label, because images of faces are not symmetric (partings,
    badges, writing). Mirroring images without a label as well, as `random_flip` does, would leak.

    Equal labels mean equal transformations. This is not true of EDM's labels for the stretch, n cos b and n sin b:
    (n, b) and (-n, b + pi) have the same labels, although one is the inverse of the other. Doubling the angle tells
    them apart.

    Areas that an image does not cover after its transformation are filled with its reflection.

    Args:
        probability (`float`): Probability of each transformation, 0 (none) to 1. EDM uses 0.15 for faces (FFHQ).

    Raises:
        ValueError: `probability` is outside [0, 1].
    """

    num_random = 13

    def __init__(self, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"`probability` must lie in [0, 1], got {probability}.")
        self.probability = probability

    @classmethod
    def draw(
        cls,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Draw all random numbers for a batch. They do not depend on `probability`.

        Each row belongs to one image, so several processes can draw the same rows and each use its share.

        Args:
            batch_size (`int`): Number of images.
            generator (`torch.Generator`, *optional*): Random number generator on `device`.
            device (`torch.device` or `str`, *optional*): Device of the numbers.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_random)`, `torch.float32`: Columns 0 to 8 are uniform in [0, 1).
            They decide whether to flip x, flip y, scale, rotate, stretch and translate, whether the axis of the
            stretch is other than 0, the angle of the rotation, and the angle of the axis. Columns 9 to 12 are N(0, 1),
            the n of scaling, stretching, translation to the right and translation down.
        """
        uniform = torch.rand(batch_size, 9, generator=generator, device=device, dtype=torch.float32)
        normal = torch.randn(batch_size, 4, generator=generator, device=device, dtype=torch.float32)
        return torch.cat([uniform, normal], dim=1)

    def __call__(self, samples: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform a batch of images.

        Args:
            samples (`torch.Tensor` of shape `(batch, channels, height, width)`, `torch.float32`): x_0 in [-1, 1].
            draws (`torch.Tensor` of shape `(batch, num_random)`): The result of [`~NonLeakingAugmentation.draw`], on
                the device of `samples`.

        Returns:
            `(torch.Tensor, torch.Tensor)`: The transformed images, of the same shape and in [-1, 1], and their labels
            of shape `(batch, AUGMENT_DIM)`. An image with labels of 0 is unchanged.

        Raises:
            ValueError: `samples` is not a batch of images, or `draws` does not match it.
        """
        if samples.ndim != 4:
            raise ValueError(
                f"`samples` must be of shape (batch, channels, height, width), got {tuple(samples.shape)}."
            )
        if draws.shape != (len(samples), self.num_random):
            raise ValueError(f"`draws` must be of shape {(len(samples), self.num_random)}, got {tuple(draws.shape)}.")
        uniform, normal = draws.split([9, 4], dim=1)

        # 1. Parameters, each of shape (batch,): 0 without the transformation
        drawn = uniform < self.probability  # (batch, 9)
        x_flip = (uniform[:, 0] < 0.5) & (self.probability > 0)
        y_flip = uniform[:, 1] < 0.5 * self.probability
        scale = torch.where(drawn[:, 2], normal[:, 0], 0.0)
        angle = torch.where(drawn[:, 3], math.pi * (2 * uniform[:, 7] - 1), 0.0)
        stretch = torch.where(drawn[:, 4], normal[:, 1], 0.0)
        axis = torch.where(drawn[:, 4] & (uniform[:, 6] < 0.5), math.pi * (2 * uniform[:, 8] - 1), 0.0)
        right = torch.where(drawn[:, 5], normal[:, 2], 0.0)
        down = torch.where(drawn[:, 5], normal[:, 3], 0.0)

        # 2. Labels
        rotation = [angle.cos() - 1, angle.sin()]
        stretching = [stretch * (2 * axis).cos(), stretch * (2 * axis).sin()]
        labels = torch.stack([x_flip, y_flip, scale, *rotation, *stretching, right, down], dim=1)

        # 3. Flips, which are exact
        samples = torch.where(_per_picture(x_flip), samples.flip(3), samples)
        samples = torch.where(_per_picture(y_flip), samples.flip(2), samples)

        # 4. All other transformations in one resampling, so that an image is blurred only once
        resampled = _resample(samples, *(value[:, None, None] for value in (scale, angle, stretch, axis, right, down)))
        return torch.where(_per_picture(labels[:, 2:].any(dim=1)), resampled, samples), labels


def _per_picture(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def _resample(
    samples: torch.Tensor,
    scale: torch.Tensor,
    angle: torch.Tensor,
    stretch: torch.Tensor,
    axis: torch.Tensor,
    right: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Scale, rotate, stretch and translate with parameters of shape `(batch, 1, 1)`."""
    height, width = samples.shape[2:]
    # Distance from the center in pixels, x to the right and y down. In relative units, rotations would shear.
    x = torch.arange(width, device=samples.device)[None, None, :] - (width - 1) / 2  # (1, 1, width)
    y = torch.arange(height, device=samples.device)[None, :, None] - (height - 1) / 2  # (1, height, 1)

    # Source positions: undo the transformations in reverse order. There are no matrix products here, because autocast
    # and TF32 would round the positions.
    x, y = x - right * width / 8, y - down * height / 8
    x, y = _rotate(x, y, -axis)
    x, y = x / (0.2 * stretch).exp2(), y * (0.2 * stretch).exp2()
    x, y = _rotate(x, y, axis)
    x, y = _rotate(x, y, -angle)
    x, y = x / (0.2 * scale).exp2(), y / (0.2 * scale).exp2()

    grid = torch.stack([2 * x / width, 2 * y / height], dim=-1)  # (batch, height, width, 2)
    resampled = F.grid_sample(samples, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return resampled.clamp(-1, 1)  # bicubic overshoots at edges


def _rotate(x: torch.Tensor, y: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate points counter-clockwise as seen in the image, where y points down."""
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
