"""The command that describes a model, or this installation."""

from typing import Annotated, Any

import typer

from .options import Json, Revision


def info(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Folder of a model, or USER/NAME on the Hub (default: none)."),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Describe a model: network, schedule, training, metrics and license.

    Without a model: versions, devices, threads and the cache of this installation.
    """
    from ..hub.description import describe_installation, describe_model

    if model is None and revision is not None:
        raise ValueError(f"`revision` needs a model, got {revision!r} without one.")
    result = describe_installation() if model is None else describe_model(model, revision)
    if as_json:
        import json

        typer.echo(json.dumps(result, indent=2))
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Print a dictionary as a table of names and values."""
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in result.items():
        if value is not None:
            lines = value if isinstance(value, list) else [value]
            table.add_row(
                name.replace("_", " "), "\n".join(f"{line:,}" if isinstance(line, int) else line for line in lines)
            )
    Console(highlight=False, markup=False).print(table)
