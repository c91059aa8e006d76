"""Measure how closely generated faces follow prompts, and their quality, at several guidance scales.

Classifiers that are fitted to real faces tell which attributes a generated face has. How often they recognize what the
caption states on held-out real faces is what a perfect model would reach.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check_integer
from ..data.dataset import FaceDataset
from ..data.drawn_faces import face_attributes
from ..data.folders import is_picture_folder
from ..data.loading import load_faces
from ..data.sources import read_columns
from ..models import load_pipeline
from ..pipeline_ddpm_faces import DDPMFacesPipeline
from .attributes import UNKNOWN, Attribute, CaptionReader, ImageReader, UnseenPair, attributes_of, unseen_pairs
from .measurements import MetricNetworks, fingerprint, measure, process_state
from .quality import MAX_IMAGES, MIN_IMAGES, compare
from .samples import Generated, open_samples, select
from .uncertainty import share_error


SCALES = (1.0, 1.5, 2.0, 3.0)
MIN_CAPTIONS = 10  # held-out captions that state a value, to measure it
MAX_FITTED = 20_000  # images to fit the classifiers to
_QUALITY = ("face_rate", "frechet_distance", "precision", "recall")
_NUM_DRAWN, _NUM_DRAWN_HELD_OUT = 4096, 400


def evaluate_prompts(
    source: str | os.PathLike | DDPMFacesPipeline,
    data: str | None = None,
    split: str = "test",
    training_split: str = "train",
    caption_column: str = "caption",
    num_images: int | None = None,
    guidance_scales: Sequence[float] | None = None,
    preset: str | None = None,
    num_inference_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    networks: MetricNetworks | None = None,
    cache_dir: str | None = None,
    sigma_min: float | None = None,
    guide: str | os.PathLike | DDPMFacesPipeline | None = None,
    autoguidance_scale: float | None = None,
    epsilon_scaling: float | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Generate faces for the captions of held-out images, and measure how often they show what the captions state.

    The attributes are columns of the dataset with 2 to 12 different values, or with numbers, which are divided into
    three groups. An attribute is measured if at least two of its values are each stated by 10 held-out captions. Every
    process must call this.

    Args:
        source (`str`, `os.PathLike` or [`DDPMFacesPipeline`]): A pipeline, its folder or its name on the Hub.
        data (`str`, *optional*):
            Real faces with captions and attributes: a dataset, on the Hub or in a folder. Defaults to drawn faces.
        split (`str`, defaults to `"test"`): Held-out split. Its captions are the prompts, in turn.
        training_split (`str`, defaults to `"train"`):
            Split whose captions, attributes and images teach the classifiers, at most 20,000 images.
        caption_column (`str`, defaults to `"caption"`): Column of the captions; the first counts in a list.
        num_images (`int`, *optional*):
            Number of generated faces, at least 20; by default as many as there are held-out images.
        guidance_scales (`list[float]`, *optional*):
            Scales of classifier-free guidance to compare; by default 1, 1.5, 2, 3 and that of the model.
        preset (`str`, *optional*): See [`open_samples`].
        num_inference_steps (`int`, *optional*): See [`open_samples`].
        seed (`int`, defaults to 0): Seed of the first image; image i uses `seed + i`.
        batch_size (`int`, defaults to 64): Images in a batch, on each process.
        networks ([`MetricNetworks`], *optional*):
            By default loaded on the device of this process. The first feature network serves the classifiers.
        cache_dir (`str`, *optional*): See [`load_faces`].
        sigma_min (`float`, *optional*): For DPM-Solver++, see [`DDPMFacesScheduler`].
        guide (`str`, `os.PathLike` or [`DDPMFacesPipeline`], *optional*): See [`open_samples`].
        autoguidance_scale (`float`, *optional*): See [`open_samples`].
        epsilon_scaling (`float`, *optional*): See [`open_samples`].
        dtype (`str`, *optional*): See [`open_samples`].

    Returns:
        `dict`: Plain values, ready for JSON. `guidance_scales`; `attributes`, a list with `name`, `values`, `n` (the
        captions that state a value), `real` and, for each scale, `generated`; `quality`, a list with `name`, `type`,
        `extractor` and, for each scale, `generated`; `unseen`, a list of pairs of values that no training image has
        together, with `name`, `prompts`, `n` and, for each scale, `generated`; and the provenance of [`evaluate`].
        Each result has `value` and `error`, a standard error. Of an attribute, the value is the balanced accuracy: the
        share of images with the stated value, averaged over the values. Of a pair, it is the share of images with
        both, according to classifiers that have not seen such an image either.

    Raises:
        ValueError: The model has no text encoder, the dataset has no captions or no attributes that they state, there
            are fewer than 20 images, or an argument is out of range.
        ImportError: A package that holds weights is not installed.
    """
    if num_images is not None:
        check_integer("num_images", num_images, MIN_IMAGES)
    check_integer("batch_size", batch_size, 1)
    if guidance_scales is not None and not guidance_scales:
        raise ValueError("`guidance_scales` must contain at least one scale.")
    if split == training_split:
        raise ValueError(f"`split` {split!r} must differ from `training_split`.")
    state = process_state()

    # 1. Samplers of all scales, before anything is decoded
    pipeline = source if isinstance(source, DDPMFacesPipeline) else load_pipeline(source, device=state.device)
    pipeline.check_prompts(["a face"])
    if guidance_scales is None:
        own = pipeline.resolve_preset(preset, num_inference_steps).guidance.guidance_scale
        guidance_scales = sorted({*SCALES, own})
    samplers = []
    for scale in guidance_scales:
        opened = open_samples(
            *(pipeline, preset, num_inference_steps, seed, state.device, sigma_min, guide),
            autoguidance_scale=autoguidance_scale,
            guidance_scale=scale,
            epsilon_scaling=epsilon_scaling,
            dtype=dtype,
        )
        assert isinstance(opened, Generated)
        samplers.append(opened)

    # 2. Captions and attributes
    with state.main_process_first():  # the main process decodes the images, the others read its cache
        faces = _CaptionedFaces.load(
            *(data, training_split, split, samplers[0].image_size, caption_column, num_images or MAX_IMAGES, cache_dir)
        )

    # 3. Real faces
    networks = networks or MetricNetworks(state.device)
    learned = _FirstExtractor(networks)
    fitted = measure(select(faces.training.images), len(faces.training), learned, batch_size, "Training faces")
    image_reader = ImageReader(fitted.features[0], faces.attributes, faces.values)
    reference = measure(select(faces.held_out.images), len(faces.held_out), networks, batch_size, "Real faces")
    real = faces.adherence(image_reader.read(reference.features[0]))

    # 4. Generated faces
    num_images = num_images or len(faces.held_out)
    prompts_of_pairs = [prompt for pair in faces.pairs for prompt in pair.prompts]
    by_scale, quality, of_pairs = [], [], []
    for scale, sampler in zip(guidance_scales, samplers, strict=True):
        generated = sampler.with_prompts(faces.captions)
        measured = measure(generated.batches, num_images, networks, batch_size, f"Guidance scale {scale:g}")
        by_scale.append(faces.adherence(image_reader.read(measured.features[0])))
        quality.append([m for m in compare(measured, reference, networks) if m["type"] in _QUALITY])
        if faces.pairs:
            generated = sampler.with_prompts(prompts_of_pairs)
            few = measure(generated.batches, len(prompts_of_pairs), learned, batch_size, "Unseen pairs")
            of_pairs.append(_share_of_pairs(faces.pairs, image_reader.read(few.features[0])))
    provenance = samplers[0].provenance(num_images)
    return {
        "guidance_scales": list(guidance_scales),
        **faces.describe(real, by_scale, of_pairs),
        "quality": _by_metric(quality),
        "n": num_images,
        "n_reference": len(faces.held_out),
        "n_fitted": len(faces.training),
        "image_size": "{1}x{0}".format(*samplers[0].image_size),
        "reference": f"{faces.name} ({fingerprint(faces.held_out.images)})",
        **{key: value for key, value in provenance.items() if key != "guidance_scale"},
    }


@dataclass
class _CaptionedFaces:
    """Real faces for the classifiers, held-out ones whose captions are the prompts, and what the captions state."""

    name: str
    training: FaceDataset
    held_out: FaceDataset
    captions: list[str]
    attributes: list[Attribute]
    stated: dict[str, np.ndarray]  # for each attribute, the code of its value in each caption, or UNKNOWN
    values: dict[str, list[int]]  # for each attribute, the codes that enough captions state
    pairs: list[UnseenPair]

    @classmethod
    def load(
        cls,
        data: str | None,
        training_split: str,
        split: str,
        size: tuple[int, int],
        caption_column: str,
        num_images: int,
        cache_dir: str | None,
    ) -> "_CaptionedFaces":
        training, held_out, attributes, name = _captioned(
            *(data, training_split, split, size, caption_column, num_images, cache_dir)
        )
        for argument, dataset in (("training_split", training), ("split", held_out)):
            if len(dataset) < MIN_IMAGES:
                raise ValueError(
                    f"`{argument}` must have at least {MIN_IMAGES} images with captions, has {len(dataset)}."
                )
        training_captions, captions = (
            [texts[0] for texts in dataset.captions or []] for dataset in (training, held_out)
        )
        reader = CaptionReader(training_captions, attributes)
        stated = reader.read(captions)
        values = {attribute: _frequent(codes) for attribute, codes in stated.items()}
        attributes = [attribute for attribute in attributes if len(values[attribute.name]) >= 2]
        if not attributes:
            raise ValueError(
                f"`data` has no attributes that can be measured: in no column are there two values that "
                f"{MIN_CAPTIONS} captions of {split!r} state."
            )
        pairs = unseen_pairs(reader, attributes, values, training_captions, captions)
        return cls(name, training, held_out, captions, attributes, stated, values, pairs)

    def adherence(self, shown: Mapping[str, np.ndarray]) -> list[dict[str, float]]:
        """Return the balanced accuracy of each attribute, with its error, for images that show the prompts in turn."""
        results = []
        for attribute in self.attributes:
            stated = np.resize(self.stated[attribute.name], len(shown[attribute.name]))
            shares, errors = [], []
            for code in self.values[attribute.name]:
                is_right = shown[attribute.name][stated == code] == code
                shares.append(float(is_right.mean()))
                errors.append(share_error(shares[-1], len(is_right)))
            results.append({"value": float(np.mean(shares)), "error": math.hypot(*errors) / len(errors)})
        return results

    def describe(
        self,
        real: Sequence[dict[str, float]],
        by_scale: Sequence[Sequence[dict[str, float]]],
        of_pairs: Sequence[Sequence[dict[str, float]]],
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the results with the names of the attributes and of the unseen pairs."""
        attributes = [
            {
                "name": attribute.name,
                "values": [attribute.values[code] for code in self.values[attribute.name]],
                "n": int(np.isin(self.stated[attribute.name], self.values[attribute.name]).sum()),
                "real": real[i],
                "generated": [results[i] for results in by_scale],
            }
            for i, attribute in enumerate(self.attributes)
        ]
        unseen = [
            {
                "name": " and ".join(
                    a.full_name(pair.values[a.name]) for a in self.attributes if a.name in pair.values
                ),
                "prompts": pair.prompts,
                "n": len(pair.prompts),
                "generated": [results[i] for results in of_pairs],
            }
            for i, pair in enumerate(self.pairs)
        ]
        return {"attributes": attributes, "unseen": unseen}


class _FirstExtractor(MetricNetworks):
    """Only the first feature network, which the classifiers use."""

    def __init__(self, networks: MetricNetworks) -> None:
        self.extractors = networks.extractors[:1]
        self.detector = lambda images: images.new_zeros(len(images))  # type: ignore[assignment]


def _share_of_pairs(pairs: Sequence[UnseenPair], shown: Mapping[str, np.ndarray]) -> list[dict[str, float]]:
    results, first = [], 0
    for pair in pairs:
        rows = slice(first, first + len(pair.prompts))
        first = rows.stop
        share = float(np.all([shown[name][rows] == code for name, code in pair.values.items()], axis=0).mean())
        results.append({"value": share, "error": share_error(share, len(pair.prompts))})
    return results


def _by_metric(quality: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Turn the metrics of each scale into one entry per metric, with a value for each scale."""
    return [
        {
            **{key: same[0][key] for key in ("name", "type", "extractor")},
            "generated": [{key: metric[key] for key in ("value", "error")} for metric in same],
        }
        for same in zip(*quality, strict=True)
    ]


def _frequent(codes: np.ndarray) -> list[int]:
    found, counts = np.unique(codes[codes != UNKNOWN], return_counts=True)
    return found[counts >= MIN_CAPTIONS].tolist()


def _captioned(
    data: str | None,
    training_split: str,
    split: str,
    size: tuple[int, int],
    caption_column: str,
    num_images: int,
    cache_dir: str | None,
) -> tuple[FaceDataset, FaceDataset, list[Attribute], str]:
    """Return the training images and `num_images` held-out ones with captions, the attributes, and a name."""
    load = partial(load_faces, resolution=size, caption_column=caption_column, cache_dir=cache_dir)
    if data is None:  # faces after those that train.py draws by default
        faces = load(num_drawn_images=_NUM_DRAWN + _NUM_DRAWN_HELD_OUT)
        training, held_out = (faces.subset(part) for part in np.split(np.arange(len(faces)), [_NUM_DRAWN]))
        drawn = [face_attributes(index) for index in range(_NUM_DRAWN)]
        columns: dict[str, list] = {name: [face[name] for face in drawn] for name in drawn[0]}
        name = "drawn faces"
    else:
        folder = Path(data).expanduser()
        if folder.is_dir() and is_picture_folder(folder):
            raise ValueError(f"`data` must be a dataset with attributes, but {data!r} is a folder of images.")
        training, held_out = (load(dataset_name=data, split=part) for part in (training_split, split))
        columns = read_columns(data, training_split, caption_column, cache_dir)
        name = f"{folder.resolve().name if folder.is_dir() else data}, {split}"
    captioned = [np.flatnonzero([bool(texts) for texts in faces.captions or []]) for faces in (training, held_out)]
    chosen, rest = captioned[0], captioned[1][:num_images]
    if len(chosen) > MAX_FITTED:
        chosen = np.sort(np.random.default_rng(0).permutation(chosen)[:MAX_FITTED])
    attributes = attributes_of({name: [column[i] for i in chosen] for name, column in columns.items()})
    return training.subset(chosen), held_out.subset(rest), attributes, name
