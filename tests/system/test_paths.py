"""Projects in a path with a space, and on a read-only disk."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.slow
def test_project_and_environment_in_a_path_with_a_space_train_and_sweep(trained, tmp_path):
    """Ray starts its workers by a command line that contains the path of Python."""
    folder = tmp_path / "my project, #1"
    project = trained.untrained_copy(folder)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    path = f"{folder}/.venv/bin:{os.environ['PATH']}"
    project.edit("params.yaml", "hardware.num_workers", 2)
    project.edit("params.yaml", "sweep.rows", [])
    project.edit("params.yaml", "sweep.grid", {"model.d_ff": [32]})
    project.run("python", "-m", "pipeline.train", PATH=path)
    project.run("python", "-m", "sweeps.run", PATH=path)
    assert [trial["status"] for trial in project.json("data/sweep/trials.json")["trials"]] == ["finished"] * 2
    assert (folder / "mlflow.db").stat().st_size > 0
    assert not [file.name for file in tmp_path.iterdir() if file != folder]


@pytest.mark.host
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
def test_project_on_a_read_only_disk_gets_a_line_from_every_stage(trained, tmp_path):
    """MLflow alone would retry for minutes to make its database."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", disk], check=True)
    try:
        project = trained.copy(disk / "project", without=())
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for command in ("download", "validate", "train_tokenizer", "encode", "train", "evaluate"):
            started = time.monotonic()
            output = project.run("python", "-m", f"pipeline.{command}", code=1, PYTHONDONTWRITEBYTECODE="1")
            assert "Read-only file system" in output.splitlines()[-1], command
            assert "Traceback" not in output
            assert time.monotonic() - started < 60
    finally:
        subprocess.run(["umount", disk], check=True)
