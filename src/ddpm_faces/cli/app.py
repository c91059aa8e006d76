"""The command `ddpm-faces`: what can be done without writing Python, each by one function of the package."""

import sys

import typer

from .demo import demo, push_space
from .make import convert, guide, prepare
from .measure import audit, evaluate
from .share import push, verify


app = typer.Typer(
    help="DDPM for faces: evaluate, audit, guide, publish, prepare, convert. To train: "
    "accelerate launch training/train.py.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (push, verify, prepare, evaluate, audit, guide, convert, demo, push_space):
    app.command()(command)


def main() -> None:
    """Run a command. An error that a user can mend is printed in one line."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:  # an ImportError: a package of an extra is missing
        sys.exit(f"error: {error}")
