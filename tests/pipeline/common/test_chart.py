"""Charts of a table's columns."""

import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from pipeline.common.chart import write_chart

ROWS = [{"step": 10, "loss": 3.5}, {"step": 20, "loss": 2.5, "bleu": 7.0}, {"step": 30, "loss": 2.25, "bleu": 31.0}]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], list[Any]]]:
    """Collect the x and y of each line that is drawn."""
    lines: list[tuple[list[Any], list[Any]]] = []
    plot = Axes.plot

    def record(panel: Axes, xs: Any, ys: Any, *arguments: Any, **named: Any) -> Any:
        lines.append((list(xs), list(ys)))
        return plot(panel, xs, ys, *arguments, **named)

    monkeypatch.setattr(Axes, "plot", record)
    return lines


def width(path: Path) -> int:
    png = path.read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">I", png[16:20])[0]


def test_write_chart_draws_a_panel_for_each_column_that_exists(tmp_path: Path, drawn: list):
    columns = {"loss": "Loss", "bleu": "BLEU", "chrf": "chrF"}
    write_chart(tmp_path / "two.png", ROWS, ("step", "steps"), columns)
    assert drawn == [([10, 20, 30], [3.5, 2.5, 2.25]), ([20, 30], [7.0, 31.0])]
    write_chart(tmp_path / "one.png", ROWS, ("step", "steps"), {"loss": "Loss"}, points=True)
    assert width(tmp_path / "two.png") == 2 * width(tmp_path / "one.png")


def test_write_chart_without_a_row_is_an_empty_chart(tmp_path: Path, drawn: list):
    write_chart(tmp_path / "none.png", [], ("step", "steps"), {"loss": "Loss"})
    assert drawn == [([], [])]
    assert width(tmp_path / "none.png") > 300
