"""A ready-made view of a sweep on MLflow's page.

MLflow has no public way to make one: this writes the state that the page itself keeps in a tag of the experiment. It
was written for the MLflow of VIEW_STATE_VERSION; with another there is no view, and nothing else is missing.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from pipeline.tracking.store import await_server, connect, require_run, without_password

logger = logging.getLogger(__name__)

VIEW_STATE_VERSION = "3.17"
"""The MLflow whose page reads what `_view_state` writes."""
VIEW_NAME = "rows"
LOCAL_UI = "http://127.0.0.1:5000"
"""Where `make ui` serves."""


def share_view(uri: str, run_id: str, parameters: Sequence[str], metrics: Sequence[str]) -> str | None:
    """Give the experiment of `run_id` a view of the children of that run; returns its address, None if it has none.

    It shows them sorted by the first of `metrics`, with these columns, and as parallel coordinates of `parameters`
    against that metric. Raises nothing: with another MLflow, or if the store refuses, a warning is logged.
    """
    if not mlflow.__version__.startswith(f"{VIEW_STATE_VERSION}."):
        logger.warning("No view in MLflow %s: views.py was written for %s.", mlflow.__version__, VIEW_STATE_VERSION)
        return None
    try:
        await_server(uri, patience_s=10)
        client = connect(uri)
        experiment_id = require_run(client, run_id).info.experiment_id
        state = json.dumps(_view_state(run_id, parameters, metrics))
        client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{VIEW_NAME}", state)
    except (MlflowException, OSError, ValueError) as error:
        logger.warning("No view in MLflow: %s", error)
        return None
    return f"{_page(uri, experiment_id)}/runs?viewStateShareKey={VIEW_NAME}&compareRunsMode=CHART"


def experiment_page(uri: str, run_id: str) -> str:
    """The address of the run's experiment on MLflow's page; that of the run is below it, at /runs/<id>."""
    return _page(uri, require_run(connect(uri), run_id).info.experiment_id)


def _page(uri: str, experiment_id: str) -> str:
    server = without_password(uri).rstrip("/") if uri.startswith("http") else LOCAL_UI
    return f"{server}/#/experiments/{experiment_id}"


def _view_state(run_id: str, parameters: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """What the page's button "Share view" writes: of the page's state, only what differs from its start."""
    common: dict[str, Any] = {"isGenerated": False, "deleted": False, "runsCountToCompare": 100}
    lines = {"selectedParams": [*parameters], "selectedMetrics": [metrics[0]], "showAllRuns": True}
    charts = [
        common | {"uuid": f"{VIEW_NAME}-lines", "type": "PARALLEL", "metricSectionId": "lines"} | lines,
        *(
            common | {"uuid": f"{VIEW_NAME}-{name}", "type": "BAR", "metricSectionId": "bars", "metricKey": name}
            for name in metrics
        ),
    ]
    section = {"display": True, "isReordered": False, "cardHeight": 420}
    return {
        "runsExpanded": {run_id: True},
        "runsHiddenMode": "SHOWALL",
        "selectedColumns": [*(f"metrics.`{name}`" for name in metrics), *(f"params.`{name}`" for name in parameters)],
        "orderByKey": f"metrics.`{metrics[0]}`",
        "orderByAsc": False,
        "compareRunCharts": charts,
        "compareRunSections": [
            section | {"uuid": "lines", "name": "What was changed", "columns": 1},
            section | {"uuid": "bars", "name": "What came of it", "columns": 2},
        ],
        "isAccordionReordered": True,  # the sections in this order
    }
