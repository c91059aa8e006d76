"""Search generated faces for copies of training images.

A copy is far nearer to its original than to any other image. Held-out real faces show which distances are normal: they
can be near a training image by chance, by resemblance, or because the dataset repeats people, and so can samples.
"""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..checks import check_integer
from ..data.dataset import FaceDataset
from ..data.folders import is_picture_folder
from ..data.loading import load_faces
from ..objective import DDPMFacesObjective
from ..pipeline_ddpm_faces import DDPMFacesPipeline
from ..scheduling_ddpm_faces import DDPMFacesScheduler
from .audit_report import AuditReport, Pair, SpaceReport
from .closest_pairs import NUM_PAIRS, check_images, closest_pairs_picture
from .extractors import Extractor
from .held_out import held_out_losses
from .metrics import extract_features
from .neighbours import Nearest, nearest
from .samples import Generated, open_samples
from .uncertainty import exceedance_p_value, wilson_interval


MIN_IMAGES = 100  # with fewer, no held-out face would lie below the threshold
_HELD_OUT_DIVISOR = 100  # one in this many held-out faces lies below the threshold


def audit(
    samples: torch.Tensor,
    train: torch.Tensor,
    held_out: torch.Tensor,
    extractor: Extractor | None = None,
    num_neighbours: int = 50,
) -> AuditReport:
    """Search the training images for generated faces, and for held-out faces to compare with.

    Args:
        samples (`torch.Tensor` of shape `(num_samples, 3, height, width)`, `torch.uint8`):
            Generated faces, 0 to 255, at least 100.
        train (`torch.Tensor` of shape `(num_train, 3, height, width)`, `torch.uint8`):
            All training images, more than `num_neighbours`.
        held_out (`torch.Tensor` of shape `(num_held_out, 3, height, width)`, `torch.uint8`):
            Held-out real faces of the same kind, at least 100.
        extractor (`Callable`, *optional*):
            A network whose features are compared besides the pixels, see [`extract_features`]. Its attributes `name`
            and `resize`, in words, are quoted in the report if it has them.
        num_neighbours (`int`, defaults to 50): See [`nearest`].

    Returns:
        [`AuditReport`]: `found_copies`, the `verdict` in words, and the measurements by pixels and by the network.

    Raises:
        ValueError: The images have a wrong type, shape, number or size, `num_neighbours` is out of range,
            or held-out faces are training images.
    """
    for name, images, least in (
        ("samples", samples, MIN_IMAGES),
        ("train", train, 1),
        ("held_out", held_out, MIN_IMAGES),
    ):
        check_images(name, images)
        if len(images) < least:
            raise ValueError(f"`{name}` must contain at least {least} images, got {len(images)}.")
        if images.shape[2:] != samples.shape[2:]:
            raise ValueError(
                f"`{name}` and `samples` must have the same size, got (height, width) of {tuple(images.shape[2:])} "
                f"and {tuple(samples.shape[2:])}: resizing would distort the distances."
            )
    check_integer("num_neighbours", num_neighbours, 2, len(train) - 1)

    spaces, extractor_name, resize = [("pixels", partial(torch.flatten, start_dim=1))], None, None
    if extractor is not None:
        extractor_name = getattr(extractor, "name", getattr(extractor, "__name__", type(extractor).__name__))
        resize = getattr(extractor, "resize", "the extractor's own")
        spaces.append((extractor_name, partial(extract_features, extractor=extractor)))
    queries, reports = torch.cat([samples, held_out]), []
    for name, represent in spaces:
        found = nearest(represent(queries), represent(train), represent(train.flip(-1)), num_neighbours)
        parts = zip(*(column.split([len(samples), len(held_out)]) for column in found), strict=True)
        reports.append(_compare(name, *(Nearest(*part) for part in parts)))
    height, width = samples.shape[2:]
    return AuditReport(
        spaces=reports,
        num_samples=len(samples),
        num_held_out=len(held_out),
        num_train=len(train),
        num_neighbours=num_neighbours,
        image_size=(height, width),
        extractor=extractor_name,
        resize=resize,
    )


def audit_model(
    source: str | os.PathLike | DDPMFacesPipeline,
    data: str,
    split: str = "train",
    held_out_split: str = "test",
    num_images: int = 400,
    preset: str | None = None,
    num_inference_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    extractor: Extractor | None = None,
    num_loss_images: int = 100,
    cache_dir: str | None = None,
    sigma_min: float | None = None,
    guide: str | os.PathLike | DDPMFacesPipeline | None = None,
    autoguidance_scale: float | None = None,
    guidance_scale: float | None = None,
    epsilon_scaling: float | None = None,
    dtype: str | None = None,
    caption_column: str | None = None,
) -> tuple[AuditReport, dict[str, Any], Image.Image]:
    """Generate faces, and search them for copies of training images. Every process must call this. It writes no file.

    Args:
        source (`str`, `os.PathLike` or [`DDPMFacesPipeline`]):
            A pipeline, its folder or its name on the Hub; or a folder of images from any other program.
        data (`str`): The training dataset, on the Hub or in a folder.
        split (`str`, defaults to `"train"`):
            Split that contains exactly the training images: `"train[:500]"` for `--max_train_samples 500`.
        held_out_split (`str`, defaults to `"test"`): Held-out split to compare against.
        num_images (`int`, defaults to 400): Number of generated faces to check, at least 100.
        preset (`str`, *optional*): As in [`DDPMFacesPipeline`]; by default the model's, or 20 steps of DPM-Solver++.
        num_inference_steps (`int`, *optional*): As in [`DDPMFacesPipeline`].
        seed (`int`, defaults to 0): Seed of the first image; image i uses `seed + i`.
        batch_size (`int`, defaults to 32): Images in a batch.
        extractor (`Callable`, *optional*): See [`audit`].
        num_loss_images (`int`, defaults to 100):
            Number of training and of held-out images on which to compare the losses; 0 for none.
        cache_dir (`str`, *optional*): See [`load_faces`].
        sigma_min (`float`, *optional*): For DPM-Solver++, see [`DDPMFacesScheduler`].
        guide (`str`, `os.PathLike` or [`DDPMFacesPipeline`], *optional*): See [`open_samples`].
        autoguidance_scale (`float`, *optional*): See [`open_samples`].
        guidance_scale (`float`, *optional*): See [`open_samples`].
        epsilon_scaling (`float`, *optional*): See [`open_samples`].
        dtype (`str`, *optional*): See [`open_samples`].
        caption_column (`str`, *optional*):
            Column of captions; the prompts are captions of training images, chosen at random. By default there are no
            prompts.

    Returns:
        `(AuditReport, dict, PIL.Image.Image)`: The report; its plain values with the sampler, the seeds and `losses`
        (the error of the predicted noise, eq. 14 of DDPM, on training and on held-out images, with standard errors);
        and an image of the closest pairs, which shows training images.

    Raises:
        ValueError: See [`audit`] and [`open_samples`].
    """
    check_integer("num_images", num_images, MIN_IMAGES)
    check_integer("batch_size", batch_size, 1)
    check_integer("num_loss_images", num_loss_images, 0)
    if held_out_split == split:
        raise ValueError(f"`held_out_split` {held_out_split!r} must differ from `split`, the training split.")
    folder = Path(data).expanduser()
    if folder.is_dir() and is_picture_folder(folder):
        raise ValueError(
            f"`data` must be a dataset with the splits {split!r} and {held_out_split!r}, but {data!r} is a folder of "
            "images: make a dataset with `ddpm-faces prepare FOLDER --output SET --num-test-images 400`."
        )
    accelerator = Accelerator()
    pictures = open_samples(
        *(source, preset, num_inference_steps, seed, accelerator.device, sigma_min, guide),
        autoguidance_scale=autoguidance_scale,
        guidance_scale=guidance_scale,
        epsilon_scaling=epsilon_scaling,
        default_preset=None,
        dtype=dtype,
    )
    if caption_column is not None:
        if not isinstance(pictures, Generated):
            raise ValueError(f"`caption_column` needs a pipeline, but {str(source)!r} is a folder of images.")
        pictures = pictures.with_prompts(["a face"])  # before anything is decoded
    if len(pictures) < num_images:
        raise ValueError(f"`source` must have `num_images` ({num_images}) images, has {len(pictures)}.")
    load = partial(load_faces, data, resolution=pictures.image_size, cache_dir=cache_dir)
    with accelerator.main_process_first():  # the main process decodes the images, the others read its cache
        train, held_out = load(split=split, caption_column=caption_column), load(split=held_out_split)
    if len(held_out) < MIN_IMAGES:
        raise ValueError(f"`held_out_split` must contain at least {MIN_IMAGES} images, has {len(held_out)}.")
    if isinstance(pictures, Generated) and train.captions is not None:
        captions = [texts[0] for texts in train.captions if texts]
        if not captions:
            raise ValueError(f"`caption_column` {caption_column!r} of {data!r} contains no captions in {split!r}.")
        order = np.random.default_rng(0).permutation(len(captions))
        pictures = pictures.with_prompts([captions[i] for i in order])
    indices = torch.arange(num_images).split(batch_size)
    samples = torch.cat(
        [
            pictures.batches(part.tolist())
            for part in tqdm(indices, desc="Faces", disable=not accelerator.is_main_process)
        ]
    )
    report = audit(samples, train.images, held_out.images, extractor)
    results = {**report.to_dict(), **pictures.provenance(num_images)}
    if num_loss_images and isinstance(pictures, Generated) and isinstance(pictures.scheduler, DDPMFacesScheduler):
        unet = pictures.unet.config
        # The classes of these RGB images are not known here.
        if unet.get("num_class_embeds") is None and unet.in_channels == 3:
            num_loss_images = min(num_loss_images, len(train), len(held_out))
            results["losses"] = _losses(accelerator, pictures, train, held_out, num_loss_images, batch_size)
            results["verdict"] += results["losses"].pop("sentence")
    return report, results, closest_pairs_picture(report, samples, train.images, held_out.images)


def _losses(
    accelerator: Accelerator,
    pictures: Generated,
    train: FaceDataset,
    held_out: FaceDataset,
    num_images: int,
    batch_size: int,
) -> dict[str, Any]:
    """Compare the losses on training and held-out images, at the same timesteps with the same noise."""
    objective = DDPMFacesObjective(pictures.scheduler, snr_gamma=math.inf, bound_weight=0.0)
    unet, losses = pictures.unet.eval(), {}
    for name, dataset in (("train", train), ("held_out", held_out)):
        faces = FaceDataset(dataset.images[:num_images])
        values = held_out_losses(accelerator, unet, objective, faces, batch_size).mean(dim=1)  # one per image
        losses[name] = {"loss": values.mean().item(), "error": (values.std() / len(values) ** 0.5).item()}
    gap = losses["held_out"]["loss"] - losses["train"]["loss"]
    error = math.hypot(losses["held_out"]["error"], losses["train"]["error"])
    sentence = (
        f" On {num_images} held-out faces the loss is higher by {gap:.4f} ± {error:.4f} than the "
        f"{losses['train']['loss']:.4f} on as many training images."
    )
    if gap > 3 * error:
        sentence += " The model is memorizing its training images."
    return {"num_images": num_images, **losses, "sentence": sentence}


def _compare(name: str, samples: Nearest, held_out: Nearest) -> SpaceReport:
    values, held_out_values = samples.relative_distances, held_out.relative_distances.sort().values
    threshold = held_out_values[len(held_out_values) // _HELD_OUT_DIVISOR].item()
    if threshold < 1e-6:  # rounding puts exact copies slightly above 0
        raise ValueError("`held_out` must not contain training images, but more than 1 % of it is in `train`.")
    count, held_out_count = (int((side < threshold).sum()) for side in (values, held_out_values))
    return SpaceReport(
        name=name,
        threshold=threshold,
        copy_rate=count / len(values),
        interval=wilson_interval(count, len(values)),
        held_out_copy_rate=held_out_count / len(held_out_values),
        held_out_interval=wilson_interval(held_out_count, len(held_out_values)),
        p_value=exceedance_p_value(count, len(values), held_out_count, len(held_out_values)),
        num_plain_copies=int((values < held_out_values[0] / 2).sum()),
        median_relative_distance=values.quantile(0.5).item(),
        held_out_median_relative_distance=held_out_values.quantile(0.5).item(),
        pairs=_closest_pairs(samples),
        held_out_pairs=_closest_pairs(held_out),
    )


def _closest_pairs(found: Nearest) -> list[Pair]:
    closest = found.relative_distances.argsort(stable=True)[:NUM_PAIRS]
    return [Pair(*row) for row in zip(closest.tolist(), *(column[closest].tolist() for column in found), strict=True)]
