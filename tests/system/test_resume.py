"""Training that is killed in several ways ends with the same weights as without the kill."""

import signal

import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from pipeline.cluster.accounting import total_usage
from tests.support.stores import HoldingProxy, mlflow_server

pytestmark = pytest.mark.slow

PATIENCE_S = 900


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_train_killed_and_started_again_ends_with_the_same_weights(trained, tmp_path):
    project = trained.untrained_copy(tmp_path / "project")
    with project.started("python", "-m", "pipeline.train") as training:
        project.wait_for(project.checkpoints, "checkpoint")
        assert not [title(process) for process in training.children(recursive=True)], "Ray was started"
        training.kill()
        training.wait()
    assert project.only_run().info.status == "RUNNING"
    output = project.run("python", "-m", "pipeline.train")
    assert "continuing from the checkpoint of step" in output
    assert project.weights() == trained.weights()
    assert project.only_run().info.status == "FINISHED"
    assert project.curve("train_loss") == trained.curve("train_loss")


def test_train_killed_while_a_server_held_its_points_has_each_of_them_once(trained, tmp_path):
    project = trained.untrained_copy(tmp_path / "project")
    project.edit("params.yaml", "train.checkpoint_every", 200)  # so that all held steps are repeated
    store = f"sqlite:///{tmp_path}/server.db"
    with mlflow_server(store, str(tmp_path / "served"), {}) as server, HoldingProxy(server) as proxy:
        client = MlflowClient(server)
        with project.started("python", "-m", "pipeline.train", MLFLOW_TRACKING_URI=proxy.uri) as training:
            project.wait_for(lambda: proxy.held, "request with metrics")
            training.kill()
            training.wait()
        proxy.holds = False
        with project.started("python", "-m", "pipeline.train", MLFLOW_TRACKING_URI=proxy.uri) as training:
            (run,) = client.search_runs([client.get_experiment_by_name("transformer").experiment_id])
            run_id = run.info.run_id
            project.wait_for(lambda: client.get_metric_history(run_id, "train_loss"), "point of the successor")
            proxy.release()
            assert training.wait(PATIENCE_S) == 0, project.log()
        for name in client.get_run(run_id).data.metrics:
            steps = [point.step for point in client.get_metric_history(run_id, name)]
            assert sorted(steps) == sorted(set(steps)), name
        losses = [(point.step, point.value) for point in client.get_metric_history(run_id, "train_loss")]
        assert sorted(losses) == trained.curve("train_loss")


def test_train_with_two_workers_replaces_a_killed_one(trained, tmp_path):
    project = trained.untrained_copy(tmp_path / "project")
    project.edit("params.yaml", "hardware.num_workers", 2)
    project.edit("params.yaml", "train.max_steps", 60)
    with project.started("python", "-m", "pipeline.train") as training:
        project.wait_for(project.checkpoints, "checkpoint")
        ours = training.children(recursive=True)
        workers = [process for process in ours if title(process).startswith("ray::RayTrainWorker")]
        assert len(workers) == 2
        assert {worker.nice() for worker in workers} == {training.nice()}  # Ray's default of 15 makes steps slow
        workers[0].kill()
        assert training.wait(PATIENCE_S) == 0, project.log()
    assert "continuing from the checkpoint of step" in project.log()
    assert project.only_run().info.status == "FINISHED"


def test_train_terminated_is_killed_in_mlflow(trained, tmp_path):
    project = trained.untrained_copy(tmp_path / "project")
    with project.started("python", "-m", "pipeline.train") as training:
        project.wait_for(project.checkpoints, "checkpoint")
        training.terminate()
        assert training.wait(PATIENCE_S) == 128 + signal.SIGTERM, project.log()
    assert "Traceback" not in project.log()
    assert project.only_run().info.status == "KILLED"


@pytest.mark.usefixtures("interruptible")
def test_train_interrupted_prints_one_line_and_leaves_no_process(trained, tmp_path):
    project = trained.untrained_copy(tmp_path / "project")
    with project.started("python", "-m", "pipeline.train") as training:
        project.wait_for(project.checkpoints, "checkpoint")
        ours = training.children(recursive=True)
        training.send_signal(signal.SIGINT)
        assert training.wait(PATIENCE_S) == 130, project.log()
    assert project.log().endswith("train: interrupted; the same command resumes from the last checkpoint\n")
    assert "Traceback" not in project.log()
    assert project.only_run().info.status == "KILLED"
    assert not [title(process) for process in ours if process.is_running()]


def test_train_with_other_settings_starts_over_and_stops_at_a_loss_of_nan(trained, tmp_path):
    project = trained.copy(tmp_path / "project", without=())
    before = project.checkpoints()
    project.edit("params.yaml", "train.lr_scale", 1e30)
    output = project.run("python", "-m", "pipeline.train", code=1)
    assert f"a new run: settings, data or code differ from the last run, {before[-1].parent.name}" in output
    assert "train: step 2 (epoch 0, batch 1): the loss is nan" in output
    assert "Lower train.lr_scale" in output
    assert "Traceback" not in output
    assert project.checkpoints() == before
    assert project.only_run().info.status == "FAILED"


def test_train_with_more_steps_continues_the_shorter_run_and_ends_as_at_once(trained, tmp_path):
    project = trained.untrained_copy(tmp_path / "project")
    for steps in (205, 400):
        project.edit("params.yaml", "train.max_steps", steps)
        output = project.run("python", "-m", "pipeline.train")
    short, long = sorted({path.parent.name for path in project.checkpoints()})
    assert f"train: {long} continues from {short}, trained to step 205: the runs differ only in where they" in output
    assert project.weights() == trained.weights()
    used = total_usage(project.root / "checkpoints" / long)
    assert (used.attempts, used.steps) == (1, 400)
    runs = {run.data.params["max_steps"]: run for run in project.runs()}
    assert {steps: run.data.tags.get("continues") for steps, run in runs.items()} == {
        "205": None, "400": f"{short}, trained to step 205",
    }  # fmt: skip
    client = MlflowClient(project.tracking_uri)
    for name in ("train_loss", "valid_loss"):
        points = client.get_metric_history(runs["400"].info.run_id, name)
        assert [(point.step, point.value) for point in points] == trained.curve(name)


def test_train_with_another_average_trains_no_further(trained, tmp_path):
    project = trained.copy(tmp_path / "project", without=())
    before = project.checkpoints()
    project.edit("params.yaml", "train.average_checkpoints", 3)
    output = project.run("python", "-m", "pipeline.train")
    assert "train: already trained to step 400" in output
    assert "s, without training: models/final/weights.safetensors is from step 400\n" in output
    assert project.json("reports/train.json")["averaged_steps"] == [400, 390, 380]
    assert project.checkpoints() == before


def test_train_with_two_workers_ends_with_the_weights_of_one(trained, tmp_path):
    project = trained.untrained_copy(tmp_path / "project")
    project.edit("params.yaml", "hardware.num_workers", 2)
    project.edit("params.yaml", "train.max_steps", 20)
    project.run("python", "-m", "pipeline.train")
    (theirs,) = trained.root.glob("checkpoints/*/step_00000020")
    (ours,) = project.root.glob("checkpoints/*/step_00000020")
    expected, found = (load_file(folder / "tensors.safetensors") for folder in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
