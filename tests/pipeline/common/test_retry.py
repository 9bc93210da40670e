import time
from itertools import islice

import pytest

from pipeline.common.retry import every, retry


def failing(*errors: Exception):
    """Return an action that raises these errors, one per call, and then returns "done"."""
    left = list(errors)

    def action() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return action


def is_os_error(error: Exception) -> bool:
    return isinstance(error, OSError)


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def test_retry_returns_the_first_result_and_logs_each_error_with_its_pause(slept):
    first, second = OSError("first"), OSError("second")
    logged = []
    result = retry(failing(first, second), (1, 2, 4), is_os_error, lambda *arguments: logged.append(arguments))
    assert result == "done"
    assert logged == [(first, 1), (second, 2)]
    assert slept == [1, 2]


def test_retry_raises_the_error_of_the_last_attempt(slept):
    with pytest.raises(OSError, match="third"):
        retry(failing(OSError("first"), OSError("second"), OSError("third")), (1, 2), is_os_error)
    assert slept == [1, 2]


def test_retry_raises_at_once_what_will_not_pass(slept):
    with pytest.raises(ValueError, match="wrong"):
        retry(failing(ValueError("wrong")), (1, 2), is_os_error)
    assert slept == []


def test_every_repeats_its_pause_until_the_time_is_over(monkeypatch):
    now = iter([100.0, 100.0, 105.0, 109.9, 110.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    assert list(islice(every(2.5, for_s=10), 9)) == [2.5, 2.5, 2.5]
