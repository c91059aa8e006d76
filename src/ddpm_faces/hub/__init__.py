"""Publishing on the Hugging Face Hub: the files of a model, the requests, and the model card."""

from typing import TYPE_CHECKING

from ..lazy import attach


if TYPE_CHECKING:
    from ..errors import HubError as HubError
    from .card import merge_cards as merge_cards
    from .convert import convert_checkpoint as convert_checkpoint
    from .download import pull as pull
    from .model_folder import MODEL_FILES as MODEL_FILES
    from .model_folder import check as check
    from .model_folder import export as export
    from .model_folder import push as push
    from .space import push_space as push_space
    from .transport import check_permission as check_permission
    from .transport import check_repo_id as check_repo_id
    from .transport import publish as publish
    from .transport import verify as verify

_MODULE_OF = {
    "HubError": ".errors",
    "MODEL_FILES": "model_folder",
    "check": "model_folder",
    "check_permission": "transport",
    "check_repo_id": "transport",
    "convert_checkpoint": "convert",
    "export": "model_folder",
    "merge_cards": "card",
    "publish": "transport",
    "pull": "download",
    "push": "model_folder",
    "push_space": "space",
    "verify": "transport",
}
__getattr__, __dir__, __all__ = attach(__name__, _MODULE_OF)
