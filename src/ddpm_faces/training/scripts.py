"""Shared parts of the training scripts: devices, gradient clipping, and exit codes."""

import importlib.util
import io
import math
import os
import platform
import sys
import traceback
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ..errors import HubError
from ..interruption import say_interrupted
from .config import TrainingConfig
from .cores import use_all_cores
from .distillation import DistillationConfig
from .setup import SetupError


X86 = ("x86_64", "AMD64")  # architectures whose CPU capability PyTorch reports


def make_accelerator(config: TrainingConfig | DistillationConfig) -> Accelerator:
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise ValueError(f"`report_to` {config.report_to!r} is not installed: pip install {config.report_to}.")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" or getattr(config, "dry_run", False) else config.report_to,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
        dynamo_backend="no",  # it would rename the weights, so `train` compiles in place instead
    )
    if accelerator.device.type == "cpu":
        use_all_cores()
        capability = torch.backends.cpu.get_cpu_capability()
        if accelerator.mixed_precision == "bf16" and platform.machine() in X86 and "AVX512" not in capability:
            accelerator.print(
                f"Warning: this CPU ({capability}) has no bf16 instructions, so bf16 is ten times as slow as float32. "
                "Use --mixed_precision no."
            )
    return accelerator


def clip_gradient(accelerator: Accelerator, unet: torch.nn.Module, max_grad_norm: float) -> torch.Tensor:
    """Clip the gradient unless `max_grad_norm` is 0, and return its norm before clipping, of shape `()`."""
    grad_norm = accelerator.clip_grad_norm_(unet.parameters(), max_grad_norm or math.inf)
    return grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def run_script(main: Callable[[], object]) -> None:
    """Run the main function of a script, and end the process with an exit code of docs/guides/resume.md."""
    for stream in (sys.stdout, sys.stderr):  # a file name that the terminal cannot show must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = exit_code(main)
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Everything is saved and closed. Deleting a network of several processes makes DistributedDataParallel wait,
        # holding the interpreter's lock, for a thread of gloo that may itself be waiting for that lock: a deadlock.
        os._exit(code)
    sys.exit(code)


def exit_code(main: Callable[[], object]) -> int:
    """Run `main`, and return the exit code of the process."""
    try:
        main()
    except SystemExit as leaving:  # with an exit code of docs/guides/resume.md
        return int(leaving.code or 0)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return say_interrupted()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
