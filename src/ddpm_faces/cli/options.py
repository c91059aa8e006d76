"""Arguments and options that several commands share."""

import json
from typing import Annotated, Any

import typer


Repo = Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model, or USER/NAME on the Hub.")]
Source = Annotated[str, typer.Argument(help="Model (folder or USER/NAME), or folder of images.")]
Private = Annotated[
    bool | None,
    typer.Option("--private/--public", help="Visibility of a new repository (default: that of your account)."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit (default: the main branch).")]
SigmaMin = Annotated[
    float | None,
    typer.Option(help="Noise level of the solver's last step (default: 0.02; try 0.1 after a short training)."),
]
EpsilonScaling = Annotated[
    float | None,
    typer.Option(help="Divisor of the noise that the solver's steps predict (default: 1)."),
]
Guide = Annotated[
    str | None,
    typer.Option(help="Weaker model for autoguidance, a folder or USER/NAME (default: the model's own, if any)."),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        help="Scale of classifier-free guidance, for models of prompts or classes; 1 is off (default: that of the "
        "model)."
    ),
]
AutoguidanceScale = Annotated[
    float | None,
    typer.Option(help="Scale of autoguidance, usually 1.2 to 1.5; 1 is off (default: that of the model)."),
]
GuidanceInterval = Annotated[
    tuple[int, int] | None,
    typer.Option(metavar="LOW HIGH", help="Lowest and highest timestep with guidance (default: that of the model)."),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Way to sample, such as fast, or exact for all steps of DDPM (default: that of the model)."),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Precision of the networks: auto (bfloat16 if the device has instructions for it), float32 or bfloat16."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the first image; image i uses seed + i.")]
BatchSize = Annotated[int, typer.Option(help="Images per batch.")]
CaptionColumn = Annotated[str, typer.Option(help="With --prompts: column of the captions.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for scripts.")]


def report(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Print the result of a command, as one JSON object or as text."""
    typer.echo(json.dumps(result, indent=2, default=str) if as_json else text)
