"""A project in a path with a space."""

import os
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_project_and_environment_in_a_path_with_a_space_train_and_sweep(trained, tmp_path):
    """Ray starts its workers by a command line with the path of Python in it."""
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
