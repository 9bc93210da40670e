"""What a far worker is doing, on this terminal: the worker keeps a small file beside its checkpoints up to date,
the driver reads it and shows a progress bar. (Ray relays what workers print, but not their progress bars.)"""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from pipeline.common.periodic import PeriodicJsonFile, interval_of
from pipeline.common.storage import AnyPath, as_os_error

INTERVAL_S = 0.5
REDRAW_S = 0.1 if sys.stderr.isatty() else 30.0
"""A log keeps every state of the bar."""


class Reporter:
    """The worker's side. Writing the file is cheap, and done twice a second at most.

    A worker that takes a dead one's place adds to what that one said.
    """

    def __init__(self, path: AnyPath) -> None:
        self.file = PeriodicJsonFile(path, INTERVAL_S)
        news = _read(path)
        self.said: list[str] = news["said"] if news else []
        self.step, self.text = 0, ""

    def progress(self, step: int, text: str) -> None:
        self.step, self.text = step, text
        if self.file.is_due():
            self.flush()

    def say(self, line: str) -> None:
        self.said.append(line)
        self.flush()

    def flush(self) -> None:
        self.file.write({"step": self.step, "text": self.text, "said": [*self.said]})

    def close(self) -> None:
        self.flush()
        self.file.close()


@contextmanager
def shown(path: AnyPath, total: int, name: str) -> Iterator[None]:
    """Show what the Reporter of this path writes, from now to the end of the block."""
    with suppress(OSError), as_os_error(path):
        path.unlink(missing_ok=True)
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(path, total, name, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show(path: AnyPath, total: int, name: str, done: threading.Event) -> None:
    bar: tqdm | None = None
    num_said = 0
    ended = False
    while not ended:
        ended = done.wait(interval_of(path, INTERVAL_S))  # and once more after the end
        news = _read(path)
        if news is None:
            continue
        for line in news["said"][num_said:]:
            tqdm.write(f"{name}: {line}", file=sys.stderr)
        num_said = len(news["said"])
        if news["step"]:
            # the bar's own estimate of the time left begins where a resumed run begins
            if bar is None:
                bar = tqdm(
                    total=total,
                    initial=news["step"],
                    desc=name,
                    unit="step",
                    dynamic_ncols=True,
                    mininterval=REDRAW_S,
                )
            bar.set_postfix_str(news["text"], refresh=False)
            bar.update(news["step"] - bar.n)
    if bar:
        bar.close()


def step(path: AnyPath) -> int:
    """How far the run of this path is."""
    news = _read(path)
    return int(news["step"]) if news else 0


def _read(path: AnyPath) -> dict[str, Any] | None:
    try:
        with as_os_error(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
