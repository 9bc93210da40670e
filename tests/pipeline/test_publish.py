"""A corpus is copied to storage, and arrives complete on another machine or is refused."""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from upath import UPath

from pipeline.common.checksums import write_sums
from pipeline.common.paths import CLEAN, ENCODED, TOKENIZER
from pipeline.common.settings import load_settings
from pipeline.data.dataset import CorpusInfo, EncodedSplit
from pipeline.data.published import ensure_local_data, fetch, find_published
from pipeline.data.workspace import Workspace, open_workspace
from pipeline.publish import publish
from tests.factories import edit_corpus, write_corpus
from tests.support.damage import flip_a_bit

SETTINGS = replace(load_settings(Path(__file__).parents[2]), data_name="few")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def make_root(root: Path, digest: str = "a1" * 32) -> Path:
    """Make a project whose corpus is encoded."""
    for folder in (CLEAN, TOKENIZER):
        (root / folder).mkdir(parents=True)
    write_corpus(root / ENCODED)
    edit_corpus(root / ENCODED, sha256=digest)
    for name in ("train", "valid", "test"):
        for language in ("en", "de"):
            (root / CLEAN / f"{name}.{language}").write_text(f"{name} {language}\n")
    (root / TOKENIZER / "spm.model").write_bytes(b"pieces")
    write_sums(root / TOKENIZER, ["spm.model"])
    return root


@pytest.fixture(params=["folder", "store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "folder":
        return tmp_path / "shared"
    return UPath(f"memory://publish/{tmp_path.name}")


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.glob("data/*/*")) if p.is_file()}


def test_fetch_gets_what_publish_put_without_the_training_texts(storage, tmp_path):
    root = make_root(tmp_path / "root")
    stored = publish(SETTINGS, root, storage)
    assert stored.name == "few-a1a1a1a1a1a1"
    assert find_published(SETTINGS, storage) == stored
    expected = {name: content for name, content in files(root).items() if "clean/train" not in name}
    assert files(fetch(stored)) == expected
    assert len(EncodedSplit.open(fetch(stored) / ENCODED, "train")) == CorpusInfo.open(root / ENCODED).pairs["train"]


def test_publish_and_fetch_copy_once(storage, tmp_path, monkeypatch):
    stored = publish(SETTINGS, make_root(tmp_path / "root"), storage)
    first = fetch(stored)
    for module in ("pipeline.publish", "pipeline.data.published"):
        monkeypatch.setattr(f"{module}.copy_file", lambda *arguments: pytest.fail("copied again"))
    assert fetch(stored) == first
    assert publish(SETTINGS, tmp_path / "root", storage) == stored


def test_fetch_by_several_processes_at_once_copies_once(tmp_path):
    stored = publish(SETTINGS, make_root(tmp_path / "root"), tmp_path / "shared")
    script = (
        "import sys; from pathlib import Path; from pipeline.data import published as publish\n"
        "copy = publish.copy_file\n"
        "publish.copy_file = lambda *a: (print('copied'), copy(*a))[1]\n"
        "print(publish.fetch(Path(sys.argv[1])))"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(stored)], stdout=-1, text=True, env=environment)
        for _ in range(3)
    ]
    outputs = [process.communicate()[0].splitlines() for process in started]
    assert {lines[-1] for lines in outputs} == {str(fetch(stored))}
    assert sorted(len(lines) - 1 for lines in outputs)[:2] == [0, 0]


def test_publish_of_another_corpus_leaves_the_first(storage, tmp_path):
    first = publish(SETTINGS, make_root(tmp_path / "one", "1" * 64), storage)
    second = publish(SETTINGS, make_root(tmp_path / "two", "2" * 64), storage)
    assert find_published(SETTINGS, storage) == second
    assert (first / "SHA256SUMS").exists()


def test_fetch_repairs_a_copy_that_lost_or_changed_a_file(storage, tmp_path):
    stored = publish(SETTINGS, make_root(tmp_path / "root"), storage)
    expected = files(fetch(stored))
    (fetch(stored) / "data/encoded/meta.json").unlink()  # as a clean-up of /tmp does
    assert files(fetch(stored)) == expected
    (fetch(stored) / "data/tokenizer/spm.model").write_bytes(b"others")
    assert files(fetch(stored)) == expected


@pytest.mark.parametrize("damage", ["changed", "cut", "missing sums"])
def test_fetch_refuses_damage_and_leaves_nothing(storage, tmp_path, damage):
    stored = publish(SETTINGS, make_root(tmp_path / "root"), storage)
    victim = stored / "data/encoded/train.src.ids.npy"
    content = victim.read_bytes()
    if damage == "changed":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        victim.write_bytes(content[:-5])
    else:
        (stored / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"publish (the corpus|again)|pipeline\.publish again"):
        fetch(stored)
    assert not list((tmp_path / "tmp").glob("*/few-a1a1a1a1a1a1"))
    victim.write_bytes(content)


def test_fetch_refuses_names_outside_of_its_folder(storage, tmp_path):
    stored = publish(SETTINGS, make_root(tmp_path / "root"), storage)
    for name in ("../../outside", "/outside"):
        (stored / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(ValueError, match="which is outside its folder"):
            fetch(stored)


def test_ensure_local_data_links_what_is_missing_and_keeps_the_same(storage, tmp_path):
    root = make_root(tmp_path / "root")
    stored = publish(SETTINGS, root, storage)
    assert ensure_local_data(SETTINGS, root, storage) == stored
    assert not (root / ENCODED).is_symlink()
    for _ in range(2):  # a job may reuse the folder of an earlier one
        assert ensure_local_data(SETTINGS, tmp_path / "job", storage) == stored
    assert CorpusInfo.open(tmp_path / "job" / ENCODED) == CorpusInfo.open(root / ENCODED)
    assert (tmp_path / "job" / CLEAN / "test.de").read_text() == "test de\n"


def test_ensure_local_data_refuses_another_corpus(storage, tmp_path):
    publish(SETTINGS, make_root(tmp_path / "one", "1" * 64), storage)
    with pytest.raises(ValueError, match=r"few-111111111111 differs from .*2222.*: run python -m pipe"):
        ensure_local_data(SETTINGS, make_root(tmp_path / "two", "2" * 64), storage)


def test_ensure_local_data_names_the_command_that_publishes(storage, tmp_path):
    with pytest.raises(ValueError, match=rf"few\.json does not exist: .*RUN_STORAGE={storage} python -m pipeline"):
        ensure_local_data(SETTINGS, make_root(tmp_path / "root"), storage)


def test_open_workspace_without_run_storage_needs_nothing_published(tmp_path, monkeypatch):
    for name in ("RUN_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    workspace = open_workspace(SETTINGS, tmp_path)
    assert workspace == Workspace(tmp_path, tmp_path, None, f"sqlite:///{tmp_path}/mlflow.db")
    assert workspace.data_root() == tmp_path


def test_open_workspace_of_a_job_reads_the_published_corpus(storage, tmp_path, monkeypatch):
    stored = publish(SETTINGS, make_root(tmp_path / "root"), storage)
    monkeypatch.setattr("pipeline.data.workspace.run_storage", lambda root: storage)
    workspace = open_workspace(SETTINGS, tmp_path / "job")
    assert (workspace.storage, workspace.published) == (storage, stored)
    assert workspace.data_root() == fetch(stored)


@pytest.mark.parametrize("file", ["data/encoded/train.src.ids.npy", "data/tokenizer/spm.model"])
def test_publish_refuses_a_damaged_corpus(storage, tmp_path, file):
    root = make_root(tmp_path / "root")
    flip_a_bit(root / file)
    with pytest.raises(ValueError, match=rf"{root / file} is damaged \(its checksum .* run the tokenize stage again"):
        publish(SETTINGS, root, storage)


def test_publish_refuses_what_is_not_encoded_yet(storage, tmp_path):
    root = make_root(tmp_path / "root")
    (root / TOKENIZER / "spm.model").unlink()
    with pytest.raises(ValueError, match=r"spm\.model does not exist: run dvc repro tokenize first"):
        publish(SETTINGS, root, storage)
