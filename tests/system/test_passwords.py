"""A run never writes or prints the password of an address."""

import os
from pathlib import Path

import pytest

from tests.support.stores import mlflow_server

pytestmark = pytest.mark.slow

SECRET = "do-not-write-me"


def files_with(text: str, *folders: Path) -> list[str]:
    return [
        str(Path(folder, name))
        for top in folders
        for folder, _, names in os.walk(top)
        for name in names
        if not Path(folder, name).is_socket() and text.encode() in Path(folder, name).read_bytes()
    ]


def test_passwords_of_addresses_are_in_no_file_and_no_output_of_a_run(new_project, tmp_path):
    project = new_project
    project.edit("params.yaml", "train.max_steps", 20)
    project.edit("params.yaml", "hardware.num_workers", 2)
    project.edit("params.yaml", "tracking.system_metrics", True)
    store = tmp_path / "server"
    store.mkdir()
    with mlflow_server(f"sqlite:///{store}/mlflow.db", str(store / "artifacts"), {}) as server:
        with_password = server.replace("://", f"://us:{SECRET}@")
        printed = project.run("dvc", "repro", "evaluate", MLFLOW_TRACKING_URI=with_password)
        run = project.json("models/final/run.json")
    assert run["tracking_uri"] == server
    away = {"MLFLOW_TRACKING_URI": f"http://us:{SECRET}@127.0.0.1:9"}
    printed += project.run("python", "-m", "pipeline.train", code=1, **away)
    for storage in (f"ftp://us:{SECRET}@127.0.0.1:9/runs", f"nowhere://us:{SECRET}@host/runs"):
        printed += project.run("python", "-m", "pipeline.train", code=1, RUN_STORAGE=storage)
    project.edit("params.yaml", "data.corpus", "multi30k")
    for mirror in (f"http://us:{SECRET}@127.0.0.1:9", f"ftp://us:{SECRET}@127.0.0.1:9"):
        printed += project.run("python", "-m", "pipeline.download", code=1, CORPUS_MIRROR=mirror)
    assert printed.count("127.0.0.1") >= 4
    assert SECRET not in printed
    assert files_with(run["mlflow_run_id"], project.root, store)
    assert files_with(SECRET, project.root, store) == []
