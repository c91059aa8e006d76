"""Command line and YAML files of a training run: each field of `TrainingConfig` is a flag and a key."""

import argparse
import difflib
import inspect
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from ..files import read_yaml
from .config import GROUPS, TrainingConfig, is_a


Config = TypeVar("Config")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


def parse_training_config(
    argv: Sequence[str] | None = None, command: str = "accelerate launch training/train.py"
) -> TrainingConfig:
    """Read the configuration of a training run, see [`parse_config`]; a pretrained pipeline is a source, too."""
    description = "Train DDPM on images of faces. Without arguments, it trains on small drawn faces."
    return parse_config(TrainingConfig, argv, command, description, _flags_of_pretrained)


def parse_config(
    cls: type[Config],
    argv: Sequence[str] | None,
    command: str,
    description: str,
    inherited: Callable[[list[str]], list[str]] = lambda flags: [],
) -> Config:
    """Read a configuration from the defaults, `inherited`, the `--config` file and the flags.

    Later sources override earlier ones.

    Args:
        cls (`type`): The dataclass of the configuration.
        argv (`Sequence[str]`, *optional*): Arguments to parse; defaults to those of the command line.
        command (`str`): Command to show in the help.
        description (`str`): What the command does.
        inherited (`Callable`, *optional*): Maps the given flags to flags that they imply.

    Raises:
        SystemExit: With code 2 and a message, for an unknown flag or key or a value that is not allowed.
    """
    parser = _make_parser(cls, command, description)
    file_parser = _Parser(add_help=False)
    file_parser.add_argument("--config")
    file_args, flags = file_parser.parse_known_args(argv)
    flags = [_hyphenated(flag) for flag in flags]
    try:
        if file_args.config is not None:
            # The file is turned into flags, so that the rules of the command line apply to it.
            flags = [*_flags_of_yaml(_config_path(file_args.config, cls), cls), *flags]
        flags = [*inherited(flags), *flags]
        values, unknown = parser.parse_known_args(flags)
        if unknown:
            raise ValueError(_unknown(cls, "argument", unknown[0], prefix="--"))
        del values.config
        return cls(**vars(values))
    except ValueError as error:
        parser.error(str(error))


def training_folder() -> Path:
    """Return the folder of train.py and its configurations, in the installed package or in the repository."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "_training", package.parents[1] / "training") if path.is_dir())


def config_names(cls: type = TrainingConfig) -> list[str]:
    """Return the names of the included configurations of a class. Only training has any."""
    if cls is not TrainingConfig:
        return []
    return sorted(path.stem for path in (training_folder() / "configs").glob("*.yaml"))


def _config_path(name: str, cls: type) -> Path:
    """Return the file of `--config`. A file in the working directory takes precedence over a name."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    names = config_names(cls)
    if name in names:
        return training_folder() / "configs" / f"{name}.yaml"
    choices = f"one of {', '.join(names)}, or an existing file" if names else "an existing file"
    raise ValueError(f"`--config` must be {choices}, got {name!r}.")


def _hyphenated(flag: str) -> str:
    """Turn `--output_dir` into `--output-dir`."""
    name, equals, value = flag.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else flag


def _make_parser(cls: type, command: str = "accelerate launch training/train.py", description: str = "") -> _Parser:
    class Formatter(argparse.HelpFormatter):
        def _split_lines(self, text: str, width: int) -> list[str]:
            # Never break a line at a hyphen, or between "(default:" and its value.
            lines = textwrap.wrap(text.replace("(default: ", "(default:\xa0"), width, break_on_hyphens=False)
            return [line.replace("\xa0", " ") for line in lines]

    parser = _Parser(
        description=description,
        usage=f"{command} [--config CONFIG] [--FIELD VALUE ...]",
        formatter_class=partial(Formatter, max_help_position=34),
    )
    names = config_names(cls)
    choices = f"One of {', '.join(names)}, or a YAML file of fields." if names else "A YAML file of fields."
    parser.add_argument("--config", metavar="CONFIG", help=f"{choices} Flags on the command line override it.")
    used = {f.metadata["group"] for f in fields(cls)}
    groups = {name: parser.add_argument_group(name, about) for name, about in GROUPS.items() if name in used}
    types = get_type_hints(cls)
    for f in fields(cls):
        groups[f.metadata["group"]].add_argument(_hyphenated(f"--{f.name}"), **_argument_of(f, types[f.name]))
    return parser


def _argument_of(f: Field, hint: Any) -> dict[str, Any]:
    """Return the keyword arguments of `add_argument` for a field."""
    default = f.default if f.default_factory is MISSING else f.default_factory()
    help = f.metadata["help"]
    if default is not None:
        help = f"{help.removesuffix('.')} (default: {_as_typed(default)})."
    argument: dict[str, Any] = {"default": default, "help": help.replace("%", "%%")}
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    (kind,) = kinds
    if get_origin(kind) is list:
        argument["nargs"] = "+"
        (kind,) = get_args(kind)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return {**argument, "type": type(choices[0]), "choices": choices}
    if kind is bool:
        return {**argument, "type": _true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
    return {**argument, "type": kind, "metavar": {int: "INT", float: "FLOAT", str: "TEXT"}[kind]}


def _true_or_false(text: str) -> bool:
    meanings = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in meanings:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text}")
    return meanings[text.lower()]


def _as_typed(value) -> str:
    """Format a value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(_as_typed, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flags_of_yaml(path: Path, cls: type) -> list[str]:
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must contain `field: value` lines, got a {type(values).__name__}.")
    types = get_type_hints(cls)
    flags = []
    for key, value in values.items():
        if key not in types:
            raise ValueError(f"{path}: {_unknown(cls, 'field', str(key))}")
        if value is None:
            if not is_a(None, types[key]):
                raise ValueError(f"{path}: `{key}` must have a value.")
            continue
        if get_origin(types[key]) is not list and isinstance(value, (list, dict)):
            raise ValueError(f"{path}: `{key}` must be a single value, got {value!r}.")
        items = value if isinstance(value, list) else [value]
        if not items or any(item is None or isinstance(item, (list, dict)) for item in items):
            raise ValueError(f"{path}: `{key}` must be a value or a list of values, got {value!r}.")
        if len(items) > 1 and any(isinstance(item, str) and item.startswith("-") for item in items):
            raise ValueError(f"{path}: `{key}` must not contain values that begin with a dash, got {value!r}.")
        flags += _flag(key, items)
    return flags


def _flag(name: str, items: list) -> list[str]:
    words = ["no" if item is False else str(item) for item in items]  # YAML reads `no` as false
    if len(words) == 1:  # one word, because the value may begin with a dash
        return [_hyphenated(f"--{name}={words[0]}")]
    return [_hyphenated(f"--{name}"), *words]


def _flags_of_pretrained(flags: list[str]) -> list[str]:
    """Return size, network and schedule of the pretrained pipeline, or of the run itself if it resumes."""
    peek = _Parser(add_help=False)
    peek.add_argument("--pretrained-model-name-or-path", default="")
    peek.add_argument("--output-dir", default=TrainingConfig.output_dir)
    given, _ = peek.parse_known_args(flags)
    name = given.pretrained_model_name_or_path
    if not name.strip():
        return []
    from ..scheduling_ddpm_faces import DDPMFacesScheduler
    from ..unet_ddpm_faces import DDPMFacesUNet
    from .checkpoint import newest_config

    values = newest_config(os.path.expanduser(given.output_dir))
    if values is None:
        try:
            folder = Path(name).expanduser()
            unet, scheduler = (
                cls.load_config(folder if folder.is_dir() else name, subfolder=subfolder)
                for cls, subfolder in ((DDPMFacesUNet, "unet"), (DDPMFacesScheduler, "scheduler"))
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"`pretrained_model_name_or_path` {name!r} cannot be fine-tuned: {error}") from error
        values = {**scheduler, **unet, "mid_block_type": unet.get("mid_block_type") or "none"}
        size = unet.get("sample_size")
        values["resolution"] = [size] if isinstance(size, int) else size
    types = get_type_hints(TrainingConfig)
    arguments = {*inspect.signature(DDPMFacesUNet).parameters, *inspect.signature(DDPMFacesScheduler).parameters}
    taken = [key for key in types if key in {*arguments, "resolution"} - {"num_class_embeds"}]
    found = {key: values[key] for key in taken if values.get(key) is not None and is_a(values[key], types[key])}
    return [word for key, value in found.items() for word in _flag(key, value if isinstance(value, list) else [value])]


def _unknown(cls: type, what: str, name: str, prefix: str = "") -> str:
    names = [_hyphenated(prefix + f.name).removeprefix(prefix) for f in fields(cls)]
    nearest = difflib.get_close_matches(name.removeprefix(prefix).split("=")[0], names, n=1)
    suggestion = f"; did you mean {prefix}{nearest[0]}?" if nearest else "; see --help for a list."
    return f"unknown {what} {name}{suggestion}"
