"""Sources of images: a folder, a dataset, or drawn faces."""

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from . import drawn_faces, portrait
from .captions import captions_of, check_folder_caption, folder_captions
from .dataset import content_hash
from .drawn_faces import DrawnFaces
from .folders import ImageFolder, find_source, resolve_source
from .labels import check_folder_label, folder_labels


@dataclass
class Source:
    """A source of images.

    Args:
        identity (`Any`): Everything that determines the images, as plain values for JSON.
        num_images (`int`): Number of images.
        read (`Callable`): Maps an index to the name of an image and a value for [`open_image`].
        labels (`Callable`, *optional*): Returns the label of each image.
        class_names (`list[str]`, *optional*): Names of the classes, if labels are class numbers.
        captions (`Callable`, *optional*): Returns the captions of each image.
    """

    identity: Any
    num_images: int
    read: Callable[[int], tuple[str, Image.Image | os.PathLike | bytes | dict | None]]
    labels: Callable[[], list[Any]] | None = None
    class_names: list[str] | None = None
    captions: Callable[[], list[list[str]]] | None = None


def drawn_source(num_images: int, side: int, label_column: str | None, caption_column: str | None = None) -> Source:
    """Return drawn faces as a source."""
    faces = DrawnFaces(num_images, resolution=side)
    labels = None
    if label_column is not None:
        attributes = drawn_faces.face_attributes(0, 0)
        if label_column not in attributes:
            raise ValueError(
                f"`label_column` {label_column!r} must be an attribute of drawn faces: {', '.join(attributes)}."
            )

        def labels() -> list[str]:
            return [drawn_faces.face_attributes(index, 0)[label_column] for index in range(num_images)]

    captions = None
    if caption_column is not None:
        if caption_column != "caption":
            raise ValueError(f"`caption_column` of drawn faces must be 'caption' or None, got {caption_column!r}.")

        def captions() -> list[list[str]]:
            return [[drawn_faces.face_caption(index, 0)] for index in range(num_images)]

    # The number of images does not matter here, because an image depends only on its index.
    code = [inspect.getsource(module).encode() for module in (drawn_faces, portrait)]
    identity = ["drawn", side, content_hash(*code)]
    return Source(identity, num_images, lambda i: (f"drawn face {i}", faces[i]["image"]), labels, captions=captions)


def folder_source(folder: ImageFolder, label_column: str | None, caption_column: str | None = None) -> Source:
    """Return the images of a folder as a source. With the `label_column` "folder", its subfolders are the classes."""
    paths, root = folder.paths, folder.root
    check_folder_label(label_column)
    check_folder_caption(caption_column)
    captions = None if caption_column is None else partial(folder_captions, folder)
    labels = None if label_column is None else partial(folder_labels, folder)
    listing = [(str(path.relative_to(root)), *_size_and_time(path)) for path in paths]
    identity: list[Any] = ["folder", str(root.resolve()), content_hash(json.dumps(listing).encode())]
    if captions is not None:
        identity.append(content_hash(json.dumps(captions()).encode()))
    return Source(identity, len(paths), lambda index: (str(paths[index]), paths[index]), labels, captions=captions)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:  # a broken link, which is reported when it is read
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def dataset_source(
    name: str,
    config_name: str | None,
    split: str,
    image_column: str | None,
    label_column: str | None,
    cache_dir: str | None,
    caption_column: str | None = None,
) -> Source:
    """Return a dataset on the Hub or in a folder as a source."""
    from datasets import ClassLabel, Value

    from .tables import check_caption_column, choose_image_column, open_table, undecoded

    dataset = open_table(name, config_name, split, cache_dir)
    image_column = choose_image_column(image_column, dataset.features, repr(name))
    labels, class_names = None, None
    if label_column is not None:
        kinds = ("bool", "int", "uint", "string", "large_string")
        label_columns = {
            column: feature
            for column, feature in dataset.features.items()
            if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and feature.dtype.startswith(kinds))
        }
        if label_column not in label_columns:
            raise ValueError(
                f"`label_column` {label_column!r} of {name!r} contains no classes. Columns that may: "
                f"{', '.join(label_columns) or 'none'}."
            )
        class_names = getattr(label_columns[label_column], "names", None)

        def labels() -> list[Any]:
            return dataset[label_column][:]

    captions = None
    if caption_column is not None:
        check_caption_column(caption_column, dataset.features, repr(name))

        def captions() -> list[list[str]]:
            return [captions_of(value) for value in dataset[caption_column][:]]

    images = undecoded(dataset, image_column)

    def read(index: int) -> tuple[str, dict | bytes | None]:
        value = images[index][image_column]
        path = value.get("path") if isinstance(value, dict) else None
        return f"row {index} ({path})" if path else f"row {index}", value

    identity = ["dataset", dataset._fingerprint, image_column]
    return Source(identity, len(dataset), read, labels, class_names, captions)


def read_captions(dataset_name: str, caption_column: str, split: str = "train") -> list[list[str]]:
    """Read the captions of a dataset or a folder of images, without its images.

    Raises:
        ValueError: As for [`load_faces`].
    """
    name, folder = find_source(dataset_name, None, split)
    if folder is not None:
        source = folder_source(folder, None, caption_column)
    else:
        source = dataset_source(name, None, split, None, None, None, caption_column)
    assert source.captions is not None
    return source.captions()


def read_columns(
    dataset_name: str, split: str, caption_column: str | None, cache_dir: str | None = None
) -> dict[str, list[Any]]:
    """Read the columns of texts, numbers, booleans and class names of a dataset, apart from the captions.

    Args:
        dataset_name (`str`): As in [`load_faces`], whose images have the same order.
        split (`str`): Split of the dataset.
        caption_column (`str`, *optional*): Column to leave out.
        cache_dir (`str`, *optional*): See [`load_faces`].
    """
    from datasets import ClassLabel, Value

    from .tables import open_table

    name, _ = resolve_source(dataset_name, None)
    dataset = open_table(name, None, split, cache_dir)
    columns: dict[str, list[Any]] = {}
    for column, feature in dataset.features.items():
        if column == caption_column or not isinstance(feature, ClassLabel | Value):
            continue
        if isinstance(feature, ClassLabel):
            names = dict(enumerate(feature.names))  # -1 is unknown
            columns[column] = [names.get(value) for value in dataset[column][:]]
        elif feature.dtype.startswith(("bool", "int", "uint", "float", "string", "large_string")):
            columns[column] = dataset[column][:]
    return columns
