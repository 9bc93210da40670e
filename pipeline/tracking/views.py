"""Prepared views on MLflow's page, for a sweep and for single runs.

MLflow has no public API for views. This module writes the state of the page into the tag of the experiment that the
page itself uses. It works with the MLflow version VIEW_STATE_VERSION. With another version there are no views, and
everything else works.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.common.environment import without_passwords
from pipeline.tracking.notes import NOTE
from pipeline.tracking.store import await_server, connect, require_run

logger = logging.getLogger(__name__)

VIEW_STATE_VERSION = "3.17"
"""The version of MLflow whose page reads `_sweep_state` and `_runs_state`."""
SWEEP_VIEW, RUNS_VIEW = "rows", "runs"
LOCAL_UI = "http://127.0.0.1:5000"
"""The address of `make ui`."""
ABOUT_SWEEPS = (
    "Sweeps over rows of Table 3, by `python -m sweeps.run`. Each sweep is a parent run with the results table in "
    "its description. Its child runs are the trials: one row with one seed each."
)
ABOUT_RUNS = (
    "Training runs, by `dvc repro` or `python -m pipeline.train`. The name of a run shows the presets, the settings "
    "that differ from them, and the seed. Child runs evaluate the same weights with other search settings."
)


def share_sweep_view(uri: str, run_id: str, parameters: Sequence[str], metrics: Sequence[str]) -> str | None:
    """Add a view of the children of run `run_id` to its experiment. Returns the view's address, or None.

    The view shows `metrics` and `parameters` as columns, sorted by the first metric, and a chart of parallel
    coordinates of `parameters` against that metric. Never raises: with another version of MLflow, or if the store
    refuses, it logs a warning and returns None.
    """
    return _share(uri, run_id, SWEEP_VIEW, _sweep_state(run_id, parameters, metrics), ABOUT_SWEEPS)


def share_runs_view(uri: str, run_id: str, curves: Sequence[str], metrics: Sequence[str]) -> str | None:
    """Add a view of all runs to the experiment of `run_id`: newest first, with `metrics` as columns and bars, and
    `curves` as charts. Returns the address or None, as `share_sweep_view`."""
    return _share(uri, run_id, RUNS_VIEW, _runs_state(curves, metrics), ABOUT_RUNS)


def view_addresses(uri: str) -> dict[str, str]:
    """The views in the store, {experiment: address}. Raises ConnectionError if the store cannot be opened."""
    await_server(uri, patience_s=10)
    return {
        experiment.name: f"{_page(uri, experiment.experiment_id)}{_view(name)}"
        for experiment in connect(uri).search_experiments(order_by=["creation_time"])
        for name in (RUNS_VIEW, SWEEP_VIEW)
        if _tag(name) in experiment.tags
    }


def experiment_page(uri: str, run_id: str) -> str:
    """The address of the run's experiment on MLflow's page. The run's address is this plus /runs/<id>."""
    return _page(uri, require_run(connect(uri), run_id).info.experiment_id)


def _share(uri: str, run_id: str, name: str, state: dict[str, Any], about: str) -> str | None:
    """Write the view, and a link to it in the experiment's description, unless a user has changed the description."""
    if not mlflow.__version__.startswith(f"{VIEW_STATE_VERSION}."):
        logger.warning("No view in MLflow %s: views.py supports only %s.", mlflow.__version__, VIEW_STATE_VERSION)
        return None
    try:
        await_server(uri, patience_s=10)
        client = connect(uri)
        experiment_id = require_run(client, run_id).info.experiment_id
        client.set_experiment_tag(experiment_id, _tag(name), json.dumps(state))
        _describe(client, experiment_id, about, name)
    except (MlflowException, OSError, ValueError) as error:
        logger.warning("No view in MLflow: %s", error)
        return None
    return f"{_page(uri, experiment_id)}{_view(name)}"


def _describe(client: MlflowClient, experiment_id: str, about: str, name: str) -> None:
    note = f"{about}\n\n[Compare these runs](#/experiments/{experiment_id}{_view(name)})"
    found = client.get_experiment(experiment_id).tags.get(NOTE, about)
    if found.startswith(about) and found != note:
        client.set_experiment_tag(experiment_id, NOTE, note)


def _tag(name: str) -> str:
    return f"mlflow.sharedViewState.{name}"


def _view(name: str) -> str:
    return f"/runs?viewStateShareKey={name}&compareRunsMode=CHART"


def _page(uri: str, experiment_id: str) -> str:
    server = without_passwords(uri).rstrip("/") if uri.startswith("http") else LOCAL_UI
    return f"{server}/#/experiments/{experiment_id}"


# The state that the page's button "Share view" writes. Only what differs from the initial state is needed.


def _sweep_state(run_id: str, parameters: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    lines = {"selectedParams": [*parameters], "selectedMetrics": [metrics[0]], "showAllRuns": True}
    return {
        "runsExpanded": {run_id: True},
        "selectedColumns": [*(f"metrics.`{name}`" for name in metrics), *(f"params.`{name}`" for name in parameters)],
        "orderByKey": f"metrics.`{metrics[0]}`",
        "orderByAsc": False,
        **_charts({"Changes": [{"type": "PARALLEL"} | lines], "Results": _bars(metrics)}),
    }


def _runs_state(curves: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    lines = [{"type": "LINE", "metricKey": name, "selectedMetricKeys": [name]} | LINE for name in curves]
    columns = [*(f"metrics.`{name}`" for name in metrics), "params.`change`", "params.`seed`", "params.`max_steps`"]
    return {"selectedColumns": columns, **_charts({"Training": lines, "Results": _bars(metrics)})}


LINE = {
    "lineSmoothness": 0,
    "xAxisKey": "step",
    "xAxisScaleType": "linear",
    "scaleType": "linear",
    "range": {},
    "selectedXAxisMetricKey": "",
    "yAxisKey": "metric",
    "yAxisExpressions": [],
    "ignoreOutliers": False,
    "useGlobalXaxisKey": True,
    "useGlobalLineSmoothing": True,
}
"""A line chart in its default state."""


def _bars(metrics: Sequence[str]) -> list[dict[str, Any]]:
    return [{"type": "BAR", "metricKey": name} for name in metrics]


def _charts(sections: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The page's state for {section: charts}, in this order. A section with one chart has one column."""
    common: dict[str, Any] = {"isGenerated": False, "deleted": False, "runsCountToCompare": 100}
    shown = {"display": True, "isReordered": False, "cardHeight": 420}
    return {
        "runsHiddenMode": "SHOWALL",
        "compareRunCharts": [
            common | {"uuid": f"{section} {number}", "metricSectionId": section} | chart
            for section, charts in sections.items()
            for number, chart in enumerate(charts)
        ],
        "compareRunSections": [
            shown | {"uuid": section, "name": section, "columns": min(2, len(charts))}
            for section, charts in sections.items()
        ],
        "isAccordionReordered": True,
    }
