"""Model cards: fill the template `model_card.md`, and merge it with a card that people have edited."""

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData


_PACKAGE = "ddpm-faces"
_SECTION = re.compile(r"<!-- generated: (\w+)[^>]*-->\n(?:(?!<!-- generated: ).)*?<!-- end: \1 -->", re.DOTALL)
_ROW = re.compile(r"^\| (.+?) \| (.*) \|$", re.MULTILINE)
# Metadata keys that only publishing writes. All other keys may be a person's own.
GENERATED_KEYS = ("library_name", "pipeline_tag", "model-index", "configs", "size_categories", "task_categories")
TAGS = ["ddpm", "faces", "diffusers"]
TASK = "unconditional-image-generation"  # what metrics measure, without a prompt


def check_license(name: str, license: str | None) -> None:
    """Check that a license has the form of a Hub identifier.

    Args:
        name (`str`): Name of the argument, for the message.
        license (`str`, *optional*): An identifier of https://hf.co/docs/hub/repositories-licenses.

    Raises:
        ValueError: The license does not have this form.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", license):
        raise ValueError(
            f"`{name}` must be a license identifier of the Hub such as 'apache-2.0', 'cc-by-nc-sa-4.0' or 'other', "
            f"got {license!r}."
        )


def template_path() -> Path:
    """Return the path of `model_card.md`, in an installed package or at the top of the repository."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "model_card.md", package.parents[1] / "model_card.md") if path.is_file())


def source_url() -> str | None:
    """Return the `Repository` URL of pyproject.toml, where the source of this package is, or `None` without one."""
    try:
        entries = metadata(_PACKAGE).get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    urls = dict(entry.split(", ", 1) for entry in entries)
    return urls.get("Repository")


def model_card(
    repo_id: str,
    values: dict[str, Any],
    metrics: list[dict[str, Any]] | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """Fill the template `model_card.md`.

    Args:
        repo_id (`str`): "user/name".
        values (`dict`): Values for the template.
        metrics (`list[dict]`, *optional*): Entries of `metrics.json`, with `name`, `type`, `value` and provenance.
        license (`str`, *optional*): Hub identifier such as "cc-by-nc-sa-4.0".
        datasets (`list[str]`, *optional*): "user/name" of the training datasets on the Hub.
        base_model (`str`, *optional*): "user/name" of the model on the Hub that training started from.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card with its metadata.
    """
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=metric.get("reference_type", "image-folder"),
            dataset_name=str(metric.get("reference", "training images")),
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=metric["value"],
            metric_args={k: v for k, v in metric.items() if k not in ("name", "type", "value")},
        )
        for metric in metrics or []
    ]
    task = "text-to-image" if values.get("is_prompted") else TASK
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=task,
        tags=[*TAGS, task],
        datasets=datasets or None,
        base_model=base_model,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data, template_path=str(template_path()), repo_id=repo_id, source_url=source_url(), **values
    )


def merge_cards(old: str, new: str) -> str:
    """Merge a new card into an old one: generated parts come from the new card, everything else from the old one.

    - A generated section that somebody removed from the old card, with its marks, stays removed. If the old card has
      no generated section, a person or another program wrote it, and the new card is appended to it.
    - The license and the base model of the new card replace those of the old one; its tags and datasets are added.
    - A base model or dataset in the training table of the old card was generated. It is removed unless the new card
      names it. All others were written by a person and stay.

    Args:
        old (`str`): The current card.
        new (`str`): The new card, by [`model_card`].

    Returns:
        `str`: The merged card.

    Raises:
        ValueError: The metadata of the old card cannot be read.
    """
    import yaml

    old_sections, new_sections = (dict(_sections(card)) for card in (old, new))
    try:
        old_card, new_card = ModelCard(old, ignore_metadata_errors=True), ModelCard(new)
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The metadata of the current README.md cannot be read. Correct it: {reason}.") from error
    text = old_card.text
    if old_sections:
        text = _SECTION.sub(lambda match: new_sections.get(match[1], match[0]), text)
    else:
        text = f"{text.rstrip()}\n\n{new_card.text.lstrip()}" if text.strip() else new_card.text
    old_data, new_data = old_card.data.to_dict(), new_card.data.to_dict()
    training = dict(_ROW.findall(old_sections.get("training", "")))
    generated = {
        "base_model": training.get("base model"),
        "datasets": training.get("training images", "").split(": ")[0],
    }
    for key, value in generated.items():
        kept = [name for name in _list(old_data.get(key)) if name != value]
        if not kept:
            old_data.pop(key, None)
        elif len(kept) < len(_list(old_data[key])):
            old_data[key] = kept
    data = {**new_data, **{k: v for k, v in old_data.items() if k not in GENERATED_KEYS}}
    for key in GENERATED_KEYS:
        if key not in new_data and old_sections:
            data.pop(key, None)
    data["tags"] = list(dict.fromkeys(map(str, _list(old_data.get("tags")) + _list(new_data.get("tags")))))
    if "license" in new_data:
        data["license"] = new_data["license"]
        if new_data["license"] != "other":
            for key in ("license_name", "license_link"):
                data.pop(key, None)
    if "base_model" in new_data:
        data["base_model"] = new_data["base_model"]
    if "datasets" in new_data:
        data["datasets"] = list(dict.fromkeys(new_data["datasets"] + _list(old_data.get("datasets"))))
    # Not written by ModelCardData, which would rearrange a model-index that a person wrote.
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()
    return f"---\n{head}\n---\n{text if text.startswith(chr(10)) else chr(10) + text}"


def _list(value: Any) -> list:
    """Return metadata as a list. A person may have written a single word."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _sections(card: str) -> Iterator[tuple[str, str]]:
    for match in _SECTION.finditer(card):
        yield match[1], match[0]
