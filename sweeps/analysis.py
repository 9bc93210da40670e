"""The rows of a sweep beside base and beside the paper: means over seeds, differences, how sure they are.

Read from data/sweep: trials.json, references.txt and the translations, as sweeps/run.py leaves them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from tqdm import tqdm

from sweeps.significance import LEVEL, Interval, holm, mean_and_deviation, paired_p, seed_interval, sentence_interval


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row's means over the seeds that finished; costs are of one training, restarts included."""

    seeds: list[int]
    bleu: float
    bleu_sd: float | None  # None for one seed
    ppl: float  # per piece of the validation split, averaged weights
    params: float
    updates: float
    device_hours: float
    flops: float
    tokens_per_second: float


@dataclass(frozen=True)
class Comparison:
    """A row's differences from base, over the seeds that both finished. `p` is corrected for the number of rows."""

    bleu: float
    interval: Interval
    p: float
    ppl: float

    @property
    def verdict(self) -> Literal["better", "worse", "not significant"]:
        if not (self.p < LEVEL and self.interval.excludes_zero):
            return "not significant"
        return "better" if self.bleu > 0 else "worse"


@dataclass(frozen=True)
class Paper:
    """A row as the paper prints it; differences are from the paper's base, None for base itself."""

    bleu: float
    bleu_difference: float | None
    ppl: float
    ppl_difference: float | None
    params: int | None  # in millions; None where the paper leaves it blank


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table. Without a `result`, `state` says how that came about, and `note` why."""

    id: str
    group: str
    axis: str
    label: str
    changes: Mapping[str, Any]
    state: str  # finished, failed, stopped, unfinished, skipped, not run
    note: str
    attempts: int
    paper: Paper | None
    result: Result | None = None
    comparison: Comparison | None = None

    @property
    def verdict(self) -> str:
        if self.comparison:
            return self.comparison.verdict
        if not self.result:
            return self.state
        return "base" if self.axis == "base" else "not compared"

    @property
    def is_significant(self) -> bool:
        return self.verdict in ("better", "worse")

    @property
    def agreement(self) -> Literal["as the paper", "against the paper", "open"] | None:
        """Has the paper's difference the sign of ours? Open if either is unclear or zero, None if one is missing."""
        if not self.paper or self.paper.bleu_difference is None or not self.comparison:
            return None
        if not self.is_significant or self.paper.bleu_difference == 0:
            return "open"
        same = (self.comparison.bleu > 0) == (self.paper.bleu_difference > 0)
        return "as the paper" if same else "against the paper"


def read_sweep(folder: Path) -> dict[str, Any]:
    """trials.json, and the lines of references.txt as "references". Raises ValueError that names what is wrong."""
    path = folder / "trials.json"
    try:
        sweep = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the sweep first (python -m sweeps.run)") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run the sweep again (python -m sweeps.run)") from None
    return sweep | {"references": _read_lines(folder / "references.txt")}


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the sweep again (python -m sweeps.run)") from None


def assess(sweep: Mapping[str, Any], folder: Path, progress: bool = True) -> list[Line]:
    """A line for each row, base first. Raises ValueError if translations and references do not belong together."""
    base_row = sweep["rows"][0]
    trials: dict[str, list[dict]] = {row["id"]: [] for row in sweep["rows"]}
    for trial in sweep["trials"]:
        trials[trial["row"]].append(trial)
    base = finished_state(trials[base_row["id"]])
    lines = []
    for row in tqdm(sweep["rows"], desc="comparing with base", unit=" rows", disable=not progress):
        line, ours = _line(row, trials[row["id"]], base_row["published"]), finished_state(trials[row["id"]])
        if ours and row is not base_row:
            line = _compared(line, ours, base, folder, sweep["references"])
        lines.append(line)
    comparisons = [line.comparison for line in lines if line.comparison]
    corrected = iter(holm([comparison.p for comparison in comparisons]))
    return [
        replace(line, comparison=replace(line.comparison, p=next(corrected))) if line.comparison else line
        for line in lines
    ]


def finished_state(trials: Iterable[dict]) -> dict[int, dict]:
    return {trial["seed"]: trial for trial in trials if trial["status"] == "finished"}


def _line(row: Mapping[str, Any], trials: Sequence[dict], base: Mapping[str, Any] | None) -> Line:
    """All but the comparison with base; `base` is the paper's."""
    finished = list(finished_state(trials).values())
    states = sorted({trial["status"] for trial in trials})
    if finished:
        state, note = "finished", ""
    elif row["skipped"]:
        state, note = "skipped", row["skipped"]
    else:
        state, note = " or ".join(states) or "not run", trials[0].get("error") or "" if trials else ""
    return Line(
        **{key: row[key] for key in ("id", "group", "axis", "label", "changes")},
        state=state,
        note=note,
        attempts=sum(trial.get("attempts") or 0 for trial in trials),
        paper=_paper(row["published"], None if row["axis"] == "base" else base) if row["published"] else None,
        result=_result(finished) if finished else None,
    )


def _result(trials: Sequence[dict]) -> Result:
    def mean(key: str) -> float:
        return fmean(trial[key] for trial in trials)

    bleu, bleu_sd = mean_and_deviation([trial["metrics"]["test_bleu"] for trial in trials])
    return Result(
        seeds=[trial["seed"] for trial in trials],
        bleu=bleu,
        bleu_sd=bleu_sd,
        ppl=fmean(trial["metrics"]["valid_averaged_ppl"] for trial in trials),
        params=mean("parameters"),
        updates=mean("steps"),
        device_hours=mean("device_hours"),
        flops=mean("flops"),
        tokens_per_second=mean("tokens_per_second"),
    )


def _paper(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> Paper:
    bleu = round(row["bleu"] - base["bleu"], 1) if base else None  # the paper prints one digit, and two of PPL
    ppl = round(row["ppl"] - base["ppl"], 2) if base else None
    return Paper(row["bleu"], bleu, row["ppl"], ppl, row["params"])


def _compared(line: Line, ours: dict[int, dict], base: dict[int, dict], folder: Path, references: list[str]) -> Line:
    """`ours` and `base` are finished trials by seed. p is not corrected yet."""
    seeds = sorted(ours.keys() & base.keys())
    if not seeds:
        reason = (
            f"no seed in common with base, which has {', '.join(map(str, base))}" if base else "base has no result"
        )
        return replace(line, note=reason)

    def differences(metric: str) -> list[float]:
        return [ours[seed]["metrics"][metric] - base[seed]["metrics"][metric] for seed in seeds]

    def translations(trials: dict[int, dict]) -> list[list[str]]:
        return [_translations(folder / trials[seed]["translations"], references) for seed in seeds]

    bleu, sides = differences("test_bleu"), (translations(base), translations(ours))
    interval = seed_interval(bleu) if len(seeds) > 1 else sentence_interval(sides[0][0], sides[1][0], references)
    p = paired_p(*sides, references)
    return replace(line, comparison=Comparison(fmean(bleu), interval, p, fmean(differences("valid_averaged_ppl"))))


def _translations(path: Path, references: Sequence[str]) -> list[str]:
    lines = _read_lines(path)
    if len(lines) != len(references):
        raise ValueError(
            f"{path} has {len(lines)} lines, references.txt {len(references)}: "
            "run the sweep again (python -m sweeps.run)"
        )
    return lines


def values(line: Line) -> dict[str, Any]:
    """All of a line by name, as the CSV file has it. None is what is not known or does not apply."""
    result, comparison, paper = line.result, line.comparison, line.paper
    interval = comparison and comparison.interval
    return {
        "id": line.id,
        "group": line.group,
        "axis": line.axis,
        "label": line.label,
        "changes": " ".join(f"{key}={value}" for key, value in line.changes.items()),
        "verdict": line.verdict,
        "note": line.note,
        "seeds": " ".join(map(str, result.seeds)) if result else None,
        "num_seeds": len(result.seeds) if result else None,
        "bleu": result and result.bleu,
        "bleu_sd": result and result.bleu_sd,
        "bleu_difference": comparison and comparison.bleu,
        "interval_low": interval and interval.low,
        "interval_high": interval and interval.high,
        "interval_covers": interval and interval.covers,
        "p_holm": comparison and comparison.p,
        "paper_bleu": paper and paper.bleu,
        "paper_bleu_difference": paper and paper.bleu_difference,
        "agreement": line.agreement,
        "ppl": result and result.ppl,
        "ppl_difference": comparison and comparison.ppl,
        "paper_ppl": paper and paper.ppl,
        "paper_ppl_difference": paper and paper.ppl_difference,
        "params": result and result.params,
        "paper_params_millions": paper and paper.params,
        "updates": result and result.updates,
        "device_hours": result and result.device_hours,
        "flops": result and result.flops,
        "tokens_per_second": result and result.tokens_per_second,
        "attempts": line.attempts,
    }


OVERHEAD = ("seconds", "seconds_to_first_step", "seconds_of_overhead")
"""Of a trial's wall time; the last is what is neither training nor evaluation, but Ray, MLflow and imports."""


def totals(sweep: Mapping[str, Any], lines: Sequence[Line]) -> dict[str, float]:
    """What all trials came to and cost together, those that failed included; OVERHEAD is a mean over those that came
    to their end at the first attempt."""

    def spent(key: str) -> float:
        return sum(trial.get(key) or 0 for trial in sweep["trials"])

    finished = sum(trial["status"] == "finished" for trial in sweep["trials"])
    whole = [trial for trial in sweep["trials"] if "seconds" in trial]
    return {
        "trials_finished": finished,
        "trials_not_finished": len(sweep["trials"]) - finished,
        "rows_different_from_base": sum(line.is_significant for line in lines),
        "rows_not_significant": sum(line.verdict == "not significant" for line in lines),
        "training_device_hours": spent("device_hours"),
        "evaluation_device_hours": spent("evaluation_device_hours"),
        "training_flops": spent("flops"),
        **{key: fmean(trial[key] for trial in whole) if whole else 0.0 for key in OVERHEAD},
    }


def covered(lines: Sequence[Line]) -> list[str]:
    """Which chances the intervals are about: "seeds", "sentences"."""
    return sorted({line.comparison.interval.covers for line in lines if line.comparison})
