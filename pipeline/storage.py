"""Where checkpoints and shared data lie: a folder of this machine, one that all nodes see, or a store.

RUN_STORAGE names it: an absolute path of a shared file system, or a URI that fsspec reads, such as s3://bucket/runs;
without it, it is the project's own folder. A `Folder` is a pathlib.Path, or for a URI a UPath, which has the same
methods; what the two do differently is here, in files.py and in checkpoint.py. The way to a store and the right to
read it come from the environment that its own tools read (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, a role, ...).
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

if TYPE_CHECKING:
    from upath import UPath

Folder: TypeAlias = Union[Path, "UPath"]
VARIABLE = "RUN_STORAGE"
CHUNK_BYTES = 8 << 20
FOREIGN = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs")
"""Libraries below fsspec, some of whose errors it lets through."""


def run_storage(root: Path) -> Folder:
    """What RUN_STORAGE names, else `root`. Raises ValueError for a path that depends on where one is, and for a kind
    of store that nothing installed here can read."""
    uri = os.environ.get(VARIABLE)
    if not uri:
        return root.resolve()
    if "://" not in uri:
        if not Path(uri).is_absolute():
            raise ValueError(f"{VARIABLE} is {uri!r}: an absolute path or a URI such as s3://bucket/runs is needed")
        return Path(uri)
    from upath import UPath  # here, so that training on this machine's own disk does without

    try:
        found = UPath(uri, use_listings_cache=False)  # others write there too
        _ = found.fs
    except (ImportError, ValueError) as error:
        raise ValueError(f"{VARIABLE} is {uri!r}: {error}") from None
    return found


@contextmanager
def local_copy(source: Folder) -> Iterator[Path]:
    """The files of a folder as they are on this machine: itself, or a copy for as long as the block takes."""
    if isinstance(source, Path):
        yield source
        return
    with tempfile.TemporaryDirectory() as temporary:
        with errors_of(source):
            copy_files(source, Path(temporary))
        yield Path(temporary)


def copy_files(source: Folder, target: Folder) -> None:
    """All files of one folder, without folders within it. Raises FileNotFoundError if there are none."""
    files = [path for path in source.iterdir() if path.is_file()]
    if not files:
        raise FileNotFoundError(f"{source} does not exist")
    for path in files:
        copy_file(path, target / path.name)


def copy_file(source: Folder, target: Folder) -> None:
    """By chunks. Folders above a local target are made; a store needs none."""
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK_BYTES)


def remove(folder: Folder) -> None:
    """With all that is in it; nothing if there is none."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(FileNotFoundError), errors_of(folder):
        folder.fs.rm(folder.path, recursive=True)


@contextmanager
def errors_of(folder: Folder) -> Iterator[None]:
    """A store that cannot be reached is OSError, with its address, whatever its library calls it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if isinstance(folder, Path) or not type(error).__module__.startswith(FOREIGN):
            raise
        raise OSError(f"{folder} cannot be reached: {' '.join(str(error).split())}") from error
