"""Images of faces: sources, decoding, and the order in which training sees them."""

from typing import TYPE_CHECKING

from ..lazy import attach


if TYPE_CHECKING:
    from .augmentation import NonLeakingAugmentation as NonLeakingAugmentation
    from .batches import FaceBatches as FaceBatches
    from .dataset import FaceDataset as FaceDataset
    from .dataset import hold_out as hold_out
    from .images import picture_to_tensor as picture_to_tensor
    from .images import random_crop as random_crop
    from .images import resize_to_cover as resize_to_cover
    from .images import to_samples as to_samples
    from .loading import load_faces as load_faces
    from .preparation import prepare as prepare
    from .stream import FaceStream as FaceStream
    from .stream import open_stream as open_stream

_MODULE_OF = {
    "FaceBatches": "batches",
    "FaceDataset": "dataset",
    "FaceStream": "stream",
    "NonLeakingAugmentation": "augmentation",
    "hold_out": "dataset",
    "load_faces": "loading",
    "open_stream": "stream",
    "picture_to_tensor": "images",
    "prepare": "preparation",
    "random_crop": "images",
    "resize_to_cover": "images",
    "to_samples": "images",
}
__getattr__, __dir__, __all__ = attach(__name__, _MODULE_OF)
