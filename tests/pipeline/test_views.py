"""The command that prints the addresses of the views in MLflow."""

import sys
from pathlib import Path

import pytest

from pipeline import views
from pipeline.common.settings import load_settings
from pipeline.common.storage import tracking_uri
from pipeline.tracking.runs import open_run
from pipeline.tracking.views import share_runs_view

REPOSITORY = Path(__file__).parents[2]


def test_main_prints_a_line_for_each_experiment_with_a_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "argv", ["views"])
    views.main()
    assert "there is no run yet" in capsys.readouterr().out
    uri = tracking_uri(Path())
    run_id = open_run(uri, load_settings(REPOSITORY), "key", {}, tmp_path)
    address = share_runs_view(uri, run_id, ["train_loss"], ["test_bleu"])
    views.main()
    assert capsys.readouterr().out == f"transformer: {address}\n"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("pipeline.tracking.views.await_server", refuse)
    with pytest.raises(SystemExit):
        views.main()
    assert capsys.readouterr().err == "views: no answer\n"


def refuse(uri: str, patience_s: float) -> None:
    raise ConnectionError("no answer")
