"""Run storage: the location of checkpoints, published data and MLflow's store.

The variable RUN_STORAGE is an absolute path on a shared file system, or a URI that fsspec reads, such as
s3://bucket/runs. Without it, run storage is the project's own folder. An `AnyPath` is a pathlib.Path, or for a URI a
UPath, which has the same methods. Code that has to distinguish them is in this module, atomic_io.py, periodic.py and
run.py. The address and credentials of a store come from the environment variables of its own tools (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, a role, ...).
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
MAX_SOCKET_PATH_BYTES = 103  # the limit on macOS; 107 on Linux
PATIENCE_S = 600
"""Seconds that a store may be unreachable."""
UNFIT = {
    "memory": "is lost when the process ends",
    "http": "cannot be written to",
    "https": "cannot be written to",
}
"""Stores that fsspec supports but that cannot hold runs, with the reason."""
LOCK_S = 60
"""Seconds after which a lock in a store counts as left over from a killed process."""
FOREIGN = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs")
"""Libraries that fsspec uses, whose errors it does not always turn into OSError."""


def run_storage(root: Path) -> AnyPath:
    """The folder in RUN_STORAGE, else `home`.

    Raises ValueError for a relative path, and for a store that no installed library reads or that cannot hold runs.
    """
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
            raise ValueError(f"{RUN_STORAGE_ENV} must begin with file:/// (three slashes), got {shown!r}")
        return Path(unquote(place.path))
    if kind in UNFIT:
        raise ValueError(
            f"{RUN_STORAGE_ENV} must be a folder or a store such as s3://..., got {shown!r}, which {UNFIT[kind]}"
        )
    from upath import UPath  # imported here: training on a local disk does not need it

    try:
        options = UPath(uri).storage_options  # they keep the URI's password, which a printed path must not show
        found = UPath(shown, **{**options, "use_listings_cache": False})  # other machines write there too
        _ = found.fs
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{RUN_STORAGE_ENV} is {shown!r}: {error}") from None
    return found


def home(root: Path) -> Path:
    """The project's folder; within `dvc exp run --queue` and `--temp`, the folder where the experiment was started.

    These two run the stages in a copy of the project and delete the copy afterwards.
    """
    started_in = os.environ.get(DVC_ROOT_ENV) if DVC_STAGE_ENV in os.environ else None
    return Path(started_in or root).resolve()


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, else mlflow.db. Relative paths are resolved in `home`: Ray's workers run in other folders,
    where each would create a store of its own.

    Raises ValueError for a database in memory, or in a folder whose name MLflow's URI cannot hold. This function is
    not in pipeline/tracking because importing MLflow takes seconds.
    """
    uri = os.environ.get(TRACKING_URI_ENV) or "sqlite:///mlflow.db"
    folder = home(root)
    if re.fullmatch(r"sqlite(\+\w+)?:/*(:memory:.*)?", uri):
        raise ValueError(f"{TRACKING_URI_ENV} must be a file or a server, got {uri}, which no other process sees")
    if found := re.fullmatch(r"(sqlite(?:\+\w+)?:///)([^/].*)", uri):  # a fourth slash begins an absolute path
        if "?" in str(folder) or unquote(str(folder)) != str(folder):
            raise ValueError(
                f"{folder} has a ? or % in its name, which the URI of MLflow's database cannot contain: "
                f"rename that folder, or set {TRACKING_URI_ENV} to a server"
            )
        return f"{found[1]}{folder}/{found[2]}"
    if found := re.fullmatch(r"file:([^/].*)", uri):
        return f"{folder.as_uri()}/{found[1]}"
    is_folder = ":" not in uri and uri not in ("databricks", "databricks-uc", "uc")
    return str(folder / uri) if is_folder else uri


def database_file(uri: str) -> Path | None:
    """The file of an MLflow store in SQLite; None for any other store."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///(/[^?]+)(?:\?.*)?", uri)
    return Path(unquote(found[1])) if found else None


def is_absolute(uri: str) -> bool:
    """Whether this is a URI or an absolute path, which does not depend on the working folder."""
    return "://" in uri or Path(uri).is_absolute()


def run_storage_is_set() -> bool:
    """Whether RUN_STORAGE is set. It may be the project's own folder, if that is on a shared file system."""
    return bool(os.environ.get(RUN_STORAGE_ENV))


def cache() -> Path:
    """This user's cache folder on the local disk. Raises OSError if other users can write to it."""
    folder = Path(tempfile.gettempdir()) / f"transformer-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} belongs to another user or is writable by others: remove it, or set TMPDIR")
    return folder


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder in the cache, removed after the block."""
    with _folder_of_this_process(cache(), "tmp") as folder:
        yield folder


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A private temporary folder for Ray's sockets, removed after the block. Raises OSError if it cannot be created.

    It is below TMPDIR, or below /tmp if TMPDIR is too long: the path of a socket is limited to MAX_SOCKET_PATH_BYTES,
    and the part that Ray adds takes 64 bytes.
    """
    system = Path(tempfile.gettempdir())
    fits = len(os.fsencode(system)) + len("/transformer-ray-1234567-abcdefgh") + 64 <= MAX_SOCKET_PATH_BYTES
    with _folder_of_this_process(system if fits else Path("/tmp"), "transformer-ray") as folder:
        yield folder


@contextmanager
def _folder_of_this_process(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder named after this process. Removes those left behind by killed processes."""
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
    """A local folder with the files of `source`: the folder itself, or a copy that is removed after the block.

    Raises FileNotFoundError if a store has no files there.
    """
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
    """Copy the files of a folder, without its subfolders."""
    with as_os_error(target):
        for path in source.iterdir():
            if path.is_file():
                copy_file(path, target / path.name)


def copy_file(source: AnyPath, target: AnyPath, progress: Callable[[int], object] = lambda count: None) -> str:
    """Copy a file in chunks, call `progress` with the bytes of each chunk, and return the SHA-256 (hex).

    Creates the folders above a local target; a store needs none.
    """
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
    """Make a hard link to a file, or copy it if the file system does not allow one."""
    if isinstance(source, Path) and isinstance(target, Path):
        with suppress(OSError):
            return target.hardlink_to(source)
    copy_file(source, target)


@contextmanager
def one_at_a_time(folder: AnyPath) -> Iterator[None]:
    """Lock a folder for the block, which must take only seconds: other processes, on any machine, wait.

    In a store, the lock of a killed process expires after LOCK_S seconds. Raises OSError after a wait of twice that.
    """
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
    """Create the lock file. Raises FileExistsError if there is one younger than LOCK_S."""
    try:
        lock.fs.pipe_file(lock.path, repr(time.time()).encode(), mode="create")
    except FileExistsError:
        with suppress(FileNotFoundError, ValueError):
            if time.time() - float(lock.read_text(encoding="utf-8")) > LOCK_S:
                lock.unlink(missing_ok=True)
                return _create(lock)
        raise FileExistsError(
            f"{lock} is held by another process: wait for it, or remove the file if there is no such process"
        ) from None


def retry_unreachable(action: Callable[[], T], folder: AnyPath, say: Callable[[str], object]) -> T:
    """Return `action()`, with retries for PATIENCE_S seconds while the store of `folder` cannot be reached.

    Errors of a disk are raised at once.
    """
    deadline = time.monotonic() + PATIENCE_S

    def log(error: Exception, _: float) -> None:
        say(f"{error}; retrying for another {max(0, deadline - time.monotonic()):.0f} s")

    def may_pass(error: Exception) -> bool:
        return isinstance(error, OSError) and not isinstance(folder, Path)

    return retry(action, every(10, PATIENCE_S), may_pass, log)


def remove(folder: AnyPath) -> None:
    """Remove a folder with its content, or a file or link at its path, if any."""
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
    """Turn errors of a store's library into an OSError with the address of the store."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if isinstance(folder, Path) or not type(error).__module__.startswith(FOREIGN):
            raise
        raise OSError(f"{folder} cannot be reached: {' '.join(str(error).split())}") from error
