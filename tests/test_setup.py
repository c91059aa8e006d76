import pytest
from filelock import FileLock

from ddpm_faces.training import setup
from ddpm_faces.training.setup import SetupError, locked


def test_empty_output_folder_is_removed(tmp_path):
    with locked(str(tmp_path / "run"), True):
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run").exists()
    with locked(str(tmp_path / "run"), True):
        (tmp_path / "run" / "checkpoint").mkdir()
    assert (tmp_path / "run" / "checkpoint").exists()


def test_waiting_run_recreates_the_folder_that_the_other_removed(tmp_path, monkeypatch):
    acquire, calls = FileLock.acquire, []

    def vanishing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / "run").rmdir()
            raise FileNotFoundError(tmp_path / "run" / ".lock")
        return acquire(self, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", vanishing)
    with locked(str(tmp_path / "run"), True):
        assert len(calls) == 2
        assert (tmp_path / "run" / ".lock").exists()


def test_folder_of_a_run_in_progress_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "LOCK_SECONDS", 0)
    with locked(str(tmp_path), True), pytest.raises(SetupError, match="is in use by another run"):
        locked(str(tmp_path), True).__enter__()
