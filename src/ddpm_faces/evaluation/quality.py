"""Metrics of generated faces, each with its provenance, so that it can be reproduced and compared.

The faces are those of a pipeline, or a folder of images made by any other program. When `accelerate launch` starts
several processes, each generates and measures its share.
"""

import json
import os
from collections.abc import Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..checks import check_integer
from ..data.drawn_faces import DrawnFaces
from ..data.folders import is_picture_folder
from ..data.images import picture_to_tensor
from ..data.loading import load_faces
from ..files import replacing
from ..pipeline_ddpm_faces import DDPMFacesPipeline
from ..scheduling_ddpm_faces import DDPMFacesScheduler
from .likelihood import bits_per_dimension
from .measurements import Measured, MetricNetworks, detection_resize, fingerprint, measure, process_state
from .metrics import NUM_SUBSETS, frechet_distance, kernel_distance, precision_recall
from .samples import Generated, PictureFiles, open_samples, select
from .uncertainty import half_split_error, share_error


MIN_IMAGES = 2 * NUM_SUBSETS  # each subset of the kernel distance needs at least two images
MAX_IMAGES = 1000  # the default limit; more images make the errors smaller
NUM_LIKELIHOOD_TERMS = 50  # at this number, the error from drawing terms is small compared to that from few images
METRICS_NAME = "metrics.json"
# Metrics are comparable if these entries agree. Model, sampler, steps and seeds may differ.
PROVENANCE = ("n", "n_reference", "image_size", "extractor", "resize", "reference")
# The metrics of a feature network, and their names in publications for the Inception network.
_FEATURE_METRICS = {
    "frechet_distance": "Fréchet distance",
    "kernel_distance_x1000": "Kernel distance x1000",
    "precision": "Precision",
    "recall": "Recall",
}
_INCEPTION_NAMES = {"frechet_distance": "FID", "kernel_distance_x1000": "KID x1000"}


def evaluate(
    source: str | os.PathLike | DDPMFacesPipeline,
    data: str | None = None,
    split: str = "test",
    baseline_split: str | None = "train",
    num_images: int | None = None,
    preset: str | None = None,
    num_inference_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    networks: MetricNetworks | None = None,
    cache_dir: str | None = None,
    num_likelihood_images: int = 0,
    sigma_min: float | None = None,
    guide: str | os.PathLike | DDPMFacesPipeline | None = None,
    autoguidance_scale: float | None = None,
    guidance_scale: float | None = None,
    epsilon_scaling: float | None = None,
    against: Sequence[dict[str, Any]] | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Measure the distance of faces from real ones. Every process must call this.

    Args:
        source (`str`, `os.PathLike` or [`DDPMFacesPipeline`]):
            A pipeline, its folder or its name on the Hub; or a folder of images from any other program.
        data (`str`, *optional*):
            Real faces: a dataset, on the Hub or in a folder, or a folder of images. Defaults to drawn faces that
            `train.py` does not draw.
        split (`str`, defaults to `"test"`): Held-out split of the dataset to compare against.
        baseline_split (`str`, *optional*, defaults to `"train"`):
            Split of other real faces. They are measured like generated faces, which shows the values of a perfect
            model.
        num_images (`int`, *optional*):
            Number of generated and of real images, at least 20; by default as many as there are, up to 1000.
        preset (`str`, *optional*): See [`open_samples`].
        num_inference_steps (`int`, *optional*): See [`open_samples`].
        seed (`int`, defaults to 0):
            Seed of the first image; image i uses `seed + i` and, with classes, the class `i % num_class_embeds`.
        batch_size (`int`, defaults to 64): Images in a batch, on each process.
        networks ([`MetricNetworks`], *optional*): By default loaded on the device of this process.
        cache_dir (`str`, *optional*): See [`load_faces`].
        num_likelihood_images (`int`, defaults to 0):
            Number of real faces for the bound on the bits per dimension (DDPM eq. 5); 0 for none. Needs a pipeline
            with a [`DDPMFacesScheduler`], RGB and no classes, and takes 50 evaluations of the network per image.
        sigma_min (`float`, *optional*): For DPM-Solver++, see [`DDPMFacesScheduler`].
        guide (`str`, `os.PathLike` or [`DDPMFacesPipeline`], *optional*): See [`open_samples`].
        autoguidance_scale (`float`, *optional*): See [`open_samples`].
        guidance_scale (`float`, *optional*): See [`open_samples`].
        epsilon_scaling (`float`, *optional*): See [`open_samples`].
        dtype (`str`, *optional*): See [`open_samples`].
        against (`list[dict]`, *optional*):
            Metrics to compare the result with. An error is raised before any image is generated if they are not
            comparable.

    Returns:
        `dict`: Plain values, ready for JSON. `metrics` is a list of dictionaries, each with `name`, `type`, `value`,
        `error` (a standard error) and its provenance: `n`, `n_reference`, `image_size`, `extractor`, `resize`,
        `reference`, `preset`, `sampler`, `steps`, `seeds`, for a solver also `sigma_min` and `epsilon_scaling` (unless
        it is 1), with guidance its scales, in low precision `dtype`, and `real_faces`, the value of the
        baseline. `channels` and `reference_channels` are mean and standard deviation of red, green and blue, for
        pixels in [-1, 1].

    Raises:
        ValueError: There are fewer than 20 generated or real images, images of several sizes or unreadable images; the
            model generates neither RGB nor grayscale images; the metrics in `against` are not comparable; or an
            argument is out of range.
        ImportError: A package that holds weights is not installed.
    """
    if num_images is not None:
        check_integer("num_images", num_images, MIN_IMAGES)
    check_integer("batch_size", batch_size, 1)
    state = process_state()

    # 1. Generated faces
    pictures = open_samples(
        *(source, preset, num_inference_steps, seed, state.device, sigma_min, guide),
        autoguidance_scale=autoguidance_scale,
        guidance_scale=guidance_scale,
        epsilon_scaling=epsilon_scaling,
        dtype=dtype,
    )
    generated = _check_likelihood(num_likelihood_images, pictures) if num_likelihood_images else None
    _check_enough("source", pictures, num_images)  # before anything is decoded
    height, width = pictures.image_size
    planned: list[dict[str, Any]] = []
    if against is not None:  # networks and size are known now, the rest after loading the real faces
        networks = networks or MetricNetworks(state.device)
        planned = [{**entry, "image_size": f"{width}x{height}"} for entry in _sources(networks, pictures.image_size)]
        check_comparable(planned, against, ("image_size", "resize"))

    # 2. Real faces
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
    reference_name = f"{name} ({fingerprint(real)})"
    likelihood = None
    if generated is not None:
        likelihood = _likelihood_provenance(generated, real[:num_likelihood_images], name)
    if against is not None:
        known = {"n": num_images, "n_reference": len(real), "reference": reference_name}
        planned = [{**entry, **known} for entry in planned] + ([likelihood] if likelihood else [])
        check_comparable(planned, against)

    # 3. Measure
    networks = networks or MetricNetworks(state.device)
    measured = measure(pictures.batches, num_images, networks, batch_size, "Faces")
    reference = measure(select(real), len(real), networks, batch_size, "Real faces")
    baseline = None if others is None else measure(select(others), num_images, networks, batch_size, "Others")
    metrics = compare(measured, reference, networks)
    if baseline is not None:
        for metric, of_real_faces in zip(metrics, compare(baseline, reference, networks), strict=True):
            metric["real_faces"] = round(of_real_faces["value"], 4)
    provenance = {"reference": reference_name, **pictures.provenance(num_images)}
    metrics = [{**metric, **provenance} for metric in metrics]
    if generated is not None and likelihood is not None:
        bits = _bits(generated, real[:num_likelihood_images], batch_size)
        error = bits.std().item() / len(bits) ** 0.5
        value = {"name": "Bits per dimension", "value": bits.mean().item(), "error": error}
        metrics.append({**value, **likelihood})
    return {
        "metrics": metrics,
        "channels": measured.channels,
        "reference_channels": reference.channels,
    }


def compare(measured: Measured, reference: Measured, networks: MetricNetworks) -> list[dict[str, Any]]:
    """Compute the metrics of images in comparison with real ones.

    Args:
        measured ([`Measured`]): Measurements of the images.
        reference ([`Measured`]): Measurements of real images of the same size.
        networks ([`MetricNetworks`]): The networks that measured both.

    Returns:
        `list[dict]`: As `metrics` of [`evaluate`], without the provenance that is not known here.

    Raises:
        ValueError: The sizes differ.
    """
    height, width = measured.image_size
    if measured.image_size != reference.image_size:
        raise ValueError(
            f"The images have {width}x{height} pixels and the real ones {reference.image_size[1]}x"
            f"{reference.image_size[0]}: resizing would distort the metrics."
        )
    rate = measured.faces.double().mean().item()
    values = [("Faces that a detector finds", rate, share_error(rate, len(measured.faces)))]
    for extractor, x, y in zip(networks.extractors, measured.features, reference.features, strict=True):
        distance, distance_error = kernel_distance(x, y)
        precision, recall = precision_recall(x, y)
        errors = half_split_error(lambda a, b: (frechet_distance(a, b), *precision_recall(a, b)), x, y)
        of_network = (
            (frechet_distance(x, y), errors[0]),
            (1000 * distance, 1000 * distance_error),
            # If all halves agree, as at a share of 1, splitting shows no error, but the share still has one.
            (precision, max(errors[1], share_error(precision, len(x)))),
            (recall, max(errors[2], share_error(recall, len(y)))),
        )
        names = {**_FEATURE_METRICS, **(_INCEPTION_NAMES if getattr(extractor, "is_inception", False) else {})}
        values += [(name, *value) for name, value in zip(names.values(), of_network, strict=True)]
    sizes = {"n": len(measured.faces), "n_reference": len(reference.faces), "image_size": f"{width}x{height}"}
    return [
        {"name": name, "type": source.pop("type"), "value": value, "error": error, **sizes, **source}
        for source, (name, value, error) in zip(_sources(networks, measured.image_size), values, strict=True)
    ]


def check_comparable(
    metrics: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], keys: Sequence[str] = PROVENANCE
) -> None:
    """Check that two sets of metrics were measured in the same way.

    Args:
        metrics (`list[dict]`): Metrics of [`evaluate`].
        others (`list[dict]`): Metrics to compare with.
        keys (`list[str]`, *optional*): Entries that must be equal; by default the numbers of images, their size, the
            network, its resizing and the real faces.

    Raises:
        ValueError: Metrics of one type by one network differ in one of `keys`, or there is no common metric.
    """
    known = {(metric["type"], metric["extractor"]): metric for metric in others}
    common = [(m, known[m["type"], m["extractor"]]) for m in metrics if (m["type"], m["extractor"]) in known]
    if not common:
        raise ValueError("The metrics have no type and network in common and cannot be compared.")
    differing = {
        key: f"`{key}` {ours.get(key)} and {theirs.get(key)}"
        for ours, theirs in common
        for key in keys
        if ours.get(key) != theirs.get(key)
    }
    if differing:
        raise ValueError(
            "The metrics were measured with different settings and cannot be compared: "
            f"{', '.join(differing.values())}."
        )


def table(metrics: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]] | None = None) -> str:
    """Format metrics as a Markdown table, beside those of the baseline and, if given, `others`."""
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
    """Read a file of [`write_metrics`].

    Raises:
        ValueError: The file contains something else.
    """
    try:
        values = json.loads(Path(path).read_text("utf-8"))
        if isinstance(values, dict) and all({"type", "value", "extractor"} <= {*m} for m in values["metrics"]):
            return values
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{str(path)!r} does not contain metrics of `ddpm-faces evaluate`.")


def write_metrics(path: str | os.PathLike, results: dict[str, Any]) -> None:
    """Write metrics into a file and keep its other entries, such as the verdict of an audit.

    Raises:
        ValueError: As for [`check_metrics_file`].
    """
    content = {**check_metrics_file(path), **results}
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def check_metrics_file(path: str | os.PathLike) -> dict[str, Any]:
    """Check in advance that [`write_metrics`] can write a file. Return its current content.

    Raises:
        ValueError: The file is not a JSON object and would be lost, it is a folder, or its folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{str(path)!r} cannot be written: the folder {str(path.parent)!r} does not exist.")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name a file, such as {str(path / METRICS_NAME)!r}.")
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON, and will not be overwritten: {error}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{str(path)!r} must contain a JSON object, got a {kind}, and will not be overwritten.")
    return content


def _check_likelihood(num_images: int, pictures: Generated | PictureFiles) -> Generated:
    """Return `pictures` if the likelihood of their pipeline can be measured, or raise a `ValueError`."""
    if type(num_images) is not int or num_images < 2:
        raise ValueError(f"`num_likelihood_images` must be 0 or an integer of at least 2, got {num_images!r}.")
    if not isinstance(pictures, Generated):
        raise ValueError("`num_likelihood_images` needs a pipeline as `source`: a folder of images has no likelihood.")
    unet, scheduler = pictures.unet.config, pictures.scheduler
    if not isinstance(scheduler, DDPMFacesScheduler) or unet.in_channels != 3 or unet.get("num_class_embeds"):
        raise ValueError(
            "`num_likelihood_images` needs an RGB pipeline with a DDPMFacesScheduler and without classes, got "
            f"{type(scheduler).__name__}, {unet.in_channels} channels and {unet.get('num_class_embeds')} classes."
        )
    return pictures


def _sources(networks: MetricNetworks, image_size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return type, network and resizing of each metric that [`compare`] computes."""
    sources = [{"type": "face_rate", "extractor": networks.detector.name, "resize": detection_resize(image_size)}]
    for extractor in networks.extractors:
        name = getattr(extractor, "name", getattr(extractor, "__name__", type(extractor).__name__))
        resize = getattr(extractor, "resize", "the extractor's own")
        sources += [{"type": kind, "extractor": name, "resize": resize} for kind in _FEATURE_METRICS]
    return sources


def _likelihood_provenance(pictures: Generated, images: torch.Tensor, name: str) -> dict[str, Any]:
    num_terms, (height, width) = min(NUM_LIKELIHOOD_TERMS, len(pictures.scheduler)), pictures.image_size
    return {
        "type": "bits_per_dimension",
        "n": len(images),
        "n_reference": len(images),
        "image_size": f"{width}x{height}",
        "extractor": f"variational bound ({num_terms} of {len(pictures.scheduler)} terms for each picture)",
        "resize": "none",
        "reference": f"{name} ({fingerprint(images)})",
    }


def _bits(pictures: Generated, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    state, unet = PartialState(), pictures.unet.eval()
    processes = (state.process_index, state.num_processes)
    return bits_per_dimension(unet, pictures.scheduler, images, NUM_LIKELIHOOD_TERMS, batch_size, *processes)


def _check_enough(argument: str, images: Sized, num_images: int | None) -> None:
    least = num_images or MIN_IMAGES
    why = "as set by `num_images`" if num_images else "for meaningful metrics"
    if len(images) < least:
        raise ValueError(f"`{argument}` must have at least {least} images {why}, has {len(images)}.")


def _real_faces(
    data: str | None,
    split: str,
    baseline_split: str | None,
    size: tuple[int, int],
    num_images: int,
    cache_dir: str | None,
) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """Return the reference, the baseline if there is one, and the name of the reference."""
    with PartialState().main_process_first():  # the main process decodes the images, the others read its cache
        if data is None:  # faces after those that train.py draws by default
            faces = DrawnFaces(4096 + 2 * num_images, resolution=max(size))
            indices = tqdm(range(4096, len(faces)), desc="Drawing faces", unit="img")
            drawn = [picture_to_tensor(faces[index]["image"], size) for index in indices]
            reference, others = torch.stack(drawn).split(num_images)
            return reference, others, "drawn faces"
        load = partial(load_faces, resolution=size, cache_dir=cache_dir, max_images=num_images)
        folder = Path(data).expanduser()
        name = folder.resolve().name if folder.is_dir() else data
        if folder.is_dir() and is_picture_folder(folder):
            return load(train_data_dir=data).images, None, name
        reference = load(dataset_name=data, split=split).images
        if baseline_split is None or baseline_split == split:
            return reference, None, f"{name}, {split}"
        return reference, load(dataset_name=data, split=baseline_split).images, f"{name}, {split}"
