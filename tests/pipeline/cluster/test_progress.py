import json
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from pipeline.cluster import progress
from pipeline.cluster.progress import (
    SHARE,
    STEPS,
    ProgressReporter,
    show_bar,
    show_progress,
    steps_done,
    training_text,
    trials_text,
)
from pipeline.common import periodic


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(progress, "PROGRESS_INTERVAL_S", 0.02)


def wait() -> None:
    time.sleep(0.1)


def test_show_progress_draws_messages_and_bar_once_each(tmp_path, capfd):
    path = tmp_path / "run" / "progress.json"
    with show_progress(path, total=31, name="train"):
        reporter = ProgressReporter(path)
        reporter.log("first")
        wait()
        reporter.log("second")
        reporter.progress(17, "loss 1.234")
        reporter.flush()
        wait()
    err = capfd.readouterr().err
    assert err.count("train: first\n") == err.count("train: second\n") == 1
    assert "17/31" in err
    assert "loss 1.234" in err


def test_show_progress_draws_what_is_written_last(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress, "PROGRESS_INTERVAL_S", 60.0)
    with show_progress(tmp_path / "p.json", total=7, name="train"):
        ProgressReporter(tmp_path / "p.json").log("at the very end")
    assert "train: at the very end" in capfd.readouterr().err


def test_show_progress_begins_where_a_resumed_run_begins(tmp_path, capfd):
    with show_progress(tmp_path / "p.json", total=31, name="train"):
        reporter = ProgressReporter(tmp_path / "p.json")
        reporter.progress(29, "")
        reporter.flush()
    assert " 94%" in capfd.readouterr().err


def test_show_progress_follows_a_worker_that_replaces_a_dead_one(tmp_path, capfd):
    path = tmp_path / "p.json"
    with show_progress(path, total=31, name="train"):
        first = ProgressReporter(path)
        first.log("one")
        first.log("two")
        first.progress(19, "")
        first.flush()
        wait()
        second = ProgressReporter(path)
        second.log("continuing from step 11")
        second.progress(13, "")
        second.flush()
        wait()
    err = capfd.readouterr().err
    assert "continuing from step 11" in err
    assert err.count("train: one\n") == 1
    assert "13/31" in err.rpartition("\r")[2]  # the bar goes back


def test_show_progress_ignores_what_an_earlier_run_left(tmp_path, capfd):
    path = tmp_path / "p.json"
    ProgressReporter(path).log("of yesterday")
    with show_progress(path, total=31, name="train"):
        wait()
    assert capfd.readouterr().err == ""


def test_progress_reporter_writes_twice_a_second_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "PROGRESS_INTERVAL_S", 60.0)
    reporter = ProgressReporter(tmp_path / "p.json")
    reporter.flush()
    reporter.progress(5, "")
    assert json.loads((tmp_path / "p.json").read_text())["step"] == 0
    reporter.flush()
    assert json.loads((tmp_path / "p.json").read_text())["step"] == 5


def test_progress_reporter_continues_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(periodic, "write_json", full)
        reporter = ProgressReporter(tmp_path / "p.json")
        reporter.log("still here")
        reporter.progress(3, "")
    reporter.flush()  # the disk has space again
    assert json.loads((tmp_path / "p.json").read_text()) == {"step": 3, "text": "", "messages": ["still here"]}


def test_show_progress_ends_with_the_block_though_it_raises(tmp_path):
    before = threading.active_count()
    with pytest.raises(KeyError), show_progress(Path(tmp_path / "p.json"), total=3, name="train"):
        raise KeyError
    assert threading.active_count() == before


def test_show_bar_passes_over_a_store_that_is_away(capfd):
    answers = iter([OSError("away"), (2, "two"), OSError("away")])

    def look() -> tuple[int, str]:
        answer = next(answers, (5, "five"))
        if isinstance(answer, OSError):
            raise answer
        return answer

    with show_bar("sweep", 7, 0.01, look):
        wait()
    assert "5/7" in capfd.readouterr().err.rpartition("\r")[2]


def test_steps_done_is_read_by_another_process(tmp_path):
    path = tmp_path / "run" / "progress.json"
    assert steps_done(path) == 0  # not started
    reporter = ProgressReporter(path)
    for number in (3, 17):
        reporter.progress(number, "loss 1.234")
        reporter.flush()
        assert steps_done(path) == number
    path.write_text('{"step": 1')
    assert steps_done(path) == 0


@pytest.mark.parametrize(
    ("name", "form", "text"),
    [
        ("train", STEPS, training_text(10.1234, 36_999.1234, 123_456.7)),
        ("sweep", SHARE, trials_text(num_trials=128, done=100, running=64, failed=13)),
    ],
)
def test_bars_are_whole_in_a_line_of_80_columns(name, form, text):
    done, total, seconds = 30_000, 300_000, 4e4  # 100 hours are left
    line = tqdm.format_meter(done, total, seconds, ncols=80, prefix=name, bar_format=form, postfix=text)
    assert len(line) == 80
    assert line.startswith(f"{name}:  10%|")
    assert line.endswith(f"100:00:00 left, {text}")


def test_training_text_and_trials_text_have_three_digits():
    assert training_text(10.1234, None, 12_345.6) == "loss 10.1, 12.3k tok/s"
    assert training_text(1.2345, 36_999.1, 987.6) == "loss 1.23, ppl 37.0k, 988 tok/s"
    assert trials_text(9, done=4, running=2, failed=1) == "trials: 4 of 9 done, 2 running, 1 failed"


@pytest.mark.parametrize("name", ["translate, valid", "perplexity, valid"])
def test_bars_of_sentences_are_whole_in_a_line_of_80_columns(name):
    line = tqdm.format_meter(12_345, 12_345, 36_000, ncols=80, prefix=name, unit=" sentences", rate=123.4)
    assert len(line) == 80
    assert line.endswith("123.40 sentences/s]")


@pytest.mark.parametrize("name", ["download", "verify", "unpack", "publish"])
def test_bars_of_bytes_are_whole_in_a_line_of_80_columns(name):
    line = tqdm.format_meter(
        4e9, 5e9, 3_500, ncols=80, prefix=name, unit="B", unit_scale=True, rate=1e8, postfix="test_2016_flickr.en.gz"
    )
    assert len(line) == 80
    assert line.endswith("100MB/s, test_2016_flickr.en.gz]")
