"""The command that trains: it starts `training/train.py` through Accelerate."""

import os
import subprocess
import sys
from typing import Annotated

import typer


def train(
    context: typer.Context,
    num_processes: Annotated[
        int | None,
        typer.Option(help="Number of processes, one per GPU (default: those of `accelerate config`, or all)."),
    ] = None,
) -> None:
    """Train a model on your own images, or on drawn faces. Run the same command again to resume.

    Takes each field of the training configuration as an option; `ddpm-faces train --help` lists them.
    """
    from ..training.arguments import parse_training_config, training_folder

    if num_processes is not None and num_processes < 1:
        raise ValueError(f"`num_processes` must be at least 1, got {num_processes}.")
    arguments = context.args
    parse_training_config(arguments, "ddpm-faces train [--num-processes N]")  # finds mistakes before the launch
    command = [sys.executable, *launcher(num_processes), str(training_folder() / "train.py"), *arguments]
    if os.name == "posix":  # the run replaces this process and therefore receives its signals
        sys.stdout.flush()
        os.execv(sys.executable, command)
    raise typer.Exit(subprocess.run(command).returncode)


def launcher(num_processes: int | None) -> list[str]:
    """Return the arguments with which Python launches the script.

    Without `accelerate config`, one process runs without the launcher, which would turn each exit code into 1. The
    settings of `accelerate config` apply, except for the number of processes if it is given.
    """
    from accelerate.commands.config.config_args import default_config_file

    launch = ["-m", "accelerate.commands.launch"]
    if os.path.isfile(default_config_file):
        return launch if num_processes is None else [*launch, "--num_processes", str(num_processes)]
    import torch

    num_gpus = torch.cuda.device_count()
    if num_processes is None:
        num_processes = max(1, num_gpus)
    if num_processes == 1:
        return []
    if 0 < num_gpus < num_processes:
        raise ValueError(f"`num_processes` must be at most the number of GPUs, {num_gpus}, got {num_processes}.")
    if not num_gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # `--multi_gpu` starts several processes on CPUs too, whereas `--cpu` always starts one. Accelerate warns about
    # each option that it has to guess.
    rest = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*launch, "--multi_gpu", "--num_processes", str(num_processes), *rest]
