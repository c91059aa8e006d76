import os

import pytest

from ddpm_faces.files import check_new, commit, delete_unfinished, replacing, unfinished_path


def test_folder_replaces_another(tmp_path):
    for text in ("old", "new"):
        unfinished = unfinished_path(tmp_path / "folder")
        unfinished.mkdir()
        (unfinished / "file").write_text(text)
        commit(tmp_path / "folder")
        assert (tmp_path / "folder" / "file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_files_are_as_readable_as_their_folder(tmp_path):
    unfinished = unfinished_path(tmp_path / "folder")
    (unfinished / "part").mkdir(parents=True)
    for path, mode in ((unfinished / "a", 0o600), (unfinished / "part" / "b", 0o600)):
        path.touch()
        path.chmod(mode)
    unfinished.chmod(0o750)
    (unfinished / "part").chmod(0o755)
    commit(tmp_path / "folder")
    modes = [(tmp_path / "folder" / name).stat().st_mode & 0o777 for name in ("a", "part/b")]
    assert modes == [0o640, 0o644]


def test_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def die_halfway() -> None:
        with replacing(path) as new:
            new.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        die_halfway()
    assert path.read_text() == "old"
    with replacing(path) as new:
        new.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_unfinished_files_are_deleted(tmp_path):
    unfinished_path(tmp_path / "folder").mkdir()
    unfinished_path(tmp_path / "file").touch()
    (tmp_path / "mine").touch()
    delete_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_files_are_synced_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    opened = os.open

    def as_on_windows(path, *arguments, **settings):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(os, "open", as_on_windows)
    with replacing(tmp_path / "file") as path:
        path.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"


def test_no_folder_is_begun_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        check_new(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be a folder because .*file' is a file"):
        check_new(tmp_path / "file" / "below" / "it")
