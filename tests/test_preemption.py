import os
import signal
import subprocess
import sys
import threading

import pytest

from ddpm_faces.training import preemption as module
from ddpm_faces.training.preemption import Preemption


NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")


@pytest.fixture(autouse=True)
def handlers():
    before = {name: signal.getsignal(getattr(signal, name)) for name in NAMES}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


class Clock:
    """A clock that the test sets."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "time", lambda: self.now)
        monkeypatch.setattr(module, "_process_start", lambda: 1000.0)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_signals_are_remembered(name):
    preemption = Preemption()
    assert preemption.reason() is None
    os.kill(os.getpid(), getattr(signal, name))
    assert preemption.reason() == f"received {name}"


def test_second_interrupt_ends_the_process(clock):
    preemption = Preemption()
    for _ in range(2):  # from the terminal and from the launcher
        os.kill(os.getpid(), signal.SIGINT)
    clock.now += 3
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert preemption.reason() == "received SIGINT"


def test_time_limit_leaves_room_for_the_save_and_the_slowest_step(clock):
    preemption = Preemption(time_limit_minutes=10)  # until 1600
    preemption.note_save(20)
    for clock.now in (1005, 1035, 1040):
        assert preemption.reason() is None
    # The longest gap between two checks was 30 s, and a save may take 40.
    clock.now = 1600 - 30 - 40 - 1
    preemption._last_check = clock.now - 5
    assert preemption.reason() is None
    clock.now += 2
    assert preemption.reason() == "the time limit is near"


def test_no_limit(clock):
    preemption = Preemption()
    clock.now = 1e12
    assert preemption.reason() is None


def test_handlers_are_restored():
    before = {name: signal.getsignal(getattr(signal, name)) for name in NAMES}
    preemption = Preemption()
    assert signal.getsignal(signal.SIGTERM) != before["SIGTERM"]
    preemption.close()
    preemption.close()
    assert {name: signal.getsignal(getattr(signal, name)) for name in NAMES} == before


def test_thread_has_a_time_limit_and_no_handlers(clock):
    before, reasons = signal.getsignal(signal.SIGTERM), []

    def work():
        preemption = Preemption(time_limit_minutes=1)
        clock.now += 61
        reasons.append(preemption.reason())
        preemption.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reasons == ["the time limit is near"]
    assert signal.getsignal(signal.SIGTERM) == before


SCRIPT = """
import os, signal, sys
from ddpm_faces.training.preemption import Preemption
preemption = Preemption()
os.kill(os.getppid(), signal.SIGKILL)
print("ready", flush=True)
sys.stdin.readline()
print(preemption.reason(), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
@pytest.mark.parametrize(("parent", "reason"), [("shell", "None"), ("python", "received SIGTERM")])
def test_run_outlives_its_shell_but_not_its_launcher(parent, reason):
    launch = [sys.executable, "-c", SCRIPT]
    command = {
        "shell": ["sh", "-c", '"$@"; exit 1', "sh", *launch],
        "python": [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", *launch],
    }[parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.wait()  # the parent is dead
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{reason}\n"
