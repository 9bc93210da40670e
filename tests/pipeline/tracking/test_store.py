"""The MLflow store: prepared, waited for, refused."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking.runs import reconcile
from pipeline.tracking.store import open_experiment, prepare_store, without_password


def test_prepare_store_creates_tables_or_refuses_in_one_line(tmp_path: Path) -> None:
    prepare_store(f"sqlite:///{tmp_path / 'new.db'}")
    with closing(sqlite3.connect(tmp_path / "new.db")) as database:
        assert database.execute("select count(*) from runs").fetchone() == (0,)
    (tmp_path / "broken.db").write_text("no database" * 1000)
    broken = f"sqlite:///{tmp_path / 'broken.db'}"
    for ask in (prepare_store, lambda uri: reconcile(uri, "transformer")):
        with pytest.raises(
            ConnectionError,
            match=rf"^MLflow's store {broken}: .*file is not a database; move that file away to begin a new one$",
        ):
            ask(broken)
    prepare_store("http://127.0.0.1:9")  # is not asked


def test_without_password_hides_the_credentials_of_an_address() -> None:
    assert without_password("https://us:secret@mlflow:5000/x") == "https://mlflow:5000/x"
    assert without_password("http://mlflow:5000/@x") == "http://mlflow:5000/@x"


def test_open_experiment_deletes_the_default_experiment_of_mlflow_if_it_is_empty(uri: str, root: Path) -> None:
    client = MlflowClient(uri)
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
    made = open_experiment(client, "ours", root)
    assert open_experiment(client, "ours", root) == made
    assert [experiment.name for experiment in client.search_experiments()] == ["ours"]
    assert open_experiment(client, "another", root) != made


def test_open_experiment_keeps_a_default_experiment_in_use(uri: str, root: Path) -> None:
    client = MlflowClient(uri)
    run = client.create_run("0")
    client.delete_run(run.info.run_id)  # it can be restored
    open_experiment(client, "ours", root)
    assert {experiment.name for experiment in client.search_experiments()} == {"Default", "ours"}
