"""The classes of images."""

from typing import Any

from .folders import ImageFolder


def class_number(value: Any, num_classes: int | None = None, is_class_label: bool = False) -> int:
    """The class that a label stands for.

    Args:
        value (`int`, *optional*): What a column holds. A class label of -1 is none, as in all of `datasets`.
        num_classes (`int`, *optional*): How many classes there are, where that is known.
        is_class_label (`bool`, defaults to `False`): Whether the column is one of class labels.

    Raises:
        ValueError: No label, or one of no class.
    """
    if value is None or (is_class_label and value == -1):
        raise ValueError("no label")
    if value < 0 or (num_classes is not None and value >= num_classes):
        problem = "is negative" if num_classes is None else f"is outside 0 to {num_classes - 1}"
        raise ValueError(f"label {int(value)} {problem}")
    return int(value)


def check_folder_label(label_column: str | None) -> None:
    """Raise a `ValueError` where a folder of images has no such classes."""
    if label_column not in (None, "folder"):
        raise ValueError(f"`label_column` of a folder of pictures must be 'folder' or None, got {label_column!r}.")


def folder_labels(folder: ImageFolder) -> list[str]:
    """The name of the subfolder that each image lies in.

    Raises:
        ValueError: An image lies in none.
    """
    parts = [path.relative_to(folder.root).parts for path in folder.paths]
    if stray := [part[0] for part in parts if len(part) == 1]:
        raise ValueError(f"`label_column` 'folder' needs each picture in a subfolder, but {stray[0]} is in none.")
    return [part[0] for part in parts]
