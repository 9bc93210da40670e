import json
import time
from pathlib import Path

import pytest

from pipeline.cluster import progress
from pipeline.cluster.progress import Reporter, shown, step
from pipeline.common import atomic_io as files


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 0.02)


def wait() -> None:
    time.sleep(0.1)


def test_lines_and_the_bar_reach_the_terminal_once_each(tmp_path, capfd):
    path = tmp_path / "run" / "progress.json"
    with shown(path, total=31, name="train"):
        reporter = Reporter(path)
        reporter.say("first")
        wait()
        reporter.say("second")
        reporter.progress(17, "loss 1.234")
        reporter.flush()
        wait()
    err = capfd.readouterr().err
    assert err.count("train: first\n") == err.count("train: second\n") == 1
    assert "17/31" in err
    assert "loss 1.234" in err


def test_what_is_written_last_is_shown(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 60.0)
    with shown(tmp_path / "p.json", total=7, name="train"):
        Reporter(tmp_path / "p.json").say("at the very end")
    assert "train: at the very end" in capfd.readouterr().err


def test_the_bar_begins_where_a_resumed_run_begins(tmp_path, capfd):
    with shown(tmp_path / "p.json", total=31, name="train"):
        reporter = Reporter(tmp_path / "p.json")
        reporter.progress(29, "")
        reporter.flush()
    assert " 94%" in capfd.readouterr().err


def test_a_worker_that_takes_a_dead_ones_place_is_heard(tmp_path, capfd):
    path = tmp_path / "p.json"
    with shown(path, total=31, name="train"):
        first = Reporter(path)
        first.say("one")
        first.say("two")
        first.progress(19, "")
        first.flush()
        wait()
        second = Reporter(path)
        second.say("continuing from step 11")
        second.progress(13, "")
        second.flush()
        wait()
    err = capfd.readouterr().err
    assert "continuing from step 11" in err
    assert err.count("train: one\n") == 1
    assert "13/31" in err.rpartition("\r")[2]  # the bar goes back


def test_what_an_earlier_run_left_is_not_shown(tmp_path, capfd):
    path = tmp_path / "p.json"
    Reporter(path).say("of yesterday")
    with shown(path, total=31, name="train"):
        wait()
    assert capfd.readouterr().err == ""


def test_the_file_is_written_twice_a_second_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 60.0)
    reporter = Reporter(tmp_path / "p.json")
    reporter.flush()
    reporter.progress(5, "")
    assert json.loads((tmp_path / "p.json").read_text())["step"] == 0
    reporter.flush()
    assert json.loads((tmp_path / "p.json").read_text())["step"] == 5


def test_a_disk_that_is_full_does_not_stop_training(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    reporter = Reporter(tmp_path / "p.json")
    reporter.say("still here")
    reporter.progress(3, "")


def test_the_display_ends_with_the_block_though_it_raises(tmp_path):
    with pytest.raises(KeyError), shown(Path(tmp_path / "p.json"), total=3, name="train"):
        raise KeyError
    assert not [thread for thread in progress.threading.enumerate() if thread.name.endswith("(_show)")]


def test_how_far_a_run_is_can_be_asked_from_outside(tmp_path):
    path = tmp_path / "run" / "progress.json"
    assert step(path) == 0  # not begun
    reporter = Reporter(path)
    for number in (3, 17):
        reporter.progress(number, "loss 1.234")
        reporter.flush()
        assert step(path) == number
    path.write_text('{"step": 1')
    assert step(path) == 0
