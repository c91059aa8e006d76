"""Publishing on the Hugging Face Hub: what is published, the requests that publish it, and the model card."""

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
    "push_space": "space",
    "verify": "transport",
}
__getattr__, __dir__, __all__ = attach(__name__, _MODULE_OF)
