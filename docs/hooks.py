"""Hooks of the documentation site: reference pages generated from the code, and links to files outside `docs`."""

import os
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import griffe


ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Called by MkDocs for each page before it is rendered."""
    for marker, generate in {"configuration": configuration, "commands": commands}.items():
        comment = f"<!-- generated: {marker} -->"
        if comment in markdown:
            markdown = markdown.replace(comment, generate())
    folder = Path(page.file.src_uri).parent

    def outside(match: re.Match) -> str:
        path = os.path.normpath(Path("docs", folder, match["target"]))
        if path.startswith("docs/"):
            return match[0]
        # A page of the site cannot link to a file of the repository unless the repository has an address.
        if not config.repo_url:
            return match["text"]
        return f"[{match['text']}]({config.repo_url.rstrip('/')}/blob/main/{path}{match['anchor'] or ''})"

    return LINK.sub(outside, markdown)


class PlainTypes(griffe.Extension):
    """Lets mkdocstrings read docstrings of the Hugging Face style: "name (`int`, *optional*, defaults to 1): ..."."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each object of the package."""
        if obj.docstring:
            text = re.sub(r"\[`~?([^`]+)`\]", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^( +\w+ \()(.+?)(\): ?)", self._without_markup, text, flags=re.MULTILINE)

    @staticmethod
    def _without_markup(match: re.Match) -> str:
        # The signature shows the default.
        return match[1] + re.sub(r",? defaults to [^,]*|[`*]", "", match[2]) + match[3]


def configuration() -> str:
    """Every field of `TrainingConfig`, by group."""
    from ddpm_faces.training.config import GROUPS, TrainingConfig

    hints = get_type_hints(TrainingConfig)
    sections = []
    for group, description in GROUPS.items():
        rows = [f"## {group}\n\n{_sentence(description)}\n\n| field | type | default | |\n|---|---|---|---|"]
        for field in fields(TrainingConfig):
            if field.metadata["group"] == group:
                default = field.default_factory() if field.default is MISSING else field.default
                shown = "" if default is None else f"`{_plain(default)}`"
                rows.append(
                    f"| `{field.name}` | {_type(hints[field.name])} | {shown} | {_cell(field.metadata['help'])} |"
                )
        sections.append("\n".join(rows))
    return "\n\n".join(sections)


def commands() -> str:
    """Every command of `ddpm-faces`, with its arguments and options."""
    import typer

    from ddpm_faces.cli.app import app

    groups: dict[str, list[str]] = {}
    for name, command in typer.main.get_command(app).commands.items():
        if not command.hidden:
            panel = command.rich_help_panel
            groups.setdefault(panel if isinstance(panel, str) else "Commands", []).append(_command(name, command))
    return "\n\n".join(f"## {group}\n\n" + "\n\n".join(texts) for group, texts in groups.items())


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = ["ddpm-faces", name]
    for argument in arguments:
        shown = (argument.metavar or argument.name.upper()).strip("[]")
        usage.append(shown if argument.required else f"[{shown}]")
    usage.append("[OPTIONS]")
    rows = ["| | default | |", "|---|---|---|"]
    for parameter in arguments + options:
        if parameter in options:
            shown = " ".join(f"`{opt}`" for opt in (*parameter.opts, *parameter.secondary_opts))
        else:
            shown = f"`{(parameter.metavar or parameter.name.upper()).strip('[]')}`"
        is_told = parameter.default is not None and str(parameter.default) not in ("", "False", "()")
        default = f"`{_plain(parameter.default)}`" if is_told and not parameter.required else ""
        rows.append(f"| {shown} | {default} | {_cell(parameter.help or '')} |")
    text = re.sub(r"\[/?(?:bold|dim|cyan|green|yellow|red|blue)\]", "", command.help or "")
    table = "\n\n" + "\n".join(rows) if len(rows) > 2 else ""
    return f"### {name}\n\n```text\n{' '.join(usage)}\n```\n\n{text}{table}"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not getattr(hint, "__args__", ()) else str(hint)
    text = re.sub(r"typing\.|\s*\|\s*None", "", text)
    choices = re.fullmatch(r"(?:Optional\[)?Literal\[(.*?)\]\]?", text)
    if choices:
        return ", ".join(f"`{choice.strip().strip(chr(39))}`" for choice in choices[1].split(","))
    return f"`{text}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."
