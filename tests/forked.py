"""Scripts in processes of their own, without the ten seconds that each would take to import torch and diffusers.

One process imports them; each run of a script is a fork of it, by the standard library's fork server.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path


FAULTS = Path(__file__).parent / "faults" / "sitecustomize.py"
PRELOAD = ["torch.utils.tensorboard", "accelerate.tracking", "datasets", "diffusers", "matplotlib.pyplot"]
PRELOAD += [
    "transformers.hf_argparser",
    "ddpm_faces.audit",
    "ddpm_faces.streaming",
    "ddpm_faces.training_run",
    "forked",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def run_script(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)`.

    But what libraries read of the environment as they are imported is that of the first call.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = _context.Process(target=_run, args=(arguments, environment, outputs))
        process.start()
        process.join()
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in outputs))


def _run(arguments: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    os.setsid()
    for number, path in enumerate(outputs, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
    if "FAULTS" in environment:
        runpy.run_path(str(FAULTS))["install"](json.loads(environment["FAULTS"]))
    runpy.run_path(arguments[0], run_name="__main__")
