"""What is other in a resumed run than when its checkpoint was saved, and what that means."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .checkpoint import read_state
from .config import TrainingConfig


# What it means that a field of a group has changed.
MEANING = {
    "Data": "from here on it sees other images",
    "Network": "nothing that is learned changes",  # a change of the architecture is refused
    "Diffusion": "losses before and after cannot be compared",  # as is one of the schedule
    "Optimization": "the new value applies from here on; the result differs from a run that had it from the start",
    "Validation": "held-out losses or grids before and after may not compare",
    "Run": "nothing that is learned changes",
    "Hub": "nothing that is learned changes",
}


def check_same_model(config: TrainingConfig, checkpoint: Path) -> None:
    """Refuse to resume a run of another network or noise schedule.

    Raises:
        ValueError: It is one, with what differs.
    """
    saved = TrainingConfig(**_known(read_state(checkpoint)["config"]))
    then, now = ({**c.unet_config(), **c.scheduler_config()} for c in (saved, config))
    changed = [f"{name}: {then[name]} there, {now[name]} now" for name in now if then[name] != now[name]]
    if changed:
        raise ValueError(
            f"`output_dir` {config.output_dir!r} holds a run of another model ({'; '.join(changed)}): choose another "
            "folder, or delete its checkpoints."
        )


def describe_changes(checkpoint: Path, config: TrainingConfig, fingerprint: str, layout: dict[str, Any]) -> list[str]:
    """Notes for the user, a sentence each.

    Args:
        checkpoint (`Path`): What the run resumes from.
        config ([`TrainingConfig`]): Its configuration now.
        fingerprint (`str`): Of its images now.
        layout (`dict`): Its processes, device and precision now.
    """
    saved, notes = read_state(checkpoint), []
    groups = {f.name: f.metadata["group"] for f in fields(TrainingConfig)}
    then = saved["config"]
    for name, value in asdict(config).items():
        if name in ("output_dir", "resume", "dry_run") or then.get(name, value) == value:
            continue
        notes.append(f"`{name}` was {then[name]} and is {value}: {MEANING[groups[name]]}.")
    if saved["fingerprint"] != fingerprint:
        notes.append("The images are not those that it has learned from so far: from here on it sees others.")
    if saved["layout"] != layout:
        changed = [f"{key} {old} -> {layout[key]}" for key, old in saved["layout"].items() if old != layout[key]]
        kept = "noise and learning rates" if config.streaming else "images, noise and learning rates"
        notes.append(
            f"Another layout ({', '.join(changed)}): {kept} stay what they would have been, weights differ by "
            "rounding (and by dropout, if there is any)."
        )
    return notes


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saved configuration that there still are."""
    return {f.name: values[f.name] for f in fields(TrainingConfig) if f.name in values}
