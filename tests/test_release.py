"""What a release consists of: one version, in all the places that state it."""

import re
from pathlib import Path

import yaml

import ddpm_faces


ROOT = Path(__file__).parents[1]


def test_citation_and_changelog_state_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ddpm_faces.__version__

    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", f"{citation['version']} - {citation['date-released']}"]
