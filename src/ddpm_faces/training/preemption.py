"""Preemption: signals from a scheduler or a person, and the time limit."""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: not a failure; the same command resumes the run
EXIT_NONFINITE = 70  # EX_SOFTWARE: the same command would fail again

_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
_REASONS = {1: "the time limit is near", **{2 + i: f"received {name}" for i, name in enumerate(_SIGNALS)}}


class Preemption:
    """Collects reasons to stop, which the training loop checks after each step.

    Until [`~Preemption.close`], SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 are recorded and do not end the process, except
    for a second SIGINT, two seconds or more after the first. If `accelerate launch` itself is killed, the process that
    it launched receives SIGTERM (on Linux). The run outlives a shell that started it. Outside the main thread, where
    Python allows no signal handlers, only the time limit counts.

    Args:
        time_limit_minutes (`float`, *optional*): Age of the process, in minutes, at which it must have ended.
    """

    def __init__(self, time_limit_minutes: float | None = None) -> None:
        self.deadline = None if time_limit_minutes is None else _process_start() + 60 * time_limit_minutes
        self.longest_save = 0.0
        self._longest_gap = 0.0
        self._last_check = time.time()
        self._received = 0
        self._first_interrupt: float | None = None
        # The processes agree over the CPU. Over the GPU, each step would have to wait for it.
        self._group = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
        self._handlers: dict[int, Any] = {}
        self._parent_signal: int | None = None
        if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
            numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
            self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
            if _is_launched():
                self._parent_signal = _set_parent_death_signal(signal.SIGTERM)

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}
        if self._parent_signal is not None:
            _set_parent_death_signal(self._parent_signal)
            self._parent_signal = None

    def reason(self) -> str | None:
        """Return the reason to stop now, or `None`. All processes agree on it and must call this at the same step."""
        now = time.time()
        self._longest_gap = max(self._longest_gap, now - self._last_check)
        self._last_check = now
        # Leave room for the longest interval between checks so far, and for twice the longest save.
        margin = self._longest_gap + 2 * self.longest_save
        is_late = self.deadline is not None and now + margin >= self.deadline
        code = max(self._received, int(is_late))
        if self._group is not None:
            codes = torch.tensor([code])
            dist.all_reduce(codes, op=dist.ReduceOp.MAX, group=self._group)
            code = int(codes)
        return _REASONS.get(code)

    def note_save(self, seconds: float) -> None:
        """Record the duration of a save, so that the time limit leaves room for it."""
        self.longest_save = max(self.longest_save, seconds)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = 2 + _SIGNALS.index(signal.Signals(number).name)
        if number == signal.SIGINT:
            # Ctrl-C reaches a launched process twice: from the terminal and from its launcher.
            if self._first_interrupt is not None and time.time() - self._first_interrupt > 2:
                raise KeyboardInterrupt
            self._first_interrupt = self._first_interrupt or time.time()


def _process_start() -> float:
    import psutil

    return psutil.Process().create_time()


def _is_launched() -> bool:
    """Return whether a Python process, such as `accelerate launch`, is the parent of this process.

    Other parents may end before a run that they started: a shell does when its terminal closes.
    """
    import psutil

    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return False
    return bool(command) and Path(command[0]).name.startswith("python")


def _set_parent_death_signal(number: int) -> int | None:
    """Ask the system to send a signal when the parent process dies; return the previous setting (Linux only)."""
    if sys.platform != "linux":
        return None
    PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
    parent, before = os.getppid(), ctypes.c_int()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_GET_PDEATHSIG, ctypes.byref(before))
    libc.prctl(PR_SET_PDEATHSIG, int(number))
    if number and os.getppid() != parent:  # the parent died before the request
        os.kill(os.getpid(), number)
    return before.value
