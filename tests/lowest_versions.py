"""Print pip constraints: the lowest version of each dependency that pyproject.toml allows, for `make test-lowest`."""

import re
import tomllib
from pathlib import Path


ROOT = Path(__file__).parents[1]
# Tools may have any version. The lowest torch lacks a CPU-only build on some platforms, so the pinned one is used.
EXCEPT = ("ddpm-faces", "mypy", "ruff", "torch")


def lowest_versions() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    versions = {}
    for requirement in requirements:
        name, version = re.fullmatch(r"([\w-]+)(?:\[.*\])?(?:>=([\d.]+))?", requirement).groups()
        if name not in EXCEPT:
            if version is None:
                raise ValueError(f"pyproject.toml must give the lowest version of {name}.")
            versions[name] = version
    return versions


if __name__ == "__main__":
    for name, version in lowest_versions().items():
        print(f"{name}=={version}")
    print(re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0])
