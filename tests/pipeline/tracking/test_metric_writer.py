"""Curves in real stores: an SQLite file, and a server that is stopped and restarted."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.common.settings import Settings
from pipeline.tracking.metric_writer import MetricWriter
from pipeline.tracking.runs import finish_run, open_run
from tests.support.stores import free_port, mlflow_server


def curve(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(run_id, key)]


def test_metric_writer_delivers_curves_whole_and_in_order(uri: str, run_id: str) -> None:
    writer = MetricWriter(uri, run_id)
    for step in range(1, 1501):  # more than MLflow accepts in one call
        writer.log({"train_loss": 1 / step, "learning_rate": step}, step)
    writer.log({"train_loss": float("nan")}, 1501)
    assert writer.close()
    points = curve(uri, run_id, "train_loss")
    assert points[:-1] == [(step, 1 / step) for step in range(1, 1501)]
    assert curve(uri, run_id, "learning_rate")[-1] == (1500, 1500)
    assert len(points) == 1501


def test_metric_writer_drops_steps_taken_again_after_a_resume(uri: str, run_id: str) -> None:
    for first, last in ((1, 55), (51, 90)):  # killed at 55, resumed from the checkpoint at 50
        writer = MetricWriter(uri, run_id)
        for step in range(first, last + 1):
            writer.log({"train_loss": step}, step)
            if step % 10 == 0:
                writer.log({"valid_loss": step}, step)
        assert writer.close()
    assert curve(uri, run_id, "train_loss") == [(step, step) for step in range(1, 91)]
    assert curve(uri, run_id, "valid_loss") == [(step, step) for step in range(10, 91, 10)]


def test_metric_writer_does_not_double_a_point_after_a_lost_answer(
    uri: str, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch, calls = MlflowClient.log_batch, []

    def lose_the_first_answer(*arguments: object, **named: object) -> None:
        log_batch(*arguments, **named)
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionResetError

    monkeypatch.setattr(MlflowClient, "log_batch", lose_the_first_answer)
    writer = MetricWriter(uri, run_id)
    writer.log({"train_loss": 3.0}, 1)
    writer.log({"train_loss": 2.0}, 2)
    assert writer.close()
    assert len(calls) == 2
    assert curve(uri, run_id, "train_loss") == [(1, 3.0), (2, 2.0)]


def test_metric_writer_does_not_double_points_that_a_slow_server_held_over_a_kill(
    uri: str, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server writes the killed worker's points after its successor has read which points there are."""
    log_batch, held = MlflowClient.log_batch, []
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *arguments, **named: held.append((arguments, named)))
        killed = MetricWriter(uri, run_id)
        for step in range(1, 56):
            killed.log({"train_loss": 1 / step}, step)
        assert killed.close()
    assert curve(uri, run_id, "train_loss") == []
    time.sleep(0.01)

    successor = MetricWriter(uri, run_id)  # logs the checkpoint's curve and repeats the steps after it
    successor.log({"train_loss": 1}, 1)
    successor._deliver()
    for arguments, named in held:
        log_batch(*arguments, **named)
    for step in range(2, 91):
        successor.log({"train_loss": 1 / step}, step)
    assert successor.close()
    assert curve(uri, run_id, "train_loss") == [(step, 1 / step) for step in range(1, 91)]


def test_metric_writer_warns_once_of_a_deleted_run(
    uri: str, run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MlflowClient(uri).delete_run(run_id)
    writer = MetricWriter(uri, run_id)
    writer.log({"train_loss": 1}, 1)
    assert not writer.close()
    refused, left = (record.message for record in caplog.records)
    assert refused.startswith(f"MLflow rejects the metrics of run {run_id}: ")
    assert left == f"MLflow run {run_id} is missing 1 points."


class Server:
    """`mlflow server` with a store, always on the same port of this machine."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.running = ExitStack()

    def start(self) -> None:
        database, artifacts = f"sqlite:///{self.root / 'mlflow.db'}", str(self.root / "served")
        self.running.enter_context(mlflow_server(database, artifacts, {}, self.port))

    def stop(self) -> None:
        self.running.close()


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    server = Server(root)
    server.start()
    yield server
    server.stop()


def test_metric_writer_survives_an_outage_with_every_point_once(
    server: Server, root: Path, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = open_run(server.uri, settings, "key", {}, root)
    writer = MetricWriter(server.uri, run_id)
    seconds: list[float] = []

    def ours() -> list[str]:
        return [record.message for record in caplog.records if record.name == "pipeline.tracking.metric_writer"]

    def train(first: int, last: int) -> None:
        for step in range(first, last + 1):
            began = time.perf_counter()
            writer.log({"train_loss": step, "tokens_per_s": 2 * step}, step)
            seconds.append(time.perf_counter() - began)
            time.sleep(0.01)

    train(1, 150)
    server.stop()
    train(151, 450)
    while not ours():
        time.sleep(0.1)
    server.start()
    train(451, 500)
    assert writer.close(timeout_s=30)

    assert curve(server.uri, run_id, "train_loss") == [(step, step) for step in range(1, 501)]
    assert curve(server.uri, run_id, "tokens_per_s") == [(step, 2 * step) for step in range(1, 501)]
    assert sorted(seconds)[int(0.99 * len(seconds))] < 0.01
    assert max(seconds) < 1  # a busy machine may delay single calls; a server that is down must not
    away, back = ours()
    assert "is unreachable" in away
    assert "is reachable again" in back

    finish_run(server.uri, run_id)
    assert MlflowClient(server.uri).get_run(run_id).info.status == "FINISHED"
