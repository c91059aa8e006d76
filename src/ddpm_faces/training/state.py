"""The progress of a training run."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class RunState:
    """The progress of a run besides its tensors: plain values, saved as JSON with each checkpoint.

    Args:
        images_seen (`int`): Images trained on so far.
        num_held_out (`int`, *optional*): Distinct images set aside; stays the same when images are added to the data.
        skipped_steps (`int`): Steps that were skipped because their gradient was not finite.
        nonfinite_in_a_row (`int`): Number of the most recent steps that were skipped, without a good one in between.
        best_loss (`float`, *optional*): The best held-out loss so far.
        best_images_seen (`int`, *optional*): Images seen at the best held-out loss.
        validations_since_best (`int`): Number of validations since the best one.
        audits (`list[dict]`): The verdict of each audit so far, and whether its checkpoint could be saved.
        guide_images_seen (`int`, *optional*): Images seen by the weights that are kept as the guide.
        is_maintained (`bool`): Whether the tasks due after `images_seen` images are done.
        unlogged_steps (`list[dict]`): Steps since the last log entry.
        seconds (`float`): Seconds that the run had taken at the last save.
    """

    images_seen: int = 0
    num_held_out: int | None = None
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0
    best_loss: float | None = None
    best_images_seen: int | None = None
    validations_since_best: int = 0
    audits: list[dict] = field(default_factory=list)
    guide_images_seen: int | None = None
    is_maintained: bool = True
    unlogged_steps: list[dict] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def clean_images_seen(self) -> int | None:
        """Images seen at the last audit that found no copies and whose checkpoint was saved."""
        clean = [audit for audit in self.audits if not audit["found_copies"] and audit.get("is_saved", True)]
        return clean[-1]["images_seen"] if clean else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunState":
        """Restore the state from the output of [`to_json`].

        Raises:
            ValueError: There is a field that this version does not know.
        """
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"The run's state has fields that this version of ddpm-faces does not know: {unknown}.")
        return cls(**values)
