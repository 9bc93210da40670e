"""An SQLite file as MLflow's store: created atomically, with its artifacts in the folder mlartifacts next to it.

MLflow creates the tables of a new database by about fifty migrations. They take seconds and are not one transaction,
so a kill in between leaves a file that MLflow cannot open. Here the tables are created in a temporary file, which
SQLite copies in one transaction.

MLflow stores absolute paths of artifacts and has no command to change them: in a copied or moved project it would
still write into the old folder. `open_database` changes these paths.
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
"""Seconds to wait while another process creates the tables, which takes less."""
IN_A_NEW_ONE = {"alembic_version", "workspaces"}
"""Tables that have rows in a new database."""
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
"""The tables and columns with paths of artifacts."""
RUNNING_ELSEWHERE = """select run_uuid, value from runs join tags using (run_uuid)
    where status = 'RUNNING' and key = 'run.owner_host' and value != ?"""


def open_database(uri: str, file: Path) -> MlflowClient:
    """A client of the store in `file`, which is created if it does not exist.

    A file that is empty, or lacks tables because a process was killed, is created again with a warning, if no run is
    in it. Raises the errors of MLflow, SQLAlchemy and SQLite.
    """
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
                return MlflowClient(uri)  # another process has created it in the meantime
        if file.exists():
            logger.warning("Creating %s again: it lacked tables (was a process killed?) and had no run.", file)
        _make_tables(file)
    return MlflowClient(uri)


def artifacts_beside(file: Path) -> Path:
    """The folder for the artifacts of a store in an SQLite file."""
    return file.resolve().parent / "mlartifacts"


@lru_cache  # once in each process, as MLflow opens the file
def _bring_artifacts_along(file: Path) -> None:
    """If the project was copied or moved with its store, change the paths of artifacts in the store.

    Artifacts that exist only in the old folder keep their paths. Nothing is changed while a run of another machine is
    RUNNING: the old path may be the path of this project on that machine.
    """
    here = artifacts_beside(file)
    with closing(sqlite3.connect(file, PATIENCE_S)) as database, database:
        places = [place for (place,) in database.execute("select artifact_location from experiments")]
        for old in {place for place in places if place.endswith(f"/{here.name}") and place != here.as_uri()}:
            if running := database.execute(RUNNING_ELSEWHERE, [socket.gethostname()]).fetchone():
                logger.warning("Artifacts still go to %s: run %s of %s is RUNNING in MLflow.", _path(old), *running)
                return
            for table, column in LOCATIONS:
                for (place,) in database.execute(f"select distinct {column} from {table}").fetchall():
                    if place != old and not str(place).startswith(f"{old}/"):
                        continue
                    new = here.as_uri() + place.removeprefix(old)
                    if table == "experiments" or _path(new).exists() or not _path(place).exists():
                        database.execute(f"update {table} set {column} = ? where {column} = ?", [new, place])
            logger.warning("This project was in %s. MLflow's artifacts are now in %s.", _path(old).parent, here)


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))


def _has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _make_tables(file: Path) -> None:
    with temporary_folder() as folder:
        made = folder / "mlflow.db"
        MlflowClient(f"sqlite:///{quote(str(made))}")
        with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(file, PATIENCE_S)) as target:
            source.backup(target)  # no rename: SQLite would apply an old journal next to `file` to the new one


def _is_unused(file: Path) -> bool:
    """Whether this database has only the rows that MLflow itself creates."""
    with closing(sqlite3.connect(file, PATIENCE_S)) as database:
        for (table,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
            name = table.removeprefix("_alembic_tmp_")  # the name during a migration
            where = "where experiment_id > 0" if name == "experiments" else ""
            if name not in IN_A_NEW_ONE and database.execute(f'select 1 from "{table}" {where}').fetchone():
                return False
    return True
