"""Put our numbers beside those of the paper's Table 3, each difference from base with its uncertainty.

    python -m sweeps.report

Reads data/sweep (trials.json, references.txt, the translations); writes reports/table3.md, .html, .csv, .png and
.json, and adds them to the sweep's run in MLflow. Where trials failed, or base did, the table says so and holds the
rest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.common import cli
from pipeline.common.atomic_io import write_bytes, write_csv, write_json, write_text
from pipeline.common.paths import REPORTS, SWEEP
from pipeline.common.storage import tracking_uri
from pipeline.tracking.results import log_report
from pipeline.tracking.views import share_view
from sweeps.analysis import Line, assess, read_sweep, totals, values
from sweeps.figure import figure
from sweeps.render import BLEU_COLUMNS, document, findings, html_page, markdown, markdown_table, missing, table_of

METRICS = ("test_bleu", "valid_averaged_ppl")
"""What the table is about, by the names in MLflow."""


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
    write_csv(sheet, [values(line) for line in lines])
    write_bytes(image, png)
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
    print(markdown_table(table_of(BLEU_COLUMNS, lines)))
    print("\n".join([*findings(lines), *missing(sweep, lines), f"All of it: {', '.join(map(str, files))}"]))
    store = tracking_uri(Path()), sweep["mlflow_parent"]
    try:
        log_report(*store, files, totals(sweep, lines))
        if address := share_view(*store, _changed(lines), METRICS):
            print(f"In MLflow (make ui): {address}")
    except ValueError as error:  # the sweep ran elsewhere (`dvc pull`)
        print(f"Not in MLflow: {error}")


def _changed(lines: Sequence[Line]) -> list[str]:
    """The parameters in which the rows differ, by their names in MLflow; d_v goes with d_k and the heads."""
    names = (key.partition(".")[2] for line in lines for key in line.changes)
    return [name for name in dict.fromkeys(names) if name != "d_v"]


def main() -> None:
    cli.parser("sweeps.report", __doc__).parse_args()
    with cli.exit_on_error("report"):
        run()


if __name__ == "__main__":
    main()
