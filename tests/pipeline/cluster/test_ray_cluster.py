"""A cluster that cannot be joined, and the environment after one. Ray itself does not start here."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from pipeline.cluster.ray_cluster import needs_no_workers, ray_cluster
from pipeline.common.environment import RAY_JOB_ENV
from pipeline.common.settings import load_settings

HARDWARE = load_settings(Path(__file__).parents[3]).hardware


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Version mismatch: The cluster was started with: Ray: 2.9", "has another version"),
        ("UNAUTHENTICATED: wrong\ntoken", "refuses us .*RAY_AUTH_TOKEN_PATH"),
        ("Failed to connect to GCS", "no Ray cluster answers at 10.0.0.1:6379"),
    ],
)
def test_ray_cluster_refused_by_ray_says_why_in_one_line(message, expected, monkeypatch, tmp_path):
    def refuse(**options: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConnectionError, match=expected) as caught, ray_cluster(HARDWARE, tmp_path):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "http://10.0.0.1:8265"])
def test_ray_cluster_refuses_an_address_of_another_kind(address, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=r"host:port of the head is needed"), ray_cluster(HARDWARE, tmp_path):
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
def test_one_worker_needs_no_workers_of_ray_but_on_a_cluster(workers, joined_by, expected, monkeypatch):
    for name in ("RAY_ADDRESS", RAY_JOB_ENV):
        monkeypatch.delenv(name, raising=False)
    if joined_by:
        monkeypatch.setenv(joined_by, "10.0.0.1:6379")
    assert needs_no_workers(replace(HARDWARE, num_workers=workers)) == expected
