"""Run rows of Table 3, each with every seed, with Ray Tune and Ray Train.

    python -m sweeps.run

Rows and seeds are set in params.yaml (sweep).

Reads data/encoded, data/tokenizer and data/clean; writes data/sweep, from which
`python -m sweeps.report` makes the table.

A trial does what the train stage and the evaluate stage do. On this machine,
with one worker per trial, both run in one of Tune's processes, which is then
reused for the next trial. A trial's result is kept in the folder of its
training run; a change of settings, data or code gives a new result. So the same
command continues after `kill -9`: finished trials are kept, others continue
from their checkpoints, failed ones are tried again, and new rows and seeds are
run. With RAY_ADDRESS set, or inside `ray job submit`, it uses that cluster.
"""

import io
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.exceptions
import ray.train
import ray.tune
import torch
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.cluster.accounting import has_begun_since, total_usage
from pipeline.cluster.preflight import preflight
from pipeline.cluster.progress import PROGRESS_FILE, PROGRESS_INTERVAL_S, SHARE, show_bar, steps_done, trials_text
from pipeline.cluster.ray_cluster import needs_no_workers, ray_cluster
from pipeline.cluster.resources import capacity, node_resources, share_of_each_worker, this_node_resource
from pipeline.cluster.training_run import TrainingError, training_run
from pipeline.common import cli
from pipeline.common.atomic_io import replace_folder, write_json, write_text
from pipeline.common.environment import TRACKING_URI_ENV, TUNE, environment, without_passwords
from pipeline.common.paths import CHECKPOINTS, CLEAN, SWEEP
from pipeline.common.periodic import interval_of
from pipeline.common.settings import Settings, flatten, load_settings
from pipeline.common.storage import as_os_error, copy_files, local_copy, remove, tracking_uri
from pipeline.data.workspace import Workspace, open_workspace
from pipeline.inference.evaluation import evaluate_run
from pipeline.inference.reports import VALID_TRANSLATIONS
from pipeline.tracking.names import setup_name
from pipeline.tracking.notes import NOTE
from pipeline.tracking.provenance import git_tags
from pipeline.tracking.results import log_report
from pipeline.tracking.runs import end_children, end_run_of, finish_run, open_run, reconcile, run_guard
from pipeline.tracking.views import experiment_page
from pipeline.training import checkpoint
from pipeline.training.run import log, write_model
from pipeline.training.siblings import continue_sibling
from sweeps.cost import flops_per_step, is_done, measured_rate, render_plan, this_machine
from sweeps.table3 import BLEU
from sweeps.trials import SweepPlan, Trial, load_sweep

REDUCTION = 4  # ASHA: of the trials that reach a rung, one in four continues
LOOK_INTERVAL_S = 1.0


def run_sweep(root: Path) -> None:
    """The stage. Raises ValueError or OSError with a one-line message for errors that a user can fix."""
    workspace = open_workspace(load_settings(root), root)
    sweep = load_sweep(root)
    to_run = [trial for trial in sweep.trials if not is_done(trial)]
    uri = workspace.tracking_uri
    experiment = sweep.base.tracking.experiment
    title = f"Table 3: {setup_name(sweep.base)}"
    asha = sweep.base.sweep.scheduler == "asha"
    with_workers = not all(needs_no_workers(trial.settings.hardware) for trial in to_run)
    cluster = ray_cluster(sweep.base.hardware, root, dashboard=asha and with_workers) if to_run else nullcontext()
    with environment({}, TUNE), cluster:
        if to_run:
            preflight(sweep.base.hardware, workspace)
        reconcile(uri, experiment)  # runs of killed sweeps with another base, data or code
        signs = [sign for trial in to_run if (sign := total_usage(trial.folder).last_sign_at)]
        tags = {
            "mlflow.runName": title,
            "mlflow.source.name": "python -m sweeps.run",
            NOTE: f"**{title}**, made by `python -m sweeps.run`; `python -m sweeps.report` adds its table here.",
            "row": "all",
        }
        folder = workspace.storage / CHECKPOINTS.name
        parent = open_run(uri, sweep.base, sweep.run_key, tags, root, folder, max(signs, default=None))
        with run_guard(uri, parent):
            end_children(uri, experiment, parent)  # left over from a killed driver
            if to_run:
                _run_trials(sweep, to_run, workspace, parent)
            records = [record for trial in sweep.trials if (record := trial.record())]
            if all(record["status"] == "failed" for record in records):
                why = records[0]["error"] if records else "sweep.rows contains no row that can be run"
                raise ValueError(f"no trial has produced a result: {why}")
            _write_results(sweep, root, parent)
        finish_run(uri, parent)


def _run_trials(sweep: SweepPlan, to_run: list[Trial], workspace: Workspace, parent: str) -> None:
    """Print the plan and run the trials, as many at once as fit on the devices.

    Raises ValueError if a trial does not fit, or if some rows would run on GPUs and others on CPUs.
    """
    slots = {resources: _num_concurrent(resources) for resources in {_resources_of(trial) for trial in to_run}}
    if len({resources.use_gpu for resources in slots}) > 1:
        raise ValueError(
            "some rows would run on GPUs and others on CPUs because there are not enough GPUs: "
            "set hardware.device to gpu or cpu, or lower sweep.num_workers"
        )
    root, uri = workspace.root, workspace.tracking_uri
    devices = max(number * resources.num_devices for resources, number in slots.items())
    gpu = any(resources.use_gpu for resources in slots)
    plan = render_plan(sweep, root, devices, gpu, measure=partial(_measure, workspace))
    print(plan, flush=True)
    write_text(root / CHECKPOINTS / "plan.md", plan + "\n")
    log_report(uri, parent, [root / CHECKPOINTS / "plan.md"], {})
    try:
        with _show_progress(sweep.trials):
            for resources, group in groupby(sorted(to_run, key=_resources_of, reverse=True), key=_resources_of):
                _tune(list(group), resources, slots[resources], workspace, parent)
    finally:
        end_children(uri, sweep.base.tracking.experiment, parent)  # trials whose process was killed


def _measure(workspace: Workspace, settings: Settings, root: Path, device: torch.device) -> float:
    """Run `measured_rate`; for a GPU, in a separate process, because this process may have no GPU and would not
    release its memory."""

    def measure() -> float:
        return measured_rate(settings, workspace.data_root(), device)

    return measure() if device.type == "cpu" else ray.get(ray.remote(num_gpus=1, max_calls=1)(measure).remote())


class TrialResources(NamedTuple):
    """The resources of a trial. With `in_process`, Tune's own process uses them, otherwise Ray Train's workers do."""

    use_gpu: bool
    cpus_per_worker: int
    num_workers: int
    in_process: bool

    @property
    def num_devices(self) -> int:
        return self.num_workers * (1 if self.use_gpu else self.cpus_per_worker)

    @property
    def of_tune(self) -> dict[str, float]:
        """The resources to request from Tune. With workers, Tune starts only their driver: it reserves no CPU, so
        that the workers fit, and is pinned to this node, which has `root` and on which the sweep depends anyway."""
        if not self.in_process:
            return {this_node_resource(): 1e-4}
        return {"cpu": self.cpus_per_worker, "gpu": int(self.use_gpu)}


def _resources_of(trial: Trial) -> TrialResources:
    try:
        gpu, cpus = share_of_each_worker(trial.settings.hardware)
    except ValueError as error:
        where = "in a sweep, set sweep.num_workers and sweep.cpus_per_worker"
        raise ValueError(f"{trial.row.label}: {error} ({where})") from None
    hardware = trial.settings.hardware
    room = capacity(node_resources(), cpus, gpu)
    num_workers = max(hardware.min_workers, min(hardware.max_workers, room))
    return TrialResources(gpu, cpus, num_workers, needs_no_workers(hardware))


def _num_concurrent(resources: TrialResources) -> int:
    """How many such trials can run at once. Raises ValueError if not even one fits.

    Ray does not count the workers as part of the trial, so without a limit Tune would start all trials at once.
    `share_of_each_worker` has already rejected trials larger than the whole cluster.
    """
    gpu, cpus, num_workers, _ = resources
    room = capacity(node_resources(), cpus, gpu)
    if room < num_workers:
        raise ValueError(
            f"a trial needs {num_workers} workers with {cpus} CPUs{' and a GPU' if gpu else ''} each, but the "
            f"cluster has room for {room}: lower sweep.cpus_per_worker, hardware.num_workers or sweep.num_workers"
        )
    return room // num_workers


def _tune(trials: list[Trial], resources: TrialResources, slots: int, workspace: Workspace, parent: str) -> None:
    """Run these trials, `slots` at a time. Afterwards each has a record, unless this process was interrupted."""
    by_id = {trial.id: trial for trial in trials}
    scheduler = None
    asha = trials[0].settings.sweep.scheduler == "asha"
    max_failures = trials[0].settings.hardware.max_failures
    if asha:
        # time_attr is not Tune's count of reports, which restarts at zero after a kill. Trials that reach max_t are
        # not stopped (stop_last_trials): they still have to be evaluated.
        train = trials[0].settings.train
        max_steps = max(trial.settings.train.max_steps for trial in trials)
        scheduler = RecordingASHA(
            time_attr="step",
            metric="valid_loss",
            mode="min",
            grace_period=min(train.validate_every, max_steps),
            max_t=max_steps,
            reduction_factor=REDUCTION,
            stop_last_trials=False,
        )
    trainable = ray.tune.with_parameters(
        run_trial, trials=by_id, resources=resources, workspace=workspace, parent=parent
    )
    folder = workspace.root / CHECKPOINTS / ".tune"
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, resources.of_tune),
        param_space={"trial": ray.tune.grid_search(list(by_id))},
        tune_config=ray.tune.TuneConfig(
            max_concurrent_trials=slots,
            scheduler=scheduler,
            # Reuse saves seconds of imports per trial. It is off when ASHA may stop a driver of workers, whose
            # process must then exit.
            reuse_actors=resources.in_process or not asha,
        ),
        run_config=ray.tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            verbose=0,
            # With workers, Ray Train does the retries.
            failure_config=ray.tune.FailureConfig(max_failures if resources.in_process else 0),
        ),
    )
    with redirect_stdout(io.StringIO()):  # verbose=0 still prints a box with a folder that we delete
        results = tuner.fit()
    for result in map(results.__getitem__, range(len(results))):  # mypy: no iterator is declared
        trial = by_id[result.config["trial"]]  # type: ignore[index]
        if scheduler and trial.id in scheduler.ended:
            _end(trial, "stopped", scheduler.ended[trial.id], workspace)
        elif trial.record() is None:
            reason = str(result.error or "no reason given").strip().splitlines()[-1]
            _end(trial, "failed", f"the trial's process died: {reason}", workspace)
    shutil.rmtree(folder, ignore_errors=True)  # Tune's own state: results are in the trials' folders


class RecordingASHA(ASHAScheduler):
    """ASHA that records in `ended` the trials it has stopped, {trial id: reason}. The trials cannot record it
    themselves: they only see their workers die, or are killed immediately."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ended: dict[str, str] = {}

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(controller, trial, result)
        if decision == self.STOP:
            reached = f"step {result['step']}, validation perplexity {result['valid_ppl']:.2f}"
            self.ended[trial.config["trial"]] = f"ended by ASHA at {reached}"
        return decision


def _end(trial: Trial, status: str, reason: str, workspace: Workspace) -> None:
    """Write the record of a trial that was stopped by the scheduler or whose process died."""
    trial.write_record(_cost(trial, workspace.root) | {"status": status, "error": reason, "metrics": {}})
    mlflow_status = "FINISHED" if status == "stopped" else "FAILED"
    end_run_of(workspace.tracking_uri, trial.run_key, trial.settings.tracking.experiment, mlflow_status, reason)


def run_trial(
    config: dict[str, Any],
    trials: dict[str, Trial],
    resources: TrialResources,
    workspace: Workspace,
    parent: str,
) -> None:
    """Run one trial for Tune: train, then evaluate.

    If the trial's process dies, Tune starts it again, and it continues from its last checkpoint. Errors of the trial
    are written to its record and not raised to Tune: a retry would fail again, and Ray Train has already retried its
    workers.
    """
    trial = trials[config["trial"]]
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    try:
        trial.write_record(_train_and_evaluate(trial, resources, workspace, parent))
    except ray.exceptions.RayActorError:
        raise  # Ray Train's controller is gone: the scheduler has stopped this trial, or its node is down
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        name = "" if isinstance(error, (ValueError, OSError, TrainingError)) else f"{type(error).__name__}: "
        trial.write_record(
            _cost(trial, workspace.root)
            | {"status": "failed", "error": without_passwords(f"{name}{reason[0]}"), "metrics": {}}
        )
    else:
        for folder in checkpoint.folders(trial.folder)[: -trial.settings.train.average_checkpoints]:
            remove(folder)  # keeps the checkpoints that were averaged


def _train_and_evaluate(trial: Trial, resources: TrialResources, workspace: Workspace, parent: str) -> dict[str, Any]:
    """Train and evaluate a trial. Returns its record."""
    started = time.time()
    tags = {
        "mlflow.runName": trial.name,
        "mlflow.parentRunId": parent,
        "mlflow.source.name": "python -m sweeps.run",
        "row": trial.row.id,
        "axis": trial.row.axis,
        "change": trial.row.label,
        "seed": str(trial.seed),
    }
    with as_os_error(trial.folder):
        (trial.folder / "trial.json").unlink(missing_ok=True)
    asha = trial.settings.sweep.scheduler == "asha"
    on_validation, callbacks = None, []
    if asha and trial.row.group != "base":  # base is never stopped early, because all rows are compared with it
        on_validation = ray.tune.report if resources.in_process else ray.train.report
        callbacks = [] if resources.in_process else [TuneReportCallback()]
    root = workspace.root
    continue_sibling(trial.folder, trial.settings.train, log)
    is_new = not checkpoint.folders(trial.folder) and not total_usage(trial.folder).attempts
    finished = checkpoint.finished_state(trial.folder, trial.settings.train)
    with training_run(
        trial.settings,
        workspace,
        trial.run_key,
        trial.folder,
        finished,
        in_process=resources.in_process,
        tags=tags,
        show=False,
        on_validation=on_validation,
        callbacks=callbacks,
    ) as run:
        trained = write_model(run, trial.settings, root, trial.folder / "model")
        gpu, cpus = resources.use_gpu, resources.cpus_per_worker
        if resources.in_process:
            metrics, evaluation = _evaluate(trial, workspace, cpus)
        else:
            # on the devices that training has released, outside the trial's placement group, which has no CPU
            outside = PlacementGroupSchedulingStrategy(placement_group=None)  # type: ignore[arg-type]
            task = ray.remote(num_cpus=cpus, num_gpus=int(gpu), scheduling_strategy=outside)(_evaluate)
            metrics, evaluation = ray.get(task.remote(trial, workspace, cpus))
    used = total_usage(trial.folder)
    record = {
        "status": "finished",
        "error": None,
        "device": "gpu" if gpu else "cpu",
        "evaluation_device_hours": evaluation * (1 if gpu else cpus) / 3600,
        "parameters": trained["parameters"],
        "steps": trained["steps"],
        "tokens": trained["tokens"],
        "tokens_per_second": trained["tokens_per_second"],
        "metrics": metrics | {"valid_ppl": trained["valid_ppl"]},
        "mlflow_run_id": run.run_id,
    }
    if is_new and used.attempts == 1 and used.first_step_at:  # all of it in this attempt, uninterrupted
        seconds = time.time() - started
        record |= {
            "seconds": seconds,
            "seconds_to_first_step": used.first_step_at - started,
            "seconds_of_overhead": seconds - evaluation - used.device_seconds / resources.num_devices,
        }
    return _cost(trial, root) | record


def _evaluate(trial: Trial, workspace: Workspace, cpus: int) -> tuple[dict[str, Any], float]:
    """Evaluate as the evaluate stage does. Returns the metrics and the time in seconds."""
    torch.set_num_threads(cpus)
    started = time.time()
    # use the driver's store, not the default one beside this node's data folder
    os.environ[TRACKING_URI_ENV] = workspace.tracking_uri
    root = workspace.data_root()
    with local_copy(trial.folder / "model") as model, tempfile.TemporaryDirectory() as reports:
        found = evaluate_run(trial.settings, root, model, Path(reports), progress=False).metrics
        copy_files(Path(reports), trial.folder)
    flat = {f"{split}_{name}": value for split in ("test", "valid") for name, value in found[split].items()}
    return flat, time.time() - started


def _cost(trial: Trial, root: Path) -> dict[str, Any]:
    """The cost of the training so far, killed attempts included."""
    used = total_usage(trial.folder)
    return {
        "attempts": used.attempts,
        "device_hours": used.device_seconds / 3600,
        "flops": used.steps * flops_per_step(trial.settings, root),
    }


def _show_progress(trials: Sequence[Trial]) -> AbstractContextManager[None]:
    """Show a progress bar over the steps of all trials, with the numbers of trials done, running and failed."""
    started = time.time()

    def look() -> tuple[int, str]:
        records = [trial.record() for trial in trials]
        statuses = [record["status"] for record in records if record]
        running, steps = 0, 0
        for trial, record in zip(trials, records, strict=True):
            steps += trial.settings.train.max_steps if record else steps_done(trial.folder / PROGRESS_FILE)
            running += record is None and has_begun_since(trial.folder, started)
        failed = statuses.count("failed")
        done = len(statuses) - failed
        return steps, trials_text(len(trials), done, running, failed)

    total = sum(trial.settings.train.max_steps for trial in trials)
    interval_s = max(LOOK_INTERVAL_S, interval_of(trials[0].folder, PROGRESS_INTERVAL_S))
    return show_bar("sweep", total, interval_s, look, SHARE)


def _write_results(sweep: SweepPlan, root: Path, parent: str) -> None:
    """Write data/sweep: trials.json and, for the validation split, the references and each finished trial's
    translations."""
    settings = sweep.base
    trials = []
    provenance = git_tags(root)
    commit = f"commit {provenance['git_commit'][:10]}" if provenance else "an unknown commit"
    if provenance.get("git_dirty") == "true":
        commit += " with uncommitted changes"
    runs_page = experiment_page(tracking_uri(root), parent)
    with replace_folder(root / SWEEP) as folder:
        shutil.copy(root / CLEAN / f"valid.{settings.data.tgt}", folder / "references.txt")
        signature = ""
        for trial in sweep.trials:
            record = trial.record() or {"status": "unfinished", "error": "was interrupted", "metrics": {}}
            metrics = record["metrics"]
            signature = metrics.get(f"{BLEU}_signature", signature)
            translations = None
            if record["status"] == "finished":
                translations = f"{trial.id}.txt"
                with as_os_error(trial.folder):
                    lines = (trial.folder / VALID_TRANSLATIONS).read_text(encoding="utf-8").splitlines()[1:]
                write_text(folder / translations, "".join(line.split("\t")[2] + "\n" for line in lines))
            numbers = {key: value for key, value in metrics.items() if not isinstance(value, str)}
            identity = {"row": trial.row.id, "seed": trial.seed, "name": trial.name}
            page = f"{runs_page}/runs/{record['mlflow_run_id']}" if "mlflow_run_id" in record else None
            trials.append(identity | record | {"metrics": numbers, "translations": translations, "mlflow_page": page})
        write_json(
            folder / "trials.json",
            {
                "experiment": settings.tracking.experiment,
                "data": settings.data_name,
                "base_name": setup_name(settings),
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "commit": commit,
                "machine": this_machine(),
                "seeds": settings.sweep.seeds,
                "price_per_device_hour": settings.sweep.price_per_device_hour,
                "device": next((trial["device"] for trial in trials if "device" in trial), settings.hardware.device),
                "bleu_signature": signature,
                "mlflow_parent": parent,
                "base": flatten(settings),
                "rows": [asdict(row) for row in sweep.rows],
                "trials": trials,
            },
        )


def main() -> None:
    cli.parser("sweeps.run", __doc__).parse_args()
    with cli.exit_on_error("sweep", interrupted="interrupted; the same command continues from here"):
        run_sweep(Path().resolve())


if __name__ == "__main__":
    main()
