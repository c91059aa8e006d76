"""Publish the demo of a model as a Space."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError

from ..errors import ANSWER_SECONDS, explaining, retry
from .transport import _api, check_repo_id, publish


APP_FILES = ("app.py", "changer.py", "maker.py", "show.py")
SPACE_FILES = ("README.md", *APP_FILES, "requirements.txt")
GRADIO = "6.31.0"  # the version that the tests use; the Hub installs it from the metadata
# The imports of `app.py` and of a published model's code, as in pyproject.toml. The Hub installs gradio itself.
REQUIREMENTS = (
    "accelerate>=1.7",
    "diffusers>=0.42",
    "numpy>=2.1",
    "pillow>=10.1",
    "safetensors>=0.8",
    "torch>=2.6",
)
MODEL_CODE = ("pipeline_ddpm_faces.py", "restoration_ddpm_faces.py", "editing_ddpm_faces.py")
TEXT_REQUIREMENT = "transformers>=5.18"  # of a model with a text encoder
_DEMO = Path(__file__).parents[1] / "demo"
_MODEL_LINE = 'MODEL, REVISION = "", ""'


@dataclass(frozen=True)
class Space:
    """A Space that was published: the `commit`, its page, and whether it `needs_token` to read its model."""

    commit: CommitInfo
    url: str
    needs_token: bool


def push_space(
    model: str,
    repo_id: str,
    private: bool | None = None,
    title: str | None = None,
    token: str | bool | None = None,
) -> Space:
    """Publish the demo of a model as a Space.

    The Space runs code from the model's repository, and therefore pins the current commit. After you change the model,
    publish the Space again.

    Args:
        model (`str`): "user/name" of a model that [`push`] has published.
        repo_id (`str`): "user/name" of the Space. If it exists, the files of the demo are replaced, all others stay.
        private (`bool`, *optional*): Visibility of a new Space; by default that of your account.
        title (`str`, *optional*): Title of the Space. Defaults to its name.
        token (`str`, *optional*): Defaults to the token of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: There is no such model, or this package did not publish it.
        HubError: The Hub refused or could not be reached. Nothing was published.
    """
    check_repo_id(repo_id)
    title = repo_id.split("/")[1] if title is None else title
    if not title.strip() or "\n" in title:
        raise ValueError(f"`title` must be one line of text, got {title!r}.")
    info = _model_info(model, token)
    takes_prompts = any(file.rfilename.startswith("text_encoder/") for file in info.siblings or [])

    def write(folder: Path, old_card: str | None) -> None:
        for name, text in space_files(model, info.sha or "main", title, takes_prompts).items():
            (folder / name).write_text(text, "utf-8")

    message = f"Publish the demo of {model}"
    commit = publish(write, repo_id, "space", SPACE_FILES, message, private, token)
    return Space(commit, f"{_api(token).endpoint}/spaces/{repo_id}", bool(info.private or info.gated))


def space_files(model: str, revision: str, title: str, takes_prompts: bool = False) -> dict[str, str]:
    """Return the content of the files of a Space by their names."""
    # In a Space, the files are no package.
    code = {name: (_DEMO / name).read_text("utf-8").replace("\nfrom .", "\nfrom ") for name in APP_FILES}
    if code["app.py"].count(_MODEL_LINE) != 1:
        raise RuntimeError(f"{_DEMO / 'app.py'} must have the line {_MODEL_LINE!r} once.")
    code["app.py"] = code["app.py"].replace(_MODEL_LINE, f'MODEL, REVISION = "{model}", "{revision}"')
    metadata = {
        "title": title,
        "emoji": "🎲",
        "colorFrom": "green",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": "3.11",  # diffusers needs 3.11, and Spaces may default to an older version
        "app_file": "app.py",
        "license": "apache-2.0",
        "models": [model],
    }
    text = f"Generate faces with [{model}](https://huggingface.co/{model}), restore given ones, and change them.\n"
    return {
        **code,
        "requirements.txt": "\n".join([*REQUIREMENTS, *([TEXT_REQUIREMENT] if takes_prompts else [])]) + "\n",
        "README.md": f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n{text}",
    }


def _model_info(model: str, token: str | bool | None) -> ModelInfo:
    """Ask the Hub about the model, and check that a Space can load it."""
    try:
        check_repo_id(model)
    except ValueError as error:
        raise ValueError(f"`model` must be USER/NAME of a model on the Hub, got {model!r}.") from error
    with explaining(model, "Nothing was published."):
        try:
            info = retry(lambda: _api(token).model_info(model, timeout=ANSWER_SECONDS))
        except RepositoryNotFoundError as error:
            raise ValueError(
                f"`model` {model} does not exist on the Hub, or you cannot access it. Publish it first with "
                f"`ddpm-faces push FOLDER {model}`."
            ) from error
    names = {file.rfilename for file in info.siblings or []}
    for name in MODEL_CODE:
        if name not in names:
            raise ValueError(
                f"`model` {model} was not published by this version of `ddpm-faces push`: it lacks {name}, without "
                "which a Space cannot load it. Publish it again."
            )
    return info
