"""What package indexes and citation managers read about this project.

No schema of CFF comes with an installed package, and tests use no network. So these are
strict checks of our own: which keys there may be, which there have to be, and what has to agree.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from email.parser import Parser
from pathlib import Path
from typing import Any

from pipeline.common.yaml_files import read_yaml

REPOSITORY = Path(__file__).parents[1]
LICENSE_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""Of the Apache License 2.0 as the Apache Software Foundation publishes it."""


def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_license_is_the_unchanged_apache_license():
    assert hashlib.sha256((REPOSITORY / "LICENSE").read_bytes()).hexdigest() == LICENSE_SHA256


def test_metadata_can_be_built_from_the_files_that_the_dockerfile_has_then(tmp_path):
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "README.md").write_text("")
    build = "import setuptools.build_meta as backend; print(backend.prepare_metadata_for_build_editable('.'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "error", "-c", build]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    metadata = Parser().parsestr((tmp_path / done.stdout.split()[-1] / "METADATA").read_text(encoding="utf-8"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Requires-Python"] == project()["requires-python"]
    assert metadata["Summary"]
    assert metadata["Keywords"]


def test_citation_is_valid_cff_and_agrees_with_the_project():
    citation = read_yaml(REPOSITORY / "CITATION.cff")
    optional = {"abstract", "keywords", "license", "references", "type", "version"}
    assert {"authors", "cff-version", "message", "title"} <= set(citation)
    assert set(citation) <= {"authors", "cff-version", "message", "title"} | optional
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert (citation["title"], citation["version"]) == (project()["name"], project()["version"])
    assert citation["license"] == project()["license"]
    assert citation["authors"] == project()["authors"], "an entity; a person has no key `name`"
    (paper,) = citation["references"]
    assert {"authors", "title", "type"} <= set(paper)
    assert (paper["title"], paper["year"]) == ("Attention Is All You Need", 2017)
    assert len(paper["authors"]) == 8
    assert all(set(author) == {"given-names", "family-names"} for author in paper["authors"])
