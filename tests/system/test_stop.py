"""Stages that are told to stop, or whose DVC is killed, at random moments. STOPS=100 tries more often."""

import os
import random
import signal
import time
from contextlib import suppress

import psutil
import pytest

STOPS = int(os.environ.get("STOPS", "2"))
SECONDS = {
    "pipeline.download": 2,
    "pipeline.validate": 3,
    "pipeline.train_tokenizer": 2,
    "pipeline.encode": 2,
    "pipeline.train": 10,
    "pipeline.evaluate": 8,
    "sweeps.run": 40,
}
"""About how long each command takes."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("interruptible")]


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize(("command", "seconds"), SECONDS.items())
def test_stage_stopped_at_any_moment_ends_with_one_line(command, seconds, trained, tmp_path, figures):
    project = trained.copy(tmp_path / "project", without=())
    project.edit("params.yaml", "train.seed", 7)  # train and sweep have something to do
    chance = random.Random(command)
    stopped, slowest_s = 0, 0.0
    for _ in range(STOPS):
        signum = chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        moment_s = chance.uniform(0.1, seconds)
        with project.started("python", "-m", command) as stage:
            with suppress(psutil.TimeoutExpired):
                stage.wait(moment_s)
            children = stage.children(recursive=True) if is_alive(stage) else []
            told = time.monotonic()
            with suppress(psutil.NoSuchProcess):
                stage.send_signal(signum)
            code = stage.wait(30)
            took_s = time.monotonic() - told
            log = project.log()
        if code in (0, -signum):  # it was done before; or Python itself had not begun, or ended at that moment
            continue
        stopped, slowest_s = stopped + 1, max(slowest_s, took_s)
        assert code == 128 + signum, f"{signum} after {moment_s:.1f} s: exit code {code}\n{log}"
        assert "Traceback" not in log
        assert "interrupted" in log.splitlines()[-1] or "stopped; run again" in log.splitlines()[-1]
        deadline = time.monotonic() + 10
        while left := [child for child in children if is_alive(child)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
    assert stopped or seconds < 5, "never stopped in the middle: the moments are wrong"
    figures(f"{command} told to stop", times=stopped, slowest_s=round(slowest_s, 1))


@pytest.mark.parametrize("stage", ["train", "evaluate", "sweep"])
def test_stage_whose_dvc_is_killed_in_its_first_seconds_ends_too(stage, trained, tmp_path, figures):
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
