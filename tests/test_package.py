"""The house: what imports what, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_faces


SOURCE = Path(ddpm_faces.__file__).parent
TRAVELLING = ("unet_ddpm_faces", "scheduling_ddpm_faces", "pipeline_ddpm_faces")


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("module", TRAVELLING)
def test_files_that_travel_to_the_hub_stand_alone(module):
    allowed = {"torch", "diffusers", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imported_modules(SOURCE / f"{module}.py")} <= allowed


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.stem)
def test_source_never_imports_training(path):
    assert not {name for name in imported_modules(path) if name.split(".")[0] in ("training", "train")}


@pytest.mark.parametrize(
    ("module", "may_import"),
    [
        ("files", set()),
        ("drawn_faces", set()),
        ("data", {"", "drawn_faces", "files"}),
        ("augmentation", set()),
        ("draws", {"augmentation"}),
        ("batches", {"data", "draws"}),
        ("streaming", {"batches", "data"}),
        ("likelihood", {"data", "scheduling_ddpm_faces"}),
        ("objective", {"likelihood"}),
        ("validation", {"data"}),
        ("nonfinite", set()),
        ("preemption", set()),
        ("sync_batch_norm", set()),
        ("plots", set()),
        ("checkpoint", {"files"}),
        ("card", set()),
        ("extractors", set()),
        ("detection", {"extractors"}),
        ("metrics", {"data", "extractors"}),
        (
            "evaluation",
            {
                *("data", "detection", "drawn_faces", "extractors", "files", "likelihood", "metrics"),
                *("pipeline_ddpm_faces", "samples", "scheduling_ddpm_faces"),
            },
        ),
        ("samples", {"data", "pipeline_ddpm_faces", "solvers"}),
        (
            "audit",
            {
                *("data", "extractors", "metrics", "objective", "pipeline_ddpm_faces", "plots", "samples"),
                *("scheduling_ddpm_faces", "validation"),
            },
        ),
        ("solvers", {"scheduling_ddpm_faces"}),
        ("convert", {"pipeline_ddpm_faces", "scheduling_ddpm_faces", "unet_ddpm_faces"}),
        ("hub", {"card", "files", "pipeline_ddpm_faces", "plots", "solvers"}),
        ("prepare", {"card", "data", "files", "hub"}),
        ("guidance", {"files", "pipeline_ddpm_faces"}),
        ("cli", {"audit", "convert", "evaluation", "extractors", "files", "guidance", "hub", "prepare"}),
    ],
)
def test_data_flows_one_way(module, may_import):
    ours = {name.lstrip(".") for name in imported_modules(SOURCE / f"{module}.py") if name.startswith(".")}
    assert ours <= may_import


def test_importing_is_cheap_and_needs_no_extra():
    script = (
        "import sys, ddpm_faces\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler, DDPMFacesUNet, DrawnFaces\n"
        "extras = {'datasets', 'matplotlib', 'tensorboard', 'ddpm_faces.metrics'} & set(sys.modules)\n"
        "assert not extras, extras\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_exist():
    for name in ddpm_faces.__all__:
        assert getattr(ddpm_faces, name) is not None
    with pytest.raises(AttributeError, match="DDPMFacesVAE"):
        _ = ddpm_faces.DDPMFacesVAE
