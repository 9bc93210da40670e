"""The output of `python -m pipeline.doctor` for a sound project and for broken ones."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import doctor
from tests.support.settings_files import copy_settings, edit

REPOSITORY = Path(__file__).parents[2]
VARIABLES = ("MLFLOW_TRACKING_URI", "RUN_STORAGE", "GIT_COMMIT", "GIT_DIRTY", "DVC_SITE_CACHE_DIR", "DVC_STAGE")
SECRET = "do-not-print-me"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound project in which no stage has run, as the current folder, without this machine's configuration."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    root = tmp_path / "project"
    root.mkdir(mode=0o755)
    copy_settings(root)
    shutil.copy(REPOSITORY / "constraints.txt", root)
    (root / ".dvc").mkdir()
    set_dvc(root, f"[core]\nsite_cache_dir = {root / 'cache'}\n")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "begin")
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    return root


def git(root: Path, *arguments: str) -> None:
    author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", str(root), *author, *arguments], check=True)


def set_dvc(root: Path, text: str) -> None:
    (root / ".dvc/config").write_text(text)


def make_store(file: Path) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("create table runs (lifecycle_stage text)")
        database.executemany("insert into runs values (?)", [("active",), ("active",), ("deleted",)])


def files(root: Path) -> dict[str, bytes]:
    """Return {path: content} of all files except Git's."""
    found = (path for path in root.rglob("*") if path.is_file() and not {".git"} & set(path.parts))
    return {str(path): path.read_bytes() for path in found}


def assert_fits_one_screen(shown: str) -> None:
    lines = shown.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80


def marked(shown: str) -> list[str]:
    """Return the names of the marked lines."""
    return [line[2:].split()[0] for line in shown.splitlines() if line.startswith("!")]


def test_doctor_shows_a_sound_project_without_a_mark_and_makes_nothing(root, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = files(root)
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    shown = capsys.readouterr()
    assert (ended.value.code, shown.err) == (0, "")
    assert marked(shown.out) == []
    assert_fits_one_screen(shown.out)
    assert [line[2:11].strip() for line in shown.out.splitlines() if line[2:3].strip()] == list(doctor.CHECKS)
    for text in ("as pinned", "data grammar, model mini", "not made yet", "GiB free", "private", "no stage", "clean"):
        assert text in shown.out
    assert files(root) == before


BROKEN_PACKAGES = {
    "torch": "raise ImportError('libtorch.so: cannot open shared object file')",
    "pydantic": "raise RuntimeError('half installed')",
    "dvc": "this is no Python",
}


def test_doctor_with_everything_broken_shows_one_screen_and_no_traceback(root):
    for name, code in BROKEN_PACKAGES.items():
        (root / f"{name}.py").write_text(code)
    (root / "constraints.txt").write_text("torch==1.0\nray==1.0\nmlflow==1.0\ndvc==1.0\nctranslate2==1.0\n")
    (root / "params.yaml").write_text("model: [")
    (root / "mlflow.db").write_text("this is not a database, but a text that is long enough for one " * 20)
    (root / "dvc.lock").write_text("")
    shutil.rmtree(root / ".git")
    variables = os.environ | {"PYTHONPATH": f"{root}:{REPOSITORY}", "RUN_STORAGE": f"runs/{SECRET * 100}"}
    command = [sys.executable, "-m", "pipeline.doctor"]
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert set(marked(done.stdout)) == set(doctor.CHECKS) - {"cpu"}
    assert_fits_one_screen(done.stdout)


@pytest.mark.parametrize("module", ["pipeline.doctor", "pipeline.train"])
def test_command_in_a_python_without_the_packages_ends_with_one_line(tmp_path, module):
    (tmp_path / "psutil.py").write_text("raise ModuleNotFoundError(\"No module named 'psutil'\")")
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"No module named 'psutil' for {sys.executable}: {doctor.INSTALL}\n"


def test_examine_turns_any_exception_into_a_marked_line_with_the_way_out(root):
    def fails(error: Exception):
        def check(_: Path) -> str:
            raise error

        return doctor.examine(check, root)

    assert fails(ValueError("x is 3: set it to 2")) == (True, "x is 3: set it to 2")
    assert fails(ImportError("No module named 'ray'")) == (True, f"No module named 'ray': {doctor.INSTALL}")
    assert fails(PermissionError(13, "Permission denied", "data")) == (True, "data: Permission denied")
    assert fails(ConnectionError("no answer: start it")) == (True, "no answer: start it")
    assert fails(KeyError("core")) == (True, "KeyError: 'core'")
    assert doctor.examine(lambda _: "well", root) == (False, "well")


@pytest.mark.parametrize("long", ["word " * 200, "x" * 900, f"{'x' * 60} " * 9], ids=["words", "a word", "paths"])
def test_layout_keeps_the_way_out_of_a_long_text_and_no_password(long):
    text = f"http://us:{SECRET}@host {long}: do this"
    shown = doctor.layout("mlflow", text, True)
    assert shown.startswith("! mlflow    http://host")
    assert " ".join(shown.split()).endswith(": do this")
    assert SECRET not in shown
    assert 2 <= len(shown.splitlines()) <= doctor.MAX_LINES
    assert max(map(len, shown.splitlines())) <= doctor.WIDTH
    shown = doctor.layout("mlflow", text, False)
    assert shown.startswith("  mlflow    http://host")
    assert shown.endswith("\n            ...")
    assert len(shown.splitlines()) == doctor.MAX_LINES


def test_versions_marks_what_is_missing_or_not_the_pin(root, monkeypatch):
    installed = {"torch": "2.13.0+cpu", "ray": "2.59.0", "mlflow": "3.17.2", "dvc": "3.67.1", "ctranslate2": "4.8.5"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(
        ValueError, match=r"torch 2\.13\.0\+cpu, ray 2\.59\.0 \(pinned: 2\.60\.0\), .* sentencepiece missing"
    ):
        doctor.versions(root)
    (root / "constraints.txt").unlink()
    with pytest.raises(ValueError, match=r"ray 2\.59\.0, mlflow .* sentencepiece missing.*: make .venv/installed"):
        doctor.versions(root)
    installed["sentencepiece"] = "0.2.3"
    assert doctor.versions(root).endswith("sentencepiece 0.2.3, ctranslate2 4.8.5: constraints.txt is not here")


def test_gpu_counts_the_cards_and_names_those_without_bf16(root, monkeypatch):
    cards = [SimpleNamespace(name=name, total_memory=80 << 30, major=major) for name, major in CARDS]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    assert doctor.gpu(root) == "2 x H100, 80.0 GiB, bf16; 1 x V100, 80.0 GiB, no bf16"


CARDS = [("H100", 9), ("V100", 7), ("H100", 9)]


def test_gpu_that_torch_cannot_use_is_marked(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    with pytest.raises(ValueError, match=r"cannot use the GPU of this machine: install torch's build for CUDA"):
        doctor.gpu(root)


def test_settings_names_presets_and_changes_or_the_faulty_key(root):
    edit(root, "model", dropout=0.25)
    assert doctor.settings(root) == "params.yaml is valid: data grammar, model mini; changed: model.dropout 0.25"
    edit(root, "model", dropout=1.5)
    with pytest.raises(ValueError, match=r"model\.dropout"):
        doctor.settings(root)


def test_mlflow_counts_the_runs_of_a_file_and_leaves_it_as_it_is(root):
    file = root / "mlflow.db"
    make_store(file)
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert doctor.mlflow(root) == f"sqlite:///{file}, runs: 2"
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    file.write_bytes(b"")
    assert doctor.mlflow(root) == f"sqlite:///{file}, not made yet"


@pytest.mark.parametrize("content", [b"not a database, however long it is. " * 40, None])
def test_mlflow_marks_a_file_that_is_no_store(root, content):
    file = root / "mlflow.db"
    if content:
        file.write_bytes(content)
    else:  # as after a kill during the migrations
        make_store(file)
        with closing(sqlite3.connect(file)) as database, database:
            database.execute("alter table runs rename to other")
    with pytest.raises(ValueError, match=r"mlflow\.db cannot be read, .*: move mlflow\.db away to begin a new store"):
        doctor.mlflow(root)


def test_mlflow_does_not_send_away_a_file_that_another_process_writes_to(root, monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE_S", 0.05)
    make_store(root / "mlflow.db")
    with closing(sqlite3.connect(root / "mlflow.db", isolation_level=None)) as writer:
        writer.execute("begin exclusive")
        with pytest.raises(ValueError, match=r"database is locked: try again when no run writes to it"):
            doctor.mlflow(root)


KILLED_WHILE_IT_WRITES = """
import os, signal, sqlite3
database = sqlite3.connect("mlflow.db", isolation_level=None)
database.execute("pragma cache_size = 2")
database.execute("begin")
database.executemany("insert into runs values (?)", [("x" * 200,)] * 1000)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_mlflow_leaves_the_journal_of_a_killed_run_to_the_next(root):
    make_store(root / "mlflow.db")
    subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_WRITES], cwd=root, check=False)
    before = files(root)
    assert any(name.endswith("-journal") for name in before)
    assert "a kill left a journal beside it, which the next run takes back" in doctor.mlflow(root)
    assert files(root) == before


class MlflowServer(ThreadingHTTPServer):
    """Answers like MLflow's server with two runs. With a status other than 200, it refuses all but /health."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), MlflowAnswers)
        self.status = status
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://us:{SECRET}@127.0.0.1:{self.server_port}"


class MlflowAnswers(BaseHTTPRequestHandler):
    server: MlflowServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        health = self.path == "/health"
        run = {"info": {"run_id": "a", "experiment_id": "1", "status": "FINISHED", "lifecycle_stage": "active"}}
        answer = {"experiments": [{"experiment_id": "1", "name": "a"}], "runs": [run, run]}
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200 if health else self.server.status)
        self.end_headers()
        refused = not health and self.server.status != 200
        self.wfile.write(b"You are not authenticated." if refused else json.dumps(answer).encode())

    do_POST = do_GET  # noqa: N815


@pytest.fixture
def served(request: pytest.FixtureRequest, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    """Start MlflowServer and set MLFLOW_TRACKING_URI to its address, with a password."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # set from the address; restored after the test
    server = MlflowServer(getattr(request, "param", 200))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    yield server
    server.shutdown()
    server.server_close()


def test_mlflow_counts_the_runs_of_a_server(root, served):
    assert doctor.mlflow(root) == f"http://127.0.0.1:{served.server_port} answers, runs: 2"


@pytest.mark.parametrize("served", [401], indirect=True)
def test_mlflow_marks_a_server_that_refuses_and_prints_no_password(root, served, capfd):
    wrong, text = doctor.examine(doctor.mlflow, root)
    shown = doctor.layout("mlflow", text, wrong) + "".join(capfd.readouterr())
    assert "401" in text
    assert shown.startswith("! mlflow")
    assert "MLFLOW_TRACKING_PASSWORD right?" in " ".join(shown.split())
    assert SECRET not in shown


def test_mlflow_does_not_wait_for_a_server_that_is_silent(root, monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        started = time.monotonic()
        with pytest.raises(ConnectionError, match=rf"{address} does not answer: start that server"):
            doctor.mlflow(root)
        assert time.monotonic() - started < 2


def test_mlflow_does_not_query_other_stores(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://us:{SECRET}@db/mlflow")
    assert doctor.mlflow(root) == "postgresql://db/mlflow, not asked: it is neither a server nor an SQLite file"


def test_storage_names_a_folder_that_is_not_made_yet_and_does_not_make_it(root, monkeypatch):
    monkeypatch.setenv("RUN_STORAGE", str(root / "new" / "runs"))
    assert doctor.storage(root).startswith(f"RUN_STORAGE {root}/new/runs, ")
    assert not (root / "new").exists()


def test_storage_marks_what_cannot_hold_runs(root, monkeypatch):
    (root / "file").touch()
    monkeypatch.setenv("RUN_STORAGE", str(root / "file" / "runs"))
    with pytest.raises(ValueError, match=r"file is not a folder that you may write to: .* set RUN_STORAGE"):
        doctor.storage(root)
    monkeypatch.setenv("RUN_STORAGE", "runs")
    with pytest.raises(ValueError, match=r"RUN_STORAGE must be an absolute path or a URI"):
        doctor.storage(root)
    monkeypatch.delenv("RUN_STORAGE")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=300 << 20))
    with pytest.raises(ValueError, match=r"project has 0\.3 GiB free: remove old runs from its checkpoints/"):
        doctor.storage(root)


class Store:
    """Stands for a path in an object store. `exists` returns a value or raises."""

    parents: tuple["Store", ...] = ()

    def __init__(self, exists) -> None:
        self.exists = exists

    def __str__(self) -> str:
        return "s3://bucket/runs"


def refuse() -> bool:
    raise OSError("s3://bucket/runs cannot be reached: no credentials")


@pytest.mark.parametrize(
    ("exists", "line"),
    [
        (lambda: True, "RUN_STORAGE s3://bucket/runs answers"),
        (lambda: False, "s3://bucket/runs is not there, nor is its bucket: make that, or correct RUN_STORAGE"),
        (refuse, r"no credentials: correct RUN_STORAGE, or the address and the credentials"),
        (lambda: time.sleep(1), r"no answer from s3://bucket/runs within 0.05 s: correct RUN_STORAGE"),
    ],
    ids=["answers", "no bucket", "refuses", "silent"],
)
def test_storage_queries_an_object_store_once(root, monkeypatch, exists, line):
    monkeypatch.setattr(doctor, "PATIENCE_S", 0.05)
    monkeypatch.setattr("pipeline.common.storage.run_storage", lambda _: Store(exists))
    wrong, text = doctor.examine(doctor.storage, root)
    assert line in text
    assert wrong == (not line.endswith("answers"))


def test_dvc_marks_a_site_cache_that_others_may_write_to(root):
    cache = root / "cache"
    assert doctor.dvc(root) == f"site cache {cache}, private; no default remote"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(ValueError, match=r"others may write to the site cache .*/cache, .*: make site-cache"):
        doctor.dvc(root)
    cache.chmod(0o700)
    set_dvc(root, "[core]\n")  # DVC's default folder
    with pytest.raises(ValueError, match=r"others may write to the site cache /var/tmp/dvc, .*: make site-cache"):
        doctor.dvc(root)


def test_dvc_names_the_remote_and_shows_nothing_else_of_it(root):
    with (root / ".dvc/config").open("a") as config:
        config.write(f"remote = shared\n['remote \"shared\"']\nurl = ssh://host/x\npassword = {SECRET}\n")
    assert doctor.dvc(root).endswith("private; remote shared")


def test_dvc_marks_a_configuration_that_is_broken_or_missing(root):
    set_dvc(root, "[core\n")
    with pytest.raises(ValueError, match=r"config file error: .*: correct \.dvc/config or \.dvc/config\.local"):
        doctor.dvc(root)
    shutil.rmtree(root / ".dvc")
    with pytest.raises(ValueError, match=r"no folder \.dvc here: run from the project's root folder"):
        doctor.dvc(root)


def test_dvc_lock_names_the_stages_that_have_run_or_the_way_out(root):
    (root / "dvc.lock").write_text("schema: '2.0'\nstages:\n  download:\n    cmd: a\n  train:\n    cmd: b\n")
    assert doctor.dvc_lock(root) == "download, train"
    (root / "dvc.lock").write_text("")
    with pytest.raises(ValueError, match=r"dvc\.lock is empty, .*: rm dvc\.lock"):
        doctor.dvc_lock(root)


def test_git_shows_the_commit_and_whether_code_or_settings_differ(root, monkeypatch):
    assert doctor.git(root).endswith(", clean")
    edit(root, "train", seed=7)
    assert doctor.git(root).endswith(", dirty: code or settings differ")
    shutil.rmtree(root / ".git")
    with pytest.raises(ValueError, match=r"no repository, or no commit in it, .*: git init"):
        doctor.git(root)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="git is not installed, and DVC needs it: install it"):
        doctor.git(root)
    monkeypatch.setenv("GIT_COMMIT", "0123456789abcdef")
    assert doctor.git(root) == "commit 0123456789ab (by GIT_COMMIT)"
