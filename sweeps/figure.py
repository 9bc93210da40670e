"""Draw the figure of the report: one panel for each axis of Table 3, with our differences and the paper's."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from sweeps.analysis import RowResult, covered

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
"""The name of a panel, and the setting whose values are its categories. Other panels use the rows' labels."""

OURS, PAPERS, GREY = "#0072b2", "#d55e00", "#6e7781"  # blue and vermilion of Okabe and Ito: safe for the colour-blind
LETTERS = 60  # in a line of the title, for each column of panels
APART = 0.15  # shift of our points to the left, of the paper's to the right; categories are 1 apart


def figure(sweep: Mapping[str, Any], rows: Sequence[RowResult]) -> bytes:
    """A PNG with a panel for each axis: our differences from base with their intervals, and the paper's."""
    base, *others = rows
    axes = list(dict.fromkeys(row.axis for row in others)) or ["no rows but base"]
    columns = min(2, len(axes))  # with more, the letters are too small at a page's width
    height = -(-len(axes) // columns)
    canvas = Figure(figsize=(6.4 if columns == 1 else 4.8 * columns, 3.1 * height + 1.1), layout="constrained")
    panels = canvas.subplots(height, columns, squeeze=False).flatten()
    for panel, axis in zip(panels, axes, strict=False):
        draw_panel(panel, axis, [base, *(row for row in others if row.axis == axis)], sweep.get("base", {}))
    for panel in panels[len(axes) :]:
        panel.remove()
    for panel in panels[: len(axes) : columns]:
        panel.set_ylabel("difference from base, validation BLEU")
    canvas.suptitle(title(sweep, rows, LETTERS * columns), fontsize=11, parse_math=False)
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


def title(sweep: Mapping[str, Any], rows: Sequence[RowResult], width: int) -> str:
    """The title, in lines of at most `width` letters."""
    seeds, chances = len(sweep["seeds"]), covered(rows)
    text = f"{sweep['base_name']}; {seeds} seed{'s' if seeds > 1 else ''}"
    if chances:
        text += f"; bars: 95% interval over {' or '.join(chances).replace('sentences', 'validation sentences')}"
    return textwrap.fill(text, width)


def draw_panel(panel: Axes, axis: str, rows: list[RowResult], base: Mapping[str, Any]) -> None:
    """Draw base and the rows of one axis. `base` has the base model's settings, {"model.d_k": 64, ...}.

    Categories that are numbers are sorted, with base among them.
    """
    name, key = AXES.get(axis, (axis, ""))
    shown: list[tuple[Any, RowResult]] = [
        ((base if row.axis == "base" else row.changes).get(key), row) for row in rows
    ]
    if all(isinstance(value, int | float) for value, _ in shown):
        shown.sort(key=lambda pair: pair[0])
    panel.axhline(0, color=GREY, linewidth=0.8)
    for x, (_, row) in enumerate(shown):
        if row.comparison:
            difference, interval = row.comparison.bleu_difference, row.comparison.interval
            panel.plot([x - APART] * 2, [interval.low, interval.high], "_-", color=OURS, linewidth=1.3)
            fill = OURS if row.is_significant else "white"
            panel.plot(x - APART, difference, "o", color=OURS, markerfacecolor=fill)
            _write(panel, f"{difference:+z.1f}", x - APART, difference, OURS, to_the_left=True)
        elif row.axis != "base":
            middle = panel.get_xaxis_transform()
            panel.text(
                x - APART, 0.5, row.verdict, transform=middle, rotation=90, ha="center", va="center", color=GREY
            )
        elif row.means:
            panel.plot(x, 0, "o", color=GREY)
            _write(panel, f"{row.means.bleu:.1f}", x, 0, GREY)
        if row.paper and row.paper.bleu_difference is not None:
            difference = row.paper.bleu_difference
            panel.plot(x + APART, difference, "D", color=PAPERS, markersize=5)
            _write(panel, f"{difference:+z.1f}", x + APART, difference, PAPERS)
    panel.set_xticks(range(len(shown)), [_category(row, value) for value, row in shown], fontsize=9, parse_math=False)
    panel.set_xlim(-0.7, len(shown) - 0.3)
    panel.set_xlabel(name, parse_math=False)
    panel.margins(y=0.12)
    panel.yaxis.set_major_locator(MaxNLocator(nbins=6))
    panel.grid(axis="y", color="#d1d9e0", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _write(panel: Axes, text: str, x: float, y: float, color: str, to_the_left: bool = False) -> None:
    """Write the value next to its marker: to the left of it, or above or below, away from the line at zero."""
    shift, across, up = ((-6, 0), "right", "center") if to_the_left else ((0, -6), "center", "top")
    if y > 0 and not to_the_left:
        shift, up = (0, 6), "bottom"
    label = panel.annotate(text, (x, y), shift, "data", "offset points", ha=across, va=up, fontsize=8, color=color)
    label.set_path_effects([withStroke(linewidth=2, foreground="white")])  # legible where a line crosses it


def _category(row: RowResult, value: Any) -> str:
    if row.axis == "base":
        return "base" if value is None else f"{value}\n(base)"
    return "\n".join(textwrap.wrap(row.label.removeprefix("grid: "), 14)) if value is None else str(value)
