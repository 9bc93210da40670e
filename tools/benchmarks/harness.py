"""Paired measurements: each system is a process, and the processes work in interleaved blocks, one at a time.

A system prints a line when it is ready. It then works one block for each line that it reads, and prints what it
measured. A round is one block of each system, so background load affects all systems equally. A ratio is taken within
each round; the tables give its median, smallest and largest value.

Systems in the environment of other toolkits import this module too. At import it needs only the standard library.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
THREADS = 2
OPERATORS = "all operators"
LAUNCHER = """import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""
"""Run a command as the child of a small process, because the peak memory of a child includes that of its parent."""


class CommandError(RuntimeError):
    """A command that a benchmark runs has failed."""


@dataclass
class System:
    """A program to compare. `command` starts it."""

    name: str
    command: list[str]
    blocks: list[dict[str, float]] = field(default_factory=list)  # its measurements, one per round
    peak_bytes: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)  # from `_profile`

    def median(self, key: str) -> float:
        return statistics.median(block[key] for block in self.blocks)

    def ratio(self, other: "System", key: str) -> str:
        """The value of this system divided by that of the other, in each round: median (smallest to largest)."""
        ratios = [ours[key] / theirs[key] for ours, theirs in zip(self.blocks, other.blocks, strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def module(name: str, python: str | Path, *options: object) -> list[str]:
    """The command that runs a module of this package. It needs `environment`."""
    return [str(python), "-m", f"{__package__}.{name}", *map(str, options)]


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that imports this project, from any folder."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def paired(systems: Sequence[System], rounds: int, profile: bool = False) -> None:
    """Run all systems and fill in their measurements. `profile` adds `shares` to the first one.

    Raises CommandError if a system dies.
    """
    with ExitStack() as stack:
        running = []
        for system in systems:
            log(f"{system.name}: start and warm up")
            running.append(stack.enter_context(_started(system)))
            _answer(system, running[-1])
        for number in range(rounds):
            for system, process in zip(systems, running, strict=True):
                log(f"round {number + 1} of {rounds}: {system.name}")
                system.blocks.append(_ask(system, process, "block"))
        for system, process in zip(systems, running, strict=True):
            system.peak_bytes = _ask(system, process, "peak")["peak_bytes"]
        if profile:
            systems[0].shares = _ask(systems[0], running[0], "profile")


@contextmanager
def _started(system: System) -> Iterator["subprocess.Popen[str]"]:
    variables = environment(PYTHONWARNINGS="ignore", OMP_NUM_THREADS=str(THREADS))
    with subprocess.Popen(
        system.command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _ask(system: System, process: "subprocess.Popen[str]", word: str) -> dict[str, float]:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    return _answer(system, process)


def _answer(system: System, process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise CommandError(f"{system.name} ended with exit code {process.wait()}: {' '.join(system.command)}")


def serve(block: Callable[[], dict[str, float]], warm_up: bool = True) -> None:
    """Answer `paired` over stdin and stdout: one block to warm up, then one answer for each line."""
    if warm_up:
        block()
    print("{}", flush=True)
    answers = {"block": block, "peak": _peak, "profile": lambda: _profile(block)}
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def _peak() -> dict[str, float]:
    """Peak memory in bytes: of the GPU if it is used, else of the process."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return {"peak_bytes": torch.cuda.max_memory_allocated()}
    status = Path("/proc/self/status").read_text()  # getrusage includes the memory of the parent
    return {"peak_bytes": float(status.partition("VmHWM:")[2].split()[0]) * 1024}


def _profile(block: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Where the time of a block goes, by torch's profiler.

    OPERATORS is the share of the threads' time that operators take; on a GPU, of its time that kernels take. The
    other keys are the nine operators or kernels that take most, as shares of OPERATORS.
    """
    import torch

    device = "CUDA" if torch.cuda.is_initialized() else "CPU"
    threads = torch.profiler._ExperimentalConfig(profile_all_threads=True)  # training and search start threads
    activity = getattr(torch.profiler.ProfilerActivity, device)
    with torch.profiler.profile(activities=[activity], experimental_config=threads) as profiler:
        started = time.perf_counter()
        block()
        took = time.perf_counter() - started
    which = "self_device_time_total" if device == "CUDA" else "self_cpu_time_total"
    times = {event.key.removeprefix("aten::"): getattr(event, which) for event in profiler.key_averages()}
    total = sum(times.values())
    shares = {name: times[name] / total for name in sorted(times, key=lambda name: -times[name])[:9]}
    return {OPERATORS: total / 1e6 / took / (1 if device == "CUDA" else torch.get_num_threads())} | shares


def run(command: Sequence[object], folder: Path, **variables: str) -> tuple[float, float]:
    """Run a command in `folder`. Returns its seconds, and the peak bytes of the largest process that it starts.

    Raises CommandError with the end of the output if the command fails.
    """
    launched = [sys.executable, "-ISc", LAUNCHER, *map(str, command)]
    with (folder / "log.txt").open("wb") as output:
        started = time.perf_counter()
        process = subprocess.run(
            launched, env=environment(**variables), cwd=folder, stdout=subprocess.PIPE, stderr=output, text=True
        )
        took = time.perf_counter() - started
    code, peak_kb = map(int, process.stdout.split())
    if code:
        raise failed(command, code, folder / "log.txt")
    return took, peak_kb * 1024


def failed(command: Sequence[object], code: int, log: Path) -> CommandError:
    """A CommandError with the end of the command's output."""
    return CommandError(
        f"{' '.join(map(str, command))} ended with exit code {code}:\n{log.read_text(errors='replace')[-2000:]}"
    )


def multiply_rates(threads: int) -> dict[str, float]:
    """FLOP/s of each matrix library of torch, at a product of 2048 x 2048 x 2048 in single precision.

    The larger one is the ceiling of all training and search.
    """
    import torch

    from model.cpu.library import onednn_matmul

    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    rates = {"MKL": multiply_rate(lambda: a @ b, 2048)}
    if torch.backends.mkldnn.is_available():
        rates["oneDNN"] = multiply_rate(lambda: onednn_matmul(a, b), 2048)
    return rates


def multiply_rate(multiply: Callable[[], Any], size: int) -> float:
    """FLOP/s of `multiply`, a product of two matrices [size, size]; the median of 20 calls after 10 to warm up."""
    times = []
    for _ in range(30):
        started = time.perf_counter()
        multiply()[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[10:])


def flops_per_token(config: Any, encoded: Path) -> float:
    """FLOPs of training per target token, without padding: what the corpus needs in any toolkit."""
    from model.flops import training_flops
    from pipeline.data.dataset import EncodedSplit

    split = EncodedSplit.open(encoded, "train")
    lengths = list(zip(split.src.lengths[::10] + 1, split.tgt.lengths[::10] + 1, strict=True))
    return sum(training_flops(config, 1, src, tgt) for src, tgt in lengths) / sum(int(tgt) for _, tgt in lengths)


def vectors() -> str:
    """The vector instructions that torch uses here: AVX2, AVX512."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def sentence_lengths(num_pairs: int) -> tuple[Any, Any]:
    """Random lengths of sources and targets like those of WMT 2014: a median of 24 tokens, similar within a pair."""
    import numpy as np

    rng = np.random.default_rng(0)
    topic = rng.normal(0, 0.55, num_pairs)
    src, tgt = (np.clip(24 * np.exp(topic + rng.normal(0, 0.15, num_pairs)), 1, 250).astype(np.int32) for _ in "ab")
    return src, tgt


def write_corpus(folder: Path, num_pairs: int, vocab_size: int) -> None:
    """Write an encoded training split of random tokens."""
    from dataclasses import asdict

    import numpy as np

    from pipeline.common.atomic_io import write_json
    from pipeline.common.checksums import write_sums
    from pipeline.data.dataset import SIDES, CorpusInfo, encoded_paths

    rng = np.random.default_rng(0)
    for side, lengths in zip(SIDES, sentence_lengths(num_pairs), strict=True):
        tokens, offsets = encoded_paths(folder, "train", side)
        np.save(offsets, np.concatenate(([0], lengths.cumsum(dtype=np.int64))))
        np.save(tokens, rng.integers(4, vocab_size, lengths.sum(), dtype=np.uint16))
    info = CorpusInfo(
        src="en", tgt="de", vocab_size=vocab_size, pairs={"train": num_pairs}, words={}, texts={}, sha256=""
    )
    write_json(folder / "meta.json", asdict(info))
    write_sums(folder, [path.name for path in folder.iterdir()])


def machine() -> str:
    """A description of the machine: cores, processor, Python, load."""
    from pipeline.common.machine import machine_name

    return (
        f"{machine_name()} ({vectors()}), "
        f"Python {platform.python_version()}; "
        f"load of other processes at the start: {os.getloadavg()[0]:.1f}"
    )


def log(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)
