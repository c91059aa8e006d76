"""Commands that make something in a folder: a dataset, a guided pipeline, a converted checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from .options import GuidanceScale, Private


def prepare(
    source: Annotated[str, typer.Argument(help="Folder of images, or a dataset in a folder or on the Hub.")],
    output: Annotated[Path | None, typer.Option(help="New folder for the dataset.")] = None,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Publish the dataset on the Hub.")] = None,
    resolution: Annotated[int, typer.Option(help="Height and width of the images in pixels.")] = 128,
    channels: Annotated[int, typer.Option(help="Channels: 1 (grey), 3 (RGB) or 4 (RGBA).")] = 3,
    split: Annotated[str, typer.Option(help="Split of the source.")] = "train",
    image_column: Annotated[
        str | None, typer.Option(help="Column of the images (default: the first that has some).")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of the classes; 'folder' for the names of subfolders.")
    ] = None,
    num_test_images: Annotated[int, typer.Option(help="Number of images to hold out as the split `test`.")] = 0,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Skip images that cannot be read, and list them.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="License of the images, such as cc-by-nc-sa-4.0.")] = None,
    private: Private = None,
) -> None:
    """Crop and resize images, remove their metadata, and make a dataset of them."""
    from ..data.preparation import prepare

    where = prepare(
        source,
        output,
        push,
        resolution=resolution,
        channels=channels,
        split=split,
        image_column=image_column,
        label_column=label_column,
        num_test_images=num_test_images,
        skip_unreadable=skip_unreadable,
        license=license,
        private=private,
    )
    typer.echo(f"The data set is at {where}")


def guide(
    folder: Annotated[Path, typer.Argument(help="Folder of a pipeline.", exists=True, file_okay=False)],
    weaker: Annotated[
        str | None,
        typer.Argument(
            metavar="[GUIDE]", help="Weaker pipeline, folder or USER/NAME. Without it, the guide is removed."
        ),
    ] = None,
    guidance_scale: GuidanceScale = None,
) -> None:
    """Give a pipeline a guide (autoguidance), or remove it; it is saved and published with the pipeline."""
    from ..guidance import save_guide

    if weaker is not None and guidance_scale is None:
        raise ValueError("`guidance_scale` must be given with a guide: 1.2, say.")
    save_guide(folder, weaker, 1.0 if guidance_scale is None else guidance_scale)
    done = f"{folder} is now guided by {weaker}." if weaker else f"The guide of {folder} is removed."
    typer.echo(f"{done} Evaluate it again: older metrics are those of the pipeline as it was.")


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="File of torch.save(model.state_dict(), ...).")],
    output: Annotated[Path, typer.Argument(help="New folder for the pipeline.")],
    sample_size: Annotated[int, typer.Option(help="Height and width of the training images.")] = 64,
) -> None:
    """Convert a checkpoint of the article's own code into a pipeline."""
    from ..files import new_folder
    from ..hub.convert import convert_checkpoint

    pipeline = convert_checkpoint(checkpoint, sample_size)
    with new_folder(output) as folder:
        pipeline.save_pretrained(folder)
    typer.echo(f"The pipeline is in {output}; its outputs are those of the checkpoint.")
