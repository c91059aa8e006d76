"""Arguments and options that several commands share."""

from typing import Annotated

import typer


Repo = Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.")]
Source = Annotated[str, typer.Argument(help="Pipeline (folder or USER/NAME), or folder of images.")]
Private = Annotated[
    bool | None,
    typer.Option("--private/--public", help="Visibility of a new repository (default: that of your account)."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit (default: the main branch).")]
SigmaMin = Annotated[
    float | None,
    typer.Option(help="Noise level of the last step of dpm-solver++ (default: 0.02; after short trainings use 0.1)."),
]
EpsilonScaling = Annotated[
    float | None,
    typer.Option(help="Divisor of the predicted noise in dpm-solver++ (default: 1; models/faces64 uses 1.003)."),
]
Guide = Annotated[
    str | None,
    typer.Option(help="Weaker pipeline for autoguidance, folder or USER/NAME (default: the pipeline's own, if any)."),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(help="Scale of the autoguidance, usually 1.2 to 1.5; 1 is off (default: that of the pipeline)."),
]
Sampler = Annotated[str, typer.Option(help="Sampler: ddpm or dpm-solver++.")]
Seed = Annotated[int, typer.Option(help="Seed of the first image; image i uses seed + i.")]
BatchSize = Annotated[int, typer.Option(help="Images in a batch.")]
