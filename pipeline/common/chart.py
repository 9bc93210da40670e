"""Charts of a table's columns as PNG files, which can be viewed offline.

DVC's own plots of CSV files need Vega, which a browser downloads.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.common.atomic_io import write_bytes


def write_chart(
    path: Path, rows: Sequence[Mapping[str, float]], x: tuple[str, str], ys: Mapping[str, str], points: bool = False
) -> None:
    """Draw one panel per column of `ys`, {column: title}, against `x`, (column, title).

    `points` marks each value. A row without a column is left out of its panel; a column without values has no panel.
    """
    from matplotlib.figure import Figure  # imported here so that training does not wait for it

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
