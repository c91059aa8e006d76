"""Publishing on the Hugging Face Hub: the files of a model, the requests, and the model card."""

from ..lazy import attach


_MODULE_OF = {
    "HubError": "errors",
    "MODEL_FILES": "model_folder",
    "check": "model_folder",
    "check_permission": "transport",
    "check_repo_id": "transport",
    "convert_checkpoint": "convert",
    "export": "model_folder",
    "merge_cards": "card",
    "publish": "transport",
    "push": "model_folder",
    "verify": "transport",
}
__getattr__, __dir__, __all__ = attach(__name__, _MODULE_OF)
