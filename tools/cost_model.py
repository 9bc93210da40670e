"""Estimate time, cost and bottleneck of a training run on many devices.

    python -m tools.cost_model                                  base and big on 1, 8, 64 and 512 H100s
    python -m tools.cost_model --model big --gpu A100 --gpus 8 16 --network-gbit 400
    python -m tools.cost_model --gpu P100 --mfu 0.31 --gpus 8   the paper's machine

Reads params.yaml and the presets of conf/model, and prints Markdown. The global
batch is the preset's for any number of devices, so that the experiment stays the
same. model/flops.py counts the arithmetic. Rates of GPUs and networks are
assumptions, listed in this file; the rest was measured. docs/scale.md explains the
numbers. `python -m sweeps.plan` estimates a whole sweep.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.flops import training_flops
from model.loss import CHUNK_LOGITS_GPU
from model.transformer import Transformer
from pipeline.common.cli import exit_on_error, parser
from pipeline.common.settings import load_settings, require
from pipeline.data.batching import MIN_MICRO_BATCHES, easily_shared

VOCAB_SIZE = 37_000
LENGTH = 30
"""Assumed mean length of a WMT 2014 En-De sentence, in tokens of either language, EOS included."""
PAIRS = 4_500_000
NETWORK_SHARE = 0.8
"""Assumed share of a network's rate that an all-reduce reaches."""
RESTART_S = 60.0
"""Assumed time from the loss of a machine to the first step of its replacement, without reading the checkpoint."""
WRITER_PAUSE_S = 1.0
"""Time between two calls of MLflow by a run. Points that come faster share a call."""
LARGE_SHARE = 0.15
"""Besides the longest part of a step, a part is a bottleneck if it takes more than this share of the step."""
CHECKPOINT_S = 600.0
"""Advised time between checkpoints, if checkpoints cost too much: the paper's ten minutes (section 6.1)."""
PAPER = {"base": (8, 0.4, 12.0), "big": (8, 1.0, 84.0)}
"""Section 5.2: number of P100s, seconds per step, hours in total."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The constants that `python -m tools.benchmarks.scale_constants` prints."""

    checkpoint_write_bytes_per_s: float  # by checkpoint.save, with checksums and fsync
    checkpoint_load_bytes_per_s: float
    gloo_bytes_per_s: float  # sent by each of two processes on one machine
    mlflow_s_per_call: float  # by a server with one worker, on SQLite
    mlflow_s_per_point: float  # added by each point, which has four metrics
    collate_tokens_per_s: float  # target tokens, collated with their source tokens on one core
    epoch_plan_s_per_million: float  # per million pairs
    launches: float  # operators in a step of base on one micro-batch, without the loss
    launches_per_chunk: float  # operators in the loss of CHUNK_LOGITS_GPU logits


# Medians of three to six runs on two shared cores of an AMD EPYC (Zen 3), torch 2.13.0, 2026-11-21 (launches: 11-23).
# Runs differ by a third, those of disk and gloo by a factor of two.
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
    """A device. The figures are from data sheets; the price is an assumption, a round on-demand price.

    `link_bytes_per_s` is the rate of an all-reduce inside a node: 0.8 of NVLink's rate in one direction.
    """

    flops_per_s: float  # dense peak
    memory_bytes: float
    link_bytes_per_s: float
    price: float  # dollars an hour


CARDS = {
    "P100": Card(9.5e12, 16e9, 64e9, 1.5),  # single precision: the paper's footnote to Table 2
    "A100": Card(312e12, 80e9, 240e9, 2.0),  # bf16, as for the next two
    "H100": Card(989e12, 80e9, 360e9, 3.0),
    "H200": Card(989e12, 141e9, 360e9, 4.0),
    "EPYC-core": Card(84.5e9, 4e9, MEASURED.gloo_bytes_per_s, 0.04),  # fp32; measured, except for the price
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """The numbers of a preset in conf/model that decide what its training costs."""

    name: str
    parameters: int
    flops_per_step: float
    batch_tokens: int  # target tokens per step, and as many source tokens
    max_length: int
    steps: int
    log_every: int
    validate_every: int
    checkpoint_every: int
    keep_checkpoints: int

    @property
    def checkpoint_bytes(self) -> int:
        return 3 * 4 * self.parameters  # fp32 weights and Adam's two moments

    @property
    def corpus_bytes(self) -> int:
        return PAIRS * 2 * (2 * (LENGTH - 1) + 8)  # a sentence: uint16 tokens without EOS, an int64 offset


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The devices and what connects them. Raises ValueError that names the option, its value and what is allowed."""

    gpu: str
    gpus: int
    gpus_per_node: int
    network_gbit: float  # per node, in Gbit/s
    mfu: float  # assumed share of the peak that the arithmetic reaches
    launch_us: float  # assumed time of the host to launch one operator, in microseconds
    price: float  # dollars per device and hour

    def __post_init__(self) -> None:
        node = self.gpus_per_node
        require(self.gpus >= 1, "--gpus", self.gpus, ">= 1")
        require(node >= 1, "--gpus-per-node", node, ">= 1")
        whole_nodes = self.gpus <= node or self.gpus % node == 0
        require(whole_nodes, "--gpus", self.gpus, f"at most --gpus-per-node ({node}) or a multiple of it")
        require(self.gpu in CARDS, "--gpu", self.gpu, f"one of {', '.join(CARDS)}")
        require(0 < self.mfu <= 1, "--mfu", self.mfu, "in (0, 1]")
        require(self.network_gbit > 0, "--network-gbit", self.network_gbit, "> 0")
        require(self.launch_us >= 0, "--launch-us", self.launch_us, ">= 0")
        require(self.price >= 0, "--price", self.price, ">= 0")

    @property
    def card(self) -> Card:
        return CARDS[self.gpu]

    @property
    def flops_per_s(self) -> float:
        """FLOP/s that the arithmetic reaches on one device."""
        return self.mfu * self.card.flops_per_s

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def reduce_bytes_per_s(self) -> float:
        """Rate of the slowest link of a ring, which visits every device of a node and leaves the node once."""
        network = NETWORK_SHARE * self.network_gbit * 1e9 / 8
        return self.card.link_bytes_per_s if self.nodes == 1 else min(self.card.link_bytes_per_s, network)


def workload(model: str, root: Path = Path()) -> Work:
    """The work of training the preset `model` in `root`. Raises ValueError if there is no such preset."""
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
    """Estimates for one run of `work` on `cluster`, while `runs` such runs share an MLflow server.

    `compute_s`, `launch_s`, `parts` and `step_s` are seconds per step.
    """

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
        """Operators that a device launches in a step: (outside the loss, in the loss). The loss computes its logits
        in chunks."""
        chunks = self.tokens_per_gpu / (CHUNK_LOGITS_GPU // VOCAB_SIZE)
        gpus = self.cluster.gpus
        micro_batches = -(-easily_shared(max(gpus, MIN_MICRO_BATCHES)) // gpus)
        return self.measured.launches * micro_batches, self.measured.launches_per_chunk * chunks

    @property
    def launch_s(self) -> float:
        """Time of the host to launch the operators of a step. A device that computes faster waits for the host."""
        return sum(self.launches) * self.cluster.launch_us / 1e6

    @property
    def reduce_bytes(self) -> float:
        """Bytes that each device sends in a step.

        In a ring, each device sends 1 / n of the single-precision gradients n - 1 times until they are summed, and
        n - 1 times until every device has the sums.
        """
        n = self.cluster.gpus
        return 2 * (n - 1) / n * 4 * self.work.parameters

    @property
    def save_s(self) -> float:
        """Seconds to write a checkpoint. All devices wait for the one that writes."""
        return self.work.checkpoint_bytes / self.measured.checkpoint_write_bytes_per_s

    @property
    def parts(self) -> dict[str, float]:
        """Time of each part of a step. Nothing overlaps: the loop does one after the other."""
        epoch_steps = PAIRS * LENGTH / self.work.batch_tokens
        planning_s = self.measured.epoch_plan_s_per_million * PAIRS / 1e6 / epoch_steps
        return {
            "compute": self.compute_s,
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
        """Share of a step that is not compute."""
        return 1 - self.compute_s / self.step_s

    @property
    def network_bytes(self) -> float:
        """Bytes that leave a node in the whole run."""
        return self.reduce_bytes * self.work.steps if self.cluster.nodes > 1 else 0.0

    @property
    def points_per_s(self) -> float:
        """Points of curves that one run sends to MLflow, per second."""
        return (1 / self.work.log_every + 1 / self.work.validate_every) / self.step_s

    @property
    def calls_per_s(self) -> float:
        """Calls of the MLflow server by one run, per second."""
        return min(self.points_per_s, 1 / WRITER_PAUSE_S)

    @property
    def server_share(self) -> float:
        """Share of the MLflow server's time that all runs together take."""
        calls, points = self.calls_per_s, self.points_per_s
        return self.runs * (calls * self.measured.mlflow_s_per_call + points * self.measured.mlflow_s_per_point)

    @property
    def data_bytes_per_s(self) -> float:
        return self.work.corpus_bytes / PAIRS * self.work.batch_tokens / LENGTH / self.step_s

    @property
    def interruption_s(self) -> float:
        """Mean time that the loss of a machine costs, in seconds."""
        load_s = self.work.checkpoint_bytes / self.measured.checkpoint_load_bytes_per_s
        return self.work.checkpoint_every / 2 * self.step_s + load_s + RESTART_S

    @property
    def bottlenecks(self) -> list[str]:
        """What limits the run, in this order: the MLflow server, if it is too slow for its runs; the longest part of
        a step; all other parts except compute that take more than LARGE_SHARE of a step."""
        parts = sorted(self.parts, key=self.parts.__getitem__, reverse=True)
        others = [p for p in parts[1:] if p != "compute" and self.parts[p] > LARGE_SHARE * self.step_s]
        return ["MLflow"] * (self.server_share > 1) + [parts[0], *others]

    @property
    def advice(self) -> str:
        """Each bottleneck, and what to do about it. Bottlenecks that would repeat earlier advice are left out."""
        lines: dict[str, str] = {}
        for bottleneck in self.bottlenecks:
            seconds = self.parts.get(bottleneck)
            share = f" ({100 * seconds / self.step_s:.0f}% of a step)" if seconds else ""
            lines.setdefault(ADVICE[bottleneck](self), f"{'next' if lines else 'bottleneck'} {bottleneck}{share}: ")
        return "; ".join(bottleneck + advice for advice, bottleneck in lines.items())

    @property
    def larger(self) -> "Plan":
        """The same run on up to twice the devices: a part of one node, or whole nodes."""
        n, node = self.cluster.gpus, self.cluster.gpus_per_node
        return replace(self, cluster=replace(self.cluster, gpus=min(2 * n, node) if n < node else 2 * n))


def _on_compute(plan: Plan) -> str:
    more = f"{plan.larger.cluster.gpus:,} devices: {_number(1e3 * plan.larger.step_s)} ms a step"
    if plan.larger.step_s < plan.step_s:
        return f"raise hardware.num_workers ({more})"
    return f"more devices do not help ({more})"


def _on_launches(plan: Plan) -> str:
    layers, loss = plan.launches
    if loss > layers:
        return "raise CHUNK_LOGITS_GPU of model/loss.py: the loss makes most of the launches"
    return _on_fixed_costs(plan)


def _on_fixed_costs(plan: Plan) -> str:
    """Advice on costs of a step that do not shrink with a device's share of the batch."""
    cluster = plan.cluster
    fewer = cluster.gpus_per_node if cluster.nodes > 1 else 1
    # With so many tokens, compute takes nine times as long as the fixed costs.
    fixed_s = plan.parts["all-reduce"] + plan.launches[0] * cluster.launch_us / 1e6
    tokens = _round(plan.work.batch_tokens * 9 * fixed_s / plan.compute_s)
    return (
        f"lower hardware.num_workers to {fewer} and do {cluster.gpus // fewer} runs at once; or raise "
        f"train.batch_tokens, which is another experiment (at {tokens}, 90% of a step is compute)"
    )


def _on_data(plan: Plan) -> str:
    return "raise hardware.num_workers: each worker collates its own share"


def _on_checkpoints(plan: Plan) -> str:
    every = f"from {plan.work.checkpoint_every:,} to {_round(CHECKPOINT_S / plan.step_s)}"
    return f"use a faster disk; or raise train.checkpoint_every {every}, which changes what is averaged"


def _on_mlflow(plan: Plan) -> str:
    log_every = plan.work.log_every * -(-plan.server_share // 0.5)
    return f"raise train.log_every from {plan.work.log_every:,} to {log_every:,.0f}, or use PostgreSQL for MLflow"


ADVICE: dict[str, Callable[[Plan], str]] = {
    "compute": _on_compute,
    "launches": _on_launches,
    "all-reduce": _on_fixed_costs,
    "data": _on_data,
    "checkpoints": _on_checkpoints,
    "MLflow": _on_mlflow,
}
"""For each bottleneck, what to do about it."""
ROWS: dict[str, Callable[[Plan], float]] = {
    "hours": lambda plan: plan.hours,
    "device-hours": lambda plan: plan.hours * plan.cluster.gpus,
    "cost, $": lambda plan: plan.cost,
    "source (or target) tokens per device and step": lambda plan: plan.tokens_per_gpu,
    "step, ms": lambda plan: 1e3 * plan.step_s,
    "- compute": lambda plan: 1e3 * plan.parts["compute"],
    "- waiting for kernel launches": lambda plan: 1e3 * plan.parts["launches"],
    "- all-reduce": lambda plan: 1e3 * plan.parts["all-reduce"],
    "- batch plan and collation": lambda plan: 1e3 * plan.parts["data"],
    "- checkpoints": lambda plan: 1e3 * plan.parts["checkpoints"],
    "not compute, %": lambda plan: 100 * plan.lost_share,
    "- checkpoints, %": lambda plan: 100 * plan.parts["checkpoints"] / plan.step_s,
    "all-reduce, MB sent per device and step": lambda plan: plan.reduce_bytes / 1e6,
    "network, TB that leave a node in the run": lambda plan: plan.network_bytes / 1e12,
    "data read, MB/s": lambda plan: plan.data_bytes_per_s / 1e6,
    "MLflow, calls/s": lambda plan: plan.calls_per_s,
    "time lost by an interruption, s": lambda plan: plan.interruption_s,
}


def render_plan(work: Work, cluster: Cluster, gpus: list[int]) -> str:
    """The plans of one preset as Markdown: one run on each number of `gpus`, and runs of one node each at once."""
    plans = [Plan(work, replace(cluster, gpus=n)) for n in gpus]
    lines = [
        _assumptions(plans[0]),
        "",
        *_table(f"one run of {work.name}, number of {cluster.gpu}", [f"{n:,}" for n in gpus], plans, ROWS),
        "",
        *(f"- {plan.cluster.gpus:,}: {plan.advice}." for plan in plans),
    ]
    short = [f"{n:,}" for n in gpus if work.batch_tokens / n < work.max_length]
    if short:
        lines.append(
            f"- {', '.join(short)}: a device's share of the batch has fewer tokens than the longest sentence may "
            f"have (model.max_length, {work.max_length:,}): lower it, or some workers have nothing to do in a step."
        )
    node = cluster.gpus_per_node
    lines += [_at_once(Plan(work, replace(cluster, gpus=node), n // node)) for n in gpus if n > node]
    return "\n".join(lines)


def _at_once(plan: Plan) -> str:
    gpus = plan.runs * plan.cluster.gpus
    written = plan.work.checkpoint_bytes / plan.work.checkpoint_every / plan.step_s  # bytes per second
    limit = f" {plan.advice}." if plan.server_share > 1 else ""
    return (
        f"- {gpus:,} as {plan.runs} runs of {plan.cluster.gpus} at once: {_round(24 * plan.runs / plan.hours)} runs "
        f"a day at ${_number(plan.cost)} each, {plan.runs * written / 1e9:.2g} GB/s of checkpoints, an MLflow server "
        f"{100 * plan.server_share:.0f}% busy (it can serve {plan.runs / plan.server_share:.0f} such runs).{limit}"
    )


def _round(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}"


def _assumptions(plan: Plan) -> str:
    work, cluster, card = plan.work, plan.cluster, plan.cluster.card
    launch_s = cluster.launch_us / 1e6
    # Time to compute a token, minus the launches of the loss for it. The other launches have to fit into the rest.
    left_s = (plan.compute_s - plan.launches[1] * launch_s) / plan.tokens_per_gpu
    few = "any number of tokens"
    if left_s > 0:
        few = f"fewer than {plan.measured.launches * launch_s / left_s:,.0f} tokens"
    return (
        f"**{work.name}**: {work.parameters:,} parameters, {work.steps:,} steps of {work.batch_tokens:,} "
        f"source and as many target tokens, {work.flops_per_step * work.steps:.3g} FLOPs. Each {cluster.gpu} reaches "
        f"{100 * cluster.mfu:g}% of its {card.flops_per_s / 1e12:.3g} TFLOP/s and costs ${cluster.price:g} an hour. "
        f"The {cluster.gpus_per_node} of a node exchange {_number(card.link_bytes_per_s / 1e9)} GB/s, nodes "
        f"{NETWORK_SHARE:g} x {cluster.network_gbit:g} Gbit/s. Weights, gradients and Adam take "
        f"{16 * work.parameters / 1e9:.1f} of {card.memory_bytes / 1e9:g} GB, a checkpoint "
        f"{work.checkpoint_bytes / 1e9:.2f} GB ({work.keep_checkpoints} are kept), the corpus "
        f"{work.corpus_bytes / 1e9:.1f} GB on every node. At {cluster.launch_us:g} us a launch, a device waits for "
        f"the host if a micro-batch has {few}."
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
    """The share of the peak that the paper's own run reached, and what this plan estimates for that run."""
    gpus, step_s, hours = PAPER[work.name]
    peak = gpus * CARDS["P100"].flops_per_s
    theirs, ours = 3600 * hours * peak, work.flops_per_step * work.steps
    share = work.flops_per_step / step_s / peak
    cluster = Cluster(gpu="P100", gpus=gpus, gpus_per_node=gpus, network_gbit=100, mfu=share, launch_us=5, price=0)
    return (
        f"- {work.name}: by the paper's method {hours:g} hours x {gpus} P100 x 9.5 TFLOP/s = {theirs:.2g} FLOPs. "
        f"Training takes {ours:.2g} by our count, {100 * ours / theirs:.0f}% of that peak. From the paper's "
        f"{step_s:.1f} s a step it is {100 * share:.0f}%; with this share the cost model estimates "
        f"{Plan(work, cluster).hours:.1f} hours."
    )


def _measured(m: Measured) -> str:
    rows = CHUNK_LOGITS_GPU // VOCAB_SIZE
    return (
        f"- Measured: checkpoints are written at {m.checkpoint_write_bytes_per_s / 1e6:,.0f} MB/s and read at "
        f"{m.checkpoint_load_bytes_per_s / 1e6:,.0f} MB/s. An MLflow server takes {1e3 * m.mlflow_s_per_call:g} ms "
        f"for a call and {1e3 * m.mlflow_s_per_point:g} ms for a point. A core collates "
        f"{m.collate_tokens_per_s:,.0f} target tokens a second, and plans an epoch in "
        f"{m.epoch_plan_s_per_million:g} s for a million pairs. A step of base on one micro-batch launches "
        f"{m.launches:g} operators, and {m.launches_per_chunk:g} more for every {rows} target tokens."
    )


def main() -> None:
    options = parser("tools.cost_model", __doc__)
    add = options.add_argument
    add("--model", nargs="+", default=["base", "big"], metavar="NAME", help="presets of conf/model (base big)")
    add("--gpus", nargs="+", type=int, default=[1, 8, 64, 512], metavar="N", help="devices of a run (1 8 64 512)")
    add("--gpu", default="H100", metavar="CARD", help=f"one of {', '.join(CARDS)} (%(default)s)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="devices on one NVLink and port (%(default)s)")
    add("--network-gbit", type=float, default=100, metavar="RATE", help="Gbit/s of a node, up to 3,200 (%(default)s)")
    add("--mfu", type=float, default=0.45, metavar="SHARE", help="of the peak that compute reaches (%(default)s)")
    add("--launch-us", type=float, default=5, metavar="US", help="assumed time to launch one operator (%(default)s)")
    add("--price", type=float, metavar="DOLLARS", help="of a device and hour (default: an assumption for each card)")
    arguments = options.parse_args()
    with exit_on_error("cost_model"):
        gpus = sorted(set(arguments.gpus))
        cluster = Cluster(
            gpu=arguments.gpu,
            gpus=gpus[0],
            gpus_per_node=arguments.gpus_per_node,
            network_gbit=arguments.network_gbit,
            mfu=arguments.mfu,
            launch_us=arguments.launch_us,
            price=0 if arguments.price is None else arguments.price,
        )
        if arguments.price is None:
            cluster = replace(cluster, price=cluster.card.price)
        works = [workload(name) for name in arguments.model]
        print("\n\n".join(render_plan(work, cluster, gpus) for work in works))
        print("\nComparison with the paper, and the measured constants:\n")
        print("\n".join([*(against_the_paper(work) for work in works if work.name in PAPER), _measured(MEASURED)]))


if __name__ == "__main__":
    main()
