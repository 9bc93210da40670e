"""What one training run takes on many devices, before it starts: hours, money, network, and what limits it.

    python -m tools.cost_model                                  base and big on 1, 8, 64 and 512 H100s
    python -m tools.cost_model --model big --gpu A100 --gpus 8 16 --network-gbit 400
    python -m tools.cost_model --gpu P100 --mfu 0.31 --gpus 8   the paper's machine

The global batch is the preset's whatever the number of devices, so that the experiment stays the same. Arithmetic
is counted by model/flops.py; rates of GPUs and networks are assumptions, named here; the rest was measured.
docs/scale.md goes through the numbers. What a whole sweep costs, `python -m sweeps.cost` says.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.flops import training_flops
from model.loss import CHUNK_LOGITS_GPU
from model.transformer import Transformer
from pipeline.common.settings import load_settings, require
from pipeline.data.batching import MIN_MICRO_BATCHES, easily_shared

VOCAB_SIZE = 37_000
LENGTH = 30
"""Assumed mean pieces of a WMT 2014 En-De sentence on either side, end of sentence counted."""
PAIRS = 4_500_000
NETWORK_SHARE = 0.8
"""Assumed: what an all-reduce reaches of a network's rate."""
RESTART_S = 60.0
"""Assumed: from the end of a machine to the first step of its replacement, beside reading the checkpoint."""
WRITER_PAUSE_S = 1.0
"""Between two calls of MetricWriter: points that come faster share a call."""
LARGE_SHARE = 0.15
"""Of a step: what takes more is worth a setting."""
CHECKPOINT_S = 600.0
"""Between checkpoints, when they cost too much: the paper's ten minutes (section 6.1)."""
PAPER = {"base": (8, 0.4, 12.0), "big": (8, 1.0, 84.0)}
"""Section 5.2: P100s, seconds a step, hours in all."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What `python tools/benchmarks/scale_constants.py` prints."""

    checkpoint_write_bytes_per_s: float  # by checkpoint.save: checksums and fsync in it
    checkpoint_load_bytes_per_s: float
    gloo_bytes_per_s: float  # sent by each of two processes of one machine
    mlflow_s_per_call: float  # of a server with one worker on SQLite
    mlflow_s_per_point: float  # on top, for every point of four metrics
    collate_tokens_per_s: float  # target tokens with their source, on one core
    epoch_plan_s_per_million: float  # pairs
    launches: float  # operators of a step of base on one micro-batch, the loss left out
    launches_per_chunk: float  # of the loss, for CHUNK_LOGITS_GPU logits


# On two cores of an AMD EPYC (Zen 3) that others use too, torch 2.13.0, 2026-11-21, launches two days later: the
# middle of three to six runs. They differ by a third, those of disk and gloo by a factor of two.
MEASURED = Measured(
    checkpoint_write_bytes_per_s=3.7e8,
    checkpoint_load_bytes_per_s=1.0e9,
    gloo_bytes_per_s=1.3e9,
    mlflow_s_per_call=0.013,
    mlflow_s_per_point=0.0005,
    collate_tokens_per_s=2.6e7,
    epoch_plan_s_per_million=0.2,
    launches=805,
    launches_per_chunk=14,
)


@dataclass(frozen=True)
class Card:
    """Assumed, from data sheets and round on-demand prices: dense peak, memory, what an all-reduce reaches between
    devices of one node (0.8 of NVLink's rate in one direction), dollars an hour."""

    flops_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    price: float


CARDS = {
    "P100": Card(9.5e12, 16e9, 64e9, 1.5),  # single precision: the paper's footnote to Table 2
    "A100": Card(312e12, 80e9, 240e9, 2.0),  # bf16, as those below
    "H100": Card(989e12, 80e9, 360e9, 3.0),
    "H200": Card(989e12, 141e9, 360e9, 4.0),
    "EPYC-core": Card(84.5e9, 4e9, MEASURED.gloo_bytes_per_s, 0.04),  # fp32; measured, the price apart
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """A preset of conf/model, in the numbers that decide what it takes."""

    name: str
    parameters: int
    flops_per_step: float
    batch_tokens: int  # target tokens a step; as many source tokens
    max_length: int
    steps: int
    log_every: int
    validate_every: int
    checkpoint_every: int
    keep_checkpoints: int

    @property
    def checkpoint_bytes(self) -> int:
        return 3 * 4 * self.parameters  # weights, two moments

    @property
    def corpus_bytes(self) -> int:
        return PAIRS * 2 * (2 * (LENGTH - 1) + 8)  # uint16 pieces without end of sentence, an int64 offset a side


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Raises ValueError that names the option, its value and what is allowed."""

    gpu: str
    gpus: int
    gpus_per_node: int
    network_gbit: float  # of a node
    mfu: float  # share of the peak that the arithmetic reaches: an assumption
    launch_us: float  # until the host has launched one operator: an assumption
    price: float  # dollars per device and hour

    def __post_init__(self) -> None:
        for option, value in (("gpus", self.gpus), ("gpus-per-node", self.gpus_per_node)):
            require(value >= 1, f"--{option}", value, ">= 1")
        require(self.gpu in CARDS, "--gpu", self.gpu, f"one of {', '.join(CARDS)}")
        require(0 < self.mfu <= 1, "--mfu", self.mfu, "in (0, 1]")
        require(self.network_gbit > 0, "--network-gbit", self.network_gbit, "> 0")
        require(self.launch_us >= 0, "--launch-us", self.launch_us, ">= 0")
        require(self.price >= 0, "--price", self.price, ">= 0")
        whole = self.gpus <= self.gpus_per_node or self.gpus % self.gpus_per_node == 0
        node = self.gpus_per_node
        require(whole, "--gpus", self.gpus, f"at most {node} (--gpus-per-node) or a multiple of {node}")

    @property
    def card(self) -> Card:
        return CARDS[self.gpu]

    @property
    def flops_per_s(self) -> float:
        """Of one device."""
        return self.mfu * self.card.flops_per_s

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def reduce_bytes_per_s(self) -> float:
        """A ring goes through every device of a node and leaves it once: its slowest link counts."""
        network = NETWORK_SHARE * self.network_gbit * 1e9 / 8
        return self.card.link_bytes_per_s if self.nodes == 1 else min(self.card.link_bytes_per_s, network)


def workload(model: str, root: Path = Path()) -> Work:
    """Of the preset `model` in `root`. Raises ValueError if there is none."""
    known = sorted(path.stem for path in (root / "conf/model").glob("*.yaml"))
    require(model in known or not known, "--model", model, f"one of {', '.join(known)}")
    settings = load_settings(root, model=model)
    config, t = settings.model.config(VOCAB_SIZE), settings.train
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(config).parameters())
    return Work(
        name=model,
        parameters=parameters,
        flops_per_step=training_flops(config, 1, LENGTH, LENGTH) * t.batch_tokens / LENGTH,
        batch_tokens=t.batch_tokens,
        max_length=settings.model.max_length,
        steps=t.max_steps,
        log_every=t.log_every,
        validate_every=t.validate_every,
        checkpoint_every=t.checkpoint_every,
        keep_checkpoints=t.keep_checkpoints,
    )


@dataclass(frozen=True)
class Plan:
    """One run of `work` on `cluster`, while `runs` such runs share one MLflow server. Seconds are of a step."""

    work: Work
    cluster: Cluster
    runs: int = 1
    measured: Measured = MEASURED

    @property
    def tokens_per_gpu(self) -> float:
        return self.work.batch_tokens / self.cluster.gpus

    @property
    def compute_s(self) -> float:
        return self.work.flops_per_step / (self.cluster.gpus * self.cluster.flops_per_s)

    @property
    def launches(self) -> tuple[float, float]:
        """Operators of a step: of all but the loss; of the loss, which makes logits in chunks."""
        chunks = self.tokens_per_gpu / (CHUNK_LOGITS_GPU // VOCAB_SIZE)
        gpus = self.cluster.gpus
        micro_batches = -(-easily_shared(max(gpus, MIN_MICRO_BATCHES)) // gpus)
        return self.measured.launches * micro_batches, self.measured.launches_per_chunk * chunks

    @property
    def launch_s(self) -> float:
        """What the host takes to launch them; a device that is done sooner waits for it."""
        return sum(self.launches) * self.cluster.launch_us / 1e6

    @property
    def reduce_bytes(self) -> float:
        """Sent by each device: the ring passes single-precision gradients on n - 1 times in parts of 1 / n, to sum
        them, and as often to tell all."""
        n = self.cluster.gpus
        return 2 * (n - 1) / n * 4 * self.work.parameters

    @property
    def save_s(self) -> float:
        """Of one checkpoint; all devices wait for the one that writes."""
        return self.work.checkpoint_bytes / self.measured.checkpoint_write_bytes_per_s

    @property
    def parts(self) -> dict[str, float]:
        """What a step is made of, one after the other, as the loop does it: nothing overlaps. All but launches
        are shared evenly."""
        epoch_steps = PAIRS * LENGTH / self.work.batch_tokens
        planning_s = self.measured.epoch_plan_s_per_million * PAIRS / 1e6 / epoch_steps
        return {
            "arithmetic": self.compute_s,
            "launches": max(0.0, self.launch_s - self.compute_s),
            "all-reduce": self.reduce_bytes / self.cluster.reduce_bytes_per_s,
            "data": self.tokens_per_gpu / self.measured.collate_tokens_per_s + planning_s,
            "checkpoints": self.save_s / self.work.checkpoint_every,
        }

    @property
    def step_s(self) -> float:
        return sum(self.parts.values())

    @property
    def hours(self) -> float:
        return self.work.steps * self.step_s / 3600

    @property
    def cost(self) -> float:
        return self.hours * self.cluster.gpus * self.cluster.price

    @property
    def lost_share(self) -> float:
        """Of the step: all but arithmetic."""
        return 1 - self.compute_s / self.step_s

    @property
    def network_bytes(self) -> float:
        """That leave a node in the whole run."""
        return self.reduce_bytes * self.work.steps if self.cluster.nodes > 1 else 0.0

    @property
    def points_per_s(self) -> float:
        """For MLflow, by one run."""
        return (1 / self.work.log_every + 1 / self.work.validate_every) / self.step_s

    @property
    def calls_per_s(self) -> float:
        """By one run."""
        return min(self.points_per_s, 1 / WRITER_PAUSE_S)

    @property
    def server_share(self) -> float:
        """Of the MLflow server's time, by all runs."""
        calls, points = self.calls_per_s, self.points_per_s
        return self.runs * (calls * self.measured.mlflow_s_per_call + points * self.measured.mlflow_s_per_point)

    @property
    def data_bytes_per_s(self) -> float:
        return self.work.corpus_bytes / PAIRS * self.work.batch_tokens / LENGTH / self.step_s

    @property
    def interruption_s(self) -> float:
        """Lost, on average, when a machine is taken away."""
        load_s = self.work.checkpoint_bytes / self.measured.checkpoint_load_bytes_per_s
        return self.work.checkpoint_every / 2 * self.step_s + load_s + RESTART_S

    @property
    def limits(self) -> list[str]:
        """What takes most of a step, then what else of it that is not arithmetic takes more than LARGE_SHARE; before
        them the MLflow server, if it is too slow for its runs."""
        parts = sorted(self.parts, key=self.parts.__getitem__, reverse=True)
        others = [p for p in parts[1:] if p != "arithmetic" and self.parts[p] > LARGE_SHARE * self.step_s]
        return ["MLflow"] * (self.server_share > 1) + [parts[0], *others]

    def setting(self, limit: str) -> str:
        """What to turn for it."""
        work, cluster = self.work, self.cluster
        if limit == "MLflow":
            log_every = work.log_every * -(-self.server_share // 0.5)
            return (
                f"train.log_every from {work.log_every:,} to {log_every:,.0f}, or a store that is faster than SQLite"
            )
        if limit == "arithmetic":
            more = self._larger()
            devices, step_ms = more.cluster.gpus, 1e3 * more.step_s
            if more.step_s < self.step_s:
                return f"hardware.num_workers up (with {devices:,} a step takes {_number(step_ms)} ms)"
            return f"nothing here: with {devices:,} devices a step would take {_number(step_ms)} ms"
        if limit == "data":
            return "hardware.num_workers up: each worker collates its own part"
        if limit == "checkpoints":
            every = f"from {work.checkpoint_every:,} to {_round(CHECKPOINT_S / self.step_s)}"
            return f"a faster disk, or train.checkpoint_every {every}, which changes what is averaged"
        layers, loss = self.launches
        if limit == "launches" and loss > layers:
            return "CHUNK_LOGITS_GPU of model/loss.py up: the loss makes most of the launches"
        # Nine parts of arithmetic to one of what does not shrink with the batch.
        fixed_s = self.parts["all-reduce"] + layers * cluster.launch_us / 1e6
        tokens = _round(work.batch_tokens * 9 * fixed_s / self.compute_s)
        fewer = cluster.gpus_per_node if cluster.nodes > 1 else 1
        return (
            f"hardware.num_workers down to {fewer}, {cluster.gpus // fewer} runs at once; or train.batch_tokens up "
            f"(at {tokens} a tenth is lost), another experiment"
        )

    def _larger(self) -> "Plan":
        """On twice the devices, as far as they go into whole nodes."""
        n, node = self.cluster.gpus, self.cluster.gpus_per_node
        return replace(self, cluster=replace(self.cluster, gpus=min(2 * n, node) if n < node else 2 * n))

    @property
    def advice(self) -> str:
        """The limit and its setting; then those others that ask for another setting."""
        lines: dict[str, str] = {}
        for limit in self.limits:
            share = "" if limit == "MLflow" else f" ({100 * self.parts[limit] / self.step_s:.0f}% of a step)"
            start = f"then {limit}{share}: " if lines else f"limit: {limit}{share}; turn: "
            lines.setdefault(self.setting(limit), start)
        return "; ".join(start + setting for setting, start in lines.items())


ROWS: dict[str, Callable[[Plan], float]] = {
    "hours": lambda plan: plan.hours,
    "device-hours": lambda plan: plan.hours * plan.cluster.gpus,
    "cost, $": lambda plan: plan.cost,
    "tokens a device and step, of each side": lambda plan: plan.tokens_per_gpu,
    "step, ms": lambda plan: 1e3 * plan.step_s,
    "- arithmetic": lambda plan: 1e3 * plan.parts["arithmetic"],
    "- waiting for launches": lambda plan: 1e3 * plan.parts["launches"],
    "- all-reduce": lambda plan: 1e3 * plan.parts["all-reduce"],
    "- data, collated and planned": lambda plan: 1e3 * plan.parts["data"],
    "- checkpoints": lambda plan: 1e3 * plan.parts["checkpoints"],
    "lost to all but arithmetic, %": lambda plan: 100 * plan.lost_share,
    "- to checkpoints, %": lambda plan: 100 * plan.parts["checkpoints"] / plan.step_s,
    "all-reduce, MB sent a device and step": lambda plan: plan.reduce_bytes / 1e6,
    "network, TB out of a node in all": lambda plan: plan.network_bytes / 1e12,
    "data read, MB/s": lambda plan: plan.data_bytes_per_s / 1e6,
    "MLflow, calls/s": lambda plan: plan.calls_per_s,
    "an interruption loses, s": lambda plan: plan.interruption_s,
}


def text(work: Work, cluster: Cluster, gpus: list[int]) -> str:
    """The plans of one preset as Markdown: one run on so many devices, or runs of a node each at once."""
    plans = [Plan(work, replace(cluster, gpus=n)) for n in gpus]
    lines = [
        _assumptions(plans[0]),
        "",
        *_table(f"one run of {work.name} on so many {cluster.gpu}", [f"{n:,}" for n in gpus], plans, ROWS),
        "",
        *(f"- {plan.cluster.gpus:,}: {plan.advice}." for plan in plans),
    ]
    short = [f"{n:,}" for n in gpus if work.batch_tokens / n < work.max_length]
    if short:
        lines.append(
            f"- {', '.join(short)}: a device's share of the batch is shorter than the longest sentence may be "
            f"(model.max_length is {work.max_length:,}): lower that, or some workers get nothing in a step."
        )
    node = cluster.gpus_per_node
    lines += [_side_by_side(Plan(work, replace(cluster, gpus=node), n // node)) for n in gpus if n > node]
    return "\n".join(lines)


def _side_by_side(plan: Plan) -> str:
    gpus, written = (
        plan.runs * plan.cluster.gpus,
        plan.work.checkpoint_bytes / plan.work.checkpoint_every / plan.step_s,
    )
    limit = f" {plan.advice}." if plan.server_share > 1 else ""
    return (
        f"- {gpus:,} as {plan.runs} runs of {plan.cluster.gpus} at once: {_round(24 * plan.runs / plan.hours)} runs "
        f"a day at ${_number(plan.cost)} each, {plan.runs * written / 1e9:.2g} GB/s of checkpoints, an MLflow server "
        f"{100 * plan.server_share:.0f}% busy (it takes {plan.runs / plan.server_share:.0f} of them).{limit}"
    )


def _round(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}"


def _assumptions(plan: Plan) -> str:
    work, cluster, card = plan.work, plan.cluster, plan.cluster.card
    launch_s = cluster.launch_us / 1e6
    # Of each token's arithmetic, what is left when the loss's launches for it are done, for all other launches.
    left_s = (plan.compute_s - plan.launches[1] * launch_s) / plan.tokens_per_gpu
    few = "any number of tokens"
    if left_s > 0:
        few = f"fewer than {plan.measured.launches * launch_s / left_s:,.0f} tokens"
    return (
        f"**{work.name}**: {work.parameters:,} parameters, {work.steps:,} steps of {work.batch_tokens:,} tokens of "
        f"each side, {work.flops_per_step * work.steps:.3g} FLOPs; {100 * cluster.mfu:g}% of "
        f"{cluster.gpu}'s {card.flops_per_s / 1e12:.3g} TFLOP/s; {_number(card.link_bytes_per_s / 1e9)} GB/s between "
        f"the {cluster.gpus_per_node} of a node, {NETWORK_SHARE:g} x {cluster.network_gbit:g} Gbit/s between nodes; "
        f"${cluster.price:g} an hour. Weights, gradients and Adam take {16 * work.parameters / 1e9:.1f} of "
        f"{card.memory_bytes / 1e9:g} GB, a checkpoint {work.checkpoint_bytes / 1e9:.2f} GB "
        f"({work.keep_checkpoints} are kept), the corpus {work.corpus_bytes / 1e9:.1f} GB on every node. "
        f"At {cluster.launch_us:g} us a launch, a device with {few} a micro-batch waits for the host."
    )


def _table(title: str, header: list[str], plans: list[Plan], rows: dict[str, Callable[[Plan], float]]) -> list[str]:
    return [
        f"| {title} | {' | '.join(header)} |",
        "|---|" + "---:|" * len(plans),
        *(f"| {label} | {' | '.join(_number(value(plan)) for plan in plans)} |" for label, value in rows.items()),
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def against_the_paper(work: Work) -> str:
    """What the paper's own run says of the share of the peak that its arithmetic reached."""
    gpus, step_s, hours = PAPER[work.name]
    peak = gpus * CARDS["P100"].flops_per_s
    theirs, ours = 3600 * hours * peak, work.flops_per_step * work.steps
    share = work.flops_per_step / step_s / peak
    cluster = Cluster(gpu="P100", gpus=gpus, gpus_per_node=gpus, network_gbit=100, mfu=share, launch_us=5, price=0)
    return (
        f"- {work.name}: {hours:g} hours x {gpus} P100 x 9.5 TFLOP/s = {theirs:.2g} FLOPs by the paper's method; "
        f"counted, {ours:.2g}: {100 * ours / theirs:.0f}% of the peak. By its {step_s:.1f} s a step it is "
        f"{100 * share:.0f}%, and with that this plan says {Plan(work, cluster).hours:.1f} hours."
    )


def _measured(m: Measured) -> str:
    rows = CHUNK_LOGITS_GPU // VOCAB_SIZE
    return (
        f"- Measured: checkpoints are written at {m.checkpoint_write_bytes_per_s / 1e6:,.0f} MB/s, read at "
        f"{m.checkpoint_load_bytes_per_s / 1e6:,.0f}; an MLflow server takes {1e3 * m.mlflow_s_per_call:g} ms a call "
        f"and {1e3 * m.mlflow_s_per_point:g} a point; a core collates {m.collate_tokens_per_s:,.0f} target tokens a "
        f"second and plans an epoch in {m.epoch_plan_s_per_million:g} s a million pairs; a step of base "
        f"on one micro-batch launches {m.launches:g} operators, and {m.launches_per_chunk:g} for every {rows} target "
        "tokens."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=["base", "big"], metavar="NAME", help="presets of conf/model (base big)")
    add("--gpus", nargs="+", type=int, default=[1, 8, 64, 512], metavar="N", help="devices of a run (1 8 64 512)")
    add("--gpu", default="H100", metavar="CARD", help=f"which: {', '.join(CARDS)} (H100)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="that share NVLink and one network port (8)")
    add(
        "--network-gbit",
        type=float,
        default=100,
        metavar="RATE",
        help="of a node, Gbit/s (100); rented ones have up to 3,200",
    )
    add(
        "--mfu",
        type=float,
        default=0.45,
        metavar="SHARE",
        help="of the card's peak that the arithmetic reaches (0.45: a goal, not measured here)",
    )
    add("--launch-us", type=float, default=5, metavar="US", help="to launch one operator (5: assumed, not measured)")
    add("--price", type=float, metavar="DOLLARS", help="per device and hour (a round assumption for each card)")
    options = parser.parse_args()
    try:
        require(options.gpu in CARDS, "--gpu", options.gpu, f"one of {', '.join(CARDS)}")
        price = CARDS[options.gpu].price if options.price is None else options.price
        works = [workload(name) for name in options.model]
        gpus = sorted(set(options.gpus))
        cluster = Cluster(
            gpu=options.gpu,
            gpus=gpus[0],
            gpus_per_node=options.gpus_per_node,
            network_gbit=options.network_gbit,
            mfu=options.mfu,
            launch_us=options.launch_us,
            price=price,
        )
        print("\n\n".join(text(work, cluster, gpus) for work in works))
        print("\nAgainst the paper, and on what the rest rests:\n")
        print("\n".join([*(against_the_paper(work) for work in works if work.name in PAPER), _measured(MEASURED)]))
    except ValueError as error:
        raise SystemExit(f"plan: {error}") from None


if __name__ == "__main__":
    main()
