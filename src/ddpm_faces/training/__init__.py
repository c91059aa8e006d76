"""The parts of a training run outside the loop: configuration, state, checkpoints, log."""

from typing import TYPE_CHECKING

from ..lazy import attach


if TYPE_CHECKING:
    from .arguments import parse_training_config as parse_training_config
    from .config import TrainingConfig as TrainingConfig

_MODULE_OF = {
    "TrainingConfig": "config",
    "parse_training_config": "arguments",
}
__getattr__, __dir__, __all__ = attach(__name__, _MODULE_OF)
