"""The result of an audit: the rates of copies, the closest pairs, and the verdict."""

from dataclasses import asdict, dataclass


_LEVEL = 0.01  # probability of a false alarm by the rates, over all spaces


@dataclass(frozen=True)
class Pair:
    """A generated or held-out face, by its `index`, and its nearest training image, see [`Nearest`]."""

    index: int
    train_index: int
    is_mirrored: bool
    distance: float
    relative_distance: float


@dataclass(frozen=True)
class SpaceReport:
    """The result of comparing pixels, or features of a network.

    Attributes:
        name (`str`): `"pixels"`, or the name of the network.
        threshold (`float`): Relative distance below which a face counts as a copy.
        copy_rate (`float`): Share of the samples below the threshold, 0 to 1.
        interval (`(float, float)`): 95 % interval of the rate, by Wilson.
        held_out_copy_rate (`float`): Share of the held-out faces below the threshold, at most 1 %.
        held_out_interval (`(float, float)`): 95 % interval of that rate.
        p_value (`float`): Probability of so many samples below the threshold if they were like held-out faces.
        num_plain_copies (`int`): Samples at less than half the relative distance of any held-out face.
        median_relative_distance (`float`): Median of the samples.
        held_out_median_relative_distance (`float`): Median of the held-out faces.
        pairs (`list[Pair]`): The 32 samples with the smallest relative distances, in ascending order.
        held_out_pairs (`list[Pair]`): The same for the held-out faces.
    """

    name: str
    threshold: float
    copy_rate: float
    interval: tuple[float, float]
    held_out_copy_rate: float
    held_out_interval: tuple[float, float]
    p_value: float
    num_plain_copies: int
    median_relative_distance: float
    held_out_median_relative_distance: float
    pairs: list[Pair]
    held_out_pairs: list[Pair]


@dataclass(frozen=True)
class AuditReport:
    """The result of [`audit`]; `image_size` is height and width, `resize` describes how the extractor resizes."""

    spaces: list[SpaceReport]
    num_samples: int
    num_held_out: int
    num_train: int
    num_neighbours: int
    image_size: tuple[int, int]
    extractor: str | None
    resize: str | None

    @property
    def found_copies(self) -> bool:
        """Whether, in any space, there are plain copies, or more copies than among held-out faces (level 1 %)."""
        # One exact copy in hundreds of samples does not change a rate, but resemblance cannot explain it.
        level = _LEVEL / len(self.spaces)
        return any(space.num_plain_copies > 0 or space.p_value < level for space in self.spaces)

    @property
    def verdict(self) -> str:
        """The result in words, for a model card."""

        def percent(rate: float, interval: tuple[float, float]) -> str:
            return f"{100 * rate:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f} %)"

        result = "Copies found" if self.found_copies else "No more copies than among held-out real faces"
        findings = [
            f"by {space.name} {percent(space.copy_rate, space.interval)} of {self.num_samples} samples, of "
            f"{self.num_held_out} held-out faces {percent(space.held_out_copy_rate, space.held_out_interval)}, "
            f"p = {space.p_value:.2g}, plain copies {space.num_plain_copies}"
            for space in self.spaces
        ]
        return (
            f"{result}: {'; '.join(findings)}. A face counts if it is as near to one of {self.num_train} training "
            f"images or its mirror image, relative to its {self.num_neighbours} nearest ones, as only 1 % of the "
            "held-out faces are. It counts as a plain copy at less than half the relative distance of any held-out "
            "face. Parentheses give 95 % intervals."
        )

    def to_dict(self) -> dict:
        """Return everything as plain values for JSON."""
        return {"verdict": self.verdict, "found_copies": self.found_copies, **asdict(self)}
