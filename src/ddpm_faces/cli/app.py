"""The command `ddpm-faces`: what you can do without writing Python. Each command calls one function of the package."""

import os
import re
import sys
from typing import Annotated

import typer

from .. import __version__
from ..interruption import INTERRUPTED, say_interrupted
from .demo import demo, push_space
from .info import info
from .make import convert, edit, generate, guide, prepare, restore, tune
from .measure import audit, evaluate
from .share import pull, push, verify
from .train import distill, train


# The groups of commands; within a group, in the order of use.
GROUPS = {
    "Make": (generate, demo, restore, edit, prepare, guide, tune, convert),
    "Train": (train, distill),
    "Measure": (evaluate, audit, info),
    "Share": (push, push_space, pull, verify),
}
EXIT_CODES = (
    "Exit codes: 0 success; 1 failure, such as no network or a full disk; 2 invalid input; 3 the audit found copies; "
    "130 interrupted."
)
UsageError = typer.BadParameter.__base__  # of click, or of the copy of it that comes with typer

app = typer.Typer(
    name="ddpm-faces",
    help="Train, measure, share and use diffusion models (DDPM) of faces.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),  # `--num_images` means `--num-images`
    },
)
for group, commands in GROUPS.items():
    for command in commands:
        # These pass unknown options, and `--help`, on to their scripts.
        passing = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
        settings = passing if command in (train, distill) else {}
        app.command(rich_help_panel=group, context_settings=settings)(command)


def show_version(value: bool) -> None:
    if value:
        typer.echo(f"ddpm-faces {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Read the options before a command. `main` reads `--debug` at any position."""


def main() -> None:
    """Run a command. An error is printed in one line, or with its traceback with `--debug`."""
    arguments = [expand_home(argument) for argument in sys.argv[1:] if argument != "--debug"]
    is_debugging = len(arguments) < len(sys.argv) - 1
    try:
        code = app(args=arguments, prog_name="ddpm-faces", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except UsageError as error:
        if not error.format_message():  # a command without arguments has printed its help
            sys.exit(2)
        command = error.ctx.command_path if error.ctx else "ddpm-faces"
        fail(f"{describe(error)} Run `{command} --help` for help.", 2)
    except (ValueError, OSError, ImportError) as error:  # an ImportError: a package of an extra is missing
        if is_debugging:
            raise
        message = str(error)
        if isinstance(error, OSError) and error.strerror:  # Python shows system errors with a number
            message = error.strerror + (f": {error.filename!r}" if error.filename else "")
        fail(message, 2 if isinstance(error, ValueError) else 1)
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error))
        if is_debugging or not is_memory:
            raise
        fail("There is not enough memory. Use a smaller --batch-size, or close other programs.", 1)
    if code == INTERRUPTED:
        say_interrupted()
    sys.exit(code)


def expand_home(argument: str) -> str:
    """Expand `~` where a shell does not: in quotes, and after the `=` of an option."""
    option, equals, value = argument.partition("=")
    if option.startswith("--") and equals:
        return option + equals + os.path.expanduser(value)
    return os.path.expanduser(argument)


def describe(error: typer.BadParameter) -> str:
    """Return the message of a usage error as a sentence, with suggestions."""
    possibilities = getattr(error, "possibilities", None)
    message = error.message if possibilities else error.format_message()
    message, _, meant = message.partition(" Did you mean ")  # some versions of typer and click add it
    meant = meant.rstrip("?") or " or ".join(possibilities or [])
    return f"{message.rstrip('.')}." + (f" Did you mean {meant}?" if meant else "")


def fail(message: str, code: int) -> None:
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(" ".join(message.split()), err=True)
    sys.exit(code)
