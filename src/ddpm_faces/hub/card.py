"""The model card, filled from the template `model_card.md`; what a person wrote into it stays."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData


_SECTION = re.compile(r"<!-- generated: (\w+)[^>]*-->\n(?:(?!<!-- generated: ).)*?<!-- end: \1 -->", re.DOTALL)
# Keys of the metadata that publishing writes; all others are a person's.
GENERATED_KEYS = ("library_name", "pipeline_tag", "model-index", "configs", "size_categories", "task_categories")
TAGS = ["ddpm", "faces", "diffusers", "unconditional-image-generation"]


def check_license(name: str, license: str | None) -> None:
    """Refuse what the Hub takes for no licence, before any work is done.

    Args:
        name (`str`): Of the argument.
        license (`str`, *optional*): Identifier of the Hub: https://hf.co/docs/hub/repositories-licenses.

    Raises:
        ValueError: It cannot be an identifier.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", license):
        raise ValueError(
            f"`{name}` must be an identifier of the Hub such as 'apache-2.0', 'cc-by-nc-sa-4.0' or 'other', got "
            f"{license!r}."
        )


def template_path() -> Path:
    """`model_card.md`: in the package where that is installed, at the top of the repository otherwise."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "model_card.md", package.parents[1] / "model_card.md") if path.is_file())


def model_card(
    repo_id: str,
    values: dict[str, Any],
    metrics: list[dict[str, Any]] | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """Fill the template.

    Args:
        repo_id (`str`): "user/name".
        values (`dict`): What the template names.
        metrics (`list[dict]`, *optional*): Entries of `metrics.json`: `name`, `type`, `value`, and where it is from.
        license (`str`, *optional*): Identifier of the Hub, such as "cc-by-nc-sa-4.0".
        datasets (`list[str]`, *optional*): Names of data sets on the Hub.
        base_model (`str`, *optional*): "user/name" of the model on the Hub that the training started from.
    """
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=metric.get("reference_type", "image-folder"),
            dataset_name=str(metric.get("reference", "training pictures")),
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=metric["value"],
            metric_args={k: v for k, v in metric.items() if k not in ("name", "type", "value")},
        )
        for metric in metrics or []
    ]
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=TAGS,
        datasets=datasets or None,
        base_model=base_model,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(data, template_path=str(template_path()), repo_id=repo_id, **values)


def merge_cards(old: str, new: str) -> str:
    """What is generated, of the new card; all else, of the old one.

    A generated section that the old card no longer has (somebody took it out with its marks) stays out. A card that
    has none at all was written by a person or another program: the new one follows after it.
    """
    old_sections, new_sections = (dict(_sections(card)) for card in (old, new))
    try:
        old_card, new_card = ModelCard(old, ignore_metadata_errors=True), ModelCard(new)
    except Exception as error:  # whatever its YAML may raise
        reason = " ".join(str(error).split())
        raise ValueError(f"The metadata of the README.md that is there cannot be read: {reason}. Mend it.") from error
    text = old_card.text
    if old_sections:
        text = _SECTION.sub(lambda match: new_sections.get(match[1], match[0]), text)
    else:
        text = f"{text.rstrip()}\n\n{new_card.text.lstrip()}" if text.strip() else new_card.text
    old_data, new_data = old_card.data.to_dict(), new_card.data.to_dict()
    data = {**new_data, **{k: v for k, v in old_data.items() if k not in GENERATED_KEYS}}
    for key in GENERATED_KEYS:
        if key not in new_data and old_sections:
            data.pop(key, None)
    data["tags"] = list(dict.fromkeys(map(str, _list(old_data.get("tags")) + _list(new_data.get("tags")))))
    if "license" in new_data:  # which is asked for at each publishing
        data["license"] = new_data["license"]
        if new_data["license"] != "other":
            for key in ("license_name", "license_link"):
                data.pop(key, None)
    if "base_model" in new_data:
        data["base_model"] = new_data["base_model"]
    if "datasets" in new_data:
        data["datasets"] = list(dict.fromkeys(new_data["datasets"] + _list(old_data.get("datasets"))))
    # Through a bare card: ModelCardData would take a person's model-index apart.
    import yaml

    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()
    return f"---\n{head}\n---\n{text if text.startswith(chr(10)) else chr(10) + text}"


def _list(value: Any) -> list:
    """What a person may have written as a single word."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _sections(card: str) -> Iterator[tuple[str, str]]:
    for match in _SECTION.finditer(card):
        yield match[1], match[0]
