"""What a sweep costs: FLOPs from the sizes of model and batches, hours at a rate that is stated or measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path

import torch

from model.flops import training_flops
from model.transformer import Transformer
from pipeline.common.paths import ENCODED
from pipeline.common.settings import Settings
from pipeline.data.batching import BatchPlan, collate
from pipeline.data.dataset import CorpusInfo, EncodedSplit
from pipeline.training import checkpoint
from pipeline.training.loop import summed_loss
from pipeline.training.trainer import batch_plan
from sweeps.trials import SweepPlan, Trial

MEASURED_S = 3.0


@dataclass(frozen=True)
class Cost:
    """One row, over all its seeds; `flops_to_run` are those of the trials that still have to run."""

    label: str
    parameters: int
    num_done: int
    num_to_run: int
    flops: float
    flops_to_run: float


def costs(sweep: SweepPlan, root: Path) -> list[Cost]:
    """Row by row, without those that are left out."""
    found = []
    for row in sweep.rows:
        trials = [trial for trial in sweep.trials if trial.row.id == row.id]
        if trials:
            first = trials[0].settings  # the others differ in the seed
            to_run = [trial for trial in trials if not is_done(trial)]
            per_step = flops_per_step(first, root)
            found.append(
                Cost(
                    row.label,
                    num_parameters(first, root),
                    num_done=len(trials) - len(to_run),
                    num_to_run=len(to_run),
                    flops=per_step * first.train.max_steps * len(trials),
                    flops_to_run=per_step * sum(map(_steps_left, to_run)),
                )
            )
    return found


def is_done(trial: Trial) -> bool:
    """Whether it need not run again: a failed trial gets another chance."""
    record = trial.record()
    return record is not None and record["status"] in ("finished", "stopped")


def _steps_left(trial: Trial) -> int:
    """Behind its newest checkpoint: base may be trained already, as the main run."""
    found = checkpoint.folders(trial.folder)
    done = int(found[-1].name.removeprefix("step_")) if found else 0
    return max(0, trial.settings.train.max_steps - done)


def num_parameters(settings: Settings, root: Path) -> int:
    with torch.device("meta"):
        model = Transformer(settings.model.config(CorpusInfo.open(root / ENCODED).vocab_size))
    return sum(p.numel() for p in model.parameters())


def flops_per_step(settings: Settings, root: Path) -> float:
    """The mean over an epoch's steps; padding counts, for it is computed too."""
    config = settings.model.config(CorpusInfo.open(root / ENCODED).vocab_size)
    micro_tokens = settings.hardware.micro_batch_tokens
    num_steps, shapes = _shapes(root / ENCODED, settings.train.batch_tokens, micro_tokens, config.max_length)
    return sum(training_flops(config, *shape) for shape in shapes) / num_steps


@cache
def _shapes(
    data: Path, batch_tokens: int, micro_batch_tokens: int, max_length: int
) -> tuple[int, list[tuple[int, int, int]]]:
    """Steps of an epoch, and (pairs, source positions, target positions) of each of its micro-batches."""
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
    """FLOPs per second that training of these settings reaches on one device (one thread, on a CPU) here."""
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
            loss.item()  # waits for a GPU
            if number == 2:  # what came before warmed up
                flops, started = 0, time.perf_counter()
            else:
                pairs, length = batch.src.shape
                flops += training_flops(config, pairs, length, batch.tgt_in.shape[1])
            if number > 4 and time.perf_counter() - started > MEASURED_S:
                break
    finally:
        torch.set_num_threads(threads)
    return flops / (time.perf_counter() - started)


Measure = Callable[[Settings, Path, torch.device], float]


def render_plan(sweep: SweepPlan, root: Path, devices: int, gpu: bool, measure: Measure | None = None) -> str:
    """The plan for people, as Markdown: what the whole sweep costs, and what of it is still to run.

    `devices` is how many compute at once; `measure` (default: `measured_rate`) is asked for the rate of one if the
    settings state none.
    """
    found = costs(sweep, root)
    settings = sweep.base.sweep
    kind = "GPU" if gpu else "CPU core"
    flops, to_run = sum(cost.flops for cost in found), sum(cost.flops_to_run for cost in found)
    rate, source = settings.flops_per_second, "sweep.flops_per_second"
    if not rate and flops:
        rate, source = (
            (measure or measured_rate)(sweep.base, root, torch.device("cuda" if gpu else "cpu")),
            "measured here",
        )
    lines = [
        f"{sweep.base.tracking.experiment}: {len(found)} rows x {len(settings.seeds)} seeds, "
        f"{sum(cost.num_done for cost in found)} trials done, {sum(cost.num_to_run for cost in found)} to run",
        "",
        f"| row | parameters | trials | to run | FLOPs | {kind} hours |",
        "|---|---|---|---|---|---|",
    ]
    for cost in found:
        hours = f"{cost.flops / rate / 3600:.3f}" if rate else ""
        numbers = f"{cost.parameters:,} | {cost.num_done + cost.num_to_run} | {cost.num_to_run} | {cost.flops:.2g}"
        lines.append(f"| {cost.label} | {numbers} | {hours} |")
    lines += [f"| {row.label} | left out: {row.skipped} | | | | |" for row in sweep.rows if row.skipped]
    if not flops:
        return "\n".join(lines)

    def priced(flops: float) -> str:
        hours = flops / rate / 3600
        price = settings.price_per_device_hour
        money = f", {hours * price:.2f} at {price:g} an hour and {kind}" if price else ""
        return (
            f"{flops:.2g} FLOPs: {hours:.2f} {kind} hours, {_duration(hours / devices)} on {devices} at once{money}"
        )

    left = priced(to_run) if to_run else "nothing, all trials are done"
    lines += [
        "",
        f"The whole sweep: {priced(flops)}.",
        f"Still to run: {left}.",
        f"At {rate:.2g} FLOPs a second ({source}); starting trials and evaluating them comes on top.",
    ]
    return "\n".join(lines)


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 2 else f"{60 * hours:.0f} minutes"
