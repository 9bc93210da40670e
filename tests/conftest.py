import os
import signal
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Give each process of pytest-xdist one thread: with two each, they would compete for two cores."""
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest-xdist, start the file of tests/system first: it takes longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: "tests/system/" not in item.nodeid)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let commands be stopped even if the tests run as a background job, which ignores SIGINT, or under nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def own_threads() -> Iterator[None]:
    """Restore torch's number of threads after the test."""
    import torch  # not at the top: most tests of infra/ do not need torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
