"""Compare our differences from base, with intervals, with the paper's Table 3.

    python -m sweeps.report

Reads data/sweep (trials.json, references.txt, the translations); writes
reports/table3.md, .html, .csv, .png and .json, and adds them to the sweep's run
in MLflow. Where trials failed, or base did, the table names them and holds the
rest.
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
    """From what the sweep left in `folder` to table3.* in `reports`: the files written.

    Raises ValueError that names what is missing or damaged in `folder`.
    """
    sweep = read_sweep(folder)
    return write_files(sweep, assess(sweep, folder, progress), reports)


def write_files(sweep: Mapping[str, Any], results: Sequence[RowResult], reports: Path) -> list[Path]:
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
    """The stage: write the files, print the main points, tell MLflow. Raises ValueError with one line."""
    sweep = read_sweep(folder)
    results = assess(sweep, folder)
    files = write_files(sweep, results, reports)
    print(markdown_table(table_of(BLEU_COLUMNS, results)))
    print("\n".join([*findings(results), *missing(sweep, results), f"All of it: {', '.join(map(str, files))}"]))
    store = tracking_uri(Path()), sweep["mlflow_parent"]
    try:
        log_report(*store, files, totals(sweep, results), _note(sweep, results))
        _log_comparisons(store[0], sweep, results)
        if address := share_sweep_view(*store, _changed(results), (BLEU, TEST_BLEU, PPL)):
            print(f"In MLflow (make ui): {address}")
    except ValueError as error:  # the sweep ran elsewhere (`dvc pull`)
        print(f"Not in MLflow: {error}")


def _note(sweep: Mapping[str, Any], results: Sequence[RowResult]) -> str:
    """The description of the sweep's run: what ran, what came of it, the table."""
    head, said = document(sweep, results)[:2]
    table = markdown_table(table_of(NOTE_COLUMNS, results))
    points = markdown_list([*head.points, *said.points])
    return (
        f"**{head.title}**, by `python -m sweeps.run`\n\n{table}\n\n{points}\n\nAll of it: table3.html, an artifact."
    )


def _log_comparisons(uri: str, sweep: Mapping[str, Any], results: Sequence[RowResult]) -> None:
    """How a row differs from base, over all its seeds, to the run of each of them."""
    compared = {row.id: row for row in results}
    for trial in sweep["trials"]:
        row = compared[trial["row"]]
        if run_id := trial.get("mlflow_run_id"):
            log_comparison(uri, run_id, row.comparison.as_metrics() if row.comparison else {}, row.verdict)


def _changed(results: Sequence[RowResult]) -> list[str]:
    """The parameters in which the rows differ, by their names in MLflow; d_v goes with d_k and the heads."""
    names = (key.partition(".")[2] for row in results for key in row.changes)
    return [name for name in dict.fromkeys(names) if name != "d_v"]


def main() -> None:
    cli.parser("sweeps.report", __doc__).parse_args()
    with cli.exit_on_error("report"):
        report_sweep()


if __name__ == "__main__":
    main()
