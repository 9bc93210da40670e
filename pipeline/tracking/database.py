"""MLflow's store where it is an SQLite file: made whole or not at all, with its artifacts in the folder beside it.

MLflow makes the tables of a new database by some fifty migrations, which take seconds and are no transaction: a kill
among them leaves a file that no MLflow opens. Here they are made in a file elsewhere, and copied by SQLite in one
transaction.

MLflow keeps the absolute places of artifacts in it, and has no command to change them: in a project that was copied
or moved it would go on writing into the old folder.
"""

import logging
import socket
import sqlite3
from contextlib import closing, suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock
from mlflow import MlflowClient

from pipeline.common.storage import temporary_folder

logger = logging.getLogger(__name__)

PATIENCE_S = 60
"""Longer than another process takes to make the tables."""
IN_A_NEW_ONE = {"alembic_version", "workspaces"}
"""Tables of MLflow's that have rows from the beginning."""
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
"""Tables and columns with a place of artifacts."""
RUNNING_ELSEWHERE = """select run_uuid, value from runs join tags using (run_uuid)
    where status = 'RUNNING' and key = 'run.owner_host' and value != ?"""


def open_database(uri: str, file: Path) -> MlflowClient:
    """A client of the store in `file`, which is made where there is none. An empty file, and one that a kill left
    without all of its tables, are made again if nobody has written to them; that is said. Raises what MLflow,
    SQLAlchemy and SQLite raise."""
    if _has_content(file):
        try:
            client = MlflowClient(uri)
        except Exception:
            if not _is_unused(file):
                raise
        else:
            _bring_artifacts_along(file)
            return client
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock", timeout=PATIENCE_S):
        if _has_content(file):
            with suppress(Exception):
                return MlflowClient(uri)  # which another process has made meanwhile
        if file.exists():
            logger.warning("%s lacked tables, as a kill may leave it: it is made again. No run was in it.", file)
        _make_tables(file)
    return MlflowClient(uri)


def artifacts_beside(file: Path) -> Path:
    """Where a store in an SQLite file keeps artifacts."""
    return file.resolve().parent / "mlartifacts"


@lru_cache  # once in each process, as MLflow opens the file
def _bring_artifacts_along(file: Path) -> None:
    """If the project was copied or moved with its store, let that name the artifacts at their new place; those that
    exist at the old one alone are left there. Nothing is changed while a run of another machine is RUNNING: that may
    be this project, by the path that it has there."""
    here = artifacts_beside(file)
    with closing(sqlite3.connect(file, PATIENCE_S)) as database, database:
        places = [place for (place,) in database.execute("select artifact_location from experiments")]
        for old in {place for place in places if place.endswith(f"/{here.name}") and place != here.as_uri()}:
            if running := database.execute(RUNNING_ELSEWHERE, [socket.gethostname()]).fetchone():
                logger.warning("Artifacts go to %s while run %s of %s is RUNNING in MLflow.", _path(old), *running)
                return
            for table, column in LOCATIONS:
                for (place,) in database.execute(f"select distinct {column} from {table}").fetchall():
                    if place != old and not str(place).startswith(f"{old}/"):
                        continue
                    new = here.as_uri() + place.removeprefix(old)
                    if table == "experiments" or _path(new).exists() or not _path(place).exists():
                        database.execute(f"update {table} set {column} = ? where {column} = ?", [new, place])
            logger.warning(
                "This project was in %s: MLflow's artifacts are in %s from now on.", _path(old).parent, here
            )


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))


def _has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _make_tables(file: Path) -> None:
    with temporary_folder() as folder:
        made = folder / "mlflow.db"
        MlflowClient(f"sqlite:///{quote(str(made))}")
        with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(file, PATIENCE_S)) as target:
            source.backup(target)  # not renamed: a journal that a kill left beside `file` would be taken for its own


def _is_unused(file: Path) -> bool:
    """Whether nobody has written to this database: it has no rows but those that MLflow makes."""
    with closing(sqlite3.connect(file, PATIENCE_S)) as database:
        for (table,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
            name = table.removeprefix("_alembic_tmp_")  # while MLflow migrates it
            where = "where experiment_id > 0" if name == "experiments" else ""
            if name not in IN_A_NEW_ONE and database.execute(f'select 1 from "{table}" {where}').fetchone():
                return False
    return True
