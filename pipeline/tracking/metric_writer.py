"""Log curves from inside training to MLflow, also when the server is unreachable for a while."""

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
"""MLflow's limit."""
REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"}
"""Errors that a retry cannot fix, such as a deleted run or an invalid metric name."""


class MetricWriter:
    """Logs curves from inside training. `log` returns at once and never raises, even if the server is unreachable.

    A thread sends the points in order and retries until MLflow has them. Each metric has one point per step:

    - Steps repeated after a resume: a point is dropped if MLflow already has this or a later step of the metric.
    - Points sent twice: MLflow ignores a point with the same timestamp and value. Therefore the timestamp is not the
      time, but the start of the run plus one millisecond per step. A point is sent twice when a response was lost, or
      when a slow server wrote the points of a killed worker after the next worker had read the last steps.

    The points that a killed process had not sent are in its last checkpoint or are computed again after it: a worker
    that resumes first logs the checkpoint's curves. The queue has no limit, since a day's points take a few
    megabytes.

    Why not MLflow's asynchronous logging (`synchronous=False`): it does not drop the points of repeated steps, and it
    discards a batch when the server is unreachable for longer than the client's few retries.
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
        """Add a point. The steps of each metric must increase from call to call."""
        self._points.append({"step": step, "metrics": {key: float(value) for key, value in metrics.items()}})

    def close(self, timeout_s: float = 60) -> bool:
        """Send the remaining points and stop the thread. Returns False if points are left after `timeout_s`."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s + 1)
        if self._points:
            logger.warning("MLflow run %s is missing %d points.", self._run_id, len(self._points))
        return not self._points

    def _run(self) -> None:
        pause_s = 1.0  # so that several points share a call
        while not self._refused:
            closing = self._closing.wait(pause_s)
            delivered = self._deliver()
            if closing and (delivered or time.monotonic() > self._deadline):
                return
            pause_s = 1.0 if delivered else min(2 * pause_s, 10.0)
            if closing:
                time.sleep(0.5)

    def _deliver(self) -> bool:
        """Send the queue. Returns whether that succeeded."""
        try:
            if self._points and not server_answers(self._uri):
                raise ConnectionError("no answer")
            client = connect(self._uri)
            if self._last_steps is None:
                run = client.get_run(self._run_id)
                self._start_ms, self._last_steps = run.info.start_time, _last_steps(run)
            waiting = len(self._points)  # points added in the meantime wait for the next call
            while waiting > 0:
                waiting -= self._deliver_batch(client, self._last_steps)
        except Exception as error:  # an exception in a thread has no caller
            if isinstance(error, MlflowException) and error.error_code in REFUSALS:
                self._refused = True
                logger.warning("MLflow rejects the metrics of run %s: %s", self._run_id, error)
            elif not self._away:
                self._away = True
                shown = without_passwords(self._uri)
                logger.warning("MLflow at %s is unreachable (%s); training continues.", shown, error)
            return False
        if self._away:
            self._away = False
            logger.warning("MLflow at %s is reachable again and has all points.", without_passwords(self._uri))
        return True

    def _deliver_batch(self, client: MlflowClient, last_steps: dict[str, int]) -> int:
        """Send as many points as one call allows. Returns the number of points removed from the queue."""
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
    # `data.metrics` has no steps, and reading a metric's history takes a second for 10,000 points.
    return {metric.key: metric.step for metric in run.data.to_proto().metrics}
