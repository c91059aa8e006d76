"""The structure of the package: allowed imports, and the cost of importing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from lowest_versions import lowest_versions

import ddpm_faces


SOURCE = Path(ddpm_faces.__file__).parent
TRAVELLING = (
    "unet_ddpm_faces",
    "scheduling_ddpm_faces",
    "pipeline_ddpm_faces",
    "operators_ddpm_faces",
    "restoration_ddpm_faces",
    "editing_ddpm_faces",
)


def imported_modules(path: Path) -> set[str]:
    names, tree = set(), ast.parse(path.read_text())
    if path.name == "__init__.py":  # names are imported on first use; `if TYPE_CHECKING` only declares them
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("module", TRAVELLING)
def test_published_code_is_self_contained(module):
    allowed = {"torch", "diffusers", "numpy", "PIL", *sys.stdlib_module_names}  # diffusers requires the last two
    travelling = {f".{name}" for name in TRAVELLING}  # diffusers fetches what a file imports from beside it
    names = imported_modules(SOURCE / f"{module}.py") - travelling
    assert {name.split(".")[0] for name in names} <= allowed


# The packages that each package may import; "" is the top level. Imports go in one direction.
ALLOWED_IMPORTS = {
    "": set(),
    "hub": {""},
    "data": {"", "hub"},
    "evaluation": {"", "data"},
    "training": {"", "data", "evaluation", "hub"},
    "demo": {""},
    "cli": {"", "data", "demo", "evaluation", "hub", "training"},
}


def wing_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).parts[:-1])


def imported_packages(path: Path) -> set[str]:
    """Return the packages that a file imports from, at its top or within a function."""
    wings, here = set(), wing_of(path)
    for name in imported_modules(path):
        level = len(name) - len(name.lstrip("."))
        if level:
            first = name.lstrip(".").split(".")[0]
            is_sibling = level == 1 and here
            wings.add(here if is_sibling else first if first in ALLOWED_IMPORTS else "")
        elif name.split(".")[0] == "ddpm_faces":
            first = (name.split(".") + [""])[1]
            wings.add(first if first in ALLOWED_IMPORTS else "")
    return wings - {here}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_packages_import_each_other_in_one_direction(path):
    if path == SOURCE / "streaming.py":
        pytest.skip("an alias of the module's new place")
    assert imported_packages(path) <= ALLOWED_IMPORTS[wing_of(path)]
    assert not {name for name in imported_modules(path) if name.split(".")[0] in ("training", "train")}


def test_network_and_scheduler_do_not_import_each_other():
    for module in ("unet_ddpm_faces", "scheduling_ddpm_faces"):
        assert not {name for name in imported_modules(SOURCE / f"{module}.py") if name.startswith(".")}


def test_imports_are_declared_with_their_lowest_versions():
    """An undeclared package that another one installs today may be missing tomorrow."""
    imported = {name.split(".")[0] for path in SOURCE.rglob("*.py") for name in imported_modules(path)}
    trackers = {"trackio", "wandb"}  # `report_to` imports these by name
    imported = {name for name in imported if name} - {"ddpm_faces", *trackers, *sys.stdlib_module_names}
    declared = {name.replace("-", "_") for name in lowest_versions()} | {"torch"}
    assert {
        {"PIL": "pillow", "sklearn": "scikit_learn", "yaml": "pyyaml"}.get(name, name) for name in imported
    } <= declared


def test_importing_is_cheap_and_needs_no_extra():
    script = (
        "import sys, ddpm_faces\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DDPMFacesUNet, DrawnFaces\n"
        "extras = {'datasets', 'matplotlib', 'tensorboard', 'ddpm_faces.evaluation.metrics'} & set(sys.modules)\n"
        "assert not extras, extras\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_pipeline_imports_the_package_only_for_publishing():
    """The file is published. It uses only the other two published files of the package, and transformers for texts."""
    code = (SOURCE / "pipeline_ddpm_faces.py").read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
    ]
    assert sorted(ast.unparse(call) for call in calls) == [
        "importlib.import_module('ddpm_faces.hub')",
        "importlib.import_module('transformers')",
        "importlib.import_module(f'.{CODE_FILES[class_name]}', __package__)",
    ]


@pytest.mark.parametrize("package", ["", "data", "evaluation", "hub", "training"])
def test_type_checkers_and_python_find_each_lazy_name_in_the_same_module(package):
    tree = ast.parse((SOURCE / package / "__init__.py").read_text())
    (module_of,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULE_OF"
    ]
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {
        alias.asname: "." * (node.level - 1) + node.module
        for node in block.body
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == module_of


def test_public_names_exist():
    for name in ddpm_faces.__all__:
        assert getattr(ddpm_faces, name) is not None
    with pytest.raises(AttributeError, match="DDPMFacesVAE"):
        _ = ddpm_faces.DDPMFacesVAE
