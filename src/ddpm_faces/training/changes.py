"""Differences between a resumed run and its checkpoint, and their consequences."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .checkpoint import read_state
from .config import TrainingConfig


# The consequence of a changed field, by its group.
MEANING = {
    "Data": "the run sees different images from here on",
    "Network": "the learned weights are not affected",  # a changed architecture is refused
    "Diffusion": "losses before and after cannot be compared",  # a changed noise schedule is refused
    "Optimization": "the new value applies from here on; the result differs from a run that used it from the start",
    "Validation": "held-out losses or sample grids before and after may not be comparable",
    "Run": "the learned weights are not affected",
    "Hub": "the learned weights are not affected",
}


def check_same_model(config: TrainingConfig, checkpoint: Path) -> None:
    """Refuse to resume a run that has a different network or noise schedule.

    Raises:
        ValueError: The network or the noise schedule differs. The message lists the differences.
    """
    saved = TrainingConfig(**_known(read_state(checkpoint)["config"]))
    then, now = ({**c.unet_config(), **c.scheduler_config()} for c in (saved, config))
    changed = [f"{name} was {then[name]} and is {now[name]}" for name in now if then[name] != now[name]]
    if changed:
        raise ValueError(
            f"`output_dir` {config.output_dir!r} holds a run of a different model ({'; '.join(changed)}): choose "
            "another folder, or delete the checkpoints."
        )


def describe_changes(checkpoint: Path, config: TrainingConfig, fingerprint: str, layout: dict[str, Any]) -> list[str]:
    """List the differences between a checkpoint and the run that resumes from it, as one sentence each.

    Args:
        checkpoint (`Path`): The checkpoint that the run resumes from.
        config ([`TrainingConfig`]): The configuration now.
        fingerprint (`str`): The fingerprint of the images now.
        layout (`dict`): The number of processes, the device and the precision now.
    """
    saved, notes = read_state(checkpoint), []
    groups = {f.name: f.metadata["group"] for f in fields(TrainingConfig)}
    then = saved["config"]
    for name, value in asdict(config).items():
        if name in ("output_dir", "resume", "dry_run") or then.get(name, value) == value:
            continue
        notes.append(f"`{name}` was {then[name]} and is {value}: {MEANING[groups[name]]}.")
    if saved["fingerprint"] != fingerprint:
        notes.append("The training images have changed: the run sees the new ones from here on.")
    if saved["layout"] != layout:
        changed = [f"{key} {old} -> {layout[key]}" for key, old in saved["layout"].items() if old != layout[key]]
        kept = "noise and learning rates" if config.streaming else "images, noise and learning rates"
        notes.append(
            f"The layout has changed ({', '.join(changed)}): {kept} are the same as before, weights differ by "
            "rounding (and by dropout, if any)."
        )
    return notes


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a saved configuration that this version still has."""
    return {f.name: values[f.name] for f in fields(TrainingConfig) if f.name in values}
