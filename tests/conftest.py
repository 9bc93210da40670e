import signal
from collections.abc import Iterator

import pytest


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
