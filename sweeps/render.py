"""Write the text and tables of the report as Markdown and as one HTML page."""

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sweeps.analysis import RowResult, as_dict, covered, totals
from sweeps.record import OVERHEAD
from sweeps.significance import LEVEL, RESAMPLES, SHUFFLES


@dataclass(frozen=True)
class Table:
    """`align` has a < or > for each column. `links` has for each row {name: URL} of its runs in MLflow."""

    head: list[str]
    align: str
    rows: list[list[str]]
    links: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class Section:
    """A section of the report: bullet points, then a table with its legend, then the figure. Backticks mark code."""

    title: str
    points: Sequence[str] = ()
    table: Table | None = None
    legend: Sequence[str] = ()
    has_figure: bool = False


def document(sweep: Mapping[str, Any], rows: Sequence[RowResult]) -> list[Section]:
    """The sections of the Markdown and the HTML report. The title of the first is the title of the report."""
    gaps = missing(sweep, rows)
    return [
        Section(f"Table 3: {sweep['base_name']}", _header(sweep, rows)),
        Section("What can be said", findings(rows)),
        Section("BLEU", table=with_links(sweep, rows), legend=_bleu_legend(rows), has_figure=True),
        Section("Perplexity, size, cost", table=table_of(COST_COLUMNS, rows), legend=COST_LEGEND),
        *([Section("Missing results and retries", gaps)] if gaps else []),
    ]


def _header(sweep: Mapping[str, Any], rows: Sequence[RowResult]) -> list[str]:
    sums = totals(sweep, rows)
    training, evaluation = sums["training_device_hours"], sums["evaluation_device_hours"]
    steps = sorted(round(row.means.updates) for row in rows if row.means) or [0]
    span = f"{steps[0]:,}" + (f" to {steps[-1]:,}" if steps[-1] > steps[0] else "")
    points = [
        f"Made on {sweep['date']} at {sweep['commit']}, on {sweep['machine']}.",
        f"Corpus: {sweep['data']}. Rows are compared on the {len(sweep['references']):,} sentences of its validation "
        "split; the test split is scored too.",
        f"Base: {sweep['base_name']}. Steps: {span}.",
        f"Seed{'s' * (len(sweep['seeds']) > 1)}: {', '.join(map(str, sweep['seeds']))}. Rows with the same seed see "
        "the data in the same order.",
        f"BLEU: sacreBLEU, `{sweep['bleu_signature']}`.",
        f"Cost: {amount(training)} device-hours ({sweep['device']}) of training, "
        f"{amount(evaluation)} of evaluation; {_flops(sums['training_flops'])} FLOPs of training.",
    ]
    if "seconds" in sums:
        seconds, to_first_step, overhead = (_seconds(sums[key]) for key in OVERHEAD)
        points.append(
            f"Mean time of a trial: {seconds}. Its first step is finished after {to_first_step}; {overhead} are "
            "neither training nor evaluation but imports, Ray and MLflow."
        )
    price = sweep["price_per_device_hour"]
    if price > 0:
        points.append(f"Price: {(training + evaluation) * price:,.2f} at {price:,.2f} per device-hour.")
    return points


def counted(number: int, noun: str) -> str:
    """The number with its noun: "1 row", "2 rows"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def findings(rows: Sequence[RowResult]) -> list[str]:
    """The points of the section "What can be said"."""

    def named(title: str, labels: list[str]) -> str:
        return f"{title}: {'; '.join(labels) or 'none'}."

    different = [
        f"{row.label} ({row.comparison.bleu_difference:+.2f})"
        for row in rows
        if row.comparison and row.is_significant
    ]
    unclear = [row.label for row in rows if row.verdict == "not significant"]
    points = [
        named("Different from base", different),
        named("Not significant: this table cannot tell them from base", unclear),
    ]
    titles = {
        "yes": "Different, with the sign that the difference has in the paper",
        "no": "Different, with the opposite sign",
    }
    for same_sign, title in titles.items():
        points.append(named(title, [row.label for row in rows if row.same_sign == same_sign]))
    if "sentences" in covered(rows):
        points.append("Results from one seed hold for these models: another seed may give other results.")
    without = [f"{row.label} ({row.verdict})" for row in rows if not row.means or row.verdict == "not compared"]
    return [*points, named("No result", without)] if without else points


def _number(key: str, form: str) -> Callable[[dict[str, Any]], str]:
    """A function that formats the column `key` of `as_dict`; None becomes an empty text."""
    return lambda value: "" if value[key] is None else format(value[key], form)


def _interval(value: dict[str, Any]) -> str:
    return f"{value['interval_low']:+.2f} to {value['interval_high']:+.2f}" if value["interval_covers"] else ""


def _p(value: dict[str, Any]) -> str:
    return "<0.001" if value["p_holm"] is not None and value["p_holm"] < 0.001 else _number("p_holm", ".3f")(value)


def _millions(value: dict[str, Any]) -> str:
    return "" if value["params"] is None else f"{value['params'] / 1e6:.3g}"


def amount(value: float | None) -> str:
    """The number with three significant digits, or without decimals from 100 up."""
    return "" if value is None else format(value, ",.0f" if value >= 100 else ".3g")


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def _flops(value: float | None) -> str:
    """The number as in the paper's Table 2: 3.3e18."""
    return "" if value is None else re.sub(r"e\+0*(?=\d)", "e", f"{value:.1e}")


BLEU_COLUMNS = [
    ("row", "<", _number("label", "")),
    ("BLEU", ">", _number("bleu", ".2f")),
    ("sd", ">", _number("bleu_sd", ".2f")),
    ("seeds", ">", _number("num_seeds", "d")),
    ("BLEU - base", ">", _number("bleu_difference", "+z.2f")),
    ("95% interval", ">", _interval),
    ("over", "<", _number("interval_covers", "")),
    ("p", ">", _p),
    ("verdict", "<", _number("verdict", "")),
    ("test BLEU", ">", _number("test_bleu", ".2f")),
    ("paper", ">", _number("paper_bleu", ".1f")),
    ("paper - base", ">", _number("paper_bleu_difference", "+z.1f")),
    ("same sign?", "<", _number("same_sign", "")),
]
"""The heading, the alignment, and the function that makes the cell from a row's `as_dict`."""

NOTE_COLUMNS = [
    column
    for column in BLEU_COLUMNS
    if column[0] in ("row", "BLEU", "BLEU - base", "95% interval", "verdict", "test BLEU", "paper - base")
]
"""The columns of the table in the description of the sweep's MLflow run."""

COST_COLUMNS = [
    ("row", "<", _number("label", "")),
    ("PPL", ">", _number("ppl", ".3f")),
    ("PPL - base", ">", _number("ppl_difference", "+z.3f")),
    ("paper PPL", ">", _number("paper_ppl", ".2f")),
    ("paper - base", ">", _number("paper_ppl_difference", "+z.2f")),
    ("params/1e6", ">", _millions),
    ("paper params/1e6", ">", _number("paper_params_millions", "d")),
    ("steps", ">", _number("updates", ",.0f")),
    ("device-h", ">", lambda value: amount(value["device_hours"])),
    ("FLOPs", ">", lambda value: _flops(value["flops"])),
    ("tokens/s", ">", _number("tokens_per_second", ",.0f")),
]


def table_of(columns: Sequence[tuple[str, str, Callable[[dict[str, Any]], str]]], rows: Sequence[RowResult]) -> Table:
    cells = [[cell(value) for _, _, cell in columns] for value in map(as_dict, rows)]
    return Table([head for head, _, _ in columns], "".join(align for _, align, _ in columns), cells)


def with_links(sweep: Mapping[str, Any], rows: Sequence[RowResult]) -> Table:
    """The table of BLEU, with a link to each finished run in MLflow, named by its seed."""
    runs: dict[str, dict[str, str]] = {row.id: {} for row in rows}
    for trial in sweep["trials"]:
        if address := trial.get("mlflow_page"):
            runs[trial["row"]][f"seed {trial['seed']}"] = address
    return replace(table_of(BLEU_COLUMNS, rows), links=[runs[row.id] for row in rows] if any(runs.values()) else ())


COVERS = {
    "seeds": "Student's t over the differences from base, one for each seed. It covers the randomness of training, "
    "such as the initial weights and the order of the data",
    "sentences": f"paired bootstrap of the sentences ({RESAMPLES:,} resamples), for rows with one seed. It covers "
    "the choice of the sentences, not of the seed: the difference with another seed may be outside the interval",
}


def _bleu_legend(rows: Sequence[RowResult]) -> list[str]:
    num_compared = sum(row.comparison is not None for row in rows)
    return [
        "BLEU, sd: mean and standard deviation over the seeds, on the validation split. BLEU - base: the difference "
        "from base, over the seeds that both have. test BLEU: the mean on the test split, which no verdict uses.",
        *(f"95% interval over {kind}: {COVERS[kind]}." for kind in covered(rows)),
        f"p: sacreBLEU's paired approximate randomization ({SHUFFLES:,} shuffles), which swaps the translations of a "
        f"sentence by all seeds together, with Holm's correction for {counted(num_compared, 'row')}. It is about "
        "these models on other sentences, not about other seeds.",
        f"verdict: better or worse if p is below {LEVEL} and the interval excludes zero. Not significant does not "
        "mean equal: this table cannot tell.",
        "paper, paper - base: Table 3 of the paper, for its validation split newstest2013 and with another kind of "
        "BLEU: compare only the signs of differences. "
        "same sign?: open if ours is not significant or the paper's is zero.",
    ]


COST_LEGEND = [
    "PPL: perplexity per token of the validation split, with the weights that were scored; lower is better. "
    "PPL - base: the difference from base. paper - base: the paper's difference in PPL.",
    "steps, device-h (device-hours), FLOPs, tokens/s: for one training run, including restarts; mean over the seeds "
    "that finished. FLOPs can be compared with the paper's Table 2 (base: 3.3e18). Tokens are target tokens, without "
    "padding.",
]


def missing(sweep: Mapping[str, Any], rows: Sequence[RowResult]) -> list[str]:
    """Rows and trials without a result, with the reason; trials that took several attempts."""
    points = [
        f"{row.label}: {row.verdict}{f' ({row.note})' if row.note else ''}."
        for row in rows
        if row.verdict in ("skipped", "not run", "not compared")
    ]
    for trial in sweep["trials"]:
        if trial["status"] != "finished":
            error = " ".join((trial.get("error") or "no reason recorded").split()).replace("`", "'")
            spent = trial.get("device_hours")
            cost = f" {amount(spent)} device-hours were spent on it." if spent else ""
            points.append(f"{trial['name']}: {trial['status']}: `{error}`.{cost}")
        elif trial["attempts"] > 1:
            points.append(f"{trial['name']}: {trial['attempts']} attempts, each from the last checkpoint.")
    return points


ALT = "Differences from base in BLEU, ours and the paper's, one panel for each axis"


def markdown(sections: Sequence[Section], image: str) -> str:
    """The report as Markdown. `image` is the file name of the figure, in the same folder."""
    blocks = []
    for level, section in enumerate(sections):
        blocks.append(f"{'##' if level else '#'} {_escape(section.title)}")
        if section.points:
            blocks.append(markdown_list(section.points))
        if section.table:
            blocks += [markdown_table(section.table), markdown_list(section.legend)]
        if section.has_figure:
            blocks.append(f"![{ALT}]({image})")
    return "\n\n".join(blocks) + "\n"


def markdown_list(points: Sequence[str]) -> str:
    """A Markdown list. Text in backticks is code; in other text, special characters are escaped."""
    lines = []
    for point in points:
        parts = re.split(r"(`[^`]*`)", point)  # parts 1, 3, ... are code
        text = "".join(part if number % 2 else _escape(part) for number, part in enumerate(parts))
        lines.append("- " + re.sub(r"^(\d*)([#>+.)-])", r"\1\\\2", text))  # would be a heading or a nested list
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Escape Markdown and HTML. A < that begins no tag and an _ within a word, as in d_k, are harmless and stay."""
    return re.sub(r"[\\`*\[\]|~]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def csv_row(row: RowResult) -> dict[str, Any]:
    """`as_dict`, with a quote before texts that a spreadsheet would take for formulas."""
    formula = ("=", "+", "-", "@")
    return {
        key: f"'{value}" if isinstance(value, str) and value.startswith(formula) else value
        for key, value in as_dict(row).items()
    }


def markdown_table(table: Table) -> str:
    """A Markdown table with padded columns, which also reads well as plain text."""
    cells = [[_escape(cell) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [
        "-" * (width + 1) + ("-" if align == "<" else ":") for width, align in zip(widths, table.align, strict=True)
    ]
    lines = []
    for row in cells:
        padded = (f" {cell:{align}{width}} " for cell, align, width in zip(row, table.align, widths, strict=True))
        lines.append(f"|{'|'.join(padded)}|")
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def html_page(sections: Sequence[Section], png: bytes) -> str:
    """The report as one self-contained HTML file, light or dark like the reader's system."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
        autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters["code"] = _mark_code
    page = templates.get_template("table3.html.jinja")
    return page.render(sections=sections, alt=ALT, png=base64.b64encode(png).decode())


def _mark_code(text: str) -> Markup:
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text)))
