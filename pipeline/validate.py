"""Check every sentence pair of the corpus; drop and count the faulty ones.

    python -m pipeline.validate

Reads data/raw/. Writes data/clean/, with faults.tsv, which lists every faulty
pair, and reports/validation.json.

The stage stops, and names file and line, if a file is missing or empty, if
source and target have different numbers of lines, or if a line is not UTF-8.

A faulty pair is counted under the first reason that applies:

- In train it is dropped.
- In valid it is dropped if a sentence is empty or too long, because training
  could not batch it; otherwise it is kept.
- In test it is kept, so that BLEU can be compared with other results on that
  test set.

If more than validate.max_dropped_share of a split is faulty, dropped or kept,
the stage stops and prints the counts, because the file is probably a wrong one.

A sentence is empty if it has no visible character. Pairs whose source and
target are equal (names, numbers, untranslated text) are counted in the report;
with validate.drop_copies they are faults.

A training pair whose source is also in test or valid is a leak and is dropped
from train. Sources are compared after NFKC and lower-casing. Translations are
not compared: another translation would still teach the model a test sentence.
Short common sentences ("Thank you .") are dropped too: training loses next to
nothing, and the test does not ask for sentences that were learned by heart.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pandera.polars as pa
import polars as pl
from pandera.config import ValidationDepth, config_context
from pandera.errors import SchemaErrors
from tqdm import tqdm

from pipeline.common import cli
from pipeline.common.atomic_io import replace_folder, write_json
from pipeline.common.languages import WORD_CHARACTERS, language_of
from pipeline.common.paths import CLEAN, RAW, REPORTS
from pipeline.common.settings import Data, Validate, load_settings
from pipeline.common.text import VISIBLE

CHUNK_PAIRS = 100_000
LONG_WORD = 10
"""In characters. If a sentence has longer words than this on average (URLs, base64), every LONG_WORD characters
count as a word."""
OTHER_SCRIPT_SHARE = 0.5  # of the letters of a sentence; names and quotations are below that

REASONS = (
    "empty",
    "broken_character",
    "control_character",
    "too_long",
    "length_ratio",
    "wrong_script",
    "copy",
    "train_in_test",
    "train_in_valid",
    "duplicate",
)
PairFault = pl.Enum(REASONS)
DROPPED = {"train": REASONS, "valid": ("empty", "too_long"), "test": ()}
ONLY_IN_TRAIN = ("train_in_test", "train_in_valid", "duplicate")

SCRIPTS = {  # as in a regular expression's character class -> languages
    r"\p{Latin}": "cs da de en es et fi fr ga hr hu is it lt lv mt nl no pl pt ro sk sl sq sv tr vi",
    r"\p{Cyrillic}": "be bg mk ru uk",
    r"\p{Greek}": "el",
    r"\p{Arabic}": "ar fa ur",
    r"\p{Hebrew}": "he",
    r"\p{Devanagari}": "hi mr ne",
    r"\p{Han}": "zh",
    r"\p{Han}\p{Hiragana}\p{Katakana}": "ja",
    r"\p{Han}\p{Hangul}": "ko",
}


def validate(languages: Data, limits: Validate) -> dict[str, dict[str, Any]]:
    """Write data/clean/ and reports/validation.json; return the report. Raises ValueError where the stage must stop.

    The text is read twice, in chunks: first to find duplicates and leaks, which need all pairs, then to check each
    pair by itself. Memory holds three hashes per pair and one chunk of text.
    """
    src, tgt = languages.src, languages.tgt
    paths = {split: raw_paths(split, src, tgt) for split in ("train", "valid", "test")}
    hashes = {split: read_hashes(split, paths[split]) for split in paths}
    schema = pair_schema(src, tgt, limits)
    report: dict[str, dict[str, Any]] = {}
    with replace_folder(CLEAN) as folder, _create(folder / "faults.tsv") as listing:
        listing.write("split\tline\treason\tfate\tsrc\ttgt\n")
        for split in paths:
            pairs = read_pairs(split, paths[split], {"src": src, "tgt": tgt}, mark(split, hashes))
            counts, faults = _clean(split, paths[split], pairs, schema, folder, listing)
            check_share(paths[split]["src"], counts["pairs_in"], faults, limits.max_dropped_share)
            if not counts["pairs"]:
                raise ValueError(f"{paths[split]['src']}: all pairs are faulty, none is left: {_counts(faults)}")
            report[split] = _summary(split, counts, faults)
    for split in ("valid", "test"):
        found = hashes[split]["key"].is_in(hashes["train"]["key"].implode())
        report[split]["found_in_train"] = int(found.sum())
    write_json(REPORTS / "validation.json", report)
    return report


def raw_paths(split: str, src: str, tgt: str) -> dict[str, Path]:
    """Return the paths of src, tgt and, if it exists, trees. Raises ValueError if a file is missing or empty."""
    paths = {"src": RAW / f"{split}.{src}", "tgt": RAW / f"{split}.{tgt}", "trees": RAW / f"{split}.trees"}
    if not paths["trees"].exists():
        del paths["trees"]
    for path in paths.values():
        if not path.exists():
            raise ValueError(f"{path} does not exist: run the download stage first")
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty: it must have at least one sentence")
    return paths


def read_hashes(split: str, paths: dict[str, Path]) -> pl.DataFrame:
    """Return one row per pair: the hashes of `src` and `tgt`, and `key`, the hash of the normalised source that finds
    leaks.

    Each hash has 64 bits: among 5 million keys, the probability that any two collide is about 10^-6. Raises
    ValueError if the files do not have the same number of lines or are not UTF-8.
    """
    key = pl.col("src").str.normalize("NFKC").str.to_lowercase().hash().alias("key")
    hashes = {"src": [pl.col("src").hash(), key], "tgt": [pl.col("tgt").hash()], "trees": [pl.col("trees").hash()]}
    sides = []
    with _bar(f"{split}: compare", paths) as bar:
        for side, path in paths.items():
            chunks = (lines.alias(side).to_frame() for lines in _read_lines(path, bar))
            sides.append(pl.concat([chunk.select(_respaced(side)).select(hashes[side]) for chunk in chunks]))
    for path, frame in zip(paths.values(), sides, strict=True):
        found, expected = len(frame), len(sides[0])
        if found != expected:
            raise ValueError(
                f"{path} has {found:,} lines, but {paths['src']} has {expected:,}: line i of both must be the same "
                f"sentence, but line {min(found, expected) + 1:,} exists in only one"
            )
    return pl.concat(sides[:2], how="horizontal")


def read_pairs(
    split: str, paths: dict[str, Path], languages: dict[str, str], marks: pl.DataFrame
) -> Iterator[pl.DataFrame]:
    """Yield chunks with one row per pair: index; src, tgt and, if they exist, trees; words and length; whether spaces
    changed; the columns of `marks`.

    Every run of white space becomes one space; white space at the start and end is removed.
    """
    start = 0
    with _bar(f"{split}: check", paths) as bar:
        for texts in zip(*(_read_lines(path, bar) for path in paths.values()), strict=True):
            lines = pl.DataFrame(dict(zip(paths, texts, strict=True))).with_row_index(offset=start)
            respaced = {side: _respaced(side) for side in ("src", "tgt")}
            changed = [(text != pl.col(side)).alias(f"{side}_respaced") for side, text in respaced.items()]
            words = [_num_words(side, code).alias(f"{side}_words") for side, code in languages.items()]
            lengths = [_length(side).alias(f"{side}_length") for side in respaced]
            chunk = lines.with_columns(*respaced.values(), *changed).with_columns(words).with_columns(lengths)
            yield pl.concat([chunk, marks.slice(start, len(chunk))], how="horizontal")
            start += len(chunk)


def _respaced(side: str) -> pl.Expr:
    """Replaces only what is not yet a single space: four times as fast as replacing every run."""
    return pl.col(side).str.replace_all(r"[\s--[ ]]\s*| \s+", " ").str.strip_chars(" \ufeff")  # byte order mark


def _num_words(side: str, language: str) -> pl.Expr:
    """Counts the words of respaced text as `num_words` of pipeline/common/languages.py does."""
    if characters := WORD_CHARACTERS.get(language_of(language)):
        return (
            pl.col(side).str.len_chars() - pl.col(side).str.count_matches(" ", literal=True) + (characters - 1)
        ) // characters
    return pl.col(side).str.count_matches(" ", literal=True) + (pl.col(side) != "")


def _length(side: str) -> pl.Expr:
    """The length that the limits apply to: the number of words, or of characters / LONG_WORD if that is larger."""
    return pl.max_horizontal(f"{side}_words", (pl.col(side).str.len_chars() + (LONG_WORD - 1)) // LONG_WORD)


def _read_lines(path: Path, bar: tqdm) -> Iterator[pl.Series]:
    with path.open("rb") as file:
        while text := b"".join(islice(file, CHUNK_PAIRS)):
            try:
                lines = pl.read_lines(text)["line"]
            except pl.exceptions.ComputeError:
                _raise_broken_utf8(path)
                raise
            yield lines
            bar.update(len(text))


def _bar(title: str, paths: dict[str, Path]) -> tqdm:
    """A progress bar, shown only if reading takes longer than a second."""
    total = sum(path.stat().st_size for path in paths.values())
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, delay=1, leave=False)


def _raise_broken_utf8(path: Path) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} line {number:,}, byte {error.start + 1:,} (0x{line[error.start]:02x}) is not UTF-8: "
                    "convert the file, or correct the line"
                ) from None


def mark(split: str, hashes: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """Return one row per pair of this split, with a boolean column for each reason of ONLY_IN_TRAIN."""
    if split != "train":
        return hashes[split].select(pl.repeat(False, pl.len()).alias(reason) for reason in ONLY_IN_TRAIN)
    pair = pl.col("src").cast(pl.UInt128) * 2**64 + pl.col("tgt")  # a struct of both takes five times the memory
    return hashes["train"].select(
        pl.col("key").is_in(hashes["test"]["key"].implode()).alias("train_in_test"),
        pl.col("key").is_in(hashes["valid"]["key"].implode()).alias("train_in_valid"),
        (~pair.is_first_distinct()).alias("duplicate"),
    )


def pair_schema(src: str, tgt: str, limits: Validate) -> pa.DataFrameSchema:
    """The schema of pairs without a fault: one check for each of REASONS, with its name ("copy" only if
    validate.drop_copies).

    The length ratio is (longer + 3) / (shorter + 3), in words (see `_length`), so that a few more words in a short
    sentence are not a fault.
    """
    sides = pl.col("src", "tgt")
    shorter = pl.min_horizontal("src_length", "tgt_length") + 3
    longer = pl.max_horizontal("src_length", "tgt_length") + 3
    sound = {
        "empty": pl.all_horizontal(sides.str.contains(VISIBLE)),
        "broken_character": ~pl.any_horizontal(sides.str.contains("\ufffd", literal=True)),
        "control_character": ~pl.any_horizontal(sides.str.contains(r"\p{Cc}")),
        "too_long": longer <= limits.max_words + 3,
        "length_ratio": longer <= limits.max_length_ratio * shorter,
        "wrong_script": _in_script("src", src) & _in_script("tgt", tgt),
        **({"copy": pl.col("src") != pl.col("tgt")} if limits.drop_copies else {}),
        **{reason: ~pl.col(reason) for reason in ONLY_IN_TRAIN},
    }
    return pa.DataFrameSchema(
        {
            "index": pa.Column(pl.UInt32),
            **{side: pa.Column(pl.String) for side in ("src", "tgt")},
            **{f"{side}_respaced": pa.Column(pl.Boolean) for side in ("src", "tgt")},
            **{f"{side}_{count}": pa.Column(pl.UInt32) for side in ("src", "tgt") for count in ("words", "length")},
            "trees": pa.Column(pl.String, required=False),
            **{reason: pa.Column(pl.Boolean) for reason in ONLY_IN_TRAIN},
        },
        checks=[_check(reason, sound[reason]) for reason in REASONS if reason in sound],
        strict=True,
    )


def _check(name: str, sound: pl.Expr) -> pa.Check:
    return pa.Check(lambda data: data.lazyframe.select(sound), name=name)


def _in_script(side: str, language: str) -> pl.Expr:
    """True if at most OTHER_SCRIPT_SHARE of the letters are from another script than the language's; always true if
    SCRIPTS does not have the language."""
    known = next((script for script, codes in SCRIPTS.items() if language in codes.split()), None)
    if known is None:
        return pl.lit(True)
    others = pl.col(side).str.count_matches(rf"[\p{{L}}--[{known}]]")
    mixed = pl.when(others > 0).then(side).otherwise(pl.lit(""))  # counting all letters is slow
    return others <= OTHER_SCRIPT_SHARE * mixed.str.count_matches(r"\p{L}")


def _clean(
    split: str,
    paths: dict[str, Path],
    pairs: Iterator[pl.DataFrame],
    schema: pa.DataFrameSchema,
    folder: Path,
    listing: TextIO,
) -> tuple[Counter[str], pl.DataFrame]:
    """Write the pairs that are kept and list the faulty ones; return the counts, and `index` and `reason` of every
    faulty pair."""
    sums: Counter[str] = Counter()
    faults = []
    with ExitStack() as opened:
        files = {side: opened.enter_context(_create(folder / path.name)) for side, path in paths.items()}
        for chunk in pairs:
            found = find_faults(chunk, schema)
            dropped = found.filter(pl.col("reason").is_in(DROPPED[split]))
            kept = chunk.join(dropped, on="index", how="anti", maintain_order="left")
            for side, file in files.items():
                # write_csv could write the file itself, but its error on a full disk has no errno for `name_enospc`.
                file.write(kept.select(side).write_csv(include_header=False, quote_style="never"))
            _list_faults(listing, split, chunk, found)
            faults.append(found)
            sums.update(
                pairs_in=len(chunk),
                pairs=len(kept),
                copies=int(((chunk["src"] == chunk["tgt"]) & (chunk["src"] != "")).sum()),
                respaced=int((chunk["src_respaced"] | chunk["tgt_respaced"]).sum()),
                src_words=int(kept["src_words"].sum()),
                tgt_words=int(kept["tgt_words"].sum()),
            )
    return sums, pl.concat(faults)


def find_faults(chunk: pl.DataFrame, schema: pa.DataFrameSchema) -> pl.DataFrame:
    """Return `index` and first `reason` of every faulty pair, sorted by index."""
    try:
        # Explicit, because environment variables of pandera could turn the checks off.
        with config_context(validation_enabled=True, validation_depth=ValidationDepth.SCHEMA_AND_DATA):
            schema.validate(chunk, lazy=True)
    except SchemaErrors as errors:
        rows = errors.failure_cases.select("index", pl.col("check").cast(PairFault).alias("reason"))
        first = rows.group_by("index").agg(pl.col("reason").min()).sort("index")
        return first.with_columns(pl.col("index").cast(pl.UInt32) + chunk["index"][0])
    return pl.DataFrame(schema={"index": pl.UInt32, "reason": PairFault})


def check_share(path: Path, pairs: int, faults: pl.DataFrame, max_share: float) -> None:
    if len(faults) <= max_share * pairs:
        return
    index, reason = faults.row(0)
    raise ValueError(
        f"{path}: {len(faults):,} of {pairs:,} pairs are faulty, more than validate.max_dropped_share "
        f"({max_share}) allows: {_counts(faults)}; the first is line {index + 1:,} ({reason}). Correct the "
        "files, or change the limits (section validate of params.yaml)"
    )


def _counts(faults: pl.DataFrame) -> str:
    counts = faults.group_by("reason").len().sort("reason").rows()
    return ", ".join(f"{reason} {number:,}" for reason, number in counts)


def _summary(split: str, sums: Counter[str], faults: pl.DataFrame) -> dict[str, Any]:
    possible = REASONS if split == "train" else [name for name in REASONS if name not in ONLY_IN_TRAIN]
    return {
        "pairs_in": sums["pairs_in"],
        "pairs": sums["pairs"],
        "dropped": sums["pairs_in"] - sums["pairs"],
        "faults": {reason: int((faults["reason"] == reason).sum()) for reason in possible},
        "copies": sums["copies"],
        "spaces_normalised": sums["respaced"],
        "mean_src_words": round(sums["src_words"] / sums["pairs"], 3),
        "mean_tgt_words": round(sums["tgt_words"] / sums["pairs"], 3),
    }


def _create(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="\n")


def _list_faults(listing: TextIO, split: str, chunk: pl.DataFrame, faults: pl.DataFrame) -> None:
    """Write a row per fault: split, line in data/raw/, reason, kept or dropped, and the sentences, whose tabs have
    become spaces."""
    rows = faults.join(chunk, on="index", how="left", maintain_order="left")
    for index, reason, src, tgt in rows.select("index", "reason", "src", "tgt").iter_rows():
        fate = "dropped" if reason in DROPPED[split] else "kept"
        listing.write(f"{split}\t{index + 1}\t{reason}\t{fate}\t{src}\t{tgt}\n")


def main() -> None:
    cli.parser("pipeline.validate", __doc__).parse_args()
    with cli.exit_on_error("validate"):
        settings = load_settings()
        report = validate(settings.data, settings.validate)
    for split, found in report.items():
        counts = ", ".join(f"{reason} {number:,}" for reason, number in found["faults"].items() if number)
        copies = f"; {found['copies']:,} with equal source and target" if found["copies"] else ""
        print(f"{split}: {found['pairs']:,} of {found['pairs_in']:,} pairs kept; faults: {counts or 'none'}{copies}")


if __name__ == "__main__":
    main()
