"""Resources per worker on made-up nodes and on this machine."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from pipeline.cluster.resources import share_of_each_worker
from pipeline.common.settings import load_settings

HARDWARE = load_settings(Path(__file__).parents[3]).hardware


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets the CPUs and GPUs of the cluster's nodes."""

    def set_nodes(*found: dict[str, float]) -> None:
        alive = [{"Alive": True, "Resources": resources} for resources in found]
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 99}}])

    return set_nodes


def share(workers: int | list[int], device: str = "auto", cpus: int = 0) -> tuple[bool, int]:
    return share_of_each_worker(
        replace(HARDWARE, num_workers=workers, device=device, cpus_per_worker=cpus)  # type: ignore[arg-type]
    )


def test_share_of_each_worker_gives_cpus_as_far_as_each_fits_on_one_node(nodes):
    nodes({"CPU": 7})
    assert share(1) == (False, 7)
    assert share(3) == (False, 2)
    nodes({"CPU": 5}, {"CPU": 3})
    assert share(2) == (False, 3)
    assert share(3) == (False, 2)  # two workers on the first node
    assert share(8) == (False, 1)


def test_share_of_each_worker_takes_gpus_if_there_are_enough(nodes):
    nodes({"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1})
    assert share(3) == (True, 4)
    assert share(4) == (False, 4)
    assert share([2, 5]) == (True, 8)  # GPUs for 3 workers only


def test_share_of_each_worker_refuses_too_many_workers_with_the_setting(nodes):
    nodes({"CPU": 2}, {"CPU": 3})
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


def test_share_of_each_worker_without_ray_is_of_this_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert share(1) == (False, 7)
    with pytest.raises(ValueError, match=r"num_workers is 1, with 8 CPUs each: the cluster has 7 on 1 nodes"):
        share(1, cpus=8)
    with pytest.raises(ValueError, match=r"num_workers is 1, with a GPU each: the cluster has 0"):
        share(1, device="gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert share(1) == (True, 7)
    assert share(1, device="cpu") == (False, 7)
