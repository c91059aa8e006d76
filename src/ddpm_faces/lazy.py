"""Lazy public names: a package imports them on first use, so that it loads fast and its extras stay optional."""

import importlib
from collections.abc import Callable
from typing import Any


def attach(package: str, module_of: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Create `__getattr__`, `__dir__` and `__all__` for a package.

    Args:
        package (`str`): The package's `__name__`.
        module_of (`dict[str, str]`): The module of each public name, relative to the package.
    """

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{module_of[name]}", package), name)

    names = sorted(module_of)
    return __getattr__, lambda: names, names
