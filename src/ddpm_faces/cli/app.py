"""The command `ddpm-faces`: what can be done without writing Python, each by one function of the package."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    help="DDPM for faces: evaluate, audit, guide, publish, prepare, convert. To train: "
    "accelerate launch training/train.py.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Repo = Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.")]
Private = Annotated[
    bool | None, typer.Option("--private/--public", help="Of a new repository (default: as your account says).")
]
SigmaMin = Annotated[
    float | None,
    typer.Option(help="Noise to picture at the last step of dpm-solver++ (0.02; for short trainings 0.1)."),
]
EpsilonScaling = Annotated[
    float | None,
    typer.Option(help="By what dpm-solver++ divides the predicted noise (1; models/faces64: 1.003)."),
]
Guide = Annotated[
    str | None,
    typer.Option(help="A weaker pipeline, folder or USER/NAME, to be guided by (default: its own, if any)."),
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="1: no guidance; 1.2 to 1.5 is much (default: as the pipeline says).")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit (default: the main branch).")]


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What training left.", exists=True, file_okay=False)],
    repo_id: Repo,
    private: Private = None,
    license: Annotated[str | None, typer.Option(help="Of the model, such as cc-by-nc-sa-4.0.")] = None,
    dataset_license: Annotated[str | None, typer.Option(help="Of the pictures that it learned from.")] = None,
    variants: Annotated[
        str, typer.Option(help="Half precisions to add, separated by commas; none: ''.")
    ] = "bf16,fp16",
    revision: Annotated[str | None, typer.Option(help="An existing branch (default: the main one).")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Publish a pipeline on the Hub, with its card, after checking it."""
    from ..hub.model_folder import push

    commit = push(
        folder,
        repo_id,
        commit_message=message,
        private=private,
        create_pr=create_pr,
        revision=revision,
        variants=tuple(name for name in variants.split(",") if name),
        license=license,
        dataset_license=dataset_license,
    )
    typer.echo(f"Proposed: {commit.pr_url}" if commit.pr_url else f"Published: {commit}")


@app.command()
def verify(
    repo_id: Repo,
    revision: Revision = None,
    dataset: Annotated[bool, typer.Option("--dataset", help="A data set, and no model.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Download once more what differs.")] = False,
) -> None:
    """Compare what was downloaded with the checksums that the Hub has published."""
    from ..hub.transport import verify

    repo_type = "dataset" if dataset else "model"
    differing = verify(repo_id, revision, repo_type, repair=repair)
    if differing:
        typer.echo("Not what was published: " + ", ".join(differing), err=True)
        if not repair:
            typer.echo("Download them once more: the same command with --repair.", err=True)
        raise typer.Exit(1)
    typer.echo(f"All files of {repo_id} in the cache are what was published.")


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="A folder of pictures or a data set: local, or on the Hub.")],
    output: Annotated[Path | None, typer.Option(help="Write the data set into this new folder.")] = None,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Publish it on the Hub.")] = None,
    resolution: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 128,
    channels: Annotated[int, typer.Option(help="1 (grey), 3 (RGB) or 4 (RGBA).")] = 3,
    split: Annotated[str, typer.Option(help="Split of the source.")] = "train",
    image_column: Annotated[str | None, typer.Option(help="Default: the first that holds pictures.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Classes; 'folder' for names of subfolders.")] = None,
    num_test_images: Annotated[int, typer.Option(help="Set so many aside as the split `test`.")] = 0,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave those out, and list them.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="Of the pictures, such as cc-by-nc-sa-4.0.")] = None,
    private: Private = None,
) -> None:
    """Crop and resize pictures, take out their metadata, and make a data set of them."""
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


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="A pipeline (folder or USER/NAME), or a folder of pictures.")],
    data: Annotated[
        str | None, typer.Argument(help="Real faces: a data set or a folder of pictures (default: drawn ones).")
    ] = None,
    split: Annotated[str, typer.Option(help="Of the data set: faces that were not trained on.")] = "test",
    baseline_split: Annotated[
        str, typer.Option(help="Of other real faces, for what a perfect model could reach; none: ''.")
    ] = "train",
    num_images: Annotated[
        int | None, typer.Option(help="On either side (default: as many as there are, up to 1000).")
    ] = None,
    sampler: Annotated[str, typer.Option(help="ddpm or dpm-solver++.")] = "ddpm",
    steps: Annotated[int | None, typer.Option(help="Of sampling (default: all that were trained).")] = None,
    sigma_min: SigmaMin = None,
    epsilon_scaling: EpsilonScaling = None,
    guide: Guide = None,
    guidance_scale: GuidanceScale = None,
    seed: Annotated[int, typer.Option(help="Of the first face; the next has the next.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.")] = 64,
    inception: Annotated[
        bool, typer.Option("--inception", help="FID and KID of the literature too; downloads 90 MB.")
    ] = False,
    likelihood_images: Annotated[
        int, typer.Option(help="Bound the bits per dimension of so many real faces; 0: do not.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Where to write (default: metrics.json in the pipeline's folder).")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="A metrics.json to set beside it.", exists=True)] = None,
) -> None:
    """Measure how far faces are from real ones; the figures go into the card. `accelerate launch` shares it out."""
    from ..evaluation.measurements import MetricNetworks
    from ..evaluation.quality import METRICS_NAME, check_metrics_file, evaluate, read_metrics, table, write_metrics

    others = None if against is None else read_metrics(against)["metrics"]
    if output is None and Path(source, "model_index.json").is_file():
        output = Path(source, METRICS_NAME)
    if output is not None:
        check_metrics_file(output)
    networks = MetricNetworks.with_inception() if inception else None
    results = evaluate(
        *(source, data, split, baseline_split or None, num_images, sampler, steps, seed, batch_size, networks),
        num_likelihood_images=likelihood_images,
        sigma_min=sigma_min,
        guide=guide,
        guidance_scale=guidance_scale,
        epsilon_scaling=epsilon_scaling,
        against=others,
    )
    if os.environ.get("RANK", "0") != "0":  # one process writes and reports
        return
    if output is not None:
        write_metrics(output, results)
    typer.echo(table(results["metrics"], others))
    if output is not None:
        typer.echo(f"\nThe figures, and how they were measured, are in {output}")


@app.command()
def audit(
    source: Annotated[str, typer.Argument(help="A pipeline (folder or USER/NAME), or a folder of pictures.")],
    data: Annotated[str, typer.Argument(help="The data set that was trained on.")],
    split: Annotated[str, typer.Option(help="What was trained on, and no more: 'train[:500]' are 500.")] = "train",
    held_out_split: Annotated[str, typer.Option(help="Faces that were not.")] = "test",
    num_images: Annotated[int, typer.Option(help="How many faces to search for.")] = 400,
    sampler: Annotated[str, typer.Option(help="ddpm or dpm-solver++.")] = "dpm-solver++",
    steps: Annotated[int, typer.Option(help="Of sampling.")] = 20,
    sigma_min: SigmaMin = None,
    epsilon_scaling: EpsilonScaling = None,
    guide: Guide = None,
    guidance_scale: GuidanceScale = None,
    seed: Annotated[int, typer.Option(help="Of the first face; the next has the next.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.")] = 32,
    features: Annotated[bool, typer.Option(help="Search by a network too, and not by pixels alone.")] = True,
    loss_images: Annotated[int, typer.Option(help="Compare the loss on so many pictures; 0: do not.")] = 100,
    output: Annotated[
        Path | None, typer.Option(help="Folder for audit.json and audit.png (default: the pipeline's).")
    ] = None,
) -> None:
    """Search generated faces for copies of training pictures: the verdict goes into the card. Ends with 3 for yes."""
    from ..evaluation.copies import audit_model
    from ..evaluation.quality import METRICS_NAME, check_metrics_file, write_metrics
    from ..files import replacing

    is_folder = Path(source, "model_index.json").is_file()
    if output is None:
        if not is_folder:
            raise ValueError("`--output` must name a folder: there is none of a pipeline to write into.")
        output = Path(source)
    if is_folder:
        check_metrics_file(Path(source, METRICS_NAME))
    extractor = None
    if features:
        from ..evaluation.extractors import MobileNetV2

        extractor = MobileNetV2()
    report, results, picture = audit_model(
        *(source, data, split, held_out_split, num_images, sampler, steps, seed, batch_size, extractor, loss_images),
        sigma_min=sigma_min,
        guide=guide,
        guidance_scale=guidance_scale,
        epsilon_scaling=epsilon_scaling,
    )
    if os.environ.get("RANK", "0") != "0":  # one process writes and reports
        return
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "audit.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    with replacing(output / "audit.png") as path:
        picture.save(path, "PNG")
    if is_folder:
        keys = ("sampler", "steps", "seeds", "sigma_min", "epsilon_scaling", "guidance_scale", "guide")
        provenance = {key: results[key] for key in keys if key in results}
        write_metrics(Path(source, METRICS_NAME), {"memorisation": {"verdict": results["verdict"], **provenance}})
    typer.echo(results["verdict"])
    typer.echo(f"The closest pairs, which show training pictures: {output / 'audit.png'}")
    if report.found_copies:
        raise typer.Exit(3)


@app.command()
def guide(
    folder: Annotated[Path, typer.Argument(help="A pipeline.", exists=True, file_okay=False)],
    weaker: Annotated[
        str | None, typer.Argument(metavar="[GUIDE]", help="A weaker one, folder or USER/NAME; none: take it away.")
    ] = None,
    guidance_scale: GuidanceScale = None,
) -> None:
    """Give a pipeline a guide (autoguidance), with which it is loaded and published from now on."""
    from ..guidance import save_guide

    if weaker is not None and guidance_scale is None:
        raise ValueError("`guidance_scale` must be given with a guide: 1.2, say.")
    save_guide(folder, weaker, 1.0 if guidance_scale is None else guidance_scale)
    typer.echo(f"The guide of {folder} is {weaker or 'away'}. Figures that were measured before are of how it was.")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A file of torch.save(model.state_dict(), ...).")],
    output: Annotated[Path, typer.Argument(help="A new folder, for the pipeline.")],
    sample_size: Annotated[int, typer.Option(help="Side of the pictures that it was trained on.")] = 64,
) -> None:
    """Make a pipeline of a checkpoint of the article's own code."""
    from ..files import new_folder
    from ..hub.convert import convert_checkpoint

    pipeline = convert_checkpoint(checkpoint, sample_size)
    with new_folder(output) as folder:
        pipeline.save_pretrained(folder)
    typer.echo(f"The pipeline is in {output}; its outputs are those of the checkpoint.")


def main() -> None:
    """Run a command; what a user can mend is said in one line."""
    import sys

    try:
        app()
    except (ValueError, OSError, ImportError) as error:  # such as a package of an extra
        sys.exit(f"error: {error}")
