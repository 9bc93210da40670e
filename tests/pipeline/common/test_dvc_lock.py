import subprocess

import pytest
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils.serialize import parse_yaml

from pipeline.common.dvc_lock import read_lock

LOCK = """schema: '2.0'
stages:
  download:
    cmd: python -m pipeline.download
    deps:
    - path: pipeline/common
      hash: md5
      md5: 0c1a7a2e91c4f01ba9bb42ee43e77fa3.dir
      size: 53127
      nfiles: 17
    params:
      params.yaml:
        data.src: en
        data.seed: 2017
  validate:
    cmd:
    - python -m pipeline.validate
    outs:
    - path: data/clean
      hash: md5
      md5: 4d1f70ae6d1b7d3c01e3e1f0b8d5c0a1.dir
      size: 3
      nfiles: 2
"""


def dvc_reads(text: str) -> bool:
    try:
        COMPILED_LOCKFILE_SCHEMA(parse_yaml(text, "dvc.lock"))
    except Exception:
        return False
    return True


def test_read_lock_has_the_stages_and_none_without_a_file(tmp_path):
    assert read_lock(tmp_path) == {}
    (tmp_path / "dvc.lock").write_text(LOCK)
    assert list(read_lock(tmp_path)) == ["download", "validate"]


def test_read_lock_refuses_exactly_those_halves_that_dvc_refuses(tmp_path):
    after = {place + more for place, char in enumerate(LOCK) if char in ":-\n" for more in range(5)}
    lengths = [length for length in range(len(LOCK) + 1) if length in after or length % 9 == 0]
    refused = []
    for length in lengths:
        (tmp_path / "dvc.lock").write_text(LOCK[:length])
        try:
            read_lock(tmp_path)
        except ValueError:
            refused.append(length)
    assert refused == [length for length in lengths if not dvc_reads(LOCK[:length])]
    assert len(refused) > 100


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty, probably because dvc was killed"),
        (LOCK[:200].encode(), "is incomplete, probably because dvc was killed"),
        (b"\xff\x00", "is incomplete"),
        (b"[" * 800, "is incomplete"),
    ],
)
def test_read_lock_names_the_way_out(tmp_path, content, fault):
    lock = tmp_path / "dvc.lock"
    lock.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{lock} {fault}.*: rm dvc\.lock; dvc repro then finds"):
        read_lock(tmp_path)
    for command in ("init --quiet", "add dvc.lock"):
        subprocess.run(["git", "-C", tmp_path, *command.split()], check=True)
    with pytest.raises(ValueError, match=r": git restore dvc\.lock$"):
        read_lock(tmp_path)


def test_read_lock_distinguishes_a_merge_conflict_from_a_kill(tmp_path):
    ours, theirs = LOCK, LOCK.replace("2017", "2018")
    (tmp_path / "dvc.lock").write_text(f"<<<<<<< HEAD\n{ours}=======\n{theirs}>>>>>>> theirs\n")
    with pytest.raises(
        ValueError, match=r"has merge conflict markers: keep one version \(git checkout --ours dvc\.lock"
    ):
        read_lock(tmp_path)
