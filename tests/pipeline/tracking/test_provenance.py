"""Code and data that a run comes from: Git and DVC."""

import subprocess
from pathlib import Path

import pytest

from pipeline.tracking.provenance import dvc_hashes, git_tags


def test_git_tags_name_the_commit_and_whether_code_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.check_output(["git", "-C", str(tmp_path), *identity, *arguments], text=True).strip()

    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert git_tags(tmp_path) == {}  # not a repository
    git("init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")  # DVC changes it in every run
    commit = git("rev-parse", "HEAD")
    clean = {"git_commit": commit, "mlflow.source.git.commit": commit, "git_dirty": "false"}
    assert git_tags(tmp_path) == clean
    (tmp_path / "code.py").write_text("2\n")
    assert git_tags(tmp_path) == clean | {"git_dirty": "true"}


def test_git_tags_without_a_repository_are_those_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_COMMIT", "abc")
    monkeypatch.delenv("GIT_DIRTY", raising=False)
    assert git_tags(tmp_path) == {"git_commit": "abc", "mlflow.source.git.commit": "abc"}
    monkeypatch.setenv("GIT_DIRTY", "true")
    assert git_tags(tmp_path)["git_dirty"] == "true"


def test_dvc_hashes_are_those_of_the_lock_as_far_as_it_has_them(tmp_path: Path) -> None:
    assert dvc_hashes(tmp_path) == {}
    stage = "  validate:\n    cmd: x\n    outs:\n    - {path: data/clean, md5: 77.dir}\n"
    (tmp_path / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n{stage}")
    assert dvc_hashes(tmp_path) == {"data": "77.dir"}
