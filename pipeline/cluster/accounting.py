"""The cost of a run: the time of all attempts of its workers, including those that were killed.

Each attempt keeps a small file in the run's folder up to date; `total_usage` adds them up."""

import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.common.atomic_io import write_json
from pipeline.common.periodic import PeriodicJsonFile
from pipeline.common.storage import AnyPath, as_os_error

CARRIED = "usage/continued.json"
USAGE_INTERVAL_S = 2.0
HEARTBEAT_S = 20.0
"""Seconds between heartbeats, also during a long step, validation or checkpoint. tracking/runs.py takes a run without
one for LONG_SILENCE_S as dead."""


@dataclass(frozen=True)
class Usage:
    """The cost of a run so far.

    - `attempts`: the number of attempts, killed ones included. Continuing a shorter run is not a further attempt.
    - `device_seconds`: the wall time of each attempt, from the start of its workers' code to its end, times the CPU
      cores or GPUs of all its workers, added up.
    - `steps`: all steps, including those that were lost when an attempt was killed.
    - `first_step_at`: when the last attempt finished its first step, in seconds since the epoch; None if it has not.
    - `last_sign_at`: when the last attempt was last heard of, in seconds since the epoch.
    - `on_gpus`: whether the last attempt ran on GPUs; None if that is not known."""

    attempts: int = 0
    device_seconds: float = 0.0
    steps: int = 0
    first_step_at: float | None = None
    last_sign_at: float | None = None
    on_gpus: bool | None = None


class UsageRecorder:
    """Records wall time and steps of one attempt (rank 0 only). If the attempt is killed, the time since its file was
    last written is lost: USAGE_INTERVAL_S (more in an object store), or up to HEARTBEAT_S within a long step."""

    def __init__(self, run_folder: AnyPath, devices: int, on_gpus: bool) -> None:
        self.started = time.time()
        self.file = PeriodicJsonFile(run_folder / "usage" / f"{time.time_ns()}.json", USAGE_INTERVAL_S)
        self.devices, self.on_gpus, self.steps = devices, on_gpus, 0
        self.first_step_at: float | None = None
        self.closing, self.writing = threading.Event(), threading.Lock()
        self.heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.write()
        self.heartbeat.start()

    def count_step(self) -> None:
        """Call this after each step."""
        self.steps += 1
        if self.first_step_at is None:
            self.first_step_at = time.time()
        if self.file.is_due():
            self.write()

    def write(self) -> None:
        seconds = time.time() - self.started
        values = {
            "seconds": seconds,
            "devices": self.devices,
            "on_gpus": self.on_gpus,
            "steps": self.steps,
            "first_step_at": self.first_step_at,
        }
        with self.writing:
            self.file.write(values)

    def _beat(self) -> None:
        while not self.closing.wait(HEARTBEAT_S):
            self.write()

    def close(self) -> None:
        self.closing.set()
        self.write()
        self.file.close()


def total_usage(run_folder: AnyPath) -> Usage:
    """Add up all attempts of the run in this folder, and the usage carried from the run that it continues. A damaged
    file is ignored."""
    with as_os_error(run_folder):
        found = [(path, values) for path in _attempts(run_folder) if (values := _read(path))]
        paths, attempts = [path for path, _ in found], [values for _, values in found]
        before = _carried(run_folder)
    continues = bool(before.attempts and attempts)  # the first attempt here continues the last one of the other run
    return Usage(
        attempts=before.attempts + len(attempts) - continues,
        device_seconds=before.device_seconds + sum(attempt["seconds"] * attempt["devices"] for attempt in attempts),
        steps=before.steps + sum(attempt["steps"] for attempt in attempts),
        first_step_at=attempts[-1].get("first_step_at") if attempts else None,
        last_sign_at=int(paths[-1].stem) / 1e9 + attempts[-1]["seconds"] if attempts else None,
        on_gpus=attempts[-1].get("on_gpus") if attempts else None,
    )


def carry_usage(source: AnyPath, target: AnyPath, share: float) -> None:
    """Add `share` (in [0, 1]) of the usage of the run in `source` to the run in `target`, which continues it. Calling
    this again adds nothing."""
    path = target / CARRIED
    with as_os_error(target):
        known = path.exists()
    if not known:
        used = total_usage(source)
        values = {"device_seconds": used.device_seconds * share, "steps": round(used.steps * share)}
        write_json(path, {"attempts": used.attempts, **values})


def _carried(run_folder: AnyPath) -> Usage:
    values = _read(run_folder / CARRIED, ("attempts", "device_seconds", "steps"))
    return Usage(**values) if values else Usage()


def _read(path: AnyPath, keys: Sequence[str] = ("seconds", "devices", "steps")) -> dict[str, Any] | None:
    """Read the file; None if it does not exist or if one of `keys` is not a finite number in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if all(math.isfinite(values[key]) for key in keys) else None
    except (FileNotFoundError, IsADirectoryError, ValueError, LookupError, TypeError):
        return None


def has_begun_since(run_folder: AnyPath, moment: float) -> bool:
    """Whether an attempt of the run in this folder has started since `moment`, in seconds since the epoch."""
    return any(int(path.stem) >= moment * 1e9 for path in _attempts(run_folder))


def _attempts(run_folder: AnyPath) -> list[AnyPath]:
    """The file of each attempt, oldest first. Its name is the attempt's start, in nanoseconds since the epoch."""
    found = [path for path in (run_folder / "usage").glob("[0-9]*.json") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: path.name)
