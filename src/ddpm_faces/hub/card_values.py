"""The values for the template of the model card."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..pipeline_ddpm_faces import DDPMFacesPipeline, Guidance


_MAX_WORDS = 200  # to list
_NOT_AUDITED = "Not measured. Assume that the model can reproduce training images."


def template_values(
    repo_id: str,
    pipeline: DDPMFacesPipeline,
    config: dict,
    metrics: dict,
    summary: dict,
    dataset_license: str | None,
    tuning: dict | None = None,
) -> dict[str, Any]:
    """Return all values for `model_card.md`, except for the images, the weight variants and the loss curve.

    Args:
        repo_id (`str`): "user/name".
        pipeline ([`DDPMFacesPipeline`]): The published pipeline.
        config (`dict`): Content of `training_config.yaml`, empty if there is none.
        metrics (`dict`): Content of `metrics.json`, empty if there is none.
        summary (`dict`): Content of `training_summary.json`, empty if there is none.
        dataset_license (`str`, *optional*): License of the training images.
        tuning (`dict`, *optional*): Content of `tuning.json`, empty if there is none.
    """
    unet, scheduler = pipeline.unet.config, pipeline.scheduler.config
    size = unet.sample_size if isinstance(unet.sample_size, int) else tuple(unet.sample_size)
    height, width = (size, size) if isinstance(size, int) else size
    classes = unet.get("num_class_embeds")
    kind = {"ema": ", EMA weights", "raw": ", last weights"}.get(pipeline.config.get("weights"), "")
    source = config.get("dataset_name") or config.get("train_data_dir")
    is_drawn = bool(config) and source is None
    guide_images_seen = _thousands(summary.get("guide_images_seen"))
    guide = f"this network after {guide_images_seen} images" if guide_images_seen else _network(pipeline.guide)
    guidance = Guidance(**{name: pipeline.config[name] for name in Guidance._fields})
    training = {
        "training images": ": ".join(filter(None, (source, summary.get("data")))),
        "base model": config.get("pretrained_model_name_or_path"),
        "license of the training images": dataset_license or ("not stated" if config and not is_drawn else None),
        "images seen": _thousands(summary.get("images_seen")),
        "training time": summary and f"{duration(summary['hours'])} on {summary['processes']} x {summary['device']}",
        "precision": summary.get("precision"),
        "batch size": config.get("train_batch_size"),
        "learning rate": config.get("learning_rate"),
        "held-out loss": summary.get("held_out_loss") and f"{summary['held_out_loss']:.4g}",
        "network": f"{_network(pipeline.unet)}{kind}",
        "text encoder": _network(pipeline.text_encoder),
        "guide": pipeline.guide and guide,
        "guidance": guidance_in_words(guidance, pipeline.guide is not None),
        "noise schedule": f"{scheduler.beta_schedule}, T = {scheduler.num_train_timesteps}",
        "prediction type": scheduler.prediction_type,
        "versions": summary.get("versions"),
    }
    entries = metrics.get("metrics", [])
    if pipeline.guide is not None:  # show for each metric whether it was measured with the guide
        entries = [{**entry, "autoguidance_scale": entry.get("autoguidance_scale", 1)} for entry in entries]
    prompts = config.get("sample_prompts") or []
    is_prompted = pipeline.text_encoder is not None
    example = json.dumps(prompts[0] if prompts else "a face", ensure_ascii=False)
    betas = "" if scheduler.beta_schedule != "sigmoid" else ", trained_betas=pipeline.scheduler.betas.tolist()"
    return {
        "title": repo_id.split("/")[-1],
        "summary": (
            f"A denoising diffusion model (DDPM) that generates faces of {height}x{width} pixels"
            + (f", of {classes} classes" if classes else "")
            + (", from prompts" if is_prompted else "")
            + f", trained with ddpm-faces. {'' if entries else 'Its quality was not measured.'}".rstrip()
        ),
        "call": f"{example}, " if is_prompted else "class_labels=[0], " if classes else "",
        "is_prompted": is_prompted,
        "words": _words(pipeline),
        "solver_arguments": betas,
        "num_timesteps": scheduler.num_train_timesteps,
        "presets": _presets(pipeline),
        "default_preset": pipeline.config.default_preset,
        "training": [(name, _cell(value)) for name, value in training.items() if value not in (None, {}, "")],
        "has_config": bool(config),
        **_metric_table(entries),
        # Presets that are gone, after more training, leave their measurements behind.
        "tuning": tuning
        and pipeline.config.presets
        and {"table": tuning_table(tuning), "conditions": _tuning_conditions(tuning)},
        "adherence": metrics.get("prompts") and _adherence(metrics["prompts"]),
        "memorisation": metrics.get("memorisation", {}).get("verdict", _NOT_AUDITED),
        "memorisation_with_prompts": metrics.get("memorisation_with_prompts", {}).get("verdict"),
    }


def _presets(pipeline: DDPMFacesPipeline) -> list[dict[str, Any]]:
    """Return the rows of the table of presets, or none if there is only `"exact"`."""
    if not pipeline.config.presets or not pipeline.takes_presets:
        return []
    rows = []
    for name in pipeline.presets:
        scheduler, steps, guidance, network = pipeline.resolve_preset(name)
        is_tuned = scheduler.config.algorithm != "ddpm" and str(steps) in (scheduler.config.tuned_steps or {})
        details = [scheduler.config.algorithm, *(["tuned to this model"] if is_tuned and network == "unet" else [])]
        if network == "student":
            details.append("a distilled network")
        elif guided := guidance_in_words(guidance, pipeline.guide is not None):
            details.append(guided)
        rows.append({"name": name, "steps": steps, "details": ", ".join(details)})
    return rows


def guidance_in_words(guidance: Guidance, has_guide: bool) -> str | None:
    """Describe how a model is guided, or return `None` if it is not."""
    scale, autoguidance_scale, interval = guidance
    scales = [f"guidance scale {scale:g}"] if scale != 1 else []
    scales += [f"autoguidance scale {autoguidance_scale:g}"] if has_guide else []
    where = f" at timesteps {interval[0]} to {interval[1]}" if interval else ""
    return f"{', '.join(scales)}{where}" if scales else None


def _words(pipeline: DDPMFacesPipeline) -> str | None:
    """Return the words that the tokenizer knows, if they are few."""
    tokenizer = pipeline.tokenizer
    if tokenizer is None or len(tokenizer) > _MAX_WORDS:
        return None
    words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    return ", ".join(word for word in words if word.isalpha())


def _network(network: torch.nn.Module | None) -> str | None:
    if network is None:
        return None
    return f"{type(network).__name__}, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters"


def _metric_table(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows of the table of metrics, and in words what all metrics have in common."""
    common: dict[str, Any] = {}
    if entries:
        shown = (k for k in entries[0] if k not in ("name", "type", "value", "error", "real_faces"))
        common = {k: entries[0][k] for k in shown if all(entry.get(k) == entries[0][k] for entry in entries)}
    return {"metrics": [_metric_row(entry, common) for entry in entries], "conditions": _in_words(common)}


def _metric_row(metric: dict[str, Any], common: dict[str, Any]) -> dict[str, str]:
    error = f" ± {metric['error']:.3g}" if metric.get("error") is not None else ""
    real = metric.get("real_faces")
    details = {k: v for k, v in metric.items() if k not in ("name", "type", "value", "error", "real_faces", *common)}
    return {
        "name": _cell(metric["name"]),
        "text": f"{metric['value']:.4g}{error}",
        "real_faces": "" if real is None else f"{real:.4g}",
        "details": _in_words(details),
    }


def _in_words(provenance: dict[str, Any]) -> str:
    names = {"n": "number of samples", "n_reference": "number of real images"}
    return _cell("; ".join(f"{names.get(k, k.replace('_', ' '))} {value}" for k, value in provenance.items()))


def _cell(value: Any) -> str:
    """Format text for a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def _thousands(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _tuning_conditions(report: dict[str, Any]) -> str:
    keys = (
        "n",
        "n_reference",
        "image_size",
        "extractor",
        "reference",
        "seeds",
        "guidance_scale",
        "autoguidance_scale",
        "guidance_interval",
    )
    return _in_words({key: report[key] for key in keys if key in report})


def _adherence(results: dict[str, Any]) -> dict[str, str]:
    shown = ("guidance_scales", "attributes", "quality", "unseen")
    return {
        "table": prompts_table(results),
        "conditions": _in_words({key: value for key, value in results.items() if key not in shown}),
    }


def tuning_table(report: dict[str, Any]) -> str:
    """Format the report of `ddpm-faces tune` as a Markdown table."""
    lines = [
        "| steps | Fréchet distance, tuned | even steps | recall, tuned | even steps | faces, tuned | even steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        tuned, even = row["tuned"], row["even"]
        cells = [
            f"{tuned['frechet_distance']:.1f}",
            f"{even['frechet_distance']:.1f}",
            f"{tuned['recall']:.2f}",
            f"{even['recall']:.2f}",
            f"{tuned['face_rate']:.2f}",
            f"{even['face_rate']:.2f}",
        ]
        lines.append(f"| {row['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def prompts_table(results: Mapping[str, Any]) -> str:
    """Format the results of `evaluate_prompts` as Markdown: adherence and quality at each scale, then pairs."""
    scales = [f"scale {scale:g}" for scale in results["guidance_scales"]]

    def line(*cells: str) -> str:
        return f"| {' | '.join(map(_cell, cells))} |"

    def shown(value: dict[str, float] | None) -> str:
        return "" if value is None else f"{value['value']:.3g} ± {value['error']:.2g}"

    head, rule = line("", "real faces", *scales), "|---" * (len(scales) + 2) + "|"
    lines = [head, rule]
    for attribute in results["attributes"]:
        name = f"{attribute['name']} ({', '.join(attribute['values'])})"
        lines.append(line(name, shown(attribute["real"]), *map(shown, attribute["generated"])))
    for metric in results["quality"]:
        name = f"{metric['name']}, {metric['extractor'].split(' (')[0]}"
        lines.append(line(name, "", *map(shown, metric["generated"])))
    if results["unseen"]:
        lines += ["", line("never together in training", "prompts", *scales), rule]
    for pair in results["unseen"]:
        name = f"{pair['name']}, such as “{pair['prompts'][0]}”"
        lines.append(line(name, str(pair["n"]), *map(shown, pair["generated"])))
    return "\n".join(lines)
