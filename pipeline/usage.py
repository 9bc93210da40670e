"""What a run has taken, over all attempts of its workers: one that was killed has cost its time too.

Each attempt keeps a small file of the run's folder up to date; `usage` adds them up."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import LiveFile
from pipeline.storage import Folder, errors_of

INTERVAL_S = 2.0
STORE_INTERVAL_S = 20.0
"""A store takes longer for a file, and money."""


@dataclass(frozen=True)
class Usage:
    """Device-seconds are wall time, from a worker's first line to its last, times CPU cores or GPUs of all workers.
    `steps` counts those too that a kill undid. `first_step_at` is when the last attempt had taken its first step
    (seconds since the epoch; None: it took none), `last_sign_at` when it was last heard of."""

    attempts: int = 0
    device_seconds: float = 0.0
    steps: int = 0
    first_step_at: float | None = None
    last_sign_at: float | None = None


class Meter:
    """Rank 0's side, of one attempt. At most the last `interval_s` of a killed attempt are lost."""

    def __init__(self, run_folder: Folder, devices: int) -> None:
        self.started = time.time()
        self.file = LiveFile(run_folder / "usage" / f"{time.time_ns()}.json")
        self.interval_s = INTERVAL_S if isinstance(run_folder, Path) else STORE_INTERVAL_S
        self.devices, self.steps, self.written = devices, 0, 0.0
        self.first_step_at: float | None = None
        self.write()

    def step(self) -> None:
        """After each step."""
        self.steps += 1
        if self.first_step_at is None:
            self.first_step_at = time.time()
        if time.monotonic() - self.written > self.interval_s:
            self.write()

    def write(self) -> None:
        seconds = time.time() - self.started
        values = {
            "seconds": seconds,
            "devices": self.devices,
            "steps": self.steps,
            "first_step_at": self.first_step_at,
        }
        self.file.write(values)
        self.written = time.monotonic()

    def close(self) -> None:
        self.write()
        self.file.close()


def usage(run_folder: Folder) -> Usage:
    """The sum over the attempts that the folder knows."""
    with errors_of(run_folder):
        paths: list[Folder] = sorted((run_folder / "usage").glob("[0-9]*.json"), key=lambda path: path.name)
        attempts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return Usage(
        attempts=len(attempts),
        device_seconds=sum(attempt["seconds"] * attempt["devices"] for attempt in attempts),
        steps=sum(attempt["steps"] for attempt in attempts),
        first_step_at=attempts[-1]["first_step_at"] if attempts else None,
        last_sign_at=int(paths[-1].stem) / 1e9 + attempts[-1]["seconds"] if attempts else None,
    )
