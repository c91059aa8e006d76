"""Publishing on the Hub: all that a pipeline needs and nothing else, checked first, in one commit."""

import contextlib
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from ..files import read_json_object
from ..pipeline_ddpm_faces import MODEL_COMPONENTS, DDPMFacesPipeline
from ..plots import image_grid
from ..solvers import fast_solver
from .card import check_license, merge_cards, model_card


# What a published model consists of. Whatever else lies in a folder (checkpoints, logs, caches) stays at home; what
# matches these in the repository, but is not published any more, is deleted there.
MODEL_FILES = (
    "README.md",
    "model_index.json",
    "pipeline_ddpm_faces.py",
    "unet/config.json",
    "unet/*.safetensors",
    "unet/*.safetensors.index*.json",
    "unet/unet_ddpm_faces.py",
    "guide/config.json",
    "guide/*.safetensors",
    "guide/*.safetensors.index*.json",
    "guide/unet_ddpm_faces.py",
    "scheduler/scheduler_config.json",
    "scheduler/scheduling_ddpm_faces.py",
    "training_config.yaml",
    "training_summary.json",
    "metrics.json",
    "samples.png",
    "denoising_strip.png",
    "loss_curve.png",
)
VARIANTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_ATTEMPTS = 5
_REASONS = {
    401: "there is no valid token: log in with `hf auth login`, or set HF_TOKEN",
    403: "this token may not do that there: make one that may, or take a name of your own",
    404: "it was not found, or is not yours to see: is the name right, and the token its owner's?",
    409: "it is being changed by somebody else: run this again",
    412: "it was changed by somebody else meanwhile: look at their change, and run this again",
    429: "the Hub asks for fewer requests: run this again later",
}
_STRIP_FRAMES, _STRIP_FACES = 10, 2
_GRID_FACES, _GRID_STEPS = 16, 20

# In a process of its own, with diffusers alone, as a stranger will load it.
_CHECK = """
import sys
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
steps = min(2, pipeline.scheduler.config.num_train_timesteps)
labels = None if not pipeline.unet.config.get("num_class_embeds") else [0]
images = pipeline(1, steps, torch.Generator().manual_seed(0), output_type="pt", class_labels=labels).images
if not images.isfinite().all():
    sys.exit("the picture is not finite")
"""


class HubError(OSError):
    """The Hub could not be reached, or said no; the message says what to do."""


# Publish


def push(
    source: DDPMFacesPipeline | str | os.PathLike,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    variants: Sequence[str] = ("bf16", "fp16"),
    license: str | None = None,
    dataset_license: str | None = None,
) -> CommitInfo:
    """Publish a pipeline: export it, check it, and send it in one commit, or nothing of it.

    Args:
        source ([`DDPMFacesPipeline`], `str` or `os.PathLike`):
            A pipeline, or a folder that training or `save_pretrained` left. A folder of a training has more to tell:
            pictures, loss curve, settings and figures go into the card.
        repo_id (`str`): "user/name" on the Hub. It is made where it does not exist.
        commit_message (`str`, *optional*): By default "Publish NAME with ddpm-faces".
        private (`bool`, *optional*):
            Of a new repository; by default as your account says. An existing one stays what it is, and one that is
            public is refused where `private=True`.
        token (`str`, *optional*): By default that of `hf auth login`, or HF_TOKEN.
        create_pr (`bool`, defaults to `False`): Propose it as a pull request.
        revision (`str`, *optional*): An existing branch; by default the main one.
        variants (`list[str]`, defaults to `("bf16", "fp16")`): Weights in half precision, beside those in float32.
        license (`str`, *optional*): Of the model, an identifier of the Hub such as "cc-by-nc-sa-4.0".
        dataset_license (`str`, *optional*): Of the pictures that it learned from.

    Returns:
        [`~huggingface_hub.CommitInfo`]: Address of the commit, as a `str`, and more.

    Raises:
        ValueError: What cannot be published, before anything is sent.
        HubError: The Hub could not be reached, or said no. Nothing was published, unless the message says so.
    """
    check_license("license", license)
    _check_variants(variants)

    def write(folder: Path, old_card: str | None) -> None:
        export(source, folder, repo_id, variants, license, dataset_license, old_card)
        check(folder)

    message = (commit_message or "").strip() or f"Publish {repo_id.split('/')[-1]} with ddpm-faces"
    return publish(write, repo_id, "model", MODEL_FILES, message, private, token, create_pr, revision)


def export(
    source: DDPMFacesPipeline | str | os.PathLike,
    folder: str | os.PathLike,
    repo_id: str,
    variants: Sequence[str] = ("bf16", "fp16"),
    license: str | None = None,
    dataset_license: str | None = None,
    old_card: str | None = None,
) -> None:
    """Write what is to be published into an empty folder; the arguments are those of [`push`].

    Raises:
        ValueError: Weights that are not finite, an unknown variant, a folder without a pipeline.
    """
    _check_variants(variants)
    folder, home = Path(folder), None
    if isinstance(source, DiffusionPipeline) and {"unet", "scheduler"} <= source.components.keys():
        pipeline = source
    elif not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"`source` must be a DDPMFacesPipeline or a folder that holds one, got {type(source).__name__}."
        )
    else:
        home = Path(source)
        if not (home / "model_index.json").is_file():
            raise ValueError(f"{str(source)!r} must be a folder that holds a pipeline: it has no model_index.json.")
        pipeline = DDPMFacesPipeline.from_pretrained(home)
        if torch.accelerator.is_available():
            pipeline.to(torch.accelerator.current_accelerator())

    # 1. Weights, configurations and code
    networks, states = {}, {}
    for name in MODEL_COMPONENTS:
        network = pipeline.components.get(name)
        if network is None:
            continue
        network = getattr(network, "_orig_mod", network)  # of torch.compile
        states[name] = network.state_dict()
        bad = [k for k, v in states[name].items() if v.is_floating_point() and not v.isfinite().all()]
        if bad:
            raise ValueError(
                f"Weights that are not finite are not published: {', '.join(bad[:5])} ({len(bad)} in all)."
            )
        networks[name] = type(network).from_config(_portable(network.config))
    scheduler = type(pipeline.scheduler).from_config(_portable(pipeline.scheduler.config))
    settings = {name: pipeline.config[name] for name in ("weights", "guidance_scale") if name in pipeline.config}
    full = DDPMFacesPipeline(**networks, scheduler=scheduler, **settings)
    _check_drawing(full)
    for variant in (None, *variants):
        dtype = VARIANTS.get(variant, torch.float32)
        for name, network in networks.items():
            cast = {k: v.to("cpu", dtype) if v.is_floating_point() else v.cpu() for k, v in states[name].items()}
            lost = [k for k, v in cast.items() if v.is_floating_point() and not v.isfinite().all()]
            if lost:
                raise ValueError(f"`variants`: {variant} cannot hold {', '.join(lost[:5])}; leave it out.")
            torch.nn.Module.to(network, dtype).load_state_dict(cast)
        full.save_pretrained(folder, variant=variant)
    for name, network in networks.items():  # for the pictures
        torch.nn.Module.to(network, pipeline.device, torch.float32).load_state_dict(states[name])

    # 2. What training left
    config, metrics, summary = {}, {}, {}
    if home is not None:
        metrics, summary = (_json_of(home / name, folder / name) for name in ("metrics.json", "training_summary.json"))
        config = _portable_config(home / "training_config.yaml", folder / "training_config.yaml", summary)
        drawn_as_it_is = summary.get("guidance_scale", 1.0) == full.config.guidance_scale
        for name in ("samples.png", "loss_curve.png") if drawn_as_it_is else ("loss_curve.png",):
            if (home / name).is_file():
                _copy_pixels(home / name, folder / name)

    # 3. Pictures
    try:
        if (folder / "samples.png").exists():
            seed, steps = config.get("seed", 0), f"all {scheduler.config.num_train_timesteps} steps"
        else:
            seed, steps = 0, _draw_grid(full, folder / "samples.png", config.get("sample_sigma_min"))
        timesteps = _draw_strip(full, folder / "denoising_strip.png")
    except (IndexError, RuntimeError, TypeError, ValueError) as error:  # of a scheduler that cannot take so many steps
        name, count = type(scheduler).__name__, scheduler.config.num_train_timesteps
        raise ValueError(f"Pictures cannot be drawn with {name} in {count} steps: {error}.") from error

    # 4. Card
    try:
        values = _card_values(repo_id, full, config, metrics, summary, dataset_license)
    except (AttributeError, KeyError, TypeError) as error:
        files = "metrics.json, training_summary.json or training_config.yaml"
        raise ValueError(f"{files} in {str(source)!r} does not have what the card tells: {error!r}.") from error
    values["grid"] = {
        "path": "samples.png",
        "alt": "Faces that this model has made",
        "caption": f"Not chosen: the seeds {seed}, {seed + 1}, {seed + 2} and so on, {steps}.",
    }
    values["strip"] = {
        "path": "denoising_strip.png",
        "alt": "Faces on the way out of the noise",
        "caption": f"From noise to face, after the timesteps {', '.join(map(str, timesteps))}.",
    }
    values |= {"variants": list(variants), "loss_curve": (folder / "loss_curve.png").exists()}
    dataset = config.get("dataset_name") or ""  # without a folder where it is a local one
    datasets = [dataset] if dataset.count("/") == 1 else None
    pretrained = config.get("pretrained_model_name_or_path") or ""
    base_model = pretrained if pretrained.count("/") == 1 else None
    card = str(model_card(repo_id, values, metrics.get("metrics"), license, datasets, base_model))
    (folder / "README.md").write_text(card if old_card is None else merge_cards(old_card, card), "utf-8")


def check(folder: str | os.PathLike) -> None:
    """Load what is to be published in a new process, with diffusers alone, and generate a picture.

    Raises:
        ValueError: It does not load, or what it generates is not finite.
    """
    with tempfile.TemporaryDirectory(prefix="ddpm-faces-") as modules:
        environment = {**os.environ, "HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", _CHECK, str(folder)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"The pipeline cannot be published, for it does not load in a new process: {reason}")


def publish(
    write: Callable[[Path, str | None], None],
    repo_id: str,
    repo_type: str,
    allowed: Sequence[str],
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> CommitInfo:
    """Send what `write` writes in one commit, and delete what an earlier one has left.

    Args:
        write (`Callable`): Is given an empty folder, and the card that is there (or `None`).
        repo_id (`str`): Where to; it is made where it does not exist, once all else is well.
        repo_type (`str`): "model" or "dataset".
        allowed (`list[str]`):
            Patterns of what is published. What matches them in the repository and is not in the folder is deleted; all
            other files of the repository stay.
        commit_message (`str`): One line.
        private (`bool`, *optional*): As that of [`push`].
        token (`str`, *optional*): As that of [`push`].
        create_pr (`bool`, defaults to `False`): As that of [`push`].
        revision (`str`, *optional*): As that of [`push`].

    Raises:
        ValueError, HubError: As those of [`push`].
    """
    check_repo_id(repo_id)
    if token is False:
        raise ValueError("`token` must be a token of the Hub, or None for that of `hf auth login`, got False.")
    if revision == "":
        raise ValueError(f"`revision` must be a branch of {repo_id}, or None for the main one, got ''.")
    if create_pr and revision is not None:
        raise ValueError(f"`revision` must be None with `create_pr`, which proposes to the main branch: {revision!r}.")
    api = _api(token)
    with _explaining(repo_id, "Nothing was published."):
        head = _head(api, repo_id, repo_type, revision, private)
        if revision is not None:
            _check_branch(api, repo_id, repo_type, revision)
        if create_pr and head is None:
            raise ValueError(
                f"`create_pr` needs a repository that exists; there is no {repo_id}, or it is not yours to see."
            )
        _check_writable(api, repo_id, repo_type, head, create_pr)
        old_card = _card_of(api, repo_id, repo_type, head, token)
    with tempfile.TemporaryDirectory(prefix="ddpm-faces-") as name:
        folder = Path(name)
        write(folder, old_card)
        _check_export(folder, allowed, token)
        return _send(api, folder, repo_id, repo_type, allowed, head, commit_message, private, create_pr, revision)


def _send(
    api: HfApi,
    folder: Path,
    repo_id: str,
    repo_type: str,
    allowed: Sequence[str],
    head: str | None,
    commit_message: str,
    private: bool | None,
    create_pr: bool,
    revision: str | None,
) -> CommitInfo:
    """The last part of [`publish`]: a commit that follows `head`, or none at all."""
    nothing, is_new = "Nothing was published.", head is None
    if is_new:
        with _explaining(repo_id, nothing):
            _again(lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True))
        nothing = "Nothing was published; the new repository is there, and empty."
    with _explaining(repo_id, nothing):
        if is_new:
            head = _head(api, repo_id, repo_type, revision, private)
        there = _again(lambda: api.list_repo_files(repo_id, repo_type=repo_type, revision=head))
    if is_new and any(_matches(name, allowed) for name in there):
        raise HubError(f"{repo_id}: {_REASONS[412]}. Nothing was published.")
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    stale = [name for name in there if name not in names and _matches(name, allowed)]

    operations = [
        *(CommitOperationAdd(name, str(path)) for name, path in sorted(names.items())),
        *(CommitOperationDelete(name) for name in stale),
    ]

    def commit() -> CommitInfo:
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            repo_type=repo_type,
            revision=revision,
            parent_commit=head,
            create_pr=create_pr,
        )

    def is_there() -> bool | None:
        """Whether the commit has come although its answer has not; `None` where the Hub does not say."""
        where = {"repo_type": repo_type, "revision": revision, "local_dir": folder}
        try:
            result = _again(lambda: api.verify_repo_checksums(repo_id, **where))
        except Exception:
            return None
        return not result.mismatches and not result.extra_paths

    url = f"{api.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    with _explaining(repo_id, nothing):
        # Large files first; these requests the client makes again by itself.
        additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        api.preupload_lfs_files(
            repo_id, additions, repo_type=repo_type, revision=revision, create_pr=create_pr, free_memory=False
        )
        try:
            # A second commit on `head` is refused where the first has come; a second pull request is not.
            return commit() if create_pr else _again(commit)
        except Exception as error:
            if create_pr and _is_transient(error):
                outcome = f"Look at {url}/discussions, whether the pull request is there."
                raise _explanation(repo_id, error, outcome) from error
            if create_pr or not (_is_transient(error) or _status(error) == 412):
                raise
            there = is_there()
            if there is None:
                outcome = f"Whether it is published is not known: look at {url}, or run this again."
                raise _explanation(repo_id, error, outcome) from error
            if not there:
                raise
    with _explaining(repo_id, f"It is published: {url}."):
        oid = _again(lambda: api.repo_info(repo_id, repo_type=repo_type, revision=revision)).sha
    return CommitInfo(commit_url=f"{url}/commit/{oid}", commit_message=commit_message, commit_description="", oid=oid)


def check_permission(
    name: str, private: bool | None = None, token: str | bool | None = None, repo_type: str = "model"
) -> str:
    """Whether this token may publish under a name, as far as that can be known without trying.

    Args:
        name (`str`): "user/name", or a name of one's own.
        private (`bool`, *optional*): As that of [`push`].
        token (`str`, *optional*): As that of [`push`].
        repo_type (`str`, defaults to `"model"`): "model" or "dataset".

    Returns:
        `str`: "user/name".

    Raises:
        ValueError, HubError: It may not, and why.
    """
    api = _api(token)
    if token is False:
        raise ValueError("`token` must be a token of the Hub, or None for that of `hf auth login`, got False.")
    repo_id = name if "/" in name else f"{_whoami(api, name)['name']}/{name}"
    check_repo_id(repo_id)
    with _explaining(repo_id, ""):
        _check_writable(api, repo_id, repo_type, _head(api, repo_id, repo_type, None, private))
    return repo_id


def _api(token: str | bool | None) -> HfApi:
    """A client; a token that is none is not shown, as the HTTP library would."""
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):
        raise ValueError("`token` must be a token of the Hub, without spaces or ends of lines; what was given is not.")
    return HfApi(token=token)


def _whoami(api: HfApi, name: str) -> dict[str, Any]:
    if get_token() is None and not isinstance(api.token, str):
        raise HubError(f"{name}: there is no token: log in with `hf auth login`, or set HF_TOKEN.")
    with _explaining(name, ""):
        return _again(api.whoami)


def _check_writable(api: HfApi, repo_id: str, repo_type: str, head: str | None, create_pr: bool = False) -> None:
    """Ask before the work, which takes longer."""
    user = _whoami(api, repo_id)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"{repo_id}: this token of {user['name']} may only read: make one that may write.")
    if create_pr:  # which is open to all
        return
    if head is not None:
        return _again(lambda: api.auth_check(repo_id, repo_type=repo_type, write=True))
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if repo_id.split("/")[0] not in owners:
        raise HubError(f"{repo_id}: {user['name']} may publish as {', '.join(owners)} only.")


# Verify


def verify(
    repo_id: str,
    revision: str | None = None,
    repo_type: str = "model",
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    repair: bool = False,
) -> list[str]:
    """Compare the files of a repository that lie in the cache with the checksums that the Hub has published.

    The client checks the size of what it downloads, and nothing else.

    Args:
        repo_id (`str`): "user/name" on the Hub.
        revision (`str`, *optional*): Branch, tag or commit that was downloaded; by default the main branch.
        repo_type (`str`, defaults to `"model"`): "model" or "dataset".
        cache_dir (`str` or `os.PathLike`, *optional*): Of the download; by default the Hub's own.
        token (`str`, *optional*): By default that of `hf auth login`, or HF_TOKEN.
        repair (`bool`, defaults to `False`): Download what differs once more, and compare again.

    Returns:
        `list[str]`: The files that differ; an empty one means that all is well.

    Raises:
        ValueError: Nothing of it lies in the cache.
        HubError: The Hub could not be asked.
    """
    check_repo_id(repo_id)
    api = _api(token)

    where = {"repo_type": repo_type, "revision": revision, "cache_dir": cache_dir}

    def differing() -> list[str]:
        try:
            result = _again(lambda: api.verify_repo_checksums(repo_id, **where))
        except ValueError as error:
            raise ValueError(f"{repo_id} cannot be verified: {error}") from error
        return [mismatch["path"] for mismatch in result.mismatches]

    with _explaining(repo_id, ""):
        names = differing()
        if not names or not repair:
            return names
        for name in names:
            hf_hub_download(repo_id, name, token=token, force_download=True, **where)
        return differing()


# Pieces


def check_repo_id(repo_id: str) -> None:
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(
            f"`repo_id` must be a user or an organization and a name, as in 'user/faces', got {repo_id!r}."
        )


def _check_variants(variants: Sequence[str]) -> None:
    if isinstance(variants, str):
        raise ValueError(f"`variants` must be a list of names, got {variants!r}.")
    unknown = [str(name) for name in variants if name not in VARIANTS]
    if unknown:
        raise ValueError(f"`variants` must be of {', '.join(VARIANTS)}, got {', '.join(unknown)}.")


def _head(api: HfApi, repo_id: str, repo_type: str, revision: str | None, private: bool | None) -> str | None:
    """The newest commit; `None` where there is no repository."""
    try:
        info = _again(lambda: api.repo_info(repo_id, repo_type=repo_type, revision=revision))
    except RevisionNotFoundError as error:
        raise ValueError(f"`revision` {revision!r} must be a branch of {repo_id}.") from error
    except RepositoryNotFoundError:
        if revision is not None:
            raise ValueError(f"`revision` {revision!r}: there is no {repo_id} yet.") from None
        return None
    if private and not info.private:
        raise ValueError(
            f"`private=True`, but {repo_id} is public already: make it private in its settings, or publish elsewhere."
        )
    return info.sha


def _check_branch(api: HfApi, repo_id: str, repo_type: str, revision: str) -> None:
    """A commit goes to a branch; tags and older commits are for reading."""
    refs = _again(lambda: api.list_repo_refs(repo_id, repo_type=repo_type))
    names = [branch.name for branch in refs.branches]
    if revision not in names and not revision.startswith("refs/pr/"):
        raise ValueError(f"`revision` must be a branch of {repo_id}, one of {', '.join(names)}, got {revision!r}.")


def _card_of(api: HfApi, repo_id: str, repo_type: str, head: str | None, token: str | bool | None) -> str | None:
    """The README.md of a commit, if there is one."""
    if head is None:
        return None
    with tempfile.TemporaryDirectory(prefix="ddpm-faces-") as cache:
        where = {"repo_type": repo_type, "revision": head, "token": token, "cache_dir": cache}
        try:
            return Path(_again(lambda: hf_hub_download(repo_id, "README.md", **where))).read_text("utf-8-sig")
        except LocalEntryNotFoundError as error:  # which says that the Hub did not answer, not that there is none
            raise HubError(f"{repo_id}: its README.md could not be read: {_reason(error)}.") from error
        except EntryNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise ValueError(f"README.md of {repo_id} must be UTF-8: mend it there, and run this again.") from error


def _again(call: Callable[[], Any]) -> Any:
    """Call, and call again where the Hub is busy or out of order: the client itself does so for some requests only."""
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if attempt == _ATTEMPTS - 1 or not _is_transient(error):
                raise
            response = getattr(error, "response", None)
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            time.sleep(min(float(asked), 300) if asked.isdigit() else 2**attempt)


def _status(error: Exception) -> int | None:
    """The HTTP status that an error is made of."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _is_transient(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, OfflineModeIsEnabled):  # which no waiting changes
        return False
    if type(error).__name__ in ("UnsupportedProtocol", "LocalProtocolError"):  # a mistake on this side
        return False
    # No answer at all: of Python, or of whatever HTTP library the client uses.
    return isinstance(error, ConnectionError) or type(error).__module__.startswith(("httpx", "requests"))


@contextlib.contextmanager
def _explaining(repo_id: str, outcome: str) -> Iterator[None]:
    """Say what an error of the Hub means to somebody who publishes or loads, and what has come of it."""
    try:
        yield
    except (ValueError, HubError):
        raise
    except Exception as error:
        explanation = _explanation(repo_id, error, outcome)
        if explanation is None:
            raise
        raise explanation from error


def _explanation(repo_id: str, error: Exception, outcome: str) -> HubError | None:
    """`None` where it is no error of the Hub."""
    cause, status = error, _status(error)
    while status is None and cause.__cause__ is not None:
        cause = cause.__cause__
        status = _status(cause)
    if status is None and not isinstance(error, (OSError, RuntimeError)) and not _is_transient(error):
        return None
    reason = _REASONS.get(status) or _reason(error)
    code = "" if status is None else f" [HTTP {status}]"
    return HubError(f"{repo_id}: {reason}{code}. {outcome}".strip())


def _reason(error: BaseException) -> str:
    """The last cause, in one line without a token."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return _TOKEN.sub("hf_...", text).rstrip(".")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_export(folder: Path, allowed: Sequence[str], token: str | bool | None) -> None:
    tokens = {value for value in (token, get_token()) if isinstance(value, str)}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if not _matches(name, allowed):
            raise ValueError(f"{name} is not what is published.")
        if path.suffix in (".md", ".json", ".yaml", ".py"):
            text = path.read_text("utf-8")
            if _TOKEN.search(text) or any(token in text for token in tokens):
                raise ValueError(f"{name} holds a token of the Hub, and is not published. Take it out.")


def _json_of(source: Path, destination: Path) -> dict[str, Any]:
    if not source.is_file():
        return {}
    shutil.copyfile(source, destination)
    return read_json_object(source)


def _copy_pixels(source: Path, destination: Path) -> None:
    """A picture, without whatever text a program has put beside it."""
    try:
        with Image.open(source) as image:
            pixels = image.convert("RGB")
    except OSError as error:
        raise ValueError(f"{source} must be a picture: {error}") from error
    pixels.info.clear()
    pixels.save(destination)


def _portable_config(source: Path, destination: Path, summary: dict) -> dict[str, Any]:
    """The settings of the training, less what names places on this machine."""
    if not source.is_file():
        return {}
    import yaml

    try:
        config = yaml.safe_load(source.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{source} must hold settings of a training, got {type(config).__name__}.")
    for name in ("output_dir", "cache_dir"):
        config.pop(name, None)
    is_local = {
        "dataset_name": summary.get("is_local_data", False),
        "train_data_dir": True,
        "pretrained_model_name_or_path": summary.get("is_local_pretrained", False),
    }
    for name in is_local:
        value = config.get(name)
        is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(value)) and not Path(str(value)).exists()
        if value is not None and (is_local[name] or not is_name):
            config[name] = re.split(r"[/\\]", str(value).rstrip("/\\"))[-1]
    destination.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    return config


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Less the place on this machine that diffusers has noted it was loaded from.

    And less its list of defaults, for that has arguments that were given by position, and `from_config` drops those.
    """
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "_use_default_values")}


def _check_drawing(pipeline: DDPMFacesPipeline) -> None:
    """Refuse, before any work, a scheduler that this network cannot be used with."""
    labels = _labels(pipeline, 1)
    pipeline.check_inputs(1, pipeline.scheduler.config.num_train_timesteps, None, None, "pil", labels, (), 0.0)


def _draw_grid(pipeline: DDPMFacesPipeline, path: Path, sigma_min: float | None) -> str:
    scheduler = pipeline.scheduler
    fast = pipeline.with_scheduler(fast_solver(scheduler, sigma_min))
    steps = min(_GRID_STEPS, scheduler.config.num_train_timesteps)
    fast.set_progress_bar_config(desc="Drawing faces for the card", leave=False)
    images = fast(_GRID_FACES, steps, _seeds(_GRID_FACES), class_labels=_labels(fast, _GRID_FACES)).images
    image_grid(images, scale=_scale(images[0])).save(path)
    return f"{steps} steps of DPM-Solver++"


def _draw_strip(pipeline: DDPMFacesPipeline, path: Path) -> list[int]:
    """Faces in rows, from noise to picture; returns the timesteps after which the columns were taken."""
    total = pipeline.scheduler.config.num_train_timesteps
    count = min(_STRIP_FRAMES, total)
    wanted = {round((i + 1) * total / count) - 1 for i in range(count)}
    frames, timesteps = [], []

    def keep(_, index: int, timestep: int, values: dict) -> dict:
        if index in wanted:
            frames.append(DDPMFacesPipeline.postprocess(values["latents"]))
            timesteps.append(int(timestep))
        return {}

    pipeline.set_progress_bar_config(desc="Drawing the strip for the card", leave=False)
    labels = _labels(pipeline, _STRIP_FACES)
    pipeline(_STRIP_FACES, generator=_seeds(_STRIP_FACES), callback_on_step_end=keep, class_labels=labels)
    rows: list[Image.Image] = [frame[face] for face in range(_STRIP_FACES) for frame in frames]
    image_grid(rows, columns=len(frames), scale=_scale(rows[0])).save(path)
    return timesteps


def _scale(image: Image.Image) -> int:
    """How much a picture is to be enlarged for a person to see it."""
    return max(1, 96 // max(image.size))


def _seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def _labels(pipeline: DDPMFacesPipeline, count: int) -> list[int] | None:
    classes = pipeline.unet.config.get("num_class_embeds")
    return None if classes is None else [i % classes for i in range(count)]


def _card_values(
    repo_id: str,
    pipeline: DDPMFacesPipeline,
    config: dict,
    metrics: dict,
    summary: dict,
    dataset_license: str | None,
) -> dict[str, Any]:
    """What the template of the card names, as far as the pipeline, its training and its evaluation tell."""
    unet, scheduler = pipeline.unet.config, pipeline.scheduler.config
    size = unet.sample_size if isinstance(unet.sample_size, int) else tuple(unet.sample_size)
    height, width = (size, size) if isinstance(size, int) else size
    classes = unet.get("num_class_embeds")
    kind = {"ema": ", averaged weights (EMA)", "raw": ", the last weights"}.get(pipeline.config.get("weights"), "")
    source = config.get("dataset_name") or config.get("train_data_dir")
    is_drawn = bool(config) and source is None
    guide_images_seen = _thousands(summary.get("guide_images_seen"))
    guide = f"this network after {guide_images_seen} images" if guide_images_seen else _network(pipeline.guide)
    training = {
        "pictures": ": ".join(filter(None, (source, summary.get("data")))),
        "started from": config.get("pretrained_model_name_or_path"),
        "their licence": dataset_license or ("not stated" if config and not is_drawn else None),
        "images seen": _thousands(summary.get("images_seen")),
        "time": summary and f"{_duration(summary['hours'])} on {summary['processes']} x {summary['device']}",
        "precision": summary.get("precision"),
        "batch size": config.get("train_batch_size"),
        "learning rate": config.get("learning_rate"),
        "held-out loss": summary.get("held_out_loss") and f"{summary['held_out_loss']:.4g}",
        "network": _network(pipeline.unet) + kind,
        "guide": pipeline.guide and f"{guide}, guidance scale {pipeline.config.guidance_scale:g}",
        "noise schedule": f"{scheduler.beta_schedule}, T = {scheduler.num_train_timesteps}",
        "predicts": scheduler.prediction_type,
        "made with": summary.get("versions"),
    }
    entries = metrics.get("metrics", [])
    if pipeline.guide is not None:  # whether a figure was measured with it
        entries = [{**entry, "guidance_scale": entry.get("guidance_scale", 1)} for entry in entries]
    betas = "" if scheduler.beta_schedule != "sigmoid" else ", trained_betas=pipeline.scheduler.betas.tolist()"
    return {
        "title": repo_id.split("/")[-1],
        "summary": (
            f"A denoising diffusion model (DDPM) that makes faces of {height}x{width} pixels"
            + (f", of {classes} classes" if classes else "")
            + f", trained with ddpm-faces. {'' if entries else 'Its quality was not measured.'}".rstrip()
        ),
        "call": "class_labels=[0], " if classes else "",
        "solver_arguments": betas,
        "training": [(name, _cell(value)) for name, value in training.items() if value not in (None, {}, "")],
        "has_config": bool(config),
        "metrics": [_metric_row(metric) for metric in entries],
        "memorisation": metrics.get("memorisation", {}).get("verdict", "Not measured. Assume that they can be."),
    }


def _network(network: torch.nn.Module | None) -> str | None:
    return (
        network and f"{type(network).__name__}, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters"
    )


def _metric_row(metric: dict[str, Any]) -> dict[str, str]:
    error = f" ± {metric['error']:.3g}" if metric.get("error") is not None else ""
    shown = {k: v for k, v in metric.items() if k not in ("name", "type", "value", "error")}
    provenance = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
    name, provenance = _cell(metric["name"]), _cell(provenance)
    return {"name": name, "text": f"{metric['value']:.4g}{error}", "provenance": provenance}


def _cell(value: Any) -> str:
    """In a table of Markdown."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def _thousands(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"
