"""Requests to the Hub: publish a folder in one commit, ask for permission, verify a download."""

import fnmatch
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import ANSWER_SECONDS, REASONS, TOKEN, HubError, explaining, http_status, is_transient, reason_of, retry


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
    """Publish a folder in one commit, which also deletes outdated files.

    `HfApi.upload_folder` does not guarantee this: with hf_xet, it may split a folder into several commits. In its
    `delete_patterns`, `*` matches `/`, so it would also delete other people's files in subfolders.

    Args:
        write (`Callable`): Function that fills an empty folder, called with the folder and the current README.md (or
            `None`).
        repo_id (`str`): "user/name". A repository that does not exist is created once `write` is done.
        repo_type (`str`): "model", "dataset" or "space".
        allowed (`list[str]`):
            Patterns of the files to publish; `*` does not match `/`. Files of the repository that match but are not in
            the folder are deleted. All others stay.
        commit_message (`str`): Message of the commit, in one line.
        private (`bool`, *optional*): See [`push`].
        token (`str`, *optional*): See [`push`].
        create_pr (`bool`, defaults to `False`): See [`push`].
        revision (`str`, *optional*): See [`push`].

    Raises:
        ValueError, HubError: See [`push`].
    """
    check_repo_id(repo_id)
    if token is False:
        raise ValueError("`token` must be a token of the Hub, or None for that of `hf auth login`, got False.")
    if revision == "":
        raise ValueError(f"`revision` must be a branch of {repo_id}, or None for the main one, got ''.")
    if create_pr and revision is not None:
        raise ValueError(f"`revision` must be None with `create_pr`, which proposes to the main branch: {revision!r}.")
    api = _api(token)
    with explaining(repo_id, "Nothing was published."):
        head = _head(api, repo_id, repo_type, revision, private)
        if revision is not None:
            _check_branch(api, repo_id, repo_type, revision)
        if create_pr and head is None:
            raise ValueError(f"`create_pr` needs an existing repository: {repo_id} does not exist, or is private.")
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
    """Commit the folder on top of `head`, or raise an error and leave the repository unchanged."""
    nothing, is_new = "Nothing was published.", head is None
    if is_new:
        with explaining(repo_id, nothing):
            sdk = "gradio" if repo_type == "space" else None
            retry(lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk))
        nothing = "Nothing was published. The new repository exists and is empty."
    with explaining(repo_id, nothing):
        if is_new:
            head = _head(api, repo_id, repo_type, revision, private)
        there = retry(lambda: api.list_repo_files(repo_id, repo_type=repo_type, revision=head))
    if is_new and any(_matches(name, allowed) for name in there):
        raise HubError(f"{repo_id}: {REASONS[412]}. Nothing was published.")
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    stale = [name for name in there if name not in names and _matches(name, allowed)]

    operations: list[CommitOperationAdd | CommitOperationDelete] = [
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
        """Whether the commit arrived although the answer was lost, or `None` if this is unknown."""
        try:
            result = retry(
                lambda: api.verify_repo_checksums(repo_id, repo_type=repo_type, revision=revision, local_dir=folder),
                "Comparing checksums",
            )
        except Exception:  # report the first error, whatever this one is
            return None
        return not result.mismatches and not result.extra_paths

    url = f"{api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
    with explaining(repo_id, nothing):
        # Large files first; the client itself retries these requests.
        additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        api.preupload_lfs_files(
            repo_id, additions, repo_type=repo_type, revision=revision, create_pr=create_pr, free_memory=False
        )
        try:
            # The Hub refuses a second commit on `head`, but not a second pull request.
            return commit() if create_pr else retry(commit)
        except Exception as error:  # of the Hub client, its HTTP library or its threads; raised again below
            if create_pr and is_transient(error):
                outcome = f"Check at {url}/discussions whether the pull request exists."
                with explaining(repo_id, outcome):
                    raise
            if create_pr or not (is_transient(error) or http_status(error) == 412):
                raise
            there = is_there()
            if there is None:
                outcome = f"The commit may or may not have been published: check {url}, or run this again."
                with explaining(repo_id, outcome):
                    raise
            if not there:
                raise
    with explaining(repo_id, f"The commit was published: {url}."):
        oid = retry(lambda: api.repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=ANSWER_SECONDS)).sha
    return CommitInfo(commit_url=f"{url}/commit/{oid}", commit_message=commit_message, commit_description="", oid=oid)


def check_permission(
    name: str, private: bool | None = None, token: str | bool | None = None, repo_type: str = "model"
) -> str:
    """Check that a token may publish under a name, as far as that is possible without a commit.

    Args:
        name (`str`): "user/name", or "name" for a repository of your own.
        private (`bool`, *optional*): See [`push`].
        token (`str`, *optional*): See [`push`].
        repo_type (`str`, defaults to `"model"`): "model" or "dataset".

    Returns:
        `str`: "user/name".

    Raises:
        ValueError, HubError: The token may not publish there. The message explains why.
    """
    api = _api(token)
    if token is False:
        raise ValueError("`token` must be a token of the Hub, or None for that of `hf auth login`, got False.")
    repo_id = name if "/" in name else f"{_whoami(api, name)['name']}/{name}"
    check_repo_id(repo_id)
    with explaining(repo_id, ""):
        _check_writable(api, repo_id, repo_type, _head(api, repo_id, repo_type, None, private))
    return repo_id


def verify(
    repo_id: str,
    revision: str | None = None,
    repo_type: str = "model",
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    repair: bool = False,
    local_dir: str | os.PathLike | None = None,
) -> list[str]:
    """Compare the downloaded files of a repository with the checksums on the Hub.

    The client checks the size of a download, not its content.

    Args:
        repo_id (`str`): "user/name" on the Hub.
        revision (`str`, *optional*): The downloaded branch, tag or commit; defaults to the main branch.
        repo_type (`str`, defaults to `"model"`): "model" or "dataset".
        cache_dir (`str` or `os.PathLike`, *optional*): Cache of the download; defaults to that of the Hub client.
        token (`str`, *optional*): Defaults to the token of `hf auth login` or HF_TOKEN.
        repair (`bool`, defaults to `False`): Whether to download differing files again and compare once more.
        local_dir (`str` or `os.PathLike`, *optional*): Folder of a download outside of the cache.

    Returns:
        `list[str]`: The files that differ; empty if all match.

    Raises:
        ValueError: The cache contains no file of the repository.
        HubError: The Hub could not be reached, or it refused.
    """
    check_repo_id(repo_id)
    api = _api(token)
    place: dict[str, Any] = {"cache_dir": None if cache_dir is None else os.fspath(cache_dir)}
    if local_dir is not None:
        place = {"local_dir": os.fspath(local_dir)}

    def differing() -> list[str]:
        try:
            result = retry(
                lambda: api.verify_repo_checksums(repo_id, repo_type=repo_type, revision=revision, **place),
                "Comparing checksums",
            )
        except ValueError as error:
            raise ValueError(f"{repo_id} cannot be verified: {error}") from error
        return [mismatch["path"] for mismatch in result.mismatches]

    with explaining(repo_id, ""):
        names = differing()
        if not names or not repair:
            return names
        for name in names:
            hf_hub_download(
                repo_id,
                name,
                repo_type=repo_type,
                revision=revision,
                token=token,
                force_download=True,
                **place,
            )
        return differing()


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` unless `repo_id` is a valid "user/name"."""
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"`repo_id` must be 'user/name' or 'organization/name', got {repo_id!r}.")


def _api(token: str | bool | None) -> HfApi:
    """Create a client. A malformed token is refused here, because the HTTP library would print it."""
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):
        raise ValueError("`token` must be a token of the Hub, without spaces or line breaks.")
    return HfApi(token=token)


def _whoami(api: HfApi, name: str) -> dict[str, Any]:
    if get_token() is None and not isinstance(api.token, str):
        raise HubError(f"{name}: you are not logged in: run `hf auth login`, or set HF_TOKEN.")
    with explaining(name, ""):
        return retry(api.whoami)


def _check_writable(api: HfApi, repo_id: str, repo_type: str, head: str | None, create_pr: bool = False) -> None:
    """Raise a [`HubError`] if the token may not write to the repository."""
    user = _whoami(api, repo_id)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"{repo_id}: the token of {user['name']} is read-only: use one with write access.")
    if create_pr:  # anybody may open a pull request
        return
    if head is not None:
        return retry(lambda: api.auth_check(repo_id, repo_type=repo_type, write=True))
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if repo_id.split("/")[0] not in owners:
        raise HubError(f"{repo_id}: {user['name']} may only publish as {' or '.join(owners)}.")


def _head(api: HfApi, repo_id: str, repo_type: str, revision: str | None, private: bool | None) -> str | None:
    """Return the newest commit, or `None` if there is no repository."""
    try:
        info = retry(lambda: api.repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=ANSWER_SECONDS))
    except RevisionNotFoundError as error:
        raise ValueError(f"`revision` {revision!r} must be a branch of {repo_id}.") from error
    except RepositoryNotFoundError:
        if revision is not None:
            raise ValueError(
                f"`revision` {revision!r} needs an existing repository: {repo_id} does not exist."
            ) from None
        return None
    if private and not info.private:
        raise ValueError(
            f"`private` is True, but {repo_id} is public: make it private in its settings, or choose another name."
        )
    return info.sha


def _check_branch(api: HfApi, repo_id: str, repo_type: str, revision: str) -> None:
    """Raise a `ValueError` if `revision` is not a branch: tags and commits are read-only."""
    refs = retry(lambda: api.list_repo_refs(repo_id, repo_type=repo_type))
    names = [branch.name for branch in refs.branches]
    if revision not in names and not revision.startswith("refs/pr/"):
        raise ValueError(f"`revision` must be a branch of {repo_id}, one of {', '.join(names)}, got {revision!r}.")


def _card_of(api: HfApi, repo_id: str, repo_type: str, head: str | None, token: str | bool | None) -> str | None:
    """Return the README.md of a commit, or `None` if it has none."""
    if head is None:
        return None
    with tempfile.TemporaryDirectory(prefix="ddpm-faces-") as cache:
        try:
            path = retry(
                lambda: hf_hub_download(
                    repo_id, "README.md", repo_type=repo_type, revision=head, token=token, cache_dir=cache
                )
            )
            return Path(path).read_text("utf-8-sig")
        except LocalEntryNotFoundError as error:  # the Hub did not answer, so there may be a card
            raise HubError(f"{repo_id}: its README.md could not be read: {reason_of(error)}.") from error
        except EntryNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"README.md of {repo_id} must be UTF-8: correct it on the Hub, and run this again."
            ) from error


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path matches a pattern in which, as in a shell, `*` does not match `/`."""
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_export(folder: Path, allowed: Sequence[str], token: str | bool | None) -> None:
    """Raise a `ValueError` if a file may not be published or contains a token."""
    tokens = {value for value in (token, get_token()) if isinstance(value, str)}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if not _matches(name, allowed):
            raise ValueError(f"{name} is not among the files that may be published.")
        if path.suffix in (".md", ".json", ".yaml", ".py"):
            text = path.read_text("utf-8")
            if TOKEN.search(text) or any(token in text for token in tokens):
                raise ValueError(f"{name} contains a token of the Hub and cannot be published: remove the token.")
