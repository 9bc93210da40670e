"""MLflow's system metrics of a machine during training: use of CPUs, memory, disks, network and GPUs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipeline.tracking.store import address


@contextmanager
def system_metrics(uri: str, run_id: str, node: str | None = None) -> Iterator[None]:
    """Log system metrics to the run during the block, every 10 s, as system/... or, with `node`, system/`node`/...

    After an interruption, the curves continue. GPUs are included if the package nvidia-ml-py is installed. If the
    store becomes unreachable, the logging ends, but the block continues.
    """
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, node_id=node, tracking_uri=address(uri))
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
