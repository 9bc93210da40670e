"""MLflow's system metrics."""

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking.system_metrics import system_metrics


def steps(uri: str, run_id: str, key: str) -> list[int]:
    return sorted(point.step for point in MlflowClient(uri).get_metric_history(run_id, key))


def test_system_metrics_are_logged_below_their_node_and_go_on_after_an_interruption(
    uri: str, root: Path, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    key = "system/node_1/cpu_utilization_percentage"
    with system_metrics(uri, run_id, "node_1"):
        time.sleep(1.5)
    first = steps(uri, run_id, key)
    assert first == list(range(len(first)))
    assert first
    with system_metrics(uri, run_id, "node_1"):
        time.sleep(1.5)
    both = steps(uri, run_id, key)
    assert both == list(range(len(both)))
    assert len(both) > len(first)
    assert "system/cpu_utilization_percentage" not in MlflowClient(uri).get_run(run_id).data.metrics
