"""Checks before anything starts on a cluster. With real nodes: tests/system/test_hosts.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray

from pipeline.cluster.preflight import preflight, probe_node, versions
from pipeline.common.environment import RAY_JOB_ENV, RUN_STORAGE_ENV
from pipeline.common.settings import load_settings
from pipeline.data.workspace import Workspace

HARDWARE = load_settings(Path(__file__).parents[3]).hardware


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch):
    """Pretend that a cluster of `count` nodes was joined by address or by a job. The nodes are not queried."""

    def set_nodes(count: int, joined_by: str) -> None:
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * count)
        for name in ("RAY_ADDRESS", RAY_JOB_ENV, RUN_STORAGE_ENV):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(joined_by, "10.0.0.1:6379")

    return set_nodes


def test_preflight_of_one_node_requires_nothing(nodes, tmp_path):
    nodes(1, "RAY_ADDRESS")
    preflight(HARDWARE, Workspace(tmp_path, tmp_path, None, "sqlite:///mlflow.db"))


@pytest.mark.parametrize(
    ("count", "joined_by", "workers", "why"),
    [
        (3, "RAY_ADDRESS", 1, "the cluster has 3 nodes"),
        (1, "RAY_ADDRESS", [1, 8], "more nodes may join the cluster"),
        (1, RAY_JOB_ENV, 1, "Ray deletes a job's folder after the job"),
    ],
)
def test_preflight_refuses_what_other_nodes_could_not_see(
    nodes, tmp_path, monkeypatch, count, joined_by, workers, why
):
    nodes(count, joined_by)
    hardware = replace(HARDWARE, num_workers=workers)
    with pytest.raises(
        ValueError, match=f"{why}.* but RUN_STORAGE is not set: set it to a folder that all nodes share"
    ):
        preflight(hardware, Workspace(tmp_path, tmp_path, None, "http://127.0.0.1:9"))
    monkeypatch.setenv("RUN_STORAGE", str(tmp_path / "shared"))
    for uri in ("sqlite:///x.db", "file:///x", "/mlruns"):
        with pytest.raises(ValueError, match=f"{why}.* but MLFLOW_TRACKING_URI is {uri}, a file"):
            preflight(hardware, Workspace(tmp_path, tmp_path / "shared", None, uri))


def probe(tmp_path: Path, **changes: object) -> str | None:
    file = tmp_path / "probe"
    file.write_text("")
    arguments = {"probe": file, "published": None, "tracking_uri": "http://us:secret@127.0.0.1:9"}
    return probe_node(**arguments | {"expected": versions()} | changes)  # type: ignore[arg-type]


def test_probe_node_names_another_version(tmp_path):
    problem = probe(tmp_path, expected=versions() | {"ray": "2.9.9"})
    assert problem is not None
    assert "'ray': '2.9.9'" in problem
    assert problem.endswith("give all nodes the same image")


def test_probe_node_names_storage_data_or_server_out_of_reach(tmp_path, monkeypatch):
    assert "set RUN_STORAGE to a folder that all nodes share" in str(probe(tmp_path, probe=tmp_path / "none"))
    assert str(probe(tmp_path, published=tmp_path / "none")).startswith("cannot read the corpus: ")
    assert str(probe(tmp_path)).startswith("gets no answer from http://127.0.0.1:9: set MLFLOW_TRACKING_URI")
    assert probe(tmp_path, tracking_uri="sqlite:///x.db") is None
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]
