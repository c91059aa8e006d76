"""Errors of the Hub, explained to the user, and retries of requests when the Hub is busy."""

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from huggingface_hub import get_session
from huggingface_hub.errors import OfflineModeIsEnabled


logger = logging.getLogger(__name__)

ANSWER_SECONDS = 60  # timeout of a request
NOTICE_SECONDS = 2  # a longer wait is announced
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_ATTEMPTS = 5
REASONS = {
    401: "the token is missing or invalid: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token has no permission for this: use one with write access, or a repository of your own",
    404: "the repository was not found, or is private: check the name and the permissions of your token",
    409: "somebody else is changing the repository: run this again",
    412: "somebody else changed the repository in the meantime: look at the change, and run this again",
    429: "the Hub received too many requests: run this again later",
}


class HubError(OSError):
    """The Hub could not be reached, or it refused a request. The message says what to do."""


def retry(call: Callable[[], Any], doing: str = "Waiting for the Hub") -> Any:
    """Call a function up to five times while the Hub is busy or down. The client itself retries only some requests.

    The pause is the `Retry-After` of the answer (five minutes at most), or else 1, 2, 4 and 8 seconds. The log tells
    each pause, and that the call takes long.

    Args:
        call (`Callable`): Function that sends requests to the Hub.
        doing (`str`): What the call does, for the log.
    """
    for attempt in range(_ATTEMPTS):
        try:
            with _noticing(doing):
                return call()
        except Exception as error:  # `is_transient` recognizes network errors by their attributes
            if attempt == _ATTEMPTS - 1 or not is_transient(error):
                raise
            response = getattr(error, "response", None)
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            pause = min(int(asked), 300) if asked.isdigit() else 2**attempt
            answer = "does not answer" if response is None else f"is busy [HTTP {response.status_code}]"
            logger.warning("The Hub %s. Trying again in %d s.", answer, pause)
            time.sleep(pause)


@contextlib.contextmanager
def _noticing(doing: str) -> Iterator[None]:
    """Announce a call that takes long, and limit the time in which the Hub has to answer."""
    session = get_session()
    if session.timeout.read is None:  # by default, huggingface_hub waits forever
        session.timeout = ANSWER_SECONDS
    notice = threading.Timer(NOTICE_SECONDS, logger.warning, [f"{doing} ..."])
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, or `None` if there was no answer."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def is_transient(error: BaseException) -> bool:
    status = http_status(error)
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, OfflineModeIsEnabled):  # waiting does not help
        return False
    if type(error).__name__ in ("UnsupportedProtocol", "LocalProtocolError"):  # the URL is wrong
        return False
    # Python or the client's HTTP library reports that there was no answer.
    return isinstance(error, ConnectionError) or type(error).__module__.startswith(("httpx", "requests"))


@contextlib.contextmanager
def explaining(repo_id: str, outcome: str) -> Iterator[None]:
    """Turn errors of the Hub into a [`HubError`] that explains them and ends with `outcome`."""
    try:
        yield
    except (ValueError, HubError):
        raise
    except Exception as error:  # of the Hub client, its HTTP library or its threads; all others are raised again
        explanation = explanation_of(repo_id, error, outcome)
        if explanation is None:
            raise
        raise explanation from error


def explanation_of(repo_id: str, error: Exception, outcome: str) -> HubError | None:
    """Return the [`HubError`] for an error, or `None` if the error does not come from the Hub."""
    cause: BaseException | None = error
    status, is_unreachable = None, False
    while status is None and cause is not None:
        status = http_status(cause)
        is_unreachable |= is_transient(cause)
        cause = cause.__cause__
    if status is None and not isinstance(error, (OSError, RuntimeError)) and not is_transient(error):
        return None
    reason = (status and REASONS.get(status)) or reason_of(error)
    if status is None and is_unreachable:
        reason = f"the Hub could not be reached ({reason}); check the network, or run this again later"
    code = "" if status is None else f" [HTTP {status}]"
    return HubError(f"{repo_id}: {reason}{code}. {outcome}".strip())


def reason_of(error: BaseException) -> str:
    """Return the message of the root cause, in one line and without a token."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return TOKEN.sub("hf_...", text).rstrip(".")
