"""A sweep of miniature trials through its command line: killed, continued, extended, and with a failing row."""

import json
from contextlib import suppress

import psutil
import pytest
from mlflow import MlflowClient

from pipeline.common.settings import load_settings
from sweeps.cost import flops_per_step

pytestmark = pytest.mark.slow

PATIENCE_S = 600


def records(project):
    """Return {folder of the trial: its record}."""
    return {path.parent.name: json.loads(path.read_text()) for path in project.root.glob("checkpoints/*/trial.json")}


def trials(project):
    """Return {name of the trial: its results}, as the report reads them."""
    return {trial["name"]: trial for trial in project.json("data/sweep/trials.json")["trials"]}


def half_done(project):
    """Return whether a trial is finished and another is in the middle of training."""
    last = {path.parent.name: int(path.name.removeprefix("step_")) for path in project.checkpoints()}
    finished = records(project)
    return finished and any(step <= 300 for name, step in last.items() if name not in finished)


def runs(project):
    client = MlflowClient(project.tracking_uri)
    (experiment,) = client.search_experiments(filter_string="name LIKE 'table3-%'")
    found = client.search_runs([experiment.experiment_id])
    return {run.info.run_name: run for run in found}, len(found)


@pytest.fixture(scope="module")
def killed(trained, tmp_path_factory):
    """A sweep of three trials whose driver was killed (-9) after the first trial ended and before the last did."""
    project = trained.untrained_copy(tmp_path_factory.mktemp("sweep") / "project")
    with project.started("python", "-m", "sweeps.run", MLFLOW_TRACKING_URI="sqlite:///mlflow.db") as sweep:
        project.wait_for(lambda: half_done(project) or sweep.poll() is not None, "trial that is finished", PATIENCE_S)
        assert sweep.poll() is None, project.log()
        orphans = sweep.children(recursive=True)
        sweep.kill()
        sweep.wait()
        for orphan in orphans:  # before another trial ends: Ray takes seconds to notice that the driver is gone
            with suppress(psutil.NoSuchProcess):
                orphan.kill()
    project.output = project.log()
    project.before = records(project)
    project.statuses_before = {name: run.info.status for name, run in runs(project)[0].items()}
    return project


@pytest.fixture(scope="module")
def continued(killed):
    killed.output = killed.run("python", "-m", "sweeps.run", MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    return killed


@pytest.fixture(scope="module")
def widened(continued):
    """The continued sweep with one more seed, and a row whose loss is not finite."""
    continued.edit("params.yaml", "sweep.seeds", [0, 5])
    continued.edit("params.yaml", "sweep.grid", {"train.lr_scale": [1e30]})
    continued.unwidened = records(continued)
    continued.output = continued.run("python", "-m", "sweeps.run")
    return continued


def test_sweep_killed_keeps_finished_trials_and_continues_the_others(continued):
    assert set(continued.statuses_before.values()) >= {"RUNNING", "FINISHED"}
    found = trials(continued)
    assert list(found) == ["base, seed 0", "D: dropout 0.0, seed 0", "D: dropout 0.2, seed 0"]
    assert {trial["status"] for trial in found.values()} == {"finished"}
    after = records(continued)
    assert {name: after[name] for name in continued.before} == continued.before, "a finished trial ran again"
    assert 2 in {record["attempts"] for record in after.values()}, "no trial was continued"
    assert not (continued.root / "checkpoints/.tune").exists(), "Tune's state must be deleted"


def test_sweep_killed_leaves_one_finished_mlflow_run_for_each_trial(continued):
    found, count = runs(continued)
    assert count == len(found) == 4
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    (parent,) = (run for run in found.values() if run.data.tags["row"] == "all")
    for name, trial in trials(continued).items():
        run = found[name]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (run.data.tags["row"], run.data.tags["seed"]) == (trial["row"], str(trial["seed"]))
        assert run.data.metrics["test_bleu"] == trial["metrics"]["test_bleu"]
        assert (
            run.data.params["dropout"] == {"base": "0.1", "D-dropout0.0": "0.0", "D-dropout0.2": "0.2"}[trial["row"]]
        )


def test_sweep_records_what_each_trial_cost(continued):
    settings = load_settings(continued.root)
    undisturbed = [record for record in records(continued).values() if "seconds" in record]
    assert undisturbed
    for record in undisturbed:
        assert record["attempts"] == 1
        assert record["flops"] == pytest.approx(400 * flops_per_step(settings, continued.root))
        training, evaluation = (3600 * record[name] for name in ("device_hours", "evaluation_device_hours"))
        assert min(training, evaluation) > 0.1
        assert training + evaluation + record["seconds_of_overhead"] == pytest.approx(record["seconds"])
        assert 0 < record["seconds_to_first_step"] < record["seconds"] < PATIENCE_S


def test_sweep_prints_its_plan_first_and_counts_finished_trials(continued):
    plan = continued.output[: continued.output.index(" running, ")]
    assert f": 3 rows x 1 seed; trials: {len(continued.before)} done" in plan
    assert "1e+09 FLOPs a second, from sweep.flops_per_second" in plan


def test_sweep_widened_runs_only_new_trials(widened):
    after = records(widened)
    assert {name: after[name] for name in widened.unwidened} == widened.unwidened
    assert len(after) == 3 + 3 + 2  # the new seed for three rows, both seeds for the new row


def test_sweep_records_a_failed_trial_and_runs_the_others(widened):
    found = trials(widened)
    failed = {name: trial for name, trial in found.items() if trial["status"] == "failed"}
    assert list(failed) == ["grid: lr_scale 1e+30, seed 0", "grid: lr_scale 1e+30, seed 5"]
    assert all("the loss is nan" in trial["error"] for trial in failed.values())
    assert all(trial["attempts"] == 1 for trial in failed.values()), "a trial that always fails was retried"
    assert {trial["status"] for name, trial in found.items() if name not in failed} == {"finished"}
    statuses = {name: run.info.status for name, run in runs(widened)[0].items()}
    assert {statuses.pop(name) for name in failed} == {"FAILED"}
    assert set(statuses.values()) == {"FINISHED"}


def test_report_is_written_and_logged_in_the_run_of_the_sweep(widened):
    widened.run("python", "-m", "sweeps.report")
    table = (widened.root / "reports/table3.md").read_text()
    assert "the loss is nan" in table
    assert "dropout 0.2" in table
    (parent,) = (run for run in runs(widened)[0].values() if run.data.tags["row"] == "all")
    names = {file.path for file in MlflowClient(widened.tracking_uri).list_artifacts(parent.info.run_id)}
    assert {"plan.md", "table3.md", "table3.html", "table3.csv", "table3.png"} <= names


def test_sweep_that_is_finished_starts_no_ray(widened):
    before = records(widened)
    widened.edit("params.yaml", "sweep.grid", {})
    output = widened.run("python", "-m", "sweeps.run", RAY_ADDRESS="127.0.0.1:9")  # no cluster answers
    assert records(widened) == before
    assert "trials:" not in output


def test_sweep_starts_a_killed_trial_again_and_it_ends_as_an_undisturbed_one(trained, tmp_path):
    project = trained.untrained_copy(tmp_path / "project")
    for key, value in {"rows": [], "grid": {"model.dropout": [0.3]}, "seeds": [1]}.items():
        project.edit("params.yaml", f"sweep.{key}", value)
    last = trained.checkpoints()[-1].relative_to(trained.root) / "tensors.safetensors"
    base = last.parent.parent
    with project.started("python", "-m", "sweeps.run") as sweep:
        project.wait_for(lambda: list((project.root / base).glob("step_*")), "checkpoint of base")
        (run,) = (run for run in runs(project)[0].values() if run.data.tags["row"] == "base")
        psutil.Process(int(run.data.tags["run.owner_pid"])).kill()
        assert sweep.wait(PATIENCE_S) == 0, project.log()
    killed = records(project)[base.name]
    assert (killed["status"], killed["attempts"]) == ("finished", 2)
    assert (project.root / last).read_bytes() == (trained.root / last).read_bytes()
    assert {run.info.status for run in runs(project)[0].values()} == {"FINISHED"}


@pytest.fixture(scope="module")
def halved(trained, tmp_path_factory):
    """A sweep with a grid under ASHA: base, a row that learns as well, and rows that hardly learn."""
    project = trained.untrained_copy(tmp_path_factory.mktemp("asha") / "project")
    project.edit("params.yaml", "sweep.rows", [])
    project.edit("params.yaml", "sweep.scheduler", "asha")
    project.edit("params.yaml", "sweep.grid", {"train.lr_scale": [0.9, 2e-9, 1e-9]})
    project.output = project.run("python", "-m", "sweeps.run")
    return project


def test_asha_ends_worse_trials_early_and_scores_the_others(halved):
    found = trials(halved)
    assert {found[name]["status"] for name in ("base, seed 0", "grid: lr_scale 0.9, seed 0")} == {"finished"}
    stopped = {name: trial for name, trial in found.items() if trial["status"] == "stopped"}
    assert list(stopped) == ["grid: lr_scale 2e-09, seed 0", "grid: lr_scale 1e-09, seed 0"]
    for trial in stopped.values():
        assert "ended by ASHA at step 100, validation perplexity" in trial["error"]
        assert trial["translations"] is None
        assert trial["flops"] < found["base, seed 0"]["flops"]
    statuses = {name: run.info.status for name, run in runs(halved)[0].items()}
    assert set(statuses.values()) == {"FINISHED"}
    assert len(statuses) == 1 + len(found)


def test_asha_does_not_run_an_ended_trial_again(halved):
    before = records(halved)
    output = halved.run("python", "-m", "sweeps.run")
    assert records(halved) == before
    assert "trials:" not in output


def test_sweep_refuses_more_cpus_than_the_machine_has(trained, tmp_path):
    project = trained.untrained_copy(tmp_path / "project")
    project.edit("params.yaml", "sweep.cpus_per_worker", 1000)
    output = project.run("python", "-m", "sweeps.run", code=1)
    assert "sweep: base: hardware.num_workers is 1, with 1000 CPUs each" in output
    assert "sweep.cpus_per_worker" in output
    assert "Traceback" not in output
