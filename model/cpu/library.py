"""Choose the library that multiplies matrices on a CPU in single precision: MKL, torch's default, or oneDNN.

The faster one depends on the processor. Speed of oneDNN, relative to MKL:

| processor                      | measured on | nano | mini | tiny | base | source                      |
|--------------------------------|-------------|-----:|-----:|-----:|-----:|-----------------------------|
| AMD Zen 5 (AVX-512), 2 threads | training    |      |      |  1.3 |  1.5 | 2026-11-22, 1a57054         |
| AMD Zen 3 (AVX2), 2 threads    | training    |      |      |  1.0 |  1.0 | docs/performance.md         |
| Intel Xeon (AVX-512), 1 thread | products    | 0.82 | 0.93 | 0.91 | 0.90 | 2026-11-28, docs/log.md     |

MKL uses half of AVX-512's width on AMD's processors, and all of it on Intel's. On a processor with AVX-512, both
libraries therefore multiply matrices of the SHAPES below, and oneDNN is chosen if it is LEAST_SPEEDUP times as fast.

The choice changes rounding, and a run must be the same to the bit in every process on a machine. So the choice is
kept in the user's cache folder, by processor and version of torch. The first process that trains or searches
measures, which takes a fraction of a second, and holds a lock meanwhile; other processes wait for it. MKL is chosen
if the processor lacks AVX-512, the cache folder cannot be written, or oneDNN's operator is missing or fails. To
choose by hand, set the environment variable MODEL_CPU_MATMUL to mkl or onednn.
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
"""oneDNN has to be faster by this factor. Near 1 the choice would be chance, and could change without the cache."""
SHAPES = ((512, 128, 384), (128, 128, 10_000), (512, 512, 1024))
"""Rows, inputs and outputs of the measured products. They are like tiny's attention, tiny's logits and base's
feed-forward network."""
ROUNDS = 5


@cache
def chosen() -> Library:
    """The library that this process uses. The first call may measure, or wait for another process that measures.

    Raises ValueError if MODEL_CPU_MATMUL names no library.
    """
    wanted = os.environ.get(ENVIRONMENT)
    if wanted:
        for library in get_args(Library):
            if wanted == library:
                return library
        raise ValueError(f"{ENVIRONMENT} must be one of {', '.join(get_args(Library))}, got {wanted!r}")
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "mkl"
    try:
        return _recorded_choice(cache_folder())
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return "mkl"  # a choice that cannot be kept could differ in the next process


def onednn_matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias by oneDNN, in single precision and without a gradient: [m, k], [n, k], [n] -> [m, n].

    torch.ops.mkldnn._linear_pointwise is private. It is the operator that torch.compile uses.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def speedup() -> float:
    """MKL's time divided by oneDNN's on one thread, or 0 if oneDNN's operator is missing, fails or is wrong.

    Measures the CPU time of the thread, because other processes hardly change it. Each round times both libraries;
    the result is the median over ROUNDS.
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
    """The folder that keeps the choice (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attention-pipeline"


def processor() -> str:
    """Vendor, family, model, stepping and name of this machine's processor."""
    names = ("vendor_id", "cpu family", "model", "stepping", "model name")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return ", ".join(fields.get(name, "?") for name in names)


def _recorded_choice(folder: Path) -> Library:
    """The choice in `folder`; if there is none, measure and write it. Raises OSError if that fails."""
    key = {"processor": processor(), "torch": torch.__version__, "shapes": str(SHAPES)}
    file = folder / f"matmul-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
    if found := _read(file, key):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := _read(file, key):  # written by another process meanwhile
            return found
        measured = _in_a_thread_of_its_own(speedup)
        choice: Library = "onednn" if measured >= LEAST_SPEEDUP else "mkl"
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(key | {"library": choice, "speedup": round(measured, 3)}), encoding="utf-8")
        partial.replace(file)
    return choice


def _read(file: Path, key: dict[str, str]) -> Library | None:
    """The choice in a file, or None if the file is missing, damaged or of another processor."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict) or any(content.get(name) != value for name, value in key.items()):
        return None
    return next((library for library in get_args(Library) if content.get("library") == library), None)


def _in_a_thread_of_its_own(measure: Callable[[], float]) -> float:
    """Call `measure` in a new thread, with one thread for torch. The caller's autocast, inference_mode and modes that
    fake tensors do not apply to it."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return pool.submit(measure).result()
    finally:
        torch.set_num_threads(threads)  # new threads take the number that any thread set last
