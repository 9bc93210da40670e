"""Stage: our numbers beside those of the paper's Table 3, each difference from base with its uncertainty.

    python -m sweeps.report

Reads data/sweep (trials.json, references.txt, the translations), writes reports/table3.md, .html, .csv, .png and
.json, and adds them to the sweep's run in MLflow. Where trials failed, or base did, the table says so and holds the
rest.
"""

import argparse
import base64
import csv
import html
import io
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from pipeline import tracking
from pipeline.files import naming, write_json, write_text
from sweeps.significance import (
    LEVEL,
    RESAMPLES,
    SHUFFLES,
    Interval,
    holm,
    mean_and_deviation,
    paired_p,
    seed_interval,
    sentence_interval,
)

SWEEP, REPORTS = Path("data/sweep"), Path("reports")


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
    base = _finished(trials[base_row["id"]])
    lines = []
    for row in tqdm(sweep["rows"], desc="comparing with base", unit=" rows", disable=not progress):
        line, ours = _line(row, trials[row["id"]], base_row["published"]), _finished(trials[row["id"]])
        if ours and row is not base_row:
            line = _compared(line, ours, base, folder, sweep["references"])
        lines.append(line)
    comparisons = [line.comparison for line in lines if line.comparison]
    corrected = iter(holm([comparison.p for comparison in comparisons]))
    return [
        replace(line, comparison=replace(line.comparison, p=next(corrected))) if line.comparison else line
        for line in lines
    ]


def _finished(trials: Iterable[dict]) -> dict[int, dict]:
    return {trial["seed"]: trial for trial in trials if trial["status"] == "finished"}


def _line(row: Mapping[str, Any], trials: Sequence[dict], base: Mapping[str, Any] | None) -> Line:
    """All but the comparison with base; `base` is the paper's."""
    finished = list(_finished(trials).values())
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

    def translations(trials: dict[int, dict]) -> list[str]:
        return [text for seed in seeds for text in _translations(folder / trials[seed]["translations"], references)]

    bleu, sides = differences("test_bleu"), (translations(base), translations(ours))
    interval = seed_interval(bleu) if len(seeds) > 1 else sentence_interval(*sides, references)
    p = paired_p(*sides, references * len(seeds))
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


def totals(sweep: Mapping[str, Any], lines: Sequence[Line]) -> dict[str, float]:
    """What all trials came to and cost together, those that failed included."""

    def spent(key: str) -> float:
        return sum(trial.get(key) or 0 for trial in sweep["trials"])

    finished = sum(trial["status"] == "finished" for trial in sweep["trials"])
    return {
        "trials_finished": finished,
        "trials_not_finished": len(sweep["trials"]) - finished,
        "rows_different_from_base": sum(line.is_significant for line in lines),
        "rows_not_significant": sum(line.verdict == "not significant" for line in lines),
        "training_device_hours": spent("device_hours"),
        "evaluation_device_hours": spent("evaluation_device_hours"),
        "training_flops": spent("flops"),
    }


@dataclass(frozen=True)
class Table:
    """`sides` has an < or > for each column: how it is aligned."""

    head: list[str]
    sides: str
    rows: list[list[str]]


@dataclass(frozen=True)
class Part:
    """A section of the document: points, then a table with its legend, then the figure. Backticks mark code."""

    title: str
    points: Sequence[str] = ()
    table: Table | None = None
    legend: Sequence[str] = ()
    has_figure: bool = False


def document(sweep: Mapping[str, Any], lines: Sequence[Line]) -> list[Part]:
    """What the Markdown and the HTML file say; the first part's title is that of the whole."""
    missing = _missing(sweep, lines)
    return [
        Part(f"Table 3 on {sweep['data']}, model {sweep['model']}", _header(sweep, lines)),
        Part("What can be said", _findings(lines)),
        Part("BLEU", table=_table(BLEU_COLUMNS, lines), legend=_bleu_legend(lines), has_figure=True),
        Part("Perplexity, size, cost", table=_table(COST_COLUMNS, lines), legend=COST_LEGEND),
        *([Part("What is missing, what was started again", missing)] if missing else []),
    ]


def _header(sweep: Mapping[str, Any], lines: Sequence[Line]) -> list[str]:
    sums = totals(sweep, lines)
    training, evaluation = sums["training_device_hours"], sums["evaluation_device_hours"]
    updates = sorted(round(line.result.updates) for line in lines if line.result) or [0]
    span = f"{updates[0]:,}" + (f" to {updates[-1]:,}" if updates[-1] > updates[0] else "")
    points = [
        f"Corpus: {sweep['data']}, {len(sweep['references']):,} test sentences.",
        f"Base: the preset {sweep['model']}. Updates: {span}.",
        f"Seeds: {', '.join(map(str, sweep['seeds']))}; with the same seed, rows see the data in the same order.",
        f"BLEU: sacreBLEU, `{sweep['bleu_signature']}`.",
        f"Cost: {sweep['minutes']:.1f} minutes; {_amount(training)} device-hours ({sweep['device']}) of training, "
        f"{_amount(evaluation)} of evaluation; {_flops(sums['training_flops'])} FLOPs of training.",
    ]
    price = sweep["price_per_device_hour"]
    if price > 0:
        points.append(f"Money: {(training + evaluation) * price:,.2f} at {price:,.2f} a device-hour.")
    return points


def _findings(lines: Sequence[Line]) -> list[str]:
    def named(title: str, labels: list[str]) -> str:
        return f"{title}: {'; '.join(labels) or 'none'}."

    different = [
        f"{line.label} ({line.comparison.bleu:+.2f})" for line in lines if line.comparison and line.is_significant
    ]
    unclear = [line.label for line in lines if line.verdict == "not significant"]
    findings = [
        named("Different from base", different),
        named("Not significant: this table cannot tell them from base", unclear),
    ]
    titles = {
        "as the paper": "Different, with the sign that the difference has in the paper",
        "against the paper": "Different, with the opposite sign",
    }
    for agreement, title in titles.items():
        findings.append(named(title, [line.label for line in lines if line.agreement == agreement]))
    if "sentences" in _covered(lines):
        findings.append("Where one seed is all there is, this is about these models: another seed may say otherwise.")
    without = [
        f"{line.label} ({line.verdict})" for line in lines if not line.result or line.verdict == "not compared"
    ]
    return [*findings, named("No result", without)] if without else findings


def _number(key: str, form: str) -> Callable[[dict[str, Any]], str]:
    """Of `values`, the one named `key`; nothing where it is None."""
    return lambda value: "" if value[key] is None else format(value[key], form)


def _interval(value: dict[str, Any]) -> str:
    return f"{value['interval_low']:+.2f} to {value['interval_high']:+.2f}" if value["interval_covers"] else ""


def _p(value: dict[str, Any]) -> str:
    return "<0.001" if value["p_holm"] is not None and value["p_holm"] < 0.001 else _number("p_holm", ".3f")(value)


def _millions(value: dict[str, Any]) -> str:
    return "" if value["params"] is None else f"{value['params'] / 1e6:.3g}"


def _amount(value: float | None) -> str:
    """Three digits that count."""
    return "" if value is None else format(value, ",.0f" if value >= 100 else ".3g")


def _flops(value: float | None) -> str:
    """3.3e18, as in the paper's Table 2."""
    return "" if value is None else re.sub(r"e\+0*(?=\d)", "e", f"{value:.1e}")


BLEU_COLUMNS = [
    ("row", "<", _number("label", "")),
    ("BLEU", ">", _number("bleu", ".2f")),
    ("sd", ">", _number("bleu_sd", ".2f")),
    ("n", ">", _number("num_seeds", "d")),
    ("diff", ">", _number("bleu_difference", "+z.2f")),
    ("95% interval", ">", _interval),
    ("over", "<", _number("interval_covers", "")),
    ("p", ">", _p),
    ("verdict", "<", _number("verdict", "")),
    ("paper", ">", _number("paper_bleu", ".1f")),
    ("diff", ">", _number("paper_bleu_difference", "+z.1f")),
    ("agrees?", "<", _number("agreement", "")),
]
"""Heading, alignment, and the cell from a line's `values`."""

COST_COLUMNS = [
    ("row", "<", _number("label", "")),
    ("PPL", ">", _number("ppl", ".3f")),
    ("diff", ">", _number("ppl_difference", "+z.3f")),
    ("paper", ">", _number("paper_ppl", ".2f")),
    ("diff", ">", _number("paper_ppl_difference", "+z.2f")),
    ("params/1e6", ">", _millions),
    ("paper", ">", _number("paper_params_millions", "d")),
    ("updates", ">", _number("updates", ",.0f")),
    ("device-h", ">", lambda value: _amount(value["device_hours"])),
    ("FLOPs", ">", lambda value: _flops(value["flops"])),
    ("tokens/s", ">", _number("tokens_per_second", ",.0f")),
]


def _table(columns: Sequence[tuple[str, str, Callable[[dict[str, Any]], str]]], lines: Sequence[Line]) -> Table:
    rows = [[cell(value) for _, _, cell in columns] for value in map(values, lines)]
    return Table([head for head, _, _ in columns], "".join(side for _, side, _ in columns), rows)


COVERS = {
    "seeds": "Student's t, each row paired with base seed by seed. It covers the chance of training: "
    "which initial weights, which order of the data",
    "sentences": f"paired bootstrap of the test sentences ({RESAMPLES:,} resamples), for want of a second seed. It "
    "covers the chance of which sentences are tested, not that of training: another seed may lie outside",
}


def _covered(lines: Sequence[Line]) -> list[str]:
    return sorted({line.comparison.interval.covers for line in lines if line.comparison})


def _bleu_legend(lines: Sequence[Line]) -> list[str]:
    return [
        "BLEU, sd: mean and standard deviation over n seeds. diff: from base, over the seeds that both have.",
        *(f"95% interval over {kind}: {COVERS[kind]}." for kind in _covered(lines)),
        f"p: sacreBLEU's paired approximate randomization ({SHUFFLES:,} shuffles) on the translations of all those "
        f"seeds, with Holm's correction for {sum(line.comparison is not None for line in lines)} rows. It asks about "
        "these models on other sentences.",
        f"verdict: better or worse if p is below {LEVEL} and the interval leaves out zero. Not significant does not "
        "mean equal: this table cannot tell.",
        "paper: Table 3 of the paper, on newstest2013, and another kind of BLEU: compare signs of differences alone. "
        "agrees?: open where ours is not significant or the paper's is zero.",
    ]


COST_LEGEND = [
    "PPL: perplexity a piece on the validation split, of the weights that were tested; lower is better. "
    "diff: from base.",
    "updates, device-h (device-hours), FLOPs, tokens/s: of one training, mean over the seeds that finished, restarts "
    "included. FLOPs compare with the paper's Table 2 (base: 3.3e18). Tokens are target pieces without padding.",
]


def _missing(sweep: Mapping[str, Any], lines: Sequence[Line]) -> list[str]:
    """Rows and trials without a result, and why; trials that took several attempts."""
    points = [
        f"{line.label}: {line.verdict}{f' ({line.note})' if line.note else ''}."
        for line in lines
        if line.verdict in ("skipped", "not run", "not compared")
    ]
    for trial in sweep["trials"]:
        if trial["status"] != "finished":
            error = " ".join((trial.get("error") or "no reason is known").split()).replace("`", "'")
            spent = trial.get("device_hours")
            cost = f" {_amount(spent)} device-hours were spent on it." if spent else ""
            points.append(f"{trial['name']}: {trial['status']}: `{error}`.{cost}")
        elif trial["attempts"] > 1:
            points.append(f"{trial['name']}: {trial['attempts']} attempts, each from the last checkpoint.")
    return points


ALT = "Differences from base in BLEU, ours and the paper's, one panel for each axis"


def markdown(parts: Sequence[Part], image: str) -> str:
    """`image` is the figure's file name, beside the document."""
    blocks = []
    for level, part in enumerate(parts):
        blocks.append(f"{'##' if level else '#'} {part.title}")
        if part.points:
            blocks.append("\n".join(f"- {point}" for point in part.points))
        if part.table:
            blocks += [_markdown_table(part.table), "\n".join(f"- {line}" for line in part.legend)]
        if part.has_figure:
            blocks.append(f"![{ALT}]({image})")
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: Table) -> str:
    """Columns are padded, so that it reads well as it stands, too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [
        "-" * (width + 1) + ("-" if side == "<" else ":") for width, side in zip(widths, table.sides, strict=True)
    ]
    lines = []
    for row in cells:
        padded = (f" {cell:{side}{width}} " for cell, side, width in zip(row, table.sides, widths, strict=True))
        lines.append(f"|{'|'.join(padded)}|")
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem;
       color: light-dark(#1f2328, #e6edf3); background: light-dark(#ffffff, #0d1117); }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid light-dark(#d1d9e0, #3d444d); text-align: left; }
.right { text-align: right; }
.better { color: light-dark(#116329, #7ee787); font-weight: 600; }
.worse { color: light-dark(#a40e26, #ffa198); font-weight: 600; }
.legend { font-size: 13px; color: light-dark(#59636e, #9198a1); }
img { max-width: 100%; background: white; border-radius: 6px; padding: .5rem; box-sizing: border-box; }
"""


def html_page(parts: Sequence[Part], png: bytes) -> str:
    """One file with all in it; light or dark as the reader's system is."""
    blocks = []
    for level, part in enumerate(parts):
        tag = "h2" if level else "h1"
        blocks.append(f"<{tag}>{html.escape(part.title)}</{tag}>")
        if part.points:
            blocks.append(_html_list(part.points))
        if part.table:
            blocks += [_html_table(part.table), _html_list(part.legend, ' class="legend"')]
        if part.has_figure:
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            blocks.append(f'<img alt="{html.escape(ALT)}" src="{source}">')
    title, body = html.escape(parts[0].title), "\n".join(blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{title}</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html_list(items: Sequence[str], attributes: str = "") -> str:
    lines = [re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(item)) for item in items]
    return f"<ul{attributes}>\n" + "".join(f"<li>{line}</li>\n" for line in lines) + "</ul>"


def _html_table(table: Table) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        found = []
        for text, side in zip(cells, table.sides, strict=True):
            name = "right" if side == ">" else text if text in ("better", "worse") else "left"
            found.append(f'<{tag} class="{name}">{html.escape(text)}</{tag}>')
        return f"<tr>{''.join(found)}</tr>"

    lines = [row("th", table.head), *(row("td", cells) for cells in table.rows)]
    return "<div><table>\n" + "\n".join(lines) + "\n</table></div>"


AXES = {
    "heads": ("heads h", "model.num_heads"),
    "d_k": ("size of a key d_k", "model.d_k"),
    "layers": ("layers N", "model.num_layers"),
    "d_model": ("d_model", "model.d_model"),
    "d_ff": ("d_ff", "model.d_ff"),
    "dropout": ("dropout", "model.dropout"),
    "label_smoothing": ("label smoothing", "train.label_smoothing"),
    "positions": ("positions", "model.positions"),
    "norm": ("layer normalisation", "model.norm"),
}
"""What a panel is called, and the setting whose values are its categories; in other panels these are the labels."""

OURS, PAPERS, GREY = "#0072b2", "#d55e00", "#6e7781"  # blue and vermilion of Okabe and Ito: safe for the colour-blind
APART = 0.15  # our points from the paper's, of the distance between two categories


def figure(sweep: Mapping[str, Any], lines: Sequence[Line]) -> bytes:
    """PNG: a panel for each axis, our differences from base with their intervals beside the paper's."""
    base, *rows = lines
    axes = list(dict.fromkeys(line.axis for line in rows)) or ["no rows but base"]
    columns = min(2, len(axes))  # with more, the letters are too small at a page's width
    height = -(-len(axes) // columns)
    canvas = Figure(figsize=(6.4 if columns == 1 else 4.8 * columns, 3.1 * height + 1.1), layout="constrained")
    panels = canvas.subplots(height, columns, squeeze=False).flatten()
    for panel, axis in zip(panels, axes, strict=False):
        draw_panel(panel, axis, [base, *(line for line in rows if line.axis == axis)], sweep.get("base", {}))
    for panel in panels[len(axes) :]:
        panel.remove()
    for panel in panels[: len(axes) : columns]:
        panel.set_ylabel("difference from base, BLEU")
    seeds, covered = len(sweep["seeds"]), _covered(lines)
    title = f"{sweep['data']}, model {sweep['model']}, {seeds} seed{'s' if seeds > 1 else ''}"
    if covered:
        title += f"; bars: 95% interval over {' or '.join(covered).replace('sentences', 'test sentences')}"
    canvas.suptitle(title, fontsize=11)
    handles = [
        *panels[0].plot([], [], "o", color=OURS, label="ours, different from base"),
        *panels[0].plot([], [], "o", color=OURS, markerfacecolor="white", label="ours, not significant"),
        *panels[0].plot([], [], "D", color=PAPERS, markersize=5, label="the paper"),
        *panels[0].plot([], [], "o", color=GREY, label="base, with its BLEU"),
    ]
    canvas.legend(handles=handles, loc="outside lower center", ncols=4 if columns > 1 else 2, frameon=False)
    target = io.BytesIO()
    canvas.savefig(target, format="png", dpi=150)
    return target.getvalue()


def draw_panel(panel: Axes, axis: str, lines: list[Line], base: Mapping[str, Any]) -> None:
    """`base` is the base model's settings, {"model.d_k": 64, ...}. Numbers are in their order, base among them."""
    name, key = AXES.get(axis, (axis, ""))
    shown: list[tuple[Any, Line]] = [
        ((base if line.axis == "base" else line.changes).get(key), line) for line in lines
    ]
    if all(isinstance(value, int | float) for value, _ in shown):
        shown.sort(key=lambda pair: pair[0])
    panel.axhline(0, color=GREY, linewidth=0.8)
    for x, (_, line) in enumerate(shown):
        if line.comparison:
            difference, interval = line.comparison.bleu, line.comparison.interval
            panel.plot([x - APART] * 2, [interval.low, interval.high], "_-", color=OURS, linewidth=1.3)
            fill = OURS if line.is_significant else "white"
            panel.plot(x - APART, difference, "o", color=OURS, markerfacecolor=fill)
            _write(panel, f"{difference:+z.1f}", x - APART, difference, OURS, left_of_it=True)
        elif line.axis != "base":
            middle = panel.get_xaxis_transform()
            panel.text(
                x - APART, 0.5, line.verdict, transform=middle, rotation=90, ha="center", va="center", color=GREY
            )
        elif line.result:
            panel.plot(x, 0, "o", color=GREY)
            _write(panel, f"{line.result.bleu:.1f}", x, 0, GREY)
        if line.paper and line.paper.bleu_difference is not None:
            difference = line.paper.bleu_difference
            panel.plot(x + APART, difference, "D", color=PAPERS, markersize=5)
            _write(panel, f"{difference:+z.1f}", x + APART, difference, PAPERS)
    panel.set_xticks(range(len(shown)), [_category(line, value) for value, line in shown], fontsize=9)
    panel.set_xlim(-0.7, len(shown) - 0.3)
    panel.set_xlabel(name)
    panel.margins(y=0.12)
    panel.yaxis.set_major_locator(MaxNLocator(nbins=6))
    panel.grid(axis="y", color="#d1d9e0", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _write(panel: Axes, text: str, x: float, y: float, color: str, left_of_it: bool = False) -> None:
    """The value beside its mark: to the left, or where the line at zero is not."""
    shift, across, up = ((-6, 0), "right", "center") if left_of_it else ((0, -6), "center", "top")
    if y > 0 and not left_of_it:
        shift, up = (0, 6), "bottom"
    label = panel.annotate(text, (x, y), shift, "data", "offset points", ha=across, va=up, fontsize=8, color=color)
    label.set_path_effects([withStroke(linewidth=2, foreground="white")])  # legible where a line runs through


def _category(line: Line, value: Any) -> str:
    if line.axis == "base":
        return "base" if value is None else f"{value}\n(base)"
    return "\n".join(textwrap.wrap(line.label.removeprefix("free: "), 14)) if value is None else str(value)


def write_csv(target: Path, lines: Sequence[Line]) -> None:
    text = io.StringIO()
    rows = [values(line) for line in lines]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(target, text.getvalue())


def write_report(folder: Path, reports: Path, progress: bool = True) -> list[Path]:
    """From what the sweep left in `folder` to table3.* in `reports`: the files written.

    Raises ValueError that names what is missing or damaged in `folder`.
    """
    sweep = read_sweep(folder)
    return write_files(sweep, assess(sweep, folder, progress), reports)


def write_files(sweep: Mapping[str, Any], lines: Sequence[Line], reports: Path) -> list[Path]:
    page, site, sheet, image, metrics = (reports / f"table3.{end}" for end in ("md", "html", "csv", "png", "json"))
    parts, png = document(sweep, lines), figure(sweep, lines)
    write_text(page, markdown(parts, image.name))
    write_text(site, html_page(parts, png))
    write_csv(sheet, lines)
    partial = image.with_name(f".{image.name}.partial")
    with naming(image):
        partial.write_bytes(png)
        os.replace(partial, image)
    rows = {
        line.id: {
            "test_bleu": line.result and line.result.bleu,
            "test_bleu_difference": line.comparison and line.comparison.bleu,
            "valid_averaged_ppl": line.result and line.result.ppl,
        }
        for line in lines
    }
    write_json(metrics, {**totals(sweep, lines), "rows": rows})
    return [page, site, sheet, image, metrics]


def run(folder: Path = SWEEP, reports: Path = REPORTS) -> None:
    """The stage: write the files, print what they say, tell MLflow. Raises ValueError with one line."""
    sweep = read_sweep(folder)
    lines = assess(sweep, folder)
    files = write_files(sweep, lines, reports)
    print(_markdown_table(_table(BLEU_COLUMNS, lines)))
    print("\n".join([*_findings(lines), *_missing(sweep, lines), f"All of it: {', '.join(map(str, files))}"]))
    tracking.log_report(sweep["tracking_uri"], sweep["mlflow_parent"], files, totals(sweep, lines))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        run()
    except (ValueError, OSError) as error:
        raise SystemExit(f"report: {error}") from None


if __name__ == "__main__":
    main()
