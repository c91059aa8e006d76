"""Checkpoints of a run, and the pipeline that comes out of it: on the disk they are whole, or not there."""

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..files import commit, delete, delete_unfinished, sync, unfinished_path


STATE_NAME = "run_state.json"
WEIGHTS_NAME = "model.safetensors"  # as accelerate calls it
EMA_NAME = "ema.safetensors"
GUIDE_NAME = "guide.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


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


def prune_checkpoints(output_dir: str | os.PathLike, keep: int, spared: Collection[Path] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and those `spared`, and what interrupted runs left unfinished."""
    for path in list_checkpoints(output_dir)[:-keep]:
        if path not in spared:
            delete(path)
    delete_unfinished(output_dir)


def read_state(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """What [`save_checkpoint`] was given as `state`.

    Raises:
        ValueError: A folder that is no checkpoint of this package.
    """
    path = Path(checkpoint, STATE_NAME)
    if not path.is_file():
        raise ValueError(f"{str(checkpoint)!r} is no checkpoint: it has no {STATE_NAME}. Move it away to go on.")
    return json.loads(path.read_text())


def save_checkpoint(
    accelerator,
    path: Path,
    state: dict[str, Any],
    ema_weights: dict[str, torch.Tensor] | None = None,
    process_state: dict[str, Any] | None = None,
    guide_weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save a run, or nothing. Called by every process.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Holds network, optimizer, and what else it prepared.
        path (`Path`): The checkpoint, by [`checkpoint_path`].
        state (`dict`): What the main process knows, plain enough for JSON.
        ema_weights (`dict[str, torch.Tensor]`, *optional*): Averaged weights, by the names of the parameters.
        process_state (`dict`, *optional*): What each process knows on its own, plain enough for JSON.
        guide_weights (`dict[str, torch.Tensor]`, *optional*): Of the guide, whole on the main process.

    Raises:
        OSError: It could not be written, such as to a full disk, by this process or another. What was written is
            deleted, and no older checkpoint is touched.
    """
    unfinished = unfinished_path(path)
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    problem = None
    try:
        accelerator.save_state(str(unfinished))  # every process adds its own random state
        if ema_weights is not None:
            _save_ema(accelerator, unfinished, ema_weights)
        if process_state is not None:
            _write_json(unfinished / _process_name(accelerator.process_index), process_state)
        if accelerator.is_main_process:
            if guide_weights is not None:
                _save_whole(guide_weights, unfinished / GUIDE_NAME)
            _write_json(unfinished / STATE_NAME, state)
    except (OSError, RuntimeError, SafetensorError) as error:  # what Python, torch and safetensors make of a full disk
        problem = error
    # It is given its name only once it is whole on all processes.
    if not _all_well(accelerator, problem):
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{path} could not be saved: {problem or 'another process failed'}") from problem
    if accelerator.is_main_process:
        try:
            commit(path)
        except OSError as error:
            problem = error
    if not _all_well(accelerator, problem):
        raise OSError(f"{path} could not be saved: {problem or 'the main process failed'}") from problem


def load_checkpoint(accelerator, checkpoint: Path, ema_weights: dict[str, torch.Tensor] | None) -> dict | None:
    """Load what [`save_checkpoint`] saved, in place. Called by every process.

    Returns:
        `dict`, *optional*: The `process_state` of this process, or of the first, if it had not been there.
    """
    accelerator.load_state(str(checkpoint))
    if ema_weights is not None:
        _load_ema(checkpoint, ema_weights)
    paths = [checkpoint / _process_name(index) for index in (accelerator.process_index, 0)]
    return next((json.loads(path.read_text()) for path in paths if path.is_file()), None)


def load_guide_weights(checkpoint: Path) -> dict[str, torch.Tensor] | None:
    """The `guide_weights` that [`save_checkpoint`] was given, if any."""
    from safetensors.torch import load_file

    path = checkpoint / GUIDE_NAME
    return load_file(path) if path.is_file() else None


def load_weights(accelerator, checkpoint: Path, unet: torch.nn.Module) -> None:
    """Put the weights of a checkpoint into the prepared network: its averaged ones, where it has any."""
    if not is_sharded(unet):
        from safetensors.torch import load_file

        weights = load_file(checkpoint / WEIGHTS_NAME)
        weights.update(load_file(checkpoint / EMA_NAME) if (checkpoint / EMA_NAME).exists() else {})
        accelerator.unwrap_model(unet).load_state_dict(weights)
    elif (checkpoint / "ema").exists():
        _load_ema(checkpoint, dict(unet.named_parameters()))
    else:
        accelerator.load_state(str(checkpoint))


def save_pipeline(pipeline, output_dir: str | os.PathLike) -> None:
    """Save `pipeline` into `output_dir`, beside whatever else stands there.

    `model_index.json` goes away first and comes last, so that an interruption leaves either the old pipeline, or the
    new one, or a folder that cannot be taken for either.
    """
    unfinished = unfinished_path(Path(output_dir, "pipeline"))
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        pipeline.save_pretrained(unfinished)
        index = Path(output_dir, "model_index.json")
        index.unlink(missing_ok=True)
        for part in list(unfinished.iterdir()):
            sync(part)
            if part.is_dir():
                commit(Path(output_dir, part.name), part)
            elif part.name != index.name:
                part.replace(Path(output_dir, part.name))
        (unfinished / index.name).replace(index)
        if pipeline.guide is None and Path(output_dir, "guide").is_dir():  # of an earlier pipeline
            delete(Path(output_dir, "guide"))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync(index.parent)


def is_sharded(unet: torch.nn.Module) -> bool:
    """Whether each process holds a part of each parameter only (FSDP)."""
    return hasattr(next(unet.parameters()), "full_tensor")


def all_finite(tensors) -> bool:
    """Whether no weight is NaN or infinite, as far as this process holds them."""
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return all(bool(tensor.isfinite().all()) for tensor in local if tensor.is_floating_point())


def _all_well(accelerator, problem: Exception | None) -> bool:
    """Whether no process has a problem; they wait for each other."""
    failed = torch.tensor([float(problem is not None)], device=accelerator.device)
    return not bool(accelerator.reduce(failed, reduction="sum"))


def _process_name(process_index: int) -> str:
    return f"process_state_{process_index}.json"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def _save_ema(accelerator, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    if any(hasattr(weight, "full_tensor") for weight in weights.values()):
        import torch.distributed.checkpoint as dcp

        dcp.save(weights, checkpoint_id=folder / "ema")  # each process its part
    elif accelerator.is_main_process:
        _save_whole(weights, folder / EMA_NAME)


def _save_whole(weights: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)


def _load_ema(checkpoint: Path, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        if (checkpoint / "ema").is_dir():
            import torch.distributed.checkpoint as dcp

            dcp.load(weights, checkpoint_id=checkpoint / "ema")
        else:
            from safetensors.torch import load_file

            saved = load_file(checkpoint / EMA_NAME)
            for name, weight in weights.items():
                weight.copy_(saved[name])
