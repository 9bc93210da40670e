"""Resources and start of a trial. tests/system/test_sweep.py runs whole sweeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cluster.accounting import UsageRecorder
from pipeline.data.workspace import Workspace
from pipeline.training import checkpoint
from pipeline.training.loop import TrainState
from sweeps import run
from sweeps.run import TrialResources
from sweeps.table3 import Row
from sweeps.trials import Trial
from tests.factories import save_checkpoint, settings

ROW = Row("base", "base", "base", "base", {})
IN_PROCESS = TrialResources(use_gpu=False, cpus_per_worker=1, num_workers=1, in_process=True)


def test_num_devices_counts_gpus_or_the_cpus_of_all_workers():
    assert TrialResources(use_gpu=True, cpus_per_worker=7, num_workers=3, in_process=False).num_devices == 3
    assert TrialResources(use_gpu=False, cpus_per_worker=7, num_workers=3, in_process=False).num_devices == 21


@pytest.mark.parametrize(("max_steps", "finished"), [(5, True), (20, False)])
def test_trial_with_more_steps_continues_the_shorter_one(tmp_path, monkeypatch, max_steps, finished):
    folders = {steps: tmp_path / f"checkpoints/grammar-mini-3-0123456789ab-{steps}" for steps in (5, 20)}
    save_checkpoint(folders[5], TrainState(step=5, finished=True))
    begun: list[Any] = []

    def training_run(*arguments: Any, **named: Any) -> None:
        begun.extend(arguments)
        raise InterruptedError

    monkeypatch.setattr(run, "training_run", training_run)
    trial = Trial(ROW, 3, settings(train={"max_steps": max_steps}), folders[max_steps], "key", "run key")
    with pytest.raises(InterruptedError):
        run._train_and_evaluate(trial, IN_PROCESS, Workspace(tmp_path, tmp_path, None, ""), "parent")
    assert [checkpoint.step_of(path) for path in checkpoint.folders(trial.folder)] == [5]
    assert begun[3] == trial.folder
    assert (begun[4] is not None) == finished


@pytest.mark.parametrize("continued", [False, True])
def test_trial_has_times_if_it_ran_without_interruption(tmp_path, monkeypatch, continued):
    parent = tmp_path / "checkpoints"
    trial = Trial(ROW, 3, settings(train={"max_steps": 20}), parent / "grammar-mini-3-0123456789ab-20", "", "")
    if continued:
        save_checkpoint(parent / "grammar-mini-3-0123456789ab-5", TrainState(step=5, finished=True))

    @contextmanager
    def training_run(*_: Any, **named: Any) -> Iterator[SimpleNamespace]:
        recorder = UsageRecorder(trial.folder, devices=1, on_gpus=False)
        recorder.count_step()
        recorder.close()
        yield SimpleNamespace(run_id="run")

    trained = dict.fromkeys(("parameters", "steps", "tokens", "tokens_per_second", "valid_ppl"), 1)
    monkeypatch.setattr(run, "training_run", training_run)
    monkeypatch.setattr(run, "write_model", lambda *_: trained)
    monkeypatch.setattr(run, "_evaluate", lambda *_: ({}, 0.0))
    monkeypatch.setattr(run, "flops_per_step", lambda *_: 1.0)
    record = run._train_and_evaluate(trial, IN_PROCESS, Workspace(tmp_path, tmp_path, None, ""), "parent")
    assert ("seconds" in record) != continued
    assert record["attempts"] == 1


def test_of_tune_is_all_of_a_trial_in_its_process_and_almost_nothing_of_a_driver(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "this_node_resource", lambda: "node:10.0.0.1")
    alone = TrialResources(use_gpu=True, cpus_per_worker=7, num_workers=1, in_process=True)
    assert alone.of_tune == {"cpu": 7, "gpu": 1}
    assert alone._replace(use_gpu=False).of_tune == {"cpu": 7, "gpu": 0}
    assert set(alone._replace(in_process=False).of_tune) == {"node:10.0.0.1"}
