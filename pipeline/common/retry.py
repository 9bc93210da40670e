"""How the project tries again: stores, servers and downloads differ in pauses and in which errors may pass."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def retry(
    action: Callable[[], T],
    pauses_s: Iterable[float],
    may_pass: Callable[[Exception], bool],
    log: Callable[[Exception, float], object] = lambda error, pause_s: None,
) -> T:
    """What `action` returns. After an error that may pass it is called again, once for each pause; `log` is told of
    the error and the pause. The last error is raised, and any other at once."""
    for pause_s in pauses_s:
        try:
            return action()
        except Exception as error:
            if not may_pass(error):
                raise
            log(error, pause_s)
        time.sleep(pause_s)
    return action()


def every(pause_s: float, for_s: float) -> Iterator[float]:
    """The pauses between attempts that go on for `for_s` seconds."""
    deadline = time.monotonic() + for_s
    while time.monotonic() < deadline:
        yield pause_s
