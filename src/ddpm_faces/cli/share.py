"""Commands that talk to the Hub: push, pull and verify."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Private, Repo, Revision, report


def push(
    folder: Annotated[Path, typer.Argument(help="Output folder of a training run.")],
    repo_id: Repo,
    private: Private = None,
    license: Annotated[str | None, typer.Option(help="License of the model, such as cc-by-nc-sa-4.0.")] = None,
    dataset_license: Annotated[str | None, typer.Option(help="License of the training images.")] = None,
    variants: Annotated[
        str, typer.Option(help="Half-precision weights to add, separated by commas; '' for none.")
    ] = "bf16,fp16",
    revision: Annotated[str | None, typer.Option(help="Existing branch (default: the main branch).")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    as_json: Json = False,
) -> None:
    """Check a model and publish it on the Hub with its card."""
    from ..hub.model_folder import push
    from ..models import check_model

    check_model(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` {str(folder)!r} must be an existing folder.")
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
    text = f"Proposed: {commit.pr_url}" if commit.pr_url else f"Published: {commit}"
    report({"commit": str(commit), "pull_request": commit.pr_url}, text, as_json)


def pull(
    repo_id: Repo,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder to download to (default: the cache).")
    ] = None,
    revision: Revision = None,
    variant: Annotated[
        str | None, typer.Option(help="Half-precision weights, bf16 or fp16 (default: float32 weights).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download a model from the Hub and check it. Run it again to resume."""
    from ..hub.download import pull

    folder = pull(repo_id, output, revision, variant)
    text = f"{repo_id} is complete and matches the published checksums: {folder}"
    report({"repo_id": repo_id, "folder": str(folder)}, text, as_json)


def verify(
    repo_id: Repo,
    revision: Revision = None,
    dataset: Annotated[bool, typer.Option("--dataset", help="The repository is a dataset, not a model.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Download differing files again.")] = False,
    as_json: Json = False,
) -> None:
    """Compare downloaded files with the checksums on the Hub."""
    from ..hub.transport import verify

    repo_type = "dataset" if dataset else "model"
    differing = verify(repo_id, revision, repo_type, repair=repair)
    if as_json:
        report({"repo_id": repo_id, "differing": differing}, "", as_json)
    elif differing:
        typer.echo("These files differ from the published checksums: " + ", ".join(differing), err=True)
        if not repair:
            typer.echo("Run the same command with --repair to download them again.", err=True)
    else:
        typer.echo(f"All downloaded files of {repo_id} match the published checksums.")
    if differing:
        raise typer.Exit(1)
