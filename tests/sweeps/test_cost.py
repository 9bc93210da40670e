"""The plan against models that are really built and micro-batches that are really collated."""

import re
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.flops import training_flops
from model.transformer import Transformer
from pipeline.common.settings import Settings, load_settings
from pipeline.data.batching import BatchPlan, collate
from pipeline.data.dataset import EncodedSplit
from pipeline.training.run import WEIGHTS_CODE
from sweeps import cost, plan
from sweeps.cost import costs, flops_per_step, is_done, measured_rate, num_parameters, render_plan
from sweeps.trials import EVALUATION_CODE, SweepPlan, load_sweep
from tests.factories import write_corpus
from tests.support.settings_files import NANO, copy_settings, edit

VOCAB = 29
CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project after the tokenize stage, with a sweep of two rows and one that is left out, two seeds."""
    copy_settings(tmp_path)
    for file in (*EVALUATION_CODE, *WEIGHTS_CODE):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "data/clean").mkdir(parents=True)
    for split in ("valid", "test"):
        for language in ("en", "de"):
            (tmp_path / f"data/clean/{split}.{language}").touch()
    write_corpus(tmp_path / "data/encoded", longest=11, vocab_size=VOCAB, longest_tgt=17)
    edit(tmp_path, "train", batch_tokens=170, max_steps=13)
    edit(tmp_path, "model", **NANO | {"d_k": 14})
    edit(tmp_path, "hardware", micro_batch_tokens=53, device="cpu")
    edit(tmp_path, "sweep", rows=["d_k"], seeds=[3, 5], flops_per_second=1e6)
    return tmp_path


def with_model(settings: Settings, **changes: Any) -> Settings:
    return replace(settings, model=replace(settings.model, **changes))


def batch_plan(settings: Settings, root: Path, batch_tokens: int) -> tuple[BatchPlan, EncodedSplit]:
    split = EncodedSplit.open(root / "data/encoded", "train")
    limits = {"micro_batch_tokens": settings.hardware.micro_batch_tokens, "max_length": settings.model.max_length}
    return BatchPlan(split.src.lengths, split.tgt.lengths, batch_tokens=batch_tokens, seed=0, **limits), split


def flops_of(settings: Settings, split: EncodedSplit, indices: np.ndarray) -> int:
    batch = collate(split, indices)
    assert batch.tgt_in.shape == batch.tgt_out.shape
    return training_flops(settings.model.config(VOCAB), *batch.src.shape, batch.tgt_in.shape[1])


def finish(sweep: SweepPlan, statuses: dict[str, str]) -> None:
    for trial in sweep.trials:
        if trial.id in statuses:
            trial.write_record({"status": statuses[trial.id]})


CHANGES: list[dict[str, Any]] = [
    {},
    {"d_k": 5, "num_heads": 3, "d_v": 7},
    {"num_layers": 3, "d_model": 22, "d_ff": 37},
    {"positions": "relative"},
    {"positions": "learned", "norm": "pre"},
    {"max_length": 13},  # leaves pairs out
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_flops_per_step_is_the_mean_over_an_epoch_of_micro_batches(root, changes):
    settings = with_model(load_sweep(root).base, **changes)
    steps, split = batch_plan(settings, root, settings.train.batch_tokens)
    assert (steps.num_skipped > 0) == (changes == {"max_length": 13})
    epoch = steps.steps(0)
    assert len(epoch) > 2
    assert max(len(step) for step in epoch) > 1
    flops = sum(flops_of(settings, split, indices) for step in epoch for indices in step)
    assert flops_per_step(settings, root) == pytest.approx(flops / len(epoch), rel=1e-12)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_num_parameters_is_that_of_the_model_built(root, changes):
    settings = with_model(load_sweep(root).base, **changes)
    model = Transformer(settings.model.config(VOCAB))
    assert num_parameters(settings, root) == sum(p.numel() for p in model.parameters())


def test_costs_of_a_row_are_all_its_steps_with_every_seed(root):
    sweep = load_sweep(root)
    base, half = costs(sweep, root)  # a quarter of d_k 14 cannot be
    assert [row.id for row in sweep.rows if row.skipped] == ["B-dk16"]
    assert (base.label, half.label) == ("base", "B: d_k 7")
    assert base.flops == 2 * 13 * flops_per_step(sweep.base, root)
    assert half.flops == 2 * 13 * flops_per_step(with_model(sweep.base, d_k=7), root) < base.flops
    assert half.parameters == num_parameters(with_model(sweep.base, d_k=7), root) < base.parameters
    assert (base.num_done, base.num_to_run) == (half.num_done, half.num_to_run) == (0, 2)


def test_costs_to_run_leave_out_the_steps_that_checkpoints_have(root):
    sweep = load_sweep(root)
    first, second = (trial.folder for trial in sweep.trials if trial.row.id == "base")
    (first / "step_00000013").mkdir(parents=True)  # trained already, as the main run
    (second / "step_00000005").mkdir(parents=True)
    base = costs(sweep, root)[0]
    assert base.flops_to_run == 8 * flops_per_step(sweep.base, root)
    assert (base.num_to_run, base.flops) == (2, 26 * flops_per_step(sweep.base, root))


def test_costs_grow_with_max_steps(root):
    edit(root, "sweep", grid={"train.max_steps": [39]})
    base, _, longer = costs(load_sweep(root), root)
    assert longer.flops == 3 * base.flops


@pytest.mark.parametrize(
    ("status", "done"), [("finished", True), ("stopped", True), ("failed", False), ("unfinished", False)]
)
def test_is_done_if_finished_or_stopped_but_not_if_failed(root, status, done):
    sweep = load_sweep(root)
    before = costs(sweep, root)[0]
    finish(sweep, {"base.5": status})
    assert [is_done(trial) for trial in sweep.trials] == [False, done, False, False]
    after, other = costs(sweep, root)
    assert (after.num_done, after.num_to_run) == ((1, 1) if done else (0, 2))
    assert (after.flops, after.flops_to_run) == (before.flops, before.flops / (2 if done else 1))
    assert other.num_to_run == 2


def test_render_plan_shows_what_all_costs_and_what_is_still_to_pay(root):
    edit(root, "sweep", price_per_device_hour=2.5)
    sweep = load_sweep(root)
    finish(sweep, {"base.3": "finished", "base.5": "failed", "B-dk32.3": "finished", "B-dk32.5": "finished"})
    lines = render_plan(sweep, root, devices=4, gpu=False).splitlines()
    base, half = costs(sweep, root)
    hours = base.flops / 1e6 / 3600
    assert lines[0].endswith(": 2 rows x 2 seeds, 3 trials done, 1 to run")
    assert lines[2] == "| row | parameters | trials | to run | FLOPs | CPU core hours |"
    parameters = num_parameters(sweep.base, root)
    assert lines[4] == f"| base | {parameters:,} | 2 | 1 | {base.flops:.2g} | {hours:.3f} |"
    assert lines[5].startswith("| B: d_k 7 | ")
    assert lines[5].endswith(f" | 2 | 0 | {half.flops:.2g} | {half.flops / 1e6 / 3600:.3f} |")
    assert lines[6] == "| B: d_k 3.5 | left out: d_k 14 x 1/4 is d_k 3.5 | | | | |"
    assert lines[7] == ""
    for line, name, flops in (
        (lines[8], "The whole sweep", base.flops + half.flops),
        (lines[9], "Still to run", base.flops / 2),
    ):
        hours = flops / 1e6 / 3600
        assert line == (
            f"{name}: {flops:.2g} FLOPs: {hours:.2f} CPU core hours, {60 * hours / 4:.0f} minutes on 4 at once, "
            f"{2.5 * hours:.2f} at 2.5 an hour and CPU core."
        )
        assert 60 * hours > 4  # so that none of these is a zero
    assert lines[10].startswith("At 1e+06 FLOPs a second (sweep.flops_per_second); ")
    assert len(lines) == 11


def test_render_plan_names_gpu_hours_and_no_price_if_none_is_set(root):
    plan = render_plan(load_sweep(root), root, devices=1, gpu=True)
    assert "GPU hours, " in plan
    assert "CPU" not in plan
    assert " an hour" not in plan


def test_render_plan_of_twice_the_devices_takes_half_the_time_at_equal_cost(root):
    edit(root, "sweep", price_per_device_hour=2.5, flops_per_second=1e4)
    one, two = (render_plan(load_sweep(root), root, devices, gpu=False) for devices in (1, 2))
    hours = [float(re.search(r"([\d.]+) hours on", plan)[1]) for plan in (one, two)]
    assert hours[0] == pytest.approx(2 * hours[1], abs=0.11)
    assert one.partition("at once")[2].partition(".")[0] == two.partition("at once")[2].partition(".")[0]


def test_render_plan_of_a_finished_sweep_has_its_full_cost(root):
    sweep = load_sweep(root)
    before = render_plan(sweep, root, devices=1, gpu=False).splitlines()
    finish(sweep, {trial.id: "finished" for trial in sweep.trials})
    lines = render_plan(sweep, root, devices=1, gpu=False).splitlines()
    assert lines[0].endswith("4 trials done, 0 to run")
    assert lines[8] == before[8]
    assert (lines[9], before[9]) == (
        "Still to run: nothing, all trials are done.", before[8].replace("The whole sweep", "Still to run")
    )  # fmt: skip


def test_render_plan_without_a_trial_has_no_cost(root, monkeypatch):
    edit(root, "sweep", flops_per_second=0.0)
    monkeypatch.setattr(cost, "measured_rate", lambda *_: pytest.fail("measured"))
    sweep = load_sweep(root)
    empty = replace(sweep, trials=[])
    assert render_plan(empty, root, devices=1, gpu=False).splitlines()[-1].startswith("| B: d_k 3.5 | left out")


def test_render_plan_measures_a_rate_that_is_not_stated(root, monkeypatch):
    edit(root, "sweep", flops_per_second=0.0)
    monkeypatch.setattr(cost, "measured_rate", lambda settings, root, device: 7e6 if device == CPU else 0)
    assert "At 7e+06 FLOPs a second (measured here)" in render_plan(load_sweep(root), root, devices=1, gpu=False)


def test_measured_rate_is_flops_after_the_warm_up_per_second(root, monkeypatch):
    ticks = count(100.0, 5.0)  # every look at the clock is 5 seconds after the last
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    settings = load_sweep(root).base
    steps, split = batch_plan(settings, root, settings.train.batch_tokens)
    batches = [indices for step in steps.steps(0) for indices in step]
    timed = sum(flops_of(settings, split, indices) for indices in batches[3:6])
    threads = torch.get_num_threads()
    # clock: after the warm-up, after the third batch that counts, at the end
    assert measured_rate(settings, root, CPU) == pytest.approx(timed / 10.0, rel=1e-12)
    assert torch.get_num_threads() == threads


def run_main(root: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["cost", *arguments])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    plan.main()


def test_main_prints_the_plan_of_the_folder_it_runs_in(root, monkeypatch, capsys):
    run_main(root, monkeypatch, "--devices", "8")
    assert capsys.readouterr().out == render_plan(load_sweep(root), root, devices=8, gpu=False) + "\n"


def test_main_plans_for_a_gpu_elsewhere_if_its_rate_is_stated(root, monkeypatch, capsys):
    edit(root, "hardware", device="gpu")
    run_main(root, monkeypatch, "--devices", "8")
    assert "GPU hours" in capsys.readouterr().out
    edit(root, "sweep", flops_per_second=0.0)
    with pytest.raises(SystemExit):
        run_main(root, monkeypatch)
    assert capsys.readouterr().err.startswith(
        "plan: hardware.device is gpu and there is none here: state its rate in "
    )


def test_main_plans_other_rows_seeds_and_models_than_those_of_params(root, monkeypatch, capsys):
    run_main(root, monkeypatch, "--rows", "heads", "dropout", "--seeds", "7", "8", "9", "--model", "tiny")
    said = capsys.readouterr().out
    assert "rows x 3 seeds, 0 trials done, " in said
    assert "| A: 2 heads | " in said
    assert "| D: dropout 0.0 | " in said
    assert "d_k 7" not in said
    tiny = load_settings(root, model="tiny")
    assert f"| base | {num_parameters(tiny, root):,} | 3 | 3 | " in said
    run_main(root, monkeypatch, "--seeds", "7")
    assert "| B: d_k 7 | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--rows", "colour"), "plan: sweep.rows must be one of A, B, "),
        (("--seeds", "1", "1"), "sweep.seeds must be a list of different numbers"),
        (("--model", "huge"), "model must be one of base, big, mini, tiny, got 'huge'"),
    ],
)
def test_main_names_what_the_command_line_cannot_ask_for(root, monkeypatch, capsys, arguments, line):
    with pytest.raises(SystemExit):
        run_main(root, monkeypatch, *arguments)
    assert line in capsys.readouterr().err


def test_main_ends_with_one_line_for_a_fault_in_the_settings(root, monkeypatch, capsys):
    edit(root, "sweep", rows=["colour"])
    with pytest.raises(SystemExit):
        run_main(root, monkeypatch)
    assert "params.yaml: sweep.rows must be one of A, B, " in capsys.readouterr().err
