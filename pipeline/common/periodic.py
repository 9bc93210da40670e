"""Small JSON files that are written again and again, for other processes to look at: progress, usage."""

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import write_json
from pipeline.common.storage import AnyPath

STORE_PAUSE_S = 30.0
"""After a store could not be reached."""
STORE_FACTOR = 10
"""By how much seldomer a store is written to: a file takes longer there, and money."""


def interval_of(path: AnyPath, on_disk_s: float) -> float:
    """Seconds between two writings of the file, or two readings."""
    return on_disk_s if isinstance(path, Path) else STORE_FACTOR * on_disk_s


class PeriodicJsonFile:
    """A JSON file whose writing never stops the caller: errors of a disk are ignored, and to a store the newest
    values go from a thread of their own, once it can be reached."""

    def __init__(self, path: AnyPath, on_disk_s: float) -> None:
        self.path = path
        self._interval_s, self._written = interval_of(path, on_disk_s), 0.0
        self._newest: Any = None
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"writes {path.name}", daemon=True)
        if not isinstance(path, Path):
            self._thread.start()

    def is_due(self) -> bool:
        """Whether the last `write` is longer ago than the file's interval."""
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
        """Wait until the last values have arrived, for STORE_PAUSE_S at most."""
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
