"""Views of a sweep and of single runs in MLflow."""

import json
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from pipeline.common.settings import Settings
from pipeline.tracking.notes import NOTE
from pipeline.tracking.views import (
    ABOUT_RUNS,
    ABOUT_SWEEPS,
    VIEW_STATE_VERSION,
    experiment_page,
    share_runs_view,
    share_sweep_view,
    view_addresses,
)

UI = "http://127.0.0.1:5000/#/experiments/"


def written(uri: str, address: str) -> dict:
    """Return the stored state of the view at this address."""
    experiment = MlflowClient(uri).get_experiment_by_name("transformer")
    where = f"{UI}{experiment.experiment_id}/runs?viewStateShareKey="
    key = address.removeprefix(where).removesuffix("&compareRunsMode=CHART")
    return json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])


def check_sections(state: dict) -> None:
    """Check that every chart is in a section and that no section is empty."""
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections
    names = [chart["uuid"] for chart in state["compareRunCharts"]]
    assert len(set(names)) == len(names)


def test_share_sweep_view_plots_parameters_against_the_first_metric(uri: str, run_id: str) -> None:
    state = written(uri, share_sweep_view(uri, run_id, ["d_k", "dropout"], ["test_bleu", "valid_ppl"]))
    assert state["runsExpanded"] == {run_id: True}
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`test_bleu`", False)
    columns = ["metrics.`test_bleu`", "metrics.`valid_ppl`", "params.`d_k`", "params.`dropout`"]
    assert state["selectedColumns"] == columns
    lines, *bars = state["compareRunCharts"]
    assert (lines["type"], lines["selectedParams"], lines["selectedMetrics"]) == (
        "PARALLEL", ["d_k", "dropout"], ["test_bleu"]
    )  # fmt: skip
    assert [(bar["type"], bar["metricKey"]) for bar in bars] == [("BAR", "test_bleu"), ("BAR", "valid_ppl")]
    check_sections(state)


def test_share_runs_view_draws_curves_and_bars(uri: str, run_id: str) -> None:
    state = written(uri, share_runs_view(uri, run_id, ["train_loss", "valid_ppl"], ["test_bleu"]))
    assert [(chart["type"], chart["metricKey"]) for chart in state["compareRunCharts"]] == [
        ("LINE", "train_loss"), ("LINE", "valid_ppl"), ("BAR", "test_bleu")
    ]  # fmt: skip
    assert state["selectedColumns"][:2] == ["metrics.`test_bleu`", "params.`change`"]
    assert "orderByKey" not in state, "MLflow's default order is newest first"
    check_sections(state)


def test_share_view_describes_the_experiment_once(uri: str, run_id: str) -> None:
    client = MlflowClient(uri)
    experiment_id = client.get_run(run_id).info.experiment_id

    def description() -> str:
        return client.get_experiment(experiment_id).tags[NOTE]

    for _ in range(2):
        address = share_runs_view(uri, run_id, ["train_loss"], ["test_bleu"])
        assert (
            description() == f"{ABOUT_RUNS}\n\n[Compare these runs]({address.removeprefix('http://127.0.0.1:5000/')})"
        )
    client.set_experiment_tag(experiment_id, NOTE, "our own words")
    assert share_sweep_view(uri, run_id, ["d_k"], ["test_bleu"])
    assert description() == "our own words"


def test_view_addresses_are_of_all_experiments_with_a_view(
    uri: str, root: Path, settings: Settings, run_id: str
) -> None:
    assert view_addresses(uri) == {}
    single = share_runs_view(uri, run_id, ["train_loss"], ["test_bleu"])
    MlflowClient(uri).create_experiment("no view")
    other = MlflowClient(uri).create_experiment("table3")
    trial = MlflowClient(uri).create_run(other).info.run_id
    sweep = share_sweep_view(uri, trial, ["d_k"], ["test_bleu"])
    assert MlflowClient(uri).get_experiment(other).tags[NOTE].startswith(ABOUT_SWEEPS)
    assert list(view_addresses(uri).items()) == [("transformer", single), ("table3", sweep)]
    assert experiment_page(uri, trial) == f"{UI}{other}"


def test_share_view_is_written_for_the_mlflow_that_is_installed() -> None:
    """After an upgrade, check the views in `make ui`, correct their states, then set VIEW_STATE_VERSION."""
    assert mlflow.__version__.startswith(f"{VIEW_STATE_VERSION}.")


def test_share_view_in_another_mlflow_is_none_and_writes_nothing(
    uri: str, run_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlflow, "__version__", "3.18.0")
    assert share_sweep_view(uri, run_id, ["d_k"], ["test_bleu"]) is None
    assert MlflowClient(uri).get_experiment_by_name("transformer").tags == {}
    assert "views.py supports only 3.17" in caplog.text


def test_share_view_of_a_run_that_is_gone_is_none(uri: str, tmp_path: Path) -> None:
    assert share_sweep_view(uri, "nobody", ["d_k"], ["test_bleu"]) is None
    (tmp_path / "broken.db").write_text("no database" * 1000)
    assert share_sweep_view(f"sqlite:///{tmp_path / 'broken.db'}", "nobody", ["d_k"], ["test_bleu"]) is None
