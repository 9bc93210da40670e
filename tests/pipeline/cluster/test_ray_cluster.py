"""Clusters that cannot be joined, and the environment afterwards. Only a slow test starts Ray itself."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from pipeline.cluster.ray_cluster import needs_no_workers, ray_cluster
from pipeline.common.environment import RAY_JOB_ENV
from pipeline.common.settings import load_settings

REPOSITORY = Path(__file__).parents[3]
HARDWARE = load_settings(REPOSITORY).hardware


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Version mismatch: The cluster was started with: Ray: 2.9", "has other versions"),
        ("UNAUTHENTICATED: wrong\ntoken", "refuses the connection .*RAY_AUTH_TOKEN_PATH"),
        ("Failed to connect to GCS", "no Ray cluster answers at 10.0.0.1:6379"),
    ],
)
def test_ray_cluster_refused_by_ray_reports_the_reason_in_one_line(message, expected, monkeypatch, tmp_path):
    def refuse(**options: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr("pipeline.cluster.ray_cluster._require_answer", lambda address: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConnectionError, match=expected) as caught, ray_cluster(HARDWARE, tmp_path):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["nosuchhost.invalid:6379", "127.0.0.1:9", "10.0.0.1:port", "auto"])
def test_ray_cluster_without_a_head_is_reported_in_one_line(address, monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("ray.init would wait for minutes"))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:9\n")  # left by a killed cluster
    monkeypatch.setenv("RAY_ADDRESS", address)
    shown = "127.0.0.1:9" if address == "auto" else address
    expected = rf"^no Ray cluster answers at {shown} \(.*\); unset it to use this machine alone$"
    with pytest.raises(ConnectionError, match=expected) as caught, ray_cluster(HARDWARE, tmp_path):
        pass
    assert "\n" not in str(caught.value)


def test_ray_cluster_logs_that_it_waits_for_a_silent_head(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("pipeline.cluster.ray_cluster.ANSWER_S", 0.1)
    monkeypatch.setattr(ray, "init", lambda **options: time.sleep(0.3))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with ray_cluster(HARDWARE, tmp_path):
            pass
    assert capsys.readouterr().err.startswith("waiting for the Ray cluster at 127.0.0.1:")


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "http://10.0.0.1:8265"])
def test_ray_cluster_refuses_an_address_of_another_kind(address, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=r"must be host:port of the head"), ray_cluster(HARDWARE, tmp_path):
        pass


@pytest.mark.parametrize("dashboard", [True, False])
def test_ray_cluster_leaves_the_environment_as_it_was(dashboard, monkeypatch, tmp_path):
    during = {}
    monkeypatch.setattr(ray, "init", lambda **options: during.update(os.environ))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://another:8265")
    monkeypatch.setenv("RAY_worker_niceness", "7")
    before = dict(os.environ)
    with ray_cluster(HARDWARE, tmp_path, dashboard=dashboard):
        pass
    assert dict(os.environ) == before
    assert during.get("RAY_API_SERVER_ADDRESS") == (None if dashboard else "http://127.0.0.1:9")
    assert (during["RAY_worker_niceness"], during["RAY_enable_metrics_collection"]) == ("7", "0")


@pytest.mark.parametrize(
    ("workers", "joined_by", "expected"),
    [
        (1, None, True),
        ([1, 1], None, True),
        (2, None, False),
        ([1, 2], None, False),
        (1, "RAY_ADDRESS", False),
        (1, RAY_JOB_ENV, False),
    ],
)
def test_needs_no_workers_is_true_of_one_worker_outside_a_cluster(workers, joined_by, expected, monkeypatch):
    for name in ("RAY_ADDRESS", RAY_JOB_ENV):
        monkeypatch.delenv(name, raising=False)
    if joined_by:
        monkeypatch.setenv(joined_by, "10.0.0.1:6379")
    assert needs_no_workers(replace(HARDWARE, num_workers=workers)) == expected


@pytest.mark.parametrize("failures", [1, 2])
def test_ray_cluster_retries_a_failed_start_once(failures, monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    calls = []

    def init(**options: object) -> None:
        calls.append("init")
        if calls.count("init") <= failures:
            raise RuntimeError("The current node timed out during startup")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    if failures == 1:
        with ray_cluster(HARDWARE, tmp_path):
            calls.append("work")
        assert calls == ["init", "shutdown", "init", "work", "shutdown"]
    else:
        with (
            pytest.raises(ConnectionError, match=r"^Ray did not start on this machine: .* timed out"),
            ray_cluster(HARDWARE, tmp_path),
        ):
            pass
        assert calls == ["init", "shutdown"] * 2


LISTENERS = """
import os, sys
from pathlib import Path
import pipeline
import psutil, ray
from pipeline.cluster.ray_cluster import ray_cluster
from pipeline.common.settings import load_settings
with ray_cluster(load_settings(Path(sys.argv[1])).hardware, Path()):
    assert ray.get(ray.remote(lambda: 5).remote()) == 5
    ours = psutil.Process().children(recursive=True)
    ports = [c.laddr.ip for p in ours for c in p.net_connections("inet") if c.status == "LISTEN"]
    print(*ports, os.environ["RAY_AUTH_TOKEN_PATH"])
"""


@pytest.mark.slow
def test_ray_cluster_started_here_is_reached_by_nobody_else_and_leaves_nothing(tmp_path):
    """It needs neither a home folder nor a short TMPDIR."""
    tmpdir = tmp_path / ("x" * 120)
    tmpdir.mkdir()
    left_out = ("RAY_", "HOME", "TMPDIR")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    environment |= {"HOME": "/proc", "TMPDIR": str(tmpdir), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", LISTENERS, str(REPOSITORY)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *ports, token = done.stdout.split()
    assert len(ports) >= 5  # raylet, GCS and others
    assert set(ports) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert not Path(token).parent.exists()
