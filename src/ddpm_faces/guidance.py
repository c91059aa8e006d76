"""Change the guide of a pipeline in a folder."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import commit, delete, read_json_object, replacing, unfinished_path
from .models import load_pipeline
from .pipeline_ddpm_faces import DDPMFacesPipeline


def save_guide(
    folder: str | os.PathLike,
    guide: str | os.PathLike | DDPMFacesPipeline | None,
    autoguidance_scale: float = 1.0,
    guidance_interval: Sequence[int] | None = None,
) -> None:
    """Write a guide into the folder of a pipeline, replacing an existing guide, or remove the guide.

    The weights of the pipeline itself do not change. An interruption leaves the old guide, the new one, or a folder
    whose loading reports that the guide is missing.

    Args:
        folder (`str` or `os.PathLike`): Folder of a pipeline, from training, `save_pretrained` or a download.
        guide (`str`, `os.PathLike` or [`DDPMFacesPipeline`], *optional*):
            Weaker model: a pipeline, its folder or its name on the Hub. `None` removes the guide.
        autoguidance_scale (`float`, defaults to 1.0): As in [`DDPMFacesPipeline.set_guide`].
        guidance_interval (`tuple[int, int]`, *optional*): As in [`DDPMFacesPipeline.set_guide`].

    Raises:
        ValueError: The folder contains no pipeline, its training_summary.json cannot be read, or
            [`DDPMFacesPipeline.set_guide`] refuses the guide.
        OSError: The guide cannot be loaded.
    """
    folder = Path(folder)
    pipeline = _load(folder)
    if guide is not None and not isinstance(guide, DDPMFacesPipeline):
        guide = load_pipeline(guide, device="cpu")
    pipeline.set_guide(guide, autoguidance_scale, guidance_interval)
    told = _summary(folder)
    if guide is not None:
        unfinished = unfinished_path(folder / "guide")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            pipeline.guide.save_pretrained(unfinished)
            commit(folder / "guide")
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    # The summary describes the previous guide and samples.
    _write(folder, pipeline, told and {**told, "guide_images_seen": None, "autoguidance_scale": None})
    if guide is None and (folder / "guide").is_dir():
        delete(folder / "guide")


def save_guidance(
    folder: str | os.PathLike,
    guidance_scale: float | None = None,
    autoguidance_scale: float | None = None,
    guidance_interval: Sequence[int] | None = None,
) -> None:
    """Change how the pipeline in a folder is guided by default. No weights change.

    Args:
        folder (`str` or `os.PathLike`): Folder of a pipeline.
        guidance_scale (`float`, *optional*): As in [`DDPMFacesPipeline.set_guidance`]; by default unchanged.
        autoguidance_scale (`float`, *optional*): As in [`DDPMFacesPipeline.set_guidance`]; by default unchanged.
        guidance_interval (`tuple[int, int]`, *optional*):
            As in [`DDPMFacesPipeline.set_guidance`]; by default unchanged.

    Raises:
        ValueError: The folder contains no pipeline, its training_summary.json cannot be read, or
            [`DDPMFacesPipeline.set_guidance`] refuses the values.
    """
    folder = Path(folder)
    pipeline = _load(folder)
    guidance_interval = guidance_interval or pipeline.config.guidance_interval
    asked = {"guidance_scale": guidance_scale, "autoguidance_scale": autoguidance_scale}
    scales: dict[str, Any] = {name: pipeline.config[name] if scale is None else scale for name, scale in asked.items()}
    pipeline.set_guidance(**scales, guidance_interval=guidance_interval)
    told = _summary(folder)
    _write(folder, pipeline, told and {**told, **dict.fromkeys(scales)})  # it describes the previous samples


def _load(folder: Path) -> DDPMFacesPipeline:
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"`folder` must be the folder of a pipeline: {str(folder)!r} has no model_index.json.")
    return load_pipeline(folder, device="cpu")


def _summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "training_summary.json"
    return read_json_object(path) if path.is_file() else None


def _write(folder: Path, pipeline: DDPMFacesPipeline, summary: dict[str, Any] | None) -> None:
    if summary is not None:
        with replacing(folder / "training_summary.json") as path:
            path.write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    index = json.loads(pipeline.to_json_string())
    index.pop("_name_or_path", None)
    with replacing(folder / "model_index.json") as path:
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
