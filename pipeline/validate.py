"""The validate stage: data/raw/ -> data/clean/, and reports/validation.json with what was found.

A hard fault stops the stage with file and line: a file that is missing or empty, sides of different length,
broken UTF-8. A soft fault is of one pair, and is counted under the first reason of REASONS that holds:
- in train the pair is dropped;
- in valid it is dropped if a side is empty or too long, which training could not batch, and else kept;
- in test it is kept, so that BLEU compares with everybody's on that test set.
If more than max_dropped_share of a split is faulty, kept or not, the stage stops with the counts: that is more
likely a wrong file. data/clean/faults.tsv lists every faulty pair.

A leak is a training pair whose source sentence also stands in test or valid; it leaves train. Equal means equal
after NFKC and lower-casing. The source alone decides, for it is the question: with another answer it would still
be a lesson for the test. Short common sentences ("Thank you .") are no exception: to drop them costs training
next to nothing, to keep them would let the test ask for what was learned by heart.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandera.polars as pa
import polars as pl
from pandera.config import ValidationDepth, config_context
from pandera.errors import SchemaErrors
from tqdm import tqdm

from pipeline.files import replace_folder, write_json
from pipeline.params import Download, Validate, load_settings

RAW = Path("data/raw")
CLEAN = Path("data/clean")
REPORT = Path("reports/validation.json")

CHUNK_PAIRS = 100_000
OTHER_SCRIPT_SHARE = 0.5  # of a sentence's letters; names and quotations stay below

REASONS = (
    "empty",
    "broken_character",
    "control_character",
    "too_long",
    "length_ratio",
    "wrong_script",
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


def validate(languages: Download, limits: Validate) -> dict[str, dict[str, Any]]:
    """Write data/clean/ and the report, which is also returned. Raises ValueError where the stage must stop."""
    src, tgt = languages.src, languages.tgt
    frames = {split: read_split(split, src, tgt) for split in ("train", "valid", "test")}
    keys = {split: source_keys(frame, split) for split, frame in frames.items()}
    frames = {split: mark(split, frame, keys) for split, frame in frames.items()}

    schema = pair_schema(src, tgt, limits)
    faults = {split: find_faults(frame, schema, split) for split, frame in frames.items()}
    for split, frame in frames.items():
        check_share(RAW / f"{split}.{src}", len(frame), faults[split], limits.max_dropped_share)

    report: dict[str, dict[str, Any]] = {}
    with replace_folder(CLEAN) as folder:
        for split, frame in frames.items():
            dropped = faults[split].filter(pl.col("reason").is_in(DROPPED[split]))
            kept = frame.join(dropped, on="index", how="anti", maintain_order="left")
            if kept.is_empty():
                raise ValueError(f"{RAW / split}.{src}: no pair is left, all are faulty: {_counts(dropped)}")
            for column, ending in (("src", src), ("tgt", tgt), ("trees", "trees")):
                if column in kept.columns:
                    _write_lines(folder / f"{split}.{ending}", kept[column])
            report[split] = _summary(split, frame, kept, faults[split])
        for split in ("valid", "test"):
            found = keys[split].is_in(keys["train"].implode())
            report[split]["found_in_train"] = int(found.sum())
        _write_faults(folder / "faults.tsv", frames, faults)
    write_json(REPORT, report)
    return report


def read_split(split: str, src: str, tgt: str) -> pl.DataFrame:
    """One row a pair: index; src, tgt and trees (if there are); words; whether spaces changed.

    Every run of white space becomes one space, and none stays at the edges. Raises ValueError for hard faults.
    """
    paths = [RAW / f"{split}.{src}", RAW / f"{split}.{tgt}"]
    sides = [_read_side(path, side) for path, side in zip(paths, ("src", "tgt"), strict=True)]
    trees = RAW / f"{split}.trees"
    if trees.exists():
        paths.append(trees)
        sides.append(_read_lines(trees).alias("trees").to_frame())
    for path, side in zip(paths, sides, strict=True):
        found, expected = len(side), len(sides[0])
        if found != expected:
            raise ValueError(
                f"{path} has {found:,} lines, {paths[0]} has {expected:,}: from line "
                f"{min(found, expected) + 1:,} on they are no pairs; line i of each must be the same sentence"
            )
    return pl.concat(sides, how="horizontal").with_row_index()


def _read_side(path: Path, side: str) -> pl.DataFrame:
    lines = _read_lines(path)
    text = pl.col(side)
    normal = text.str.replace_all(r"\s+", " ").str.strip_chars(" \ufeff")  # a byte order mark is no text
    chunks = []
    for start in _chunks(len(lines), f"{path.name}: read"):  # never the whole text in both forms
        chunk = lines.slice(start, CHUNK_PAIRS).alias(side).to_frame()
        respaced = chunk.select(normal, (text != normal).alias(f"{side}_respaced"))
        chunks.append(respaced.with_columns(text.str.count_matches(r"\S+").alias(f"{side}_words")))
    return pl.concat(chunks)


def _read_lines(path: Path) -> pl.Series:
    try:
        lines = pl.read_lines(path)["line"]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run the download stage") from None
    except pl.exceptions.ComputeError:
        _raise_broken_utf8(path)
        raise
    if lines.is_empty():
        raise ValueError(f"{path} is empty: at least one sentence is needed")
    return lines


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


def source_keys(frame: pl.DataFrame, split: str) -> pl.Series:
    """64 bits for each source sentence: among 5 million, the odds that any two meet by chance are 1 to 10^6."""
    key = pl.col("src").str.normalize("NFKC").str.to_lowercase().hash()
    starts = _chunks(len(frame), f"{split}: compare")
    return pl.concat([frame.slice(start, CHUNK_PAIRS).select(key).to_series() for start in starts])


def mark(split: str, frame: pl.DataFrame, keys: dict[str, pl.Series]) -> pl.DataFrame:
    """A column for each of ONLY_IN_TRAIN: whether a pair of this split is such a one."""
    if split != "train":
        return frame.with_columns(pl.lit(False).alias(reason) for reason in ONLY_IN_TRAIN)
    return frame.with_columns(
        keys["train"].is_in(keys["test"].implode()).alias("train_in_test"),
        keys["train"].is_in(keys["valid"].implode()).alias("train_in_valid"),
        (~pl.struct(pl.col("src").hash(), pl.col("tgt").hash()).is_first_distinct()).alias("duplicate"),
    )


def pair_schema(src: str, tgt: str, limits: Validate) -> pa.DataFrameSchema:
    """A sound pair: one check for each of REASONS, named after it.

    The length ratio is (longer side + 3) / (shorter side + 3), in words: in a short sentence a few words more
    are no fault.
    """
    sides = pl.col("src", "tgt")
    shorter = pl.min_horizontal("src_words", "tgt_words") + 3
    longer = pl.max_horizontal("src_words", "tgt_words") + 3
    sound = {
        "empty": pl.all_horizontal(sides != ""),
        "broken_character": ~pl.any_horizontal(sides.str.contains("\ufffd", literal=True)),
        "control_character": ~pl.any_horizontal(sides.str.contains(r"\p{Cc}")),
        "too_long": longer <= limits.max_words + 3,
        "length_ratio": longer <= limits.max_length_ratio * shorter,
        "wrong_script": _in_script("src", src) & _in_script("tgt", tgt),
        **{reason: ~pl.col(reason) for reason in ONLY_IN_TRAIN},
    }
    return pa.DataFrameSchema(
        {
            "index": pa.Column(pl.UInt32),
            **{side: pa.Column(pl.String) for side in ("src", "tgt")},
            **{f"{side}_respaced": pa.Column(pl.Boolean) for side in ("src", "tgt")},
            **{f"{side}_words": pa.Column(pl.UInt32) for side in ("src", "tgt")},
            "trees": pa.Column(pl.String, required=False),
            **{reason: pa.Column(pl.Boolean) for reason in ONLY_IN_TRAIN},
        },
        checks=[_check(reason, sound[reason]) for reason in REASONS],
        strict=True,
    )


def _check(name: str, sound: pl.Expr) -> pa.Check:
    return pa.Check(lambda data: data.lazyframe.select(sound), name=name)


def _in_script(side: str, language: str) -> pl.Expr:
    """At most OTHER_SCRIPT_SHARE of the letters are of another script; any letter will do if we know none."""
    known = next((script for script, codes in SCRIPTS.items() if language in codes.split()), None)
    if known is None:
        return pl.lit(True)
    letters = pl.col(side).str.count_matches(r"\p{L}")
    others = pl.col(side).str.count_matches(rf"[\p{{L}}--[{known}]]")
    return others <= OTHER_SCRIPT_SHARE * letters


def find_faults(frame: pl.DataFrame, schema: pa.DataFrameSchema, split: str) -> pl.DataFrame:
    """`index` and first `reason` of every faulty pair, by index."""
    found = []
    for start in _chunks(len(frame), f"{split}: check"):
        chunk = frame.slice(start, CHUNK_PAIRS)
        try:
            # Said explicitly, because the environment could otherwise turn the checks off.
            with config_context(validation_enabled=True, validation_depth=ValidationDepth.SCHEMA_AND_DATA):
                schema.validate(chunk, lazy=True)
        except SchemaErrors as errors:
            cases = errors.failure_cases.with_columns(pl.col("check").cast(PairFault).alias("reason"))
            found.append(
                cases.group_by("index")
                .agg(pl.col("reason").min())
                .with_columns(pl.col("index").cast(pl.UInt32) + start)
            )
    empty = pl.DataFrame(schema={"index": pl.UInt32, "reason": PairFault})
    return pl.concat([empty, *found]).sort("index")


def check_share(path: Path, pairs: int, faults: pl.DataFrame, max_share: float) -> None:
    if len(faults) <= max_share * pairs:
        return
    index, reason = faults.row(0)
    raise ValueError(
        f"{path}: {len(faults):,} of {pairs:,} pairs are faulty, more than validate.max_dropped_share "
        f"({max_share}) allows: {_counts(faults)}; the first is line {index + 1:,} ({reason}). Correct the "
        "files, or change the limits (validate, in conf/data/)"
    )


def _counts(faults: pl.DataFrame) -> str:
    counts = faults.group_by("reason").len().sort("reason").rows()
    return ", ".join(f"{reason} {number:,}" for reason, number in counts)


def _summary(split: str, frame: pl.DataFrame, kept: pl.DataFrame, faults: pl.DataFrame) -> dict[str, Any]:
    possible = REASONS if split == "train" else [name for name in REASONS if name not in ONLY_IN_TRAIN]
    return {
        "pairs_in": len(frame),
        "pairs": len(kept),
        "dropped": len(frame) - len(kept),
        "faults": {reason: int((faults["reason"] == reason).sum()) for reason in possible},
        "spaces_normalised": int((frame["src_respaced"] | frame["tgt_respaced"]).sum()),
        "mean_src_words": round(int(kept["src_words"].sum()) / len(kept), 3),
        "mean_tgt_words": round(int(kept["tgt_words"].sum()) / len(kept), 3),
    }


def _write_lines(path: Path, lines: pl.Series) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for start in _chunks(len(lines), f"{path.name}: write"):
            file.write("\n".join(lines.slice(start, CHUNK_PAIRS)) + "\n")


def _write_faults(path: Path, frames: dict[str, pl.DataFrame], faults: dict[str, pl.DataFrame]) -> None:
    """split, line in data/raw/, reason, kept or dropped, and the sentences (which hold no tab any more)."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("split\tline\treason\tfate\tsrc\ttgt\n")
        for split, found in faults.items():
            rows = found.join(frames[split], on="index", how="left", maintain_order="left")
            for index, reason, src, tgt in rows.select("index", "reason", "src", "tgt").iter_rows():
                fate = "dropped" if reason in DROPPED[split] else "kept"
                file.write(f"{split}\t{index + 1}\t{reason}\t{fate}\t{src}\t{tgt}\n")


def _chunks(length: int, title: str) -> Iterator[int]:
    """Where each chunk starts, with a progress bar for a long text."""
    with tqdm(desc=title, total=length, unit=" pairs", unit_scale=True, delay=1, leave=False) as bar:
        for start in range(0, length, CHUNK_PAIRS):
            yield start
            bar.update(min(CHUNK_PAIRS, length - start))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    try:
        settings = load_settings()
        report = validate(settings.download, settings.validate)
    except ValueError as error:
        raise SystemExit(f"validate: {error}") from None
    except OSError as error:
        raise SystemExit(f"validate: {error.filename}: {error.strerror}") from None
    for split, found in report.items():
        counts = ", ".join(f"{reason} {number:,}" for reason, number in found["faults"].items() if number)
        print(f"{split}: {found['pairs']:,} of {found['pairs_in']:,} pairs kept; faults: {counts or 'none'}")


if __name__ == "__main__":
    main()
