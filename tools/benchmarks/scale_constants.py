"""Measure the constants of tools/cost_model.py on this machine, in about a minute.

    python -m tools.benchmarks.scale_constants

Prints a line for each constant: a median, and what it was measured on. Reads
params.yaml and conf/model. Needs nothing outside this machine.
"""

import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from mlflow import MlflowClient
from mlflow.entities import Metric
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import transformer
from model.config import EOS
from model.cpu import attention, library
from model.loss import CHUNK_LOGITS
from model.transformer import Transformer
from pipeline.common.cli import exit_on_error, parser
from pipeline.common.settings import load_settings
from pipeline.data.batching import BatchPlan, MicroBatch, Position, collate
from pipeline.data.dataset import EncodedSplit
from pipeline.tracking.metric_writer import MAX_METRICS_PER_CALL
from pipeline.tracking.store import server_answers
from pipeline.training import checkpoint
from pipeline.training.loop import GlobalBatch, TrainState, adam, train_step
from pipeline.training.threads import ThreadedDataParallel
from tools.benchmarks.harness import ROOT, write_corpus
from tools.cost_model import VOCAB_SIZE

PAIRS = 500_000
POINT = {"train_loss": 4.2, "learning_rate": 7e-4, "grad_norm": 1.1, "tokens_per_second": 13_000.0}
"""A point of the training curve, as pipeline/training/loop.py reports it."""
CLIENTS = 4
NO_LAUNCH = {"_unsafe_view", "detach", "empty", "empty_like", "promote_types"}


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def show(name: str, value: float, what: str) -> None:
    print(f"{name:32} {value:<12.4g} {what}", flush=True)


def base() -> Transformer:
    torch.manual_seed(0)
    return Transformer(load_settings(ROOT, model="base").model.config(VOCAB_SIZE))


def checkpoints() -> None:
    """Bytes per second of save and load, with checksums and fsync. Reads come from the disk, not from memory."""
    model = base()
    optimizer = adam(model, 0.9, 0.98, 1e-9)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    writes, reads, size = [], [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in range(1, 4):
            writes.append(
                seconds(partial(checkpoint.save, folder, model, optimizer, TrainState(step=step), {}, keep=1))
            )
            written = checkpoint.folder_of(folder, step)
            size = sum(file.stat().st_size for file in written.iterdir())
            for file in written.iterdir():
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            reads.append(seconds(partial(checkpoint.load, written)))
    what, write_s, load_s = f"a checkpoint of base, {size / 1e6:.0f} MB", *map(statistics.median, (writes, reads))
    show("checkpoint_write_bytes_per_s", size / write_s, f"{what}: {write_s:.2f} s")
    show("checkpoint_load_bytes_per_s", size / load_s, f"{what}: {load_s:.2f} s")


def _reduce(rank: int, store: str, numel: int, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    vector = torch.zeros(numel)
    times = [seconds(lambda: dist.all_reduce(vector)) for _ in range(8)]
    if rank == 0:
        Path(result).write_text(str(statistics.median(times[1:])))
    dist.destroy_process_group()


def all_reduce() -> None:
    """Bytes per second that each of n = 2 processes sends in gloo's all-reduce: 2 (n - 1) / n of the gradients."""
    numel = sum(p.numel() for p in base().parameters())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        result = f"{folder}/seconds"
        torch.multiprocessing.spawn(_reduce, (f"{folder}/store", numel, result), nprocs=2)
        took = float(Path(result).read_text())
    show("gloo_bytes_per_s", 4 * numel / took, f"{4 * numel / 1e6:.0f} MB of gradients, 2 processes: {took:.3f} s")


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/files"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not server_answers(uri):
            if time.monotonic() > deadline or process.poll() is not None:
                raise OSError(f"the MLflow server does not start: {(folder / 'log').read_text()[-500:]}")
            time.sleep(0.2)
        yield uri
    finally:
        process.terminate()
        process.wait(30)


def mlflow_writes() -> None:
    """Time of the server for a delivery by MetricWriter, which is a GET of /health and a log_batch, from several runs
    at once."""
    with tempfile.TemporaryDirectory() as folder, mlflow_server(Path(folder)) as uri:
        clients = [MlflowClient(uri) for _ in range(CLIENTS)]
        experiment = clients[0].create_experiment("scale")
        runs = [client.create_run(experiment).info.run_id for client in clients]

        def deliver(number: int, calls: int, points: int, first: int) -> None:
            for call in range(calls):
                steps = range(first + call * points, first + (call + 1) * points)
                metrics = [Metric(key, value, step, step) for step in steps for key, value in POINT.items()]
                with urllib.request.urlopen(f"{uri}/health") as answer:
                    answer.read()
                clients[number].log_batch(runs[number], metrics=metrics)

        def in_all(calls: int, points: int, first: int) -> float:
            """Seconds of the server per call, while all clients call it."""
            with ThreadPoolExecutor(CLIENTS) as pool:
                numbers = range(CLIENTS)
                took = seconds(lambda: list(pool.map(lambda number: deliver(number, calls, points, first), numbers)))
            return took / calls / CLIENTS

        in_all(5, 1, 0)  # warms up
        single = statistics.median(in_all(20, 1, 1_000 * n) for n in range(1, 4))
        most = MAX_METRICS_PER_CALL // len(POINT)
        full = statistics.median(in_all(2, most, 10_000 * n) for n in range(1, 4))
    per_point = (full - single) / (most - 1)
    show("mlflow_s_per_call", single - per_point, f"{1 / single:.0f} calls of one point a second, {CLIENTS} runs")
    show("mlflow_s_per_point", per_point, f"a point has {len(POINT)} metrics; a call of {most}: {full:.2f} s")


def data() -> None:
    """Time to plan an epoch, and target tokens per second of collate, on random tokens with realistic lengths."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder, PAIRS, VOCAB_SIZE)
        split = EncodedSplit.open(folder, "train")
        src, tgt = split.src.lengths, split.tgt.lengths
        sizes = {"batch_tokens": 25_000, "max_length": 1024, "seed": 1}
        made = seconds(lambda: BatchPlan(src, tgt, micro_batch_tokens=3600, **sizes))
        plan = BatchPlan(src, tgt, micro_batch_tokens=3600, **sizes)
        epochs = statistics.median(seconds(partial(plan.steps, epoch)) for epoch in range(3))
        show(
            "epoch_plan_s_per_million", epochs / PAIRS * 1e6, f"{PAIRS:,} pairs; the plan itself, once: {made:.2f} s"
        )
        for micro_batch_tokens in (7200, 3600):
            plan = BatchPlan(src, tgt, micro_batch_tokens=micro_batch_tokens, **sizes)
            batches = [indices for step in plan.steps(0)[:100] for indices in step]
            tokens = sum(collate(split, indices).num_tgt_tokens for indices in batches)
            took = statistics.median(seconds(partial(_collate_all, split, batches)) for _ in range(3))
            what = f"micro-batches of {micro_batch_tokens:,}, {100 * plan.padding_share():.0f}% padding"
            show("collate_tokens_per_s", tokens / took, f"target tokens, one core, {what}")


def _collate_all(split: EncodedSplit, batches: list[np.ndarray]) -> None:
    for indices in batches:
        collate(split, indices)


class Counter(TorchDispatchMode):
    """Count the operators that compute something, as a GPU would launch them. Views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.overloadpacket.__name__ not in NO_LAUNCH
        return func(*args, **kwargs or {})


def launches() -> None:
    """Operators of a step on one micro-batch, outside and inside the loss.

    Two sizes of the micro-batch tell them apart, because the loss computes its logits chunk by chunk.
    """
    os.environ[library.ENVIRONMENT] = "mkl"  # products, attention and dropout as on a GPU
    attention.MAX_UNFUSED_QUERIES = 0
    transformer.dropout = F.dropout  # type: ignore[assignment]
    model = base()
    optimizer = adam(model, 0.9, 0.98, 1e-9)
    rows = CHUNK_LOGITS // VOCAB_SIZE
    settings = replace(load_settings(ROOT).train, max_grad_norm=0.0)
    parallel, counts = ThreadedDataParallel(model), []
    for chunks in (1, 1, 3):  # the first step, which creates Adam's moments, is not counted
        tokens = torch.full((1, rows * chunks), EOS + 1)
        batch = MicroBatch(tokens, tokens, tokens, tokens.numel())
        step = GlobalBatch(Position(0, 1), [(0, batch)], batch.num_tgt_tokens)
        with Counter() as counter:
            train_step(parallel, optimizer, step, settings, TrainState(), seed=1, bf16=False, rate=0.0)
        counts.append(counter.count)
    per_chunk = (counts[2] - counts[1]) / 2
    show(
        "launches", counts[1] - per_chunk, "operators in a step of base on one micro-batch, without those of the loss"
    )
    show("launches_per_chunk", per_chunk, "operators in the loss, for every chunk of its logits")


def main() -> None:
    parser("tools.benchmarks.scale_constants", __doc__).parse_args()
    cpus = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    print(
        f"{cpus} cores ({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}; ",
        end="",
    )
    print(f"load of other processes at the start: {load:.1f}")
    with exit_on_error("scale_constants"):
        for measure in (launches, data, all_reduce, checkpoints, mlflow_writes):
            measure()


if __name__ == "__main__":
    main()
