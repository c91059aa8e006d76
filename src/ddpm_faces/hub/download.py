"""Download a published model completely, and check that it arrived as it was published."""

import os
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from ..errors import HubError, explaining, retry
from ..pipeline_ddpm_faces import DDPMFacesPipeline
from .model_folder import MODEL_FILES, VARIANTS
from .transport import check_repo_id, verify


def pull(
    repo_id: str, output: str | os.PathLike | None = None, revision: str | None = None, variant: str | None = None
) -> Path:
    """Download a model from the Hub and compare it with the published checksums.

    What an interrupted download has completed is kept: call this again to resume it.

    Args:
        repo_id (`str`): "user/name" on the Hub.
        output (`str` or `os.PathLike`, *optional*):
            Folder to download to: a new or an empty one, or that of an earlier download. Defaults to the Hub client's
            cache, where `from_pretrained(repo_id)` finds the model, also without a network.
        revision (`str`, *optional*): Branch, tag or commit; by default the main branch.
        variant (`str`, *optional*): "bf16" or "fp16" for half-precision weights; by default the float32 weights.

    Returns:
        `Path`: The folder of the model.

    Raises:
        ValueError: The repository holds no model of this package, or `output` holds something else.
        HubError: The Hub could not be reached or refused, or a file differs from what was published.
    """
    check_repo_id(repo_id)
    if variant not in (None, *VARIANTS):
        raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)} or None, got {variant!r}.")
    folder = None if output is None else Path(output)
    if folder is not None and folder.exists():
        is_download = (folder / ".cache" / "huggingface").is_dir()
        if not folder.is_dir() or (any(folder.iterdir()) and not is_download):
            raise ValueError(f"`output` {str(output)!r} exists and is not an earlier download; choose a new folder.")
    api = HfApi()
    with explaining(repo_id, "Run the same command again to resume the download."):
        info = retry(lambda: api.repo_info(repo_id, revision=revision))
        files = [sibling.rfilename for sibling in info.siblings or ()]
        if "model_index.json" not in files:
            raise ValueError(f"{repo_id} holds no model of ddpm-faces: it has no model_index.json.")
        others = [f"*.{name}.*" for name in VARIANTS if name != variant]
        if variant is not None:
            if not any(f".{variant}." in name for name in files):
                raise ValueError(f"`variant` {variant!r} is not published in {repo_id}.")
            others.append("*model.safetensors")
        path = Path(
            snapshot_download(
                repo_id, revision=revision, local_dir=folder, allow_patterns=list(MODEL_FILES), ignore_patterns=others
            )
        )
    differing = verify(repo_id, revision, repair=True, local_dir=folder)
    if differing:
        raise HubError(f"{repo_id}: these files still differ from what was published: {', '.join(differing)}.")
    DDPMFacesPipeline.load_config(path)  # refuses pipelines of another kind
    return path
