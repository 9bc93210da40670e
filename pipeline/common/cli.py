"""Command-line conventions of every `python -m ...`: its --help, its error line, its exit code, how it is stopped."""

import argparse
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import TypeVar

import psutil

from pipeline.common.environment import DVC_STAGE_ENV, without_passwords

T = TypeVar("T")
SHELLS = {"bash", "dash", "fish", "ksh", "sh", "zsh"}
GRACE_S = 4.0
"""How long a command that is stopped may take to clean up."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is the module's docstring: purpose, example, what is read and written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def begin() -> None:
    """The first act of a command, before its imports, which take seconds. From now on it ends with one line and exit
    code 128 + signal on Ctrl-C, SIGTERM and SIGHUP, after GRACE_S at the latest; and as a stage of DVC when DVC has
    ended."""
    for signum in SIGNALS:
        if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):  # not what nohup ignores
            signal.signal(signum, _stop)
    sys.excepthook = _quiet_when_stopped
    if DVC_STAGE_ENV in os.environ:
        threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()


@contextmanager
def exit_on_error(name: str, *more: type[Exception], interrupted: str = "interrupted") -> Iterator[None]:
    """End the process with a line `name: message` on stderr: with exit code 1 for what a user can mend (ValueError,
    OSError and `more`), with 128 + signal (130 for Ctrl-C) when it is stopped. Without a line if nobody reads what it
    prints (`| head`). Any other exception is a bug and keeps its traceback."""
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
        _stopping.tell()
        raise SystemExit(_stopping.code or 128 + signal.SIGINT) from None


def interruptible(call: Callable[[], T]) -> T:
    """What `call` returns. It runs in another thread: a call of C, as learning a vocabulary is, lets no signal in."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


class _Stopping:
    """What is known about the end of this process."""

    def __init__(self) -> None:
        name = sys.orig_argv[-1] if len(sys.orig_argv) < 3 else sys.orig_argv[2]
        self.line = f"{name.rpartition('.')[2]}: interrupted"
        self.told = False
        self.code: int | None = None  # 128 + the signal that told this process to end

    def tell(self) -> None:
        """Print the line, once."""
        if not self.told:
            self.told = True
            print(self.line, file=sys.stderr, flush=True)

    def exit(self) -> None:
        self.tell()
        os._exit(self.code or 128 + signal.SIGINT)


_stopping = _Stopping()


def _stop(signum: int, _: FrameType | None) -> None:
    """Interrupt the main thread; end the process when it is told so again, or has not ended after GRACE_S."""
    if _stopping.code:
        _stopping.exit()
    _stopping.code = 128 + signum  # what is raised may arrive as another: Ray, interrupted in C++, raises its own
    timer = threading.Timer(GRACE_S, _stopping.exit)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _quiet_when_stopped(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """sys.excepthook: for what is stopped while it imports."""
    if _stopping.code and isinstance(error, KeyboardInterrupt):
        _stopping.exit()
    sys.__excepthook__(kind, error, traceback)


def _end_with(parent: int) -> None:
    """Under DVC, end when it does. `kill -9` of `dvc repro` would otherwise leave training running unseen, in the
    way of the next `dvc repro`. Started by hand (nohup, say), training outlives its parent."""
    with suppress(psutil.NoSuchProcess):
        shell = psutil.Process(parent) if psutil.Process(parent).name() in SHELLS else None
        dvc = shell.ppid() if shell else parent  # most shells make way for the only command that they are given
        while os.getppid() == parent and (not shell or shell.ppid() == dvc):
            time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * GRACE_S)  # in a call that no signal interrupts
    os.kill(os.getpid(), signal.SIGKILL)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return without_passwords(f"{error.filename}: {error.strerror}")  # without the error's number
    return without_passwords(str(error))


def _stdout_is_closed() -> bool:
    """Whether stdout is a pipe that nobody reads from; if so it becomes /dev/null, or Python complains at its end."""
    try:
        descriptor = sys.stdout.fileno()
    except ValueError:  # replaced by an object that is no file
        return False
    pipe = select.poll()
    pipe.register(descriptor, select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in pipe.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return closed
