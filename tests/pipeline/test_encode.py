import io
import json
import threading
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.dataset import CorpusInfo, EncodedSplit, EncodedText, load_tokenizer
from pipeline.encode import _encoded, _NpyWriter, _same, encode_corpus, main
from pipeline.train_tokenizer import train_tokenizer

SENTENCES = {
    "en": ["Two young men are outside.", "A dog runs; the cat sleeps.", "He weighs 5 kg.", "Why?"],
    "de": ["Zwei junge Männer sind draußen.", "Ein Hund läuft; die Katze schläft.", "Er wiegt 5 kg.", "Warum?"],
}
REPEATS = {"train": 47, "valid": 5, "test": 3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with clean/ and tokenizer/, made from a few sentences."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "clean").mkdir()
    for split, repeats in REPEATS.items():
        for code, sentences in SENTENCES.items():
            text = "".join(f"{sentence}\n" for sentence in sentences * repeats)
            (folder / f"clean/{split}.{code}").write_text(text, encoding="utf-8")
    train_tokenizer(folder / "clean/train.en", folder / "clean/train.de", folder / "tokenizer", 379)
    return folder


@pytest.fixture
def encoded(corpus, tmp_path):
    report = encode_corpus(corpus / "clean", corpus / "tokenizer", tmp_path / "encoded", "en", "de")
    return tmp_path / "encoded", report


def test_encode_corpus_can_be_decoded_back_from_the_files(corpus, encoded):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    for split, repeats in REPEATS.items():
        pairs = EncodedSplit.open(encoded[0], split)
        for text, code in ((pairs.src, "en"), (pairs.tgt, "de")):
            assert [tokenizer.decode(ids.tolist()) for ids in text] == SENTENCES[code] * repeats


def test_encode_corpus_leaves_no_seam_between_chunks(corpus, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.encode.CHUNK", 7)
    encode_corpus(corpus / "clean", corpus / "tokenizer", tmp_path / "again", "en", "de")
    for path in encoded[0].iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_encoded_works_on_the_next_chunk_while_one_is_used(monkeypatch):
    second = threading.Event()

    class Tokenizer:
        def encode(self, sentences, return_type):
            if sentences == ["c"]:
                second.set()
            return sentences

    monkeypatch.setattr("pipeline.encode.CHUNK", 2)
    chunks = _encoded(io.BytesIO(b"a\nb\nc\n"), Tokenizer())
    assert next(chunks) == (b"a\nb\n", ["a", "b"], ["a", "b"])
    assert second.wait(timeout=10)
    assert list(chunks) == [(b"c\n", ["c"], ["c"])]


def test_encode_corpus_gives_an_empty_sentence_no_tokens(corpus, tmp_path):
    for split in REPEATS:
        for code in SENTENCES:
            (tmp_path / f"{split}.{code}").write_text("\nWhy?\n\n", encoding="utf-8")
    encode_corpus(tmp_path, corpus / "tokenizer", tmp_path / "encoded", "en", "de")
    lengths = EncodedText.open(tmp_path / "encoded", "test", "src").lengths.tolist()
    assert [bool(length) for length in lengths] == [False, True, False]


def test_npy_writer_writes_what_numpy_would_save(encoded, tmp_path):
    for path in encoded[0].glob("*.npy"):
        np.save(tmp_path / "saved.npy", np.load(path))
        assert (tmp_path / "saved.npy").read_bytes() == path.read_bytes(), path.name


def test_encode_corpus_takes_two_bytes_where_the_vocabulary_allows(encoded, tmp_path):
    assert EncodedText.open(encoded[0], "train", "src").tokens.dtype == np.uint16
    with _NpyWriter(tmp_path / "train.src.ids.npy", np.dtype(np.uint32)) as file:
        file.append(np.array([70_000, 5]))
    np.save(tmp_path / "train.src.offsets.npy", np.array([0, 2], np.int64))
    assert EncodedText.open(tmp_path, "train", "src")[0].tolist() == [70_000, 5]


def test_encode_corpus_reports_what_was_encoded(encoded):
    folder, report = encoded
    tokens = {side: EncodedText.open(folder, "train", side).tokens for side in ("src", "tgt")}
    words = {
        side: REPEATS["train"] * sum(len(s.split()) for s in SENTENCES[code])
        for side, code in zip(tokens, SENTENCES, strict=True)
    }
    assert report["tokens_per_word"] == {side: len(tokens[side]) / words[side] for side in tokens}
    assert report["pairs"] == {split: 4 * repeats for split, repeats in REPEATS.items()}
    assert report["longest"]["tgt"] == max(EncodedText.open(folder, "train", "tgt").lengths)
    assert report["vocab_size"] == 379
    assert (report["byte_tokens"], report["unknown_tokens"], report["not_restored"]) == (0, 0, 0)
    assert report["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    info = CorpusInfo.open(folder)
    assert (info.src, info.tgt, info.vocab_size, info.pairs) == ("en", "de", 379, report["pairs"])
    assert info.words["train"] == words


def test_encode_corpus_checksum_differs_by_texts_and_tokenizer(corpus, encoded, tmp_path):
    def checksum(clean, tokenizer):
        encode_corpus(clean, tokenizer, tmp_path / "other", "en", "de")
        return CorpusInfo.open(tmp_path / "other").sha256

    known = CorpusInfo.open(encoded[0]).sha256
    assert checksum(corpus / "clean", corpus / "tokenizer") == known
    train_tokenizer(corpus / "clean/train.en", corpus / "clean/train.de", tmp_path / "tokenizer", 373)
    assert checksum(corpus / "clean", tmp_path / "tokenizer") != known
    (tmp_path / "clean").mkdir()
    for path in (corpus / "clean").iterdir():
        (tmp_path / "clean" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "clean/test.de").write_text("Nein.\n" * 12, encoding="utf-8")
    assert checksum(tmp_path / "clean", corpus / "tokenizer") != known


ordinary = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="▁") | st.just(" "))


@settings(deadline=None)
@given(st.lists(ordinary, min_size=1, max_size=9))
@example(
    [
        "Füße",
        "naïve café",
        "ﬁn",
        "½ ①",
        "ｆｕｌｌ",
        "日本語のテキスト",
        "한국어",
        "मानक",
        "עברית",
        "e\u0301",
        "👩‍👩‍👧 🇩🇪 👍🏽",
    ]
)
@example(["<s> </s> <unk> <pad> <0x41>", "<0xE2><0x82>", "a  b", " a "])
def test_tokenizer_decodes_any_text_back_normalised(corpus, texts):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    expected = [" ".join(unicodedata.normalize("NFKC", text).split(" ")) for text in texts]
    expected = [" ".join(filter(None, text.split(" "))) for text in expected]
    assert tokenizer.decode(tokenizer.encode(texts)) == expected


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_tokenizer_gives_no_text_reserved_tokens(corpus, text):
    assert all(piece >= 4 for piece in load_tokenizer(corpus / "tokenizer").encode(text))


def test_encode_corpus_spells_unseen_characters_and_names_a_lost_one(corpus, tmp_path, capsys):
    for split in REPEATS:
        for code in SENTENCES:
            (tmp_path / f"{split}.{code}").write_text("Why?\n", encoding="utf-8")
    (tmp_path / "test.de").write_text("Warum?\nein 語\nein ▁\n", encoding="utf-8")
    (tmp_path / "test.en").write_text("Why?\n" * 3, encoding="utf-8")
    report = encode_corpus(tmp_path, corpus / "tokenizer", tmp_path / "encoded", "en", "de")
    assert (report["byte_tokens"], report["unknown_tokens"], report["not_restored"]) == (3, 0, 1)
    assert "test.de, line 3, is decoded as 'ein'" in capsys.readouterr().err


def test_encode_corpus_does_not_count_lower_casing_as_a_loss(corpus, tmp_path):
    train_tokenizer(corpus / "clean/train.en", corpus / "clean/train.de", tmp_path / "lower", 379, lowercase=True)
    reports = {
        name: encode_corpus(corpus / "clean", tokenizer, tmp_path / "encoded", "en", "de")
        for name, tokenizer in (("mixed", corpus / "tokenizer"), ("lower", tmp_path / "lower"))
    }
    assert {name: report["not_restored"] for name, report in reports.items()} == {"mixed": 0, "lower": 0}
    assert not _same("ΌΣΟΣ Straße", "όσοσ straße", lowercase=False)
    assert _same("ΌΣΟΣ Straße", "όσοσ straße", lowercase=True)
    assert not _same("ΌΣΟΣ Straße", "όσοσ strasse", lowercase=True)


def test_encode_corpus_names_faults_and_leaves_nothing_behind(corpus, tmp_path):
    clean = tmp_path / "clean"
    clean.mkdir()
    with pytest.raises(ValueError, match=r"train\.en does not exist: run the validate stage first"):
        encode_corpus(clean, corpus / "tokenizer", tmp_path / "encoded", "en", "de")
    (clean / "train.en").write_text("a\nb\n")
    (clean / "train.de").write_text("a\n")
    with pytest.raises(ValueError, match="train has 2 en and 1 de sentences"):
        encode_corpus(clean, corpus / "tokenizer", tmp_path / "encoded", "en", "de")
    assert [path.name for path in tmp_path.iterdir()] == ["clean"]


def test_main_writes_folder_and_report(corpus, tmp_path, monkeypatch, request, capsys):
    for name in ("conf", "params.yaml"):
        (tmp_path / name).symlink_to(request.config.rootpath / name)
    (tmp_path / "data").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["encode"])
    main()
    assert len(EncodedSplit.open(tmp_path / "data/encoded", "test")) == 12
    assert json.loads((tmp_path / "reports/tokenization.json").read_text())["vocab_size"] == 379
    (corpus / "tokenizer/spm.model").rename(corpus / "spm.model")
    try:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().err.startswith("tokenize: data/tokenizer/spm.model does not exist")
    finally:
        (corpus / "spm.model").rename(corpus / "tokenizer/spm.model")
