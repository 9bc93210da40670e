import errno
import json
import threading
import time
from pathlib import Path

import pytest
from upath import UPath

from pipeline.common import atomic_io as files
from pipeline.common.atomic_io import PeriodicJsonFile, interval_of, replace_folder, write_json, write_text

FULL_DISK = Path("/dev/full")  # every write to it fails as on a full disk
needs_full_disk = pytest.mark.skipif(not FULL_DISK.exists(), reason="this system has no /dev/full")


def test_folder_appears_when_complete_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "data" / "raw"
    with replace_folder(target) as folder:
        (folder / "old").write_text("1")
        assert not target.exists()
    with replace_folder(target) as folder:
        (folder / "new").write_text("2")
        assert [file.name for file in target.iterdir()] == ["old"]
    assert [file.name for file in target.iterdir()] == ["new"]
    assert [file.name for file in target.parent.iterdir()] == ["raw"]


def test_folder_stays_as_it_was_when_the_block_fails(tmp_path):
    target = tmp_path / "raw"
    with replace_folder(target) as folder:
        (folder / "file").write_text("whole")

    def fail():
        with replace_folder(target) as folder:
            (folder / "file").write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (target / "file").read_text() == "whole"
    assert [file.name for file in tmp_path.iterdir()] == ["raw"]


def test_folder_that_a_killed_run_left_behind_does_not_reach_the_result(tmp_path):
    target = tmp_path / "raw"
    killed = replace_folder(target)
    (killed.__enter__() / "stale").write_text("half")
    with replace_folder(target) as folder:
        (folder / "fresh").write_text("whole")
    assert [file.name for file in target.iterdir()] == ["fresh"]
    assert [file.name for file in tmp_path.iterdir()] == ["raw"]


@needs_full_disk
def test_full_disk_is_reported_with_the_target_and_leaves_nothing(tmp_path):
    def fail():
        with replace_folder(tmp_path / "raw") as folder:
            (folder / "file").symlink_to(FULL_DISK)
            (folder / "file").write_text("too much")

    with pytest.raises(OSError, match="free some space and run again") as caught:
        fail()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "raw")
    assert list(tmp_path.iterdir()) == []


def test_text_is_utf8_with_unix_line_ends_in_folders_made_for_it(tmp_path):
    write_text(tmp_path / "reports" / "a.txt", "ä\nb\n")
    assert (tmp_path / "reports" / "a.txt").read_bytes() == b"\xc3\xa4\nb\n"
    assert [file.name for file in (tmp_path / "reports").iterdir()] == ["a.txt"]


def test_text_stays_as_it_was_when_writing_fails(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "whole")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "half \ud800")
    assert target.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [target]


def test_json_comes_back(tmp_path):
    values = {"train": {"pairs": 29_000, "origin": "Größe"}}
    write_json(tmp_path / "a.json", values)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == values


def test_a_live_file_in_a_store_has_the_newest_values_at_the_end_and_holds_nobody_up(monkeypatch):
    path = UPath("memory://files/live.json")
    held = threading.Event()
    written = []

    def slowly(target, values):
        held.wait(10)
        written.append(values)
        target.write_text(json.dumps(values))

    monkeypatch.setattr(files, "write_json", slowly)
    live = PeriodicJsonFile(path, 1.0)
    began = time.monotonic()
    for number in range(1, 8):
        live.write({"step": number})
    assert time.monotonic() - began < 5
    held.set()
    live.close()
    assert json.loads(path.read_text()) == {"step": 7}
    assert len(written) < 4


def test_a_store_that_is_away_for_a_while_gets_the_newest_values_afterwards(monkeypatch):
    path = UPath("memory://files/away.json")
    monkeypatch.setattr(files, "STORE_PAUSE_S", 0.05)
    faults = [OSError("away"), OSError("away")]

    def sometimes(target, values):
        if faults:
            raise faults.pop()
        target.write_text(json.dumps(values))

    monkeypatch.setattr(files, "write_json", sometimes)
    live = PeriodicJsonFile(path, 1.0)
    for number in (3, 5, 7):
        live.write(number)
        time.sleep(0.2)
    assert json.loads(path.read_text()) == 7


def test_a_file_in_a_store_is_written_and_read_less_often(tmp_path):
    assert (interval_of(tmp_path, 0.5), interval_of(UPath("memory://files"), 0.5)) == (0.5, 5.0)


def test_a_link_to_a_folder_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").touch()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with replace_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "link").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert (tmp_path / "there" / "kept").exists()
