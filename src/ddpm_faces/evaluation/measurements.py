"""Measurements for metrics: features, detected faces and colors of images, shared among all processes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.detection import MTCNN
from .extractors import EfficientNetLite0, Extractor, InceptionV3, MobileNetV2
from .metrics import channel_statistics


DETECTION_SIDE = 64  # smaller images are enlarged: the detector finds no face below 20 pixels


class MetricNetworks:
    """The feature networks and the face detector that metrics need, loaded once.

    Args:
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to compute on.
        extractors (`list[Extractor]`, *optional*): Feature networks; defaults to MobileNetV2 and EfficientNet-Lite0.

    Raises:
        ImportError: A package with weights is not installed. The message says how to install it.
    """

    def __init__(self, device: str | torch.device = "cpu", extractors: Sequence[Extractor] | None = None) -> None:
        self.extractors = extractors or (MobileNetV2(device), EfficientNetLite0(device))
        self.detector = MTCNN(device)

    @classmethod
    def with_inception(cls, device: str | torch.device | None = None) -> "MetricNetworks":
        """Load the default networks and Inception-v3, for the FID and KID of the literature."""
        device = device or process_state().device
        return cls(device, (InceptionV3(device), MobileNetV2(device), EfficientNetLite0(device)))


@dataclass
class Measured:
    """The measurements of a set of images, from which metrics are computed.

    Args:
        features (`list[torch.Tensor]`): Features by each network, `(num_images, dim)`, float32, on the CPU.
        faces (`torch.Tensor` of shape `(num_images,)`, `torch.bool`): Whether the detector finds a face.
        moments (`torch.Tensor` of shape `(num_images, 2, 3)`, `torch.float64`):
            Mean of each channel and of its square, for pixels in [-1, 1].
        image_size (`(int, int)`): Height and width.
    """

    features: list[torch.Tensor]
    faces: torch.Tensor
    moments: torch.Tensor
    image_size: tuple[int, int]

    @property
    def channels(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each channel, see [`channel_statistics`]."""
        mean, square = self.moments.mean(dim=0)
        return {"mean": mean.tolist(), "deviation": (square - mean**2).sqrt().tolist()}


def measure(
    batches: Callable[[Sequence[int]], torch.Tensor],
    num_images: int,
    networks: MetricNetworks,
    batch_size: int,
    desc: str = "Measuring",
) -> Measured:
    """Measure images batch by batch, each process its share. Every process must call it.

    Args:
        batches (`Callable`): Maps indices to images, `torch.uint8` of shape `(batch, 3, height, width)`.
        num_images (`int`): The number of images, at least 1. There may be more processes than images.
        networks ([`MetricNetworks`]): The feature networks and the face detector.
        batch_size (`int`): Images in a batch.
        desc (`str`, defaults to `"Measuring"`): Label of the progress bar.

    Returns:
        [`Measured`]: Measurements of all images, on every process; pixels are not kept.

    Raises:
        ValueError: `num_images` is below 1.
    """
    if num_images < 1:
        raise ValueError(f"`num_images` must be at least 1, got {num_images}.")
    state = PartialState()
    mine = range(state.process_index, num_images, state.num_processes)
    rows = []
    with tqdm(total=len(mine), desc=desc, unit="img", disable=not state.is_main_process) as progress:
        for first in range(0, len(mine), batch_size):
            images = batches(mine[first : first + batch_size])
            features = [extractor(images).float().cpu() for extractor in networks.extractors]
            faces = networks.detector(_enlarged(images)).cpu() > 0
            for i, image in enumerate(images.cpu()):
                statistics = channel_statistics(image[None])
                mean, std = (torch.tensor(statistics[key]).double() for key in ("mean", "deviation"))
                moments, size = torch.stack([mean, std**2 + mean**2]), tuple(image.shape[1:])
                rows.append((mine[first + i], [f[i] for f in features], faces[i], moments, size))
            progress.update(len(images))
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    _, features, faces, moments, sizes = zip(*rows, strict=True)
    return Measured(
        [torch.stack(of_network) for of_network in zip(*features, strict=True)],
        torch.stack(faces),
        torch.stack(moments),
        sizes[0],
    )


def fingerprint(images: torch.Tensor) -> str:
    """Return a short hash of images in order, `torch.uint8` of shape `(num_images, channels, height, width)`."""
    header = str(tuple(images.shape[1:])).encode()
    digests = (hashlib.sha256(header + image.numpy().tobytes()).hexdigest() for image in images)
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def process_state() -> PartialState:
    """Return this process's state. Only an `Accelerator` finds other processes on CPUs, `PartialState` does not."""
    Accelerator()
    return PartialState()


def detection_resize(size: tuple[int, int]) -> str:
    """Describe how images of a height and width are resized for the face detector."""
    return f"to {DETECTION_SIDE} pixels, bicubic" if min(size) < DETECTION_SIDE else "none"


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[2:]
    if min(height, width) >= DETECTION_SIDE:
        return images
    scale = DETECTION_SIDE / min(height, width)
    size = (round(height * scale), round(width * scale))
    return F.interpolate(images.float(), size=size, mode="bicubic", antialias=True).clamp(0, 255).round().byte()
