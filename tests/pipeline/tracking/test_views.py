"""The view of a sweep on MLflow's page."""

import json
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from pipeline.tracking.views import VIEW_STATE_VERSION, share_view


def test_share_view_plots_parameters_against_the_first_metric(uri: str, run_id: str) -> None:
    address = share_view(uri, run_id, ["d_k", "dropout"], ["test_bleu", "valid_ppl"])
    experiment = MlflowClient(uri).get_experiment_by_name("transformer")
    where = f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs"
    key = address.removeprefix(f"{where}?viewStateShareKey=").removesuffix("&compareRunsMode=CHART")
    state = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
    assert state["runsExpanded"] == {run_id: True}
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`test_bleu`", False)
    columns = ["metrics.`test_bleu`", "metrics.`valid_ppl`", "params.`d_k`", "params.`dropout`"]
    assert state["selectedColumns"] == columns
    lines, *bars = state["compareRunCharts"]
    assert (lines["selectedParams"], lines["selectedMetrics"]) == (["d_k", "dropout"], ["test_bleu"])
    assert [bar["metricKey"] for bar in bars] == ["test_bleu", "valid_ppl"]
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections


def test_share_view_is_written_for_the_mlflow_that_is_installed() -> None:
    """After an upgrade: look at the view in `make ui`, mend `_view_state`, then set the version."""
    assert mlflow.__version__.startswith(f"{VIEW_STATE_VERSION}.")


def test_share_view_in_another_mlflow_is_none_and_writes_nothing(
    uri: str, run_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlflow, "__version__", "3.18.0")
    assert share_view(uri, run_id, ["d_k"], ["test_bleu"]) is None
    assert MlflowClient(uri).get_experiment_by_name("transformer").tags == {}
    assert "views.py was written for 3.17" in caplog.text


def test_share_view_of_a_run_that_is_gone_is_none(uri: str, tmp_path: Path) -> None:
    assert share_view(uri, "nobody", ["d_k"], ["test_bleu"]) is None
    (tmp_path / "broken.db").write_text("no database" * 1000)
    assert share_view(f"sqlite:///{tmp_path / 'broken.db'}", "nobody", ["d_k"], ["test_bleu"]) is None
