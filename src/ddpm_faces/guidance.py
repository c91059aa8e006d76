"""Add a guide to a pipeline in a folder, or remove it."""

import json
import os
import shutil
from pathlib import Path

from .files import commit, delete, read_json_object, replacing, unfinished_path
from .models import load_pipeline
from .pipeline_ddpm_faces import DDPMFacesPipeline


def save_guide(
    folder: str | os.PathLike, guide: str | os.PathLike | DDPMFacesPipeline | None, guidance_scale: float = 1.0
) -> None:
    """Write a guide into the folder of a pipeline, replacing an existing guide, or remove the guide.

    The weights of the pipeline itself do not change. An interruption leaves the old guide, the new one, or a folder
    whose loading reports that the guide is missing.

    Args:
        folder (`str` or `os.PathLike`): Folder of a pipeline, from training, `save_pretrained` or a download.
        guide (`str`, `os.PathLike` or [`DDPMFacesPipeline`], *optional*):
            Weaker model: a pipeline, its folder or its name on the Hub. `None` removes the guide.
        guidance_scale (`float`, defaults to 1.0): As in [`DDPMFacesPipeline.set_guide`].

    Raises:
        ValueError: The folder contains no pipeline, its training_summary.json cannot be read, or
            [`DDPMFacesPipeline.set_guide`] refuses the guide.
        OSError: The guide cannot be loaded.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"`folder` must be the folder of a pipeline: {str(folder)!r} has no model_index.json.")
    pipeline = load_pipeline(folder, device="cpu")
    if guide is not None and not isinstance(guide, DDPMFacesPipeline):
        guide = load_pipeline(guide, device="cpu")
    pipeline.set_guide(guide, guidance_scale)
    summary = folder / "training_summary.json"
    told = read_json_object(summary) if summary.is_file() else None
    values = json.loads(pipeline.to_json_string())
    values.pop("_name_or_path", None)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    if guide is not None:
        unfinished = unfinished_path(folder / "guide")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            pipeline.guide.save_pretrained(unfinished)
            commit(folder / "guide")
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    if told is not None:  # the summary describes the previous guide and samples
        told |= {"guide_images_seen": None, "guidance_scale": None}
        with replacing(summary) as path:
            path.write_text(json.dumps(told, indent=2) + "\n", "utf-8")
    with replacing(index) as path:
        path.write_text(text, "utf-8")
    if guide is None and (folder / "guide").is_dir():
        delete(folder / "guide")
