"""Preparation of a dataset of faces: images are cropped, resized and stored without metadata in parquet shards."""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image
from tqdm.auto import tqdm

from ..files import check_new, new_folder
from ..hub.card import check_license, merge_cards
from ..hub.transport import check_permission, check_repo_id, publish
from .alignment import FaceAligner
from .dataset import FaceDataset, hold_out
from .loading import load_faces


DATASET_FILES = ("README.md", "data/*.parquet")
# A shard has at most `_SHARD_IMAGES` images. A dataset of `_MANY_IMAGES` or more has at least `_MANY_SHARDS` shards,
# because the processes and workers of a stream divide its shards among themselves.
_SHARD_IMAGES, _MANY_SHARDS, _MANY_IMAGES = 20_000, 8, 800

_CARD = """---
{{ card_data }}
---

# {{ title }}

<!-- generated: summary (publishing again rewrites each section between such marks; all other text is yours) -->
{{ count }} of {{ height }}x{{ width }} pixels ({{ mode }}), each {{ cropping }}, and stored as PNG without
the metadata of its file (such as place, time and camera).

{% for name, number in splits.items() -%}
- `{{ name }}`: {{ number }}
{% endfor -%}
{% if classes %}- Classes: {{ classes }}
{% endif -%}
{% if aligner %}- Photos: {{ "{:,}".format(aligner.num_photos) }}, with {{ "{:,}".format(aligner.num_faces) }} faces
{% endif -%}
{% if skipped %}- Skipped because they could not be read: {{ skipped }}
{% endif -%}
<!-- end: summary -->

## Usage

<!-- generated: use -->
```python
from datasets import load_dataset

faces = load_dataset("{{ repo_id }}", split="train")                  # or streaming=True
```

```bash
accelerate launch training/train.py --dataset_name {{ repo_id }} --resolution {{ resolution }}{{ validation }}
```
<!-- end: use -->

## People in the images

State here where the images come from, whether the people in them gave their consent, and which uses are not allowed.
"""


class Prepared(NamedTuple):
    """Result of [`prepare`].

    Args:
        where (`str`): The folder, or the URL of the commit on the Hub.
        num_images (`int`): Number of images.
        aligner ([`FaceAligner`], *optional*): What was found in photos, and what was skipped.
    """

    where: str
    num_images: int
    aligner: FaceAligner | None


def prepare(
    source: str,
    output: str | os.PathLike | None = None,
    push: str | None = None,
    resolution: int | tuple[int, int] = 128,
    channels: int = 3,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    num_test_images: int = 0,
    skip_unreadable: bool = False,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    align: bool = False,
) -> Prepared:
    """Make a dataset for training and for `datasets.load_dataset`, with or without streaming.

    Args:
        source (`str`): A folder of images, a folder of a dataset, or a dataset on the Hub, as in [`load_faces`].
        output (`str` or `os.PathLike`, *optional*): A new folder to write the dataset to.
        push (`str`, *optional*): "user/name" of a dataset repository on the Hub to publish the dataset to.
        resolution (`int` or `(int, int)`, defaults to 128): Side, or height and width, in pixels.
        channels (`int`, defaults to 3): 1 (grayscale), 3 (RGB) or 4 (RGBA).
        split (`str`, defaults to `"train"`): Split of the source.
        image_column (`str`, *optional*): As in [`load_faces`].
        label_column (`str`, *optional*): As in [`load_faces`]. It becomes the column `label`.
        num_test_images (`int`, defaults to 0): Number of images to set aside as the split `test`.
        skip_unreadable (`bool`, defaults to `False`): As in [`load_faces`].
        license (`str`, *optional*): License of the images, as an identifier of the Hub.
        private (`bool`, *optional*): As in [`ddpm_faces.hub.push`].
        token (`str`, *optional*): As in [`ddpm_faces.hub.push`].
        cache_dir (`str`, *optional*): As in [`load_faces`].
        align (`bool`, defaults to `False`):
            Whether the images are photos whose faces are to be found, cut out and turned upright as in FFHQ. There may
            be several in a photo, or none.

    Returns:
        [`Prepared`]

    Raises:
        ValueError: Neither or both of `output` and `push` are given, the source cannot be read, or `output` exists.
        HubError: As for [`ddpm_faces.hub.push`].
        ImportError: The face detector is not installed, for `align`.
    """
    if (output is None) == (push is None):
        raise ValueError("Give either `output` or `push`, as the destination of the dataset.")
    check_license("license", license)
    if num_test_images < 0:
        raise ValueError(f"`num_test_images` must be at least 0, got {num_test_images}.")
    if push is not None:
        check_repo_id(push)
        check_permission(push, private, token, "dataset")
    else:
        folder = str(output)
        check_new(folder)
    aligner = FaceAligner() if align else None
    faces = load_faces(
        dataset_name=source,
        resolution=resolution,
        channels=channels,
        split=split,
        image_column=image_column,
        label_column=label_column,
        skip_unreadable=skip_unreadable,
        cache_dir=cache_dir,
        align=aligner,
    )
    splits = {"train": faces}
    if num_test_images:
        if not 0 < num_test_images < len(faces):
            raise ValueError(f"`num_test_images` must be from 0 to {len(faces) - 1}, got {num_test_images}.")
        splits["train"], splits["test"] = hold_out(faces, num_test_images)  # with duplicates
    if push is None:
        with new_folder(folder) as unfinished:
            _write(unfinished, splits, faces, Path(folder).name, license, None, aligner)
        return Prepared(folder, len(faces), aligner)

    def write(folder: Path, old_card: str | None) -> None:
        _write(folder, splits, faces, push, license, old_card, aligner)

    url = publish(write, push, "dataset", DATASET_FILES, f"Publish {len(faces)} faces", private, token)
    return Prepared(str(url), len(faces), aligner)


def _write(
    folder: Path,
    splits: dict[str, FaceDataset],
    faces: FaceDataset,
    repo_id: str,
    license: str | None,
    old_card: str | None,
    aligner: FaceAligner | None,
) -> None:
    """Write the shards and the card of the splits of `faces`."""
    import datasets

    features: dict[str, Any] = {"image": datasets.Image()}
    if faces.labels is not None:
        features["label"] = datasets.ClassLabel(names=faces.class_names)
    (folder / "data").mkdir()
    with tqdm(total=len(faces), desc="Writing shards", unit="img") as bar, _no_bars():
        for name, part in splits.items():
            count = max(math.ceil(len(part) / _SHARD_IMAGES), _MANY_SHARDS if len(part) >= _MANY_IMAGES else 1)
            for shard in range(count):
                indices = range(len(part) * shard // count, len(part) * (shard + 1) // count)
                rows = datasets.Dataset.from_list(list(_rows(part, indices)), features=datasets.Features(features))
                rows.to_parquet(folder / "data" / f"{name}-{shard:05d}-of-{count:05d}.parquet")
                bar.update(len(indices))
    data = DatasetCardData(
        license=license,
        pretty_name=repo_id.split("/")[-1],
        task_categories=["unconditional-image-generation"],
        size_categories=[_size_category(len(faces))],
        tags=["faces", "ddpm-faces"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"data/{name}-*"} for name in splits],
            }
        ],
    )
    channels, height, width = faces[0]["images"].shape
    card = DatasetCard.from_template(
        data,
        template_str=_CARD,
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        count=f"{len(faces):,} faces",
        height=height,
        resolution=height if height == width else f"{height} {width}",
        width=width,
        mode={1: "grayscale", 3: "RGB", 4: "RGBA"}[channels],
        splits={name: f"{len(part):,} images" for name, part in splits.items()},
        classes=None if faces.class_names is None else ", ".join(faces.class_names),
        skipped=len(faces.unreadable),
        aligner=aligner,
        cropping="found in a photo and cut out as in FFHQ" if aligner else "center-cropped, resized",
        validation=" --validation_split test" if "test" in splits else "",
    )
    (folder / "README.md").write_text(str(card) if old_card is None else merge_cards(old_card, str(card)), "utf-8")


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets`, which shows one for each shard."""
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _rows(faces: FaceDataset, indices: range) -> Iterator[dict[str, Any]]:
    for index in indices:
        face = faces[index]
        pixels = face["images"].permute(1, 2, 0).squeeze(-1).contiguous().numpy()
        with io.BytesIO() as file:
            Image.fromarray(pixels).save(file, "PNG")
            row: dict[str, Any] = {"image": {"bytes": file.getvalue(), "path": None}}
        if "labels" in face:
            row["label"] = int(face["labels"])
        yield row


def _size_category(number: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((name for bound, name in bounds if number < bound), "1M<n<10M")
