"""The files of a published model: export them, check that they load elsewhere, and publish them."""

import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo

from ..files import read_json_object
from ..pipeline_ddpm_faces import MODEL_COMPONENTS, SETTINGS, DDPMFacesPipeline
from .card import check_license, merge_cards, model_card
from .card_images import check_drawing, copy_pixels, draw_grid, draw_strip
from .card_values import template_values
from .transport import publish


# Other files of a folder (checkpoints, logs, caches) are not published. Files of the repository that match these
# patterns but are not in the export are deleted.
MODEL_FILES = (
    "README.md",
    "model_index.json",
    "pipeline_ddpm_faces.py",
    "restoration_ddpm_faces.py",
    "editing_ddpm_faces.py",
    "operators_ddpm_faces.py",
    "unet/config.json",
    "unet/*.safetensors",
    "unet/*.safetensors.index*.json",
    "unet/unet_ddpm_faces.py",
    "guide/config.json",
    "guide/*.safetensors",
    "guide/*.safetensors.index*.json",
    "guide/unet_ddpm_faces.py",
    "student/config.json",
    "student/*.safetensors",
    "student/*.safetensors.index*.json",
    "student/unet_ddpm_faces.py",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    "tokenizer/*.model",
    "text_encoder/config.json",
    "text_encoder/*.safetensors",
    "text_encoder/*.safetensors.index*.json",
    "scheduler/scheduler_config.json",
    "scheduler/scheduling_ddpm_faces.py",
    "training_config.yaml",
    "training_summary.json",
    "metrics.json",
    "tuning.json",
    "samples.png",
    "denoising_strip.png",
    "loss_curve.png",
)
VARIANTS = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Runs in a separate process and imports only diffusers, like a user without this package.
_CHECK = """
import sys
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
steps = min(2, pipeline.scheduler.config.num_train_timesteps)
labels = None if not pipeline.unet.config.get("num_class_embeds") else [0]
images = pipeline(1, steps, torch.Generator().manual_seed(0), output_type="pt", class_labels=labels).images
if not images.isfinite().all():
    sys.exit("the image is not finite")
"""


def push(
    source: DDPMFacesPipeline | str | os.PathLike,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    variants: Sequence[str] = ("bf16", "fp16"),
    license: str | None = None,
    dataset_license: str | None = None,
) -> CommitInfo:
    """Export a pipeline, check it, and publish it on the Hub in one commit.

    Args:
        source ([`DDPMFacesPipeline`], `str` or `os.PathLike`):
            A pipeline, or a folder written by training or `save_pretrained`. If it is the output folder of a training
            run, the card also shows its sample images, loss curve, settings and metrics.
        repo_id (`str`): "user/name" on the Hub. A repository that does not exist is created.
        commit_message (`str`, *optional*): Defaults to "Publish NAME with ddpm-faces".
        private (`bool`, *optional*):
            Visibility of a new repository; defaults to the setting of your account. An existing repository keeps its
            visibility, and `private=True` is refused if it is public.
        token (`str`, *optional*): Defaults to the token of `hf auth login` or HF_TOKEN.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
        revision (`str`, *optional*): An existing branch; defaults to the main branch.
        variants (`list[str]`, defaults to `("bf16", "fp16")`): Half-precision weights to add to the float32 weights.
        license (`str`, *optional*): License of the model, a Hub identifier such as "cc-by-nc-sa-4.0".
        dataset_license (`str`, *optional*): License of the training images.

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit; as a `str`, its URL.

    Raises:
        ValueError: The pipeline cannot be published. Nothing was sent.
        HubError: The Hub could not be reached, or it refused. Nothing was published unless the message says otherwise.
    """
    check_license("license", license)
    _check_variants(variants)

    def write(folder: Path, old_card: str | None) -> None:
        export(source, folder, repo_id, variants, license, dataset_license, old_card)
        check(folder)

    message = (commit_message or "").strip() or f"Publish {repo_id.split('/')[-1]} with ddpm-faces"
    return publish(write, repo_id, "model", MODEL_FILES, message, private, token, create_pr, revision)


def export(
    source: DDPMFacesPipeline | str | os.PathLike,
    folder: str | os.PathLike,
    repo_id: str,
    variants: Sequence[str] = ("bf16", "fp16"),
    license: str | None = None,
    dataset_license: str | None = None,
    old_card: str | None = None,
) -> None:
    """Write the files that [`push`] publishes to an empty folder.

    Args:
        source ([`DDPMFacesPipeline`], `str` or `os.PathLike`): See [`push`].
        folder (`str` or `os.PathLike`): The folder to write to.
        repo_id (`str`): See [`push`].
        variants (`list[str]`, defaults to `("bf16", "fp16")`): See [`push`].
        license (`str`, *optional*): See [`push`].
        dataset_license (`str`, *optional*): See [`push`].
        old_card (`str`, *optional*): The current card of the repository; see [`merge_cards`].

    Raises:
        ValueError: The weights are not finite, a variant is unknown, or the folder contains no pipeline.
    """
    _check_variants(variants)
    folder, home = Path(folder), None
    if isinstance(source, DiffusionPipeline) and {"unet", "scheduler"} <= source.components.keys():
        pipeline = source
    elif not isinstance(source, str | os.PathLike):
        raise ValueError(f"`source` must be a DDPMFacesPipeline or the folder of one, got {type(source).__name__}.")
    else:
        home = Path(source)
        if not (home / "model_index.json").is_file():
            raise ValueError(f"{str(source)!r} must be the folder of a pipeline: it has no model_index.json.")
        pipeline = DDPMFacesPipeline.from_pretrained(home)
        if torch.accelerator.is_available():
            pipeline.to(torch.accelerator.current_accelerator())

    # 1. Weights, configurations and code
    networks, states = {}, {}
    for name in (*MODEL_COMPONENTS, "text_encoder"):
        network = pipeline.components.get(name)
        if network is None:
            continue
        network = getattr(network, "_orig_mod", network)  # the network inside a torch.compile wrapper
        states[name] = network.state_dict()
        bad = [k for k, v in states[name].items() if v.is_floating_point() and not v.isfinite().all()]
        if bad:
            raise ValueError(
                f"The pipeline cannot be published: weights are not finite: {', '.join(bad[:5])} ({len(bad)} in all)."
            )
        if name == "text_encoder":
            networks[name] = copy.deepcopy(network).cpu()
            networks[name].config._name_or_path = ""  # a folder of this machine
        else:
            networks[name] = type(network).from_config(_portable(network.config))
    scheduler = type(pipeline.scheduler).from_config(_portable(pipeline.scheduler.config))
    settings = {name: pipeline.config[name] for name in SETTINGS if name in pipeline.config}
    tokenizer = copy.deepcopy(pipeline.components.get("tokenizer"))
    if tokenizer is not None:
        tokenizer.name_or_path = ""
        tokenizer.init_kwargs.pop("name_or_path", None)
    full = DDPMFacesPipeline(**networks, scheduler=scheduler, tokenizer=tokenizer, **settings)
    check_drawing(full)
    for variant in (None, *variants):
        dtype = torch.float32 if variant is None else VARIANTS[variant]
        for name, network in networks.items():
            cast = {k: v.to("cpu", dtype) if v.is_floating_point() else v.cpu() for k, v in states[name].items()}
            lost = [k for k, v in cast.items() if v.is_floating_point() and not v.isfinite().all()]
            if lost:
                raise ValueError(f"`variants`: {variant} overflows in {', '.join(lost[:5])}; leave it out.")
            torch.nn.Module.to(network, dtype).load_state_dict(cast)
        full.save_pretrained(folder, variant=variant)
    for name, network in networks.items():  # for the images
        torch.nn.Module.to(network, pipeline.device, torch.float32).load_state_dict(states[name])

    # 2. Files of the training
    config, metrics, summary, tuning = {}, {}, {}, {}
    if home is not None:
        names = ("metrics.json", "training_summary.json", "tuning.json")
        metrics, summary, tuning = (_json_of(home / name, folder / name) for name in names)
        config = _portable_config(home / "training_config.yaml", folder / "training_config.yaml", summary)
        scales = {name: summary.get(name, 1.0) for name in ("guidance_scale", "autoguidance_scale")}
        drawn_as_it_is = all(full.config[name] == scale for name, scale in scales.items())
        for name in ("samples.png", "loss_curve.png") if drawn_as_it_is else ("loss_curve.png",):
            if (home / name).is_file():
                copy_pixels(home / name, folder / name)

    # 3. Images
    try:
        if (folder / "samples.png").exists():
            seed, steps = config.get("seed", 0), f"all {scheduler.config.num_train_timesteps} steps"
            prompts = config.get("sample_prompts") or []
        else:
            prompts = []
            seed, steps = 0, draw_grid(full, folder / "samples.png", config.get("sample_sigma_min"))
        timesteps = draw_strip(full, folder / "denoising_strip.png")
    except (
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # the scheduler does not support this number of steps
        name, count = type(scheduler).__name__, scheduler.config.num_train_timesteps
        raise ValueError(f"Images cannot be generated with {name} in {count} steps: {error}.") from error

    # 4. Card
    try:
        values = template_values(repo_id, full, config, metrics, summary, dataset_license, tuning)
    except (AttributeError, KeyError, TypeError) as error:
        files = "metrics.json, tuning.json, training_summary.json or training_config.yaml"
        raise ValueError(f"{files} in {str(source)!r} lacks a value for the model card: {error!r}.") from error
    shown = f" Their prompts, in turn: {'; '.join(prompts)}." if prompts else ""
    values["grid"] = {
        "path": "samples.png",
        "alt": "Faces generated by this model",
        "caption": f"Unselected samples: seeds {seed}, {seed + 1}, {seed + 2} and so on, in {steps}.{shown}",
    }
    values["strip"] = {
        "path": "denoising_strip.png",
        "alt": "Faces emerging from noise",
        "caption": f"Denoising from noise to face, after the timesteps {', '.join(map(str, timesteps))}.",
    }
    values |= {"variants": list(variants), "loss_curve": (folder / "loss_curve.png").exists()}
    dataset = config.get("dataset_name") or ""  # a local dataset has lost its folder
    datasets = [dataset] if dataset.count("/") == 1 else None
    pretrained = config.get("pretrained_model_name_or_path") or ""
    base_model = pretrained if pretrained.count("/") == 1 else None
    card = str(model_card(repo_id, values, metrics.get("metrics"), license, datasets, base_model))
    (folder / "README.md").write_text(card if old_card is None else merge_cards(old_card, card), "utf-8")


def check(folder: str | os.PathLike) -> None:
    """Load an exported folder in a new process, using only diffusers, and generate an image.

    Raises:
        ValueError: The pipeline does not load, or its image is not finite.
    """
    with tempfile.TemporaryDirectory(prefix="ddpm-faces-") as modules:
        environment = {**os.environ, "HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", _CHECK, str(folder)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"The pipeline cannot be published, because it does not load in a new process: {reason}")


def _check_variants(variants: Sequence[str]) -> None:
    if isinstance(variants, str):
        raise ValueError(f"`variants` must be a list of names, got {variants!r}.")
    unknown = [str(name) for name in variants if name not in VARIANTS]
    if unknown:
        raise ValueError(f"`variants` must be among {', '.join(VARIANTS)}, got {', '.join(unknown)}.")


def _json_of(source: Path, destination: Path) -> dict[str, Any]:
    if not source.is_file():
        return {}
    shutil.copyfile(source, destination)
    return read_json_object(source)


def _portable_config(source: Path, destination: Path, summary: dict) -> dict[str, Any]:
    """Copy the training configuration without the paths of this machine."""
    if not source.is_file():
        return {}
    import yaml

    try:
        config = yaml.safe_load(source.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{source} must contain a training configuration, got {type(config).__name__}.")
    for name in ("output_dir", "cache_dir"):
        config.pop(name, None)
    is_local = {
        "dataset_name": summary.get("is_local_data", False),
        "train_data_dir": True,
        "pretrained_model_name_or_path": summary.get("is_local_pretrained", False),
    }
    for name in is_local:
        value = config.get(name)
        is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(value)) and not Path(str(value)).exists()
        if value is not None and (is_local[name] or not is_name):
            config[name] = re.split(r"[/\\]", str(value).rstrip("/\\"))[-1]
    destination.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    return config


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without two entries of diffusers.

    `_name_or_path` is a path of this machine. `_use_default_values` also lists arguments that were given by position,
    which `from_config` would drop.
    """
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "_use_default_values")}
