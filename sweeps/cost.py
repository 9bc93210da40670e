"""Compute the cost of a sweep.

FLOPs follow from the sizes of model and batches. Hours are FLOPs divided by a rate, which is set by the user, known
from earlier training, or measured.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from model.flops import training_flops
from model.transformer import Transformer
from pipeline.cluster.accounting import total_usage
from pipeline.common.machine import machine_name
from pipeline.common.paths import ENCODED, SWEEP
from pipeline.common.settings import Settings
from pipeline.data.batching import BatchPlan, collate
from pipeline.data.dataset import CorpusInfo, EncodedSplit
from pipeline.training.loop import summed_loss
from pipeline.training.siblings import start_of, steps_left
from pipeline.training.trainer import batch_plan
from sweeps.record import read_trials
from sweeps.render import Table, amount, counted, markdown_table
from sweeps.trials import SweepPlan, Trial

MEASURED_S = 3.0
DONE = ("finished", "stopped")
"""The statuses of trials that need not run again."""


@dataclass(frozen=True)
class Cost:
    """The cost of one row over all its seeds. `num_trained` trials only need evaluation; `flops_left` is for the
    steps that are not trained yet."""

    label: str
    parameters: int
    num_done: int
    num_trained: int
    num_to_train: int
    flops: float
    flops_left: float

    @property
    def num_trials(self) -> int:
        return self.num_done + self.num_trained + self.num_to_train


@dataclass(frozen=True)
class Rate:
    """FLOPs per second of one device, and the source of the figure."""

    flops_per_second: float
    source: str


def costs(sweep: SweepPlan, root: Path) -> list[Cost]:
    """The cost of each row, without skipped rows."""
    found = []
    for row in sweep.rows:
        trials = [trial for trial in sweep.trials if trial.row.id == row.id]
        if trials:
            first = trials[0].settings  # the others differ only in the seed
            left = [steps_left(trial.folder, trial.settings.train) for trial in trials if not is_done(trial)]
            per_step = flops_per_step(first, root)
            found.append(
                Cost(
                    row.label,
                    num_parameters(first, root),
                    num_done=len(trials) - len(left),
                    num_trained=left.count(0),
                    num_to_train=len(left) - left.count(0),
                    flops=per_step * first.train.max_steps * len(trials),
                    flops_left=per_step * sum(left),
                )
            )
    return found


def is_done(trial: Trial) -> bool:
    """Whether the trial is done, so that it is not run again. Failed trials are not: they are tried again."""
    record = trial.record()
    return record is not None and record["status"] in DONE


def has_results(sweep: SweepPlan, root: Path) -> bool:
    """Whether data/sweep has a result of every trial, as after `dvc pull`, so that DVC need not run the sweep."""
    keys = {trial["key"] for trial in _results(root)["trials"]}
    return bool(sweep.trials) and keys.issuperset(trial.key for trial in sweep.trials)


def _results(root: Path) -> dict[str, Any]:
    """trials.json of data/sweep with only the trials that have a result; with none if the file cannot be read."""
    try:
        content = read_trials(root / SWEEP / "trials.json")
    except ValueError:
        return {"trials": []}
    done = [trial for trial in content["trials"] if trial["status"] in DONE and "key" in trial]
    return content | {"trials": done}


def num_parameters(settings: Settings, root: Path) -> int:
    with torch.device("meta"):
        model = Transformer(settings.model.config(CorpusInfo.open(root / ENCODED).vocab_size))
    return sum(p.numel() for p in model.parameters())


def flops_per_step(settings: Settings, root: Path) -> float:
    """Training FLOPs per step, as the mean over an epoch. Padding counts, because it is computed too."""
    config = settings.model.config(CorpusInfo.open(root / ENCODED).vocab_size)
    micro_tokens = settings.hardware.micro_batch_tokens
    num_steps, shapes = _shapes(root / ENCODED, settings.train.batch_tokens, micro_tokens, config.max_length)
    return sum(training_flops(config, *shape) for shape in shapes) / num_steps


@cache
def _shapes(
    data: Path, batch_tokens: int, micro_batch_tokens: int, max_length: int
) -> tuple[int, list[tuple[int, int, int]]]:
    """The steps of an epoch, and (pairs, source positions, target positions) of each of its micro-batches."""
    split = EncodedSplit.open(data, "train")
    src, tgt = split.src.lengths + 1, split.tgt.lengths + 1  # end of sentence
    plan = BatchPlan(
        split.src.lengths,
        split.tgt.lengths,
        batch_tokens=batch_tokens,
        micro_batch_tokens=micro_batch_tokens,
        max_length=max_length,
        seed=0,
    )
    micro_batches = [indices for step in plan.steps(0) for indices in step]
    return plan.num_steps, [(len(i), int(src[i].max()), int(tgt[i].max())) for i in micro_batches]


def measured_rate(settings: Settings, root: Path, device: torch.device) -> float:
    """FLOPs per second of training with these settings on one device of this machine: a GPU, or one CPU thread."""
    data = root / ENCODED
    config = settings.model.config(CorpusInfo.open(data).vocab_size)
    split = EncodedSplit.open(data, "train")
    plan = batch_plan(split, settings.with_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, bf16 = Transformer(config).to(device), settings.hardware.precision == "bf16"
    flops, started = 0, 0.0
    try:
        for number, indices in enumerate(cycle(indices for step in plan.steps(0)[:50] for indices in step)):
            batch = collate(split, indices)
            loss = summed_loss(model, batch, settings.train.label_smoothing, device, bf16=bf16)
            loss.backward()
            loss.item()  # waits until the GPU has finished
            if number == 2:  # the first three micro-batches are the warm-up
                flops, started = 0, time.perf_counter()
            else:
                pairs, length = batch.src.shape
                flops += training_flops(config, pairs, length, batch.tgt_in.shape[1])
            if number > 4 and time.perf_counter() - started > MEASURED_S:
                break
    finally:
        torch.set_num_threads(threads)
    return flops / (time.perf_counter() - started)


def known_rate(sweep: SweepPlan, root: Path, gpu: bool) -> Rate | None:
    """The rate of earlier training on devices of this kind, including validation and checkpoints.

    It is taken from the first of these that exists: trials that are done; finished training runs that a trial uses or
    continues (of the train stage, or of fewer steps); trials in data/sweep that ran on a machine like this one. None
    if there are none.
    """
    done = ((trial, trial.folder) for trial in sweep.trials if is_done(trial))
    starts = ((trial, start_of(trial.folder, trial.settings.train)) for trial in sweep.trials)
    trained = ((trial, start[0].parent) for trial, start in starts if start and start[1].finished)
    for trials in (done, trained):
        flops, seconds, names = 0.0, 0.0, []
        for trial, folder in trials:
            used = total_usage(folder)
            if used.steps and used.device_seconds > 0 and used.on_gpus == gpu:
                flops += used.steps * flops_per_step(trial.settings, root)
                seconds += used.device_seconds
                names.append(trial.name)
        if names:
            return Rate(flops / seconds, f"the training of {_listed(names)}")
    results, keys = _results(root), {trial.key for trial in sweep.trials}
    ours = [trial for trial in results["trials"] if trial["key"] in keys and trial.get("device_hours")]
    if ours and results["machine"] == this_machine() and results["device"] == ("gpu" if gpu else "cpu"):
        seconds = sum(3600 * trial["device_hours"] for trial in ours)
        names = [trial["name"] for trial in ours]
        return Rate(sum(trial["flops"] for trial in ours) / seconds, f"{_listed(names)} in {SWEEP}")
    return None


def _listed(names: Sequence[str]) -> str:
    return f"{names[0]}, and {counted(len(names) - 1, 'other trial')}" if len(names) > 1 else names[0]


def this_machine() -> str:
    gpus = torch.cuda.device_count()
    return f"{gpus} x {torch.cuda.get_device_name()}" if gpus else machine_name()


Measure = Callable[[Settings, Path, torch.device], float]


def render_plan(sweep: SweepPlan, root: Path, devices: int, gpu: bool, measure: Measure | None = None) -> str:
    """The plan as Markdown: the cost of the whole sweep, and of the training that is left.

    `devices` is the number of devices that compute at once. Their rate is that of the settings, else `known_rate`,
    else the result of `measure` (default: `measured_rate`).
    """
    found = costs(sweep, root)
    settings = sweep.base.sweep
    kind = "GPU" if gpu else "CPU core"
    done, trained, to_train = (
        sum(getattr(cost, key) for cost in found) for key in ("num_done", "num_trained", "num_to_train")
    )
    lines = [
        f"{sweep.base.tracking.experiment}: {counted(len(found), 'row')} x {counted(len(settings.seeds), 'seed')}; "
        f"trials: {done} done, {trained} trained, {to_train} to train"
    ]
    if line := _seed_line(sweep):
        lines += ["", line]
    left_out = [f"Left out: {row.label} ({row.skipped})." for row in sweep.rows if row.skipped]
    if not found:
        return "\n".join([*lines, *left_out])
    if settings.flops_per_second:
        rate = Rate(settings.flops_per_second, "sweep.flops_per_second")
    elif known := known_rate(sweep, root, gpu):
        rate = known
    else:
        measured = (measure or measured_rate)(sweep.base, root, torch.device("cuda" if gpu else "cpu"))
        rate = Rate(measured, f"a measurement of {MEASURED_S:.0f} seconds here")

    def hours(flops: float) -> float:
        return flops / rate.flops_per_second / 3600

    def priced(flops: float) -> str:
        price = settings.price_per_device_hour
        money = f", {hours(flops) * price:.2f} at {price:g} per {kind} hour" if price else ""
        duration = _duration(hours(flops) / devices)
        return f"{flops:.2g} FLOPs: {amount(hours(flops))} {kind} hours, {duration} on {devices} at once{money}"

    rows = [
        [
            cost.label, f"{cost.parameters:,}", f"{cost.num_trials}", f"{cost.num_to_train}", f"{cost.flops:.2g}",
            amount(hours(cost.flops_left)),
        ]
        for cost in found
    ]  # fmt: skip
    head = ["row", "parameters", "trials", "to train", "FLOPs", "GPU h left" if gpu else "CPU h left"]
    flops, left = sum(cost.flops for cost in found), sum(cost.flops_left for cost in found)
    lines += [
        "",
        markdown_table(Table(head, "<>>>>>", rows)),
        "",
        *left_out,
        f"The whole sweep: {priced(flops)}.",
        f"Still to train: {priced(left) if left else 'nothing'}.",
        f"Rate: {rate.flops_per_second:.2g} FLOPs a second, from {rate.source}.",
        "Not included: starting the trials and evaluating them.",
    ]
    return "\n".join(lines)


def _seed_line(sweep: SweepPlan) -> str | None:
    """A warning, with the way out, if the sweep trains base again after the train stage; otherwise None."""
    own, seeds = sweep.base.train.seed, sweep.base.sweep.seeds
    of_base = [trial for trial in sweep.trials if trial.row.group == "base" and not is_done(trial)]
    if own in seeds or not any(steps_left(trial.folder, trial.settings.train) for trial in of_base):
        return None
    return (
        f"train.seed is {own}, but sweep.seeds has {', '.join(map(str, seeds))}: the run of the train stage is not "
        f"used, and base is trained again. Add {own} to sweep.seeds, or set train.seed to {seeds[0]}."
    )


def _duration(hours: float) -> str:
    if hours >= 2:
        return f"{hours:.1f} hours"
    return counted(round(60 * hours), "minute") if hours >= 1 / 30 else counted(round(3600 * hours), "second")
