"""Compare the rows of a sweep with base, and the differences with the paper's.

    python -m sweeps.report

Reads data/sweep (trials.json, references.txt, the translations); writes
reports/table3.md, .html, .csv, .png and .json, and adds them to the sweep's run
in MLflow. The table is written even if trials failed, of base too, and names
them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.common import cli
from pipeline.common.atomic_io import write_bytes, write_csv, write_json, write_text
from pipeline.common.paths import REPORTS, SWEEP
from pipeline.common.storage import tracking_uri
from pipeline.tracking.results import log_comparison, log_report
from pipeline.tracking.views import share_sweep_view
from sweeps.analysis import RowResult, assess, read_sweep, totals
from sweeps.figure import figure
from sweeps.render import (
    BLEU_COLUMNS,
    NOTE_COLUMNS,
    csv_row,
    document,
    findings,
    html_page,
    markdown,
    markdown_list,
    markdown_table,
    missing,
    table_of,
)
from sweeps.table3 import BLEU, PPL, TEST_BLEU


def write_report(folder: Path, reports: Path, progress: bool = True) -> list[Path]:
    """Write table3.* to `reports` from the results of the sweep in `folder`. Returns the files.

    Raises ValueError that names what is missing or damaged in `folder`.
    """
    sweep = read_sweep(folder)
    return write_files(sweep, assess(sweep, folder, progress), reports)


def write_files(sweep: Mapping[str, Any], results: Sequence[RowResult], reports: Path) -> list[Path]:
    """Write table3.md, .html, .csv, .png and .json. Returns the files."""
    md, html, csv, image, metrics = (reports / f"table3.{end}" for end in ("md", "html", "csv", "png", "json"))
    sections, png = document(sweep, results), figure(sweep, results)
    write_text(md, markdown(sections, image.name))
    write_text(html, html_page(sections, png))
    write_csv(csv, [csv_row(row) for row in results])
    write_bytes(image, png)
    rows = {
        row.id: {
            BLEU: row.means and row.means.bleu,
            f"{BLEU}_difference": row.comparison and row.comparison.bleu_difference,
            TEST_BLEU: row.means and row.means.test_bleu,
            PPL: row.means and row.means.ppl,
        }
        for row in results
    }
    write_json(metrics, {**totals(sweep, results), "rows": rows})
    return [md, html, csv, image, metrics]


def report_sweep(folder: Path = SWEEP, reports: Path = REPORTS) -> None:
    """The stage: write the files, print the table, log all to MLflow. Raises ValueError with a one-line message."""
    sweep = read_sweep(folder)
    results = assess(sweep, folder)
    files = write_files(sweep, results, reports)
    print(markdown_table(table_of(BLEU_COLUMNS, results)))
    print("\n".join([*findings(results), *missing(sweep, results), f"Full report: {', '.join(map(str, files))}"]))
    store = tracking_uri(Path()), sweep["mlflow_parent"]
    try:
        log_report(*store, files, totals(sweep, results), _note(sweep, results))
        _log_comparisons(store[0], sweep, results)
        if address := share_sweep_view(*store, _changed(results), (BLEU, TEST_BLEU, PPL)):
            print(f"In MLflow (make ui): {address}")
    except ValueError as error:  # the sweep ran elsewhere (`dvc pull`)
        print(f"Not logged to MLflow: {error}")


def _note(sweep: Mapping[str, Any], results: Sequence[RowResult]) -> str:
    """The description of the sweep's MLflow run: the table, what ran and the findings."""
    head, found = document(sweep, results)[:2]
    table = markdown_table(table_of(NOTE_COLUMNS, results))
    points = markdown_list([*head.points, *found.points])
    title = f"**{head.title}**, made by `python -m sweeps.run`"
    return f"{title}\n\n{table}\n\n{points}\n\nFull report: artifact table3.html."


def _log_comparisons(uri: str, sweep: Mapping[str, Any], results: Sequence[RowResult]) -> None:
    """Log a row's comparison with base, over all its seeds, to the MLflow run of each seed."""
    compared = {row.id: row for row in results}
    for trial in sweep["trials"]:
        row = compared[trial["row"]]
        if run_id := trial.get("mlflow_run_id"):
            log_comparison(uri, run_id, row.comparison.as_metrics() if row.comparison else {}, row.verdict)


def _changed(results: Sequence[RowResult]) -> list[str]:
    """The parameters in which the rows differ, by their names in MLflow, without d_v, which changes with d_k."""
    names = (key.partition(".")[2] for row in results for key in row.changes)
    return [name for name in dict.fromkeys(names) if name != "d_v"]


def main() -> None:
    cli.parser("sweeps.report", __doc__).parse_args()
    with cli.exit_on_error("report"):
        report_sweep()


if __name__ == "__main__":
    main()
