"""Where checkpoints, shared data and MLflow's runs are: on this machine, where all nodes see them, or in a store.

RUN_STORAGE names it: an absolute path of a shared file system, or a URI that fsspec reads, such as s3://bucket/runs;
without it, it is the project's own folder. An `AnyPath` is a pathlib.Path, or for a URI a UPath, which has the same
methods; what the two do differently is here, in atomic_io.py, periodic.py and run.py. Addresses and credentials of a
store come from the environment that its own tools read (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, a role, ...).
"""

import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar, Union
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from pipeline.common.environment import (
    DVC_ROOT_ENV,
    DVC_STAGE_ENV,
    RUN_STORAGE_ENV,
    TRACKING_URI_ENV,
    without_passwords,
)
from pipeline.common.retry import every, retry

if TYPE_CHECKING:
    from upath import UPath

AnyPath: TypeAlias = Union[Path, "UPath"]
T = TypeVar("T")
CHUNK_BYTES = 8 << 20
MAX_SOCKET_PATH_BYTES = 103  # 107 on Linux
PATIENCE_S = 600
"""How long a store may be away."""
UNFIT = {
    "memory": "forgets all when a process ends",
    "http": "cannot be written to",
    "https": "cannot be written to",
}
"""Kinds of stores that fsspec knows and no run can be kept in."""
LOCK_S = 60
FOREIGN = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs")
"""Libraries below fsspec, some of whose errors it lets through."""


def run_storage(root: Path) -> AnyPath:
    """The folder that RUN_STORAGE names, else `home`. Raises ValueError for a relative path, and for a kind of store
    that no installed library can read, or that does not keep what is written."""
    uri = os.environ.get(RUN_STORAGE_ENV)
    if not uri:
        return home(root)
    shown = without_passwords(uri)
    if not is_absolute(uri):
        raise ValueError(
            f"{RUN_STORAGE_ENV} must be an absolute path or a URI such as s3://bucket/runs, got {shown!r}"
        )
    if "://" not in uri:
        return Path(uri)
    kind = uri.partition("://")[0].lower()
    if kind == "file":
        place = urlsplit(uri)
        if place.netloc not in ("", "localhost"):
            raise ValueError(f"{RUN_STORAGE_ENV} is {shown!r}: a path after file:// begins with a slash, file:///...")
        return Path(unquote(place.path))
    if kind in UNFIT:
        raise ValueError(
            f"{RUN_STORAGE_ENV} is {shown!r}: such a store {UNFIT[kind]}; a folder or s3://... is needed"
        )
    from upath import UPath  # here, so that training on this machine's own disk does without

    try:
        options = UPath(uri).storage_options  # with the password of the URI: what is shown of a path lacks it
        found = UPath(shown, **{**options, "use_listings_cache": False})  # others write there too
        _ = found.fs
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{RUN_STORAGE_ENV} is {shown!r}: {error}") from None
    return found


def home(root: Path) -> Path:
    """The project's folder. `dvc exp run --queue` and `--temp` run stages in a copy of it, which they delete: what is
    to stay belongs into the folder that DVC names, where the experiment was started."""
    started_in = os.environ.get(DVC_ROOT_ENV) if DVC_STAGE_ENV in os.environ else None
    return Path(started_in or root).resolve()


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, else mlflow.db. A relative one is in `home`: Ray's workers run in other folders, and each
    would make a store of its own. Raises ValueError for a database that cannot be there, or only in memory.

    It is not in pipeline/tracking, because to import MLflow takes seconds."""
    uri = os.environ.get(TRACKING_URI_ENV) or "sqlite:///mlflow.db"
    folder = home(root)
    if re.fullmatch(r"sqlite(\+\w+)?:/*(:memory:.*)?", uri):
        raise ValueError(f"{TRACKING_URI_ENV} is {uri}, which no other process sees: name a file or a server")
    if found := re.fullmatch(r"(sqlite(?:\+\w+)?:///)([^/].*)", uri):  # a fourth slash begins an absolute path
        if "?" in str(folder) or unquote(str(folder)) != str(folder):
            raise ValueError(
                f"{folder} has a ? or % in its name, which mean something else in the address of MLflow's database: "
                f"rename that folder, or set {TRACKING_URI_ENV} to a server"
            )
        return f"{found[1]}{folder}/{found[2]}"
    if found := re.fullmatch(r"file:([^/].*)", uri):
        return f"{folder.as_uri()}/{found[1]}"
    is_folder = ":" not in uri and uri not in ("databricks", "databricks-uc", "uc")
    return str(folder / uri) if is_folder else uri


def database_file(uri: str) -> Path | None:
    """The file of a store of MLflow in SQLite; None for another store."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///(/[^?]+)(?:\?.*)?", uri)
    return Path(unquote(found[1])) if found else None


def is_absolute(uri: str) -> bool:
    """Whether it names the same place in every working folder: a URI, or an absolute path."""
    return "://" in uri or Path(uri).is_absolute()


def run_storage_is_set() -> bool:
    """Whether RUN_STORAGE is set; it may name the project's own folder, on a file system that all nodes see."""
    return bool(os.environ.get(RUN_STORAGE_ENV))


def cache() -> Path:
    """A folder of this user on this machine's own disk, for copies. Raises OSError if others could write there."""
    folder = Path(tempfile.gettempdir()) / f"transformer-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} belongs to another user, or others may write there: remove it, or set TMPDIR")
    return folder


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder in the cache for the block."""
    with _folder_of_this_process(cache(), "tmp") as folder:
        yield folder


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder for the block, of this user alone, below TMPDIR or /tmp: of a path so short that Ray's sockets, whose
    own names have 64 bytes, can have one at all. Raises OSError if neither can be written to."""
    system = Path(tempfile.gettempdir())
    fits = len(os.fsencode(system)) + len("/transformer-ray-1234567-abcdefgh") + 64 <= MAX_SOCKET_PATH_BYTES
    with _folder_of_this_process(system if fits else Path("/tmp"), "transformer-ray") as folder:
        yield folder


@contextmanager
def _folder_of_this_process(parent: Path, prefix: str) -> Iterator[Path]:
    """Those that killed processes left are removed."""
    for leftover in parent.glob(f"{prefix}-*-*"):
        pid = leftover.name.removeprefix(f"{prefix}-").partition("-")[0]
        if leftover.lstat().st_uid == os.getuid() and not Path("/proc", pid).exists():
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{prefix}-{os.getpid()}-", dir=parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


@contextmanager
def local_copy(source: AnyPath) -> Iterator[Path]:
    """A folder on this machine with the files of `source`: itself, or a copy for the block. Raises
    FileNotFoundError if there are none."""
    if isinstance(source, Path):
        yield source
        return
    with temporary_folder() as temporary:
        with as_os_error(source):
            files = list(source.iterdir())
            for path in files:
                copy_file(path, temporary / path.name)
        if not files:
            raise FileNotFoundError(f"{source} does not exist")
        yield temporary


def copy_files(source: Path, target: AnyPath) -> None:
    """Copy the files of a folder, without folders within it."""
    with as_os_error(target):
        for path in source.iterdir():
            if path.is_file():
                copy_file(path, target / path.name)


def copy_file(source: AnyPath, target: AnyPath, progress: Callable[[int], object] = lambda count: None) -> str:
    """Copy by chunks, calling `progress` with the bytes of each; returns the SHA-256. Folders above a local target
    are created; a store needs none."""
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def link_or_copy(source: AnyPath, target: AnyPath) -> None:
    """A hard link to a file, where both are on one file system that has them; else a copy."""
    if isinstance(source, Path) and isinstance(target, Path):
        with suppress(OSError):
            return target.hardlink_to(source)
    copy_file(source, target)


@contextmanager
def one_at_a_time(folder: AnyPath) -> Iterator[None]:
    """Of all processes that see the folder only one is in this block, which takes seconds at most; others wait. In a
    store, what a killed one left holds for LOCK_S seconds. Raises OSError after twice that."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=2 * LOCK_S):
            yield
        return
    lock = folder / "lock"
    with as_os_error(folder):
        retry(lambda: _create(lock), every(0.5, 2 * LOCK_S), lambda error: isinstance(error, FileExistsError))
    try:
        yield
    finally:
        with as_os_error(folder):
            lock.unlink(missing_ok=True)


def _create(lock: "UPath") -> None:
    """Write the file. Raises FileExistsError if there is one that is younger than LOCK_S."""
    try:
        lock.fs.pipe_file(lock.path, repr(time.time()).encode(), mode="create")
    except FileExistsError:
        with suppress(FileNotFoundError, ValueError):
            if time.time() - float(lock.read_text(encoding="utf-8")) > LOCK_S:
                lock.unlink(missing_ok=True)
                return _create(lock)
        raise FileExistsError(
            f"{lock} is held by another process: wait for it; if there is none, remove it"
        ) from None


def retry_unreachable(action: Callable[[], T], folder: AnyPath, say: Callable[[str], object]) -> T:
    """What `action` returns. While the store of `folder` cannot be reached, it is called again for PATIENCE_S
    seconds; errors of a disk are raised at once."""
    deadline = time.monotonic() + PATIENCE_S

    def log(error: Exception, _: float) -> None:
        say(f"{error}; trying again for {max(0, deadline - time.monotonic()):.0f} s")

    def may_pass(error: Exception) -> bool:
        return isinstance(error, OSError) and not isinstance(folder, Path)

    return retry(action, every(10, PATIENCE_S), may_pass, log)


def remove(folder: AnyPath) -> None:
    """Remove a folder and all in it, or what is there in its place; it need not exist."""
    if isinstance(folder, Path):
        if folder.is_symlink() or not folder.is_dir():
            with suppress(OSError):
                folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(FileNotFoundError), as_os_error(folder):
        folder.fs.rm(folder.path, recursive=True)


@contextmanager
def as_os_error(folder: AnyPath) -> Iterator[None]:
    """Raise OSError with the address of the store that cannot be reached, whatever its library raises."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if isinstance(folder, Path) or not type(error).__module__.startswith(FOREIGN):
            raise
        raise OSError(f"{folder} cannot be reached: {' '.join(str(error).split())}") from error
