"""Runs of scripts in separate processes, without the ten seconds to import torch and diffusers in each.

One process imports them. Each run of a script is a fork of it, made by the fork server of the standard library.
"""

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


FAULTS = Path(__file__).parent / "faults" / "sitecustomize.py"
PRELOAD = ["torch.utils.tensorboard", "accelerate.tracking", "datasets", "diffusers", "matplotlib.pyplot"]
PRELOAD += [
    "ddpm_faces.evaluation.copies",
    "ddpm_faces.data.stream",
    "ddpm_faces.training.finish",
    "forked",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def run_script(
    arguments: list[str], environment: dict[str, str], num_processes: int = 1
) -> list[subprocess.CompletedProcess]:
    """Run a script and return the result of each process.

    It does what `subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)` does,
    except that libraries that read the environment when they are imported see that of the first call. Several
    processes get the environment variables of torchrun and srun.
    """
    environments = [environment]
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        sizes = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
        ranks = [str(rank) for rank in range(num_processes)]
        environments = [{**common, **sizes, "RANK": rank, "LOCAL_RANK": rank} for rank in ranks]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f"stdout{i}"), Path(folder, f"stderr{i}")) for i in range(num_processes)]
        processes = [
            _context.Process(target=_run, args=(arguments, environ, files))
            for environ, files in zip(environments, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [
            subprocess.CompletedProcess(arguments, process.exitcode, stdout.read_text(), stderr.read_text())
            for process, (stdout, stderr) in zip(processes, outputs, strict=True)
        ]


def _run(arguments: list[str], environment: dict[str, str], outputs: tuple[Path, Path]) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # like a process that was not forked
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
