"""How good generated faces are: figures, each with all that it takes to measure it again and to compare it.

Of a pipeline, or of a folder of pictures that any other program has made. Started by `accelerate launch` with several
processes, each makes and measures its share.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.drawn_faces import DrawnFaces
from ..data.folders import is_picture_folder
from ..data.images import picture_to_tensor
from ..data.loading import load_faces
from ..files import replacing
from ..pipeline_ddpm_faces import DDPMFacesPipeline
from ..scheduling_ddpm_faces import DDPMFacesScheduler
from .detection import MTCNN
from .extractors import EfficientNetLite0, Extractor, InceptionV3, MobileNetV2
from .likelihood import bits_per_dimension
from .metrics import (
    NUM_SUBSETS,
    bootstrap_error,
    channel_statistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from .samples import Generated, PictureFiles, open_samples, select


MIN_IMAGES = 2 * NUM_SUBSETS  # of the kernel distance, whose subsets hold two at least
MAX_IMAGES = 1000  # where the user does not say; more pictures mean smaller errors
DETECTION_SIDE = 64  # to which smaller pictures are enlarged: the detector knows no face of less than 20 pixels
NUM_LIKELIHOOD_TERMS = 50  # at which drawing them adds little to the error that comes of few pictures
METRICS_NAME = "metrics.json"
# What two figures must have in common to be compared. Model, sampler, steps and seeds are what one compares.
PROVENANCE = ("n", "n_reference", "image_size", "extractor", "resize", "reference")
# The names by which publications know figures from the Inception network.
_NAMES = {"frechet_distance": "FID", "kernel_distance_x1000": "KID x1000"}


class Networks:
    """The feature networks and the face detector, loaded once.

    Args:
        device (`str` or `torch.device`, defaults to `"cpu"`): Where to compute.
        extractors (`list[Extractor]`, *optional*): Feature networks; by default MobileNetV2 and EfficientNet-Lite0.

    Raises:
        ImportError: A package that holds weights is not installed, and how to install it.
    """

    def __init__(self, device: str | torch.device = "cpu", extractors: Sequence[Extractor] | None = None) -> None:
        self.extractors = extractors or (MobileNetV2(device), EfficientNetLite0(device))
        self.detector = MTCNN(device)

    @classmethod
    def with_inception(cls, device: str | torch.device | None = None) -> "Networks":
        """Those of the default, and the one of the literature."""
        device = device or _process_state().device
        return cls(device, (InceptionV3(device), MobileNetV2(device), EfficientNetLite0(device)))


@dataclass
class Measured:
    """What the figures of a set of pictures are computed from.

    Args:
        features (`list[torch.Tensor]`): Of each feature network: `(num_images, dim)`, float32, on the CPU.
        faces (`torch.Tensor` of shape `(num_images,)`, `torch.bool`): Where the detector finds a face.
        moments (`torch.Tensor` of shape `(num_images, 2, 3)`, `torch.float64`):
            Mean of each channel, and of its square, for pixels in [-1, 1].
        image_size (`(int, int)`): Height and width.
        digests (`list[str]`): A hash of the pixels of each picture.
    """

    features: list[torch.Tensor]
    faces: torch.Tensor
    moments: torch.Tensor
    image_size: tuple[int, int]
    digests: list[str]

    @property
    def fingerprint(self) -> str:
        """Of all pictures and their order."""
        return _fingerprint(self.digests)

    @property
    def channels(self) -> dict[str, list[float]]:
        """Mean and deviation of each channel, as of [`channel_statistics`]."""
        mean, square = self.moments.mean(dim=0)
        return {"mean": mean.tolist(), "deviation": (square - mean**2).sqrt().tolist()}


def evaluate(
    source: str | os.PathLike | DDPMFacesPipeline,
    data: str | None = None,
    split: str = "test",
    baseline_split: str | None = "train",
    num_images: int | None = None,
    sampler: str = "ddpm",
    num_inference_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    networks: Networks | None = None,
    cache_dir: str | None = None,
    num_likelihood_images: int = 0,
    sigma_min: float | None = None,
    guide: str | os.PathLike | DDPMFacesPipeline | None = None,
    guidance_scale: float | None = None,
    epsilon_scaling: float | None = None,
) -> dict[str, Any]:
    """Measure how far faces are from real ones. Called by every process.

    Args:
        source (`str`, `os.PathLike` or [`DDPMFacesPipeline`]):
            A pipeline, its folder or its name on the Hub; or a folder of pictures that something else has made.
        data (`str`, *optional*):
            Real faces: a data set, on the Hub or in a folder, or a folder of pictures; by default drawn ones, as those
            that `train.py` draws, but others than these.
        split (`str`, defaults to `"test"`): Of the data set: faces that were not trained on.
        baseline_split (`str`, *optional*, defaults to `"train"`):
            Of other real faces, which are measured as if they were generated: what a perfect model could reach.
        num_images (`int`, *optional*):
            How many pictures to compare, on either side; by default as many as there are, up to 1000.
        sampler (`str`, defaults to `"ddpm"`): `"ddpm"`, the pipeline's own scheduler, or `"dpm-solver++"`.
        num_inference_steps (`int`, *optional*): By default all T.
        seed (`int`, defaults to 0): Face i comes from the generator of `seed + i`; with classes, it is of class
            `i % num_class_embeds`.
        batch_size (`int`, defaults to 64): Pictures at a time, on each process.
        networks ([`Networks`], *optional*): By default on the device of this process.
        cache_dir (`str`, *optional*): As that of [`load_faces`].
        num_likelihood_images (`int`, defaults to 0):
            Of how many of the real faces to bound the bits per dimension (DDPM eq. 5), for a pipeline with a
            [`DDPMFacesScheduler`], of RGB and without classes. It takes 50 evaluations of the network for each.
        sigma_min (`float`, *optional*): For `"dpm-solver++"`, as that of [`fast_solver`].
        guide (`str`, `os.PathLike` or [`DDPMFacesPipeline`], *optional*): As that of [`open_samples`].
        guidance_scale (`float`, *optional*): As that of [`open_samples`].
        epsilon_scaling (`float`, *optional*): As that of [`open_samples`].

    Returns:
        `dict`: Plain values, ready for JSON. `metrics` is a list of figures: each has `name`, `type`, `value`, `error`
        (a standard error) and its provenance: `n`, `n_reference`, `image_size`, `extractor`, `resize`, `reference`,
        `sampler`, `steps`, `seeds`, `sigma_min` and `epsilon_scaling` (unless it is 1) of DPM-Solver++,
        `guidance_scale` where there is guidance, and `real_faces`, the value of the baseline.
        `channels` and `reference_channels` are mean and deviation of red, green and blue, for pixels in [-1, 1].

    Raises:
        ValueError: Fewer than 20 pictures on either side, pictures of several sizes, files that are none, a model
            that makes no RGB or grey pictures, or an argument outside what is said above.
        ImportError: A package that holds weights is not installed.
    """
    if num_images is not None and (type(num_images) is not int or num_images < MIN_IMAGES):
        raise ValueError(f"`num_images` must be a whole number of at least {MIN_IMAGES}, got {num_images!r}.")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"`batch_size` must be a whole number of at least 1, got {batch_size!r}.")
    state = _process_state()

    # 1. What is measured
    pictures = open_samples(
        *(source, sampler, num_inference_steps, seed, state.device, sigma_min, guide, guidance_scale, epsilon_scaling)
    )

    if num_likelihood_images:
        _check_likelihood(num_likelihood_images, pictures)

    # 2. What it is compared with
    _check_enough("source", pictures, num_images)  # before anything is decoded
    wanted = min(num_images or MAX_IMAGES, len(pictures))
    real, others, name = _real_faces(data, split, baseline_split, pictures.image_size, wanted, cache_dir)
    _check_enough("data", real, num_images)
    num_images = min(wanted, len(real))
    if others is not None:
        _check_enough("baseline_split", others, num_images)
    if num_likelihood_images > len(real):
        raise ValueError(
            f"`num_likelihood_images` must be at most the number of real faces that are read, {len(real)}, got "
            f"{num_likelihood_images}."
        )

    # 3. Measure
    networks = networks or Networks(state.device)
    measured = measure(pictures.batches, num_images, networks, batch_size, "Faces")
    reference = measure(select(real), num_images, networks, batch_size, "Real faces")
    baseline = None if others is None else measure(select(others), num_images, networks, batch_size, "Others")
    figures = compare(measured, reference, networks)
    provenance = {"reference": f"{name} ({reference.fingerprint})", **pictures.provenance(num_images)}
    if baseline is not None:
        for figure, of_real_faces in zip(figures, compare(baseline, reference, networks), strict=True):
            figure["real_faces"] = round(of_real_faces["value"], 4)
    figures = [{**figure, **provenance} for figure in figures]
    if num_likelihood_images:
        figures.append(_likelihood(pictures, real[:num_likelihood_images], name, batch_size))
    return {
        "metrics": figures,
        "channels": measured.channels,
        "reference_channels": reference.channels,
    }


def measure(
    batches: Callable[[Sequence[int]], torch.Tensor],
    num_images: int,
    networks: Networks,
    batch_size: int,
    desc: str = "Measuring",
) -> Measured:
    """Measure pictures one batch after another, each process its share. Called by every process.

    Args:
        batches (`Callable`): From the indices of pictures to `torch.uint8` of shape `(batch, 3, height, width)`.
        num_images (`int`): How many there are.
        networks ([`Networks`]): What measures them.
        batch_size (`int`): Pictures at a time.
        desc (`str`): Of the progress bar.

    Returns:
        [`Measured`]: Of all pictures, on every process; pixels are not kept.
    """
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
                mean, deviation = (torch.tensor(statistics[key]).double() for key in ("mean", "deviation"))
                moments = torch.stack([mean, deviation**2 + mean**2])
                rows.append((mine[first + i], [f[i] for f in features], faces[i], moments, _digest(image)))
            progress.update(len(images))
            size = tuple(images.shape[2:])
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    _, features, faces, moments, digests = zip(*rows, strict=True)
    return Measured(
        [torch.stack(of_network) for of_network in zip(*features, strict=True)],
        torch.stack(faces),
        torch.stack(moments),
        size,
        list(digests),
    )


def compare(measured: Measured, reference: Measured, networks: Networks) -> list[dict[str, Any]]:
    """Compute the figures of pictures beside real ones.

    Returns:
        `list[dict]`: As `metrics` of [`evaluate`], without what is not known here.
    """
    height, width = measured.image_size
    if measured.image_size != reference.image_size:
        raise ValueError(
            f"The pictures are of {width}x{height} and the real ones of {reference.image_size[1]}x"
            f"{reference.image_size[0]}: figures would measure the resizing."
        )
    common = {"n": len(measured.faces), "n_reference": len(reference.faces), "image_size": f"{width}x{height}"}
    rate = measured.faces.double().mean().item()
    enlarged = f"to {DETECTION_SIDE} pixels, bicubic" if min(height, width) < DETECTION_SIDE else "none"
    figures = [
        {
            "name": "Faces that a detector finds",
            "type": "face_rate",
            "value": rate,
            "error": (rate * (1 - rate) / len(measured.faces)) ** 0.5,
            **common,
            "extractor": networks.detector.name,
            "resize": enlarged,
        }
    ]
    for extractor, x, y in zip(networks.extractors, measured.features, reference.features, strict=True):
        source = {
            **common,
            "extractor": getattr(extractor, "name", getattr(extractor, "__name__", type(extractor).__name__)),
            "resize": getattr(extractor, "resize", "the extractor's own"),
        }
        distance, distance_error = kernel_distance(x, y)
        precision, recall = precision_recall(x, y)
        errors = bootstrap_error(lambda a, b: (frechet_distance(a, b), *precision_recall(a, b)), x, y)
        for kind, label, value, error in (
            ("frechet_distance", "Fréchet distance", frechet_distance(x, y), errors[0]),
            ("kernel_distance_x1000", "Kernel distance x1000", 1000 * distance, 1000 * distance_error),
            ("precision", "Precision", precision, errors[1]),
            ("recall", "Recall", recall, errors[2]),
        ):
            name = _NAMES.get(kind, label) if getattr(extractor, "is_inception", False) else label
            figures.append({"name": name, "type": kind, "value": value, "error": error, **source})
    return figures


def check_comparable(metrics: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> None:
    """Refuse to set figures side by side that were not measured alike.

    Args:
        metrics (`list[dict]`): Of [`evaluate`].
        others (`list[dict]`): The same.

    Raises:
        ValueError: With what differs. Figures of one type by one network must have the same numbers of pictures, size,
            resize method and real faces on both sides.
    """
    known = {(metric["type"], metric["extractor"]): metric for metric in others}
    common = [(m, known[m["type"], m["extractor"]]) for m in metrics if (m["type"], m["extractor"]) in known]
    if not common:
        raise ValueError("The figures have no type and network in common, and cannot be compared.")
    differing = {
        key: f"`{key}` {ours.get(key)} and {theirs.get(key)}"
        for ours, theirs in common
        for key in PROVENANCE
        if ours.get(key) != theirs.get(key)
    }
    if differing:
        raise ValueError(
            f"The figures were not measured alike, and cannot be compared: {', '.join(differing.values())}."
        )


def table(metrics: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]] | None = None) -> str:
    """A table in Markdown of figures, those of other real faces, and `others`, where they are given."""
    beside = {(metric["type"], metric["extractor"]): metric for metric in others or ()}
    columns = ["", "value", "other real faces", "before"] if others else ["", "value", "other real faces"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]

    def shown(metric: dict[str, Any] | None) -> str:
        if metric is None or metric.get("value") is None:
            return ""
        return f"{metric['value']:.4g}" + (f" ± {metric['error']:.2g}" if metric.get("error") is not None else "")

    for metric in metrics:
        network = metric["extractor"].split(" (")[0]
        cells = [f"{metric['name']}, {network}", shown(metric), shown({"value": metric.get("real_faces")})]
        cells += [shown(beside.get((metric["type"], metric["extractor"])))] if others else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_metrics(path: str | os.PathLike) -> dict[str, Any]:
    """Read what [`write_metrics`] wrote.

    Raises:
        ValueError: It is something else.
    """
    try:
        values = json.loads(Path(path).read_text("utf-8"))
        if isinstance(values, dict) and all({"type", "value", "extractor"} <= {*m} for m in values["metrics"]):
            return values
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{str(path)!r} holds no figures of `ddpm-faces evaluate`.")


def write_metrics(path: str | os.PathLike, results: dict[str, Any]) -> None:
    """Put figures into a file, beside what else stands there, as the verdict of an audit."""
    path = Path(path)
    kept = {}
    if path.exists():
        try:
            kept = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no JSON, and is not overwritten: {error}") from error
    with replacing(path) as new:
        new.write_text(json.dumps({**kept, **results}, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _check_likelihood(num_images: int, pictures: Generated | PictureFiles) -> None:
    if type(num_images) is not int or num_images < 2:
        raise ValueError(f"`num_likelihood_images` must be 0 or a whole number of at least 2, got {num_images!r}.")
    if not isinstance(pictures, Generated):
        raise ValueError(
            "`num_likelihood_images` needs a pipeline as `source`: a folder of pictures has no likelihood."
        )
    unet, scheduler = pictures.pipeline.unet.config, pictures.scheduler
    if not isinstance(scheduler, DDPMFacesScheduler) or unet.in_channels != 3 or unet.get("num_class_embeds"):
        raise ValueError(
            "`num_likelihood_images` needs a pipeline with a DDPMFacesScheduler, of RGB and without classes, got "
            f"{type(scheduler).__name__}, {unet.in_channels} channels and {unet.get('num_class_embeds')} classes."
        )


def _likelihood(pictures: Generated, images: torch.Tensor, name: str, batch_size: int) -> dict[str, Any]:
    """The figure of bits per dimension."""
    state, unet, scheduler = PartialState(), pictures.pipeline.unet.eval(), pictures.scheduler
    bits = bits_per_dimension(
        unet, scheduler, images, NUM_LIKELIHOOD_TERMS, batch_size, state.process_index, state.num_processes
    )
    height, width = pictures.image_size
    num_terms = min(NUM_LIKELIHOOD_TERMS, len(scheduler))
    return {
        "name": "Bits per dimension",
        "type": "bits_per_dimension",
        "value": bits.mean().item(),
        "error": bits.std().item() / len(bits) ** 0.5,
        "n": len(bits),
        "n_reference": len(bits),
        "image_size": f"{width}x{height}",
        "extractor": f"variational bound ({num_terms} of {len(scheduler)} terms for each picture)",
        "resize": "none",
        "reference": f"{name} ({_fingerprint(map(_digest, images))})",
    }


def _digest(image: torch.Tensor) -> str:
    return hashlib.sha256(str(tuple(image.shape)).encode() + image.numpy().tobytes()).hexdigest()


def _fingerprint(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def _process_state() -> PartialState:
    """Of this process; an `Accelerator` sees the others on CPUs too, where `PartialState` alone does not."""
    Accelerator()
    return PartialState()


def _check_enough(argument: str, images: Sized, num_images: int | None) -> None:
    least = num_images or MIN_IMAGES
    why = "as many as `num_images`" if num_images else "or figures mean nothing"
    if len(images) < least:
        raise ValueError(f"`{argument}` must have at least {least} pictures, {why}, has {len(images)}.")


def _real_faces(
    data: str | None,
    split: str,
    baseline_split: str | None,
    size: tuple[int, int],
    num_images: int,
    cache_dir: str | None,
) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """The reference, other real faces where there are some, and what the reference is called."""
    with PartialState().main_process_first():  # which decodes them
        if data is None:  # those after the ones that train.py draws unless it is told otherwise
            faces = DrawnFaces(4096 + 2 * num_images, resolution=max(size))
            indices = tqdm(range(4096, len(faces)), desc="Drawing faces", unit="img")
            drawn = [picture_to_tensor(faces[index]["image"], size) for index in indices]
            reference, others = torch.stack(drawn).split(num_images)
            return reference, others, "drawn faces"
        load = {"resolution": size, "cache_dir": cache_dir, "max_images": num_images}
        folder = Path(data).expanduser()
        name = folder.resolve().name if folder.is_dir() else data
        if folder.is_dir() and is_picture_folder(folder):
            return load_faces(train_data_dir=data, **load).images, None, name
        reference = load_faces(dataset_name=data, split=split, **load).images
        if baseline_split is None or baseline_split == split:
            return reference, None, f"{name}, {split}"
        return reference, load_faces(dataset_name=data, split=baseline_split, **load).images, f"{name}, {split}"


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[2:]
    if min(height, width) >= DETECTION_SIDE:
        return images
    scale = DETECTION_SIDE / min(height, width)
    size = (round(height * scale), round(width * scale))
    return F.interpolate(images.float(), size=size, mode="bicubic", antialias=True).clamp(0, 255).round().byte()
