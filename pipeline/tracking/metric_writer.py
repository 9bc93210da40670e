"""Curves from inside training to MLflow, whatever becomes of the server."""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from pipeline.common.environment import without_passwords
from pipeline.tracking.store import connect, server_answers

logger = logging.getLogger(__name__)

MAX_METRICS_PER_CALL = 1000
"""MLflow's own limit."""
REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"}
"""Answers that trying again will not change: a run that was deleted, a metric's name that MLflow forbids."""


class MetricWriter:
    """Logs curves from inside training: `log` returns at once and never fails, whatever becomes of the server.

    A thread delivers the points in order, again and again until MLflow has them. A point at or before the last
    step that MLflow has of a metric is dropped: it comes from steps that are taken a second time after a resume.
    A point that reaches MLflow twice is recognised there by its time and value: because an answer got lost, or a slow
    server wrote what a killed worker had sent after its successor had asked for the last steps. So the time is no
    time, but the run's start and a millisecond for each step.

    What a killed process had still to deliver is in its last checkpoint, or is computed again from there: a worker
    that resumes logs the checkpoint's curves first. Nothing bounds the queue, as a day's points are a few megabytes.

    Not MLflow's asynchronous logging (`synchronous=False`): that does not drop the points of steps that a resumed run
    takes again, and gives a batch up when the server is away for longer than the client's own few retries.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri, self._run_id = uri, run_id
        self._points: deque[dict[str, Any]] = deque()
        self._last_steps: dict[str, int] | None = None
        self._start_ms = 0
        self._away = self._refused = False
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Steps must grow from call to call, for each metric by itself."""
        self._points.append({"step": step, "metrics": {key: float(value) for key, value in metrics.items()}})

    def close(self, timeout_s: float = 60) -> bool:
        """Deliver what waits; False if that did not succeed in time."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s + 1)
        if self._points:
            logger.warning("MLflow run %s lacks %d points.", self._run_id, len(self._points))
        return not self._points

    def _run(self) -> None:
        pause_s = 1.0  # so that a fast loop's points share calls
        while not self._refused:
            closing = self._closing.wait(pause_s)
            delivered = self._deliver()
            if closing and (delivered or time.monotonic() > self._deadline):
                return
            pause_s = 1.0 if delivered else min(2 * pause_s, 10.0)
            if closing:
                time.sleep(0.5)

    def _deliver(self) -> bool:
        """Deliver the queue; whether that succeeded."""
        try:
            if self._points and not server_answers(self._uri):
                raise ConnectionError("no answer")
            client = connect(self._uri)
            if self._last_steps is None:
                run = client.get_run(self._run_id)
                self._start_ms, self._last_steps = run.info.start_time, _last_steps(run)
            waiting = len(self._points)  # what comes meanwhile shares the next call
            while waiting > 0:
                waiting -= self._deliver_batch(client, self._last_steps)
        except Exception as error:  # a thread has nobody to raise to
            if isinstance(error, MlflowException) and error.error_code in REFUSALS:
                self._refused = True
                logger.warning("MLflow refuses the metrics of run %s: %s", self._run_id, error)
            elif not self._away:
                self._away = True
                logger.warning("MLflow at %s is away (%s); training goes on.", without_passwords(self._uri), error)
            return False
        if self._away:
            self._away = False
            logger.warning("MLflow at %s is back; it has all points.", without_passwords(self._uri))
        return True

    def _deliver_batch(self, client: MlflowClient, last_steps: dict[str, int]) -> int:
        """Deliver as many points as one call takes; returns how many left the queue."""
        batch: list[Metric] = []
        reached = dict(last_steps)
        num_points = 0
        for point in list(self._points):
            if batch and len(batch) + len(point["metrics"]) > MAX_METRICS_PER_CALL:
                break
            num_points += 1
            for key, value in point["metrics"].items():
                if point["step"] > reached.get(key, -1):
                    batch.append(Metric(key, value, self._start_ms + point["step"], point["step"]))
                    reached[key] = point["step"]
        if batch:
            client.log_batch(self._run_id, metrics=batch)
        last_steps.update(reached)
        for _ in range(num_points):
            self._points.popleft()
        return num_points


def _last_steps(run: Run) -> dict[str, int]:
    # `data.metrics` has values alone, and a metric's history takes a second for 10,000 points.
    return {metric.key: metric.step for metric in run.data.to_proto().metrics}
