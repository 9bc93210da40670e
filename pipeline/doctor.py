"""Show on one screen what a run depends on, and what is wrong with it.

    python -m pipeline.doctor

Reads the versions, the devices, params.yaml, MLflow's store, the storage of
runs, DVC's configuration, dvc.lock and the state of Git. It changes nothing,
starts nothing and prints no password: paste its output into a report as it is.

A line that begins with ! is wrong, and ends with the way out. The exit code is
1 if there is one.
"""

import logging
import os
import platform
import shutil
import sqlite3
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil

from pipeline.common import cli
from pipeline.common.environment import GIT_COMMIT_ENV, RUN_STORAGE_ENV, without_passwords

if TYPE_CHECKING:
    from upath import UPath

# Each check imports what it needs: a package that is missing or broken is one marked line.

T = TypeVar("T")
PACKAGES = ("torch", "ray", "mlflow", "dvc", "sentencepiece", "ctranslate2")
PATIENCE_S = 3.0
"""How long a server or a store may take to answer."""
LEAST_FREE_BYTES = 1 << 30
WIDTH, INDENT, MAX_LINES = 80, 12, 3
INSTALL = "make .venv/installed && source .venv/bin/activate"
MOST_RUNS = 100
"""So many runs of a server are counted."""


def versions(root: Path) -> str:
    """Of Python and the main packages. constraints.txt has the pins; a job on a cluster has no such file."""
    file = root / "constraints.txt"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    pins = dict(line.split("==") for line in lines if "==" in line)
    shown, wrong = [f"python {platform.python_version()}"], False
    for name in PACKAGES:
        version, pin = _version(name), pins.get(name)
        if not version:
            version, wrong = "missing", True
        elif pin and version.partition("+")[0] != pin:  # 2.13.0+cpu is a 2.13.0
            version, wrong = f"{version} (pinned: {pin})", True
        shown.append(f"{name} {version}")
    text = ", ".join(shown)
    if wrong:
        raise ValueError(f"{text}: {INSTALL}")
    return f"{text}: {'as pinned' if pins else 'constraints.txt is not here'}"


def _version(package: str) -> str:
    """Empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def cpu(root: Path) -> str:
    from pipeline.common.machine import machine_name

    memory = psutil.virtual_memory()
    return f"{machine_name()}, {_gib(memory.available)} of {_gib(memory.total)} of memory free"


def gpu(root: Path) -> str:
    """The GPUs that torch can use, and whether they compute in bf16."""
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        names = Counter(
            f"{card.name}, {_gib(card.total_memory)}, {'bf16' if card.major >= 8 else 'no bf16'}" for card in cards
        )
        return "; ".join(f"{count} x {name}" for name, count in names.items())
    if Path("/dev/nvidia0").exists():
        raise ValueError(
            f"torch {torch.__version__} cannot use the GPU of this machine: install torch's build for CUDA, or "
            "a newer driver; or set hardware.device to cpu"
        )
    return "none"


def settings(root: Path) -> str:
    """Whether params.yaml is valid, the presets that it is nearest to, and what differs from these."""
    from pipeline.common.settings import load_settings

    found = load_settings(root)
    changes = ", ".join(f"{key} {value}" for key, value in found.changes.items())
    text = f"params.yaml is valid: data {found.data_name}, model {found.model_name}"
    return f"{text}; changed: {changes}" if changes else text


def mlflow(root: Path) -> str:
    """The store and the number of its runs."""
    from pipeline.common.storage import database_file, tracking_uri

    uri = tracking_uri(root)
    if file := database_file(uri):
        return f"{uri}, {_runs_in(file)}"
    if not uri.startswith("http"):
        return f"{without_passwords(uri)}, not asked: it is neither a server nor an SQLite file"
    if not _answers(uri):
        raise ConnectionError(
            f"{without_passwords(uri)} does not answer: start that server, or set MLFLOW_TRACKING_URI to another, "
            "or unset it to use the file mlflow.db"
        )
    from pipeline.tracking.store import count_runs

    try:
        count = _in_time(uri, lambda: count_runs(uri, MOST_RUNS))
    except OSError as error:
        raise ConnectionError(f"{error}: is that MLflow's server, and MLFLOW_TRACKING_PASSWORD right?") from None
    return f"{without_passwords(uri)} answers, runs: {count}{' or more' if count == MOST_RUNS else ''}"


def _answers(server: str) -> bool:
    """Whether there is anything at this address. It does without MLflow, whose import takes seconds."""
    import requests

    try:
        _in_time(server, lambda: requests.get(f"{without_passwords(server)}/health", timeout=PATIENCE_S))
    except requests.exceptions.SSLError:  # MLflow's client may have the certificate
        return True
    except (requests.RequestException, TimeoutError):
        return False
    return True


def _runs_in(file: Path) -> str:
    """The number of runs in an SQLite store, which is neither made nor changed."""
    if not file.exists() or not file.stat().st_size:
        return "not made yet"
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", PATIENCE_S, uri=True)) as database:
            (count,) = database.execute("select count(*) from runs where lifecycle_stage = 'active'").fetchone()
    except sqlite3.Error as error:
        if error.sqlite_errorname == "SQLITE_READONLY_ROLLBACK":
            return "runs not counted: a kill left a journal beside it, which the next run takes back"
        way_out = f"move {file.name} away to begin a new store"
        if isinstance(error, sqlite3.OperationalError) and "no such table" not in str(error):  # locked, say
            way_out = "try again when no run writes to it; if that does not help, see who may read it"
        raise ValueError(f"{file} cannot be read, {error}: {way_out}") from None
    return f"runs: {count}"


def storage(root: Path) -> str:
    """Where checkpoints and published data are, and whether there is room for more."""
    from pipeline.common.storage import run_storage, run_storage_is_set

    folder = run_storage(root)
    if not isinstance(folder, Path):
        _ask(folder)
        return f"{RUN_STORAGE_ENV} {folder} answers"
    free = _free_bytes(folder)
    if free < LEAST_FREE_BYTES:
        raise ValueError(
            f"{folder} has {_gib(free)} free: remove old runs from its checkpoints/, or set {RUN_STORAGE_ENV} to "
            "another folder"
        )
    name = f"{RUN_STORAGE_ENV} {folder}" if run_storage_is_set() else f"the project's folder {folder}"
    return f"{name}, {_gib(free)} free"


def _ask(store: "UPath") -> None:
    """Raises ConnectionError for a store that does not answer, ValueError if the bucket is not there."""
    from pipeline.common.storage import as_os_error

    try:
        with as_os_error(store):
            there = _in_time(store, lambda: any(path.exists() for path in (store, *store.parents)))
    except OSError as error:
        raise ConnectionError(
            f"{error}: correct {RUN_STORAGE_ENV}, or the address and the credentials that its tools read"
        ) from None
    if not there:
        raise ValueError(f"{store} is not there, nor is its bucket: make that, or correct {RUN_STORAGE_ENV}")


def _free_bytes(folder: Path) -> int:
    """Where the folder is, or will be made. Raises ValueError if it cannot be written to."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{there} is not a folder that you may write to: change its mode, or set {RUN_STORAGE_ENV} to another"
        )
    return shutil.disk_usage(there).free


def dvc(root: Path) -> str:
    """DVC's site cache, where it keeps pickles, and the remote, which shares results with others."""
    if not (root / ".dvc").is_dir():
        raise ValueError("there is no folder .dvc here: run from the project's root folder, or git restore .dvc")
    from dvc.config import Config
    from dvc.dirs import site_cache_dir
    from dvc.exceptions import DvcException

    try:
        config = Config(str(root / ".dvc"))
    except DvcException as error:
        raise ValueError(f"{error}: correct .dvc/config or .dvc/config.local") from None
    folder = Path(site_cache_dir(config["core"].get("site_cache_dir")))
    if _others_may_write(folder):
        raise ValueError(f"others may write to the site cache {folder}, which has pickles: make site-cache")
    remote = config["core"].get("remote")
    return f"site cache {folder}, private; {f'remote {remote}' if remote else 'no default remote'}"


def _others_may_write(folder: Path) -> bool:
    """To the folder; or, where it is not made yet, to the one that it will be made in."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.stat().st_uid not in (os.getuid(), 0) or bool(there.stat().st_mode & 0o022)


def dvc_lock(root: Path) -> str:
    """Whether dvc.lock is whole, and the stages that have run."""
    from pipeline.common.dvc_lock import read_lock

    return ", ".join(read_lock(root)) or "no stage has run"


def git(root: Path) -> str:
    """The commit, and whether code or settings differ from it."""
    from pipeline.tracking.provenance import git_tags

    if tags := git_tags(root):
        state = {"true": "dirty: code or settings differ", "false": "clean"}.get(tags.get("git_dirty", ""))
        source = f" (by {GIT_COMMIT_ENV})" if GIT_COMMIT_ENV in os.environ else ""
        return f"commit {tags['git_commit'][:12]}{source}{f', {state}' if state else ''}"
    if not shutil.which("git"):
        raise ValueError("git is not installed, and DVC needs it: install it")
    raise ValueError(
        "no repository, or no commit in it, and DVC needs one: git init && git add -A && git commit -m begin"
    )


CHECKS: dict[str, Callable[[Path], str]] = {
    "versions": versions,
    "cpu": cpu,
    "gpu": gpu,
    "settings": settings,
    "mlflow": mlflow,
    "storage": storage,
    "dvc": dvc,
    "dvc.lock": dvc_lock,
    "git": git,
}
"""What each line shows. A check raises an exception if something is wrong: a line with the way out."""


def examine(check: Callable[[Path], str], root: Path) -> tuple[bool, str]:
    """Whether something is wrong, and the text. Raises nothing, whatever is broken."""
    try:
        return False, check(root)
    except ImportError as error:
        return True, f"{error}: {INSTALL}"
    except OSError as error:
        return True, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return True, f"{kind}{error}"


def layout(name: str, text: str, wrong: bool) -> str:
    """At most MAX_LINES lines of WIDTH columns. A long text loses its end; a marked one loses its middle, for the way
    out is at its end."""
    text = shown = " ".join(without_passwords(text).split())
    kept = len(text)
    while wrong and len(_lines(name, shown, wrong)) > MAX_LINES:
        kept -= 10
        shown = f"{text[: kept // 2]} ... {text[-kept // 2 :]}"
    lines = _lines(name, shown, wrong)
    return "\n".join(lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], f"{' ' * INDENT}..."])


def _lines(name: str, text: str, wrong: bool) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{'!' if wrong else ' '} {name}".ljust(INDENT),
        subsequent_indent=" " * INDENT,
        break_on_hyphens=False,
    )


def _in_time(address: object, call: Callable[[], T]) -> T:
    """What `call` returns, which asks `address`. Raises TimeoutError after PATIENCE_S."""
    try:
        return cli.interruptible(call, PATIENCE_S)
    except TimeoutError:
        raise TimeoutError(f"no answer from {address} within {PATIENCE_S:g} s") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of libraries, which would tear the screen apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):,.1f} GiB"


def main() -> None:
    cli.parser("pipeline.doctor", __doc__).parse_args()
    all_well = True
    with cli.exit_on_error("doctor"), _quiet():
        for name, check in CHECKS.items():
            wrong, text = examine(check, Path())
            print(layout(name, text, wrong), flush=True)
            all_well = all_well and not wrong
    sys.exit(0 if all_well else 1)


if __name__ == "__main__":
    main()
