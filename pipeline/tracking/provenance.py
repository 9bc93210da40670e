"""The provenance of a run: the Git commit and DVC's hashes of its data. Does not import MLflow."""

import os
import subprocess
from pathlib import Path

from pipeline.common.dvc_lock import read_lock
from pipeline.common.environment import GIT_COMMIT_ENV, GIT_DIRTY_ENV
from pipeline.common.paths import CLEAN, TOKENIZER


def git_tags(root: Path) -> dict[str, str]:
    """Tags with the commit (from GIT_COMMIT, if set) and whether code or settings differ from it.

    {} without a repository.
    """
    if commit := os.environ.get(GIT_COMMIT_ENV):
        stated = {"git_dirty": os.environ[GIT_DIRTY_ENV]} if GIT_DIRTY_ENV in os.environ else {}
        return {"git_commit": commit, "mlflow.source.git.commit": commit} | stated
    try:
        commit = _git(root, "rev-parse", "HEAD")
        # dvc.lock and reports change with every run
        changed = _git(root, "status", "--porcelain", "--", "*.py", "*.toml", "dvc.yaml", "params.yaml", "conf")
    except (OSError, subprocess.CalledProcessError):
        return {}
    dirty = "true" if changed else "false"
    return {"git_commit": commit, "mlflow.source.git.commit": commit, "git_dirty": dirty}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def dvc_hashes(root: Path) -> dict[str, str]:
    """DVC's hashes in dvc.lock of the checked texts, "data", and of the tokenizer, "tokenizer", if there are any."""
    outs = [out for stage in read_lock(root).values() for out in stage.get("outs", [])]
    hashes = {out["path"]: out["md5"] for out in outs if out.get("md5")}
    places = {"data": CLEAN, "tokenizer": TOKENIZER}
    return {name: hashes[str(path)] for name, path in places.items() if str(path) in hashes}
