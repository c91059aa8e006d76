"""Download a published model, and compare its files with the published checksums."""

import os
import shutil
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from ..errors import ANSWER_SECONDS, HubError, explaining, retry
from ..files import check_new, commit, unfinished_path
from ..pipeline_ddpm_faces import DDPMFacesPipeline
from .model_folder import MODEL_FILES, VARIANTS
from .transport import check_repo_id, verify


def pull(
    repo_id: str, output: str | os.PathLike | None = None, revision: str | None = None, variant: str | None = None
) -> Path:
    """Download a model from the Hub and compare it with the published checksums.

    An interrupted download keeps its complete files: call this again to resume it.

    Args:
        repo_id (`str`): "user/name" on the Hub.
        output (`str` or `os.PathLike`, *optional*):
            New or empty folder for the model. It appears once the download is complete. Defaults to the Hub client's
            cache, where `from_pretrained(repo_id)` finds the model, even offline.
        revision (`str`, *optional*): Branch, tag or commit; by default the main branch.
        variant (`str`, *optional*): "bf16" or "fp16" for half-precision weights; by default the float32 weights.

    Returns:
        `Path`: The folder of the model.

    Raises:
        ValueError: The repository is not a model of this package, or `output` exists.
        HubError: The Hub could not be reached or refused, or a file differs from the published checksums.
    """
    check_repo_id(repo_id)
    if variant not in (None, *VARIANTS):
        raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)} or None, got {variant!r}.")
    if output is not None:
        check_new(output)
    api = HfApi()
    with explaining(repo_id, "Run the same command again to resume the download."):
        info = retry(lambda: api.repo_info(repo_id, revision=revision, timeout=ANSWER_SECONDS))
        files = [sibling.rfilename for sibling in info.siblings or ()]
        if "model_index.json" not in files:
            raise ValueError(f"{repo_id} holds no model of ddpm-faces: it has no model_index.json.")
        others = [f"*.{name}.*" for name in VARIANTS if name != variant]
        if variant is not None:
            if not any(f".{variant}." in name for name in files):
                raise ValueError(f"`variant` {variant!r} is not published in {repo_id}.")
            others.append("*model.safetensors")
        folder = None
        if output is not None:  # an interrupted download is resumed there, unless the model has changed since
            revision = info.sha
            folder = unfinished_path(Path(output).with_name(f"{Path(output).name}-{info.sha}"))
        path = Path(
            snapshot_download(
                repo_id, revision=revision, local_dir=folder, allow_patterns=list(MODEL_FILES), ignore_patterns=others
            )
        )
    differing = verify(repo_id, revision, repair=True, local_dir=folder)
    if differing:
        raise HubError(f"{repo_id}: these files still differ from the published checksums: {', '.join(differing)}.")
    DDPMFacesPipeline.load_config(path)  # refuses pipelines of another kind
    if output is None or folder is None:
        return path
    shutil.rmtree(folder / ".cache")  # the client's notes for resuming
    commit(output, folder)
    return Path(output)
