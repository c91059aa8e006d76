"""Commands that measure the quality of faces and search them for copies of training images."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    AutoguidanceScale,
    BatchSize,
    CaptionColumn,
    Dtype,
    EpsilonScaling,
    GuidanceScale,
    Guide,
    Json,
    Preset,
    Seed,
    SigmaMin,
    Source,
    report,
)


def evaluate(
    source: Source,
    data: Annotated[
        str | None, typer.Argument(help="Real faces: a dataset or a folder of images (default: drawn faces).")
    ] = None,
    split: Annotated[str, typer.Option(help="Held-out split to compare against.")] = "test",
    baseline_split: Annotated[
        str,
        typer.Option(
            help="Split of other real faces, which show the values of a perfect model; '' skips it. With --prompts, "
            "the split that shows what the captions mean."
        ),
    ] = "train",
    num_images: Annotated[
        int | None,
        typer.Option(help="Number of generated and of real images (default: all, up to 1000)."),
    ] = None,
    preset: Preset = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps (default: those of the preset, or all).")] = None,
    sigma_min: SigmaMin = None,
    epsilon_scaling: EpsilonScaling = None,
    guide: Guide = None,
    guidance_scale: GuidanceScale = None,
    autoguidance_scale: AutoguidanceScale = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    dtype: Dtype = "auto",
    inception: Annotated[
        bool, typer.Option("--inception", help="Also measure the FID and KID of the literature (downloads 90 MB).")
    ] = False,
    likelihood_images: Annotated[
        int, typer.Option(help="Number of real faces for the bound on the bits per dimension; 0 skips it.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option(help="File for the metrics (default: metrics.json in the model's folder).")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Earlier metrics.json to compare with the result.", exists=True, dir_okay=False)
    ] = None,
    prompts: Annotated[
        bool,
        typer.Option(
            "--prompts",
            help="Measure instead how closely faces follow the captions of the held-out images, at guidance scales of "
            "1, 1.5, 2, 3 and that of the model, or at --guidance-scale. The dataset needs columns of attributes.",
        ),
    ] = False,
    caption_column: CaptionColumn = "caption",
    as_json: Json = False,
) -> None:
    """Measure the quality of faces against real ones, or how closely they follow prompts.

    The metrics are saved with the model and appear in its card. `accelerate launch` uses several GPUs.
    """
    from ..evaluation.measurements import MetricNetworks
    from ..evaluation.quality import METRICS_NAME, check_metrics_file, evaluate, read_metrics, table, write_metrics

    for name, value in {"likelihood_images": likelihood_images, "against": against, "inception": inception}.items():
        if prompts and value:
            raise ValueError(f"`{name}` cannot be combined with `prompts`.")
    if prompts and not baseline_split:
        raise ValueError("`baseline_split` must name the training split when it is combined with `prompts`.")
    others = None if against is None else read_metrics(against)["metrics"]
    if output is None and Path(source, "model_index.json").is_file():
        output = Path(source, METRICS_NAME)
    if output is not None:
        check_metrics_file(output)
    if prompts:
        from ..evaluation.adherence import evaluate_prompts
        from ..hub.card_values import prompts_table

        results = evaluate_prompts(
            *(source, data, split, baseline_split, caption_column, num_images),
            None if guidance_scale is None else [guidance_scale],
            *(preset, steps, seed, batch_size),
            sigma_min=sigma_min,
            guide=guide,
            autoguidance_scale=autoguidance_scale,
            epsilon_scaling=epsilon_scaling,
            dtype=dtype,
        )
        if _is_main_process():
            if output is not None:
                write_metrics(output, {"prompts": results})
            report(results, prompts_table(results) + _saved(output), as_json)
        return
    networks = MetricNetworks.with_inception() if inception else None
    results = evaluate(
        *(source, data, split, baseline_split or None, num_images, preset, steps, seed, batch_size, networks),
        num_likelihood_images=likelihood_images,
        sigma_min=sigma_min,
        guide=guide,
        guidance_scale=guidance_scale,
        autoguidance_scale=autoguidance_scale,
        epsilon_scaling=epsilon_scaling,
        dtype=dtype,
        against=others,
    )
    if not _is_main_process():
        return
    if output is not None:
        write_metrics(output, results)
    report(results, table(results["metrics"], others) + _saved(output), as_json)


def audit(
    source: Source,
    data: Annotated[str, typer.Argument(help="Training dataset.")],
    split: Annotated[
        str, typer.Option(help="Split that contains exactly the training images, such as 'train[:500]'.")
    ] = "train",
    held_out_split: Annotated[str, typer.Option(help="Held-out split to compare against.")] = "test",
    num_images: Annotated[int, typer.Option(help="Number of generated faces to check.")] = 400,
    preset: Preset = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps (default: those of the preset, or 20 of DPM-Solver++).")
    ] = None,
    sigma_min: SigmaMin = None,
    epsilon_scaling: EpsilonScaling = None,
    guide: Guide = None,
    guidance_scale: GuidanceScale = None,
    autoguidance_scale: AutoguidanceScale = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    features: Annotated[bool, typer.Option(help="Compare features of a network as well as pixels.")] = True,
    loss_images: Annotated[int, typer.Option(help="Number of images for the comparison of losses; 0 skips it.")] = 100,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Generate the faces for captions of training images.")
    ] = False,
    caption_column: CaptionColumn = "caption",
    output: Annotated[
        Path | None, typer.Option(help="Folder for audit.json and audit.png (default: the model's folder).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search generated faces for copies of training images.

    The verdict is saved with the model and appears in its card. The exit code is 3 if there are copies.
    """
    from ..evaluation.copies import audit_model
    from ..evaluation.quality import METRICS_NAME, check_metrics_file, write_metrics
    from ..files import check_writable, replacing

    is_folder = Path(source, "model_index.json").is_file()
    if output is None:
        if not is_folder:
            raise ValueError("`output` must be given because the source is not the folder of a model.")
        output = Path(source)
    check_writable(output)
    if is_folder:
        check_metrics_file(Path(source, METRICS_NAME))
    extractor = None
    if features:
        from ..evaluation.extractors import MobileNetV2

        extractor = MobileNetV2()
    audited, results, picture = audit_model(
        *(source, data, split, held_out_split, num_images, preset, steps, seed, batch_size, extractor, loss_images),
        sigma_min=sigma_min,
        guide=guide,
        guidance_scale=guidance_scale,
        autoguidance_scale=autoguidance_scale,
        epsilon_scaling=epsilon_scaling,
        dtype=dtype,
        caption_column=caption_column if prompts else None,
    )
    if not _is_main_process():
        return
    output.mkdir(parents=True, exist_ok=True)
    name = "audit_prompts" if prompts else "audit"
    with replacing(output / f"{name}.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    with replacing(output / f"{name}.png") as path:
        picture.save(path, "PNG")
    if is_folder:
        keys = (
            "preset",
            "sampler",
            "steps",
            "seeds",
            "sigma_min",
            "epsilon_scaling",
            "guidance_scale",
            "autoguidance_scale",
            "guidance_interval",
            "guide",
            "dtype",
        )
        provenance = {key: results[key] for key in keys if key in results}
        entry = "memorisation_with_prompts" if prompts else "memorisation"
        write_metrics(Path(source, METRICS_NAME), {entry: {"verdict": results["verdict"], **provenance}})
    text = f"{results['verdict']}\nThe closest pairs, which show training images: {output / name}.png"
    report(results, text, as_json)
    if audited.found_copies:
        raise typer.Exit(3)


def _saved(output: Path | None) -> str:
    return "" if output is None else f"\n\nThe metrics and how they were measured are in {output}"


def _is_main_process() -> bool:
    """Whether this process writes and reports; `accelerate launch` sets the rank."""
    return os.environ.get("RANK", "0") == "0"
