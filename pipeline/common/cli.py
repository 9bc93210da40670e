"""Conventions shared by all commands: --help, error messages, exit codes, signals."""

import argparse
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TypeVar

import psutil

from pipeline.common.environment import DVC_STAGE_ENV, without_passwords

T = TypeVar("T")
SHELLS = {"bash", "dash", "fish", "ksh", "sh", "zsh"}
GRACE_S = 4.0
"""Seconds that a command has to clean up after a signal."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows the module's docstring (purpose, example, what is read and written) and the exit
    codes."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        epilog="Exit code: 0 if done, 1 after an error (one line on stderr), 2 for wrong\n"
        "arguments, 128 + signal if stopped (130: Ctrl-C).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def begin() -> None:
    """Set up how this process ends. pipeline/__init__.py calls this before a command's slow imports.

    On Ctrl-C, SIGTERM and SIGHUP the process prints one line and ends with exit code 128 + signal, after GRACE_S at
    the latest. As a stage of DVC it also ends when DVC has ended.
    """
    for signum in SIGNALS:
        if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):  # nohup's SIG_IGN is kept
            signal.signal(signum, _stop)
    sys.excepthook = _quiet_when_stopped
    if DVC_STAGE_ENV in os.environ:
        threading.Thread(target=_end_with, args=[_lineage()], daemon=True).start()


@contextmanager
def exit_on_error(name: str, *more: type[Exception], interrupted: str = "interrupted") -> Iterator[None]:
    """Turn exceptions of the block into a line `name: message` on stderr and an exit code.

    The exit code is 1 for errors that a user can fix (ValueError, OSError and `more`), and 128 + signal (130 for
    Ctrl-C) after a signal. There is no line if nobody reads stdout any more (`| head`). Any other exception is a bug
    and keeps its traceback.
    """
    mendable: tuple[type[Exception], ...] = (ValueError, OSError, *more)
    _stopping.line = f"{name}: {interrupted}"
    try:
        yield
        sys.stdout.flush()
    except mendable as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            raise SystemExit(1) from None
        print(f"{name}: {_message(error)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _stopping.print_once()
        raise SystemExit(_stopping.code or 128 + signal.SIGINT) from None


def interruptible(call: Callable[[], T], timeout_s: float | None = None) -> T:
    """Return `call()`, run in another thread: signals are handled during a long call into C (sentencepiece).

    Raises TimeoutError after `timeout_s`; the thread, which nothing can stop, goes on until the process ends.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout_s)


class _Stopping:
    """State of this process's shutdown."""

    def __init__(self) -> None:
        name = sys.orig_argv[-1] if len(sys.orig_argv) < 3 else sys.orig_argv[2]
        self.line = f"{name.rpartition('.')[2]}: interrupted"
        self.printed = False
        self.code: int | None = None  # 128 + the signal that this process received

    def print_once(self) -> None:
        if not self.printed:
            self.printed = True
            print(self.line, file=sys.stderr, flush=True)

    def exit(self) -> None:
        self.print_once()
        os._exit(self.code or 128 + signal.SIGINT)


_stopping = _Stopping()


def _stop(signum: int, _: FrameType | None) -> None:
    """Interrupt the main thread. End the process at a second signal, or if it still runs after GRACE_S."""
    if _stopping.code:
        _stopping.exit()
    _stopping.code = 128 + signum  # kept here: Ray, interrupted in C++, replaces KeyboardInterrupt with its own error
    timer = threading.Timer(GRACE_S, _stopping.exit)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _quiet_when_stopped(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """sys.excepthook: no traceback for a command that is interrupted while it imports."""
    if _stopping.code and isinstance(error, KeyboardInterrupt):
        _stopping.exit()
    sys.__excepthook__(kind, error, traceback)


def _lineage() -> tuple[int, int | None]:
    """The process id of the parent and, where the parent is a shell, of its parent.

    DVC gives a stage's command to a shell. Most shells exec a single command, so that DVC is the parent.
    """
    parent = os.getppid()
    try:
        shell = psutil.Process(parent)
        return parent, shell.ppid() if shell.name() in SHELLS else None
    except psutil.NoSuchProcess:
        return os.getppid(), None


def _end_with(lineage: tuple[int, int | None]) -> None:
    """End this process when DVC has ended, so that its `lineage` is another.

    Otherwise `kill -9` of `dvc repro` would leave training running unnoticed, and block the next `dvc repro`.
    Training that was started by hand, with nohup for example, outlives its parent.
    """
    while _lineage() == lineage:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * GRACE_S)  # SIGTERM has no effect in a call that signals do not interrupt
    os.kill(os.getpid(), signal.SIGKILL)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return without_passwords(f"{error.filename}: {error.strerror}")  # str(error) adds the error number
    return without_passwords(str(error))


def _stdout_is_closed() -> bool:
    """Whether stdout is a pipe without a reader. If so, redirect it to /dev/null: Python would complain at exit."""
    try:
        descriptor = sys.stdout.fileno()
    except ValueError:  # stdout was replaced by an object without a descriptor
        return False
    pipe = select.poll()
    pipe.register(descriptor, select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in pipe.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return closed
