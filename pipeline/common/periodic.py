"""Small JSON files that are rewritten periodically for other processes to read: progress, usage."""

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import write_json
from pipeline.common.storage import AnyPath

STORE_PAUSE_S = 30.0
"""Seconds between attempts to reach a store."""
STORE_FACTOR = 10
"""A store is written this many times less often than a disk: each file takes longer there, and costs money."""


def interval_of(path: AnyPath, on_disk_s: float) -> float:
    """Seconds between two writes (or reads) of a file: `on_disk_s` on a disk, STORE_FACTOR times that in a store."""
    return on_disk_s if isinstance(path, Path) else STORE_FACTOR * on_disk_s


class PeriodicJsonFile:
    """A JSON file whose writes never fail or block the caller.

    Errors of a disk are ignored. A thread writes the newest values to a store, as soon as it can be reached.
    """

    def __init__(self, path: AnyPath, on_disk_s: float) -> None:
        self.path = path
        self._interval_s, self._written = interval_of(path, on_disk_s), 0.0
        self._newest: Any = None
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"writes {path.name}", daemon=True)
        if not isinstance(path, Path):
            self._thread.start()

    def is_due(self) -> bool:
        """Whether the file's interval has passed since the last `write`."""
        return time.monotonic() - self._written > self._interval_s

    def write(self, values: Any) -> None:
        if isinstance(self.path, Path):
            with suppress(OSError):
                write_json(self.path, values)
        else:
            self._newest = values
            self._wake.set()
        self._written = time.monotonic()

    def close(self) -> None:
        """Wait until the last values are written, for at most STORE_PAUSE_S seconds."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(STORE_PAUSE_S)

    def _run(self) -> None:
        while not self._closing.is_set() or self._wake.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                if self._newest is not None:
                    write_json(self.path, self._newest)
            except OSError:
                self._closing.wait(STORE_PAUSE_S)
