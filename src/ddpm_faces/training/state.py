"""How far a training run has come."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class RunState:
    """All that a run remembers beside its tensors: plain values, saved as JSON with each checkpoint.

    Args:
        images_seen (`int`): Images trained on so far.
        num_held_out (`int`, *optional*): Distinct images that are set aside; a folder that grows does not change it.
        skipped_steps (`int`): Steps that were skipped because their gradient was not finite.
        nonfinite_in_a_row (`int`): How many of them were the latest steps.
        best_loss (`float`, *optional*): The best held-out loss so far.
        best_images_seen (`int`, *optional*): After how many images that was.
        validations_since_best (`int`): How many validations have not been better.
        audits (`list[dict]`): The verdict of each audit so far, and whether its checkpoint could be saved.
        guide_images_seen (`int`, *optional*): Images seen by the weights that are kept as a guide.
        is_maintained (`bool`): Whether what is due after `images_seen` images has been done.
        unlogged_steps (`list[dict]`): Steps since the last entry of the log.
        seconds (`float`): Time that the run's processes have been at work, up to the last save.
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
        """Images seen at the last audit that found no copies, if that was saved."""
        clean = [audit for audit in self.audits if not audit["found_copies"] and audit.get("is_saved", True)]
        return clean[-1]["images_seen"] if clean else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunState":
        """The state that [`to_json`] described.

        Raises:
            ValueError: A field that this version does not know.
        """
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"The run's state has fields that this version of ddpm-faces does not know: {unknown}.")
        return cls(**values)
