"""Images of faces: sources, decoding, and the order in which training sees them."""

from ..lazy import attach


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
