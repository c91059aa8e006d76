"""Find a model by its folder or its name on the Hub, and load it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.utils import logging

from .errors import explaining
from .pipeline_ddpm_faces import DDPMFacesPipeline


_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_model(model: str | os.PathLike) -> None:
    """Raise a `ValueError` if `model` is neither the folder of a pipeline nor a name on the Hub.

    Args:
        model (`str` or `os.PathLike`): A folder, or "user/name". Whether this name exists on the Hub is not checked.
    """
    path, shown = Path(os.path.expanduser(model)), repr(os.fspath(model))
    if path.is_file():
        raise ValueError(f"`model` {shown} is a file; give the folder of a model, or USER/NAME on the Hub.")
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return
        if any(path.glob("checkpoint-*")):
            raise ValueError(f"`model` {shown} is an unfinished training; run its command again to finish it.")
        raise ValueError(
            f"`model` {shown} holds no model (no model_index.json); give the output folder of a training run, or "
            "USER/NAME on the Hub."
        )
    if os.fspath(model).startswith(".") or not _REPO_ID.fullmatch(os.fspath(model)):
        raise ValueError(f"`model` {shown} must be an existing folder, or USER/NAME on the Hub.")


def load_pipeline(
    model: str | os.PathLike,
    guide: str | os.PathLike | None = None,
    autoguidance_scale: float | None = None,
    device: str | torch.device | None = None,
) -> DDPMFacesPipeline:
    """Load a pipeline, and optionally a weaker pipeline that guides it.

    Args:
        model (`str` or `os.PathLike`): A folder, or "user/name" on the Hub.
        guide (`str` or `os.PathLike`, *optional*): Weaker pipeline, see [`DDPMFacesPipeline.set_guide`].
        autoguidance_scale (`float`, *optional*): Required with `guide`.
        device (`str` or `torch.device`, *optional*): Device of the networks. Defaults to the fastest one.

    Raises:
        ValueError: There is no pipeline, or the guide does not match it.
        OSError: The repository does not exist, or the Hub cannot be reached.
    """
    device = device or best_device()
    check_model(model)
    if guide is None:
        return _load(model).to(device)
    if autoguidance_scale is None:
        raise ValueError("`autoguidance_scale` must be given with `guide`; 1.2 is a good start.")
    check_model(guide)
    pipeline = _load(model)
    pipeline.set_guide(_load(guide), autoguidance_scale)
    return pipeline.to(device)


def _load(model: str | os.PathLike) -> DDPMFacesPipeline:
    path = Path(os.path.expanduser(model))
    with _quiet_diffusers():
        if path.is_dir():
            return DDPMFacesPipeline.from_pretrained(path)
        with explaining(os.fspath(model), ""):
            return DDPMFacesPipeline.from_pretrained(model)


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Hide the progress bar of components, and warnings that an error repeats. Downloads keep their bars."""
    had_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def best_device() -> str:
    """Return "cuda", "mps" or "cpu": the first that is available."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def model_name(model: str | os.PathLike) -> str:
    """Return the name of a model without local paths: "user/name", or the name of its folder."""
    path = Path(os.path.expanduser(model))
    return path.resolve().name if path.is_dir() else os.fspath(model)
