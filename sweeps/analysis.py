"""Compare the rows of a sweep with base and with the paper: means over seeds, differences and their uncertainty.

The input is data/sweep, as written by sweeps/run.py: trials.json, references.txt and the translations.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from tqdm import tqdm

from sweeps.record import OVERHEAD, read_trials
from sweeps.significance import LEVEL, Interval, holm, mean_and_deviation, paired_p, seed_interval, sentence_interval
from sweeps.table3 import BLEU, PPL, TEST_BLEU


@dataclass(frozen=True, kw_only=True)
class SeedMeans:
    """A row's means over the seeds that finished. Costs are for one training run, including restarts. `bleu` and all
    differences are for the validation split, as in the paper's Table 3."""

    seeds: list[int]
    bleu: float
    bleu_sd: float | None  # None for one seed
    test_bleu: float
    ppl: float  # per token of the validation split, with averaged weights
    params: float
    updates: float
    device_hours: float
    flops: float
    tokens_per_second: float


@dataclass(frozen=True)
class Comparison:
    """A row's differences from base, over the seeds that both finished. `p_holm` is the p value after Holm's
    correction."""

    bleu_difference: float
    interval: Interval
    p_holm: float
    ppl_difference: float

    @property
    def verdict(self) -> Literal["better", "worse", "not significant"]:
        if not (self.p_holm < LEVEL and self.interval.excludes_zero):
            return "not significant"
        return "better" if self.bleu_difference > 0 else "worse"

    def as_metrics(self) -> dict[str, float]:
        """The metrics for MLflow, under short names."""
        return {
            "bleu": self.bleu_difference,
            "low": self.interval.low,
            "high": self.interval.high,
            "p": self.p_holm,
            "ppl": self.ppl_difference,
        }


@dataclass(frozen=True)
class Paper:
    """A row as the paper prints it. Differences are from the paper's base; they are None for base itself."""

    bleu: float
    bleu_difference: float | None
    ppl: float
    ppl_difference: float | None
    params_millions: int | None  # None where the paper leaves it blank


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """A row of the table. `state` shows whether the row finished; `note` is the reason if it has no means or no
    comparison."""

    id: str
    group: str
    axis: str
    label: str
    changes: Mapping[str, Any]
    state: str  # finished, failed, stopped, unfinished, skipped, not run
    note: str
    attempts: int
    paper: Paper | None
    means: SeedMeans | None = None
    comparison: Comparison | None = None

    @property
    def verdict(self) -> str:
        if self.comparison:
            return self.comparison.verdict
        if not self.means:
            return self.state
        return "base" if self.axis == "base" else "not compared"

    @property
    def is_significant(self) -> bool:
        return self.verdict in ("better", "worse")

    @property
    def same_sign(self) -> Literal["yes", "no", "open"] | None:
        """Whether the paper's difference and ours have the same sign: "open" if ours is not significant or the
        paper's is zero, None if one is missing."""
        if not self.paper or self.paper.bleu_difference is None or not self.comparison:
            return None
        if not self.is_significant or self.paper.bleu_difference == 0:
            return "open"
        same = (self.comparison.bleu_difference > 0) == (self.paper.bleu_difference > 0)
        return "yes" if same else "no"


def read_sweep(folder: Path) -> dict[str, Any]:
    """Read trials.json, with the lines of references.txt under "references".

    Raises ValueError that names what is wrong.
    """
    return read_trials(folder / "trials.json") | {"references": _read_lines(folder / "references.txt")}


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the sweep again (python -m sweeps.run)") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: run the sweep again (python -m sweeps.run)") from None


def assess(sweep: Mapping[str, Any], folder: Path, progress: bool = True) -> list[RowResult]:
    """A result for each row, base first.

    Raises ValueError if a file of translations and the references have different numbers of lines.
    """
    base_row = sweep["rows"][0]
    trials: dict[str, list[dict]] = {row["id"]: [] for row in sweep["rows"]}
    for trial in sweep["trials"]:
        trials[trial["row"]].append(trial)
    base = by_seed(trials[base_row["id"]])
    results = []
    for row in tqdm(sweep["rows"], desc="comparing with base", unit=" rows", disable=not progress):
        result, ours = _row_result(row, trials[row["id"]], base_row["published"]), by_seed(trials[row["id"]])
        if ours and row is not base_row:
            result = _compared(result, ours, base, folder, sweep["references"], sweep["base"]["data.tgt"])
        results.append(result)
    corrected = iter(holm([result.comparison.p_holm for result in results if result.comparison]))
    for index, result in enumerate(results):
        if result.comparison:
            results[index] = replace(result, comparison=replace(result.comparison, p_holm=next(corrected)))
    return results


def by_seed(trials: Iterable[dict]) -> dict[int, dict]:
    """The finished trials, by seed."""
    return {trial["seed"]: trial for trial in trials if trial["status"] == "finished"}


def _row_result(row: Mapping[str, Any], trials: Sequence[dict], base: Mapping[str, Any] | None) -> RowResult:
    """The row's result without the comparison with base. `base` is the paper's base row."""
    finished = list(by_seed(trials).values())
    states = sorted({trial["status"] for trial in trials})
    if finished:
        state, note = "finished", ""
    elif row["skipped"]:
        state, note = "skipped", row["skipped"]
    else:
        state, note = " or ".join(states) or "not run", trials[0].get("error") or "" if trials else ""
    return RowResult(
        **{key: row[key] for key in ("id", "group", "axis", "label", "changes")},
        state=state,
        note=note,
        attempts=sum(trial.get("attempts") or 0 for trial in trials),
        paper=_paper(row["published"], None if row["axis"] == "base" else base) if row["published"] else None,
        means=_means(finished) if finished else None,
    )


def _means(trials: Sequence[dict]) -> SeedMeans:
    def mean(key: str) -> float:
        return fmean(trial[key] for trial in trials)

    def mean_score(name: str) -> float:
        return fmean(trial["metrics"][name] for trial in trials)

    bleu, bleu_sd = mean_and_deviation([trial["metrics"][BLEU] for trial in trials])
    return SeedMeans(
        seeds=[trial["seed"] for trial in trials],
        bleu=bleu,
        bleu_sd=bleu_sd,
        test_bleu=mean_score(TEST_BLEU),
        ppl=mean_score(PPL),
        params=mean("parameters"),
        updates=mean("steps"),
        device_hours=mean("device_hours"),
        flops=mean("flops"),
        tokens_per_second=mean("tokens_per_second"),
    )


def _paper(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> Paper:
    # the paper prints one decimal of BLEU and two of perplexity
    bleu = round(row["bleu"] - base["bleu"], 1) if base else None
    ppl = round(row["ppl"] - base["ppl"], 2) if base else None
    return Paper(row["bleu"], bleu, row["ppl"], ppl, row["params"])


def _compared(
    result: RowResult,
    ours: dict[int, dict],
    base: dict[int, dict],
    folder: Path,
    references: list[str],
    language: str,
) -> RowResult:
    """Add the comparison with base. `ours` and `base` are finished trials by seed. The p value is not corrected."""
    seeds = sorted(ours.keys() & base.keys())
    if not seeds:
        reason = "base has no result"
        if base:
            seeds_of_base = f"seed{'s' * (len(base) > 1)} {', '.join(map(str, base))}"
            reason = f"no seed in common with base, which has {seeds_of_base}"
        return replace(result, note=reason)

    def differences(metric: str) -> list[float]:
        return [ours[seed]["metrics"][metric] - base[seed]["metrics"][metric] for seed in seeds]

    def translations(trials: dict[int, dict]) -> list[list[str]]:
        return [_translations(folder / trials[seed]["translations"], references) for seed in seeds]

    bleu, systems = differences(BLEU), (translations(base), translations(ours))
    interval = (
        seed_interval(bleu)
        if len(seeds) > 1
        else sentence_interval(systems[0][0], systems[1][0], references, language)
    )
    p = paired_p(*systems, references, language)
    comparison = Comparison(fmean(bleu), interval, p, fmean(differences(PPL)))
    return replace(result, comparison=comparison)


def _translations(path: Path, references: Sequence[str]) -> list[str]:
    lines = _read_lines(path)
    if len(lines) != len(references):
        raise ValueError(
            f"{path} has {len(lines)} lines, references.txt {len(references)}: "
            "run the sweep again (python -m sweeps.run)"
        )
    return lines


def as_dict(row: RowResult) -> dict[str, Any]:
    """The row as {column of the CSV file: value}. None means unknown or not applicable."""
    interval = row.comparison and row.comparison.interval
    columns: dict[str, Any] = {
        **{key: getattr(row, key) for key in ("id", "group", "axis", "label")},
        "changes": " ".join(f"{key}={value}" for key, value in row.changes.items()),
        **{key: getattr(row, key) for key in ("verdict", "note", "attempts")},
        **_columns(SeedMeans, row.means),
        "num_seeds": row.means and len(row.means.seeds),
        **_columns(Comparison, row.comparison),
        **_columns(Interval, interval, "interval_"),
        **_columns(Paper, row.paper, "paper_"),
        "same_sign": row.same_sign,
    }
    del columns["interval"]
    return columns | {"seeds": row.means and " ".join(map(str, row.means.seeds))}


def _columns(kind: type, values: object | None, prefix: str = "") -> dict[str, Any]:
    """The fields of a dataclass as {name: value}, with None for each field if there are no values."""
    return {f"{prefix}{field.name}": values and getattr(values, field.name) for field in fields(kind)}


def totals(sweep: Mapping[str, Any], rows: Sequence[RowResult]) -> dict[str, float]:
    """Counts and costs of all trials together, failed ones included. The times of OVERHEAD are means over the trials
    that ran without interruption; they are missing if there are none."""

    def spent(key: str) -> float:
        return sum(trial.get(key) or 0 for trial in sweep["trials"])

    finished = sum(trial["status"] == "finished" for trial in sweep["trials"])
    whole = [trial for trial in sweep["trials"] if trial.get("seconds") is not None]
    return {
        "trials_finished": finished,
        "trials_not_finished": len(sweep["trials"]) - finished,
        "rows_different_from_base": sum(row.is_significant for row in rows),
        "rows_not_significant": sum(row.verdict == "not significant" for row in rows),
        "training_device_hours": spent("device_hours"),
        "evaluation_device_hours": spent("evaluation_device_hours"),
        "training_flops": spent("flops"),
        **{key: fmean(trial[key] for trial in whole) for key in OVERHEAD if whole},
    }


def covered(rows: Sequence[RowResult]) -> list[str]:
    """The sources of randomness that the intervals cover: "seeds", "sentences"."""
    return sorted({row.comparison.interval.covers for row in rows if row.comparison})
