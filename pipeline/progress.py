"""What a far worker is doing, on this terminal: the worker keeps a small file beside its checkpoints up to date,
the driver reads it and shows a progress bar. (Ray relays what workers print, but not their progress bars.)"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.files import write_json

INTERVAL_S = 0.5


class Reporter:
    """The worker's side. Writing the file is cheap, and done twice a second at most; a full disk does not stop it.

    A worker that takes a dead one's place adds to what that one said.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.written = path, 0.0
        news = _read(path)
        self.said: list[str] = news["said"] if news else []
        self.step, self.text = 0, ""

    def progress(self, step: int, text: str) -> None:
        self.step, self.text = step, text
        if time.monotonic() - self.written > INTERVAL_S:
            self.flush()

    def say(self, line: str) -> None:
        self.said.append(line)
        self.flush()

    def flush(self) -> None:
        with suppress(OSError):
            write_json(self.path, {"step": self.step, "text": self.text, "said": self.said})
        self.written = time.monotonic()


@contextmanager
def shown(path: Path, total: int, name: str) -> Iterator[None]:
    """Show what the Reporter of this path writes, from now to the end of the block."""
    path.unlink(missing_ok=True)
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(path, total, name, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show(path: Path, total: int, name: str, done: threading.Event) -> None:
    bar: tqdm | None = None
    num_said = 0
    ended = False
    while not ended:
        ended = done.wait(INTERVAL_S)  # and once more after the end
        news = _read(path)
        if news is None:
            continue
        for line in news["said"][num_said:]:
            tqdm.write(f"{name}: {line}", file=sys.stderr)
        num_said = len(news["said"])
        if news["step"]:
            # the bar's own estimate of the time left begins where a resumed run begins
            bar = bar or tqdm(total=total, initial=news["step"], desc=name, unit="step", dynamic_ncols=True)
            bar.set_postfix_str(news["text"], refresh=False)
            bar.update(news["step"] - bar.n)
    if bar:
        bar.close()


def step(path: Path) -> int:
    """How far the run of this path is."""
    news = _read(path)
    return int(news["step"]) if news else 0


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
