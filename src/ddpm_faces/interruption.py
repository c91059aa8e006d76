"""Handling of Ctrl-C: print one line and exit with 130, even during imports, which take seconds."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType


INTERRUPTED = 130


def handle_interrupts() -> None:
    """Let Ctrl-C end the process at once while a module is being imported, and raise `KeyboardInterrupt` otherwise.

    Some modules turn a `KeyboardInterrupt` during their import into another error, or lose it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background jobs of a shell ignore Ctrl-C
        signal.signal(signal.SIGINT, _interrupt)
    if hasattr(signal, "pthread_sigmask"):  # `ddpm-faces train` blocks it while it starts this process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def say_interrupted() -> int:
    """Print that the process was interrupted, unless its launcher does that, and return the exit code."""
    if "RANK" not in os.environ:  # RANK is set in each of several processes
        with suppress(OSError):  # a signal handler must not use `print`, which it may have interrupted
            os.write(2, b"Interrupted.\n")
    return INTERRUPTED


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(say_interrupted())
        frame = frame.f_back
    raise KeyboardInterrupt
