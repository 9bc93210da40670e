import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import download
from pipeline import validate as stage
from pipeline.common.settings import Download, Validate

ROOT = Path(stage.__file__).parents[1]
MIRROR = Path.cwd() / os.environ.get("CORPUS_MIRROR", "none")
LANGUAGES = Download(corpus="files", src="en", tgt="de")
LIMITS = Validate(max_words=11, max_length_ratio=2.0, max_dropped_share=1.0)
SOUND = [(f"sentence {i} stands here .", f"Satz {i} steht hier .") for i in range(5)]
VALID = [("the second week begins .", "die zweite Woche beginnt .")]
TEST = [("all is well , he said .", "alles ist gut , sagte er .")]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_raw(train, valid=VALID, test=TEST):
    Path("data/raw").mkdir(parents=True, exist_ok=True)
    for split, pairs in (("train", train), ("valid", valid), ("test", test)):
        for code, side in (("en", 0), ("de", 1)):
            text = "".join(f"{pair[side]}\n" for pair in pairs)
            Path(f"data/raw/{split}.{code}").write_bytes(text.encode())


def clean(split):
    sides = [Path(f"data/clean/{split}.{code}").read_bytes().decode().split("\n") for code in ("en", "de")]
    assert all(side.pop() == "" for side in sides)
    return list(zip(*sides, strict=True))


def faults(report, split):
    return {reason: number for reason, number in report[split]["faults"].items() if number}


FAULTY = [
    ("", "nichts .", "empty"),
    ("nothing .", " \t\u00a0", "empty"),
    ("a bro\ufffdken sign", "ein kaputtes Zeichen", "broken_character"),
    ("a nul \0 here", "eine Null hier", "control_character"),
    ("a C1 sign \x92 here", "ein Zeichen hier", "control_character"),
    ("twelve " * 12, "zwölf " * 11, "too_long"),
    ("one", "acht " * 6, "length_ratio"),  # (6 + 3) / (1 + 3) > 2
    ("он дома", "er ist daheim", "wrong_script"),
    ("he is at home", "он дома", "wrong_script"),
    ("All  IS well , he said .", "etwas anderes .", "train_in_test"),
    ("ＡＬＬ is well , he said .", "etwas anderes .", "train_in_test"),
    ("the second week begins .", "die zweite Woche hebt an .", "train_in_valid"),
    (*SOUND[3], "duplicate"),
    ("one", "fünf " * 5, None),  # (5 + 3) / (1 + 3) == 2
    ("eleven " * 11, "elf " * 11, None),
    ("Dostojewski ( Достоевский ) wrote", "Dostojewski ( Достоевский ) schrieb", None),
    ("1 2 3 !", "1 2 3 !", None),  # no letters at all
    (SOUND[2][0], "ein anderer Satz .", None),  # another translation is no duplicate
    (SOUND[2][0].upper(), SOUND[2][1], None),
]


@pytest.mark.parametrize(("src", "tgt", "reason"), FAULTY)
def test_training_pair_is_dropped_for_its_reason(src, tgt, reason):
    write_raw([*SOUND, (src, tgt)])
    report = stage.validate(LANGUAGES, LIMITS)
    assert faults(report, "train") == ({reason: 1} if reason else {})
    assert len(clean("train")) == len(SOUND) + (reason is None)
    assert clean("train")[: len(SOUND)] == SOUND


@pytest.mark.parametrize("chunk_pairs", [1, 3, 100])
def test_counts_and_order_do_not_depend_on_the_chunks(monkeypatch, chunk_pairs):
    monkeypatch.setattr(stage, "CHUNK_PAIRS", chunk_pairs)
    write_raw([*SOUND, *((src, tgt) for src, tgt, _ in FAULTY)])
    report = stage.validate(LANGUAGES, LIMITS)
    expected = [reason for *_, reason in FAULTY if reason]
    assert faults(report, "train") == {reason: expected.count(reason) for reason in expected}
    assert report["train"]["pairs_in"] == len(SOUND) + len(FAULTY)
    assert report["train"]["dropped"] == len(expected)
    kept = [(src.strip(), tgt.strip()) for src, tgt, reason in FAULTY if reason is None]
    assert clean("train") == SOUND + kept
    assert json.loads(Path("reports/validation.json").read_text()) == report


def test_pair_with_two_faults_is_counted_once_under_the_first_reason():
    write_raw([*SOUND, ("long " * 12, "\ufffd")])
    assert faults(stage.validate(LANGUAGES, LIMITS), "train") == {"broken_character": 1}


def test_test_keeps_every_pair_and_valid_loses_what_cannot_be_batched():
    soft = [pair[:2] for pair in FAULTY[2:5]]
    unusable = [FAULTY[0][:2], FAULTY[5][:2]]
    write_raw(SOUND, valid=[*VALID, *VALID, *soft, *unusable], test=[*TEST, *TEST, *soft, *unusable])
    report = stage.validate(LANGUAGES, LIMITS)
    expected = {"empty": 1, "broken_character": 1, "control_character": 2, "too_long": 1}
    assert faults(report, "valid") == faults(report, "test") == expected
    assert clean("valid") == [*VALID, *VALID, *soft]
    assert [src for src, _ in clean("test")] == [src.strip() for src, _ in [*TEST, *TEST, *soft, *unusable]]
    assert (report["valid"]["dropped"], report["test"]["dropped"]) == (2, 0)


def test_leaks_are_counted_on_both_sides():
    leak = (TEST[0][0], "etwas anderes .")
    write_raw([*SOUND, leak, leak, (VALID[0][0], "x y z .")], test=[*TEST, SOUND[0], ("unseen", "neu")])
    report = stage.validate(LANGUAGES, LIMITS)
    assert faults(report, "train") == {"train_in_test": 3, "train_in_valid": 1}
    assert report["test"]["found_in_train"] == 2
    assert report["valid"]["found_in_train"] == 1


def test_white_space_of_every_kind_is_made_one_space_and_counted():
    pair = (" \ufeffone\u2028line\x0cof\x85five\r", " eine\tZeile  aus\u00a0fünf ")
    write_raw([*SOUND, pair])
    report = stage.validate(LANGUAGES, LIMITS)
    assert clean("train")[-1] == ("one line of five", "eine Zeile aus fünf")
    assert [report[split]["spaces_normalised"] for split in ("train", "valid", "test")] == [1, 0, 0]
    assert len(Path("data/clean/train.en").read_text().splitlines()) == len(SOUND) + 1


def test_means_are_of_the_words_of_the_kept_pairs():
    write_raw([("a b c", "d e"), ("f", "g h i"), ("", "x x x x x")])
    report = stage.validate(LANGUAGES, LIMITS)["train"]
    assert (report["mean_src_words"], report["mean_tgt_words"]) == (2.0, 2.5)


def test_trees_stay_beside_their_sentences():
    write_raw([SOUND[0], ("", "leer"), SOUND[1]])
    Path("data/raw/train.trees").write_text("(S  a)\n(S  b)\n(S  c)\n")
    stage.validate(LANGUAGES, LIMITS)
    assert Path("data/clean/train.trees").read_text() == "(S  a)\n(S  c)\n"
    assert not Path("data/clean/test.trees").exists()


def test_faulty_pairs_are_listed_with_line_reason_and_fate():
    write_raw([*SOUND, ("", "leer"), SOUND[4]], test=[*TEST, ("\ufffd", "x")])
    stage.validate(LANGUAGES, LIMITS)
    rows = [line.split("\t") for line in Path("data/clean/faults.tsv").read_text().splitlines()]
    assert rows == [
        ["split", "line", "reason", "fate", "src", "tgt"],
        ["train", "6", "empty", "dropped", "", "leer"],
        ["train", "7", "duplicate", "dropped", *SOUND[4]],
        ["test", "2", "broken_character", "kept", "\ufffd", "x"],
    ]


def test_language_of_unknown_script_passes():
    write_raw([*SOUND, ("он дома", "er ist daheim")])
    for split in ("train", "valid", "test"):
        shutil.copy(f"data/raw/{split}.en", f"data/raw/{split}.xx")
    report = stage.validate(Download(corpus="files", src="xx", tgt="de"), LIMITS)
    assert faults(report, "train") == {}


def test_environment_cannot_turn_the_checks_off():
    write_raw([*SOUND, ("", "leer")])
    shutil.copytree(ROOT / "conf", "conf")
    params = (ROOT / "params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(re.sub("(?m)^data: .*", "data: files", params), encoding="utf-8")
    switches = {"PANDERA_VALIDATION_ENABLED": "False", "PANDERA_VALIDATION_DEPTH": "SCHEMA_ONLY"}
    result = run_command(switches)
    assert result.returncode == 0
    assert result.stdout.startswith("train: 5 of 6 pairs kept; faults: empty 1\nvalid: 1 of 1 pairs kept")


def run_command(environment):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.validate"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.de", None, r"data/raw/train\.de is missing: run the download stage"),
        ("valid.en", b"", r"data/raw/valid\.en is empty: at least one sentence"),
        ("test.de", b"eins\nzwei\n", r"test\.de has 2 lines, data/raw/test\.en has 1: from line 2 on"),
        ("train.en", b"one\ntwo", r"train\.de has 5 lines, data/raw/train\.en has 2: from line 3 on"),
        ("train.en", b"a\nb\nc\xc3\xa4 \xff\nd\ne\n", r"train\.en line 3, byte 5 \(0xff\) is not UTF-8"),
        ("train.trees", b"(S)\n", r"train\.trees has 1 lines, data/raw/train\.en has 5"),
    ],
)
def test_hard_fault_stops_with_file_and_line(file, content, message):
    write_raw(SOUND)
    path = Path("data/raw", file)
    path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        stage.validate(LANGUAGES, LIMITS)
    assert "\n" not in str(caught.value)
    assert not Path("data/clean").exists()
    assert not Path("reports").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_is_named_with_the_way_out(monkeypatch):
    write_raw(SOUND)
    create = stage._create
    monkeypatch.setattr(stage, "_create", lambda path: create(Path("/dev/full")))
    with pytest.raises(OSError, match=r"free some space and run again: 'data/clean'"):
        stage.validate(LANGUAGES, LIMITS)
    assert not Path("data/clean").exists()


def test_last_line_needs_no_line_end():
    write_raw(SOUND)
    Path("data/raw/test.en").write_text("all is well .")
    stage.validate(LANGUAGES, LIMITS)
    assert clean("test") == [("all is well .", TEST[0][1])]


def test_too_large_a_share_of_faults_stops_with_the_counts():
    write_raw([*SOUND, ("", "leer"), ("\ufffd", "x"), ("\ufffd", "y"), SOUND[0], SOUND[1]])
    limits = Validate(max_words=11, max_length_ratio=2.0, max_dropped_share=0.5)
    assert stage.validate(LANGUAGES, limits)["train"]["dropped"] == 5
    limits = Validate(max_words=11, max_length_ratio=2.0, max_dropped_share=0.4)
    counts = "empty 1, broken_character 2, duplicate 2"
    message = rf"train\.en: 5 of 10 pairs are faulty.*\(0\.4\).*: {counts}; the first is line 6 \(empty\)"
    with pytest.raises(ValueError, match=message):
        stage.validate(LANGUAGES, limits)


def test_test_split_of_a_wrong_file_stops_too():
    write_raw(SOUND, test=[("он дома", "daheim")])
    with pytest.raises(ValueError, match=r"data/raw/test\.en: 1 of 1 pairs are faulty.*wrong_script 1"):
        stage.validate(LANGUAGES, Validate(max_words=11, max_length_ratio=2.0, max_dropped_share=0.1))


def test_split_without_a_sound_pair_stops_whatever_share_is_allowed():
    write_raw([("", "leer")])
    with pytest.raises(ValueError, match=r"data/raw/train\.en: no pair is left, all are faulty: empty 1"):
        stage.validate(LANGUAGES, LIMITS)


letters = st.characters(exclude_categories=["Cs"], exclude_characters="\n")
texts = st.text(letters | st.sampled_from("ab \r\t\u00a0\u2028\ufeff\ufffd"), max_size=12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(texts, texts), max_size=7))
def test_clean_pairs_are_a_part_of_the_raw_ones_and_pass_again(pairs):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_raw([*SOUND, *pairs])
        first = stage.validate(LANGUAGES, LIMITS)["train"]
        assert first["pairs_in"] == first["pairs"] + sum(first["faults"].values())
        assert first["pairs"] == len(clean("train"))
        once = clean("train")
        shutil.rmtree("data/raw")
        shutil.move("data/clean", "data/raw")
        second = stage.validate(LANGUAGES, LIMITS)["train"]
        assert second["dropped"] == second["spaces_normalised"] == 0
        assert clean("train") == once


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=9))
@example(
    ["a b", "a  b", "a\tb", "a \t b", "a\u3000 b", " a", "b ", "\ufeff a \ufeff", "\u00a0", " \ufeff ", "\x1ca\x1c"]
)
def test_spaces_and_words_are_those_of_the_simple_expressions(sentences):
    raw = pl.DataFrame({"src": sentences})
    respaced = raw.select(stage._respaced("src"))
    simple = raw.select(pl.col("src").str.replace_all(r"\s+", " ").str.strip_chars(" \ufeff"))
    assert respaced.equals(simple)
    assert respaced.select(stage._num_words("src")).equals(simple.select(pl.col("src").str.count_matches(r"\S+")))


@settings(deadline=None)
@given(st.text(st.sampled_from("aß1 .яжΩ語"), max_size=9))
def test_a_sentence_is_in_its_script_unless_more_than_half_of_its_letters_are_of_another(sentence):
    letters, latin = ([char for char in sentence if char in known] for known in ("aßяжΩ語", "aß"))
    found = pl.DataFrame({"src": [sentence]}).select(stage._in_script("src", "de"))
    assert found.item() == (len(latin) >= len(letters) / 2)


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([0, 1, 2**63, 2**64 - 1])] * 3), min_size=1, max_size=30))
def test_marks_are_those_of_sets_of_hashes(rows):
    hashes = pl.DataFrame(rows, schema=dict.fromkeys(("key", "src", "tgt"), pl.UInt64), orient="row")
    marks = stage.mark("train", {"train": hashes, "test": hashes[:1], "valid": hashes[-1:]})
    assert marks["train_in_test"].to_list() == [row[0] == rows[0][0] for row in rows]
    assert marks["train_in_valid"].to_list() == [row[0] == rows[-1][0] for row in rows]
    before = [{row[1:] for row in rows[:i]} for i in range(len(rows))]
    assert marks["duplicate"].to_list() == [row[1:] in seen for row, seen in zip(rows, before, strict=True)]


@pytest.mark.skipif(not MIRROR.is_dir(), reason="needs Multi30k: set CORPUS_MIRROR to its folder")
def test_multi30k_has_three_duplicates_and_no_test_sentence_in_training():
    multi30k = Download(corpus="multi30k", src="en", tgt="de")
    download.download(multi30k, str(MIRROR))
    report = stage.validate(multi30k, Validate(max_words=100, max_length_ratio=4.0, max_dropped_share=0.05))
    assert [report[split]["pairs_in"] for split in ("train", "valid", "test")] == [29_000, 1_014, 1_000]
    assert faults(report, "train") == {"duplicate": 3, "train_in_valid": 1}
    assert report["test"]["found_in_train"] == 0
