"""The captions of images."""

from typing import Any

from .folders import ImageFolder


CAPTION_FILES = "txt"  # the `caption_column` of a folder of images


def captions_of(value: Any) -> list[str]:
    """Return the captions of an image: those of a list, one text, or none of `None`. Empty ones are left out.

    Raises:
        ValueError: The value is neither a text nor a list of texts.
    """
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str | None) for text in values):
        raise ValueError(f"a caption must be a text or a list of texts, got {value!r:.100}")
    return [" ".join(text.split()) for text in values if text and not text.isspace()]


def check_folder_caption(caption_column: str | None) -> None:
    """Raise a `ValueError` if `caption_column` is not allowed for a folder of images."""
    if caption_column not in (None, CAPTION_FILES):
        raise ValueError(
            f"`caption_column` of a folder of images must be {CAPTION_FILES!r} (for face.jpg, the lines of face.txt) "
            f"or None, got {caption_column!r}."
        )


def folder_captions(folder: ImageFolder) -> list[list[str]]:
    """Return the captions of each image of a folder: the lines of the text file of the same name.

    Raises:
        ValueError: No image has a text file, or one cannot be read.
    """
    captions: list[list[str]] = []
    found = False
    for path in folder.paths:
        file = path.with_suffix(f".{CAPTION_FILES}")
        try:
            lines = file.read_text("utf-8").splitlines()
            found = True
        except FileNotFoundError:
            lines = []
        except (OSError, ValueError) as error:
            raise ValueError(f"The captions in {file} cannot be read: {error}") from error
        captions.append(captions_of(lines))
    if not found:
        raise ValueError(
            f"`caption_column` {CAPTION_FILES!r} needs text files beside the images in {str(folder.root)!r}, such as "
            "face.txt for face.jpg; there are none."
        )
    return captions
