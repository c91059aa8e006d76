"""Evaluation of samples: their quality, and copies of training images among them."""

from typing import TYPE_CHECKING

from ..lazy import attach


if TYPE_CHECKING:
    from .copies import audit as audit
    from .copies import audit_model as audit_model
    from .likelihood import bits_per_dimension as bits_per_dimension
    from .measurements import MetricNetworks as MetricNetworks
    from .measurements import measure as measure
    from .quality import compare as compare
    from .quality import evaluate as evaluate
    from .quality import read_metrics as read_metrics
    from .quality import write_metrics as write_metrics

_MODULE_OF = {
    "MetricNetworks": "measurements",
    "audit": "copies",
    "audit_model": "copies",
    "bits_per_dimension": "likelihood",
    "compare": "quality",
    "evaluate": "quality",
    "measure": "measurements",
    "read_metrics": "quality",
    "write_metrics": "quality",
}
__getattr__, __dir__, __all__ = attach(__name__, _MODULE_OF)
