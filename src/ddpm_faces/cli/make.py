"""Commands that make something: faces, a dataset, a guided pipeline, a converted checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    AutoguidanceScale,
    BatchSize,
    Dtype,
    EpsilonScaling,
    GuidanceInterval,
    GuidanceScale,
    Guide,
    Json,
    Model,
    Preset,
    Private,
    Seed,
    SigmaMin,
    report,
)


def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="What the faces should show, for a model with captions."),
    ] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Number of images.")] = 16,
    seed: Seed = 0,
    preset: Preset = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps (default: those of the preset, or 20 of DPM-Solver++).")
    ] = None,
    sigma_min: SigmaMin = None,
    epsilon_scaling: EpsilonScaling = None,
    guide: Guide = None,
    guidance_scale: GuidanceScale = None,
    autoguidance_scale: AutoguidanceScale = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the faces should not show.")] = None,
    class_label: Annotated[
        list[int] | None,
        typer.Option(help="Class to generate; repeat the option for several classes (default: all classes, in turn)."),
    ] = None,
    batch_size: BatchSize = 64,
    dtype: Dtype = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PNG file for a grid, or folder for single images.")
    ] = Path("faces.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing images.")] = False,
    format: Annotated[
        str | None,
        typer.Option(help="Write shards of this format: png, webdataset or parquet. The same command resumes."),
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Images in a shard.")] = 1000,
    as_json: Json = False,
) -> None:
    """Generate faces.

    Several prompts are used in turn. An output that ends in .png is a grid of all images. Any other output is a
    folder, in which each image is named after its seed. The PNG metadata records the model, the seed and the settings.
    With --format, the folder holds shards for many images, `accelerate launch` uses several GPUs, and an interrupted
    run resumes.
    """
    from ..generation import Recipe, check_output, generate_to
    from ..models import load_pipeline, model_name

    solver = (preset, steps, sigma_min, epsilon_scaling, guidance_scale, autoguidance_scale)
    recipe = Recipe(num_images, seed, *solver, class_label or None, dtype, prompts or None, negative_prompt)
    noun = "image" if num_images == 1 else "images"
    if format is not None:
        from accelerate import Accelerator

        from ..bulk import check_format, generate_shards

        if overwrite:
            raise ValueError("`overwrite` cannot be combined with `format`: choose a new folder.")
        check_format(output, format)
        accelerator = Accelerator()
        pipeline = load_pipeline(model, guide, autoguidance_scale, accelerator.device)
        files = generate_shards(pipeline, recipe, output, model_name(model), format, shard_size, batch_size)
        if accelerator.is_main_process:
            report({"files": files}, f"{num_images} {noun} in {len(files)} shards: {output}", as_json)
        return
    check_output(output, overwrite)
    pipeline = load_pipeline(model, guide, autoguidance_scale)
    files = generate_to(pipeline, recipe, output, model_name(model), batch_size, overwrite)
    report({"files": files}, f"{num_images} {noun}: {output}", as_json)


def restore(
    model: Model,
    photo: Annotated[Path, typer.Argument(help="Photo with one or more faces. It is not changed.")],
    inpaint: Annotated[
        Path | None, typer.Option(metavar="MASK", help="Repaint where this image of the same size is white.")
    ] = None,
    upscale: Annotated[int | None, typer.Option(metavar="FACTOR", help="Enlarge the photo, 2 to 8 times.")] = None,
    colorize: Annotated[bool, typer.Option("--colorize", help="Color a photo in shades of gray.")] = False,
    deblur: Annotated[
        float | None,
        typer.Option(metavar="SIGMA", help="Remove a Gaussian blur of this standard deviation, in pixels."),
    ] = None,
    noise_level: Annotated[
        float, typer.Option(help="Standard deviation of the photo's noise, for pixels in [-1, 1].")
    ] = 0.0,
    aligned: Annotated[
        bool, typer.Option("--aligned", help="The photo is a single face, cropped as the model expects it.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="What the faces should show, for a model with captions.")] = None,
    class_label: Annotated[int | None, typer.Option(help="Class of the faces, for a model with classes.")] = None,
    guidance_scale: GuidanceScale = None,
    steps: Annotated[int | None, typer.Option(help="Evaluations of the network (default: 50).")] = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the result (default: PHOTO-restored.png).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    as_json: Json = False,
) -> None:
    """Restore the faces in a photo: repaint parts, enlarge, color, or remove blur.

    Give one of --inpaint, --upscale, --colorize and --deblur. Faces are found, restored at the size of the model and
    blended into the photo; the rest of the photo stays. What is lost has many possible answers, one for each --seed:
    the result is a guess, not what was there.
    """
    from ..data.photos import Damage, open_photo, restore_photo, save_photo
    from ..models import check_model, load_pipeline
    from ..restoration_ddpm_faces import DDPMFacesRestorePipeline

    check_model(model)
    mask = None if inpaint is None else open_photo(inpaint, "inpaint")
    damage = Damage(mask, upscale, colorize, deblur, noise_level)
    output = output or photo.with_name(f"{photo.stem}-restored.png")
    image = open_photo(photo, "photo")
    save = save_photo(output, [photo, *([inpaint] if inpaint else [])], overwrite)
    pipeline = DDPMFacesRestorePipeline.from_pipe(load_pipeline(model))
    result = restore_photo(pipeline, image, damage, aligned, seed, steps, prompt, guidance_scale, class_label)
    save(result.image)
    side = pipeline.image_shape[1]
    lines = [
        f"{output}: {_faces_of(result.sides)}, restored at the size of the model, {side}x{side}.",
        *(f"Not restored: {reason}." for reason in result.skipped),
    ]
    values = {"file": str(output), "sides": result.sides, "model_size": side, "skipped": result.skipped}
    report(values, "\n".join(lines), as_json)


def edit(
    model: Model,
    photo: Annotated[Path, typer.Argument(help="Photo with one or more faces. It is not changed.")],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="What the faces should show, for a model with captions."),
    ] = None,
    source_prompt: Annotated[
        str | None, typer.Option(help="What they show now. Only what differs between the prompts changes.")
    ] = None,
    class_label: Annotated[int | None, typer.Option(help="Class that the faces should show.")] = None,
    source_class_label: Annotated[int | None, typer.Option(help="Class that they show now.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much may change, above 0 and up to 1 (default: 0.9, or 0.5 for noise).")
    ] = None,
    guidance_scale: GuidanceScale = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="inversion keeps what the prompts do not change; noise draws it anew (default: inversion with a "
            "prompt or a class, noise without)."
        ),
    ] = None,
    face: Annotated[
        list[int] | None,
        typer.Option(help="Which face to edit, from the left; repeat the option for several (default: all)."),
    ] = None,
    aligned: Annotated[
        bool, typer.Option("--aligned", help="The photo is a single face, cropped as the model expects it.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps (default: 50). Inversion evaluates the network more often.")
    ] = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the result (default: PHOTO-edited.png).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    as_json: Json = False,
) -> None:
    """Edit the faces in a photo: change what a prompt names, or draw new details.

    Faces are found, edited at the size of the model and blended into the photo; the rest of the photo stays.
    """
    from ..data.photos import edit_photo, open_photo, save_photo
    from ..editing_ddpm_faces import DDPMFacesEditPipeline
    from ..models import check_model, load_pipeline

    check_model(model)
    output = output or photo.with_name(f"{photo.stem}-edited.png")
    image = open_photo(photo, "photo")
    save = save_photo(output, [photo], overwrite)
    pipeline = DDPMFacesEditPipeline.from_pipe(load_pipeline(model))
    is_directed = prompt is not None or class_label is not None
    result = edit_photo(
        pipeline,
        image,
        prompt,
        source_prompt,
        strength,
        method or ("inversion" if is_directed else "noise"),
        face,
        aligned,
        seed,
        steps,
        guidance_scale,
        class_label,
        source_class_label,
    )
    save(result.image)
    side = pipeline.image_shape[1]
    text = f"{output}: {_faces_of(result.sides)}, edited at the size of the model, {side}x{side}."
    report({"file": str(output), "sides": result.sides, "model_size": side}, text, as_json)


def _faces_of(sides: list[float]) -> str:
    count = "1 face" if len(sides) == 1 else f"{len(sides)} faces"
    return f"{count} of {', '.join(f'{side:.0f}' for side in sides)} pixels"


def prepare(
    source: Annotated[str, typer.Argument(help="Folder of images, or a dataset in a folder or on the Hub.")],
    output: Annotated[Path | None, typer.Option(help="New folder for the dataset.")] = None,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Publish the dataset on the Hub.")] = None,
    resolution: Annotated[int, typer.Option(help="Height and width of the images in pixels.")] = 128,
    channels: Annotated[int, typer.Option(help="Channels: 1 (grey), 3 (RGB) or 4 (RGBA).")] = 3,
    split: Annotated[str, typer.Option(help="Split of the source.")] = "train",
    image_column: Annotated[
        str | None, typer.Option(help="Column with the images (default: the first one that contains images).")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column with the classes; 'folder' for the names of subfolders.")
    ] = None,
    num_test_images: Annotated[int, typer.Option(help="Number of images to hold out as the split `test`.")] = 0,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Skip images that cannot be read, and list them.")
    ] = False,
    align: Annotated[
        bool, typer.Option("--align", help="Find the faces in photos, cut them out and turn them upright, as in FFHQ.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="License of the images, such as cc-by-nc-sa-4.0.")] = None,
    private: Private = None,
    as_json: Json = False,
) -> None:
    """Make a dataset from your images: crop, resize, remove metadata.

    It is written to a folder or published on the Hub. With --align, the images are photos with any number of faces;
    what was skipped is listed, with the reason.
    """
    from ..data.folders import shorten
    from ..data.preparation import prepare

    result = prepare(
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
        align=align,
    )
    values: dict[str, Any] = {"dataset": result.where, "images": result.num_images}
    text = f"The dataset is at {result.where}"
    if result.aligner is not None:
        found = result.aligner
        values |= {"photos": found.num_photos, "skipped": found.skipped}
        text += f"\n{found.num_faces:,} faces in {found.num_photos:,} photos"
        if found.skipped:
            text += f". Skipped:\n{shorten(found.skipped)}"
    report(values, text, as_json)


def guide(
    folder: Annotated[Path, typer.Argument(help="Folder of a model.")],
    weaker: Annotated[
        str | None,
        typer.Argument(
            metavar="[GUIDE]", help="Weaker model, a folder or USER/NAME; without it, the model keeps its guide."
        ),
    ] = None,
    autoguidance_scale: Annotated[
        float | None,
        typer.Option(help="Scale of autoguidance, usually 1.2 to 1.5; 1 is off (required with a guide)."),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance, for models with classes; 1 is off.")
    ] = None,
    guidance_interval: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Lowest and highest timestep with guidance (default: unchanged, or all with a new guide).",
        ),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the model's guide.")] = False,
    as_json: Json = False,
) -> None:
    """Set how a model is guided: add a weaker model as its guide (autoguidance), remove it, or change the scales.

    Guide and scales are saved and published with the model. Evaluate the model again afterwards.
    """
    from ..guidance import save_guidance, save_guide
    from ..models import check_model

    check_model(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` {str(folder)!r} must be an existing folder.")
    has_guide = (folder / "guide").is_dir()
    values = {
        "guidance_scale": guidance_scale,
        "autoguidance_scale": autoguidance_scale,
        "guidance_interval": guidance_interval and list(guidance_interval),
    }
    given = {name: value for name, value in values.items() if value is not None}
    if remove:
        if weaker is not None or given:
            raise ValueError(
                "`remove` takes neither a guide nor a scale or an interval; a new guide replaces the old one."
            )
        if not has_guide:
            raise ValueError(f"`remove`: {folder} has no guide.")
        save_guide(folder, None)
        done = f"The guide of {folder} is removed."
    elif weaker is not None:
        check_model(weaker)
        if autoguidance_scale is None:
            raise ValueError("`autoguidance_scale` must be given with a guide; 1.2 is a good start.")
        if guidance_scale is not None:
            raise ValueError("`guidance_scale` cannot be combined with a guide: set it in a second command.")
        save_guide(folder, weaker, autoguidance_scale, guidance_interval)
        done = f"{folder} is now guided by {weaker}."
    else:
        if not given:
            raise ValueError("Give a guide, `autoguidance_scale`, `guidance_scale` or `--remove`.")
        save_guidance(folder, guidance_scale, autoguidance_scale, guidance_interval)
        settings = ", ".join(f"{name} {value}" for name, value in given.items())
        done = f"{folder} is now guided with {settings}."
    text = f"{done} Evaluate it again, and tune its presets: both were made before this change."
    report({"model": str(folder), "guide": weaker, **values}, text, as_json)


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="File written by torch.save(model.state_dict(), ...).")],
    output: Annotated[Path, typer.Argument(help="New folder for the model.")],
    sample_size: Annotated[int, typer.Option(help="Height and width of the training images in pixels.")] = 64,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint of the article's code into a model."""
    from ..files import new_folder
    from ..hub.convert import convert_checkpoint

    pipeline = convert_checkpoint(checkpoint, sample_size)
    with new_folder(output) as folder:
        pipeline.save_pretrained(folder)
    report({"model": str(output)}, f"The model is in {output}. It has the same outputs as the checkpoint.", as_json)


def tune(
    model: Annotated[Path, typer.Argument(help="Folder of a model.")],
    data: Annotated[str, typer.Argument(help="Real faces: a dataset on the Hub or in a folder.")],
    split: Annotated[str, typer.Option(help="Held-out split to measure against.")] = "test",
    choice_split: Annotated[str, typer.Option(help="Split for the choice of the epsilon scaling.")] = "train",
    steps: Annotated[
        list[int] | None,
        typer.Option(help="Number of steps to tune; repeat the option for several (default: 4, 6, 8 and 10)."),
    ] = None,
    fast: Annotated[int, typer.Option(help="Steps of the preset fast, which becomes the default.")] = 8,
    draft: Annotated[int, typer.Option(help="Steps of the preset draft.")] = 6,
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", help="Number of generated and of real images to compare.")
    ] = 400,
    num_trajectories: Annotated[int, typer.Option(help="Number of images to fit the solvers to.")] = 128,
    guidance_scale: GuidanceScale = None,
    autoguidance_scale: AutoguidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Tune few-step solvers to a model, and make presets of them.

    The timesteps and weights of DPM-Solver++ are fitted to the model's own trajectories, for each number of steps. The
    presets fast and draft are saved with the model, and the measurements appear in its card.
    """
    from ..evaluation.tuning import save_tuning
    from ..evaluation.tuning import tune as tune_model
    from ..hub.card_values import tuning_table
    from ..models import check_model, load_pipeline

    check_model(model)
    if not model.is_dir():
        raise ValueError(f"`model` {str(model)!r} must be an existing folder.")
    tuning = tune_model(
        load_pipeline(model).optimize(),
        data,
        split=split,
        choice_split=choice_split,
        num_steps=steps or (4, 6, 8, 10),
        fast=fast,
        draft=draft,
        num_images=num_images,
        num_trajectories=num_trajectories,
        guidance_scale=guidance_scale,
        autoguidance_scale=autoguidance_scale,
        guidance_interval=guidance_interval,
        seed=seed,
        batch_size=batch_size,
    )
    save_tuning(model, load_pipeline(model, device="cpu"), tuning)
    text = f"{tuning_table(tuning.report)}\n\nThe presets fast ({fast} steps) and draft ({draft} steps) are in {model}"
    report({"presets": tuning.presets, **tuning.report}, text, as_json)
