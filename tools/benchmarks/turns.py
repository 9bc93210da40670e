"""Whole training runs, with all their processes, in turns: while one works, the other is stopped."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from harness import ROOT, THREADS, failed

MICRO_BATCHES, BESIDE = "the threads at micro-batches", "other threads of their process"


@dataclass
class Runner:
    """A training run that is stopped and continued with all its processes. `told` is the pattern of the file, below
    `folder`, in which it tells its steps as pipeline/cluster/progress.py does."""

    command: list[str]
    folder: Path
    told: str
    awake_s: float = 0.0
    reached: list[tuple[int, float]] = field(default_factory=list)  # steps, and awake_s when they were done
    used_s: dict[tuple[int, int], float] = field(default_factory=dict)  # of a core before the first turn, by thread

    @contextmanager
    def started(self, steps: int) -> Iterator[None]:
        """Asleep after its first steps; killed in the end. Raises RuntimeError if it ends by itself before."""
        log = self.folder / "log.txt"
        variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(THREADS)}
        with log.open("wb") as file:
            process = psutil.Popen(self.command, env=variables, cwd=self.folder, stdout=file, stderr=file)
        try:
            while self._step() < steps:
                if process.poll() is not None:
                    raise failed(self.command, process.returncode, log)
                time.sleep(0.2)
            self.process = process
            self._send(signal.SIGSTOP)
            self.used_s = self.threads()
            yield
        finally:
            if process.is_running():
                for part in [*process.children(recursive=True), process]:
                    with suppress(psutil.NoSuchProcess):
                        part.kill()
            process.wait()

    def work(self, seconds: float) -> None:
        began = time.time()
        self._send(signal.SIGCONT)
        time.sleep(seconds)
        self._send(signal.SIGSTOP)
        ended = time.time()
        self.awake_s += ended - began
        (file,) = self.folder.glob(self.told)
        if (written := file.stat().st_mtime) > began:
            self.reached.append((self._step(), self.awake_s - (ended - written)))

    def threads(self) -> dict[tuple[int, int], float]:
        """Seconds of a core that each has used, by process and thread."""
        found = {}
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                found |= {(process.pid, t.id): t.user_time + t.system_time for t in process.threads()}
        return found

    def shares(self) -> dict[str, float]:
        """Of THREADS cores, since `used_s` and while awake, who took what: the busiest threads of the process that
        trains, as many, which are those at micro-batches; its others, the one among them that updates weights; and
        each other process, the largest first."""
        used = {thread: seconds - self.used_s.get(thread, 0.0) for thread, seconds in self.threads().items()}
        trains = max(used, key=used.__getitem__)[0]
        own = sorted((seconds for (process, _), seconds in used.items() if process == trains), reverse=True)
        others: Counter[str] = Counter()
        for (process, _), seconds in used.items():
            if process != trains:
                with suppress(psutil.NoSuchProcess):
                    others[self._name(process)] += seconds
        taken = {MICRO_BATCHES: sum(own[:THREADS]), BESIDE: sum(own[THREADS:])} | dict(others.most_common())
        return {who: seconds / self.awake_s / THREADS for who, seconds in taken.items()}

    def seconds(self, first: int, last: int) -> float:
        """From one step to another; between those that were seen, at an even pace."""
        import numpy as np

        steps, times = zip(*self.reached, strict=True)
        return float(np.interp(last, steps, times) - np.interp(first, steps, times))

    def _step(self) -> int:
        from pipeline.cluster import progress

        return max((progress.step(file) for file in self.folder.glob(self.told)), default=0)

    def _processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def _name(self, pid: int) -> str:
        """Python's by their script."""
        process = psutil.Process(pid)
        if process == self.process:
            return "the driver"
        scripts = [Path(part).name for part in process.cmdline() if part.endswith(".py")]
        return scripts[0] if scripts else process.name()

    def _send(self, number: int) -> None:
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def slower_by(runner: Runner, bare: Runner, turns: int, turn_s: float) -> float:
    """How much longer its steps take than the same ones of `bare`, as a share. They work in turns of a few seconds,
    in which the other sleeps."""
    for number in range(turns):
        for one in (runner, bare) if number % 2 else (bare, runner):
            one.work(turn_s)
    first = max(one.reached[0][0] for one in (runner, bare))
    last = min(one.reached[-1][0] for one in (runner, bare))
    return runner.seconds(first, last) / bare.seconds(first, last) - 1
