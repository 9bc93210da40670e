"""The SQLite file of a store: created completely or created again, and moved with its project."""

import multiprocessing
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.common.settings import Settings
from pipeline.common.storage import database_file
from pipeline.tracking import database
from pipeline.tracking.runs import open_run
from pipeline.tracking.store import connect, open_experiment, prepare_store

FORK = multiprocessing.get_context("fork")
MAKING_S = 4
"""About the time in seconds that MLflow needs to make the tables."""
AN_EARLIER_REVISION = "451aebb31d03"


def uri_of(file: Path) -> str:
    return f"sqlite:///{file}"


def write(file: Path, *statements: str) -> None:
    with closing(sqlite3.connect(file)) as store, store:
        for statement in statements:
            store.execute(statement)


@pytest.fixture
def quick(empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the tables from an existing database in place of running migrations."""

    def open_or_copy(uri: str) -> MlflowClient:
        file = database_file(uri)
        if file and not file.exists():
            shutil.copy(empty_store, file)
        return MlflowClient(uri)

    monkeypatch.setattr(database, "MlflowClient", open_or_copy)


@pytest.fixture
def half_made(tmp_path: Path, empty_store: Path) -> Path:
    """A database as after a kill late in the migrations: an earlier revision, and a table under a temporary name."""
    file = tmp_path / "half.db"
    shutil.copy(empty_store, file)
    write(
        file,
        f"update alembic_version set version_num = '{AN_EARLIER_REVISION}'",
        "alter table runs rename to _alembic_tmp_runs",
    )
    return file


def test_database_gets_its_name_only_when_all_tables_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "mlflow.db"

    def killed(uri: str) -> MlflowClient:
        assert database_file(uri) != file
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(database, "MlflowClient", killed)
        with pytest.raises(KeyboardInterrupt):
            connect(uri_of(file))
    assert not file.exists()


@pytest.mark.usefixtures("quick")
def test_database_half_made_by_a_killed_process_is_made_again(
    half_made: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    client = connect(uri_of(half_made))
    open_experiment(client, "ours", tmp_path)
    assert [record.message for record in caplog.records if record.name == database.logger.name] == [
        f"Creating {half_made} again: it lacked tables (was a process killed?) and had no run."
    ]


@pytest.mark.usefixtures("quick")
def test_database_replaces_an_empty_file_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "mlflow.db"
    file.touch()
    assert connect(uri_of(file)).search_experiments()
    assert f"Creating {file} again" in caplog.text


@pytest.mark.parametrize("table", ["_alembic_tmp_runs", "experiments"])
def test_database_half_made_but_written_to_is_kept(half_made: Path, table: str) -> None:
    row = {"_alembic_tmp_runs": "(run_uuid) values ('a run')", "experiments": "(experiment_id, name) values (7, 'x')"}
    wanted = {"_alembic_tmp_runs": "run_uuid = 'a run'", "experiments": "experiment_id = 7"}
    write(half_made, f"insert into {table} {row[table]}")
    with pytest.raises(ConnectionError, match=rf"^MLflow's store {uri_of(half_made)}: .*; move that file away to"):
        connect(uri_of(half_made))
    with closing(sqlite3.connect(half_made)) as kept:
        assert kept.execute(f"select count(*) from {table} where {wanted[table]}").fetchone() == (1,)


@pytest.mark.slow
def test_database_can_be_opened_after_twenty_kills_while_it_is_made(tmp_path: Path) -> None:
    """Each process continues with the file that the one before left, and is killed (-9) at a random moment."""
    seconds, number, lefts = random.Random(1), 0, set()
    for _ in range(20):
        file = tmp_path / f"{number}.db"
        maker = FORK.Process(target=prepare_store, args=(uri_of(file),))  # forked, so it need not import
        maker.start()
        maker.join(seconds.uniform(0, MAKING_S))
        maker.kill()
        maker.join()
        left = "no file" if not file.exists() else "empty" if not file.stat().st_size else "whole"
        lefts.add(left)
        number += left == "whole"
    assert lefts >= {"no file", "whole"}
    for file in tmp_path.glob("*.db"):
        assert connect(uri_of(file)).search_experiments()


def artifacts_of(file: Path, run_id: str) -> str:
    return connect(uri_of(file)).get_run(run_id).info.artifact_uri


def test_artifacts_follow_a_copied_project(
    uri: str, root: Path, settings: Settings, run_id: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    left_behind = open_run(uri, settings, "its artifacts are not copied", {}, root)
    copy = tmp_path_factory.mktemp("a copy") / "project"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(left_behind))
    in_copy, in_original = ((folder / "mlartifacts").as_uri() for folder in (copy, root))

    assert artifacts_of(copy / "mlflow.db", run_id) == f"{in_copy}/{run_id}/artifacts"
    assert artifacts_of(copy / "mlflow.db", left_behind) == f"{in_original}/{left_behind}/artifacts"
    new = open_run(uri_of(copy / "mlflow.db"), settings, "new", {}, copy)
    assert (copy / "mlartifacts" / new / "artifacts" / "settings.yaml").exists()
    assert artifacts_of(root / "mlflow.db", run_id) == f"{in_original}/{run_id}/artifacts"


def test_artifacts_follow_a_moved_project(
    root: Path, run_id: str, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    moved = tmp_path_factory.mktemp("moved") / "project"
    root.rename(moved)
    for _ in range(2):
        assert artifacts_of(moved / "mlflow.db", run_id) == f"{(moved / 'mlartifacts').as_uri()}/{run_id}/artifacts"
    message = f"This project was in {root}. MLflow's artifacts are now in {moved}/mlartifacts."
    assert caplog.messages.count(message) == 1
    root.mkdir()


def test_artifacts_stay_while_a_run_of_another_machine_writes_to_the_store(
    uri: str,
    root: Path,
    settings: Settings,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_id = open_run(uri, settings, "key", {"run.owner_host": "worker7"}, root)
    copy = tmp_path_factory.mktemp("copy") / "mlflow.db"
    shutil.copy(root / "mlflow.db", copy)
    assert connect(uri_of(copy)).get_run(run_id).info.artifact_uri.startswith((root / "mlartifacts").as_uri())
    assert (
        f"Artifacts still go to {root}/mlartifacts: run {run_id} of worker7 is RUNNING in MLflow." in caplog.messages
    )
