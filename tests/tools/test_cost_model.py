"""The plan of one run on many devices, against formulas written a second time and against what is really there."""

import ast
import math
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.transformer import Transformer
from pipeline.common.settings import load_settings
from pipeline.training import checkpoint
from pipeline.training.loop import TrainState, adam
from tools import cost_model as plan
from tools.cost_model import CARDS, MEASURED, Cluster, Measured, Plan, Work, workload

REPOSITORY = Path(__file__).parents[2]
FREE = Measured(
    checkpoint_write_bytes_per_s=math.inf,
    checkpoint_load_bytes_per_s=math.inf,
    gloo_bytes_per_s=math.inf,
    mlflow_s_per_call=0,
    mlflow_s_per_point=0,
    collate_tokens_per_s=math.inf,
    epoch_plan_s_per_million=0,
    launches=0,
    launches_per_chunk=0,
)
"""A machine on which nothing but arithmetic and all-reduce takes time."""
WORK = Work(
    name="hand-made",
    parameters=1_000_000,
    flops_per_step=1.1e12,
    batch_tokens=6_000,
    max_length=100,
    steps=7_000,
    log_every=50,
    validate_every=200,
    checkpoint_every=500,
    keep_checkpoints=3,
)


def cluster(**changes: Any) -> Cluster:
    values = dict(gpu="A100", gpus=8, gpus_per_node=8, network_gbit=100, mfu=0.45, launch_us=5, price=2.0) | changes
    return Cluster(**values)


def ring_all_reduce(vectors: list[list[int]]) -> list[int]:
    """The algorithm itself: all vectors become their sum. Returns how many numbers each has sent."""
    n, part = len(vectors), len(vectors[0]) // len(vectors)
    sent = [0] * n

    def pass_on(chunk_of: Any, add: bool) -> None:
        moving = [vectors[i][chunk_of(i) * part : (chunk_of(i) + 1) * part] for i in range(n)]
        for i, numbers in enumerate(moving):
            sent[i] += len(numbers)
            start = chunk_of(i) * part
            for k, number in enumerate(numbers):
                receiver = vectors[(i + 1) % n]
                receiver[start + k] = number + receiver[start + k] * add

    for turn in range(n - 1):
        pass_on(lambda i, turn=turn: (i - turn) % n, add=True)
    for turn in range(n - 1):
        pass_on(lambda i, turn=turn: (i + 1 - turn) % n, add=False)
    return sent


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_each_device_sends_what_a_ring_makes_it_send(n):
    vectors = [[100 * i + k for k in range(n * 7)] for i in range(n)]
    total = [sum(numbers) for numbers in zip(*vectors, strict=True)]
    sent = ring_all_reduce(vectors)
    assert vectors == [total] * n
    planned = Plan(replace(WORK, parameters=n * 7), cluster(gpus=n))
    assert [4 * count for count in sent] == pytest.approx([planned.reduce_bytes] * n)


def test_a_single_device_sends_nothing():
    assert Plan(WORK, cluster(gpus=1)).reduce_bytes == 0


def test_where_nothing_else_takes_time_hours_are_flops_by_the_rate():
    hours = Plan(WORK, cluster(gpus=1, gpu="P100", mfu=0.25), measured=FREE).hours
    assert hours == pytest.approx(7_000 * 1.1e12 / (0.25 * 9.5e12) / 3600)


@pytest.mark.parametrize(
    ("gpus", "network_gbit", "bytes_per_s"),
    [(8, 1, 240e9), (16, 100, 10e9), (16, 100_000, 240e9)],  # inside; the network is slower; NVLink is slower
)
def test_the_slowest_link_of_the_ring_counts(gpus, network_gbit, bytes_per_s):
    planned = Plan(WORK, cluster(gpus=gpus, network_gbit=network_gbit), measured=FREE)
    assert planned.parts["all-reduce"] == pytest.approx(2 * (gpus - 1) / gpus * 4e6 / bytes_per_s)
    assert planned.step_s == pytest.approx(1.1e12 / gpus / (0.45 * 312e12) + planned.parts["all-reduce"])


def test_a_step_is_the_sum_of_its_parts_by_hand():
    measured = Measured(
        checkpoint_write_bytes_per_s=3e6,
        checkpoint_load_bytes_per_s=6e6,
        gloo_bytes_per_s=1,
        mlflow_s_per_call=0.1,
        mlflow_s_per_point=0.02,
        collate_tokens_per_s=15_000,
        epoch_plan_s_per_million=1 / 4.5,
        launches=1_000,
        launches_per_chunk=1_813,
    )
    planned = Plan(
        replace(WORK, flops_per_step=9.5e11), cluster(gpu="P100", gpus=2, mfu=0.5, launch_us=50), 5, measured
    )
    assert planned.tokens_per_gpu == 3_000
    assert planned.parts == pytest.approx(
        {
            "arithmetic": 0.1,
            "launches": (2 * 1_000 + 3_000) * 50e-6 - 0.1,  # two of four micro-batches; 1,813 tokens make a chunk
            "all-reduce": 4e6 / 64e9,
            "data": 0.2 + 1 / 22_500,  # 4.5 million pairs of 30 tokens are 22,500 steps
            "checkpoints": 4 / 500,  # 12 MB
        }
    )
    step_s = 0.25 + 4e6 / 64e9 + 0.2 + 1 / 22_500 + 4 / 500
    assert planned.step_s == pytest.approx(step_s)
    assert planned.lost_share == pytest.approx(1 - 0.1 / step_s)
    assert planned.interruption_s == pytest.approx(250 * step_s + 2 + 60)
    points = (1 / 50 + 1 / 200) / step_s
    assert planned.calls_per_s == pytest.approx(points)
    assert planned.server_share == pytest.approx(5 * points * 0.12)


@pytest.mark.parametrize(
    ("gpus", "number"), [(1, 4), (2, 2), (3, 2), (4, 1), (5, 2), (8, 1), (12, 2), (16, 1), (512, 1)]
)
def test_a_device_launches_for_every_micro_batch_that_is_its_own(gpus, number):
    measured = replace(FREE, launches=100)
    assert Plan(WORK, cluster(gpus=gpus, gpus_per_node=1), measured=measured).launches[0] == 100 * number


def test_what_goes_over_the_network_and_from_the_disk_by_hand():
    assert WORK.corpus_bytes == 594_000_000  # 4.5 million pairs of 2 x (29 x 2 + 8) bytes
    two_nodes, one = Plan(WORK, cluster(gpus=16)), Plan(WORK, cluster(gpus=8))
    assert two_nodes.network_bytes == pytest.approx(2 * 15 / 16 * 4e6 * 7_000)
    assert one.network_bytes == 0
    assert one.data_bytes_per_s == pytest.approx(200 * 132 / one.step_s)  # 6,000 tokens are 200 pairs


def test_points_that_come_faster_than_the_writer_calls_share_calls():
    planned = Plan(replace(WORK, log_every=1), cluster(), measured=FREE)
    assert planned.points_per_s > 100
    assert planned.calls_per_s == 1


@pytest.mark.parametrize("model", ["base", "big"])
def test_parameters_and_flops_are_those_of_the_model_that_would_be_built(model):
    work, settings = workload(model, REPOSITORY), load_settings(REPOSITORY, model=model)
    with torch.device("meta"):
        built = Transformer(settings.model.config(37_000))
    assert work.parameters == sum(p.numel() for p in built.parameters())
    d, f, n, length = settings.model.d_model, settings.model.d_ff, settings.model.num_layers, 30
    # Multiply-adds of a target token and a source token: projections, feed-forward, vocabulary, attention's squares.
    layers = n * (4 * d**2 + 2 * d * f) * 2 + n * 4 * d**2
    token = layers + d * 37_000 + 3 * n * 2 * length * d
    assert work.flops_per_step == pytest.approx(6 * token * 25_000, rel=1e-9)


def test_the_settings_are_those_of_the_paper():
    base, big = workload("base", REPOSITORY), workload("big", REPOSITORY)
    assert (base.steps, big.steps) == (100_000, 300_000)
    assert (base.batch_tokens, big.batch_tokens) == (25_000, 25_000)
    assert 9.4e17 < base.flops_per_step * base.steps < 9.6e17


def test_a_checkpoint_is_as_large_as_the_file_that_is_written(tmp_path):
    work = workload("nano", REPOSITORY)
    model = Transformer(load_settings(REPOSITORY, model="nano").model.config(37_000))
    optimizer = adam(model, 0.9, 0.98, 1e-9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    folder = checkpoint.save(tmp_path, model, optimizer, TrainState(step=1), {}, keep=1)
    assert work.checkpoint_bytes == pytest.approx((folder / "tensors.safetensors").stat().st_size, rel=0.01)


@pytest.mark.parametrize("gpu", CARDS)
def test_more_devices_never_cost_less_and_the_batch_stays_the_same(gpu):
    plans = [Plan(workload("base", REPOSITORY), cluster(gpu=gpu, gpus=n)) for n in (1, 2, 4, 8, 16, 64, 512)]
    costs = [planned.cost for planned in plans]
    assert costs == sorted(costs)
    assert len(set(costs)) == len(costs)
    assert {planned.tokens_per_gpu * planned.cluster.gpus for planned in plans} == {25_000}
    assert all(0 <= planned.lost_share < 1 for planned in plans)


def test_cost_is_device_hours_by_the_price():
    dear, cheap = (Plan(WORK, cluster(gpus=16, price=price)) for price in (3.0, 1.5))
    assert dear.cost == 2 * cheap.cost == pytest.approx(dear.hours * 16 * 3.0)


SLOW_CARD = {"gpu": "P100", "launch_us": 0}


@pytest.mark.parametrize(
    ("limit", "setting", "changes", "runs", "measured"),
    [
        ("arithmetic", "hardware.num_workers up", {**SLOW_CARD, "network_gbit": 3200}, 1, MEASURED),
        ("all-reduce", "hardware.num_workers down to 8, 2 runs", {**SLOW_CARD, "network_gbit": 0.1}, 1, MEASURED),
        (
            "launches",
            "hardware.num_workers down to 1, 16 runs",
            {"launch_us": 2_000, "gpus_per_node": 16},
            1,
            MEASURED,
        ),
        ("launches", "CHUNK_LOGITS_GPU", {"launch_us": 2_000}, 1, replace(MEASURED, launches=2)),
        ("data", "hardware.num_workers up", SLOW_CARD, 1, replace(MEASURED, collate_tokens_per_s=1_000)),
        (
            "checkpoints",
            "a faster disk, or train.checkpoint_every from 500 to",
            SLOW_CARD,
            1,
            replace(MEASURED, checkpoint_write_bytes_per_s=1e4),
        ),
        ("MLflow", "train.log_every", SLOW_CARD, 50_000, MEASURED),
    ],
)
def test_what_limits_a_run_is_found_and_what_to_turn_is_said(limit, setting, changes, runs, measured):
    planned = Plan(WORK, cluster(gpus=16, **changes), runs, measured)
    assert planned.limits[0] == limit
    assert planned.advice.startswith(f"limit: {limit}")
    assert f"turn: {setting}" in planned.advice


def test_the_limit_goes_from_arithmetic_to_the_network_as_that_gets_slower():
    rates = (3200, 400, 100, 10, 1, 0.1)
    limits = [Plan(WORK, cluster(gpus=16, network_gbit=rate, **SLOW_CARD)).limits[0] for rate in rates]
    change = limits.index("all-reduce")
    assert limits == ["arithmetic"] * change + ["all-reduce"] * (len(rates) - change)
    assert change > 0


def test_more_devices_are_advised_only_if_a_step_gets_shorter():
    work = replace(WORK, parameters=100_000_000)
    slow, fast = (Plan(work, cluster(network_gbit=rate, **SLOW_CARD), measured=FREE) for rate in (10, 3200))
    assert slow.limits[0] == fast.limits[0] == "arithmetic"
    assert "turn: nothing here: with 16 devices" in slow.advice
    assert "turn: hardware.num_workers up (with 16 a step" in fast.advice


def test_with_the_batch_that_is_advised_a_tenth_is_lost():
    planned = Plan(WORK, cluster(gpus=16, network_gbit=1), measured=FREE)
    tokens = float(re.search(r"\(at ([\d,]+) a tenth", planned.advice)[1].replace(",", ""))
    larger = replace(WORK, batch_tokens=int(tokens), flops_per_step=WORK.flops_per_step * tokens / WORK.batch_tokens)
    assert Plan(larger, planned.cluster, measured=FREE).lost_share == pytest.approx(0.1, rel=0.05)


def run_main(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    plan.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus 0", "--gpus must be >= 1, got 0"),
        ("--gpus 8 12", "--gpus must be at most 8 (--gpus-per-node) or a multiple of 8, got 12"),
        ("--gpus 12 --gpus-per-node 5", "--gpus must be at most 5 (--gpus-per-node) or a multiple of 5, got 12"),
        ("--gpus-per-node 0", "--gpus-per-node must be >= 1, got 0"),
        ("--gpu V100", f"--gpu must be one of {', '.join(CARDS)}, got 'V100'"),
        ("--mfu 1.5", "--mfu must be in (0, 1], got 1.5"),
        ("--mfu nan", "--mfu must be in (0, 1], got nan"),
        ("--network-gbit 0", "--network-gbit must be > 0, got 0.0"),
        ("--launch-us -1", "--launch-us must be >= 0, got -1.0"),
        ("--price -3", "--price must be >= 0, got -3.0"),
        ("--model huge", "--model must be one of base, big, mini, nano, tiny, got 'huge'"),
    ],
)
def test_an_impossible_option_is_one_line_that_names_it_its_value_and_what_is_allowed(
    monkeypatch, arguments, message
):
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, arguments.split())
    assert str(error.value) == f"plan: {message}"


def test_the_options_arrive_in_the_tables(monkeypatch, capsys):
    options = "--model base --gpu A100 --gpus 4 2 --gpus-per-node 4 --mfu 0.5 --price 7 --network-gbit 25"
    run_main(monkeypatch, options.split())
    lines = capsys.readouterr().out.splitlines()
    plans = [
        Plan(workload("base", REPOSITORY), cluster(gpus=n, gpus_per_node=4, mfu=0.5, price=7, network_gbit=25))
        for n in (2, 4)
    ]
    assert "| one run of base on so many A100 | 2 | 4 |" in lines
    assert f"| hours | {plans[0].hours:.3g} | {plans[1].hours:.3g} |" in lines
    assert f"| cost, $ | {plans[0].cost:.3g} | {plans[1].cost:.3g} |" in lines
    assert "| tokens a device and step, of each side | 12,500 | 6,250 |" in lines
    assert "50% of A100's 312 TFLOP/s; 240 GB/s between the 4 of a node, 0.8 x 25 Gbit/s" in lines[0]
    assert not any("runs of" in line for line in lines)  # one node has no room for more runs


def test_more_than_a_node_is_planned_as_runs_at_once_too(monkeypatch, capsys):
    run_main(monkeypatch, ["--model", "big", "--gpu", "A100", "--gpus", "8", "24", "--price", "2"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "runs of" in line]
    alone = Plan(workload("big", REPOSITORY), cluster())
    assert line.startswith(
        f"- 24 as 3 runs of 8 at once: {72 / alone.hours:.0f} runs a day at ${alone.cost:.1f} each, "
    )
    assert f"an MLflow server {300 * alone.server_share:.0f}% busy (it takes {1 / alone.server_share:.0f} of" in line


def test_the_tables_of_the_document_are_what_its_commands_print(monkeypatch, capsys):
    document = (REPOSITORY / "docs/scale.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    python -m pipeline\.plan(.*)$", document, re.MULTILINE)
    assert commands
    for options in commands:
        run_main(monkeypatch, options.split())
        assert capsys.readouterr().out.strip() in document


def test_the_constants_are_those_that_the_benchmark_prints():
    source = (REPOSITORY / "tools/benchmarks/scale_constants.py").read_text(encoding="utf-8")
    assert set(re.findall(r'show\(\s*"(\w+)"', source)) == {field.name for field in fields(Measured)}


def test_the_plan_imports_the_model_batches_the_settings_torch_and_the_standard_library_alone():
    nodes = list(ast.walk(ast.parse((REPOSITORY / "tools/cost_model.py").read_text(encoding="utf-8"))))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert {name for name in names if name.startswith("pipeline")} == {
        "pipeline.data.batching",
        "pipeline.common.settings",
    }
    assert {name.partition(".")[0] for name in names} <= {"model", "pipeline", "torch", *sys.stdlib_module_names}
