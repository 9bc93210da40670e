import errno
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from upath import UPath

from pipeline.common import storage
from pipeline.common.storage import (
    cache,
    database_file,
    one_at_a_time,
    retry_unreachable,
    run_storage,
    socket_folder,
    temporary_folder,
    tracking_uri,
)
from tests.support.locks import most_inside

REPOSITORY = Path(__file__).parents[3]


def test_run_storage_is_an_absolute_path_or_a_uri(tmp_path, monkeypatch):
    for uri in ("/srv/runs", "s3://bucket/runs"):
        monkeypatch.setenv("RUN_STORAGE", uri)
        assert str(run_storage(tmp_path) / "x") == f"{uri}/x"
    for uri, fault in (
        ("runs", r"must be an absolute path or a URI such as s3://bucket/runs, got 'runs'"),
        ("nowhere://runs", r"is 'nowhere://runs': Unsupported filesystem"),
        (
            "memory://runs",
            r"must be a folder or a store such as s3://..., got 'memory://runs', which is lost when the process",
        ),
        (
            "https://us:secret@host/runs",
            r"must be a folder or a store such as s3://..., got 'https://host/runs', which cannot be written to",
        ),
        ("file://srv/runs", r"must begin with file:/// \(three slashes\), got 'file://srv/runs'"),
    ):
        monkeypatch.setenv("RUN_STORAGE", uri)
        with pytest.raises(ValueError, match=f"^RUN_STORAGE {fault}"):
            run_storage(tmp_path)


def test_run_storage_shows_no_password_and_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_STORAGE", "ftp://us:secret@127.0.0.1:9/runs")
    with pytest.raises(ValueError, match=r"^RUN_STORAGE is 'ftp://127.0.0.1:9/runs': .*refused"):
        run_storage(tmp_path)
    monkeypatch.setattr("ftplib.FTP.connect", lambda *arguments, **named: None)
    monkeypatch.setattr("ftplib.FTP.login", lambda *arguments, **named: None)
    found = run_storage(tmp_path) / "x"
    assert "secret" not in f"{found} {found!r}"
    assert (found.storage_options["username"], found.storage_options["password"]) == ("us", "secret")
    monkeypatch.setenv("RUN_STORAGE", "nowhere://us:secret@runs")
    with pytest.raises(ValueError, match=r"^RUN_STORAGE is 'nowhere://runs'"):
        run_storage(tmp_path)


@pytest.mark.parametrize("uri", ["file:///srv/the%20runs", "FILE:///srv/the%20runs", "file://localhost/srv/the runs"])
def test_run_storage_by_a_files_uri_is_its_path(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("RUN_STORAGE", uri)
    assert run_storage(tmp_path) == Path("/srv/the runs")


def test_run_storage_is_the_project_itself_if_nothing_is_set(tmp_path, monkeypatch):
    monkeypatch.delenv("RUN_STORAGE", raising=False)
    assert run_storage(tmp_path) == tmp_path.resolve()


@pytest.mark.parametrize(
    ("uri", "absolute"),
    [
        (None, "sqlite:///{}/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///{}/mlflow.db"),
        ("sqlite:///runs/my%20own.db?timeout=30", "sqlite:///{}/runs/my%20own.db?timeout=30"),
        ("sqlite+pysqlite:///x.db", "sqlite+pysqlite:///{}/x.db"),
        ("file:mlruns", "file://{}/mlruns"),
        ("file:./mlruns", "file://{}/./mlruns"),
        ("mlruns", "{}/mlruns"),
        ("./mlruns", "{}/mlruns"),
        *((uri, uri) for uri in ("sqlite:////srv/x.db", "file:/srv/runs", "file:///srv/runs", "/srv/runs")),
        *((uri, uri) for uri in ("http://mlflow:5000", "postgresql://us:secret@db/x", "databricks")),
    ],
)
def test_tracking_uri_names_the_same_store_in_every_folder(tmp_path, monkeypatch, uri, absolute):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Path()) == absolute.format(tmp_path)
    monkeypatch.chdir("/")
    assert tracking_uri(tmp_path) == absolute.format(tmp_path)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite+pysqlite:///:memory:"])
def test_tracking_uri_refuses_a_database_in_memory(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(
        ValueError, match=rf"^MLFLOW_TRACKING_URI must be a file or a server, got {re.escape(uri)}, which no other"
    ):
        tracking_uri(tmp_path)


@pytest.mark.parametrize(
    ("name", "works"), [("a b", True), ("100%", True), ("a#b", True), ("a%20b", False), ("a?b", False)]
)
def test_tracking_uri_refuses_a_folder_that_an_address_cannot_name(tmp_path, monkeypatch, name, works):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / name
    root.mkdir()
    if works:
        assert tracking_uri(root) == f"sqlite:///{root}/mlflow.db"
        return
    with pytest.raises(
        ValueError, match=r"has a \? or % in its name.*: rename that folder, or set MLFLOW_TRACKING_URI"
    ):
        tracking_uri(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri(root) == "http://mlflow:5000"


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:////srv/x.db", "/srv/x.db"),
        ("sqlite+pysqlite:////srv/my%20own.db?timeout=30", "/srv/my own.db"),
        ("sqlite:///:memory:", None),
        ("postgresql://db/x", None),
        ("http://mlflow:5000", None),
    ],
)
def test_database_file_is_the_one_that_sqlalchemy_opens(uri, file):
    assert database_file(uri) == (Path(file) if file else None)


def test_cache_is_readable_by_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(OSError, match=f"{folder} belongs to another user or is writable by others"):
        cache()
    folder.rename(tmp_path / "planted")
    folder.symlink_to(tmp_path / "planted")
    with pytest.raises(OSError, match="belongs to another user or is writable by others"):
        cache()


@pytest.mark.parametrize("folder", [temporary_folder, socket_folder])
def test_temporary_folders_go_with_the_block_and_those_of_the_dead_with_the_next(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    code = """
import os, sys
from pipeline.common import storage
block = getattr(storage, sys.argv[1])()
print(block.__enter__(), flush=True)
os._exit(1)
"""
    command = [sys.executable, "-c", code, folder.__name__]
    environment = os.environ | {"TMPDIR": "/tmp"}
    killed = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    left = Path(killed.stdout.strip())
    assert left.is_dir()
    with folder() as outer, folder() as inner:
        assert not left.exists()
        assert outer.is_dir()
        assert stat.S_IMODE(inner.stat().st_mode) == 0o700
    assert not outer.exists()
    assert not inner.exists()


def test_socket_folder_is_short_whatever_tmpdir_is(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    for system in (long, Path("/tmp")):
        monkeypatch.setattr(tempfile, "tempdir", str(system))
        with socket_folder() as folder:
            path = folder / "session_2026-11-28_14-24-02_123456_1234567/sockets/plasma_store"
            path.parent.mkdir(parents=True)
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))


def test_retry_unreachable_waits_for_a_store_and_logs_for_how_long(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    left = [OSError("away"), OSError("away")]

    def action() -> str:
        if left:
            raise left.pop()
        return "done"

    lines: list[str] = []
    assert retry_unreachable(action, UPath("memory://runs"), lines.append) == "done"
    assert len(lines) == 2
    assert lines[0] in (f"away; retrying for another {storage.PATIENCE_S - late} s" for late in range(5))


def test_retry_unreachable_raises_a_disks_error_at_once(tmp_path):
    def action() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        retry_unreachable(action, tmp_path, pytest.fail)


@pytest.mark.parametrize("place", ["{}", "memory://runs{}"])
def test_one_at_a_time_lets_one_into_the_block(tmp_path, place):
    folder = UPath(place.format(tmp_path)) if "://" in place else tmp_path
    assert most_inside(folder, 3, seconds=0.01) == [1, 1, 1]


def test_one_at_a_time_takes_the_lock_of_a_killed_process_after_a_while(tmp_path, monkeypatch):
    folder = UPath(f"memory://killed{tmp_path}")
    monkeypatch.setattr(storage, "LOCK_S", 0.2)
    (folder / "lock").write_text(f"{time.time()}")
    with one_at_a_time(folder):
        assert time.time() - float((folder / "lock").read_text()) < 0.2
    assert not (folder / "lock").exists()
    monkeypatch.setattr(storage, "LOCK_S", 60)
    monkeypatch.setattr(storage, "every", lambda pause_s, for_s: [0.1])
    (folder / "lock").write_text(f"{time.time()}")
    with pytest.raises(FileExistsError, match="lock is held by another process: wait for it"), one_at_a_time(folder):
        pytest.fail("two processes are in the block")


def test_home_of_an_experiment_copy_is_the_project_that_started_it(tmp_path, monkeypatch):
    copy, project = tmp_path / "project/.dvc/tmp/exps/tmp7", tmp_path / "project"
    monkeypatch.delenv("RUN_STORAGE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(project))
    assert run_storage(copy) == copy  # not run by DVC
    monkeypatch.setenv("DVC_STAGE", "train")
    assert (run_storage(copy), tracking_uri(copy)) == (project, f"sqlite:///{project}/mlflow.db")
    monkeypatch.delenv("DVC_ROOT")
    assert run_storage(copy) == copy
