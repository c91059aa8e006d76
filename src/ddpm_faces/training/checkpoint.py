"""Checkpoints of a run. A run resumes only from a checkpoint that is complete.

A checkpoint is a folder:

    checkpoint-0000064000/
      model.safetensors, optimizer.bin, random_states_0.pkl, ...   saved by accelerate (shards with FSDP)
      ema.safetensors (or ema/)        the EMA, if the run keeps one
      guide.safetensors                the guide, once the run has one
      text/                            tokenizer and text encoder, of which a trained one has its weights above
      process_state_0.json             the position of each process in a stream
      run_state.json                   RunState, configuration, and size and checksum of all other files
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from ..data.batches import FaceBatches
from ..files import commit, delete, delete_unfinished, sync, unfinished_path
from .config import TrainingConfig
from .data import TrainingData
from .ema import EMA, averaged_tensors
from .state import RunState


if TYPE_CHECKING:
    from .distillation import DistillationConfig
    from .text import TextSide

STATE_NAME = "run_state.json"
WEIGHTS_NAME = "model.safetensors"  # the name that accelerate gives it
EMA_NAME = "ema.safetensors"
GUIDE_NAME = "guide.safetensors"
TEXT_FOLDER = "text"
# The format of run_state.json. Version 1 had no checksums. Later versions than this one are refused.
FORMAT_VERSION = 2
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# The errors of Python, torch and safetensors when the disk is full. CheckpointException is not an `Exception`.
SAVE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)


class DamagedCheckpointError(ValueError):
    """A checkpoint is incomplete or corrupt, for example because only a part of it was copied."""


# Finding checkpoints


def checkpoint_path(output_dir: str | os.PathLike, images_seen: int) -> Path:
    """Return the path of the checkpoint after `images_seen` images."""
    return Path(output_dir, f"checkpoint-{images_seen:010d}")


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """List the checkpoints in `output_dir`, oldest first. [`check_whole`] tells whether one is complete."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    matches = {path: match for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}
    return sorted((path for path in matches if path.is_dir()), key=lambda path: int(matches[path][1]))


def newest_whole(output_dir: str | os.PathLike) -> tuple[Path | None, dict[Path, str]]:
    """Find the checkpoint to resume from.

    Returns:
        `(Path or None, dict[Path, str])`: The newest complete checkpoint, if there is one, and the damage to each
        newer one.

    Raises:
        ValueError: All checkpoints are damaged, or a later version of the package saved the newest one.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(output_dir)):
        try:
            check_whole(path)
        except DamagedCheckpointError as error:
            damaged[path] = str(error)
        else:
            return path, damaged
    if damaged:
        raise ValueError(
            f"All checkpoints in `output_dir` {str(output_dir)!r} are damaged: {' '.join(damaged.values())} "
            "Restore one of them, or move them away to start from the beginning."
        )
    return None, damaged


def newest_config(output_dir: str | os.PathLike) -> dict[str, Any] | None:
    """Return the configuration of the newest checkpoint with a readable run_state.json, without reading tensors."""
    for path in reversed(list_checkpoints(output_dir)):
        try:
            return read_state(path)["config"]
        except DamagedCheckpointError:
            continue
    return None


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that later runs ignore it; return its new path."""
    path = checkpoint.with_name(f"damaged-{checkpoint.name}")
    number = 1
    while path.exists():
        number += 1
        path = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}")
    checkpoint.rename(path)
    return path


def check_whole(checkpoint: str | os.PathLike) -> None:
    """Compare the files of a checkpoint with the sizes and checksums recorded when it was saved.

    Raises:
        DamagedCheckpointError: A file is missing or has changed.
        ValueError: A later version of the package saved the checkpoint.
    """
    folder, state = Path(checkpoint), read_state(checkpoint)
    if "files" not in state:  # format 1 has no checksums
        _check_header(folder)
        return
    for name, (size, checksum) in state["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise DamagedCheckpointError(f"{folder} is damaged: {name} is missing.")
        if found != size:
            raise DamagedCheckpointError(f"{folder} is damaged: {name} has {found} bytes instead of {size}.")
        try:
            is_same = _checksum(path) == checksum
        except OSError as error:
            raise DamagedCheckpointError(f"{folder} cannot be read: {error}.") from error
        if not is_same:
            raise DamagedCheckpointError(f"{folder} is damaged: {name} has changed since it was saved.")


def read_state(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """Read run_state.json, with the keys `run`, `config`, `fingerprint`, `layout`, and since format 2 `files`.

    Raises:
        DamagedCheckpointError: The file is missing or cut off.
        ValueError: A later version of the package wrote it.
    """
    path = Path(checkpoint, STATE_NAME)
    try:
        state = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{checkpoint} is damaged: {STATE_NAME} is missing.") from error
    except OSError as error:
        raise DamagedCheckpointError(f"{checkpoint} cannot be read: {error}.") from error
    except ValueError as error:
        raise DamagedCheckpointError(f"{checkpoint} is damaged: {STATE_NAME} cannot be read ({error}).") from error
    if not isinstance(state, dict) or not isinstance(state.get("run"), dict):
        raise DamagedCheckpointError(f"{checkpoint} is damaged: {STATE_NAME} does not describe a run.")
    version = state.get("format_version", 1)
    known = set(RunState.__dataclass_fields__)
    if version > FORMAT_VERSION or state["run"].keys() - known:
        raise ValueError(
            f"{checkpoint} was saved by a later version of ddpm-faces (format {version}; this version reads up to "
            f"{FORMAT_VERSION}): update ddpm-faces, or choose another `output_dir`."
        )
    return {**state, "config": _upgraded(state.get("config") or {})}


def _upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a checkpoint with the names and the meaning of the current version."""
    if "autoguidance_scale" in config:
        return config
    config = {**config, "condition_dropout": 0.0}
    if "guidance_scale" in config:  # the name of the scale of autoguidance in earlier versions
        config["autoguidance_scale"] = config.pop("guidance_scale")
    return config


def prune_checkpoints(output_dir: str | os.PathLike, keep: int, spared: Collection[Path] = ()) -> None:
    """Delete unfinished checkpoints, and all others but the newest `keep` and those in `spared`."""
    for path in list_checkpoints(output_dir)[:-keep]:
        if path not in spared:
            delete(path)
    delete_unfinished(output_dir)


# Saving and loading


@dataclass
class CheckpointIO:
    """Saves and loads a run. Parts that a checkpoint lacks start from the beginning, with a note.

    Args:
        config ([`TrainingConfig`] or [`DistillationConfig`]): The run's configuration.
        accelerator ([`~accelerate.Accelerator`]): Saves network, optimizer, gradient scaler and random states.
        unet (`torch.nn.Module`): The prepared network.
        ema ([`EMA`], *optional*): The EMA of its weights.
        data ([`TrainingData`], *optional*): The run's data; the position in a stream is saved.
        text ([`TextSide`], *optional*): The tokenizer and encoder of captions.
    """

    config: "TrainingConfig | DistillationConfig"
    accelerator: Accelerator
    unet: torch.nn.Module
    ema: EMA | None
    data: TrainingData | None
    text: "TextSide | None" = None

    def save(self, path: Path, state: RunState, guide: torch.nn.Module | None = None) -> None:
        """Save a complete checkpoint or none at all. Called by every process.

        Args:
            path (`Path`): The checkpoint's path, from [`checkpoint_path`].
            state ([`RunState`]): Progress of the run.
            guide (`torch.nn.Module`, *optional*): The guide that the run has kept.

        Raises:
            OSError: This or another process could not write it, for example because the disk is full. The incomplete
                checkpoint is deleted, and older ones are not touched.
        """
        accelerator, unfinished = self.accelerator, unfinished_path(path)
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.wait_for_everyone()
        problem = None
        try:
            accelerator.save_state(str(unfinished))  # each process adds its random state
            self._save_ema(unfinished)
            self._save_stream(unfinished)
            if self.text is not None and not self.text.is_named and accelerator.is_main_process:
                self.text.save(unfinished / TEXT_FOLDER)
            if guide is not None and accelerator.is_main_process:
                _save_whole(guide.state_dict(), unfinished / GUIDE_NAME)
        except SAVE_ERRORS as error:
            problem = error
        self._agree(path, problem)
        if accelerator.is_main_process:
            # This comes last because it lists the files of all processes. Only a complete folder gets its final name.
            try:
                _write_json(unfinished / STATE_NAME, self._describe(state, unfinished))
                commit(path)
            except OSError as error:
                problem = error
        self._agree(path, problem)

    def load(self, checkpoint: Path) -> tuple[RunState, dict[str, torch.Tensor] | None, list[str]]:
        """Load a checkpoint in place. Called by every process.

        Returns:
            `(RunState, dict[str, torch.Tensor] or None, list[str])`: The run's state, the weights of the guide if
            there is one, and notes for the user on parts that the checkpoint lacks.
        """
        notes = []
        state = RunState.from_json(read_state(checkpoint)["run"])
        notes += self._load_accelerated(checkpoint)
        notes += self._load_ema(checkpoint, state)
        notes += self._load_place(checkpoint, state)
        path = checkpoint / GUIDE_NAME
        return state, _load_whole(path) if path.is_file() else None, notes

    def layout(self) -> dict[str, Any]:
        """Describe how the run is distributed over devices. A different layout rounds differently."""
        return {
            "processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "precision": self.accelerator.mixed_precision,
            "device_batch_size": self.config.device_batch_size,
        }

    def _describe(self, state: RunState, folder: Path) -> dict[str, Any]:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            "format_version": FORMAT_VERSION,
            "run": state.to_json(),
            "config": asdict(self.config),
            "fingerprint": None if self.data is None else self.data.fingerprint,
            "layout": self.layout(),
            "files": {path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path)] for path in paths},
        }

    def _agree(self, path: Path, problem: BaseException | None) -> None:
        """Raise an `OSError` on all processes if any of them has a problem. The processes wait for each other."""
        if any_failed(self.accelerator, problem is not None):
            if self.accelerator.is_main_process:
                shutil.rmtree(unfinished_path(path), ignore_errors=True)
            raise OSError(f"{path} could not be saved: {problem or 'another process failed'}") from problem

    # Network, optimizer, gradient scaler, random states

    def _load_accelerated(self, checkpoint: Path) -> list[str]:
        accelerator, scaler = self.accelerator, self.accelerator.scaler
        if scaler is None or (checkpoint / "scaler.pt").is_file():
            accelerator.load_state(str(checkpoint))
            return []
        accelerator.scaler = None  # otherwise accelerate would look for its file
        try:
            accelerator.load_state(str(checkpoint))
        finally:
            accelerator.scaler = scaler
        return [
            "The checkpoint has no loss scale because the run did not use fp16: the scale starts from its default."
        ]

    # EMA

    def _save_ema(self, folder: Path) -> None:
        if self.ema is None:
            return
        if is_sharded(self.unet):
            import torch.distributed.checkpoint as dcp

            dcp.save(self.ema.shadow, checkpoint_id=folder / "ema")  # each process saves its shards
        elif self.accelerator.is_main_process:
            _save_whole(self.ema.shadow, folder / EMA_NAME)

    def _load_ema(self, checkpoint: Path, state: RunState) -> list[str]:
        if self.ema is None:
            return []
        self.ema.restart()  # for tensors that the checkpoint's EMA lacks
        if (checkpoint / "ema").is_dir() or (checkpoint / EMA_NAME).is_file():
            load_ema(checkpoint, self.ema.shadow)
            return []
        return [f"The checkpoint has no EMA: it starts from the weights after {state.images_seen} images."]

    # Position in the data

    def _save_stream(self, folder: Path) -> None:
        if self.data is not None and not isinstance(self.data.batches, FaceBatches):
            _write_json(folder / _process_name(self.accelerator.process_index), self.data.batches.state_dict())

    def _load_place(self, checkpoint: Path, state: RunState) -> list[str]:
        if self.data is None:
            return []
        batches = self.data.batches
        if isinstance(batches, FaceBatches):  # the position follows from the images seen
            batches.images_seen = state.images_seen
            return []
        paths = [checkpoint / _process_name(index) for index in (self.accelerator.process_index, 0)]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            return ["The checkpoint has no position in a stream: the stream begins with its first image."]
        note = batches.load_state_dict(json.loads(path.read_text("utf-8")))
        return [] if note is None else [note]


def any_failed(accelerator: Accelerator, failed: bool) -> bool:
    """Whether any process has failed. The processes wait for each other."""
    count = torch.tensor([float(failed)], device=accelerator.device)
    return bool(accelerator.reduce(count, reduction="sum"))


def load_weights(accelerator: Accelerator, checkpoint: Path, unet: torch.nn.Module) -> None:
    """Load the weights of a checkpoint into the prepared network: the EMA weights if it has them."""
    if not is_sharded(unet):
        weights = _load_whole(checkpoint / WEIGHTS_NAME)
        weights.update(_load_whole(checkpoint / EMA_NAME) if (checkpoint / EMA_NAME).exists() else {})
        accelerator.unwrap_model(unet).load_state_dict(weights)
    elif (checkpoint / "ema").exists():
        load_ema(checkpoint, averaged_tensors(unet))
    else:
        accelerator.load_state(str(checkpoint))


def load_ema(checkpoint: Path, weights: dict[str, torch.Tensor]) -> None:
    """Copy the EMA of a checkpoint into `weights` by name. Tensors that it lacks stay unchanged."""
    with torch.no_grad():
        if (checkpoint / "ema").is_dir():
            import torch.distributed.checkpoint as dcp

            known = dcp.FileSystemReader(checkpoint / "ema").read_metadata().state_dict_metadata
            dcp.load({k: v for k, v in weights.items() if k in known}, checkpoint_id=checkpoint / "ema")
            return
        saved = _load_whole(checkpoint / EMA_NAME)
        for name, weight in weights.items():
            if name in saved:  # checkpoints of format 1 hold no buffers
                weight.copy_(saved[name])


def save_pipeline(pipeline, output_dir: str | os.PathLike) -> None:
    """Save `pipeline` into `output_dir`, which may contain other files.

    `model_index.json` is deleted first and written last, so that an interruption leaves the old pipeline, the new one,
    or a folder that does not load as a pipeline.
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
        for name in ("guide", "student", "tokenizer", "text_encoder"):  # from an earlier pipeline
            if pipeline.components[name] is None and Path(output_dir, name).is_dir():
                delete(Path(output_dir, name))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync(index.parent)


def is_sharded(unet: torch.nn.Module) -> bool:
    """Whether each process holds only a part of each parameter (FSDP)."""
    return hasattr(next(unet.parameters()), "full_tensor")


def all_finite(tensors) -> bool:
    """Whether all values in this process's part of the tensors are finite."""
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return all(bool(tensor.isfinite().all()) for tensor in local if tensor.is_floating_point())


def _process_name(process_index: int) -> str:
    return f"process_state_{process_index}.json"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), "utf-8")


def _save_whole(weights: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)


def _load_whole(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _check_header(folder: Path) -> None:
    """Check what can be checked in a checkpoint of format 1, which has no checksums."""
    from safetensors import safe_open

    if any(folder.glob("pytorch_model_fsdp*")):
        return  # torch keeps its own metadata of shards
    for name in (WEIGHTS_NAME, "optimizer.bin", "random_states_0.pkl"):
        if not (folder / name).is_file() or (folder / name).stat().st_size == 0:
            raise DamagedCheckpointError(f"{folder} is damaged: {name} is missing or empty.")
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpointError(f"{folder} is damaged: {path.name} cannot be read ({error}).") from error
