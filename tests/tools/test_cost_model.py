"""The cost model of a run on many devices, compared with published numbers, limits, units, and written files."""

import math
import re
import subprocess
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
from tools.benchmarks.harness import write_corpus
from tools.cost_model import CARDS, MEASURED, PAIRS, Cluster, Measured, Plan, Work, main, workload

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
"""A machine on which only arithmetic and all-reduce take time."""
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
    """Run ring all-reduce: each vector becomes the sum of all. Returns how many numbers each device has sent."""
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
def test_reduce_bytes_are_what_each_device_sends_in_a_ring(n):
    vectors = [[100 * i + k for k in range(n * 7)] for i in range(n)]
    total = [sum(numbers) for numbers in zip(*vectors, strict=True)]
    sent = ring_all_reduce(vectors)
    assert vectors == [total] * n
    planned = Plan(replace(WORK, parameters=n * 7), cluster(gpus=n))
    assert [4 * count for count in sent] == pytest.approx([planned.reduce_bytes] * n)


def test_reduce_bytes_of_a_single_device_are_none():
    assert Plan(WORK, cluster(gpus=1)).reduce_bytes == 0


def test_reduce_bytes_approach_twice_the_gradients():
    sent = [Plan(WORK, cluster(gpus=n, gpus_per_node=1)).reduce_bytes for n in (2, 4, 1_000_000)]
    assert sent == sorted(sent)
    assert sent[-1] == pytest.approx(2 * 4 * WORK.parameters, rel=1e-5)


def test_reduce_of_base_and_big_over_100_gbit_s_takes_50_and_170_ms():
    """The gradients are 252 and 857 MB. Each device sends twice as much, at 80% of 12.5 GB/s."""
    for model, megabytes, milliseconds in (("base", 252, 50), ("big", 857, 170)):
        planned = Plan(workload(model, REPOSITORY), cluster(gpu="H100", gpus=512))
        assert 4 * planned.work.parameters / 1e6 == pytest.approx(megabytes, rel=0.01)
        assert 1e3 * planned.parts["all-reduce"] == pytest.approx(milliseconds, rel=0.02)


def test_hours_where_nothing_but_compute_takes_time_are_flops_over_the_rate():
    hours = Plan(WORK, cluster(gpus=1, gpu="P100", mfu=0.25), measured=FREE).hours
    assert hours == pytest.approx(7_000 * 1.1e12 / (0.25 * 9.5e12) / 3600)


@pytest.mark.parametrize(("model", "published_flops", "hours"), [("base", 3.3e18, 12), ("big", 2.3e19, 84)])
def test_hours_of_the_papers_run_at_the_share_of_the_peak_that_it_reached(model, published_flops, hours):
    """Table 2's FLOPs are hours x 8 P100 x 9.5 TFLOP/s. The share is our FLOPs divided by these. The parts of a step
    other than compute are small."""
    work = workload(model, REPOSITORY)
    share = work.flops_per_step * work.steps / published_flops
    assert 0.25 < share < 0.45
    planned = Plan(work, cluster(gpu="P100", mfu=share, launch_us=0))
    assert planned.hours == pytest.approx(hours, rel=0.05)


@pytest.mark.parametrize(("gpus", "slowest"), [(8, "link"), (16, "network")])
def test_all_reduce_depends_on_the_slowest_link_of_the_ring_alone(gpus, slowest):
    """Inside a node the slowest link is NVLink; between nodes it is the network, unless NVLink is slower."""

    def seconds(gbit: float) -> float:
        return Plan(WORK, cluster(gpus=gpus, network_gbit=gbit)).parts["all-reduce"]

    if slowest == "link":
        assert seconds(25) == seconds(1e6)
    else:
        assert seconds(25) == pytest.approx(2 * seconds(50))
        assert seconds(1e5) == seconds(1e6)


def test_step_takes_half_on_a_machine_of_twice_the_speed():
    """All times follow from rates alone, so an error of units would be noticed."""
    m = MEASURED
    twice = Measured(
        checkpoint_write_bytes_per_s=2 * m.checkpoint_write_bytes_per_s,
        checkpoint_load_bytes_per_s=2 * m.checkpoint_load_bytes_per_s,
        gloo_bytes_per_s=2 * m.gloo_bytes_per_s,
        mlflow_s_per_call=m.mlflow_s_per_call / 2,
        mlflow_s_per_point=m.mlflow_s_per_point / 2,
        collate_tokens_per_s=2 * m.collate_tokens_per_s,
        epoch_plan_s_per_million=m.epoch_plan_s_per_million / 2,
        launches=m.launches,
        launches_per_chunk=m.launches_per_chunk,
    )
    work = replace(WORK, log_every=1_000, validate_every=1_000)
    one = Plan(work, cluster(gpus=16, mfu=0.2, launch_us=50))
    other = Plan(work, cluster(gpus=16, mfu=0.4, launch_us=25, network_gbit=200), measured=twice)
    assert all(one.parts.values())
    for name, seconds in one.parts.items():
        assert other.parts[name] == pytest.approx(seconds / 2), name
    assert other.hours == pytest.approx(one.hours / 2)
    assert other.server_share == pytest.approx(one.server_share)  # twice the points, each in half the time


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("checkpoints", {"checkpoint_every": 1_000}),
        ("checkpoints", {"parameters": 500_000}),
        ("all-reduce", {"parameters": 500_000}),
        ("compute", {"flops_per_step": 0.55e12}),
    ],
)
def test_parts_are_halved_by_what_they_are_proportional_to(part, changes):
    one, other = (Plan(work, cluster(launch_us=0)).parts for work in (WORK, replace(WORK, **changes)))
    assert other[part] == pytest.approx(one[part] / 2)


def test_step_is_the_sum_of_its_parts_and_what_is_not_compute_is_lost():
    planned = Plan(WORK, cluster(gpus=16))
    assert planned.step_s == pytest.approx(sum(planned.parts.values()))
    assert planned.lost_share * planned.step_s == pytest.approx(planned.step_s - planned.parts["compute"])
    assert Plan(WORK, cluster(gpus=1, launch_us=0), measured=FREE).lost_share == 0


def test_launches_are_hidden_by_compute_until_they_take_longer():
    """1,000 operators at 5 us take 5 ms per micro-batch. A device that computes for longer does not wait."""
    waits = [
        Plan(WORK, cluster(gpus=4, mfu=mfu), measured=replace(FREE, launches=1_000)).parts["launches"]
        for mfu in (0.1, 0.9)
    ]
    compute_s = Plan(WORK, cluster(gpus=4, mfu=0.9), measured=FREE).compute_s
    assert waits == [0, pytest.approx(5e-3 - compute_s)]
    assert compute_s < 5e-3


def test_interruption_costs_half_the_steps_between_checkpoints_and_a_minute():
    rare, often = (Plan(replace(WORK, checkpoint_every=every), cluster(), measured=FREE) for every in (10_000_000, 1))
    assert often.interruption_s == pytest.approx(60, abs=0.1)
    assert rare.interruption_s - 60 == pytest.approx(5_000_000 * rare.step_s)


@pytest.mark.parametrize(
    ("gpus", "number"), [(1, 4), (2, 2), (3, 2), (4, 1), (5, 2), (8, 1), (12, 2), (16, 1), (512, 1)]
)
def test_launches_are_those_of_the_micro_batches_of_a_device(gpus, number):
    measured = replace(FREE, launches=100)
    assert Plan(WORK, cluster(gpus=gpus, gpus_per_node=1), measured=measured).launches[0] == 100 * number


def test_network_bytes_leave_a_node_only_if_there_are_several():
    two_nodes, one = Plan(WORK, cluster(gpus=16)), Plan(WORK, cluster(gpus=8))
    assert two_nodes.network_bytes == two_nodes.reduce_bytes * 7_000
    assert one.network_bytes == 0


def test_corpus_bytes_are_those_of_an_encoded_corpus_of_such_lengths(tmp_path):
    write_corpus(tmp_path, 3_000, 37_000)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert WORK.corpus_bytes / PAIRS == pytest.approx(written / 3_000, rel=0.1)


def test_data_bytes_per_s_read_the_corpus_once_an_epoch():
    planned = Plan(WORK, cluster())
    epoch_s = PAIRS * 30 / WORK.batch_tokens * planned.step_s
    assert planned.data_bytes_per_s * epoch_s == pytest.approx(WORK.corpus_bytes)


def test_server_share_grows_with_the_runs_until_points_share_calls():
    shares = [Plan(WORK, cluster(), runs).server_share for runs in (1, 10)]
    assert shares[1] == pytest.approx(10 * shares[0])
    assert 0 < shares[0] < 0.02  # at most one call per second, of 13 ms


def test_calls_per_s_are_one_at_most_however_many_points_there_are():
    planned = Plan(replace(WORK, log_every=1), cluster(), measured=FREE)
    assert planned.points_per_s > 100
    assert planned.calls_per_s == 1


@pytest.mark.parametrize(("model", "millions"), [("base", 63), ("big", 214)])
def test_workload_has_the_parameters_of_the_paper_and_6_flops_for_each_and_a_token(model, millions):
    """By the paper's formulas with a vocabulary of 37,000. The encoder sees the source of a pair and the decoder its
    target, so each parameter sees one of the two."""
    work = workload(model, REPOSITORY)
    assert work.parameters / 1e6 == pytest.approx(millions, rel=0.005)
    assert work.flops_per_step == pytest.approx(6 * work.parameters * 25_000, rel=0.02)


def test_workload_has_the_steps_and_batches_of_the_paper():
    base, big = workload("base", REPOSITORY), workload("big", REPOSITORY)
    assert (base.steps, big.steps) == (100_000, 300_000)
    assert (base.batch_tokens, big.batch_tokens) == (25_000, 25_000)


def test_checkpoint_bytes_are_those_of_the_file_that_is_written(tmp_path):
    work = workload("mini", REPOSITORY)
    model = Transformer(load_settings(REPOSITORY, model="mini").model.config(37_000))
    optimizer = adam(model, 0.9, 0.98, 1e-9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    folder = checkpoint.save(tmp_path, model, optimizer, TrainState(step=1), {}, keep=1)
    assert work.checkpoint_bytes == pytest.approx((folder / "tensors.safetensors").stat().st_size, rel=0.01)


@pytest.mark.parametrize("gpu", CARDS)
def test_cost_never_falls_with_more_devices_and_the_batch_stays(gpu):
    plans = [Plan(workload("base", REPOSITORY), cluster(gpu=gpu, gpus=n)) for n in (1, 2, 4, 8, 16, 64, 512)]
    costs = [planned.cost for planned in plans]
    assert costs == sorted(costs)
    assert len(set(costs)) == len(costs)
    assert {planned.tokens_per_gpu * planned.cluster.gpus for planned in plans} == {25_000}
    assert all(0 <= planned.lost_share < 1 for planned in plans)


def test_cost_is_device_hours_times_the_price():
    dear, cheap = (Plan(WORK, cluster(gpus=16, price=price)) for price in (3.0, 1.5))
    assert dear.cost == 2 * cheap.cost == pytest.approx(dear.hours * 16 * 3.0)


SLOW_CARD = {"gpu": "P100", "launch_us": 0}


@pytest.mark.parametrize(
    ("bottleneck", "advice", "changes", "runs", "measured"),
    [
        ("compute", "raise hardware.num_workers", {**SLOW_CARD, "network_gbit": 3200}, 1, MEASURED),
        (
            "all-reduce",
            "lower hardware.num_workers to 8",
            {**SLOW_CARD, "network_gbit": 0.1},
            1,
            MEASURED,
        ),
        (
            "launches",
            "lower hardware.num_workers to 1 and do 16 runs",
            {"launch_us": 2_000, "gpus_per_node": 16},
            1,
            MEASURED,
        ),
        ("launches", "raise CHUNK_LOGITS_GPU", {"launch_us": 2_000}, 1, replace(MEASURED, launches=2)),
        ("data", "raise hardware.num_workers", SLOW_CARD, 1, replace(MEASURED, collate_tokens_per_s=1_000)),
        (
            "checkpoints",
            "use a faster disk; or raise train.checkpoint_every from 500 to",
            SLOW_CARD,
            1,
            replace(MEASURED, checkpoint_write_bytes_per_s=1e4),
        ),
        ("MLflow", "raise train.log_every", SLOW_CARD, 50_000, MEASURED),
    ],
)
def test_advice_names_the_bottleneck_and_the_setting(bottleneck, advice, changes, runs, measured):
    planned = Plan(WORK, cluster(gpus=16, **changes), runs, measured)
    assert planned.bottlenecks[0] == bottleneck
    assert re.match(rf"bottleneck {bottleneck}( \(\d+% of a step\))?: {re.escape(advice)}", planned.advice)


def test_bottleneck_goes_from_compute_to_the_network_as_that_gets_slower():
    rates = (3200, 400, 100, 10, 1, 0.1)
    found = [Plan(WORK, cluster(gpus=16, network_gbit=rate, **SLOW_CARD)).bottlenecks[0] for rate in rates]
    change = found.index("all-reduce")
    assert found == ["compute"] * change + ["all-reduce"] * (len(rates) - change)
    assert change > 0


def test_advice_is_more_devices_only_if_a_step_gets_shorter():
    work = replace(WORK, parameters=100_000_000)
    slow, fast = (Plan(work, cluster(network_gbit=rate, **SLOW_CARD), measured=FREE) for rate in (10, 3200))
    assert slow.bottlenecks[0] == fast.bottlenecks[0] == "compute"
    assert "more devices do not help (16 devices: " in slow.advice
    assert "raise hardware.num_workers (16 devices: " in fast.advice


def test_advice_of_a_batch_loses_a_tenth():
    planned = Plan(WORK, cluster(gpus=16, network_gbit=1), measured=FREE)
    tokens = float(re.search(r"\(at ([\d,]+), 90%", planned.advice)[1].replace(",", ""))
    larger = replace(WORK, batch_tokens=int(tokens), flops_per_step=WORK.flops_per_step * tokens / WORK.batch_tokens)
    assert Plan(larger, planned.cluster, measured=FREE).lost_share == pytest.approx(0.1, rel=0.05)


def run_main(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["cost_model", *arguments])
    main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus 0", "--gpus must be >= 1, got 0"),
        ("--gpus 8 12", "--gpus must be at most --gpus-per-node (8) or a multiple of it, got 12"),
        ("--gpus 12 --gpus-per-node 5", "--gpus must be at most --gpus-per-node (5) or a multiple of it, got 12"),
        ("--gpus-per-node 0", "--gpus-per-node must be >= 1, got 0"),
        ("--gpu V100", f"--gpu must be one of {', '.join(CARDS)}, got 'V100'"),
        ("--mfu 1.5", "--mfu must be in (0, 1], got 1.5"),
        ("--mfu nan", "--mfu must be in (0, 1], got nan"),
        ("--network-gbit 0", "--network-gbit must be > 0, got 0.0"),
        ("--launch-us -1", "--launch-us must be >= 0, got -1.0"),
        ("--price -3", "--price must be >= 0, got -3.0"),
        ("--model huge", "model must be one of base, big, mini, tiny, got 'huge'"),
    ],
)
def test_main_names_an_impossible_option_its_value_and_what_is_allowed(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, arguments.split())
    assert error.value.code == 1
    assert capsys.readouterr().err == f"cost_model: {message}\n"


def test_main_prints_tables_that_follow_the_options(monkeypatch, capsys):
    options = "--model base --gpu A100 --gpus 4 2 --gpus-per-node 4 --mfu 0.5 --price 7 --network-gbit 25"
    run_main(monkeypatch, options.split())
    lines = capsys.readouterr().out.splitlines()
    plans = [
        Plan(workload("base", REPOSITORY), cluster(gpus=n, gpus_per_node=4, mfu=0.5, price=7, network_gbit=25))
        for n in (2, 4)
    ]
    assert "| one run of base, number of A100 | 2 | 4 |" in lines
    assert f"| hours | {plans[0].hours:.3g} | {plans[1].hours:.3g} |" in lines
    assert f"| cost, $ | {plans[0].cost:.3g} | {plans[1].cost:.3g} |" in lines
    assert "| source (or target) tokens per device and step | 12,500 | 6,250 |" in lines
    assert "Each A100 reaches 50% of its 312 TFLOP/s and costs $7 an hour." in lines[0]
    assert "The 4 of a node exchange 240 GB/s, nodes 0.8 x 25 Gbit/s." in lines[0]
    assert not any("runs of" in line for line in lines)  # more runs do not fit one node


def test_main_plans_more_than_a_node_as_runs_at_once_too(monkeypatch, capsys):
    run_main(monkeypatch, ["--model", "big", "--gpu", "A100", "--gpus", "8", "24", "--price", "2"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "runs of" in line]
    alone = Plan(workload("big", REPOSITORY), cluster())
    assert line.startswith(
        f"- 24 as 3 runs of 8 at once: {72 / alone.hours:.0f} runs a day at ${alone.cost:.1f} each, "
    )
    assert f"an MLflow server {300 * alone.server_share:.0f}% busy (it can serve" in line
    assert f"{1 / alone.server_share:.0f} such runs)" in line


def test_main_prints_the_tables_of_docs_scale(monkeypatch, capsys):
    document = (REPOSITORY / "docs/scale.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    python -m tools\.cost_model(.*)$", document, re.MULTILINE)
    assert commands
    for options in commands:
        run_main(monkeypatch, options.split())
        assert capsys.readouterr().out.strip() in document


def test_measured_has_the_constants_that_the_benchmark_prints():
    source = (REPOSITORY / "tools/benchmarks/scale_constants.py").read_text(encoding="utf-8")
    assert set(re.findall(r'show\(\s*"(\w+)"', source)) == {field.name for field in fields(Measured)}


@pytest.mark.slow
def test_measured_launches_are_those_of_a_step_of_base():
    # In another process, because launches() changes modules.
    code = "from tools.benchmarks import scale_constants; scale_constants.launches()"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert found == {"launches": MEASURED.launches, "launches_per_chunk": MEASURED.launches_per_chunk}
