"""Files about this project for GitHub, package indexes, pre-commit and citation managers.

No installed package has the schemas of GitHub, pre-commit or CFF, and tests use no network. So these tests check
the allowed and the required keys, and that the things that the files name exist.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

from pipeline.common.yaml_files import read_yaml  # YAML 1.2, where `on` is a text and not true

REPOSITORY = Path(__file__).parents[1]
LICENSE_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""Checksum of the Apache License 2.0 as published by the Apache Software Foundation."""
WORKFLOW = read_yaml(REPOSITORY / ".github/workflows/tests.yml")
FORMS = sorted((REPOSITORY / ".github/ISSUE_TEMPLATE").glob("*.yml"))
DOCTOR = "python -m pipeline.doctor"


def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lint_commands() -> list[str]:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    return re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1].replace("\t", "").splitlines()


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
    assert citation["authors"] == project()["authors"], "the author is an entity; a person has no key `name`"
    (paper,) = citation["references"]
    assert {"authors", "title", "type"} <= set(paper)
    assert (paper["title"], paper["year"]) == ("Attention Is All You Need", 2017)
    assert len(paper["authors"]) == 8
    assert all(set(author) == {"given-names", "family-names"} for author in paper["authors"])


def test_workflow_has_the_structure_of_a_workflow_and_may_only_read():
    assert set(WORKFLOW) == {"name", "on", "permissions", "concurrency", "jobs"}
    assert set(WORKFLOW["on"]) == {"push", "pull_request"}
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for job in WORKFLOW["jobs"].values():
        assert set(job) <= {"env", "name", "runs-on", "steps", "strategy", "timeout-minutes"}
        assert {"runs-on", "steps", "timeout-minutes"} <= set(job)
        assert not job["runs-on"].endswith("-latest")
        for step in job["steps"]:
            assert len({"run", "uses"} & set(step)) == 1
            assert set(step) <= {"name", "run", "uses", "with"}
        named = set(re.findall(r"\$\{\{ *matrix\.(\w+) *\}\}", str(job)))
        assert named == set(job["strategy"]["matrix"])


def test_workflow_pins_actions_by_their_commit():
    used = [step["uses"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    assert [action for action in used if not re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action)] == []


def test_workflow_runs_the_make_targets_of_a_laptop():
    runs = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
    assert runs == ["make lint", "make test"]
    for command in runs:
        subprocess.run([*command.split(), "--dry-run"], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def test_workflow_tests_the_pythons_that_the_project_names():
    pythons = WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]["python"]
    numbers = re.findall(r"Programming Language :: Python :: (3\.\d+)", "\n".join(project()["classifiers"]))
    assert pythons == numbers
    assert project()["requires-python"] == f">={pythons[0]}"


def test_pre_commit_runs_the_commands_of_make_lint():
    (repo,) = read_yaml(REPOSITORY / ".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    for hook in repo["hooks"]:
        assert set(hook) == {"id", "name", "entry", "language", "types", "pass_filenames"}
        assert hook["language"] == "system"
        assert hook["pass_filenames"] is False
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in repo["hooks"]] == lint_commands()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_form_has_the_structure_of_a_form_and_asks_for_the_doctor(path):
    form = read_yaml(path)
    assert set(form) == {"name", "description", "labels", "body"}
    for field in form["body"]:
        assert field["type"] == "textarea"
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert {"label"} <= set(field["attributes"]) <= {"label", "description", "render"}
        assert set(field.get("validations", {})) <= {"required"}
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    doctor = next(field for field in form["body"] if field["id"] == "doctor")
    assert DOCTOR in doctor["attributes"]["label"]
    assert doctor["validations"] == {"required": True}


def test_issue_forms_are_for_bugs_and_questions():
    assert [path.stem for path in FORMS] == ["bug", "question"]
