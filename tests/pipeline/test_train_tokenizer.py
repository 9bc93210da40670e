import random
import unicodedata
from itertools import pairwise

import pytest

from model.config import BOS, EOS, PAD, UNK
from pipeline.data.dataset import load_tokenizer
from pipeline.train_tokenizer import _sentences, main, train_tokenizer


def write_corpus(folder, num_pairs=400, seed=3):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghiklmnoprstuw", k=rng.randint(2, 8))) for _ in range(150)]
    paths = folder / "train.en", folder / "train.de"
    for path, extra in zip(paths, ("th", "äöüß"), strict=True):
        lines = [" ".join(rng.choices([*words, *extra], k=rng.randint(3, 11))) for _ in range(num_pairs)]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return paths


def test_train_tokenizer_numbers_reserved_tokens_as_the_model_does(tmp_path):
    train_tokenizer(*write_corpus(tmp_path), tmp_path / "tokenizer", 503)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    found = tokenizer.pad_id(), tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()
    assert found == (PAD, UNK, BOS, EOS)


def test_train_tokenizer_counts_every_token_in_vocab_size(tmp_path):
    train_tokenizer(*write_corpus(tmp_path), tmp_path / "tokenizer", 503)
    assert load_tokenizer(tmp_path / "tokenizer").get_piece_size() == 503
    pieces = (tmp_path / "tokenizer/spm.vocab").read_text(encoding="utf-8").split("\n")
    assert len(pieces) == 503 + 1
    assert pieces[:4] == ["<pad>\t0", "<unk>\t0", "<s>\t0", "</s>\t0"]


def test_train_tokenizer_covers_both_languages(tmp_path):
    train_tokenizer(*write_corpus(tmp_path), tmp_path / "tokenizer", 503)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert not any(tokenizer.is_byte(piece) for piece in tokenizer.encode("th ä ö ü ß"))


@pytest.mark.parametrize("lowercase", [False, True])
def test_train_tokenizer_gives_the_same_bytes_in_any_folder(tmp_path, lowercase):
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
        train_tokenizer(*write_corpus(tmp_path / name), tmp_path / name / "tokenizer", 503, lowercase)
    one, another = ((tmp_path / name / "tokenizer/spm.model").read_bytes() for name in ("one", "another"))
    assert one == another


def test_train_tokenizer_lowercase_is_as_if_the_text_were_lower_case(tmp_path):
    texts = [
        "Eine Frau überquert die Straße .",
        "ÄPFEL, A\u0308pfel und E\u0301cole: ＡＢＣ ﬁel Ⅳ K Ω ½ ①",
        "ΌΣΟΣ И́ван ÇA Ĳssel ǅ ẞ İ",
        "",
    ]

    def lower(text):  # by character, so that a sigma at a word's end is not special
        characters = unicodedata.normalize("NFKC", text)
        return unicodedata.normalize("NFKC", "".join(character.lower() for character in characters))

    for name, change in (("mixed", str), ("lower", lower)):
        (tmp_path / name).mkdir()
        for path in write_corpus(tmp_path / name):
            lines = [line.title() for line in path.read_text(encoding="utf-8").split("\n")]
            path.write_text("\n".join(change(line) for line in [*texts * 9, *lines]), encoding="utf-8")
    sides = [[tmp_path / name / f"train.{code}" for code in ("en", "de")] for name in ("mixed", "lower")]
    train_tokenizer(*sides[0], tmp_path / "ours", 603, lowercase=True)
    train_tokenizer(*sides[1], tmp_path / "theirs", 603)
    ours, theirs = (load_tokenizer(tmp_path / name) for name in ("ours", "theirs"))
    assert (tmp_path / "ours/spm.vocab").read_bytes() == (tmp_path / "theirs/spm.vocab").read_bytes()
    for text in [*texts, *sides[0][0].read_text(encoding="utf-8").split("\n")[:100]]:
        assert ours.encode(text) == theirs.encode(lower(text)), text
    assert ours.decode(ours.encode("Große ÄPFEL")) == "große äpfel"


def test_train_tokenizer_learns_from_long_lines_and_counts_those_that_are_too_long(tmp_path, capsys):
    """A character of a line of 9,000 bytes becomes a token; one of a line over the limit does not."""
    paths = write_corpus(tmp_path)
    for path, text in zip(paths, ("ждёт " * 1000, "ॐ " * 40_000), strict=True):
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{text.strip()}\n")
    train_tokenizer(*paths, tmp_path / "tokenizer", 503)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert not any(tokenizer.is_byte(piece) for piece in tokenizer.encode("ждёт"))
    assert any(tokenizer.is_byte(piece) for piece in tokenizer.encode("ॐ"))
    assert "1 lines of more than 65,536 bytes are left out\n" in capsys.readouterr().err


def test_train_tokenizer_takes_max_pairs_at_even_distances(tmp_path, monkeypatch):
    src, tgt = write_corpus(tmp_path, num_pairs=107)
    lines = [path.read_text(encoding="utf-8").split("\n")[:-1] for path in (src, tgt)]
    every = [sentence for pair in zip(*lines, strict=True) for sentence in pair]
    assert list(_sentences(src, tgt, 107)) == every
    monkeypatch.setattr("pipeline.train_tokenizer.MAX_PAIRS", 25)
    taken = list(_sentences(src, tgt, 107))
    assert len(taken) == 2 * 25
    places = [lines[0].index(sentence) for sentence in taken[::2]]
    assert {after - before for before, after in pairwise(places)} == {4, 5}
    assert taken[1::2] == [lines[1][place] for place in places]


def test_train_tokenizer_names_the_largest_possible_vocabulary(tmp_path):
    paths = write_corpus(tmp_path)
    with pytest.raises(
        ValueError, match=r"vocab_size must be at most \d+ for this training text, got 100000: "
    ) as error:
        train_tokenizer(*paths, tmp_path / "tokenizer", 100_000)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    train_tokenizer(*paths, tmp_path / "tokenizer", largest)
    with pytest.raises(ValueError, match="at most"):
        train_tokenizer(*paths, tmp_path / "tokenizer", largest + 1)


def test_train_tokenizer_names_the_smallest_possible_vocabulary(tmp_path):
    paths = write_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size must be at least \d+ for this .*; got 31$") as error:
        train_tokenizer(*paths, tmp_path / "tokenizer", 31)
    smallest = int(str(error.value).split("at least ")[1].split()[0])
    train_tokenizer(*paths, tmp_path / "tokenizer", smallest)
    with pytest.raises(ValueError, match="at least"):
        train_tokenizer(*paths, tmp_path / "tokenizer", smallest - 1)


def test_train_tokenizer_that_fails_leaves_the_last_one_alone(tmp_path):
    paths = write_corpus(tmp_path)
    train_tokenizer(*paths, tmp_path / "tokenizer", 503)
    before = (tmp_path / "tokenizer/spm.model").read_bytes()
    with pytest.raises(ValueError, match="at most"):
        train_tokenizer(*paths, tmp_path / "tokenizer", 100_000)
    assert (tmp_path / "tokenizer/spm.model").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer", "train.de", "train.en"]


def test_train_tokenizer_names_missing_empty_and_uneven_texts(tmp_path):
    src, tgt = write_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"train\.fr does not exist: run the validate stage first"):
        train_tokenizer(src, tmp_path / "train.fr", tmp_path / "tokenizer", 503)
    with open(tgt, "a", encoding="utf-8") as file:
        file.write("one more\n")
    with pytest.raises(ValueError, match=r"train\.en has 400 lines and .*train\.de 401"):
        train_tokenizer(src, tgt, tmp_path / "tokenizer", 503)
    for path in (src, tgt):
        path.write_text("")
    with pytest.raises(ValueError, match=r"train\.en is empty"):
        train_tokenizer(src, tgt, tmp_path / "tokenizer", 503)
    assert not (tmp_path / "tokenizer").exists()


def test_train_tokenizer_keeps_sentencepiece_silent(tmp_path, capfd):
    train_tokenizer(*write_corpus(tmp_path), tmp_path / "tokenizer", 503)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert [line.split(":")[0] for line in captured.err.replace("\r", "\n").split("\n") if line][-1] == (
        "learning the encoding ..."
    )
    assert "trainer_interface" not in captured.err


@pytest.mark.usefixtures("project")
def test_main_reports_a_fault_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_tokenizer"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("tokenize: data/clean/train.en does not exist: run the validate stage")


@pytest.fixture
def project(tmp_path, monkeypatch, request):
    (tmp_path / "conf").symlink_to(request.config.rootpath / "conf")
    (tmp_path / "params.yaml").symlink_to(request.config.rootpath / "params.yaml")
    monkeypatch.chdir(tmp_path)
