"""When a run has to make room: signals from a scheduler or a person, and a limit of time."""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: not a failure, the same command goes on
EXIT_NONFINITE = 70  # EX_SOFTWARE: the same command would fail again

_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
_REASONS = {1: "its time limit is near", **{2 + i: f"it received {name}" for i, name in enumerate(_SIGNALS)}}


class Preemption:
    """Collects the reasons to stop, for the trainer to ask about at the end of each step.

    Until [`~Preemption.close`], SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 do not end the process but are remembered; a
    second SIGINT, two seconds or more after the first, does end it. Where `accelerate launch` itself is killed, the
    process that it launched receives SIGTERM (on Linux). Outside of the main thread, Python allows no handlers: there
    the time limit alone counts.

    Args:
        time_limit_minutes (`float`, *optional*): Age of the process at which it must have ended.
    """

    def __init__(self, time_limit_minutes: float | None = None) -> None:
        self.deadline = None if time_limit_minutes is None else _process_start() + 60 * time_limit_minutes
        self.longest_save = 0.0
        self._longest_gap = 0.0
        self._last_check = time.time()
        self._received = 0
        self._first_interrupt: float | None = None
        # Over the CPU: asking the GPU would make each step wait for it.
        self._group = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
        self._handlers: dict[int, Any] = {}
        self._parent_signal: int | None = None
        if threading.current_thread() is threading.main_thread():  # others may not listen to signals
            numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
            self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
            self._parent_signal = _set_parent_death_signal(signal.SIGTERM)

    def close(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}
        if self._parent_signal is not None:
            _set_parent_death_signal(self._parent_signal)
            self._parent_signal = None

    def reason(self) -> str | None:
        """Why to stop now, on which all processes agree: each must ask at the same step. `None`: go on."""
        now = time.time()
        self._longest_gap = max(self._longest_gap, now - self._last_check)
        self._last_check = now
        # The next check may be as late as the latest so far, and a busy disk twice as slow.
        margin = self._longest_gap + 2 * self.longest_save
        is_late = self.deadline is not None and now + margin >= self.deadline
        code = max(self._received, int(is_late))
        if self._group is not None:
            codes = torch.tensor([code])
            dist.all_reduce(codes, op=dist.ReduceOp.MAX, group=self._group)
            code = int(codes)
        return _REASONS.get(code)

    def note_save(self, seconds: float) -> None:
        """Take into account how long a save has taken, when the limit of time comes near."""
        self.longest_save = max(self.longest_save, seconds)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = 2 + _SIGNALS.index(signal.Signals(number).name)
        if number == signal.SIGINT:
            # Ctrl-C reaches a launched process twice, from the terminal and from its launcher.
            if self._first_interrupt is not None and time.time() - self._first_interrupt > 2:
                raise KeyboardInterrupt
            self._first_interrupt = self._first_interrupt or time.time()


def _process_start() -> float:
    import psutil

    return psutil.Process().create_time()


def _set_parent_death_signal(number: int) -> int | None:
    """Let the system send a signal when the parent process dies; return the one that it sent before (Linux)."""
    if sys.platform != "linux":
        return None
    PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
    parent, before = os.getppid(), ctypes.c_int()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_GET_PDEATHSIG, ctypes.byref(before))
    libc.prctl(PR_SET_PDEATHSIG, int(number))
    if number and os.getppid() != parent:  # it died before it could be asked for
        os.kill(os.getpid(), number)
    return before.value
