"""Training in the calling process. With Ray's workers: tests/system."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.cluster.training_run import training_run
from pipeline.data.workspace import Workspace
from pipeline.training.run import TrainResult
from tests.factories import settings, write_corpus

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray warns about its own settings
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    write_corpus(tmp_path / "data/encoded")
    return Workspace(tmp_path, tmp_path, None, f"sqlite:///{tmp_path}/mlflow.db")


def train(workspace: Workspace, **options: Any) -> AbstractContextManager[TrainResult]:
    alone = settings(hardware={"num_workers": 1, "device": "cpu", "cpus_per_worker": 1})
    folder = workspace.storage / "checkpoints/run"
    return training_run(alone, workspace, "key", folder, None, in_process=True, show=False, **options)


def only_run(workspace: Workspace) -> Run:
    client = MlflowClient(workspace.tracking_uri)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return run


def test_training_run_in_process_trains_to_the_end_without_ray(workspace):
    validated = []
    with train(workspace, on_validation=validated.append) as run:
        assert not ray.is_initialized()
        assert (run.state.finished, run.state.step) == (True, 9)
    assert [metrics["step"] for metrics in validated] == [4, 8, 9]
    found = only_run(workspace)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["valid_loss"] == validated[-1]["valid_loss"]
    assert [found.data.tags[name] for name in ("run.workers", "device", "run.nodes")] == ["1", "cpu", "1"]


def test_training_run_in_process_leaves_the_process_as_it_was(workspace, monkeypatch, own_threads):
    for name, value in TORCHRUN.items() | {("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")}:
        monkeypatch.setenv(name, value)
    torch.set_num_threads(3)
    before = dict(os.environ)
    groups, threads = [], []

    def look(metrics: dict[str, float]) -> None:
        groups.append(dist.is_initialized())
        threads.append(torch.get_num_threads())

    with train(workspace, on_validation=look):
        pass
    assert (groups, threads) == ([False] * 3, [1] * 3)
    assert torch.get_num_threads() == 3
    assert {name: os.environ.get(name) for name in before} == before


def test_training_run_in_process_interrupted_is_killed_in_mlflow_and_resumes(workspace):
    def interrupt(metrics: dict[str, float]) -> None:
        if metrics["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), train(workspace, on_validation=interrupt):
        pass
    assert only_run(workspace).info.status == "KILLED"
    taken = []
    with train(workspace, on_validation=lambda metrics: taken.append(metrics["step"])) as run:
        assert run.state.step == 9
    assert taken == [4, 8, 9]  # 4 is reported again, from the checkpoint
    assert only_run(workspace).info.status == "FINISHED"
