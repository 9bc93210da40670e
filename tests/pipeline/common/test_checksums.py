import subprocess

import pytest

from pipeline.common.checksums import copy_with_sums, verify, write_sums
from tests.support.damage import DAMAGES, flip_a_bit

FILES = {"a": b"first", "b": b"second", "c": b""}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    write_sums(tmp_path, FILES)
    return tmp_path


def test_write_sums_keeps_those_of_other_files_and_sha256sum_reads_them(folder):
    (folder / "c").write_bytes(b"third")
    write_sums(folder, ["c"])
    verify(folder, None, "train")
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "a: OK\nb: OK\nc: OK\n"


@pytest.mark.parametrize("names", [["a", "b"], None])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_verify_names_what_is_damaged_and_the_way_out(folder, names, damage):
    verify(folder, names, "train")
    damage(folder / "b")
    again = r"(again \(dvc repro --force --single-item train\)|first \(dvc repro train\))"
    fault = r"(is damaged|is not a file|does not exist)"
    with pytest.raises(ValueError, match=rf"^{folder}/b {fault}.*: run the train stage {again}$"):
        verify(folder, names, "train")


def test_verify_of_all_refuses_sums_that_are_cut_off(folder):
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=rf"^{folder}/c is damaged"):
        verify(folder, None, "train")


@pytest.mark.parametrize("content", ["", "0" * 64, "zz  a\n", f"{'0' * 64}  a\n{'0' * 64}  gone\n"])
def test_verify_refuses_sums_of_something_else(folder, content):
    (folder / "SHA256SUMS").write_text(content)
    with pytest.raises(ValueError, match=r"run the train stage"):
        verify(folder, ["a", "b"], "train")
    with pytest.raises(ValueError, match=r"run the train stage"):
        verify(folder, None, "train")


def test_verify_ignores_files_that_are_not_named(folder):
    flip_a_bit(folder / "b")
    verify(folder, ["a"], "train")


def test_copy_with_sums_copies_nothing_damaged(folder):
    target = folder / "other"
    target.mkdir()
    copy_with_sums(folder, target, ["a"], "train")
    verify(target, ["a"], "train")
    flip_a_bit(folder / "b")
    with pytest.raises(ValueError, match="b is damaged"):
        copy_with_sums(folder, target, ["b"], "train")
    assert not (target / "b").exists()
