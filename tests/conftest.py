import os
import signal
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """A process of pytest-xdist has one core: two threads in each of two processes would wait for each other."""
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest-xdist, the file that takes longest comes first: that of tests/system."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: "tests/system/" not in item.nodeid)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C counts, even if these tests are a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def own_threads() -> Iterator[None]:
    """What a test sets of torch's threads ends with it."""
    import torch  # here: most tests of infra/ do without

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
