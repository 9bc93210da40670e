import json
import shutil

import numpy as np
import pytest

from pipeline.common.checksums import write_sums
from pipeline.data.dataset import SPLITS, CorpusInfo, EncodedSplit, EncodedText, encoded_paths, load_tokenizer
from tests.factories import edit_corpus, update_sums, write_corpus
from tests.support.damage import DAMAGES


def write(folder, side="src", split="valid", tokens=(4, 5, 6, 7, 8), offsets=(0, 2, 2, 5), dtype=np.uint16):
    tokens_path, offsets_path = encoded_paths(folder, split, side)
    np.save(tokens_path, np.array(tokens, dtype=dtype))
    np.save(offsets_path, np.array(offsets, dtype=np.int64))


def test_encoded_text_cuts_sentences_at_the_offsets(tmp_path):
    write(tmp_path)
    text = EncodedText.open(tmp_path, "valid", "src")
    assert len(text) == 3
    assert [sentence.tolist() for sentence in text] == [[4, 5], [], [6, 7, 8]]
    assert text.lengths.tolist() == [2, 0, 3]
    assert text.lengths.dtype == np.int64


def test_encoded_text_gathers_sentences_in_any_order(tmp_path):
    write(tmp_path)
    tokens, lengths = EncodedText.open(tmp_path, "valid", "src").gather(np.array([2, 1, 0, 2]))
    assert tokens.tolist() == [6, 7, 8, 4, 5, 6, 7, 8]
    assert lengths.tolist() == [3, 0, 2, 3]


def test_encoded_text_is_mapped_and_cannot_be_written(tmp_path):
    write(tmp_path)
    text = EncodedText.open(tmp_path, "valid", "src")
    assert isinstance(text.tokens, np.memmap)
    assert isinstance(text.offsets, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        text.tokens[0] = 1


def test_encoded_text_has_no_sentence_beyond_its_last(tmp_path):
    write(tmp_path)
    text = EncodedText.open(tmp_path, "valid", "src")
    for index in (3, -1):
        with pytest.raises(IndexError, match=rf"sentence {index} is not in \[0, 3\)"):
            text[index]


def test_encoded_text_names_the_stage_that_makes_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"valid\.src\.ids\.npy does not exist: run the tokenize stage first"):
        EncodedText.open(tmp_path, "valid", "src")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array at all, but some other file", b"PK\x03\x04"])
def test_encoded_text_names_a_file_that_is_no_array(tmp_path, content):
    write(tmp_path)
    encoded_paths(tmp_path, "valid", "src")[0].write_bytes(content)
    with pytest.raises(ValueError, match=r"valid\.src\.ids\.npy is damaged .*: run the tokenize stage again"):
        EncodedText.open(tmp_path, "valid", "src")


def test_encoded_text_names_a_truncated_file(tmp_path):
    write(tmp_path)
    path = encoded_paths(tmp_path, "valid", "src")[0]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"valid\.src\.ids\.npy is damaged"):
        EncodedText.open(tmp_path, "valid", "src")


def test_encoded_text_refuses_pickled_objects(tmp_path):
    write(tmp_path)
    np.save(encoded_paths(tmp_path, "valid", "src")[0], np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"valid\.src\.ids\.npy is damaged"):
        EncodedText.open(tmp_path, "valid", "src")


def test_encoded_text_names_another_kind_of_array(tmp_path):
    write(tmp_path, dtype=np.float64)
    with pytest.raises(ValueError, match=r"must be a 1-D array of uint16 or uint32, got float64 \(5,\)"):
        EncodedText.open(tmp_path, "valid", "src")
    write(tmp_path)
    np.save(encoded_paths(tmp_path, "valid", "src")[1], np.zeros((2, 3), np.int64))
    with pytest.raises(ValueError, match=r"must be a 1-D array of int64, got int64 \(2, 3\)"):
        EncodedText.open(tmp_path, "valid", "src")


def test_encoded_text_refuses_arrays_of_two_runs(tmp_path):
    write(tmp_path, offsets=(0, 2, 7))
    with pytest.raises(ValueError, match=r"offsets\.npy ends at token 7, but valid\.src\.ids\.npy has 5 tokens"):
        EncodedText.open(tmp_path, "valid", "src")


def test_encoded_text_needs_offsets_that_grow(tmp_path):
    write(tmp_path, offsets=(0, 3, 2, 5))
    with pytest.raises(ValueError, match=r"valid\.src\.offsets\.npy must not decrease"):
        EncodedText.open(tmp_path, "valid", "src")


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "encoded")
    return tmp_path / "encoded"


def test_encoded_split_needs_as_many_sources_as_targets(corpus):
    write(corpus)
    write(corpus, "tgt")
    update_sums(corpus)
    assert len(EncodedSplit.open(corpus, "valid")) == 3
    write(corpus, "tgt", offsets=(0, 5))
    update_sums(corpus)
    with pytest.raises(ValueError, match="valid has 3 source but 1 target sentences"):
        EncodedSplit.open(corpus, "valid")


def test_encoded_split_needs_tokens_of_the_vocabulary(corpus):
    ids = [np.load(encoded_paths(corpus, "valid", side)[0]) for side in ("src", "tgt")]
    largest = int(ids[0].max())
    edit_corpus(corpus, vocab_size=largest + 1)
    assert len(EncodedSplit.open(corpus, "valid"))
    edit_corpus(corpus, vocab_size=largest)
    with pytest.raises(
        ValueError, match=rf"src\.ids\.npy has token id {largest}, but the vocabulary in meta\.json has {largest}"
    ):
        EncodedSplit.open(corpus, "valid")


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_encoded_split_detects_damage_of_any_file(corpus, tmp_path, damage):
    def open_all(folder):
        for split in SPLITS:
            EncodedSplit.open(folder, split)

    open_all(corpus)  # checksums that are verified already must not hide later damage
    for path in sorted(corpus.iterdir()):
        copy = shutil.copytree(corpus, tmp_path / "copy")
        open_all(copy)
        damage(copy / path.name)
        with pytest.raises(
            ValueError, match=r"^.*/(?P<name>[\w.]+) (is damaged|is not a file|does not exist).*: run the"
        ):
            open_all(copy)
        shutil.rmtree(copy)


def test_encoded_split_verifies_files_once_in_a_process(corpus, monkeypatch):
    EncodedSplit.open(corpus, "train")
    monkeypatch.setattr("pipeline.common.checksums.sha256_of", lambda path: pytest.fail(f"{path} is read again"))
    EncodedSplit.open(corpus, "train")


def test_corpus_info_names_what_is_wrong_with_it(tmp_path):
    with pytest.raises(ValueError, match=r"meta\.json does not exist: run the tokenize stage first"):
        CorpusInfo.open(tmp_path)
    for content in ("{", json.dumps({"src": "en"}), "[]"):
        (tmp_path / "meta.json").write_text(content)
        write_sums(tmp_path, ["meta.json"])
        with pytest.raises(ValueError, match=r"meta\.json is damaged"):
            CorpusInfo.open(tmp_path)


def test_load_tokenizer_names_a_file_that_is_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"spm\.model does not exist: run the tokenize stage first"):
        load_tokenizer(tmp_path)
    for content in (b"", b"something else"):
        (tmp_path / "spm.model").write_bytes(content)
        write_sums(tmp_path, ["spm.model"])
        with pytest.raises(ValueError, match=r"spm\.model is not a SentencePiece model"):
            load_tokenizer(tmp_path)
