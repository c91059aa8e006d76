"""Publishing on the Hugging Face Hub: transport, export, model card."""

from ..lazy import attach


_MODULE_OF = {
    "HubError": "model_folder",
    "MODEL_FILES": "model_folder",
    "check": "model_folder",
    "check_repo_id": "model_folder",
    "export": "model_folder",
    "check_permission": "model_folder",
    "push": "model_folder",
    "verify": "model_folder",
    "publish": "model_folder",
    "convert_checkpoint": "convert",
    "merge_cards": "card",
}
__getattr__, __dir__, __all__ = attach(__name__, _MODULE_OF)
