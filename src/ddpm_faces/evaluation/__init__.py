"""Evaluation of samples: their quality, and copies of training images among them."""

from ..lazy import attach


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
