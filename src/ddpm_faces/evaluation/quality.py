"""How good generated faces are: metrics, each with its provenance, so that it can be measured again and compared.

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


MIN_IMAGES = 2 * NUM_SUBSETS  # each subset of the kernel distance holds at least two
MAX_IMAGES = 1000  # unless the user asks for more, which makes the errors smaller
NUM_LIKELIHOOD_TERMS = 50  # with so many, drawing them adds little to the error that few images cause
METRICS_NAME = "metrics.json"
# What two metrics must have in common to be compared. Model, sampler, steps and seeds may differ: one compares them.
PROVENANCE = ("n", "n_reference", "image_size", "extractor", "resize", "reference")
# The metrics of a feature network, and what publications call them with the Inception network.
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
    sampler: str = "ddpm",
    num_inference_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    networks: MetricNetworks | None = None,
    cache_dir: str | None = None,
    num_likelihood_images: int = 0,
    sigma_min: float | None = None,
    guide: str | os.PathLike | DDPMFacesPipeline | None = None,
    guidance_scale: float | None = None,
    epsilon_scaling: float | None = None,
    against: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measure how far faces are from real ones. Every process must call it.

    Args:
        source (`str`, `os.PathLike` or [`DDPMFacesPipeline`]):
            A pipeline, its folder or its name on the Hub; or a folder of images that any other program has made.
        data (`str`, *optional*):
            Real faces: a dataset, on the Hub or in a folder, or a folder of images. By default drawn faces, other ones
            than those that `train.py` draws.
        split (`str`, defaults to `"test"`): Held-out split of the dataset to compare against.
        baseline_split (`str`, *optional*, defaults to `"train"`):
            Split of other real faces. They are measured as if they were generated, which shows what a perfect model
            could reach.
        num_images (`int`, *optional*):
            Number of images on either side, at least 20; by default as many as there are, up to 1000.
        sampler (`str`, defaults to `"ddpm"`): `"ddpm"`, the pipeline's own scheduler, or `"dpm-solver++"`.
        num_inference_steps (`int`, *optional*): Sampling steps; by default all T.
        seed (`int`, defaults to 0):
            Seed of the first image; image i uses `seed + i` and, with classes, the class `i % num_class_embeds`.
        batch_size (`int`, defaults to 64): Images in a batch, on each process.
        networks ([`MetricNetworks`], *optional*): By default loaded on the device of this process.
        cache_dir (`str`, *optional*): See [`load_faces`].
        num_likelihood_images (`int`, defaults to 0):
            Number of real faces of which to bound the bits per dimension (DDPM eq. 5); 0 for none. Needs a pipeline
            with a [`DDPMFacesScheduler`], RGB and no classes, and takes 50 evaluations of the network per image.
        sigma_min (`float`, *optional*): For `"dpm-solver++"`, see [`fast_solver`].
        guide (`str`, `os.PathLike` or [`DDPMFacesPipeline`], *optional*): See [`open_samples`].
        guidance_scale (`float`, *optional*): See [`open_samples`].
        epsilon_scaling (`float`, *optional*): See [`open_samples`].
        against (`list[dict]`, *optional*):
            Metrics that the result is to be compared with. If they are not comparable, this is found before any image
            is generated.

    Returns:
        `dict`: Plain values, ready for JSON. `metrics` is a list of dictionaries, each with `name`, `type`, `value`,
        `error` (a standard error) and its provenance: `n`, `n_reference`, `image_size`, `extractor`, `resize`,
        `reference`, `sampler`, `steps`, `seeds`, for DPM-Solver++ also `sigma_min` and `epsilon_scaling` (unless it is
        1), with guidance `guidance_scale`, and `real_faces`, the value of the baseline. `channels` and
        `reference_channels` are mean and standard deviation of red, green and blue, for pixels in [-1, 1].

    Raises:
        ValueError: Fewer than 20 images on either side, images of several sizes, unreadable images, a model that makes
            neither RGB nor grey images, metrics in `against` that are not comparable, or an argument out of range.
        ImportError: A package that holds weights is not installed.
    """
    if num_images is not None and (type(num_images) is not int or num_images < MIN_IMAGES):
        raise ValueError(f"`num_images` must be a whole number of at least {MIN_IMAGES}, got {num_images!r}.")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"`batch_size` must be a whole number of at least 1, got {batch_size!r}.")
    state = process_state()

    # 1. What is measured
    pictures = open_samples(
        *(source, sampler, num_inference_steps, seed, state.device, sigma_min, guide, guidance_scale, epsilon_scaling)
    )
    generated = _check_likelihood(num_likelihood_images, pictures) if num_likelihood_images else None
    _check_enough("source", pictures, num_images)  # before anything is decoded
    height, width = pictures.image_size
    planned: list[dict[str, Any]] = []
    if against is not None:  # networks and size are known now, all else once the real faces are
        networks = networks or MetricNetworks(state.device)
        planned = [{**entry, "image_size": f"{width}x{height}"} for entry in _sources(networks, pictures.image_size)]
        check_comparable(planned, against, ("image_size", "resize"))

    # 2. What it is compared with
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
    """Compute the metrics of images beside real ones.

    Args:
        measured ([`Measured`]): Of the images.
        reference ([`Measured`]): Of the real ones, of the same size.
        networks ([`MetricNetworks`]): What both were measured with.

    Returns:
        `list[dict]`: As `metrics` of [`evaluate`], without the provenance that is not known here.

    Raises:
        ValueError: The sizes differ.
    """
    height, width = measured.image_size
    if measured.image_size != reference.image_size:
        raise ValueError(
            f"The images are of {width}x{height} and the real ones of {reference.image_size[1]}x"
            f"{reference.image_size[0]}: metrics would measure the resizing."
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
            # Where all halves agree, as at 1, splitting shows no error, but a share of so many images has one.
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
        keys (`list[str]`, *optional*): What must be equal; by default the numbers of images, their size, the network,
            its resizing and the real faces.

    Raises:
        ValueError: Metrics of one type by one network differ in one of `keys`, or there is no common metric.
    """
    known = {(metric["type"], metric["extractor"]): metric for metric in others}
    common = [(m, known[m["type"], m["extractor"]]) for m in metrics if (m["type"], m["extractor"]) in known]
    if not common:
        raise ValueError("The metrics have no type and network in common, and cannot be compared.")
    differing = {
        key: f"`{key}` {ours.get(key)} and {theirs.get(key)}"
        for ours, theirs in common
        for key in keys
        if ours.get(key) != theirs.get(key)
    }
    if differing:
        raise ValueError(
            f"The metrics were not measured alike, and cannot be compared: {', '.join(differing.values())}."
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
        ValueError: The file holds something else.
    """
    try:
        values = json.loads(Path(path).read_text("utf-8"))
        if isinstance(values, dict) and all({"type", "value", "extractor"} <= {*m} for m in values["metrics"]):
            return values
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{str(path)!r} holds no metrics of `ddpm-faces evaluate`.")


def write_metrics(path: str | os.PathLike, results: dict[str, Any]) -> None:
    """Write metrics into a file and keep its other entries, such as the verdict of an audit.

    Raises:
        ValueError: As [`check_metrics_file`].
    """
    content = {**check_metrics_file(path), **results}
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def check_metrics_file(path: str | os.PathLike) -> dict[str, Any]:
    """Check, before the work, that [`write_metrics`] will be able to write a file; returns what it holds.

    Raises:
        ValueError: The file holds something other than a JSON object and would be lost, or its folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}.")
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON, and is not overwritten: {error}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{str(path)!r} must hold a JSON object, and is not overwritten: it holds a {kind}.")
    return content


def _check_likelihood(num_images: int, pictures: Generated | PictureFiles) -> Generated:
    """The pictures, if their pipeline has a likelihood that can be measured; else raise a `ValueError`."""
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
    return pictures


def _sources(networks: MetricNetworks, image_size: tuple[int, int]) -> list[dict[str, Any]]:
    """Type, network and resizing of each metric that [`compare`] computes."""
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
    state, unet = PartialState(), pictures.pipeline.unet.eval()
    processes = (state.process_index, state.num_processes)
    return bits_per_dimension(unet, pictures.scheduler, images, NUM_LIKELIHOOD_TERMS, batch_size, *processes)


def _check_enough(argument: str, images: Sized, num_images: int | None) -> None:
    least = num_images or MIN_IMAGES
    why = "as many as `num_images`" if num_images else "or metrics mean nothing"
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
    """The reference, the baseline if there is one, and the name of the reference."""
    with PartialState().main_process_first():  # it decodes them, the others read its cache
        if data is None:  # those that follow the faces that train.py draws by default
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
