"""Command-line conventions of every `python -m ...`: its --help, its error line, its exit code."""

import argparse
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.common.environment import DVC_STAGE_ENV, without_passwords

GRACE_S = 10


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is the module's docstring: purpose, example, what is read and written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


@contextmanager
def exit_on_error(name: str, *more: type[Exception], interrupted: str = "interrupted") -> Iterator[None]:
    """End the process with a line `name: message` on stderr: with exit code 1 for what a user can mend (ValueError,
    OSError and `more`), with 130 after Ctrl-C. Without a line if nobody reads what it prints (`| head`). Any other
    exception is a bug and keeps its traceback."""
    mendable: tuple[type[Exception], ...] = (ValueError, OSError, *more)
    try:
        yield
        sys.stdout.flush()
    except mendable as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            raise SystemExit(1) from None
        print(f"{name}: {_message(error)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


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


def end_with_dvc() -> None:
    """Under DVC, end when it does. `kill -9` of `dvc repro` would otherwise leave training running unseen, in the
    way of the next `dvc repro`. Started by hand (nohup, say), training outlives its parent. The run is marked KILLED
    in MLflow where that takes less than GRACE_S."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    if DVC_STAGE_ENV in os.environ:
        threading.Thread(target=watch, daemon=True).start()
