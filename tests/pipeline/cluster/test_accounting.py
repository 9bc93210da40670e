"""The cost of a run, measured with a fake clock."""

import json
import time
from pathlib import Path

import pytest

from pipeline.cluster import accounting
from pipeline.cluster.accounting import (
    USAGE_INTERVAL_S,
    Usage,
    UsageRecorder,
    carry_usage,
    has_begun_since,
    total_usage,
)
from pipeline.common import periodic


class Clock:
    """Replaces the module `time`. The wall clock includes the date, the monotonic clock does not."""

    def __init__(self) -> None:
        self.now = 5_000.0
        self.num_asked = 0

    def time(self) -> float:
        return 1_700_000_000.0 + self.now

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        self.num_asked += 1
        return int(self.time() * 1e9) + self.num_asked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(accounting, "time", clock)
    monkeypatch.setattr(periodic, "time", clock)
    return clock


def attempt(clock: Clock, folder: Path, devices: int, steps: int, seconds_a_step: float) -> UsageRecorder:
    recorder = UsageRecorder(folder, devices, on_gpus=devices == 3)
    for _ in range(steps):
        clock.now += seconds_a_step
        recorder.count_step()
    return recorder


def test_total_usage_of_a_run_that_has_not_begun_is_nothing(tmp_path):
    assert total_usage(tmp_path / "run") == Usage(attempts=0, device_seconds=0.0, steps=0, first_step_at=None)


def test_total_usage_is_wall_time_times_devices(tmp_path, clock):
    began = clock.time()
    recorder = UsageRecorder(tmp_path, devices=7, on_gpus=False)
    clock.now += 3  # before the first step
    recorder.count_step()
    clock.now += 5
    recorder.count_step()
    clock.now += 11  # after the last step
    recorder.write()
    found = total_usage(tmp_path)
    assert (found.attempts, found.device_seconds, found.steps) == (1, 7 * 19.0, 2)
    assert (found.first_step_at, found.last_sign_at) == (began + 3, pytest.approx(began + 19))


def test_total_usage_adds_attempts_each_with_its_own_devices(tmp_path, clock):
    attempt(clock, tmp_path, devices=2, steps=5, seconds_a_step=3.0).write()
    clock.now += 1_000  # no attempt is running
    began = clock.time()
    attempt(clock, tmp_path, devices=3, steps=7, seconds_a_step=11.0).write()
    found = total_usage(tmp_path)
    assert (found.attempts, found.device_seconds, found.steps) == (2, 2 * 5 * 3.0 + 3 * 7 * 11.0, 12)
    assert (found.first_step_at, found.last_sign_at) == (began + 11, pytest.approx(began + 77))
    assert found.on_gpus  # as in the last attempt


def test_total_usage_of_a_killed_attempt_lacks_its_last_moments(tmp_path, clock):
    attempt(clock, tmp_path, devices=1, steps=97, seconds_a_step=0.5)
    killed = total_usage(tmp_path)
    assert 97 * 0.5 - USAGE_INTERVAL_S - 0.5 <= killed.device_seconds < 97 * 0.5
    assert killed.steps == 2 * killed.device_seconds
    attempt(clock, tmp_path, devices=1, steps=13, seconds_a_step=0.5).write()
    assert total_usage(tmp_path).device_seconds == killed.device_seconds + 6.5
    assert total_usage(tmp_path).steps == killed.steps + 13


def test_total_usage_counts_an_attempt_killed_before_its_first_step(tmp_path, clock):
    attempt(clock, tmp_path, devices=1, steps=5, seconds_a_step=3.0).write()
    UsageRecorder(tmp_path, devices=1, on_gpus=False)
    found = total_usage(tmp_path)
    assert (found.attempts, found.steps, found.first_step_at) == (2, 5, None)


def test_usage_recorder_writes_every_other_second_at_most(tmp_path, clock, monkeypatch):
    written = []
    monkeypatch.setattr(periodic, "write_json", lambda path, values: written.append(values["steps"]))
    attempt(clock, tmp_path, devices=1, steps=100, seconds_a_step=0.25)  # 25 seconds
    assert written[0] == 0
    assert 8 <= len(written) <= 13


def test_usage_recorder_sends_heartbeats_during_a_long_step_until_closed(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(accounting, "HEARTBEAT_S", 0.01)
    recorder = UsageRecorder(tmp_path, devices=1, on_gpus=False)
    began = clock.time()
    clock.now += 1_000
    deadline = time.monotonic() + 60
    while (total_usage(tmp_path).last_sign_at or 0) < began + 999:
        assert time.monotonic() < deadline
    recorder.close()
    recorder.heartbeat.join(60)
    assert not recorder.heartbeat.is_alive()


def test_total_usage_ignores_a_file_that_a_kill_cut_short(tmp_path, clock):
    attempt(clock, tmp_path, devices=1, steps=5, seconds_a_step=3.0).write()
    (path,) = (tmp_path / "usage").iterdir()
    path.with_name(f".{path.name}.partial").write_text(path.read_text()[:9])
    assert total_usage(tmp_path).steps == 5
    assert json.loads(path.read_text())["devices"] == 1


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", '{"seconds": 5}', '{"seconds": NaN, "devices": 1, "steps": 1}',
     '{"seconds": "5", "devices": 1, "steps": 1}'],
)  # fmt: skip
@pytest.mark.parametrize("name", ["1234.json", "continued.json"])
def test_total_usage_leaves_out_a_damaged_file(tmp_path, clock, name, content):
    attempt(clock, tmp_path, devices=3, steps=2, seconds_a_step=5.0).close()
    expected = total_usage(tmp_path)
    (tmp_path / "usage" / name).write_text(content)
    (tmp_path / "usage" / "2345.json").mkdir()
    (tmp_path / "usage" / "7 of mine.json").write_text("{}")
    assert total_usage(tmp_path) == expected
    assert not has_begun_since(tmp_path, clock.time() + 1)


def test_usage_recorder_continues_when_the_disk_is_full(tmp_path, clock, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(periodic, "write_json", full)
        recorder = attempt(clock, tmp_path, devices=1, steps=5, seconds_a_step=3.0)
        recorder.write()
    assert total_usage(tmp_path) == Usage()
    recorder.write()  # the disk has space again
    assert total_usage(tmp_path).steps == 5


def test_carry_usage_counts_a_share_of_the_other_run_once(tmp_path, clock):
    one, other, third = (tmp_path / name for name in ("one", "other", "third"))
    attempt(clock, one, devices=2, steps=8, seconds_a_step=3.0).write()
    for _ in range(2):
        carry_usage(one, other, 0.75)
    assert total_usage(other) == Usage(attempts=1, device_seconds=36.0, steps=6)
    assert not has_begun_since(other, 0.0)
    attempt(clock, one, devices=2, steps=5, seconds_a_step=3.0).write()  # later steps, which `other` does not use
    carry_usage(one, other, 0.75)
    attempt(clock, other, devices=1, steps=5, seconds_a_step=2.0).write()
    found = total_usage(other)
    assert (found.attempts, found.device_seconds, found.steps) == (1, 46.0, 11)
    attempt(clock, other, devices=1, steps=0, seconds_a_step=2.0).write()  # the attempt before it was killed
    assert total_usage(other).attempts == 2
    carry_usage(other, third, 1.0)
    assert total_usage(third).attempts == 2
    assert total_usage(third).device_seconds == 46.0


def test_has_begun_since_is_true_if_any_attempt_began_later(tmp_path, clock):
    assert not has_begun_since(tmp_path, 0.0)
    UsageRecorder(tmp_path, devices=1, on_gpus=False)
    began = clock.time()
    clock.now += 7
    assert has_begun_since(tmp_path, began)
    assert not has_begun_since(tmp_path, began + 1)
    UsageRecorder(tmp_path, devices=1, on_gpus=False)
    assert has_begun_since(tmp_path, began + 1)
