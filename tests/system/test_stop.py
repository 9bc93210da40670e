"""Stages that are stopped or killed, or whose DVC is killed, at random moments. STOPS=100 repeats this more often."""

import os
import random
import signal
import time
from contextlib import suppress

import psutil
import pytest
from mlflow import MlflowClient

STOPS = int(os.environ.get("STOPS", "2"))
SECONDS = {
    "pipeline.download": 2,
    "pipeline.validate": 3,
    "pipeline.train_tokenizer": 2,
    "pipeline.encode": 2,
    "pipeline.train": 20,
    "pipeline.evaluate": 15,
    "sweeps.run": 60,
}
"""Upper limit in seconds of the time that each command takes."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("interruptible")]


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize(("command", "seconds"), SECONDS.items())
def test_stage_stopped_at_any_moment_ends_with_one_line(command, seconds, trained, tmp_path, figures):
    project = trained.copy(tmp_path / "project", without=())
    chance = random.Random(command)
    stopped, slowest_s, seed = 0, 0.0, 7
    while stopped < STOPS:
        project.edit("params.yaml", "train.seed", seed)  # so that train and sweep have work to do
        project.edit("params.yaml", "sweep.seeds", [seed])
        signum = chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        moment_s = chance.uniform(0.1, seconds)
        began = time.monotonic()
        with project.started("python", "-m", command) as stage:
            with suppress(psutil.TimeoutExpired):
                stage.wait(moment_s)
            children = stage.children(recursive=True) if is_alive(stage) else []
            signalled = time.monotonic()
            with suppress(psutil.NoSuchProcess):
                stage.send_signal(signum)
            code = stage.wait(30)
            took_s = time.monotonic() - signalled
            log = project.log()
        if code == 0:  # it was done before the signal
            seconds, seed = min(seconds, signalled - began), seed + 1
            continue
        if code == -signum:  # Python was just starting or ending
            continue
        stopped, slowest_s = stopped + 1, max(slowest_s, took_s)
        assert code == 128 + signum, f"{signum} after {moment_s:.1f} s: exit code {code}\n{log}"
        assert "Traceback" not in log
        assert "interrupted" in log.splitlines()[-1] or "stopped; run again" in log.splitlines()[-1]
        deadline = time.monotonic() + 10
        while left := [child for child in children if is_alive(child)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
    figures(f"{command} told to stop", times=stopped, slowest_s=round(slowest_s, 1))


@pytest.mark.parametrize("stage", ["train", "evaluate", "sweep"])
def test_stage_ends_if_its_dvc_is_killed_in_its_first_seconds(stage, trained, tmp_path, figures):
    project = trained.copy(tmp_path / "project", without=())
    project.edit("params.yaml", "train.seed", 7)
    chance = random.Random(stage)
    slowest_s = 0.0
    for _ in range(STOPS):
        with project.started("dvc", "repro", "--single-item", "--force", stage) as dvc:
            project.wait_for(lambda dvc=dvc: dvc.children(), "process of the stage")
            time.sleep(chance.uniform(0.1, 3))
            children = dvc.children(recursive=True)
            dvc.kill()
            killed = time.monotonic()
            while left := [child for child in children if is_alive(child)]:
                assert time.monotonic() - killed < 10, left
                time.sleep(0.1)
            slowest_s = max(slowest_s, time.monotonic() - killed)
    figures(f"dvc killed in the first 3 s of {stage}", times=STOPS, slowest_s=round(slowest_s, 1))


def seconds_of(project, command: str) -> float:
    """Run the command undisturbed."""
    began = time.monotonic()
    project.run("python", "-m", command)
    return time.monotonic() - began


def run_with_kills(project, command: str, kills: int, within_s: float, chance: random.Random) -> int:
    """Kill the command (-9) at a random moment, start it again and so on, then let it end.

    Returns the number of kills: `kills`, or fewer if it ended before.
    """
    for number in range(kills):
        with project.started("python", "-m", command) as process:
            with suppress(psutil.TimeoutExpired):
                assert process.wait(chance.uniform(0, within_s)) == 0, project.log()
                return number
            process.kill()
            process.wait()
    project.run("python", "-m", command)
    return kills


def test_train_killed_at_random_moments_ends_with_the_same_weights(trained, tmp_path, figures):
    chance = random.Random(9)
    took_s = seconds_of(trained.untrained_copy(tmp_path / "undisturbed"), "pipeline.train")
    kills = trainings = 0
    while kills < STOPS:
        trainings += 1
        project = trained.untrained_copy(tmp_path / f"project-{trainings}")
        kills += run_with_kills(project, "pipeline.train", STOPS - kills, took_s, chance)
        assert project.weights() == trained.weights()
        assert project.only_run().info.status == "FINISHED"
        assert project.curve("train_loss") == trained.curve("train_loss")
    figures("train is killed (-9) at random moments", kills=kills, trainings=trainings)


def test_sweep_killed_at_random_moments_ends_with_the_same_scores(trained, tmp_path, figures):
    def scores(project) -> dict[str, dict[str, float]]:
        return {trial["name"]: trial["metrics"] for trial in project.json("data/sweep/trials.json")["trials"]}

    chance = random.Random(3)
    undisturbed = trained.untrained_copy(tmp_path / "undisturbed")
    took_s = seconds_of(undisturbed, "sweeps.run")
    kills = sweeps = 0
    while kills < STOPS:
        sweeps += 1
        project = trained.untrained_copy(tmp_path / f"project-{sweeps}")
        kills += run_with_kills(project, "sweeps.run", STOPS - kills, took_s, chance)
        assert scores(project) == scores(undisturbed)
        client = MlflowClient(project.tracking_uri)
        (experiment,) = client.search_experiments(filter_string="name LIKE 'table3-%'")
        runs = client.search_runs([experiment.experiment_id])
        assert sorted(run.info.status for run in runs) == ["FINISHED"] * (1 + len(scores(project)))
    figures("sweep is killed (-9) at random moments", kills=kills, sweeps=sweeps)
