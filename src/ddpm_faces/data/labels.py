"""The classes of images."""

from typing import Any

from .folders import ImageFolder


def class_number(value: Any, num_classes: int | None = None, is_class_label: bool = False) -> int:
    """Return the class number of a label.

    Args:
        value (`int`, *optional*): The value in the column. A class label of -1 means no label, as in `datasets`.
        num_classes (`int`, *optional*): Number of classes, if known.
        is_class_label (`bool`, defaults to `False`): Whether the column has the type `ClassLabel`.

    Raises:
        ValueError: The label is missing or is not a class number.
    """
    if value is None or (is_class_label and value == -1):
        raise ValueError("no label")
    if value < 0 or (num_classes is not None and value >= num_classes):
        problem = "is negative" if num_classes is None else f"is outside 0 to {num_classes - 1}"
        raise ValueError(f"label {int(value)} {problem}")
    return int(value)


def check_folder_label(label_column: str | None) -> None:
    """Raise a `ValueError` if `label_column` is not allowed for a folder of images."""
    if label_column not in (None, "folder"):
        raise ValueError(f"`label_column` of a folder of images must be 'folder' or None, got {label_column!r}.")


def folder_labels(folder: ImageFolder) -> list[str]:
    """Return the name of the subfolder of each image.

    Raises:
        ValueError: An image is not in a subfolder.
    """
    parts = [path.relative_to(folder.root).parts for path in folder.paths]
    if stray := [part[0] for part in parts if len(part) == 1]:
        raise ValueError(f"`label_column` 'folder' needs each image in a subfolder, but {stray[0]} is in none.")
    return [part[0] for part in parts]
