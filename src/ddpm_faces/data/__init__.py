"""Images of faces: where they come from, how they are decoded, in which order they are trained on."""

from ..lazy import attach


_MODULE_OF = {
    "FaceBatches": "batches",
    "FaceDataset": "faces",
    "FaceStream": "stream",
    "NonLeakingAugmentation": "augmentation",
    "hold_out": "faces",
    "load_faces": "faces",
    "open_stream": "stream",
    "picture_to_tensor": "faces",
    "prepare": "preparation",
    "random_crop": "faces",
    "resize_to_cover": "faces",
    "to_samples": "faces",
}
__getattr__, __dir__, __all__ = attach(__name__, _MODULE_OF)
