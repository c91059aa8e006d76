"""The commands that train: they start the scripts in `training/` through Accelerate."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer


NumProcesses = Annotated[
    int | None,
    typer.Option(help="Number of processes, one per GPU (default: those of `accelerate config`, or all)."),
]


def train(context: typer.Context, num_processes: NumProcesses = None) -> None:
    """Train a model on your own images, or on drawn faces. Run the same command again to resume.

    Takes each field of the training configuration as an option; `ddpm-faces train --help` lists them.
    """
    from ..training.arguments import parse_training_config

    _start("train.py", context.args, num_processes, parse_training_config, "ddpm-faces train")


def distill(context: typer.Context, num_processes: NumProcesses = None) -> None:
    """Distill a model into a student that samples in very few steps. Run the same command again to resume.

    Takes each field of the distillation's configuration as an option; `ddpm-faces distill --help` lists them.
    """
    from ..training.distillation import parse_distillation_config

    _start("distill.py", context.args, num_processes, parse_distillation_config, "ddpm-faces distill")


def _start(
    script: str, arguments: list[str], num_processes: int | None, parse: Callable[[list[str], str], object], name: str
) -> None:
    """Replace this process with a script. Mistakes in its arguments are found before the launch."""
    from ..training.arguments import training_folder

    if num_processes is not None and num_processes < 1:
        raise ValueError(f"`num_processes` must be at least 1, got {num_processes}.")
    parse(arguments, f"{name} [--num-processes N]")
    command = [sys.executable, *launcher(num_processes), str(training_folder() / script), *arguments]
    if os.name == "posix":  # the run replaces this process and therefore receives its signals
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until the run has installed a handler
        os.execv(sys.executable, command)
    # Ctrl-C reaches the run as well. Without a handler here, `subprocess.run` would kill it before it has saved.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    raise typer.Exit(subprocess.run(command).returncode)


def launcher(num_processes: int | None) -> list[str]:
    """Return the arguments with which Python launches the script.

    Without `accelerate config`, one process runs without the launcher. The settings of `accelerate config` apply,
    except for the number of processes if it is given.
    """
    from accelerate.commands.config.config_args import default_config_file

    from ..files import read_yaml

    launch = ["-m", "ddpm_faces.training.launch"]
    settings: dict[str, Any] = {}
    if has_settings := os.path.isfile(default_config_file):
        settings = read_yaml(default_config_file) or {}
        # For these two types, Accelerate always starts one process, whatever the number.
        if num_processes in (None, 1) or str(settings.get("distributed_type", "NO")) not in ("NO", "MULTI_CPU"):
            return launch if num_processes is None else [*launch, "--num_processes", str(num_processes)]
    import torch

    num_gpus = 0 if settings.get("use_cpu") else torch.cuda.device_count()
    if num_processes is None:
        num_processes = max(1, num_gpus)
    if num_processes == 1:
        return []
    most, of = (num_gpus, "GPUs") if num_gpus else (os.cpu_count() or 1, "CPU cores")
    if num_processes > most:
        raise ValueError(f"`num_processes` must be at most the number of {of}, {most}, got {num_processes}.")
    if not num_gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # `--multi_gpu` starts several processes on CPUs too, whereas `--cpu` always starts one. Accelerate warns about
    # each option that it has to guess.
    rest = ["--num_machines", "1", "--main_process_port", "0"]
    rest += [] if has_settings else ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launch, "--multi_gpu", "--num_processes", str(num_processes), *rest]
