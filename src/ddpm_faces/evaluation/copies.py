"""Are generated faces copies of training pictures?

A copy is far nearer to its original than to all else. How near is too near, real faces tell that the model never saw:
what they come to by chance, by resemblance, or because a data set repeats people, is no evidence against a model.
"""

import math
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from ..data.dataset import FaceDataset
from ..data.folders import is_picture_folder
from ..data.loading import load_faces
from ..objective import DDPMFacesObjective
from ..pipeline_ddpm_faces import DDPMFacesPipeline
from ..plots import image_grid
from ..scheduling_ddpm_faces import DDPMFacesScheduler
from .extractors import Extractor
from .held_out import held_out_losses
from .metrics import extract_features
from .samples import Generated, open_samples


MIN_IMAGES = 100  # so that at least one held-out face lies below the threshold
NUM_PAIRS = 32  # the closest pairs that a report keeps
_HELD_OUT_DIVISOR = 100  # one held-out face in so many lies below the threshold
_LEVEL = 0.01  # chance of a false alarm by the rates, all spaces together
_ROWS, _NUMBERS = 1024, 2**24  # at a time, at most: rows, and the float64 numbers in them (128 MiB)
_COLUMNS, _MIN_SIDE, _GAP, _FONT_SIZE = 4, 96, 12, 16  # pairs in a row, pixels


class Nearest(NamedTuple):
    """What [`nearest`] found; all of shape `(num_queries,)`.

    Attributes:
        indices (`torch.Tensor`, `torch.int64`): The nearest training picture.
        is_mirrored (`torch.Tensor`, `torch.bool`): Whether its mirror image is the nearer one.
        distances (`torch.Tensor`, `torch.float64`): To that, 0 to 2.
        relative_distances (`torch.Tensor`, `torch.float64`): 0 (an exact copy) to 1.
    """

    indices: torch.Tensor
    is_mirrored: torch.Tensor
    distances: torch.Tensor
    relative_distances: torch.Tensor


@dataclass(frozen=True)
class Pair:
    """A generated or held-out face of number `index`, and its nearest training picture, see [`Nearest`]."""

    index: int
    train_index: int
    is_mirrored: bool
    distance: float
    relative_distance: float


@dataclass(frozen=True)
class SpaceReport:
    """What was found by pixels, or by the features of a network.

    Attributes:
        name (`str`): `"pixels"`, or the name of the network.
        threshold (`float`): The relative distance below which faces count as copies.
        copy_rate (`float`): Share of the samples below it, 0 to 1.
        interval (`(float, float)`): Of 95 %, by Wilson.
        held_out_copy_rate (`float`): Share of the held-out faces below it: 1 %, or what comes next below.
        held_out_interval (`(float, float)`): Of 95 %.
        p_value (`float`): Chance of so many samples below it, were they like the held-out faces.
        num_plain_copies (`int`): Samples at less than half the relative distance of any held-out face.
        median_relative_distance (`float`): Of the samples.
        held_out_median_relative_distance (`float`): Of the held-out faces.
        pairs (`list[Pair]`): The 32 samples of the smallest relative distance, rising.
        held_out_pairs (`list[Pair]`): The same of the held-out faces.
    """

    name: str
    threshold: float
    copy_rate: float
    interval: tuple[float, float]
    held_out_copy_rate: float
    held_out_interval: tuple[float, float]
    p_value: float
    num_plain_copies: int
    median_relative_distance: float
    held_out_median_relative_distance: float
    pairs: list[Pair]
    held_out_pairs: list[Pair]


@dataclass(frozen=True)
class AuditReport:
    """The result of [`audit`]; `image_size` is height and width in pixels, `resize` the extractor's, in words."""

    spaces: list[SpaceReport]
    num_samples: int
    num_held_out: int
    num_train: int
    num_neighbours: int
    image_size: tuple[int, int]
    extractor: str | None
    resize: str | None

    @property
    def found_copies(self) -> bool:
        """Whether, in any space, there are plain copies, or more than among the held-out faces at a level of 1 %."""
        # One exact copy in hundreds does not move a rate, but no resemblance brings it about.
        level = _LEVEL / len(self.spaces)
        return any(space.num_plain_copies > 0 or space.p_value < level for space in self.spaces)

    @property
    def verdict(self) -> str:
        """The result in words, for a model card."""

        def percent(rate: float, interval: tuple[float, float]) -> str:
            return f"{100 * rate:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f} %)"

        result = "Copies found" if self.found_copies else "No more copies than among unseen real faces"
        findings = [
            f"by {space.name} {percent(space.copy_rate, space.interval)} of {self.num_samples} samples, of "
            f"{self.num_held_out} held-out faces {percent(space.held_out_copy_rate, space.held_out_interval)}, "
            f"p = {space.p_value:.2g}, plain copies {space.num_plain_copies}"
            for space in self.spaces
        ]
        return (
            f"{result}: {'; '.join(findings)}. Counted are faces as near to one of {self.num_train} training pictures "
            "or its mirror image as only 1 % of the held-out faces are, relative to the "
            f"{self.num_neighbours} nearest (95 % intervals); at less than half the distance of any held-out face, "
            "they are plain copies."
        )

    def to_dict(self) -> dict:
        """All of the above as plain values, ready for JSON."""
        return {"verdict": self.verdict, "found_copies": self.found_copies, **asdict(self)}


def nearest(
    queries: torch.Tensor, train: torch.Tensor, mirrored_train: torch.Tensor, num_neighbours: int = 50
) -> Nearest:
    """Search the training picture that is nearest to each query, and tell how conspicuously near it is.

    Compared are directions from the mean of all training pictures and their mirror images. With the distances
    d_1 <= d_2 <= ... to the training pictures, each at the nearer of itself and its mirror image, and k neighbours,
    the *relative distance* is

        d_1 / mean(d_1, ..., d_k)

    the measure behind the adaptive threshold of Carlini et al. 2023 (https://huggingface.co/papers/2301.13188), who
    take k = 50 and pixels as they are.

    Args:
        queries (`torch.Tensor` of shape `(num_queries, dim)`, floating point or `torch.uint8`):
            Features, or flat pictures of 0 to 255, whose own brightness and contrast are taken out.
        train (`torch.Tensor` of shape `(num_train, dim)`, of the same type): The training pictures.
        mirrored_train (`torch.Tensor` of shape `(num_train, dim)`, of the same type): Their mirror images.
        num_neighbours (`int`, defaults to 50): The k above, at least 2 and below `num_train`.

    Returns:
        [`Nearest`]: One entry per query.

    Raises:
        ValueError: Rows of different shapes or types, or not finite, or a wrong `num_neighbours`.
    """
    for name, rows in (("train", train), ("mirrored_train", mirrored_train), ("queries", queries)):
        num_rows = len(queries) if name == "queries" else len(train)
        if rows.ndim != 2 or rows.shape != (num_rows, train.shape[1]) or rows.dtype != train.dtype:
            raise ValueError(
                f"`{name}` must be of shape (num, dim) and in dim and type like `train`, {tuple(train.shape)} and "
                f"{train.dtype}, got {tuple(rows.shape)} and {rows.dtype}."
            )
        if rows.dtype != torch.uint8 and not (rows.is_floating_point() and rows.isfinite().all()):
            raise ValueError(f"`{name}` must be uint8, or floating point and finite, got {rows.dtype} or NaN in it.")
    _check_integer("num_neighbours", num_neighbours, 2, len(train) - 1)

    size = max(1, min(_ROWS, _NUMBERS // train.shape[1]))
    blocks = range(0, len(train), size)
    sides = (train, mirrored_train)
    centre = sum(_points(side[start : start + size]).sum(dim=0) for side in sides for start in blocks) / len(train) / 2
    found = []
    with tqdm(total=len(queries) * len(train), desc="Comparing", unit="pair", unit_scale=True) as progress:
        for rows in queries.split(size):
            rows = _directions(rows, centre)
            squares = rows.new_zeros(len(rows), 0)  # the smallest squared distances so far, rising
            codes = squares.long()  # whose they are: i, or num_train + i for the mirror image of i
            for start in blocks:
                # In float64, a copy is at 0; in float32 it would not be.
                upright, mirrored = (
                    2 - 2 * rows @ _directions(side[start : start + size], centre).T for side in sides
                )
                indices = torch.arange(start, start + upright.shape[1], device=rows.device)
                codes = torch.cat([codes, torch.where(mirrored < upright, len(train) + indices, indices)], dim=1)
                squares = torch.cat([squares, torch.minimum(mirrored, upright)], dim=1)
                squares, order = squares.topk(min(num_neighbours, squares.shape[1]), largest=False)
                codes = codes.gather(1, order)
                progress.update(upright.numel())
            distances = squares.clamp(min=0).sqrt()  # (rows, num_neighbours)
            # Of a smooth or average face, which is near to everything, this stays near 1. Of a copy of a picture that
            # the data set repeats so often that the mean is 0, it is 0.
            relative_distances = distances[:, 0] / distances.mean(dim=1).clamp(min=1e-12)
            code = codes[:, 0]
            found.append((code % len(train), code >= len(train), distances[:, 0], relative_distances))
    return Nearest(*(torch.cat(values) for values in zip(*found, strict=True)))


def audit(
    samples: torch.Tensor,
    train: torch.Tensor,
    held_out: torch.Tensor,
    extractor: Extractor | None = None,
    num_neighbours: int = 50,
) -> AuditReport:
    """Search the training pictures for generated faces, and for real faces that the model never saw.

    Args:
        samples (`torch.Tensor` of shape `(num_samples, 3, height, width)`, `torch.uint8`):
            Generated faces, 0 to 255, at least 100.
        train (`torch.Tensor` of shape `(num_train, 3, height, width)`, `torch.uint8`):
            All pictures of the training, more than `num_neighbours`.
        held_out (`torch.Tensor` of shape `(num_held_out, 3, height, width)`, `torch.uint8`):
            Real faces of the same kind that the model never saw, at least 100.
        extractor (`Callable`, *optional*):
            A network to compare by, besides the pixels; see [`extract_features`]. If it has a `name` and a `resize`,
            in words, they are quoted.
        num_neighbours (`int`, defaults to 50): See [`nearest`].

    Returns:
        [`AuditReport`]: `found_copies`, the `verdict` in words, and the figures by pixels and by the network.

    Raises:
        ValueError: Pictures of a wrong type, shape or number, or of different sizes, a wrong `num_neighbours`, or
            held-out faces that are training pictures.
    """
    for name, images, least in (
        ("samples", samples, MIN_IMAGES),
        ("train", train, 1),
        ("held_out", held_out, MIN_IMAGES),
    ):
        _check_images(name, images)
        if len(images) < least:
            raise ValueError(f"`{name}` must hold at least {least} pictures, got {len(images)}.")
        if images.shape[2:] != samples.shape[2:]:
            raise ValueError(
                f"`{name}` and `samples` must be of one size, got (height, width) of {tuple(images.shape[2:])} and "
                f"{tuple(samples.shape[2:])}: the distances would measure the resizing."
            )
    _check_integer("num_neighbours", num_neighbours, 2, len(train) - 1)

    spaces, extractor_name, resize = [("pixels", partial(torch.flatten, start_dim=1))], None, None
    if extractor is not None:
        extractor_name = getattr(extractor, "name", getattr(extractor, "__name__", type(extractor).__name__))
        resize = getattr(extractor, "resize", "the extractor's own")
        spaces.append((extractor_name, partial(extract_features, extractor=extractor)))
    queries, reports = torch.cat([samples, held_out]), []
    for name, represent in spaces:
        found = nearest(*(represent(images) for images in (queries, train, train.flip(-1))), num_neighbours)
        parts = zip(*(column.split([len(samples), len(held_out)]) for column in found), strict=True)
        reports.append(_compare(name, *(Nearest(*part) for part in parts)))
    return AuditReport(
        spaces=reports,
        num_samples=len(samples),
        num_held_out=len(held_out),
        num_train=len(train),
        num_neighbours=num_neighbours,
        image_size=tuple(samples.shape[2:]),
        extractor=extractor_name,
        resize=resize,
    )


def audit_model(
    source: str | os.PathLike | DDPMFacesPipeline,
    data: str,
    split: str = "train",
    held_out_split: str = "test",
    num_images: int = 400,
    sampler: str = "dpm-solver++",
    num_inference_steps: int | None = 20,
    seed: int = 0,
    batch_size: int = 32,
    extractor: Extractor | None = None,
    num_loss_images: int = 100,
    cache_dir: str | None = None,
    sigma_min: float | None = None,
    guide: str | os.PathLike | DDPMFacesPipeline | None = None,
    guidance_scale: float | None = None,
    epsilon_scaling: float | None = None,
) -> tuple[AuditReport, dict[str, Any], Image.Image]:
    """Generate faces, and search the training pictures for them.

    Args:
        source (`str`, `os.PathLike` or [`DDPMFacesPipeline`]):
            A pipeline, its folder or its name on the Hub; or a folder of pictures that something else has made.
        data (`str`): The data set of the training, on the Hub or in a folder.
        split (`str`, defaults to `"train"`):
            What was trained on, all of it and no more: `"train[:500]"` for `--max_train_samples 500`.
        held_out_split (`str`, defaults to `"test"`): Faces that were not.
        num_images (`int`, defaults to 400): How many faces to search for, at least 100.
        sampler (`str`, defaults to `"dpm-solver++"`): Or `"ddpm"`.
        num_inference_steps (`int`, *optional*, defaults to 20): `None` for all T.
        seed (`int`, defaults to 0): Of the first face.
        batch_size (`int`, defaults to 32): Pictures at a time.
        extractor (`Callable`, *optional*): As that of [`audit`].
        num_loss_images (`int`, defaults to 100):
            Of how many pictures on either side to compare the loss, where `source` is a pipeline; 0: do not.
        cache_dir (`str`, *optional*): As that of [`load_faces`].
        sigma_min (`float`, *optional*): For `"dpm-solver++"`, as that of [`fast_solver`].
        guide (`str`, `os.PathLike` or [`DDPMFacesPipeline`], *optional*): As that of [`open_samples`].
        guidance_scale (`float`, *optional*): As that of [`open_samples`].
        epsilon_scaling (`float`, *optional*): As that of [`open_samples`].

    Returns:
        `(AuditReport, dict, PIL.Image.Image)`: What was found; the same in plain values, with the sampler, the seeds,
        and `losses`: the error of the predicted noise, eq. 14 of DDPM, on training and on held-out pictures, with
        standard errors; and the closest pairs, which show training pictures.

    Raises:
        ValueError: As [`audit`] and [`open_samples`].
    """
    _check_integer("num_images", num_images, MIN_IMAGES, 2**31)
    _check_integer("batch_size", batch_size, 1, 2**31)
    _check_integer("num_loss_images", num_loss_images, 0, 2**31)
    if held_out_split == split:
        raise ValueError(f"`held_out_split` {held_out_split!r} is what was trained on, `split`.")
    folder = Path(data).expanduser()
    if folder.is_dir() and is_picture_folder(folder):
        raise ValueError(
            f"`data` must be a data set with the splits {split!r} and {held_out_split!r}, and {data!r} is a folder of "
            "pictures: `ddpm-faces prepare FOLDER --output SET --num-test-images 400` makes one."
        )
    accelerator = Accelerator()
    pictures = open_samples(
        *(source, sampler, num_inference_steps, seed, accelerator.device, sigma_min, guide, guidance_scale),
        epsilon_scaling=epsilon_scaling,
    )
    if len(pictures) < num_images:
        raise ValueError(f"`source` must have `num_images` ({num_images}) pictures, has {len(pictures)}.")
    load = {"dataset_name": data, "resolution": pictures.image_size, "cache_dir": cache_dir}
    train, held_out = load_faces(split=split, **load), load_faces(split=held_out_split, **load)
    if len(held_out) < MIN_IMAGES:
        raise ValueError(f"`held_out_split` must hold at least {MIN_IMAGES} pictures, has {len(held_out)}.")
    indices = torch.arange(num_images).split(batch_size)
    samples = torch.cat([pictures.batches(part.tolist()) for part in tqdm(indices, desc="Faces")])
    report = audit(samples, train.images, held_out.images, extractor)
    results = {**report.to_dict(), **pictures.provenance(num_images)}
    pipeline = getattr(pictures, "pipeline", None)
    unet = None if pipeline is None else pipeline.unet.config
    # Classes of these pictures are not known here, and they are in colour.
    is_plain = unet is not None and unet.get("num_class_embeds") is None and unet.in_channels == 3
    if num_loss_images and is_plain and isinstance(pictures.scheduler, DDPMFacesScheduler):
        num_loss_images = min(num_loss_images, len(train), len(held_out))
        results["losses"] = _losses(accelerator, pictures, train, held_out, num_loss_images, batch_size)
        results["verdict"] += results["losses"].pop("sentence")
    return report, results, closest_pairs_picture(report, samples, train.images, held_out.images)


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """Compute the 95 % interval of the share `count / total`, 0 to 1, by Wilson (1927): sensible near 0, too."""
    share, z = count / total, 1.959964
    centre = share + z**2 / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max((centre - reach) / (1 + z**2 / total), 0.0), min((centre + reach) / (1 + z**2 / total), 1.0)


def exceedance_p_value(count: int, total: int, held_out_count: int, held_out_total: int) -> float:
    """Compute the chance of `count` or more samples below the threshold, were they like the held-out faces.

    It is the one-sided p of Fisher's exact test. That the threshold is itself the next of the held-out values does not
    make this unfair: so many samples lie below that value if and only if, of the first `count + held_out_count` values
    of both, at least `count` are samples, and all orders are equally likely.
    """
    ways = sum(
        math.comb(total, count + more) * math.comb(held_out_total, held_out_count - more)
        for more in range(held_out_count + 1)
    )
    return ways / math.comb(total + held_out_total, count + held_out_count)


def closest_pairs_picture(
    report: AuditReport, samples: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor, num_pairs: int = 8
) -> Image.Image:
    """Show the closest pairs of each space, of the generated faces and, to compare with, of the held-out ones.

    Args:
        report ([`AuditReport`]): What [`audit`] found among these pictures.
        samples (`torch.Tensor` of shape `(num_samples, 3, height, width)`, `torch.uint8`): Generated faces.
        train (`torch.Tensor` of shape `(num_train, 3, height, width)`, `torch.uint8`): Training pictures.
        held_out (`torch.Tensor` of shape `(num_held_out, 3, height, width)`, `torch.uint8`): Held-out faces.
        num_pairs (`int`, defaults to 8): Of each kind, 1 to 32.

    Returns:
        `PIL.Image.Image`: Four pairs in a row; on the left the face, on the right its nearest training picture,
        mirrored if that is how it is nearest, and beneath them the relative distance.

    Raises:
        ValueError: Pictures that are not those of the report, or a wrong `num_pairs`.
    """
    _check_integer("num_pairs", num_pairs, 1, NUM_PAIRS)
    sides = (("samples", samples, report.num_samples), ("train", train, report.num_train))
    for name, images, number in (*sides, ("held_out", held_out, report.num_held_out)):
        _check_images(name, images)
        if images.shape != (number, 3, *report.image_size):
            raise ValueError(
                f"`{name}` must be those of `report`, of shape {(number, 3, *report.image_size)}, got "
                f"{tuple(images.shape)}."
            )
    blocks = []
    for space in report.spaces:
        for kind, faces, pairs in (("generated", samples, space.pairs), ("held-out", held_out, space.held_out_pairs)):
            title = f"by {space.name}: {kind} | nearest training picture"
            blocks.append(_block(title, faces, train, pairs[:num_pairs]))
    picture = Image.new("RGB", (max(block.width for block in blocks), sum(block.height for block in blocks)), "white")
    top = 0
    for block in blocks:
        picture.paste(block, (0, top))
        top += block.height
    return picture


def _losses(
    accelerator: Accelerator,
    pictures: Generated,
    train: FaceDataset,
    held_out: FaceDataset,
    num_images: int,
    batch_size: int,
) -> dict[str, Any]:
    """Compare the losses on training and held-out pictures, at the same timesteps with the same noise."""
    objective = DDPMFacesObjective(pictures.scheduler, snr_gamma=math.inf, bound_weight=0.0)
    unet, losses = pictures.pipeline.unet.eval(), {}
    for name, dataset in (("train", train), ("held_out", held_out)):
        faces = FaceDataset(dataset.images[:num_images])
        values = held_out_losses(accelerator, unet, objective, faces, batch_size).mean(dim=1)  # of each picture
        losses[name] = {"loss": values.mean().item(), "error": (values.std() / len(values) ** 0.5).item()}
    gap = losses["held_out"]["loss"] - losses["train"]["loss"]
    error = math.hypot(losses["held_out"]["error"], losses["train"]["error"])
    sentence = (
        f" On {num_images} held-out faces the loss is higher by {gap:.4f} ± {error:.4f} than the "
        f"{losses['train']['loss']:.4f} on as many training pictures."
    )
    if gap > 3 * error:
        sentence += " It is learning these by heart."
    return {"num_images": num_images, **losses, "sentence": sentence}


def _points(rows: torch.Tensor) -> torch.Tensor:
    """Rows in float64, pictures without their own brightness and contrast: brighter copies are copies."""
    rows, is_picture = rows.double(), rows.dtype == torch.uint8
    return F.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1) if is_picture else rows


def _directions(rows: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Unit vectors. Seen from elsewhere, the dullest training pictures are conspicuously near to any average face."""
    return F.normalize(_points(rows) - centre, dim=1)


def _compare(name: str, samples: Nearest, held_out: Nearest) -> SpaceReport:
    values, held_out_values = samples.relative_distances, held_out.relative_distances.sort().values
    threshold = held_out_values[len(held_out_values) // _HELD_OUT_DIVISOR].item()
    if threshold < 1e-6:  # a copy is not at 0 to the last bit
        raise ValueError("`held_out` must hold faces that are not in `train`, but more than 1 % are.")
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


def _block(title: str, faces: torch.Tensor, train: torch.Tensor, pairs: list[Pair]) -> Image.Image:
    """Rows of pairs under a title."""
    tiles = []
    for pair in pairs:
        original = train[pair.train_index]
        both = (faces[pair.index], original.flip(-1) if pair.is_mirrored else original)
        images = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in both]
        tiles.append(image_grid(images, columns=2, scale=-(-_MIN_SIDE // min(images[0].size)), gap=2))
    width, height = tiles[0].width + _GAP, tiles[0].height + _FONT_SIZE + _GAP  # of a tile with its label
    columns, rows = min(_COLUMNS, len(tiles)), -(-len(tiles) // _COLUMNS)
    top = _FONT_SIZE + 2 * _GAP
    title_width = math.ceil(ImageDraw.Draw(tiles[0]).textlength(title, font_size=_FONT_SIZE))
    block = Image.new("RGB", (max(columns * width, title_width + _GAP) + _GAP, top + rows * height), "white")
    draw = ImageDraw.Draw(block)
    draw.text((_GAP, top - _GAP / 2), title, fill="black", font_size=_FONT_SIZE, anchor="ls")
    for i, (pair, tile) in enumerate(zip(pairs, tiles, strict=True)):
        corner = _GAP + i % _COLUMNS * width, top + i // _COLUMNS * height
        block.paste(tile, corner)
        label = f"{pair.relative_distance:.2f}{', mirrored' if pair.is_mirrored else ''}"
        middle = corner[0] + tile.width / 2, corner[1] + tile.height + 4
        draw.text(middle, label, fill="black", font_size=_FONT_SIZE, anchor="mt")
    return block


def _check_images(name: str, images: torch.Tensor) -> None:
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor of pictures, got {type(images).__name__}.")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"`{name}` must be of type uint8 and shape (num, 3, height, width), got {images.dtype} and "
            f"{tuple(images.shape)}."
        )


def _check_integer(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"`{name}` must be an integer from {least} to {most}, got {value!r}.")
