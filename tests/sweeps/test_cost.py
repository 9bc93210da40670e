"""The sweep's plan, compared with models that are built and micro-batches that are collated."""

import re
import sys
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.flops import training_flops
from model.transformer import Transformer
from pipeline.common.atomic_io import write_json
from pipeline.common.settings import Settings, load_settings
from pipeline.data.batching import BatchPlan, collate
from pipeline.data.dataset import EncodedSplit
from pipeline.training.loop import TrainState
from pipeline.training.run import WEIGHTS_CODE
from sweeps import cost, plan, report, run
from sweeps.cost import (
    costs,
    flops_per_step,
    has_results,
    is_done,
    measured_rate,
    num_parameters,
    render_plan,
    this_machine,
)
from sweeps.trials import EVALUATION_CODE, SweepPlan, load_sweep
from tests.factories import save_checkpoint, write_corpus
from tests.support.settings_files import NANO, copy_settings, edit

VOCAB = 29
CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project after the tokenize stage with a sweep of two seeds and two rows; a third row is skipped."""
    copy_settings(tmp_path)
    for file in (*EVALUATION_CODE, *WEIGHTS_CODE):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "data/clean").mkdir(parents=True)
    for split in ("valid", "test"):
        for language in ("en", "de"):
            (tmp_path / f"data/clean/{split}.{language}").touch()
    write_corpus(tmp_path / "data/encoded", longest=11, vocab_size=VOCAB, longest_tgt=17)
    edit(tmp_path, "train", seed=3, batch_tokens=170, max_steps=13)
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
    {"max_length": 13},  # some pairs are too long and left out
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
    base, half = costs(sweep, root)  # a quarter of d_k 14 is no whole number
    assert [row.id for row in sweep.rows if row.skipped] == ["B-dk16"]
    assert (base.label, half.label) == ("base", "B: d_k 7")
    assert base.flops == 2 * 13 * flops_per_step(sweep.base, root)
    assert half.flops == 2 * 13 * flops_per_step(with_model(sweep.base, d_k=7), root) < base.flops
    assert half.parameters == num_parameters(with_model(sweep.base, d_k=7), root) < base.parameters
    assert (base.num_done, base.num_to_train) == (half.num_done, half.num_to_train) == (0, 2)


def test_costs_leave_out_the_steps_that_checkpoints_have(root):
    sweep = load_sweep(root)
    first, second = (trial.folder for trial in sweep.trials if trial.row.id == "base")
    save_checkpoint(first, TrainState(step=13, finished=True))  # as in the train stage
    save_checkpoint(second, TrainState(step=5))
    base = costs(sweep, root)[0]
    assert (base.num_done, base.num_trained, base.num_to_train) == (0, 1, 1)
    assert base.flops_left == 8 * flops_per_step(sweep.base, root)
    assert base.flops == 26 * flops_per_step(sweep.base, root)


def test_costs_leave_out_the_steps_of_a_shorter_run_that_a_trial_continues(root):
    for trial in load_sweep(root).trials:
        save_checkpoint(trial.folder, TrainState(step=13, finished=True))
    edit(root, "train", max_steps=20)
    sweep = load_sweep(root)
    assert not any(trial.folder.exists() for trial in sweep.trials)
    base = costs(sweep, root)[0]
    assert (base.num_trained, base.num_to_train) == (0, 2)
    assert base.flops_left == 2 * 7 * flops_per_step(sweep.base, root)
    assert not any(trial.folder.exists() for trial in sweep.trials)


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
    assert (after.num_done, after.num_to_train) == ((1, 1) if done else (0, 2))
    assert (after.flops, after.flops_left) == (before.flops, before.flops / (2 if done else 1))
    assert other.num_to_train == 2


def test_render_plan_shows_the_full_cost_and_what_is_left_to_pay(root):
    edit(root, "sweep", price_per_device_hour=2.5)
    sweep = load_sweep(root)
    finish(sweep, {"base.3": "finished", "base.5": "failed", "B-dk32.3": "finished"})
    save_checkpoint(sweep.trials[-1].folder, TrainState(step=13, finished=True))
    lines = render_plan(sweep, root, devices=4, gpu=False).splitlines()
    base, half = costs(sweep, root)
    assert lines[0].endswith(": 2 rows x 2 seeds; trials: 2 done, 1 trained, 1 to train")
    assert cells(lines[2]) == ["row", "parameters", "trials", "to train", "FLOPs", "CPU h left"]
    parameters, hours = num_parameters(sweep.base, root), base.flops / 2 / 1e6 / 3600
    assert cells(lines[4]) == ["base", f"{parameters:,}", "2", "1", f"{base.flops:.2g}", f"{hours:.3g}"]
    assert cells(lines[5])[2:] == ["2", "0", f"{half.flops:.2g}", "0"]
    assert lines[7] == "Left out: B: d_k 3.5 (d_k 14 x 1/4 is d_k 3.5)."
    for line, name, flops in (
        (lines[8], "The whole sweep", base.flops + half.flops),
        (lines[9], "Still to train", base.flops / 2),
    ):
        hours = flops / 1e6 / 3600
        assert line == (
            f"{name}: {flops:.2g} FLOPs: {hours:.3g} CPU core hours, {60 * hours / 4:.0f} minutes on 4 at once, "
            f"{2.5 * hours:.2f} at 2.5 per CPU core hour."
        )
        assert 60 * hours > 4  # so that none of these is printed as zero
    assert lines[10] == "Rate: 1e+06 FLOPs a second, from sweep.flops_per_second."
    assert len(lines) == 12


def cells(line: str) -> list[str]:
    """Return the cells of a line of a table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_render_plan_counts_one_row_and_one_seed_in_the_singular(root):
    edit(root, "sweep", rows=[], seeds=[3], grid={"model.d_k": [14]})  # the row equals base, so it is left out
    assert ": 1 row x 1 seed; trials: 0 done" in render_plan(load_sweep(root), root, devices=1, gpu=False)


def test_render_plan_has_a_table_of_80_columns(root):
    edit(root, "sweep", rows=["heads", "positions", "dropout"])
    table = [line for line in render_plan(load_sweep(root), root, 1, gpu=False).splitlines() if line[0:1] == "|"]
    assert len(table) > 9
    assert {len(line) for line in table} == {len(table[0])}
    assert len(table[0]) <= 80


@pytest.mark.parametrize("seeds", [[3, 5], [5, 1]])
def test_render_plan_warns_that_base_is_trained_twice_and_names_the_way_out(root, seeds):
    edit(root, "sweep", seeds=seeds)
    edit(root, "train", seed=1)
    shown = render_plan(load_sweep(root), root, devices=1, gpu=False)
    line = (
        "train.seed is 1, but sweep.seeds has 3, 5: the run of the train stage is not used, and base is trained "
        "again. Add 1 to sweep.seeds, or set train.seed to 3."
    )
    assert (line in shown.splitlines()) == ("train.seed" in shown) == (seeds == [3, 5])


def test_render_plan_is_silent_about_a_base_that_is_trained_for_all_seeds(root):
    edit(root, "train", seed=1)
    sweep = load_sweep(root)
    finish(sweep, {"base.3": "finished"})
    save_checkpoint(sweep.trials[1].folder, TrainState(step=13, finished=True))
    assert "train.seed" not in render_plan(sweep, root, devices=1, gpu=False)


def test_render_plan_names_gpu_hours_and_no_price_if_none_is_set(root):
    plan = render_plan(load_sweep(root), root, devices=1, gpu=True)
    assert "GPU hours, " in plan
    assert "CPU" not in plan
    assert " per " not in plan


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
    assert lines[0].endswith("trials: 4 done, 0 trained, 0 to train")
    assert lines[8] == before[8]
    assert before[9] == before[8].replace("The whole sweep", "Still to train")
    assert lines[9] == "Still to train: nothing."


def test_render_plan_without_a_trial_has_no_cost(root, monkeypatch):
    edit(root, "sweep", flops_per_second=0.0)
    monkeypatch.setattr(cost, "measured_rate", lambda *_: pytest.fail("the rate is measured"))
    sweep = load_sweep(root)
    empty = replace(sweep, trials=[])
    assert render_plan(empty, root, devices=1, gpu=False).splitlines()[-1].startswith("Left out: B: d_k 3.5 (")


@pytest.mark.parametrize(("hours", "text"), [(2.04, "2.0 hours"), (1.9, "114 minutes"), (1 / 30, "2 minutes"),
                                             (0.033, "119 seconds"), (1 / 3600, "1 second")])  # fmt: skip
def test_duration_is_in_the_unit_that_has_two_digits(hours, text):
    assert cost._duration(hours) == text


# --- the rate (FLOPs a second)


@pytest.fixture
def unstated(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project with no rate in its settings. A measurement would give 7e6."""
    edit(root, "sweep", flops_per_second=0.0)
    monkeypatch.setattr(cost, "measured_rate", lambda settings, root, device: 7e6 if device == CPU else 0)
    return root


def rate_line(root: Path) -> str:
    lines = render_plan(load_sweep(root), root, devices=1, gpu=False).splitlines()
    return next(line for line in lines if line.startswith("Rate: "))


def use(folder: Path, steps: int, seconds: float, on_gpus: bool = False) -> None:
    """Write the usage of two devices as accounting.py does."""
    write_json(folder / "usage/1234.json", {"seconds": seconds, "devices": 2, "steps": steps, "on_gpus": on_gpus})


def test_render_plan_measures_a_rate_that_is_neither_stated_nor_known(unstated):
    base = load_sweep(unstated).trials[0]
    save_checkpoint(base.folder, TrainState(step=3))
    use(base.folder, steps=4, seconds=5.0)  # too short: most of it may be the start
    assert rate_line(unstated) == "Rate: 7e+06 FLOPs a second, from a measurement of 3 seconds here."


def test_render_plan_has_the_rate_of_the_train_stage(unstated):
    base = load_sweep(unstated).trials[0]
    save_checkpoint(base.folder, TrainState(step=13, finished=True))
    use(base.folder, steps=16, seconds=5.0)  # a kill lost three steps
    rate = 16 * flops_per_step(base.settings, unstated) / 10.0
    assert rate_line(unstated) == f"Rate: {rate:.2g} FLOPs a second, from the training of base, seed 3."
    use(base.folder, steps=16, seconds=5.0, on_gpus=True)
    assert "a measurement" in rate_line(unstated)


def test_render_plan_has_the_rate_of_the_shorter_run_that_a_trial_continues(unstated):
    base = load_sweep(unstated).trials[0]
    save_checkpoint(base.folder, TrainState(step=13, finished=True))
    use(base.folder, steps=13, seconds=5.0)
    edit(unstated, "train", max_steps=20)
    rate = 13 * flops_per_step(base.settings, unstated) / 10.0
    assert rate_line(unstated) == f"Rate: {rate:.2g} FLOPs a second, from the training of base, seed 3."


def test_render_plan_has_the_rate_of_trials_that_are_done(unstated):
    sweep = load_sweep(unstated)
    save_checkpoint(sweep.trials[0].folder, TrainState(step=13, finished=True))
    use(sweep.trials[0].folder, steps=13, seconds=1.0)  # the train stage, alone on the machine
    finish(sweep, {"base.5": "finished", "B-dk32.3": "finished"})
    for trial, seconds in zip(sweep.trials[1:3], (4.0, 9.0), strict=True):
        use(trial.folder, steps=13, seconds=seconds)
    rate = 13 * sum(flops_per_step(trial.settings, unstated) for trial in sweep.trials[1:3]) / 26.0
    assert rate_line(unstated) == (
        f"Rate: {rate:.2g} FLOPs a second, from the training of base, seed 5, and 1 other trial."
    )


def pull_results(root: Path, **changes: Any) -> dict[str, Any]:
    """Write data/sweep/trials.json with all trials, as after `dvc pull`."""
    sweep = load_sweep(root)
    finished = {"status": "finished", "metrics": {"valid_averaged_bleu": 1.0, "valid_averaged_ppl": 1.0,
                "test_bleu": 1.0}, "translations": "a.txt", "parameters": 1, "steps": 13, "tokens_per_second": 1.0,
                "device_hours": 0.25, "flops": 9e5, "attempts": 1}  # fmt: skip
    content = {
        "data": "grammar", "base_name": "nano", "date": "2026-11-28", "commit": "", "machine": this_machine(),
        "device": "cpu", "seeds": [3, 5], "price_per_device_hour": 0.0, "bleu_signature": "", "mlflow_parent": "",
        "base": {"data.tgt": "de"}, "rows": [asdict(row) for row in sweep.rows],
        "trials": [
            {"key": trial.key, "row": trial.row.id, "seed": trial.seed, "name": trial.name} | finished
            for trial in sweep.trials
        ],
    }  # fmt: skip
    write_json(root / "data/sweep/trials.json", content | changes)
    return content


@pytest.mark.parametrize(
    ("changes", "rate"),
    [({}, "1e+03 FLOPs a second, from base, seed 3, and 3 other trials in data/sweep."),
     ({"machine": "2 cores of another"}, "7e+06 FLOPs a second, from a measurement of 3 seconds here."),
     ({"device": "gpu"}, "7e+06 FLOPs a second, from a measurement of 3 seconds here.")],
)  # fmt: skip
def test_render_plan_has_the_rate_of_results_that_a_machine_like_this_one_has_left(unstated, changes, rate):
    pull_results(unstated, **changes)
    assert rate_line(unstated) == f"Rate: {rate}"


def test_has_results_if_each_trial_has_one_by_its_key(root):
    assert not has_results(load_sweep(root), root)
    content = pull_results(root)
    assert has_results(load_sweep(root), root)
    assert not has_results(replace(load_sweep(root), trials=[]), root)
    content["trials"][-1] |= {"status": "failed"}
    write_json(root / "data/sweep/trials.json", content)
    assert not has_results(load_sweep(root), root)
    pull_results(root)
    edit(root, "train", max_steps=14)
    assert not has_results(load_sweep(root), root)


def test_main_prints_that_dvc_runs_nothing_if_all_results_exist(root, monkeypatch, capsys):
    pull_results(root)
    run_main(root, monkeypatch, "--seeds", "3")
    expected = "data/sweep has the results of all trials: `dvc repro` runs none, unless `dvc status sweep`"
    assert capsys.readouterr().out.startswith(expected)
    run_main(root, monkeypatch, "--seeds", "3", "7")
    assert "dvc repro" not in capsys.readouterr().out
    finish(load_sweep(root), {trial.id: "finished" for trial in load_sweep(root).trials})
    run_main(root, monkeypatch)
    assert "dvc repro" not in capsys.readouterr().out


@pytest.mark.parametrize("module", [plan, report, run], ids=lambda module: module.__name__)
def test_help_fits_80_columns(module, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["sweeps", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 9
    assert [line for line in lines if len(line) > 80] == []


def test_measured_rate_is_flops_after_the_warm_up_per_second(root, monkeypatch):
    ticks = count(100.0, 5.0)  # each reading of the clock is 5 seconds later
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    settings = load_sweep(root).base
    steps, split = batch_plan(settings, root, settings.train.batch_tokens)
    batches = [indices for step in steps.steps(0) for indices in step]
    timed = sum(flops_of(settings, split, indices) for indices in batches[3:6])
    threads = torch.get_num_threads()
    # the clock is read after the warm-up, after the third counted batch, and at the end
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
        "plan: hardware.device is gpu, but this machine has no GPU: set the rate of one in "
    )


def test_main_plans_other_rows_seeds_and_models_than_those_of_params(root, monkeypatch, capsys):
    run_main(root, monkeypatch, "--rows", "heads", "dropout", "--seeds", "7", "8", "9", "--model", "tiny")
    shown = capsys.readouterr().out
    assert "rows x 3 seeds; trials: 0 done, " in shown
    rows = {cells(line)[0]: cells(line)[1:4] for line in shown.splitlines() if line.startswith("| ")}
    assert {"A: 2 heads", "D: dropout 0.0"} < rows.keys()
    assert "B: d_k 7" not in rows
    tiny = load_settings(root, model="tiny")
    assert rows["base"] == [f"{num_parameters(tiny, root):,}", "3", "3"]
    run_main(root, monkeypatch, "--seeds", "7")
    assert "| B: d_k 7 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--rows", "colour"), "plan: sweep.rows must be one of A, B, "),
        (("--seeds", "1", "1"), "sweep.seeds must be a list of different numbers"),
        (("--model", "huge"), "model must be one of base, big, mini, tiny, got 'huge'"),
    ],
)
def test_main_names_an_impossible_option_of_the_command_line(root, monkeypatch, capsys, arguments, line):
    with pytest.raises(SystemExit):
        run_main(root, monkeypatch, *arguments)
    assert line in capsys.readouterr().err


def test_main_ends_with_one_line_for_a_fault_in_the_settings(root, monkeypatch, capsys):
    edit(root, "sweep", rows=["colour"])
    with pytest.raises(SystemExit):
        run_main(root, monkeypatch)
    assert "params.yaml: sweep.rows must be one of A, B, " in capsys.readouterr().err
