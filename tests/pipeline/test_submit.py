"""The files that a job uploads, and the checks before. With a real cluster: tests/system/test_hosts.py."""

import json
import shutil
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants
from ray._private.runtime_env import packaging

from pipeline.submit import connect, job_environment

ROOT = Path(__file__).parents[2]
SECRETS = [
    ".aws/credentials",
    ".dvc/cache/files/md5/00/11",
    ".dvc/config.local",
    ".env",
    ".mlflow/credentials",
    ".netrc",
    ".ray/auth_token",
    ".ssh/id_ed25519",
    "conf/id_rsa",
    "conf/model/token",
    "credentials.json",
    "id_rsa",
    "infra/secrets/token",
    "mlflow.db",
    "mlflow.db-wal",
    "model/.netrc",
    "pipeline/common/server.key",
    "pipeline/private/key.py",
    "pipeline/secrets.env",
    "secrets.env",
    "server.key",
    "sweeps/.aws/credentials",
]
DATA = ["data/raw/train.en", "data/encoded/meta.json", "checkpoints/run/step_00000001/state.json", "models/final/x"]
CACHES = ["mlartifacts/1/x", "reports/table3.html", ".git/config", ".venv/bin/python", "model/__pycache__/x.pyc"]
CODE_AND_SETTINGS = ("conf/", "model/", "pipeline/", "sweeps/")


def test_upload_is_code_and_settings_and_nothing_else(tmp_path: Path) -> None:
    """Makes Ray's package for `pipeline.submit` and `ray job submit` of a project that has secrets in it."""
    folder = tmp_path / "project"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in (*SECRETS, *DATA, *CACHES, "dvc.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    target = tmp_path / "package.zip"
    excludes = ray_constants.get_runtime_env_default_excludes()
    packaging.create_package(str(folder), target, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(target) as package:
        uploaded = set(package.namelist())
    needed = {name for name in tracked if name.startswith(CODE_AND_SETTINGS)}
    assert uploaded == needed | {"params.yaml", "dvc.lock"}


def test_job_environment_has_storage_tracking_commit_and_more(monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "abc")
    monkeypatch.setenv("GIT_DIRTY", "false")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    found = job_environment(ROOT, "s3://bucket/runs", "http://mlflow:5000", {"OMP_NUM_THREADS": "3"})
    assert found["RUN_STORAGE"] == "s3://bucket/runs"
    assert found["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert (found["GIT_COMMIT"], found["GIT_DIRTY"], found["OMP_NUM_THREADS"]) == ("abc", "false", "3")
    assert "a secret" not in found.values()


@pytest.mark.parametrize(
    ("storage", "tracking_uri", "fault"),
    [
        (None, "http://mlflow:5000", "RUN_STORAGE .* must be an absolute path .*, got nothing"),
        ("runs", "http://mlflow:5000", "RUN_STORAGE .* must be an absolute path .*, got runs"),
        ("/srv/runs", None, "MLFLOW_TRACKING_URI .* must be the address of a server .*, got nothing"),
        (
            "/srv/runs",
            "sqlite:///mlflow.db",
            "MLFLOW_TRACKING_URI .* must be the address .*, got sqlite:///mlflow.db",
        ),
        ("ftp://us:secret@host/runs", "http://mlflow:5000", "RUN_STORAGE contains a password, and the"),
        ("/srv/runs", "http://us:secret@mlflow:5000", "MLFLOW_TRACKING_URI contains a password, and the"),
    ],
)
def test_job_environment_refuses_what_other_machines_could_not_use(storage, tracking_uri, fault):
    with pytest.raises(ValueError, match=f"^{fault}"):
        job_environment(ROOT, storage, tracking_uri, {})


def test_connect_names_the_option_if_no_dashboard_answers():
    with pytest.raises(ConnectionError, match=r"^no Ray dashboard answers at http://127\.0\.0\.1:9 .*--address"):
        connect("http://127.0.0.1:9")


def test_connect_refuses_another_version_of_ray() -> None:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"version": "4", "ray_version": "2.9.9", "ray_commit": ""}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(ConnectionError, match=rf"runs Ray 2\.9\.9, but this machine has {ray.__version__}"):
                connect(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
