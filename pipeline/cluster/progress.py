"""Show the progress of remote workers on this terminal.

Rank 0 keeps a small file in the run's folder up to date; the driver reads it and draws a bar. Ray's own way,
ray.experimental.tqdm_ray, was tried and rejected: see docs/log.md.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from pipeline.common.periodic import PeriodicJsonFile, interval_of
from pipeline.common.storage import AnyPath, as_os_error

PROGRESS_FILE = "progress.json"
"""The name of the file in a run's folder."""
PROGRESS_INTERVAL_S = 0.5
STEPS = "{l_bar}{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
SHARE = "{l_bar}{bar}| {remaining} left{postfix}"
"""tqdm's bar_format, with and without the number of steps. Both fit into 80 columns with the longest texts."""
REDRAW_S = 0.1 if sys.stderr.isatty() else 30.0
"""Seconds between redraws of a bar. A log file keeps every redraw, so it gets few."""


class ProgressReporter:
    """Writes the progress file on rank 0, at most twice per second.

    A worker that replaces a dead one keeps the messages in the file and appends to them.
    """

    def __init__(self, path: AnyPath) -> None:
        self.file = PeriodicJsonFile(path, PROGRESS_INTERVAL_S)
        found = _read(path)
        self.messages: list[str] = found["messages"] if found else []
        self.step, self.text = 0, ""

    def progress(self, step: int, text: str) -> None:
        self.step, self.text = step, text
        if self.file.is_due():
            self.flush()

    def log(self, message: str) -> None:
        self.messages.append(message)
        self.flush()

    def flush(self) -> None:
        self.file.write({"step": self.step, "text": self.text, "messages": [*self.messages]})

    def close(self) -> None:
        self.flush()
        self.file.close()


@contextmanager
def show_progress(path: AnyPath, total: int, name: str) -> Iterator[None]:
    """Show the messages and steps that a ProgressReporter writes to `path`, until the block ends."""
    num_shown = 0

    def look() -> tuple[int, str] | None:
        nonlocal num_shown
        found = _read(path)
        if found is None:
            return None
        for message in found["messages"][num_shown:]:
            tqdm.write(f"{name}: {message}", file=sys.stderr)
        num_shown = len(found["messages"])
        return (found["step"], found["text"]) if found["step"] else None

    with suppress(OSError), as_os_error(path):
        path.unlink(missing_ok=True)
    with show_bar(name, total, interval_of(path, PROGRESS_INTERVAL_S), look):
        yield


@contextmanager
def show_bar(
    name: str, total: int, interval_s: float, look: Callable[[], tuple[int, str] | None], form: str = STEPS
) -> Iterator[None]:
    """Draw a bar of `total` steps in the format `form` until the block ends.

    `look` is called every `interval_s` seconds and once at the end. It returns the number of steps done and a text,
    or None if there is nothing new. An OSError (the store does not answer) counts as None.
    """
    done = threading.Event()

    def draw() -> None:
        bar: tqdm | None = None
        ended = False
        while not ended:
            ended = done.wait(interval_s)
            try:
                found = look()
            except OSError:
                found = None
            if found is None:
                continue
            step, text = found
            if bar is None:  # made here, because the estimate of the time left must start at a resumed run's step
                bar = tqdm(
                    total=total, initial=step, desc=name, bar_format=form, dynamic_ncols=True, mininterval=REDRAW_S
                )
            bar.set_postfix_str(text, refresh=False)
            bar.update(step - bar.n)
        if bar:
            bar.close()

    thread = threading.Thread(target=draw, name=f"bar of {name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def training_text(loss: float, valid_ppl: float | None, tokens_per_second: float) -> str:
    """The text after a training run's bar, with three digits per number."""
    shown = {"loss": loss} if valid_ppl is None else {"loss": loss, "ppl": valid_ppl}
    numbers = [f"{name} {tqdm.format_sizeof(value)}" for name, value in shown.items()]
    return ", ".join([*numbers, f"{tqdm.format_sizeof(tokens_per_second)} tok/s"])


def trials_text(num_trials: int, done: int, running: int, failed: int) -> str:
    """The text after a sweep's bar."""
    return f"trials: {done} of {num_trials} done, {running} running, {failed} failed"


def steps_done(path: AnyPath) -> int:
    """The last step in this progress file; 0 if there is none."""
    found = _read(path)
    return int(found["step"]) if found else 0


def _read(path: AnyPath) -> dict[str, Any] | None:
    try:
        with as_os_error(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
