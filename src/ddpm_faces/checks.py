"""Checks of arguments: each raises a `ValueError` that names the argument, the value and what is allowed."""

MAX_INTEGER = 2**31 - 1
MAX_SEED = 2**62  # PyTorch takes seeds below 2^63


def check_integer(name: str, value: int, least: int, most: int = MAX_INTEGER) -> None:
    """Raise a `ValueError` unless `value` is an `int` from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"`{name}` must be an integer from {least} to {most}, got {value!r}.")


def check_seed(seed: int) -> None:
    """Raise a `ValueError` unless the seeds of any number of images can start at `seed`."""
    check_integer("seed", seed, 0, MAX_SEED)
