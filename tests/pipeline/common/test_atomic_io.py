import errno
import json
import os
import socket
from pathlib import Path

import pytest
from upath import UPath

from pipeline.common import atomic_io
from pipeline.common.atomic_io import (
    csv_text,
    replace_folder,
    write_csv,
    write_json,
    write_text,
)

FULL_DISK = Path("/dev/full")  # every write to it fails as on a full disk
needs_full_disk = pytest.mark.skipif(not FULL_DISK.exists(), reason="this system has no /dev/full")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replace_folder_shows_the_new_folder_when_complete_and_removes_the_old(tmp_path):
    target = tmp_path / "data" / "raw"
    with replace_folder(target) as folder:
        (folder / "old").write_text("1")
        assert not target.exists()
    with replace_folder(target) as folder:
        (folder / "new").write_text("2")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(target.parent) == ["raw"]


def test_replace_folder_leaves_the_old_folder_when_the_block_fails(tmp_path):
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
    assert names(tmp_path) == ["raw"]


def test_replace_folder_removes_what_killed_processes_of_this_host_left(tmp_path):
    host = socket.gethostname()
    dead, alive = 2**22 + 1, 1
    ours = [f".raw.{host}.{dead}.partial", f".raw.{host}.{dead}.old", f".raw.{host}.{os.getpid()}.partial"]
    others = [f".raw.{host}.{alive}.partial", f".raw.elsewhere.{dead}.partial", f".raw2.{host}.{dead}.partial"]
    for name in (*ours, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").write_text("half")
    with replace_folder(tmp_path / "raw") as folder:
        (folder / "fresh").write_text("whole")
    assert names(tmp_path / "raw") == ["fresh"]
    assert names(tmp_path) == sorted(["raw", *others])


def test_replace_folder_flushes_files_and_folders_before_the_rename(tmp_path, monkeypatch):
    flushed = []

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed.append((path.name, (tmp_path / "raw").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with replace_folder(tmp_path / "raw") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("whole")
    partial = f".raw.{socket.gethostname()}.{os.getpid()}.partial"
    assert sorted(flushed[:-1]) == [(partial, False), ("file", False), ("inner", False)]
    assert flushed[-1] == (tmp_path.name, True)


def test_replace_folder_uploads_checksums_last_and_removes_the_old_ones_first(monkeypatch):
    target = UPath("memory://atomic_io/model")
    seen = []

    def copy(source: Path, to: UPath) -> None:
        seen.append((source.name, (target / "SHA256SUMS").exists()))
        to.write_bytes(source.read_bytes())

    monkeypatch.setattr(atomic_io, "copy_file", copy)
    for content in ("1", "2"):
        seen.clear()
        with replace_folder(target) as folder:
            for name in ("SHA256SUMS", "a", "z"):
                (folder / name).write_text(content)
        assert [name for name, _ in seen[:2]] in (["a", "z"], ["z", "a"])
        assert seen[2] == ("SHA256SUMS", False)
        assert not any(whole for _, whole in seen)
    assert (target / "z").read_text() == "2"


@needs_full_disk
def test_replace_folder_names_the_target_on_a_full_disk_and_leaves_nothing(tmp_path):
    def fail():
        with replace_folder(tmp_path / "raw") as folder:
            (folder / "file").symlink_to(FULL_DISK)
            (folder / "file").write_text("too much")

    with pytest.raises(OSError, match="free some space and run again") as caught:
        fail()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "raw")
    assert list(tmp_path.iterdir()) == []


def test_write_text_is_utf8_with_unix_line_ends_in_folders_made_for_it(tmp_path):
    write_text(tmp_path / "reports" / "a.txt", "ä\nb\n")
    assert (tmp_path / "reports" / "a.txt").read_bytes() == b"\xc3\xa4\nb\n"
    assert [file.name for file in (tmp_path / "reports").iterdir()] == ["a.txt"]


def test_write_text_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "whole")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "half \ud800")
    assert target.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [target]


def test_write_csv_quotes_what_needs_it_and_leaves_none_empty(tmp_path):
    rows = [{"row": "base, or so", "bleu": 25.8}, {"bleu": None, "row": 'the "big" one'}]
    write_csv(tmp_path / "a.csv", rows)
    assert (tmp_path / "a.csv").read_bytes() == b'row,bleu\n"base, or so",25.8\n"the ""big"" one",\n'


def test_csv_text_has_the_columns_of_all_rows():
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0, "bleu": 7.5}]
    assert csv_text(rows) == "step,loss,bleu\n1,2.5,\n2,2.0,7.5\n"


def test_csv_text_of_no_row_is_empty():
    assert csv_text([]) == ""


def test_write_json_can_be_read_back(tmp_path):
    values = {"train": {"pairs": 29_000, "origin": "Größe"}}
    write_json(tmp_path / "a.json", values)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == values


def test_replace_folder_replaces_a_link_and_leaves_what_it_points_to(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").touch()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with replace_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "link").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert (tmp_path / "there" / "kept").exists()
