"""MLflow's own record of a machine during training: use of processors, memory, disks, network, GPUs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipeline.tracking.store import address


@contextmanager
def system_metrics(uri: str, run_id: str, node: str | None = None) -> Iterator[None]:
    """Log them to the run while the block runs, a point every 10 s; below system/, on several nodes system/`node`/.

    Points go on where a run was interrupted. GPUs are among them where the package nvidia-ml-py is installed. A store
    that is away ends the record, not the block.
    """
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, node_id=node, tracking_uri=address(uri))
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
