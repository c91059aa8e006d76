"""Atomic writing of files and folders: write under another name, sync, then rename."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


UNFINISHED = ".unfinished-"


def unfinished_path(path: str | os.PathLike) -> Path:
    """Return the hidden temporary name of `path`, in the same folder, for writing and deleting."""
    path = Path(path)
    return path.with_name(UNFINISHED + path.name)


def commit(path: str | os.PathLike, unfinished: str | os.PathLike | None = None) -> None:
    """Move a finished folder to its final name, then delete the folder that it replaces.

    An interruption leaves the old folder, the new one or neither, but never a partial one. Everybody who may read the
    folder can read its files.

    Args:
        path (`str` or `os.PathLike`): Final name of the folder.
        unfinished (`str` or `os.PathLike`, *optional*): Current name of the folder; defaults to [`unfinished_path`].
    """
    path = Path(path)
    unfinished = Path(unfinished or unfinished_path(path))
    for root, _, names in os.walk(unfinished):
        for name in names:  # safetensors ignores the umask, so only the owner could read its files
            file, mode = os.path.join(root, name), os.stat(root).st_mode & 0o666
            if os.stat(file).st_mode & 0o666 != mode:
                with suppress(OSError):  # file systems without modes
                    os.chmod(file, mode)
        for name in (*names, "."):
            sync(os.path.join(root, name))
    replaced = unfinished_path(path.with_name(f"replaced-{path.name}"))
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    unfinished.rename(path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def delete(path: str | os.PathLike) -> None:
    """Delete a folder. It is renamed first, so that an interruption leaves no partial folder under its name."""
    doomed = unfinished_path(path)
    shutil.rmtree(doomed, ignore_errors=True)
    Path(path).rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def delete_unfinished(folder: str | os.PathLike) -> None:
    """Delete the unfinished files and folders that interrupted runs left in `folder`."""
    for path in Path(folder).glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
        if path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path to write to. The file there replaces `path` when the block ends without an error."""
    path = Path(path)
    unfinished = unfinished_path(path)
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def check_new(path: str | os.PathLike) -> None:
    """Raise a `ValueError` if `path` exists and is not an empty folder, or if no folder can be made there."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} must be a new or empty folder.")
    check_writable(path)


def check_writable(path: str | os.PathLike) -> None:
    """Raise a `ValueError` unless a folder can be created at `path`, or written to if it exists."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{str(path)!r} cannot be a folder because {str(folder)!r} is a file.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{str(path)!r} cannot be written because {str(folder)!r} is read-only.")


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a folder to write to. It becomes `path` when the block ends without an error.

    Raises:
        ValueError: `path` exists and is not an empty folder.
    """
    path = Path(path)
    check_new(path)
    unfinished = unfinished_path(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        commit(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync(path: str | os.PathLike) -> None:
    """Flush a file or a folder to disk. Systems that cannot open folders, such as Windows, flush files only."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON object from a file that may be untrusted.

    Raises:
        ValueError: The file does not contain a JSON object.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a JSON object, got {type(content).__name__}.")
    return content


def read_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file, which a person may have written.

    Raises:
        ValueError: The file is not UTF-8 or not YAML. The message names the file and the line.
    """
    import yaml

    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be saved as UTF-8: it has an {error.reason} at byte {error.start}.") from error
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line, problem = error.problem_mark.line + 1 if error.problem_mark else None, error.problem
        raise ValueError(f"{path}, line {line}, is not valid YAML: {problem}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{path}, line {line}, is not valid YAML: it has a character that is not text.") from error
    except (ValueError, RecursionError) as error:  # for example, the date 2026-99-99, or thousands of brackets
        raise ValueError(f"{path} is not valid YAML: {error}.") from error
