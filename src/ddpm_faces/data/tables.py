"""Datasets that the `datasets` library opens, on the Hub or in a folder, and their columns."""

import errno
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from PIL import Image

from ..errors import HubError
from .folders import shorten


def open_table(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Open a dataset on the Hub, or in a folder of shards, archives or the output of `save_to_disk`.

    Args:
        name (`str`): Name on the Hub, or absolute path of the folder.
        config_name (`str`, *optional*): Configuration of the dataset.
        split (`str`, defaults to `"train"`): A split or, without `streaming`, a part of one.
        cache_dir (`str`, *optional*): Folder for downloads of `datasets`.
        streaming (`bool`, defaults to `False`): Whether to read the dataset lazily, during iteration.

    Raises:
        ValueError: `datasets` does not understand `split`, there is no such dataset, a file of a local folder is
            damaged (the message names it), or `cache_dir` cannot be written.
        HubError: The Hub cannot be reached.
    """
    instruction = _read_split(split)
    if os.path.isdir(name):
        _check_files(Path(name))
        if saved := _load_saved(Path(name), split, instruction):
            num_shards = max(1, len(saved.cache_files))
            return saved.to_iterable_dataset(min(num_shards, len(saved)) or 1) if streaming else saved
    try:
        return datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):  # it is there, and the message says how to get access
            raise HubError(str(error)) from error
        raise ValueError(
            f"`dataset_name` must be an existing folder or a dataset on the Hub, got {name!r}, which is neither (or a "
            "private dataset: log in with `hf auth login`)."
        ) from error
    except ConnectionError as error:
        raise HubError(
            f"There is no folder {name!r}, and the Hub could not be reached for a dataset of that name: check the "
            "network, or run this again later."
        ) from error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.ENOSPC, errno.ENOTDIR, errno.EROFS):
            raise  # not an error of writing the cache
        place = str(cache_dir or datasets.config.HF_DATASETS_CACHE)
        raise ValueError(f"`cache_dir` {place!r} cannot be written ({error}): choose another folder.") from error


def _read_split(split: str) -> datasets.ReadInstruction:
    try:
        return datasets.ReadInstruction.from_spec(split)
    except ValueError as error:
        raise ValueError(
            f"`split` must be the name of a split or a part of one, such as 'train' or 'train[:500]', got {split!r}: "
            f"{error}"
        ) from error


def _load_saved(folder: Path, split: str, instruction: datasets.ReadInstruction) -> datasets.Dataset | None:
    """Load a split from the output of `save_to_disk`, or return None if the folder contains something else."""
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    saved = datasets.load_from_disk(folder)
    parts = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    try:
        places = instruction.to_absolute({name: len(part) for name, part in parts.items()})
    except ValueError as error:
        raise ValueError(
            f"`split` {split!r} does not exist in {str(folder)!r}. Splits: {', '.join(parts)}."
        ) from error
    chosen = [
        parts[place.splitname].select(
            range(place.from_ or 0, len(parts[place.splitname]) if place.to is None else place.to)
        )
        for place in places
    ]
    return datasets.concatenate_datasets(chosen)


def _check_files(folder: Path) -> None:
    """Raise a `ValueError` that names truncated files, without reading the complete files."""
    damaged = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".zip") and path.is_file()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".zip":
                zipfile.ZipFile(path).close()
            else:
                pyarrow.parquet.read_metadata(path)
        except (OSError, pyarrow.ArrowException, zipfile.BadZipFile) as error:
            damaged.append(f"{path}: {error}")
    if damaged:
        raise ValueError(f"Files of the dataset are damaged:\n{shorten(damaged)}")


# Columns


def image_columns(columns: Mapping[str, Any]) -> list[str]:
    """List the columns that may contain images: first image columns, then structs of files, then binary columns.

    Args:
        columns (`Mapping`): The features of a dataset or, if it has none, its first row.
    """
    ranks = {name: rank for name, column in columns.items() if (rank := _image_rank(column)) is not None}
    return sorted(ranks, key=ranks.__getitem__)


def _image_rank(column: Any) -> int | None:
    if isinstance(column, datasets.Image | Image.Image):
        return 0
    if isinstance(column, dict) and "bytes" in column and column.keys() <= {"bytes", "path"}:
        return 1
    is_binary = isinstance(column, datasets.Value) and column.dtype.endswith("binary")
    return 2 if is_binary or isinstance(column, bytes) else None


def choose_image_column(wanted: str | None, columns: Mapping[str, Any], source: str) -> str:
    """Return the image column: `wanted`, or by default the first that contains images.

    Args:
        wanted (`str`, *optional*): The user's choice.
        columns (`Mapping`): As in [`image_columns`].
        source (`str`): Name of the dataset for the message.

    Raises:
        ValueError: No column contains images, or the chosen one does not.
    """
    found = image_columns(columns)
    if wanted is None and found:
        return found[0]
    if wanted not in found:
        problem = "No column" if wanted is None else f"`image_column` {wanted!r}"
        verb = "contains images" if wanted is None else "contains no images"
        raise ValueError(
            f"{problem} of {source} {verb}. Columns with images: {', '.join(found) or 'none'}; all columns: "
            f"{', '.join(columns)}."
        )
    return wanted


def check_caption_column(caption_column: str, columns: Mapping[str, Any], source: str) -> None:
    """Raise a `ValueError` if a column does not contain texts or lists of texts.

    Args:
        caption_column (`str`): Name of the column.
        columns (`Mapping`): As in [`image_columns`].
        source (`str`): Name of the dataset for the message.
    """
    found = [name for name, column in columns.items() if _is_caption(column)]
    if caption_column not in found:
        raise ValueError(
            f"`caption_column` {caption_column!r} of {source} contains no texts. Columns that do: "
            f"{', '.join(found) or 'none'}."
        )


def _is_caption(column: Any) -> bool:
    if isinstance(column, str):  # of a row
        return True
    if isinstance(column, list):
        return bool(column) and all(isinstance(text, str) for text in column)
    column = getattr(column, "feature", column)  # of a list
    return isinstance(column, datasets.Value) and column.dtype in ("string", "large_string")


def undecoded(dataset: Any, image_column: str, others: Iterable[str] = ()) -> Any:
    """Select the requested columns without decoding images, so that a damaged one can be reported by name."""
    dataset = dataset.select_columns([image_column, *others])
    if dataset.features is not None and isinstance(dataset.features[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset
