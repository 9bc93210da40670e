"""The network interface that workers use. Real process groups: tests/system."""

import os

import psutil
import pytest
import ray

from pipeline.cluster.reachable_torch import ReachableTorch


class Workers(list):
    """Runs in this process what a backend executes on all workers."""

    def execute(self, function, *arguments, **named):
        return [function(*arguments, **named) for _ in self]

    def execute_single(self, rank, function, *arguments, **named):
        raise InterruptedError(function.__name__)  # Ray's backend starts to make the process group

    def get_resources_per_worker(self):
        return {"CPU": 1}


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Unset the variables of Gloo and NCCL, on a node that Ray reaches through the loopback interface."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    return names


def start(num_workers: int) -> None:
    config = ReachableTorch()
    config.backend_cls().on_start(Workers(range(num_workers)), config)


def test_reachable_torch_names_the_interface_before_the_group_is_made(interfaces):
    with pytest.raises(InterruptedError):
        start(2)
    (loopback,) = {os.environ[name] for name in interfaces}
    assert "127.0.0.1" in {known.address for known in psutil.net_if_addrs()[loopback]}


def test_reachable_torch_keeps_an_interface_that_the_user_names(interfaces, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    with pytest.raises(InterruptedError):
        start(2)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_reachable_torch_makes_no_group_of_one_worker(interfaces):
    start(1)
    assert not any(name in os.environ for name in interfaces)
