"""Requests to a Hub that is busy, or does not answer."""

import logging
import socket
import threading

import pytest
from huggingface_hub import HfApi, close_session, get_session

from ddpm_faces import errors
from ddpm_faces.errors import is_transient, retry


@pytest.fixture
def pauses(monkeypatch, caplog):
    """The pauses between attempts, which nobody has to wait for."""
    pauses = []
    monkeypatch.setattr(errors.time, "sleep", pauses.append)
    caplog.set_level(logging.WARNING, "ddpm_faces")
    close_session()
    yield pauses
    close_session()


def test_server_that_never_answers(monkeypatch, pauses, caplog):
    monkeypatch.setattr(errors, "ANSWER_SECONDS", 0.05)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        api = HfApi(endpoint=f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(Exception, match="timed out") as raised:
            retry(lambda: api.whoami(token="hf_none"))
    assert is_transient(raised.value)
    assert pauses == [1, 2, 4, 8]
    assert caplog.messages == [f"The Hub does not answer. Trying again in {pause} s." for pause in pauses]


def test_timeout_that_the_user_has_set_stays(pauses):
    get_session().timeout = 7
    retry(lambda: None)
    assert get_session().timeout.read == 7


@pytest.mark.parametrize(("header", "expected"), [({"Retry-After": "9000"}, 300), ({"Retry-After": "3"}, 3), ({}, 1)])
def test_pauses_are_told(pauses, caplog, header, expected):
    class Busy(Exception):
        class response:  # noqa: N801
            status_code, headers = 429, header

    answers = [Busy, None]

    def call():
        if (answer := answers.pop(0)) is not None:
            raise answer

    retry(call)
    assert pauses == [expected]
    assert caplog.messages == [f"The Hub is busy [HTTP 429]. Trying again in {expected} s."]


def test_long_calls_are_told(monkeypatch, pauses):
    told, texts = threading.Event(), []

    def warning(text):
        texts.append(text)
        told.set()

    monkeypatch.setattr(errors, "NOTICE_SECONDS", 0)
    monkeypatch.setattr(errors.logger, "warning", warning)
    assert retry(lambda: told.wait(60), "Comparing checksums")
    assert texts == ["Comparing checksums ..."]
