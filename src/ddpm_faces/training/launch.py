"""`accelerate launch` for `ddpm-faces train`: returns the exit code of the script, without a traceback.

$ python -m ddpm_faces.training.launch --num_processes 2 training/train.py
"""

import logging
import signal
import subprocess
import sys
from types import FrameType

from ..interruption import handle_interrupts, say_interrupted


def main() -> int:
    """Launch the script that `sys.argv` names, and return the exit code."""
    import psutil
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not psutil.Process().children():  # a running script also receives Ctrl-C, and saves
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)  # torchrun replaces this handler when it starts several processes
    logging.disable(logging.ERROR)  # torchrun prints many lines; the messages below are one line each
    try:
        launch()
    except KeyboardInterrupt:
        return say_interrupted()
    except subprocess.CalledProcessError as error:  # of one process
        return _shell_code(error.returncode, "The training process")
    except ChildFailedError as error:  # of several
        rank, failure = error.get_first_failure()
        return _shell_code(failure.exitcode, f"Process {rank}")
    except SignalException as error:
        return say_interrupted() if error.sigval == signal.SIGINT else 128 + error.sigval
    except ValueError as error:
        print(f"error: `accelerate launch`: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _shell_code(code: int, name: str) -> int:
    """Return an exit code as shells do. The script has printed why it failed, unless a signal killed it."""
    if code >= 0:
        return code
    print(f"error: {name} was killed by {signal.Signals(-code).name}.", file=sys.stderr)
    return 128 - code


if __name__ == "__main__":
    handle_interrupts()
    sys.exit(main())
