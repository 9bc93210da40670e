"""Charts of a table's columns as PNG files, which are seen without a network too. DVC draws CSV files by Vega, which
a browser has to load."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.common.atomic_io import write_bytes


def write_chart(
    path: Path, rows: Sequence[Mapping[str, float]], x: tuple[str, str], ys: Mapping[str, str], points: bool = False
) -> None:
    """Draw a panel for each of the columns `ys`, {column: title}, over the column and title `x`; with a mark for each
    of the `points`. Rows without a column have no point there, and a column that no row has gets no panel."""
    from matplotlib.figure import Figure  # here: training does not wait for it

    drawn = {y: title for y, title in ys.items() if any(y in row for row in rows)} or dict(ys)
    canvas = Figure(figsize=(5.2 * len(drawn), 3.4), layout="constrained")
    for panel, (y, title) in zip(canvas.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        shown = [(row[x[0]], row[y]) for row in rows if y in row]
        panel.plot(*zip(*shown, strict=True) if shown else ([], []), "o-" if points else "-", color="#0072b2")
        panel.set_title(title, fontsize=11)
        panel.set_xlabel(x[1])
        panel.grid(color="#d1d9e0", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    canvas.savefig(image, format="png", dpi=110)
    write_bytes(path, image.getvalue())
