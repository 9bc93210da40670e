"""What is said of a cluster before anything starts on it. Ray itself stands for nothing here: tests/system has it."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cluster import ray_cluster as cluster
from pipeline.common.settings import load_settings

HARDWARE = load_settings(Path(__file__).parents[3]).hardware


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch):
    """Call it with the nodes' CPUs and GPUs."""

    def set_rooms(*found: dict[str, float]) -> None:
        nodes = [{"Alive": True, "Resources": room} for room in found]
        monkeypatch.setattr(cluster.ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99}}])

    return set_rooms


def share(workers: int | list[int], device: str = "auto", cpus: int = 0) -> tuple[bool, int]:
    return cluster.share_of_each_worker(
        replace(HARDWARE, num_workers=workers, device=device, cpus_per_worker=cpus)  # type: ignore[arg-type]
    )


def test_cpus_are_shared_out_as_far_as_each_worker_fits_on_one_node(rooms):
    rooms({"CPU": 7})
    assert share(1) == (False, 7)
    assert share(3) == (False, 2)
    rooms({"CPU": 5}, {"CPU": 3})
    assert share(2) == (False, 3)
    assert share(3) == (False, 2)  # two on the first
    assert share(8) == (False, 1)


def test_gpus_are_taken_if_there_are_enough_of_them(rooms):
    rooms({"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1})
    assert share(3) == (True, 4)
    assert share(4) == (False, 4)
    assert share([2, 5]) == (True, 8)  # 3 can have a GPU


def test_more_workers_than_there_can_ever_be_are_refused_with_the_setting(rooms):
    rooms({"CPU": 2}, {"CPU": 3})
    with pytest.raises(
        ValueError, match=r"^hardware.num_workers is 6, with 1 CPUs each: .* 5 on 2 nodes, room for 5"
    ):
        share(6)
    with pytest.raises(ValueError, match=r"num_workers is 2, with 3 CPUs each: .* room for 1; lower it, or hardware"):
        share(2, cpus=3)
    with pytest.raises(ValueError, match=r"num_workers is 1, with a GPU each: the cluster has 0"):
        share(1, device="gpu")
    assert share([5, 9]) == (False, 1)
    with pytest.raises(ValueError, match=r"num_workers is \[6, 9\]"):
        share([6, 9])


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch):
    """A cluster of so many nodes, joined by address or by a job; checks stop where they would ask the nodes."""

    def set_nodes(count: int, joined_by: str | None) -> None:
        monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True}] * count)
        for name in ("RAY_ADDRESS", cluster.JOB, "RUN_STORAGE"):
            monkeypatch.delenv(name, raising=False)
        if joined_by:
            monkeypatch.setenv(joined_by, "10.0.0.1:6379")

    return set_nodes


@pytest.mark.parametrize(("count", "joined_by"), [(1, None), (1, "RAY_ADDRESS")])
def test_one_node_of_ones_own_needs_nothing(nodes, tmp_path, count, joined_by):
    nodes(count, joined_by)
    cluster.preflight(HARDWARE, tmp_path, tmp_path, None, "sqlite:///mlflow.db")


@pytest.mark.parametrize(
    ("count", "joined_by", "workers", "why"),
    [
        (3, "RAY_ADDRESS", 1, "the cluster has 3 nodes"),
        (1, "RAY_ADDRESS", [1, 8], "more nodes may join the cluster"),
        (1, cluster.JOB, 1, "a job's folder is thrown away with it"),
    ],
)
def test_local_storage_and_a_tracking_file_are_refused_where_others_could_not_see_them(
    nodes, tmp_path, monkeypatch, count, joined_by, workers, why
):
    nodes(count, joined_by)
    hardware = replace(HARDWARE, num_workers=workers)
    with pytest.raises(ValueError, match=f"{why}.* and RUN_STORAGE is not set: name a folder that all nodes see"):
        cluster.preflight(hardware, tmp_path, tmp_path, None, "http://127.0.0.1:9")
    monkeypatch.setenv("RUN_STORAGE", str(tmp_path / "shared"))
    for uri in ("sqlite:///x.db", "file:///x", "/mlruns"):
        with pytest.raises(ValueError, match=f"{why}.* and MLFLOW_TRACKING_URI is {uri}, a file"):
            cluster.preflight(hardware, tmp_path, tmp_path / "shared", None, uri)


def look(tmp_path: Path, **changes: object) -> str | None:
    probe = tmp_path / "probe"
    probe.write_text("")
    arguments = {"probe": probe, "published": None, "tracking_uri": "http://us:secret@127.0.0.1:9"}
    return cluster.probe_node(**arguments | {"expected": cluster.versions()} | changes)  # type: ignore[arg-type]


def test_a_node_with_another_version_says_which(tmp_path):
    problem = look(tmp_path, expected=cluster.versions() | {"ray": "2.9.9"})
    assert problem is not None
    assert "'ray': '2.9.9'" in problem
    assert problem.endswith("give all nodes the same image")


def test_a_node_that_cannot_use_the_storage_or_read_the_data_or_ask_the_server_says_so(tmp_path, monkeypatch):
    assert "set RUN_STORAGE to a folder that all nodes see" in str(look(tmp_path, probe=tmp_path / "none"))
    assert str(look(tmp_path, published=tmp_path / "none")).startswith("cannot read the corpus: ")
    assert str(look(tmp_path)).startswith("gets no answer from http://127.0.0.1:9: set MLFLOW_TRACKING_URI")
    assert look(tmp_path, tracking_uri="sqlite:///x.db") is None
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Version mismatch: The cluster was started with: Ray: 2.9", "has another version"),
        ("UNAUTHENTICATED: wrong\ntoken", "refuses us .*RAY_AUTH_TOKEN_PATH"),
        ("Failed to connect to GCS", "no Ray cluster answers at 10.0.0.1:6379"),
    ],
)
def test_what_ray_says_in_many_lines_becomes_one(said, expected, monkeypatch, tmp_path):
    def refuse(**options: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(cluster.ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConnectionError, match=expected) as caught, cluster.ray_cluster(HARDWARE, tmp_path):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "http://10.0.0.1:8265"])
def test_an_address_for_other_uses_is_refused(address, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=r"host:port of the head is needed"), cluster.ray_cluster(HARDWARE, tmp_path):
        pass
