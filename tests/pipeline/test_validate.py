import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.common.languages import num_words
from pipeline.common.settings import Data, Validate
from pipeline.download import download
from pipeline.preset import write_presets
from pipeline.validate import _create, _in_script, _num_words, _respaced, mark, validate

ROOT = Path(__file__).parents[2]
MIRROR = Path.cwd() / os.environ.get("CORPUS_MIRROR", "none")
LANGUAGES = Data(corpus="own", src="en", tgt="de")
LIMITS = Validate(max_words=11, max_length_ratio=2.0, max_dropped_share=1.0, drop_copies=False)
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
    (SOUND[2][0], "ein anderer Satz .", None),  # a pair with another translation is no duplicate
    (SOUND[2][0].upper(), SOUND[2][1], None),
    ("nothing .", "\u200b \u2060", "empty"),
    ("\u00ad\u202e\ufe0f\U000e0020", "nichts .", "empty"),
    ("a \u200bzero-width space", "ein \u200bLeerzeichen", None),
]


@pytest.mark.parametrize(("src", "tgt", "reason"), FAULTY)
def test_validate_drops_a_training_pair_for_its_reason(src, tgt, reason):
    write_raw([*SOUND, (src, tgt)])
    report = validate(LANGUAGES, LIMITS)
    assert faults(report, "train") == ({reason: 1} if reason else {})
    assert len(clean("train")) == len(SOUND) + (reason is None)
    assert clean("train")[: len(SOUND)] == SOUND


@pytest.mark.parametrize(
    ("src", "tgt", "reason"),
    [
        ("see http://example.org/" + "a" * 99, "siehe da", "too_long"),
        ("aGVsbG8gd29ybGQ" * 8, "aGVsbG8gd29ybGQ" * 8, "too_long"),
        ("unbelievable extraordinarily characteristics", "ja", "length_ratio"),  # 44 characters: 5 words; (5 + 3) / 4
        ("elegant http://example.org/a", "elegant http://example.org/a", None),
    ],
)
def test_validate_counts_long_words_by_their_characters(src, tgt, reason):
    write_raw([*SOUND, (src, tgt)])
    limits = replace(LIMITS, max_length_ratio=1.99)
    assert faults(validate(LANGUAGES, limits), "train") == ({reason: 1} if reason else {})


@pytest.mark.parametrize(("length", "reason"), [(22, None), (23, "too_long")])
def test_validate_counts_chinese_by_its_characters(length, reason):
    write_raw([*SOUND, ("a sentence of six words here .", "王" * length)], VALID, TEST)
    for path in Path("data/raw").glob("*.de"):
        text = path.read_text() if path.name == "train.de" else "王\n"
        path.with_suffix(".zh").write_text(re.sub("[A-Za-z]+", "王", text))
    report = validate(replace(LANGUAGES, tgt="zh"), LIMITS)
    assert faults(report, "train") == ({reason: 1} if reason else {})
    assert report["test"]["mean_tgt_words"] == 1


@pytest.mark.parametrize("chunk_pairs", [1, 3, 100])
def test_validate_counts_and_order_do_not_depend_on_chunks(monkeypatch, chunk_pairs):
    monkeypatch.setattr("pipeline.validate.CHUNK_PAIRS", chunk_pairs)
    write_raw([*SOUND, *((src, tgt) for src, tgt, _ in FAULTY)])
    report = validate(LANGUAGES, LIMITS)
    expected = [reason for *_, reason in FAULTY if reason]
    assert faults(report, "train") == {reason: expected.count(reason) for reason in expected}
    assert report["train"]["pairs_in"] == len(SOUND) + len(FAULTY)
    assert report["train"]["dropped"] == len(expected)
    kept = [(src.strip(), tgt.strip()) for src, tgt, reason in FAULTY if reason is None]
    assert clean("train") == SOUND + kept
    assert json.loads(Path("reports/validation.json").read_text()) == report


COPIES = [("Obama 1 2 3", "Obama 1 2 3"), ("A  name .", "A name . "), ("Obama", "obama")]
"""Two of the three count as copies: differences in spaces are ignored, those in case are not."""


def test_validate_counts_pairs_whose_texts_are_equal_and_keeps_them():
    write_raw([*SOUND, *COPIES, ("", "")], valid=[*VALID, COPIES[0]], test=[*TEST, *COPIES[:2]])
    report = validate(LANGUAGES, LIMITS)
    assert [report[split]["copies"] for split in ("train", "valid", "test")] == [2, 1, 2]
    assert faults(report, "train") == {"empty": 1, "train_in_test": 2}
    assert faults(report, "test") == {}


def test_validate_drops_pairs_whose_texts_are_equal_from_train_by_a_setting():
    write_raw([*SOUND, *COPIES], valid=[*VALID, ("7", "7")], test=[*TEST, ("8", "8")])
    report = validate(LANGUAGES, replace(LIMITS, drop_copies=True))
    assert faults(report, "train") == {"copy": 2}
    assert clean("train") == [*SOUND, COPIES[2]]
    assert faults(report, "valid") == faults(report, "test") == {"copy": 1}
    assert (clean("valid")[-1], clean("test")[-1]) == (("7", "7"), ("8", "8"))
    assert [report[split]["copies"] for split in ("train", "valid", "test")] == [2, 1, 1]


def test_validate_counts_a_pair_under_its_first_reason_only():
    write_raw([*SOUND, ("long " * 12, "\ufffd")])
    assert faults(validate(LANGUAGES, LIMITS), "train") == {"broken_character": 1}


def test_validate_keeps_all_of_test_and_what_can_be_batched_of_valid():
    soft = [pair[:2] for pair in FAULTY[2:5]]
    unusable = [FAULTY[0][:2], FAULTY[5][:2]]
    write_raw(SOUND, valid=[*VALID, *VALID, *soft, *unusable], test=[*TEST, *TEST, *soft, *unusable])
    report = validate(LANGUAGES, LIMITS)
    expected = {"empty": 1, "broken_character": 1, "control_character": 2, "too_long": 1}
    assert faults(report, "valid") == faults(report, "test") == expected
    assert clean("valid") == [*VALID, *VALID, *soft]
    assert [src for src, _ in clean("test")] == [src.strip() for src, _ in [*TEST, *TEST, *soft, *unusable]]
    assert (report["valid"]["dropped"], report["test"]["dropped"]) == (2, 0)


def test_validate_counts_leaks_in_train_and_in_test():
    leak = (TEST[0][0], "etwas anderes .")
    write_raw([*SOUND, leak, leak, (VALID[0][0], "x y z .")], test=[*TEST, SOUND[0], ("unseen", "neu")])
    report = validate(LANGUAGES, LIMITS)
    assert faults(report, "train") == {"train_in_test": 3, "train_in_valid": 1}
    assert report["test"]["found_in_train"] == 2
    assert report["valid"]["found_in_train"] == 1


def test_validate_makes_white_space_one_space_and_counts_it():
    pair = (" \ufeffone\u2028line\x0cof\x85five\r", " eine\tZeile  aus\u00a0fünf ")
    write_raw([*SOUND, pair])
    report = validate(LANGUAGES, LIMITS)
    assert clean("train")[-1] == ("one line of five", "eine Zeile aus fünf")
    assert [report[split]["spaces_normalised"] for split in ("train", "valid", "test")] == [1, 0, 0]
    assert len(Path("data/clean/train.en").read_text().splitlines()) == len(SOUND) + 1


def test_validate_means_are_of_the_kept_pairs():
    write_raw([("a b c", "d e"), ("f", "g h i"), ("", "x x x x x")])
    report = validate(LANGUAGES, LIMITS)["train"]
    assert (report["mean_src_words"], report["mean_tgt_words"]) == (2.0, 2.5)


def test_validate_keeps_trees_with_their_sentences():
    write_raw([SOUND[0], ("", "leer"), SOUND[1]])
    Path("data/raw/train.trees").write_text("(S  a)\n(S  b)\n(S  c)\n")
    validate(LANGUAGES, LIMITS)
    assert Path("data/clean/train.trees").read_text() == "(S  a)\n(S  c)\n"
    assert not Path("data/clean/test.trees").exists()


def test_validate_lists_faulty_pairs_with_line_reason_and_fate():
    write_raw([*SOUND, ("", "leer"), SOUND[4]], test=[*TEST, ("\ufffd", "x")])
    validate(LANGUAGES, LIMITS)
    rows = [line.split("\t") for line in Path("data/clean/faults.tsv").read_text().splitlines()]
    assert rows == [
        ["split", "line", "reason", "fate", "src", "tgt"],
        ["train", "6", "empty", "dropped", "", "leer"],
        ["train", "7", "duplicate", "dropped", *SOUND[4]],
        ["test", "2", "broken_character", "kept", "\ufffd", "x"],
    ]


def test_validate_passes_a_language_of_unknown_script():
    write_raw([*SOUND, ("он дома", "er ist daheim")])
    for split in ("train", "valid", "test"):
        shutil.copy(f"data/raw/{split}.en", f"data/raw/{split}.xx")
    report = validate(Data(corpus="own", src="xx", tgt="de"), LIMITS)
    assert faults(report, "train") == {}


def test_find_faults_cannot_be_turned_off_by_the_environment():
    write_raw([*SOUND, ("", "leer")])
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, name)
    shutil.copytree(ROOT / "conf", "conf")
    write_presets(["data=own"])
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
        ("train.de", None, r"data/raw/train\.de does not exist: run the download stage"),
        ("valid.en", b"", r"data/raw/valid\.en is empty: it must have at least one sentence"),
        ("test.de", b"eins\nzwei\n", r"test\.de has 2 lines, but data/raw/test\.en has 1: .* line 2 exists"),
        ("train.en", b"one\ntwo", r"train\.de has 5 lines, but data/raw/train\.en has 2: .* line 3 exists"),
        ("train.en", b"a\nb\nc\xc3\xa4 \xff\nd\ne\n", r"train\.en line 3, byte 5 \(0xff\) is not UTF-8"),
        ("train.trees", b"(S)\n", r"train\.trees has 1 lines, but data/raw/train\.en has 5"),
    ],
)
def test_validate_stops_at_a_hard_fault_with_file_and_line(file, content, message):
    write_raw(SOUND)
    path = Path("data/raw", file)
    path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        validate(LANGUAGES, LIMITS)
    assert "\n" not in str(caught.value)
    assert not Path("data/clean").exists()
    assert not Path("reports").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_validate_names_a_full_disk_with_the_way_out(monkeypatch):
    write_raw(SOUND)
    monkeypatch.setattr("pipeline.validate._create", lambda path: _create(Path("/dev/full")))
    with pytest.raises(OSError, match=r"free some space and run again: 'data/clean'"):
        validate(LANGUAGES, LIMITS)
    assert not Path("data/clean").exists()


def test_validate_needs_no_end_of_the_last_line():
    write_raw(SOUND)
    Path("data/raw/test.en").write_text("all is well .")
    validate(LANGUAGES, LIMITS)
    assert clean("test") == [("all is well .", TEST[0][1])]


def test_check_share_stops_with_the_counts():
    write_raw([*SOUND, ("", "leer"), ("\ufffd", "x"), ("\ufffd", "y"), SOUND[0], SOUND[1]])
    limits = replace(LIMITS, max_dropped_share=0.5)
    assert validate(LANGUAGES, limits)["train"]["dropped"] == 5
    limits = replace(LIMITS, max_dropped_share=0.4)
    counts = "empty 1, broken_character 2, duplicate 2"
    message = rf"train\.en: 5 of 10 pairs are faulty.*\(0\.4\).*: {counts}; the first is line 6 \(empty\)"
    with pytest.raises(ValueError, match=message):
        validate(LANGUAGES, limits)


def test_check_share_stops_a_test_split_of_a_wrong_file():
    write_raw(SOUND, test=[("он дома", "daheim")])
    with pytest.raises(ValueError, match=r"data/raw/test\.en: 1 of 1 pairs are faulty.*wrong_script 1"):
        validate(LANGUAGES, replace(LIMITS, max_dropped_share=0.1))


def test_validate_stops_at_a_split_without_a_sound_pair():
    write_raw([("", "leer")])
    with pytest.raises(ValueError, match=r"data/raw/train\.en: all pairs are faulty, none is left: empty 1"):
        validate(LANGUAGES, LIMITS)


letters = st.characters(exclude_categories=["Cs"], exclude_characters="\n")
texts = st.text(letters | st.sampled_from("ab \r\t\u00a0\u2028\ufeff\ufffd"), max_size=12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(texts, texts), max_size=7))
def test_validate_passes_its_own_output(pairs):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_raw([*SOUND, *pairs])
        first = validate(LANGUAGES, LIMITS)["train"]
        assert first["pairs_in"] == first["pairs"] + sum(first["faults"].values())
        assert first["pairs"] == len(clean("train"))
        once = clean("train")
        shutil.rmtree("data/raw")
        shutil.move("data/clean", "data/raw")
        second = validate(LANGUAGES, LIMITS)["train"]
        assert second["dropped"] == second["spaces_normalised"] == 0
        assert clean("train") == once


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=9))
@example(
    ["a b", "a  b", "a\tb", "a \t b", "a\u3000 b", " a", "b ", "\ufeff a \ufeff", "\u00a0", " \ufeff ", "\x1ca\x1c"]
)
def test_respaced_and_num_words_are_those_of_simple_expressions(sentences):
    raw = pl.DataFrame({"src": sentences})
    respaced = raw.select(_respaced("src"))
    simple = raw.select(pl.col("src").str.replace_all(r"\s+", " ").str.strip_chars(" \ufeff"))
    assert respaced.equals(simple)
    assert respaced.select(_num_words("src", "en")).equals(simple.select(pl.col("src").str.count_matches(r"\S+")))
    for language in ("zh-Hans", "th"):
        counts = respaced.select(_num_words("src", language))["src"].to_list()
        assert counts == [num_words(text, language) for text in respaced["src"]]


@settings(deadline=None)
@given(st.text(st.sampled_from("aß1 .яжΩ語"), max_size=9))
def test_in_script_allows_half_of_the_letters_to_be_of_another(sentence):
    letters, latin = ([char for char in sentence if char in known] for known in ("aßяжΩ語", "aß"))
    found = pl.DataFrame({"src": [sentence]}).select(_in_script("src", "de"))
    assert found.item() == (len(latin) >= len(letters) / 2)


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([0, 1, 2**63, 2**64 - 1])] * 3), min_size=1, max_size=30))
def test_mark_finds_what_sets_of_hashes_find(rows):
    hashes = pl.DataFrame(rows, schema=dict.fromkeys(("key", "src", "tgt"), pl.UInt64), orient="row")
    marks = mark("train", {"train": hashes, "test": hashes[:1], "valid": hashes[-1:]})
    assert marks["train_in_test"].to_list() == [row[0] == rows[0][0] for row in rows]
    assert marks["train_in_valid"].to_list() == [row[0] == rows[-1][0] for row in rows]
    before = [{row[1:] for row in rows[:i]} for i in range(len(rows))]
    assert marks["duplicate"].to_list() == [row[1:] in seen for row, seen in zip(rows, before, strict=True)]


@pytest.mark.skipif(not MIRROR.is_dir(), reason="needs Multi30k: set CORPUS_MIRROR to its folder")
def test_validate_multi30k_finds_three_duplicates_and_no_leak_of_test():
    multi30k = Data(corpus="multi30k", src="en", tgt="de")
    download(multi30k, str(MIRROR))
    limits = Validate(max_words=100, max_length_ratio=4.0, max_dropped_share=0.05, drop_copies=False)
    report = validate(multi30k, limits)
    assert [report[split]["pairs_in"] for split in ("train", "valid", "test")] == [29_000, 1_014, 1_000]
    assert faults(report, "train") == {"duplicate": 3, "train_in_valid": 1}
    assert report["test"]["found_in_train"] == 0
