"""Retry calls to stores, servers and downloads. Callers choose the pauses and which errors are temporary."""

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
    """Return `action()`. After an error that `may_pass`, wait for the next pause (seconds) and call it again.

    Calls `log(error, pause)` before each pause. Raises any other error at once, and the error after the last pause.
    """
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
    """Yield pauses of `pause_s` seconds until `for_s` seconds have passed."""
    deadline = time.monotonic() + for_s
    while time.monotonic() < deadline:
        yield pause_s
