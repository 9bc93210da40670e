"""`python -m pipeline.preset` on a copy of the project's params.yaml and dvc.yaml."""

import difflib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.common.presets import preset_files
from pipeline.common.settings import load_settings
from pipeline.preset import write_presets
from tests.support.settings_files import REPOSITORY, copy_settings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    copy_settings(tmp_path)
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    return tmp_path


def text(root: Path, name: str = "params.yaml") -> str:
    return (root / name).read_text(encoding="utf-8")


def changed_lines(before: str, after: str) -> list[str]:
    """Return the new lines, without comments."""
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return [line[2:].partition("#")[0].strip() for line in lines if line.startswith("+ ")]


def run(root: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.preset", *arguments],
        cwd=root, env={"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def test_write_presets_of_the_default_change_nothing(root):
    """The committed params.yaml has the presets grammar, mini and auto, byte for byte with comments and order."""
    before = text(root), text(root, "dvc.yaml")
    assert write_presets(["data=grammar", "model=mini", "hardware=auto"], root) == []
    assert (text(root), text(root, "dvc.yaml")) == before


def test_write_presets_gives_their_values_and_keeps_the_rest(root):
    before = text(root)
    write_presets(["model=tiny", "hardware=cpu"], root)
    own, tiny = load_settings(REPOSITORY), load_settings(REPOSITORY, model="tiny", hardware="cpu")
    assert load_settings(root) == tiny
    assert tiny.model != own.model
    assert [line.partition("#")[2] for line in text(root).splitlines()] == [
        line.partition("#")[2] for line in before.splitlines()
    ]


@pytest.mark.parametrize("name", sorted(preset_files(REPOSITORY, "data")))
def test_write_presets_of_a_corpus_and_back_changes_nothing(root, name):
    before = text(root), text(root, "dvc.yaml")
    write_presets([f"data={name}"], root)
    assert load_settings(root).data_name == name
    write_presets(["data=grammar"], root)
    assert (text(root), text(root, "dvc.yaml")) == before


def test_write_presets_makes_data_own_a_dependency_only_where_it_is_used(root):
    before = text(root, "dvc.yaml")
    lines = write_presets(["data=own"], root)
    assert lines[-2:] == [
        "dvc.yaml: the download stage now depends on data/own",
        "data/own does not exist yet: put your texts there",
    ]
    assert changed_lines(before, text(root, "dvc.yaml")) == ["- data/own"]
    assert yaml.safe_load(text(root, "dvc.yaml"))["stages"]["download"]["deps"][-1] == "data/own"
    assert write_presets(["data=own"], root) == []
    assert write_presets(["data=multi30k"], root)[-1] == "dvc.yaml: the download stage no longer depends on data/own"
    assert text(root, "dvc.yaml") == before


def test_write_presets_mends_a_section_that_has_become_a_name(root):
    values = yaml.safe_load(text(root))
    (root / "params.yaml").write_text(yaml.safe_dump(values | {"hardware": "cluster"}))
    write_presets(["hardware=cluster"], root)
    assert load_settings(root).hardware == load_settings(REPOSITORY, hardware="cluster").hardware


def test_write_presets_writes_nothing_if_one_is_unknown(root):
    before = text(root)
    with pytest.raises(ValueError, match="got 'huge'"):
        write_presets(["data=multi30k", "model=huge"], root)
    assert text(root) == before


def test_command_prints_what_changed(root):
    printed = run(root, "model=base").splitlines()
    assert printed[0].split() == ["model.num_layers", "1", "->", "6"]
    assert all(" -> " in line for line in printed)
    assert run(root, "model=base") == "params.yaml already has these values\n"


def test_command_lists_and_shows_all(root):
    before = text(root)
    listed = run(root, "--list")
    assert max(map(len, listed.splitlines())) <= 80
    for kind in ("data", "model", "hardware"):
        for name in preset_files(root, kind):
            assert f"{kind}={name} " in listed
    assert run(root, "--show", "model=big") == text(root, "conf/model/big.yaml")
    assert text(root) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny"], "preset: a preset must be KIND=NAME, such as model=tiny, got 'tiny'; --list shows all\n"),
        (
            ["data=multi31k"],
            "preset: data must be one of grammar, multi30k-fr, multi30k-lc, multi30k, own, got 'multi31k'\n",
        ),
    ],
)
def test_command_names_what_it_does_not_know(root, arguments, message):
    assert run(root, *arguments, code=1) == message


def test_command_reports_that_it_has_written_though_other_values_are_bad(root):
    path = root / "params.yaml"
    path.write_text(path.read_text().replace("  - heads\n", "  - headz\n"))
    printed = run(root, "model=tiny", code=1)
    assert "preset: the values were written, but params.yaml: sweep.rows" in printed.replace(f"{root}/", "")
    assert "d_model: 128" in path.read_text()
