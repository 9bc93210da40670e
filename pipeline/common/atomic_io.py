"""Atomic outputs: a file or folder is written under a temporary name and renamed when it is complete.

An object store cannot rename, but a file appears in it only once it is complete.
"""

import csv
import errno
import glob
import hashlib
import io
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.common.storage import AnyPath, as_os_error, copy_file, temporary_folder

SUMS = "SHA256SUMS"


@contextmanager
def replace_folder(target: AnyPath) -> Iterator[Path]:
    """Yield an empty folder to write into. It becomes `target` at the end of the block, or is removed if that raises.

    On a disk, all files are flushed before the rename, so that a crash of the machine never leaves an incomplete
    folder under the final name. Temporary names contain the host and the process id, so that two nodes that write one
    target do not collide. Leftovers of killed processes of this host are removed.

    A store takes one file at a time: the old SHA256SUMS is removed first and the new one, if there is one, is written
    last. So a folder that has SHA256SUMS is complete.
    """
    if not isinstance(target, Path):
        with temporary_folder() as temporary:
            yield temporary
            _upload(temporary, target)
        return
    owner = f"{target.name}.{socket.gethostname()}"
    partial, old = (target.with_name(f".{owner}.{os.getpid()}.{suffix}") for suffix in ("partial", "old"))
    with name_enospc(target):
        for leftover in target.parent.glob(f".{glob.escape(owner)}.*.*"):
            pid = leftover.name.split(".")[-2]
            if pid == str(os.getpid()) or not Path("/proc", pid).exists():
                shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in (*partial.rglob("*"), partial):
                if not path.is_symlink():
                    _flush(path)
        except BaseException:
            _remove(partial)
            raise
        if os.path.lexists(target):  # also a dangling link
            os.replace(target, old)  # a rename cannot replace a folder that is not empty
        os.replace(partial, target)
        _flush(target.parent)
        _remove(old)


def _upload(source: Path, target: AnyPath) -> None:
    with as_os_error(target):
        (target / SUMS).unlink(missing_ok=True)
        for path in sorted(source.iterdir(), key=lambda path: path.name == SUMS):
            copy_file(path, target / path.name)


def write_text(target: AnyPath, text: str) -> None:
    """Write UTF-8 with "\\n" line ends on every system. Creates missing parent folders."""
    write_bytes(target, text.encode())


def write_bytes(target: AnyPath, content: bytes) -> None:
    """Write a file. Creates missing parent folders."""
    if not isinstance(target, Path):
        with as_os_error(target):
            target.write_bytes(content)
        return
    partial = _beside(target, "partial")
    with name_enospc(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, target)
        except BaseException:
            _remove(partial)
            raise


def write_json(target: AnyPath, values: Any) -> None:
    write_text(target, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_csv(target: AnyPath, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(target, csv_text(rows))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV text: a header, then a line per row, with empty cells for missing columns. "" if there are no rows."""
    if not rows:
        return ""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def sha256_of(path: AnyPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # UPath's annotation is too wide


def sums_text(sums: Mapping[str, str]) -> str:
    """The content of SHA256SUMS for {name: digest}, in the format of the command sha256sum."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def read_sums(folder: AnyPath) -> dict[str, str]:
    """Read {name: digest} from the folder's SHA256SUMS. Raises OSError, and ValueError if it has another format."""
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in map(str.split, lines)}


@contextmanager
def name_enospc(path: Path) -> Iterator[None]:
    """Add `path` and a remedy to the error of a full disk, which has no file name of its own."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename is not None:
            raise
        advice = f"{error.strerror}: free some space and run again"
        raise OSError(error.errno, advice, str(path)) from None


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
