"""The parts of a training run outside the loop: configuration, state, checkpoints, log."""

from ..lazy import attach


_MODULE_OF = {
    "TrainingConfig": "config",
    "parse_training_config": "arguments",
}
__getattr__, __dir__, __all__ = attach(__name__, _MODULE_OF)
