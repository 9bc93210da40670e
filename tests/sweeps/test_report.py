"""The files of a sweep's report: analysis.py, render.py, figure.py and report.py together."""

import base64
import csv
import json
import random
import re
import shutil
import statistics
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from sacrebleu.metrics import BLEU

from sweeps import report
from sweeps.analysis import assess, read_sweep
from sweeps.figure import draw_panel, title
from sweeps.render import counted
from sweeps.report import main, report_sweep, write_report
from sweeps.significance import holm, paired_p, seed_interval, sentence_interval

NUM_SENTENCES = 41
SEEDS = [1, 2, 5]


def published(bleu: float, ppl: float, params: int | None = None) -> dict[str, Any]:
    return {"bleu": bleu, "ppl": ppl, "params": params}


ROWS = [  # id, axis, label, changes, the paper's values, share of wrong words in our translations
    ("base", "base", "base", {}, published(25.8, 4.92, 65), 0.1),
    ("A-h1", "heads", "A: 1 head", {"model.num_heads": 1, "model.d_k": 64}, published(24.9, 5.29), 0.3),
    ("A-h16", "heads", "A: 8 heads", {"model.num_heads": 8}, published(25.8, 4.91), 0.02),
    ("B-dk32", "d_k", "B: d_k 8", {"model.d_k": 8}, published(25.4, 5.01, 60), 0.1),
    ("D-dropout0.0", "dropout", "D: dropout 0.0", {"model.dropout": 0.0}, published(24.6, 5.77), 0.02),
    ("positions-alibi", "positions", "alibi positions", {"model.positions": "alibi"}, None, 0.35),
]


@pytest.fixture(autouse=True, scope="module")
def _fewer_shuffles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweeps.significance.SHUFFLES", 500)
        patch.setattr("sweeps.significance.RESAMPLES", 200)
        yield


def write_sweep(folder: Path, seeds: list[int], change: Callable[[dict], object] = lambda sweep: None) -> Path:
    """Write the results of a sweep, after `change` has edited them."""
    folder.mkdir(parents=True)
    chance = random.Random(3)
    references = [" ".join(chance.choices("abcdefghijklm", k=chance.randint(6, 11))) for _ in range(NUM_SENTENCES)]
    (folder / "references.txt").write_text("\n".join(references) + "\n", encoding="utf-8")
    rows, trials = [], []
    for id, axis, label, changes, paper, wrong in ROWS:
        rows.append({"id": id, "group": id[0], "axis": axis, "label": label, "changes": changes,
                     "published": paper, "skipped": None})  # fmt: skip
        for seed in seeds:
            chance = random.Random(f"{wrong} {seed}")  # rows with equal shares have equal errors
            texts = [" ".join("x" if chance.random() < wrong else w for w in line.split()) for line in references]
            (folder / f"{id}.{seed}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
            bleu = BLEU(force=True).corpus_score(texts, [references]).score
            trials.append({
                "row": id, "seed": seed, "name": f"{label}, seed {seed}", "status": "finished", "error": None,
                "parameters": 123_457, "steps": 400, "flops": seed * 1.1e18, "device_hours": seed / 7, "attempts": 1,
                "tokens_per_second": 7_001.0, "evaluation_device_hours": 0.01,
                "metrics": {
                    "valid_averaged_bleu": bleu, "valid_averaged_ppl": 1 + wrong + seed / 100, "test_bleu": bleu / 2,
                },
                "translations": f"{id}.{seed}.txt", "mlflow_run_id": f"run {id}.{seed}",
                "mlflow_page": f"http://mlflow/#/experiments/1/runs/{id}.{seed}",
                "seconds": 70.0 + 1.5 * seed, "seconds_to_first_step": 19.0, "seconds_of_overhead": 17.0,
            })  # fmt: skip
    sweep = {
        "experiment": "table3-grammar-nano", "data": "grammar", "base_name": "nano on grammar, 100 steps",
        "device": "cpu",
        "date": "2026-11-28", "commit": "commit 0123456789 with changes", "machine": "2 cores of a processor",
        "price_per_device_hour": 0.0, "bleu_signature": "nrefs:1|case:mixed", "mlflow_parent": "parent",
        "seeds": seeds, "rows": rows, "trials": trials,
        "base": {"data.tgt": "en", "model.num_heads": 4, "model.d_k": 16,
                 "model.dropout": 0.1, "model.positions": "sinusoidal"},
    }  # fmt: skip
    change(sweep)
    (folder / "trials.json").write_text(json.dumps(sweep), encoding="utf-8")
    return folder


def spoil(sweep: dict, row: str, status: str, error: str, seeds: list[int] = SEEDS) -> None:
    for trial in sweep["trials"]:
        if trial["row"] == row and trial["seed"] in seeds:
            trial.update(status=status, error=error, metrics={}, translations=None)


def spoil_some(sweep: dict) -> None:
    spoil(sweep, "A-h1", "failed", "CUDA out of memory: 2 GiB | `x`\nof <8>")
    spoil(sweep, "A-h16", "stopped", "by ASHA", [1, 2])
    spoil(sweep, "D-dropout0.0", "unfinished", "was interrupted", [2])
    for trial in [trial for trial in sweep["trials"] if trial["row"] == "B-dk32"]:
        sweep["trials"].remove(trial)
    sweep["rows"][3]["skipped"] = "8 heads x 1/3 is 2.67 heads"
    sweep["trials"][-1]["attempts"] = 4
    sweep["price_per_device_hour"] = 2.5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sweep without failures, and its reports."""
    root = tmp_path_factory.mktemp("whole")
    write_report(write_sweep(root / "sweep", SEEDS), root / "reports", progress=False)
    return root / "sweep", root / "reports"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("damaged")
    write_report(write_sweep(root / "sweep", SEEDS, spoil_some), root / "reports", progress=False)
    return root / "sweep", root / "reports"


def table(markdown: str, section: str) -> dict[str, list[str]]:
    """Return the cells of a section's table by row."""
    lines = markdown.partition(f"## {section}\n")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def sheet(reports: Path) -> dict[str, dict[str, str]]:
    with (reports / "table3.csv").open(encoding="utf-8", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def trials_of(sweep: Path, row: str) -> list[dict]:
    return [trial for trial in json.loads((sweep / "trials.json").read_text())["trials"] if trial["row"] == row]


def bleus(sweep: Path, row: str) -> list[float]:
    return [trial["metrics"]["valid_averaged_bleu"] for trial in trials_of(sweep, row)]


def texts(sweep: Path, row: str) -> list[list[str]]:
    """Return the translations for each seed."""
    return [(sweep / trial["translations"]).read_text().split("\n")[:-1] for trial in trials_of(sweep, row)]


def test_write_report_tables_the_trials_numbers(whole: tuple[Path, Path]):
    sweep, reports = whole
    rows = table((reports / "table3.md").read_text(encoding="utf-8"), "BLEU")
    assert list(rows) == ["row", *(row[2] for row in ROWS)]
    for id, _, label, *_ in ROWS:
        mean, deviation, n = rows[label][:3]
        assert mean == f"{statistics.fmean(bleus(sweep, id)):.2f}"
        assert deviation == f"{statistics.stdev(bleus(sweep, id)):.2f}"
        assert n == "3"
        assert rows[label][8] == f"{statistics.fmean(bleus(sweep, id)) / 2:.2f}"
    differences = [ours - base for ours, base in zip(bleus(sweep, "A-h1"), bleus(sweep, "base"), strict=True)]
    interval = seed_interval(differences)
    assert rows["A: 1 head"][3:6] == [
        f"{statistics.fmean(differences):+.2f}", f"{interval.low:+.2f} to {interval.high:+.2f}", "seeds"
    ]  # fmt: skip
    assert rows["A: 1 head"][9:] == ["24.9", "-0.9", "yes"]
    assert rows["A: 1 head"][7] == rows["alibi positions"][7] == "worse"
    assert rows["base"][3:8] == ["", "", "", "", "base"]
    assert rows["base"][9:] == ["25.8", "", ""]
    assert rows["alibi positions"][9:] == ["", "", ""]


def test_write_report_shows_costs_as_means_of_one_training(whole: tuple[Path, Path]):
    rows = table((whole[1] / "table3.md").read_text(encoding="utf-8"), "Perplexity, size, cost")
    assert rows["A: 1 head"] == [
        "1.327", "+0.200", "5.29", "+0.37", "0.123", "", "400", "0.381", "2.9e18", "7,001"
    ]  # fmt: skip
    assert rows["base"][2:6] == ["4.92", "", "0.123", "65"]


def test_write_report_begins_with_what_ran_and_what_all_trials_cost(whole: tuple[Path, Path]):
    head = (whole[1] / "table3.md").read_text(encoding="utf-8").partition("##")[0]
    assert "# Table 3: nano on grammar, 100 steps\n" in head
    assert "- Made on 2026-11-28 at commit 0123456789 with changes, on 2 cores of a processor.\n" in head
    assert f"Corpus: grammar. Rows are compared on the {NUM_SENTENCES} sentences of its validation split" in head
    assert "Base: nano on grammar, 100 steps. Steps: 400.\n" in head
    assert "Seeds: 1, 2, 5." in head
    assert "`nrefs:1|case:mixed`" in head
    hours = 6 * (1 + 2 + 5) / 7
    assert f"Cost: {hours:.3g} device-hours (cpu) of training, 0.18 of evaluation; 5.3e19 FLOPs" in head
    assert "Mean time of a trial: 74 s. Its first step is finished after 19 s; 17 s are neither training nor" in head
    assert "Price" not in head


def test_write_report_shows_times_of_a_few_seconds_with_a_decimal(tmp_path: Path):
    def hurry(sweep: dict) -> None:
        for trial in sweep["trials"]:
            trial |= {"seconds": 12.34, "seconds_to_first_step": 1.26, "seconds_of_overhead": 0.14}

    write_report(write_sweep(tmp_path / "sweep", [1], hurry), tmp_path, progress=False)
    markdown = (tmp_path / "table3.md").read_text(encoding="utf-8")
    assert (
        "Mean time of a trial: 12 s. Its first step is finished after 1.3 s; 0.1 s are neither training" in markdown
    )
    assert "- Seed: 1. Rows with the same seed" in markdown


def test_write_report_leaves_out_times_if_no_trial_ran_as_a_whole(tmp_path: Path):
    def continue_all(sweep: dict) -> None:
        for trial in sweep["trials"]:
            del trial["seconds"], trial["seconds_to_first_step"], trial["seconds_of_overhead"]

    write_report(write_sweep(tmp_path / "sweep", [1], continue_all), tmp_path, progress=False)
    assert "Mean time of a trial" not in (tmp_path / "table3.md").read_text(encoding="utf-8")
    metrics = json.loads((tmp_path / "table3.json").read_text())
    assert not {"seconds", "seconds_to_first_step", "seconds_of_overhead"} & metrics.keys()


def test_counted_has_a_plural_for_all_but_one():
    assert [counted(number, "row") for number in (0, 1, 2, 1500)] == ["0 rows", "1 row", "2 rows", "1,500 rows"]


def test_write_report_prices_all_device_hours(damaged: tuple[Path, Path]):
    trials = json.loads((damaged[0] / "trials.json").read_text())["trials"]
    hours = sum(trial["device_hours"] + trial["evaluation_device_hours"] for trial in trials)
    assert f"Price: {2.5 * hours:.2f} at 2.50 per device-hour." in (damaged[1] / "table3.md").read_text(
        encoding="utf-8"
    )


def test_assess_corrects_sacrebleus_p_over_all_seeds_by_holm(whole: tuple[Path, Path]):
    sweep, reports = whole
    references = (sweep / "references.txt").read_text().split("\n")[:-1]
    raw = [paired_p(texts(sweep, "base"), texts(sweep, row[0]), references, "en") for row in ROWS[1:]]
    found = [float(row["p_holm"]) for row in list(sheet(reports).values())[1:]]
    assert found == pytest.approx(holm(raw))
    assert found != pytest.approx(raw)


def test_assess_finds_no_difference_in_bases_own_translations(whole: tuple[Path, Path]):
    row = sheet(whole[1])["B-dk32"]
    assert (row["verdict"], row["p_holm"], row["same_sign"]) == ("not significant", "1.0", "open")
    assert [float(row[key]) for key in ("bleu_difference", "interval_low", "interval_high")] == [0, 0, 0]


def test_same_sign_is_open_where_ours_is_not_significant_or_the_papers_is_zero(whole: tuple[Path, Path]):
    rows = sheet(whole[1])
    found = {id: (row["verdict"], row["paper_bleu_difference"], row["same_sign"]) for id, row in rows.items()}
    assert found == {
        "base": ("base", "", ""),
        "A-h1": ("worse", "-0.9", "yes"),
        "A-h16": ("better", "0.0", "open"),
        "B-dk32": ("not significant", "-0.4", "open"),
        "D-dropout0.0": ("better", "-1.2", "no"),
        "positions-alibi": ("worse", "", ""),
    }
    markdown = (whole[1] / "table3.md").read_text(encoding="utf-8")
    assert "Not significant: this table cannot tell them from base: B: d_k 8.\n" in markdown
    assert "Different, with the opposite sign: D: dropout 0.0.\n" in markdown


def test_verdict_is_not_significant_where_the_interval_overrules_p(tmp_path: Path):
    def scatter(sweep: dict) -> None:
        for trial in sweep["trials"]:
            if trial["row"] == "A-h1":  # the seeds disagree: the translations differ, but the interval contains zero
                trial["metrics"]["valid_averaged_bleu"] = {1: 10.0, 2: 95.0, 5: 60.0}[trial["seed"]]

    write_report(write_sweep(tmp_path / "sweep", SEEDS, scatter), tmp_path, progress=False)
    row = sheet(tmp_path)["A-h1"]
    assert float(row["p_holm"]) < 0.05
    assert row["verdict"] == "not significant"


def test_verdict_is_not_significant_where_p_overrules_the_interval(tmp_path: Path):
    def lift(sweep: dict) -> None:
        for trial in sweep["trials"]:
            if trial["row"] == "B-dk32":  # base's own translations; the scores do not matter
                trial["metrics"]["valid_averaged_bleu"] += 1

    write_report(write_sweep(tmp_path / "sweep", SEEDS, lift), tmp_path, progress=False)
    row = sheet(tmp_path)["B-dk32"]
    assert float(row["interval_low"]) > 0.9
    assert (row["p_holm"], row["verdict"]) == ("1.0", "not significant")


def test_assess_takes_the_interval_over_sentences_with_one_seed(tmp_path: Path):
    sweep = write_sweep(tmp_path / "sweep", [2])
    write_report(sweep, tmp_path, progress=False)
    row, markdown = sheet(tmp_path)["A-h1"], (tmp_path / "table3.md").read_text(encoding="utf-8")
    references = (sweep / "references.txt").read_text().split("\n")[:-1]
    expected = sentence_interval(texts(sweep, "base")[0], texts(sweep, "A-h1")[0], references, "en")
    assert (float(row["interval_low"]), float(row["interval_high"])) == (expected.low, expected.high)
    assert (row["interval_covers"], row["bleu_sd"], row["num_seeds"]) == ("sentences", "", "1")
    assert "- 95% interval over sentences: paired bootstrap" in markdown
    assert "another seed may give other results" in markdown
    assert "interval over seeds" not in markdown


def test_assess_takes_the_interval_over_seeds_with_several(whole: tuple[Path, Path]):
    markdown = (whole[1] / "table3.md").read_text(encoding="utf-8")
    assert "- 95% interval over seeds: Student's t" in markdown
    assert "interval over sentences" not in markdown
    assert "another seed may give other results" not in markdown


def test_missing_gives_the_reason_for_rows_and_trials_without_a_result(damaged: tuple[Path, Path]):
    markdown = (damaged[1] / "table3.md").read_text(encoding="utf-8")
    rows = table(markdown, "BLEU")
    assert rows["A: 1 head"] == ["", "", "", "", "", "", "", "failed", "", "24.9", "-0.9", ""]
    assert rows["B: d_k 8"][7] == "skipped"
    assert "- B: d_k 8: skipped (8 heads x 1/3 is 2.67 heads).\n" in markdown
    for seed, hours in ((1, "0.143"), (2, "0.286"), (5, "0.714")):
        line = (
            f"- A: 1 head, seed {seed}: failed: `CUDA out of memory: 2 GiB | 'x' of <8>`. {hours} device-hours were"
        )
        assert line in markdown
    assert "- A: 8 heads, seed 2: stopped: `by ASHA`." in markdown
    assert "- D: dropout 0.0, seed 2: unfinished: `was interrupted`." in markdown
    assert "- alibi positions, seed 5: 4 attempts, each from the last checkpoint.\n" in markdown
    assert "No result: A: 1 head (failed); B: d_k 8 (skipped).\n" in markdown
    page = (damaged[1] / "table3.html").read_text(encoding="utf-8")
    assert "<code>CUDA out of memory: 2 GiB | &#x27;x&#x27; of &lt;8&gt;</code>" in page


def test_assess_takes_differences_over_the_seeds_that_both_have(damaged: tuple[Path, Path]):
    sweep, reports = damaged
    rows = sheet(reports)
    base = {trial["seed"]: trial["metrics"]["valid_averaged_bleu"] for trial in trials_of(sweep, "base")}
    dropout = {
        trial["seed"]: trial["metrics"]["valid_averaged_bleu"]
        for trial in trials_of(sweep, "D-dropout0.0")
        if trial["status"] == "finished"
    }
    assert rows["D-dropout0.0"]["seeds"] == "1 5"
    assert float(rows["D-dropout0.0"]["bleu_difference"]) == pytest.approx(
        (dropout[1] - base[1] + dropout[5] - base[5]) / 2
    )
    assert (rows["A-h16"]["seeds"], rows["A-h16"]["interval_covers"]) == ("5", "sentences")
    assert rows["D-dropout0.0"]["interval_covers"] == "seeds"


def test_write_report_without_base_has_no_differences(tmp_path: Path):
    sweep = write_sweep(tmp_path / "sweep", [1, 2], lambda sweep: spoil(sweep, "base", "failed", "loss is nan"))
    files = write_report(sweep, tmp_path, progress=False)
    assert all(file.stat().st_size for file in files)
    row, markdown = sheet(tmp_path)["A-h1"], files[0].read_text(encoding="utf-8")
    assert (row["bleu_difference"], row["p_holm"], row["same_sign"]) == ("", "", "")
    assert float(row["bleu"]) == pytest.approx(statistics.fmean(bleus(sweep, "A-h1")))
    assert "- A: 1 head: not compared (base has no result).\n" in markdown
    assert "- base, seed 2: failed: `loss is nan`." in markdown


def test_assess_does_not_compare_a_row_without_a_seed_of_bases(tmp_path: Path):
    def part(sweep: dict) -> None:
        spoil(sweep, "base", "failed", "loss is nan", [1])
        spoil(sweep, "A-h1", "failed", "loss is nan", [2])

    write_report(write_sweep(tmp_path / "sweep", [1, 2], part), tmp_path, progress=False)
    rows = sheet(tmp_path)
    assert (rows["A-h1"]["verdict"], rows["A-h1"]["note"]) == (
        "not compared", "no seed in common with base, which has seed 2"
    )  # fmt: skip
    assert rows["D-dropout0.0"]["interval_covers"] == "sentences"


def test_write_report_of_base_alone_is_a_table_too(tmp_path: Path):
    def only_base(sweep: dict) -> None:
        sweep.update(rows=sweep["rows"][:1], trials=sweep["trials"][:1])

    files = write_report(write_sweep(tmp_path / "sweep", [1], only_base), tmp_path, progress=False)
    assert list(table(files[0].read_text(encoding="utf-8"), "BLEU")) == ["row", "base"]


def test_as_dict_has_plain_numbers_for_each_row_of_the_csv(whole: tuple[Path, Path]):
    sweep, reports = whole
    rows = sheet(reports)
    assert list(rows) == [row[0] for row in ROWS]
    assert float(rows["A-h1"]["bleu"]) == statistics.fmean(bleus(sweep, "A-h1"))
    assert rows["A-h1"]["changes"] == "model.num_heads=1 model.d_k=64"
    assert float(rows["A-h1"]["params"]) == 123_457
    assert rows["base"]["paper_params_millions"] == "65"


def test_figure_is_a_png_of_readable_size_that_html_page_embeds(whole: tuple[Path, Path]):
    png = (whole[1] / "table3.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert 1_200 <= width <= 1_600
    assert 800 <= height <= 1_400
    page = (whole[1] / "table3.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(source) for source in sources] == [png]
    assert not re.search(r"<link|<script [^>]*src|src=\"(?!data:)|@import|url\(|fetch\(", page)
    assert "](table3.png)" in (whole[1] / "table3.md").read_text(encoding="utf-8")


def test_title_of_the_figure_fits_the_width_of_its_panels(whole: tuple[Path, Path]):
    sweep = read_sweep(whole[0])
    results = assess(sweep, whole[0], progress=False)
    lines = title(sweep, results, 50).splitlines()
    assert max(map(len, lines)) <= 50
    assert " ".join(lines) == "nano on grammar, 100 steps; 3 seeds; bars: 95% interval over seeds"


def panel(sweep: Path, axis: str) -> Any:
    read = read_sweep(sweep)
    lines = assess(read, sweep, progress=False)
    axes = Figure().subplots()
    draw_panel(axes, axis, [lines[0], *(line for line in lines if line.axis == axis)], read["base"])
    return axes


def test_draw_panel_has_base_among_its_values_and_our_points_by_the_papers(whole: tuple[Path, Path]):
    axes = panel(whole[0], "heads")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4\n(base)", "8"]
    assert axes.get_xlabel() == "heads h"
    ours = statistics.fmean(bleus(whole[0], "A-h1")) - statistics.fmean(bleus(whole[0], "base"))
    heights = {
        marker: [float(line.get_ydata()[0]) for line in axes.lines if line.get_marker() == marker]
        for marker in ("o", "D")
    }
    assert heights["D"] == [-0.9, 0.0]
    assert heights["o"][0] == pytest.approx(ours)
    assert heights["o"][1] == 0
    assert f"{ours:+.1f}" in [text.get_text() for text in axes.texts]


def test_draw_panel_puts_words_after_base(whole: tuple[Path, Path]):
    axes = panel(whole[0], "positions")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["sinusoidal\n(base)", "alibi"]


def test_draw_panel_labels_rows_of_a_grid_by_what_they_change(tmp_path: Path):
    sweep = write_sweep(tmp_path / "sweep", [1], of_row(1, axis="grid", label="grid: d_ff 64"))
    axes = panel(sweep, "grid")
    assert axes.get_xlabel() == "grid"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["base", "d_ff 64"]


def test_draw_panel_names_what_has_no_result(damaged: tuple[Path, Path]):
    assert "failed" in [text.get_text() for text in panel(damaged[0], "heads").texts]


def test_write_report_puts_a_few_metrics_of_each_row_into_json(whole: tuple[Path, Path]):
    metrics = json.loads((whole[1] / "table3.json").read_text())
    assert metrics["rows"]["A-h1"]["valid_averaged_bleu"] == statistics.fmean(bleus(whole[0], "A-h1"))
    assert metrics["rows"]["A-h1"]["test_bleu"] == pytest.approx(metrics["rows"]["A-h1"]["valid_averaged_bleu"] / 2)
    assert metrics["rows"]["base"]["valid_averaged_bleu_difference"] is None
    assert (metrics["trials_finished"], metrics["trials_not_finished"]) == (18, 0)
    assert (metrics["rows_different_from_base"], metrics["rows_not_significant"]) == (4, 1)
    assert metrics["training_flops"] == pytest.approx(6 * 8 * 1.1e18)


@pytest.mark.parametrize(
    ("flops", "expected"), [(3.3e18, "3.3e18"), (9.97e5, "1.0e6"), (4.0, "4.0e0"), (2.3e19, "2.3e19")]
)
def test_flops_are_written_as_in_the_papers_table_2(flops: float, expected: str, tmp_path: Path):
    def set_flops(sweep: dict) -> None:
        sweep.update(rows=sweep["rows"][:1], trials=[sweep["trials"][0] | {"flops": flops}])

    files = write_report(write_sweep(tmp_path / "sweep", [1], set_flops), tmp_path, progress=False)
    assert table(files[0].read_text(encoding="utf-8"), "Perplexity, size, cost")["base"][8] == expected


def test_read_sweep_names_what_is_missing_or_damaged_and_what_to_do(tmp_path: Path):
    path = tmp_path / "sweep/trials.json"
    with pytest.raises(ValueError, match=rf"^{path} does not exist: run the sweep first \(python -m sweeps.run\)$"):
        write_report(tmp_path / "sweep", tmp_path)
    sweep = write_sweep(tmp_path / "sweep", [1])
    short = sweep / "A-h1.1.txt"
    short.write_text("x\n")
    with pytest.raises(
        ValueError, match=rf"^{short} has 1 lines, references.txt {NUM_SENTENCES}: run the sweep again"
    ):
        write_report(sweep, tmp_path, progress=False)
    short.unlink()
    with pytest.raises(ValueError, match=rf"^{short} does not exist: run the sweep again \(python -m sweeps.run\)$"):
        write_report(sweep, tmp_path, progress=False)
    path.write_text('{"rows": [')
    with pytest.raises(ValueError, match=rf"^{path} is damaged \(Expecting value.*\): run the sweep again"):
        write_report(sweep, tmp_path)


def of_trial(number: int, **values: Any) -> Callable[[dict], object]:
    return lambda sweep: sweep["trials"][number].update(values)


def of_row(number: int, **values: Any) -> Callable[[dict], object]:
    return lambda sweep: sweep["rows"][number].update(values)


NO_FILE_NAME = r"trials\.1\.translations: String should match pattern"
NO_ADDRESS = r"trials\.0\.mlflow_page: String should match pattern"
EDITS: dict[str, tuple[Callable[[dict], object], str]] = {
    "no rows": (lambda sweep: sweep.update(rows=[]), "rows: List should have at least 1 item"),
    "a row gone": (lambda sweep: sweep["rows"].pop(2), r"A: 8 heads, seed 1 belongs to row 'A-h16', which"),
    "a row twice": (lambda sweep: sweep["rows"].append(sweep["rows"][1]), "two rows have the same id"),
    "no trials": (lambda sweep: sweep.pop("trials"), "trials: Field required"),
    "no seeds": (lambda sweep: sweep.update(seeds=[]), "seeds: List should have at least 1 item"),
    "a seed in words": (of_trial(1, seed="one"), r"trials\.1\.seed: Input should be a valid integer"),
    "an unknown status": (of_trial(1, status="done"), r"trials\.1\.status: Input should be 'finished', 'failed'"),
    "no metrics": (of_trial(1, metrics={}), "A: 1 head, seed 1 is finished and has no metrics.valid_averaged_bleu"),
    "a metric in words": (of_trial(1, metrics={"test_bleu": "7"}), r"trials\.1\.metrics\.test_bleu: Input should be"),
    "not a number": (of_trial(1, metrics={"test_bleu": float("nan")}), "NaN is not a finite number"),
    "infinite": (of_trial(1, flops=float("inf")), "Infinity is not a finite number"),
    "no cost": (of_trial(1, device_hours=None), "A: 1 head, seed 1 is finished and has no device_hours"),
    "half of the times": (
        of_trial(1, seconds_of_overhead=None),
        "A: 1 head, seed 1 is finished and has no seconds_of_overhead",
    ),
    "no translations": (of_trial(1, translations=None), "A: 1 head, seed 1 is finished and has no translations"),
    "a file above": (of_trial(1, translations="../references.txt"), NO_FILE_NAME),
    "the folder above": (of_trial(1, translations=".."), r"trials\.1\.translations: "),
    "a file elsewhere": (of_trial(1, translations="/etc/passwd"), NO_FILE_NAME),
    "a script for an address": (of_trial(0, mlflow_page="javascript:alert(1)"), NO_ADDRESS),
    "a label that is a list": (of_row(1, label=["A"]), r"rows\.1\.label: Input should be a valid string"),
    "half of the paper": (of_row(1, published={"bleu": 1.0}), r"rows\.1\.published\.ppl: Field required"),
}


@pytest.mark.parametrize(("edit", "reason"), EDITS.values(), ids=list(EDITS))
def test_read_sweep_names_what_an_edit_has_broken(tmp_path: Path, edit: Callable[[dict], object], reason: str):
    sweep = write_sweep(tmp_path / "sweep", [1], edit)
    path = re.escape(str(sweep / "trials.json"))
    with pytest.raises(ValueError, match=rf"^{path} is damaged \(((its content|trials\.1): )?{reason}.*: run the"):
        write_report(sweep, tmp_path, progress=False)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"rows": 7}', b"\xff", b"[" * 100_000])
def test_read_sweep_names_a_file_that_is_no_sweep(tmp_path: Path, content: bytes):
    sweep = write_sweep(tmp_path / "sweep", [1])
    (sweep / "trials.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{sweep / 'trials.json'} is damaged \(.*\): run the sweep again"):
        write_report(sweep, tmp_path, progress=False)
    (sweep / "trials.json").unlink()


def test_read_sweep_names_a_text_that_is_not_utf8(tmp_path: Path):
    sweep = write_sweep(tmp_path / "sweep", [1])
    (sweep / "A-h1.1.txt").write_bytes(b"\xff\n" * NUM_SENTENCES)
    with pytest.raises(ValueError, match=rf"^{sweep / 'A-h1.1.txt'} is not UTF-8: run the sweep again"):
        write_report(sweep, tmp_path, progress=False)


HOSTILE = {
    "<script>alert(1)</script>": (r"\<script>alert(1)\</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
    "[a](javascript:b) ![c](d)": (r"\[a\](javascript:b) !\[c\](d)", "[a](javascript:b) ![c](d)"),
    "a | b\n| c | *d* _e_": (r"a \| b \| c \| \*d\* \_e\_", "a | b | c | *d* _e_"),
    "# no heading": ("# no heading", "# no heading"),
    "`rm` d_k &lt; \\": (r"'rm' d_k \&lt; \\", "&#39;rm&#39; d_k &amp;lt; \\"),
    "$\\frac{$": ("$\\\\frac{$", "$\\frac{$"),
}


@pytest.mark.parametrize(("label", "written"), HOSTILE.items(), ids=list(HOSTILE))
def test_write_report_escapes_labels(tmp_path: Path, label: str, written: tuple[str, str]):
    def rename(sweep: dict) -> None:
        sweep["rows"][1].update(label=label, axis="grid")
        sweep["rows"][3].update(label=label, skipped=label)
        sweep["trials"] = [trial for trial in sweep["trials"] if trial["row"] != "B-dk32"]
        sweep["base_name"] = label

    md, html, sheet_file, png, _ = write_report(
        write_sweep(tmp_path / "sweep", [1], rename), tmp_path, progress=False
    )
    text, page = md.read_text(encoding="utf-8"), html.read_text(encoding="utf-8")
    escaped, in_html = written
    assert f"# Table 3: {escaped}\n" in text
    assert f"\n| {escaped} " in text
    in_list = "\\" + escaped if escaped.startswith("#") else escaped
    assert f"\n- {in_list}: skipped ({escaped}).\n" in text
    assert f'<td class="left">{in_html}</td>' in page
    assert "<script>alert" not in page
    assert png.stat().st_size
    assert sheet_file.read_text(encoding="utf-8").count("\n") == 1 + len(ROWS)


@pytest.mark.parametrize("label", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_write_report_gives_spreadsheets_no_formula(tmp_path: Path, label: str):
    write_report(write_sweep(tmp_path / "sweep", [1], of_row(1, label=label)), tmp_path, progress=False)
    row = sheet(tmp_path)["A-h1"]
    assert row["label"] == f"'{label}"
    assert float(row["bleu_difference"]) < 0  # a number stays a number


def test_main_ends_with_one_line_if_there_is_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("report: data/sweep/trials.json does not exist: run the sweep first")


COMPARISON = {"bleu": "bleu_difference", "low": "interval_low", "high": "interval_high", "p": "p_holm",
              "ppl": "ppl_difference"}  # fmt: skip
"""Metrics of a comparison in MLflow, and their columns in the CSV file."""


def test_report_sweep_logs_its_files_to_the_sweeps_run_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    logged: list = []
    compared: dict[str, tuple[dict[str, float], str]] = {}
    monkeypatch.setattr(report, "log_report", lambda *arguments: logged.append(arguments))
    monkeypatch.setattr(report, "log_comparison", lambda uri, run, *found: compared.update({run: found}))
    monkeypatch.setattr(report, "share_sweep_view", lambda *arguments: f"a view of {arguments}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://x:5000")
    report_sweep(write_sweep(tmp_path / "sweep", [1], spoil_some), tmp_path)
    [(uri, run_id, files, metrics, note)] = logged
    assert (uri, run_id) == ("http://x:5000", "parent")
    assert sorted(file.name for file in files) == [f"table3.{end}" for end in ("csv", "html", "json", "md", "png")]
    assert all(file.is_file() for file in files)
    assert (metrics["trials_finished"], metrics["trials_not_finished"]) == (3, 2)
    assert note.startswith("**Table 3: nano on grammar, 100 steps**, made by `python -m sweeps.run`\n\n| row ")
    assert "\n- Different from base: " in note
    row = sheet(tmp_path)["positions-alibi"]
    values = {name: float(row[column]) for name, column in COMPARISON.items()}
    assert compared["run positions-alibi.1"] == (values, row["verdict"])
    assert compared["run base.1"] == ({}, "base")
    printed = capsys.readouterr().out
    assert "| alibi positions |" in printed
    assert "A: 1 head (failed)" in printed
    axes = ["num_heads", "d_k", "dropout", "positions"]
    assert (
        f"a view of {('http://x:5000', 'parent', axes, ('valid_averaged_bleu', 'test_bleu', 'valid_averaged_ppl'))}"
        in printed
    )


def test_report_sweep_reports_a_sweep_that_only_another_store_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    report_sweep(write_sweep(tmp_path / "sweep", [1]), tmp_path / "reports")
    assert (tmp_path / "reports/table3.html").is_file()
    assert f"Not logged to MLflow: sqlite:///{tmp_path}/mlflow.db has no run parent" in capsys.readouterr().out


def test_headings_of_a_table_are_all_different(whole: tuple[Path, Path]):
    lines = (whole[1] / "table3.md").read_text(encoding="utf-8").splitlines()
    heads = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| row")]
    assert len(heads) == 2
    for head in heads:
        assert sorted(set(head)) == sorted(head)


def test_html_page_links_each_row_to_its_runs(whole: tuple[Path, Path]):
    page = (whole[1] / "table3.html").read_text(encoding="utf-8")
    for id, *_ in ROWS:
        for seed in SEEDS:
            assert f'<a href="http://mlflow/#/experiments/1/runs/{id}.{seed}">seed {seed}</a>' in page


DOCUMENT = """
const cell = text => ({textContent: text, classList: {contains: name => right && name === "right"},
                       ariaSort: null, querySelector: () => ({addEventListener: (_, click) => clicks.push(click)})});
const clicks = [], rows = cells.map(text => ({cells: [cell(text)]}));
const body = {rows, append: (...sorted) => body.rows = sorted};
const head = cell("head");
const document = {querySelectorAll: () => [{tBodies: [body], querySelectorAll: () => [head]}]};
SCRIPT
const column = () => body.rows.map(row => row.cells[0].textContent);
console.log(JSON.stringify([1, 2, 3].map(() => (clicks[0](), [head.ariaSort, ...column()]))));
"""
"""Script for Node: a page of one table with one column, printed after each of three clicks on its heading."""


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
@pytest.mark.parametrize(
    ("right", "cells", "first", "second"),
    [
        ("true", ["+1.5", "", "-2.0", "10,000", "<0.001"], ["10,000", "+1.5", "<0.001", "-2.0", ""],
         ["-2.0", "<0.001", "+1.5", "10,000", ""]),
        ("true", ["2.9e18", "3.1e17", "-0.9 to +2"], ["2.9e18", "3.1e17", "-0.9 to +2"],
         ["-0.9 to +2", "3.1e17", "2.9e18"]),
        ("false", ["worse", "A: 16 heads", "", "A: 4 heads"], ["A: 4 heads", "A: 16 heads", "worse", ""],
         ["worse", "A: 16 heads", "A: 4 heads", ""]),
    ],
)  # fmt: skip
def test_html_page_sorts_by_the_heading_that_is_clicked(
    right: str, cells: list[str], first: list[str], second: list[str], whole: tuple[Path, Path]
):
    page = (whole[1] / "table3.html").read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    program = f"const right = {right}, cells = {json.dumps(cells)};" + DOCUMENT.replace("SCRIPT", script)
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    (order, *once), (_, *twice), (last, *thrice) = json.loads(done.stdout)
    assert (once, twice, thrice) == (first, second, cells)
    assert (order, last) == ("descending" if right == "true" else "ascending", "none")
