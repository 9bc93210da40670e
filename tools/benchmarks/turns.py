"""Compare two training runs that work alternately: while one runs, all processes of the other are stopped."""

import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tools.benchmarks.harness import THREADS, environment, failed

MICRO_BATCHES, OTHER_THREADS = "threads that compute micro-batches", "other threads of their process"


@dataclass
class Runner:
    """A training run that can be stopped and continued, with all its processes.

    `progress` is a pattern for the file below `folder` in which the run reports its steps, in the format of
    pipeline/cluster/progress.py.
    """

    command: list[str]
    folder: Path
    progress: str
    awake_s: float = 0.0
    reached: list[tuple[int, float]] = field(default_factory=list)  # (step, awake_s at its end)
    used_s: dict[tuple[int, int], float] = field(default_factory=dict)  # before the first turn, by (process, thread)

    @contextmanager
    def started(self, steps: int) -> Iterator[None]:
        """Start the run and stop it after `steps` steps; kill it at the end.

        Raises CommandError if the run ends before that.
        """
        log = self.folder / "log.txt"
        variables = environment(OMP_NUM_THREADS=str(THREADS))
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
        """Continue the run for `seconds`, then stop it again."""
        began = time.time()
        self._send(signal.SIGCONT)
        time.sleep(seconds)
        self._send(signal.SIGSTOP)
        ended = time.time()
        self.awake_s += ended - began
        (file,) = self.folder.glob(self.progress)
        if (written := file.stat().st_mtime) > began:
            self.reached.append((self._step(), self.awake_s - (ended - written)))

    def threads(self) -> dict[tuple[int, int], float]:
        """Processor seconds that each thread has used, by (process, thread)."""
        found: dict[tuple[int, int], float] = {}
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                found |= {(process.pid, t.id): t.user_time + t.system_time for t in process.threads()}
        return found

    def shares(self) -> dict[str, float]:
        """Shares of the time of THREADS cores that the parts of the run have used since its first turn, while awake.

        First come the THREADS busiest threads of the process that trains, which compute micro-batches. Then come its
        other threads, including the one that updates the weights, and then the other processes, the busiest first.
        """
        used = {thread: seconds - self.used_s.get(thread, 0.0) for thread, seconds in self.threads().items()}
        trains = max(used, key=used.__getitem__)[0]
        own = sorted((seconds for (process, _), seconds in used.items() if process == trains), reverse=True)
        others: defaultdict[str, float] = defaultdict(float)
        for (process, _), seconds in used.items():
            if process != trains:
                with suppress(psutil.NoSuchProcess):
                    others[self._name(process)] += seconds
        taken = {MICRO_BATCHES: sum(own[:THREADS]), OTHER_THREADS: sum(own[THREADS:])}
        taken |= sorted(others.items(), key=lambda item: -item[1])
        return {who: seconds / self.awake_s / THREADS for who, seconds in taken.items()}

    def seconds(self, first: int, last: int) -> float:
        """Awake seconds between two steps, interpolated from the steps that were seen."""
        import numpy as np

        steps, times = zip(*self.reached, strict=True)
        return float(np.interp(last, steps, times) - np.interp(first, steps, times))

    def _step(self) -> int:
        from pipeline.cluster.progress import steps_done

        return max((steps_done(file) for file in self.folder.glob(self.progress)), default=0)

    def _processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def _name(self, pid: int) -> str:
        """The name of a process; for Python, the name of its script."""
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
    """How much longer the steps of `runner` take than the same steps of `bare`: 0.1 for 10%.

    They work alternately, in turns of `turn_s` seconds.
    """
    for number in range(turns):
        for one in (runner, bare) if number % 2 else (bare, runner):
            one.work(turn_s)
    first = max(one.reached[0][0] for one in (runner, bare))
    last = min(one.reached[-1][0] for one in (runner, bare))
    return runner.seconds(first, last) / bare.seconds(first, last) - 1
