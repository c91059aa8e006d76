"""Describe a model or this installation in a few lines, without loading weights."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import __version__
from ..files import read_json_object
from ..models import best_device, check_model
from ..pipeline_ddpm_faces import DDPMFacesPipeline, Guidance
from .card_values import duration, guidance_in_words


PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "huggingface-hub", "safetensors", "gradio")
_TEXTS = ("README.md", "*.json", "*/*.json", "*.yaml")


def describe_model(model: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """Describe a model from its configuration and records; without loading or downloading its weights.

    Args:
        model (`str` or `os.PathLike`): A folder, or "user/name" on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of a repository; by default the main branch.

    Returns:
        `dict`: Plain values, ready for JSON. Unknown values are `None`.

    Raises:
        ValueError: There is no such model, or its records are damaged.
        HubError: The repository does not exist, or the Hub could not be reached.
    """
    check_model(model)
    try:
        return _describe(model, revision)
    except (AttributeError, LookupError, TypeError, yaml.YAMLError) as error:  # the records may be malformed
        raise ValueError(
            f"`model` {os.fspath(model)!r} has damaged records: {type(error).__name__}: {error}"
        ) from error


def _describe(model: str | os.PathLike, revision: str | None) -> dict[str, Any]:
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"`revision` is for a model on the Hub, and {os.fspath(model)!r} is a folder.")
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
    else:
        folder, sizes = _download_records(os.fspath(model), revision)
    index = DDPMFacesPipeline.load_config(folder)
    unet = read_json_object(folder / "unet" / "config.json")
    scheduler = read_json_object(folder / "scheduler" / "scheduler_config.json")
    summary = _read(folder / "training_summary.json")
    metrics = _read(folder / "metrics.json")
    size = unet["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    checkpoints = sorted({name.split("/")[0] for name in sizes if name.startswith("checkpoint-")})
    return {
        "model": os.fspath(model),
        "images": f"{width}x{height}, {unet['in_channels']} channels",
        "classes": unet.get("num_class_embeds"),
        "network": f"{unet.get('_class_name')}, {_count_parameters(index['unet'][1], unet):,} parameters",
        "weights": index.get("weights"),
        "text encoder": (index.get("text_encoder") or [None, None])[1],
        "guide": _guide(folder, index),
        "guidance": _guidance(index),
        "presets": _presets(index),
        "schedule": f"{scheduler['beta_schedule']}, T = {scheduler['num_train_timesteps']}",
        "prediction type": scheduler["prediction_type"],
        "trained on": summary.get("data"),
        "images seen": summary.get("images_seen"),
        "training time": _training_time(summary),
        "versions": summary.get("versions"),
        "metrics": [_metric(entry) for entry in metrics.get("metrics", [])] or None,
        "copies": metrics.get("memorisation", {}).get("verdict", "").partition(":")[0] or None,
        "license": _license(folder / "README.md"),
        "disk": _megabytes(sum(size for name, size in sizes.items() if name.split("/")[0] not in checkpoints)),
        "checkpoints": f"{len(checkpoints)}, {_checkpoint_disk(sizes)}" if checkpoints else None,
    }


def describe_installation() -> dict[str, Any]:
    """Describe versions, devices, threads and the cache of this installation.

    Returns:
        `dict`: Plain values, ready for JSON.
    """
    from huggingface_hub import constants, get_token

    return {
        "ddpm-faces": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{name: _version(name) for name in PACKAGES},
        "device": best_device(),
        "GPUs": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or None,
        "CPU": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "cache": f"{constants.HF_HUB_CACHE}, {_cache_state(Path(constants.HF_HUB_CACHE))}",
        "Hub": f"{constants.ENDPOINT}, {'logged in' if get_token() else 'not logged in'}"
        + (", offline" if constants.HF_HUB_OFFLINE else ""),
    }


def _download_records(repo_id: str, revision: str | None) -> tuple[Path, dict[str, int]]:
    """Download everything but weights and images; return the folder, and the size of each published file."""
    from huggingface_hub import HfApi, snapshot_download

    from ..errors import ANSWER_SECONDS, explaining, retry

    with explaining(repo_id, ""):
        info = retry(
            lambda: HfApi().repo_info(repo_id, revision=revision, files_metadata=True, timeout=ANSWER_SECONDS)
        )
        folder = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=list(_TEXTS)))
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{repo_id} holds no model of ddpm-faces: it has no model_index.json.")
    return folder, {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _count_parameters(class_name: str, config: dict[str, Any]) -> int:
    """The number of parameters of a network that is built without memory for them."""
    import diffusers

    from ..unet_ddpm_faces import DDPMFacesUNet

    cls = DDPMFacesUNet if class_name == "DDPMFacesUNet" else getattr(diffusers, class_name)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in cls.from_config(config).parameters())


def _training_time(summary: dict[str, Any]) -> str | None:
    return summary and f"{duration(summary['hours'])} on {summary['processes']} x {summary['device']}" or None


def _guide(folder: Path, index: dict[str, Any]) -> str | None:
    if not index.get("guide") or index["guide"][1] is None:
        return None
    count = _count_parameters(index["guide"][1], read_json_object(folder / "guide" / "config.json"))
    return f"{count:,} parameters"


def _guidance(index: dict[str, Any]) -> str | None:
    values: dict[str, Any] = {"guidance_scale": 1.0, "autoguidance_scale": 1.0, "guidance_interval": None}
    guidance = Guidance(**{name: index.get(name, value) for name, value in values.items()})
    return guidance_in_words(guidance, bool(index.get("guide")) and index["guide"][1] is not None)


def _presets(index: dict[str, Any]) -> str | None:
    default = index.get("default_preset")
    presets = sorted((index.get("presets") or {}).items(), key=lambda item: -item[1]["num_inference_steps"])
    return (
        ", ".join(
            f"{name} ({settings['num_inference_steps']} steps{', the default' if name == default else ''})"
            for name, settings in presets
        )
        or None
    )


def _metric(entry: dict[str, Any]) -> str:
    error = "" if entry.get("error") is None else f" ± {entry['error']:.2g}"
    details = [entry["extractor"].split(" (")[0]] if "extractor" in entry else []
    details += [f"{entry['n']} images"] if "n" in entry else []
    return f"{entry['name']}: {entry['value']:.4g}{error}" + (f" ({', '.join(details)})" if details else "")


def _license(card: Path) -> str | None:
    from huggingface_hub import ModelCard

    return ModelCard.load(card).data.get("license") if card.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _checkpoint_disk(sizes: dict[str, int]) -> str:
    return _megabytes(sum(size for name, size in sizes.items() if name.startswith("checkpoint-")))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache_state(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return "writable" if os.access(folder, os.W_OK) else "not writable"
