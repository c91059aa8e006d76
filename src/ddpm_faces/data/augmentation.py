"""Augmentation that does not leak: pictures are transformed at random, and the network is told how.

The network learns what each transformation does to a picture, and so learns from all of them. Sampling tells it of
none, and it makes pictures as they are (section 5 and appendix F.2 of https://huggingface.co/papers/2206.00364).
"""

import math

import torch
import torch.nn.functional as F


AUGMENT_DIM = 9


class NonLeakingAugmentation:
    """Transform pictures at random, and return the labels of what was done.

    The transformations are those of EDM for faces, in this order; n is N(0, 1), drawn anew for each:

    | transformation                                                       | of the pictures   | labels             |
    |----------------------------------------------------------------------|-------------------|--------------------|
    | x-flip (mirror left and right)                                       | 1/2               | 1                  |
    | y-flip (mirror top and bottom)                                       | `probability` / 2 | 1                  |
    | scale by 2^(0.2 n)                                                   | `probability`     | n                  |
    | rotate by a in [-pi, pi), counter-clockwise                          | `probability`     | cos a - 1, sin a   |
    | stretch by 2^(0.2 n) along an axis at angle b, and by its inverse    | `probability`     | n cos 2b, n sin 2b |
    | across it; b is 0 for half of them, else in [-pi, pi)                |                   |                    |
    | translate by n / 8 of the width to the right, n' / 8 of the height   | `probability`     | n, n'              |
    | down                                                                 |                   |                    |

    Each is drawn for each picture on its own; labels of what is not drawn are 0. The x-flip is as likely at any
    `probability` but 0, as in EDM: a mirrored face is still a face, so that there is no reason to do it rarely. It is
    among the labels all the same, because faces are not symmetric (partings, badges, writing). Mirroring pictures
    without a label as well, as `random_flip` does, would leak.

    Equal labels mean equal transformations. Those of EDM for the stretch, n cos b and n sin b, do not: (n, b) and
    (-n, b + pi) have the same, but one is the inverse of the other. The double angle tells them apart.

    What a picture does not cover after its transformation is filled with its own reflection.

    Args:
        probability (`float`): Of each transformation, 0 (none at all) to 1. EDM takes 0.15 for faces (FFHQ).

    Raises:
        ValueError: A `probability` outside [0, 1].
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
        """Draw all random numbers that a batch takes, whatever the `probability`.

        A row belongs to a picture, so rows for the batches of several processes can be drawn at once and shared out.

        Args:
            batch_size (`int`): Number of pictures.
            generator (`torch.Generator`, *optional*): Of the numbers; on `device`.
            device (`torch.device` or `str`, *optional*): Where to draw.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_random)`, `torch.float32`: Columns 0 to 8 are uniform in [0, 1):
            whether to flip x, flip y, scale, rotate, stretch and translate, whether the stretch has an axis other than
            0, the angle of the rotation and that of the axis. Columns 9 to 12 are N(0, 1): n of scale, stretch,
            translation to the right and translation down.
        """
        uniform = torch.rand(batch_size, 9, generator=generator, device=device, dtype=torch.float32)
        normal = torch.randn(batch_size, 4, generator=generator, device=device, dtype=torch.float32)
        return torch.cat([uniform, normal], dim=1)

    def __call__(self, samples: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform a batch of pictures.

        Args:
            samples (`torch.Tensor` of shape `(batch, channels, height, width)`, `torch.float32`): x_0 in [-1, 1].
            draws (`torch.Tensor` of shape `(batch, num_random)`): What [`~NonLeakingAugmentation.draw`] returned; on
                the device of the pictures.

        Returns:
            `(torch.Tensor, torch.Tensor)`: The pictures, of the same shape, in [-1, 1], and their labels, of shape
            `(batch, AUGMENT_DIM)`. A picture whose labels are 0 is unchanged.

        Raises:
            ValueError: `samples` that are not a batch of pictures, or `draws` that do not fit them.
        """
        if samples.ndim != 4:
            raise ValueError(
                f"`samples` must be of shape (batch, channels, height, width), got {tuple(samples.shape)}."
            )
        if draws.shape != (len(samples), self.num_random):
            raise ValueError(f"`draws` must be of shape {(len(samples), self.num_random)}, got {tuple(draws.shape)}.")
        uniform, normal = draws.split([9, 4], dim=1)

        # 1. Parameters, (batch,) each: 0 where nothing is drawn
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

        # 3. Flips, exact to the bit
        samples = torch.where(_per_picture(x_flip), samples.flip(3), samples)
        samples = torch.where(_per_picture(y_flip), samples.flip(2), samples)

        # 4. All others in one resampling, so that a picture is blurred once
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
    """Scale, rotate, stretch and translate, by parameters of shape `(batch, 1, 1)`."""
    height, width = samples.shape[2:]
    # Pixels from the centre, x to the right and y down: in units of width and height, a rotation would shear.
    x = torch.arange(width, device=samples.device)[None, None, :] - (width - 1) / 2  # (1, 1, width)
    y = torch.arange(height, device=samples.device)[None, :, None] - (height - 1) / 2  # (1, height, 1)

    # Where the pixels come from: undo what is done, the last first. Not by matrix products: autocast and TF32 would
    # round the positions.
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
    """Rotate points counter-clockwise as seen, where y points down."""
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
