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
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TypeVar

from pipeline.common.environment import DVC_STAGE_ENV, without_passwords

T = TypeVar("T")
GRACE_S = 4.0
"""How long a command that is stopped may take to clean up."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """The process was told to end, by Ctrl-C, SIGTERM or SIGHUP."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.code = 128 + signum


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
    except KeyboardInterrupt as error:
        _stopping.tell()
        raise SystemExit(error.code if isinstance(error, Stopped) else 128 + signal.SIGINT) from None


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
        self.signalled = self.told = False

    def tell(self) -> None:
        """Print the line, once."""
        if not self.told:
            self.told = True
            print(self.line, file=sys.stderr, flush=True)

    def exit(self, code: int) -> None:
        self.tell()
        os._exit(code)


_stopping = _Stopping()


def _stop(signum: int, _: FrameType | None) -> None:
    """Raise Stopped in the main thread; end the process when it is told so again, or has not ended after GRACE_S."""
    stopped = Stopped(signum)
    if _stopping.signalled:
        _stopping.exit(stopped.code)
    _stopping.signalled = True
    timer = threading.Timer(GRACE_S, _stopping.exit, [stopped.code])
    timer.daemon = True
    timer.start()
    raise stopped


def _quiet_when_stopped(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """sys.excepthook: for what is stopped while it imports."""
    if isinstance(error, Stopped):
        _stopping.exit(error.code)
    sys.__excepthook__(kind, error, traceback)


def _end_with(parent: int) -> None:
    """Under DVC, end when it does. `kill -9` of `dvc repro` would otherwise leave training running unseen, in the
    way of the next `dvc repro`. Started by hand (nohup, say), training outlives its parent."""
    while os.getppid() == parent:
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
