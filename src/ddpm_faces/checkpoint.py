"""Folders that are either whole or not there: checkpoints of a run, and the pipeline that comes out of it."""

import os
import re
import shutil
from pathlib import Path


_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".unfinished-"


def checkpoint_path(output_dir: str | os.PathLike, images_seen: int) -> Path:
    """Where the checkpoint after `images_seen` images lies."""
    return Path(output_dir, f"checkpoint-{images_seen:010d}")


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The whole checkpoints in `output_dir`, oldest first."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_CHECKPOINT.fullmatch(path.name)[1]))


def prune_checkpoints(output_dir: str | os.PathLike, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what interrupted runs left unfinished."""
    for path in list_checkpoints(output_dir)[:-keep]:
        # Renamed first: a deletion that is interrupted must not leave half a checkpoint under a whole one's name.
        doomed = path.rename(_unfinished(path))
        shutil.rmtree(doomed)
    for path in Path(output_dir).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(accelerator, output_dir: str | os.PathLike, images_seen: int, keep: int) -> Path:
    """Save all that `accelerator` knows of a run, then delete the oldest checkpoints. Called by every process.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Holds the prepared objects and those registered for checkpointing.
        output_dir (`str` or `os.PathLike`): Folder of the run.
        images_seen (`int`): Images trained on so far; names the checkpoint.
        keep (`int`): Number of checkpoints to keep, at least 1.

    Returns:
        `Path`: The checkpoint.
    """
    path = checkpoint_path(output_dir, images_seen)
    unfinished = _unfinished(path)
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))  # every process adds its own random state
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _commit(unfinished, path)
        prune_checkpoints(output_dir, keep)
    accelerator.wait_for_everyone()
    return path


def save_pipeline(pipeline, output_dir: str | os.PathLike) -> None:
    """Save `pipeline` into `output_dir`, beside whatever else stands there.

    `model_index.json` goes away first and comes last, so that an interruption leaves either the old pipeline, or the
    new one, or a folder that cannot be taken for either.
    """
    unfinished = _unfinished(Path(output_dir, "pipeline"))
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.save_pretrained(unfinished)
    index = Path(output_dir, "model_index.json")
    index.unlink(missing_ok=True)
    for part in unfinished.iterdir():
        if part.is_dir():
            _commit(part, Path(output_dir, part.name))
    _sync(unfinished / index.name)
    (unfinished / index.name).replace(index)
    unfinished.rmdir()
    _sync(index.parent)


def _unfinished(path: Path) -> Path:
    """The name under which `path` is written before it is whole."""
    return path.with_name(_UNFINISHED + path.name)


def _commit(unfinished: Path, path: Path) -> None:
    """Give a finished folder its name: sync, rename, and only then delete what stood there before."""
    for root, _, names in os.walk(unfinished):
        for name in (*names, "."):
            _sync(os.path.join(root, name))
    replaced = _unfinished(path.with_name(f"replaced-{path.name}"))
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    unfinished.rename(path)
    _sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
