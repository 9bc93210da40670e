"""The first stage, which checks settings, dvc.lock, and a user's own corpus."""

import shutil
import sys
from pathlib import Path

import pytest

from pipeline import check
from pipeline.preset import write_presets

REPOSITORY = Path(__file__).parents[2]
CHECKED = Path("data/checked.txt")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A current folder with a copy of the project's settings."""
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["check"])


def refused(capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit, match=r"^1$"):
        check.main()
    assert not CHECKED.exists()
    return capsys.readouterr().err


def test_main_writes_the_same_file_whatever_the_settings():
    check.main()
    before = CHECKED.read_bytes()
    write_presets(["data=multi30k", "model=tiny"])
    check.main()
    assert CHECKED.read_bytes() == before


def test_main_names_a_bad_setting(capsys):
    with Path("params.yaml").open("a") as file:
        file.write("modle:\n  d_k: 4\n")
    assert refused(capsys) == "check: params.yaml: modle is unknown: did you mean model?\n"


def test_main_names_a_lock_that_dvc_cannot_read(capsys):
    Path("dvc.lock").write_text("")
    assert refused(capsys).startswith("check: dvc.lock is empty, probably because dvc was killed: ")


def test_main_wants_an_own_corpus_or_what_pulls_it(capsys):
    write_presets(["data=own"])
    assert refused(capsys) == "check: data.corpus is own, but data/own does not exist: put your texts there\n"
    Path("data/own.dvc").touch()
    check.main()


def test_main_refuses_a_dvc_yaml_that_does_not_fit_the_corpus(capsys):
    before = Path("params.yaml").read_bytes()
    write_presets(["data=own"])
    own = Path("params.yaml").read_bytes()
    Path("params.yaml").write_bytes(before)
    assert refused(capsys).endswith("run git restore dvc.yaml\n")
    write_presets(["data=grammar"])
    Path("params.yaml").write_bytes(own)
    assert refused(capsys).endswith("run python -m pipeline.preset data=own\n")
