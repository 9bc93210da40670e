"""Which of a CPU's two libraries multiplies matrices in single precision: MKL, as torch has it, or oneDNN.

Which is faster depends on the processor. How much faster oneDNN was:

| processor                      | of          | nano | mini | tiny | base | source                      |
|--------------------------------|-------------|-----:|-----:|-----:|-----:|-----------------------------|
| AMD Zen 5 (AVX-512), 2 threads | training    |      |      |  1.3 |  1.5 | 2026-11-22, 1a57054         |
| AMD Zen 3 (AVX2), 2 threads    | training    |      |      |  1.0 |  1.0 | docs/performance.md         |
| Intel Xeon (AVX-512), 1 thread | products    | 0.82 | 0.93 | 0.91 | 0.90 | 2026-11-28, docs/log.md     |

MKL uses half of AVX-512's width on AMD's processors, all of it on Intel's. So with AVX-512 both multiply matrices of
the sizes below once, and oneDNN is chosen if it takes less than 1/LEAST_SPEEDUP of MKL's time.

The choice changes rounding, and a run must be the same to the bit in every process on a machine. So it is kept in the
user's cache folder, by processor and version of torch: the first process that trains or searches measures (a
fraction of a second), under a lock for which others wait. Where that folder cannot be written, and wherever oneDNN's
operator is missing or fails, it is MKL. To choose by hand, set the environment variable MODEL_CPU_MATMUL to mkl or
onednn.
"""

import fcntl
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

Library = Literal["mkl", "onednn"]

ENVIRONMENT = "MODEL_CPU_MATMUL"
LEAST_SPEEDUP = 1.2
"""A choice near 1 would be chance: it could be another after the cache was lost."""
SHAPES = ((512, 128, 384), (128, 128, 10_000), (512, 512, 1024))
"""Rows, inputs and outputs of the products measured: like tiny's attention, its logits, base's feed-forward."""
ROUNDS = 5


@cache
def chosen() -> Library:
    """The library that this process uses; the first call may measure, or wait for a process that does."""
    wanted = os.environ.get(ENVIRONMENT)
    if wanted:
        for library in get_args(Library):
            if wanted == library:
                return library
        raise ValueError(f"{ENVIRONMENT} is {wanted!r}: one of {', '.join(get_args(Library))} is needed")
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "mkl"
    try:
        return _recorded_choice(cache_folder())
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return "mkl"  # what is not kept could be another in the next process


def onednn_matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias by oneDNN: [m, k], [n, k], [n] -> [m, n], in single precision and without a gradient.

    torch.ops.mkldnn._linear_pointwise is private: torch.compile's own way to oneDNN.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def speedup() -> float:
    """MKL's time divided by oneDNN's, in one thread; 0 if oneDNN's operator is missing or fails.

    CPU time of that thread, which other processes hardly change; the median of rounds in which both take turns.
    """
    generator = torch.Generator().manual_seed(0)
    operands = [
        (torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator))
        for rows, inputs, outputs in SHAPES
    ]
    try:
        for a, b in operands:  # also compiles oneDNN's code for these shapes
            if not torch.allclose(onednn_matmul(a, b), a @ b.T, atol=1e-3, rtol=1e-3):
                return 0.0
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return 0.0
    ratios = []
    for _ in range(ROUNDS):
        times = []
        for multiply in (lambda a, b: a @ b.T, onednn_matmul):
            started = time.thread_time()
            for a, b in operands:
                multiply(a, b)
            times.append(time.thread_time() - started)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def cache_folder() -> Path:
    """Where choices are kept (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attention-pipeline"


def processor() -> str:
    """Vendor, family, model, stepping and name of this machine's processor."""
    names = ("vendor_id", "cpu family", "model", "stepping", "model name")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return ", ".join(fields.get(name, "?") for name in names)


def _recorded_choice(folder: Path) -> Library:
    """The choice in `folder`, measured if there is none. Raises OSError if it can be neither read nor written."""
    key = {"processor": processor(), "torch": torch.__version__, "shapes": str(SHAPES)}
    file = folder / f"matmul-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
    if found := _read(file, key):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := _read(file, key):  # by another process meanwhile
            return found
        measured = _in_a_thread_of_its_own(speedup)
        choice: Library = "onednn" if measured >= LEAST_SPEEDUP else "mkl"
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(key | {"library": choice, "speedup": round(measured, 3)}), encoding="utf-8")
        partial.replace(file)
    return choice


def _read(file: Path, key: dict[str, str]) -> Library | None:
    """The choice in a file; None if there is none, or it is damaged or another processor's."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict) or any(content.get(name) != value for name, value in key.items()):
        return None
    return next((library for library in get_args(Library) if content.get("library") == library), None)


def _in_a_thread_of_its_own(measure: Callable[[], float]) -> float:
    """Call it with one thread of torch's, out of reach of autocast, inference_mode and modes that fake tensors."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return pool.submit(measure).result()
    finally:
        torch.set_num_threads(threads)  # a new thread takes the number that was set last, by whomever
