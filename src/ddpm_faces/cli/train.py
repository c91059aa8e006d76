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
        typer.Option(min=1, help="Number of processes, one per GPU (default: those of `accelerate config`, or all)."),
    ] = None,
) -> None:
    """Train a model on your own images, or on drawn faces. Run the same command again to resume.

    Takes each field of the training configuration as an option; `ddpm-faces train --help` lists them.
    """
    from ..training.arguments import parse_training_config, training_folder

    arguments = context.args
    parse_training_config(arguments, "ddpm-faces train [--num-processes N]")  # so that mistakes need no launch
    script = training_folder() / "train.py"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch_options(num_processes), str(script)]
    command += arguments
    if os.name == "posix":  # the launcher takes over this process, and so receives its signals
        sys.stdout.flush()
        os.execv(sys.executable, command)
    raise typer.Exit(subprocess.run(command).returncode)


def launch_options(num_processes: int | None) -> list[str]:
    """Return options of `accelerate launch`. What `accelerate config` has set stays, except for what is given."""
    from accelerate.commands.config.config_args import default_config_file

    if os.path.isfile(default_config_file):
        return [] if num_processes is None else ["--num_processes", str(num_processes)]
    import torch

    num_gpus = torch.cuda.device_count()
    if num_processes is None:
        num_processes = max(1, num_gpus)
    kind = [] if num_processes == 1 else ["--multi_gpu"] if num_gpus else ["--cpu"]
    # All of these, because Accelerate warns about each one that it has to guess.
    rest = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*kind, "--num_processes", str(num_processes), *rest]
