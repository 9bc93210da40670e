"""A corpus that goes to storage and arrives whole on another machine, or is refused."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from upath import UPath

from pipeline import publish as module
from pipeline.common.paths import CLEAN, ENCODED, TOKENIZER
from pipeline.common.settings import load_settings
from pipeline.common.storage import run_storage
from pipeline.data.dataset import CorpusInfo, EncodedSplit
from pipeline.data.published import ensure_local_data, fetch, published
from pipeline.publish import publish
from tests.factories import write_corpus

SETTINGS = replace(load_settings(Path(__file__).parents[2]), data_name="few")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def make_root(root: Path, digest: str = "a1" * 32) -> Path:
    """A project whose corpus is encoded."""
    for folder in (CLEAN, TOKENIZER):
        (root / folder).mkdir(parents=True)
    write_corpus(root / ENCODED)
    info = json.loads((root / ENCODED / "meta.json").read_text())
    (root / ENCODED / "meta.json").write_text(json.dumps(info | {"sha256": digest}))
    for name in ("train", "valid", "test"):
        for language in ("en", "de"):
            (root / CLEAN / f"{name}.{language}").write_text(f"{name} {language}\n")
    (root / TOKENIZER / "spm.model").write_bytes(b"pieces")
    return root


@pytest.fixture(params=["folder", "store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "folder":
        return tmp_path / "shared"
    return UPath(f"memory://publish/{tmp_path.name}")


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.glob("data/*/*")) if p.is_file()}


def test_what_arrives_is_what_was_there_without_the_training_texts(storage, tmp_path):
    root = make_root(tmp_path / "root")
    there = publish(SETTINGS, root, storage)
    assert there.name == "few-a1a1a1a1a1a1"
    assert published(SETTINGS, storage) == there
    expected = {name: content for name, content in files(root).items() if "clean/train" not in name}
    assert files(fetch(there)) == expected
    assert len(EncodedSplit.open(fetch(there) / ENCODED, "train")) == CorpusInfo.open(root / ENCODED).pairs["train"]


def test_it_is_copied_once_to_a_machine_and_nothing_is_published_twice(storage, tmp_path, monkeypatch):
    there = publish(SETTINGS, make_root(tmp_path / "root"), storage)
    first = fetch(there)
    monkeypatch.setattr(module, "copy_file", lambda *arguments: pytest.fail("copied again"))
    assert fetch(there) == first
    assert publish(SETTINGS, tmp_path / "root", storage) == there


def test_processes_that_come_at_once_wait_for_the_one_that_copies(tmp_path):
    there = publish(SETTINGS, make_root(tmp_path / "root"), tmp_path / "shared")
    script = (
        "import sys; from pathlib import Path; from pipeline.data import published as publish\n"
        "copy = publish.copy_file\n"
        "publish.copy_file = lambda *a: (print('copied'), copy(*a))[1]\n"
        "print(publish.fetch(Path(sys.argv[1])))"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(there)], stdout=-1, text=True, env=environment)
        for _ in range(3)
    ]
    outputs = [process.communicate()[0].splitlines() for process in started]
    assert {lines[-1] for lines in outputs} == {str(fetch(there))}
    assert sorted(len(lines) - 1 for lines in outputs)[:2] == [0, 0]


def test_another_corpus_under_the_name_leaves_the_first_where_it_is(storage, tmp_path):
    first = publish(SETTINGS, make_root(tmp_path / "one", "1" * 64), storage)
    second = publish(SETTINGS, make_root(tmp_path / "two", "2" * 64), storage)
    assert published(SETTINGS, storage) == second
    assert (first / "SHA256SUMS").exists()


def test_a_copy_of_which_something_was_taken_or_changed_is_made_again(storage, tmp_path):
    there = publish(SETTINGS, make_root(tmp_path / "root"), storage)
    expected = files(fetch(there))
    (fetch(there) / "data/encoded/meta.json").unlink()  # as what cleans up /tmp does
    assert files(fetch(there)) == expected
    (fetch(there) / "data/tokenizer/spm.model").write_bytes(b"others")
    assert files(fetch(there)) == expected


@pytest.mark.parametrize("damage", ["changed", "cut", "missing sums"])
def test_what_is_not_what_was_published_is_refused_and_leaves_nothing(storage, tmp_path, damage):
    there = publish(SETTINGS, make_root(tmp_path / "root"), storage)
    victim = there / "data/encoded/train.src.ids.npy"
    content = victim.read_bytes()
    if damage == "changed":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        victim.write_bytes(content[:-5])
    else:
        (there / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"publish (the corpus|again)|pipeline\.publish again"):
        fetch(there)
    assert not list((tmp_path / "tmp").glob("*/few-a1a1a1a1a1a1"))
    victim.write_bytes(content)


def test_names_that_lead_elsewhere_are_refused(storage, tmp_path):
    there = publish(SETTINGS, make_root(tmp_path / "root"), storage)
    for name in ("../../outside", "/outside"):
        (there / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(ValueError, match="outside of its folder"):
            fetch(there)


def test_a_job_without_data_gets_them_and_one_with_the_same_keeps_its_own(storage, tmp_path):
    root = make_root(tmp_path / "root")
    there = publish(SETTINGS, root, storage)
    assert ensure_local_data(SETTINGS, root, storage) == there
    assert not (root / ENCODED).is_symlink()
    for _ in range(2):  # a job's folder may be that of one before
        assert ensure_local_data(SETTINGS, tmp_path / "job", storage) == there
    assert CorpusInfo.open(tmp_path / "job" / ENCODED) == CorpusInfo.open(root / ENCODED)
    assert (tmp_path / "job" / CLEAN / "test.de").read_text() == "test de\n"


def test_other_data_than_the_published_are_refused(storage, tmp_path):
    publish(SETTINGS, make_root(tmp_path / "one", "1" * 64), storage)
    with pytest.raises(ValueError, match=r"few-111111111111 is another corpus than .*2222.*: run python -m pipe"):
        ensure_local_data(SETTINGS, make_root(tmp_path / "two", "2" * 64), storage)


def test_where_nothing_is_published_the_command_that_does_it_is_named(storage, tmp_path):
    with pytest.raises(ValueError, match=rf"few\.json does not exist: .*RUN_STORAGE={storage} python -m pipeline"):
        ensure_local_data(SETTINGS, make_root(tmp_path / "root"), storage)


def test_without_storage_of_its_own_a_project_needs_nothing_published(tmp_path, monkeypatch):
    monkeypatch.delenv("RUN_STORAGE", raising=False)
    assert ensure_local_data(SETTINGS, tmp_path, run_storage(tmp_path)) is None


def test_what_is_not_encoded_yet_cannot_be_published(storage, tmp_path):
    root = make_root(tmp_path / "root")
    (root / TOKENIZER / "spm.model").unlink()
    with pytest.raises(ValueError, match=r"spm\.model does not exist: run dvc repro tokenize first"):
        publish(SETTINGS, root, storage)
