"""DDPM for faces in the Hugging Face ecosystem."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .data.drawn_faces import DrawnFaces as DrawnFaces
    from .editing_ddpm_faces import DDPMFacesEditPipeline as DDPMFacesEditPipeline
    from .objective import DDPMFacesObjective as DDPMFacesObjective
    from .operators_ddpm_faces import Blur as Blur
    from .operators_ddpm_faces import Downsample as Downsample
    from .operators_ddpm_faces import GaussianBlur as GaussianBlur
    from .operators_ddpm_faces import Gray as Gray
    from .operators_ddpm_faces import Inpaint as Inpaint
    from .operators_ddpm_faces import PhysicsOperator as PhysicsOperator
    from .operators_ddpm_faces import motion_kernel as motion_kernel
    from .pipeline_ddpm_faces import DDPMFacesPipeline as DDPMFacesPipeline
    from .restoration_ddpm_faces import DDPMFacesRestorePipeline as DDPMFacesRestorePipeline
    from .scheduling_ddpm_faces import DDPMFacesScheduler as DDPMFacesScheduler
    from .solvers import fast_solver as fast_solver
    from .unet_ddpm_faces import DDPMFacesUNet as DDPMFacesUNet

__version__ = "0.1.0"

# Imported on first use, so that `import ddpm_faces` is fast and optional packages stay optional.
_MODULE_OF = {
    "Blur": "operators_ddpm_faces",
    "DDPMFacesEditPipeline": "editing_ddpm_faces",
    "DDPMFacesObjective": "objective",
    "DDPMFacesPipeline": "pipeline_ddpm_faces",
    "DDPMFacesRestorePipeline": "restoration_ddpm_faces",
    "DDPMFacesScheduler": "scheduling_ddpm_faces",
    "DDPMFacesUNet": "unet_ddpm_faces",
    "Downsample": "operators_ddpm_faces",
    "DrawnFaces": "data.drawn_faces",
    "GaussianBlur": "operators_ddpm_faces",
    "Gray": "operators_ddpm_faces",
    "Inpaint": "operators_ddpm_faces",
    "PhysicsOperator": "operators_ddpm_faces",
    "motion_kernel": "operators_ddpm_faces",
    "fast_solver": "solvers",
}
__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.endswith("Pipeline"):
        # Its `from_pretrained` finds components only in modules that are already imported.
        importlib.import_module(".scheduling_ddpm_faces", __name__)
        importlib.import_module(".unet_ddpm_faces", __name__)
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
