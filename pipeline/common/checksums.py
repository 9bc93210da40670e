"""SHA256SUMS of a folder that a stage writes: added when it is written, verified when it is opened.

A damaged disk or memory changes bytes and no time stamp, so that DVC does not see it.
"""

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from pipeline.common.atomic_io import SUMS, read_sums, sha256_of, sums_text


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write the sums of these files of the folder into its SHA256SUMS, which keeps those of others."""
    known = read_sums(folder) if (folder / SUMS).exists() else {}
    found = {name: sha256_of(folder / name) for name in names}
    (folder / SUMS).write_text(sums_text(known | found), encoding="utf-8")


def verify(folder: Path, names: Iterable[str] | None, stage: str) -> None:
    """Check that these files of the folder (None: all that it has and should have) are what `stage` has written.

    Raises ValueError that names the first that is missing or has other bytes. A process reads a file once, unless it
    has changed since, by its size and time stamps.
    """
    again = f"run the {stage} stage again (dvc repro --force --single-item {stage})"
    names = None if names is None else list(names)
    for name in (*(names or ()), SUMS):
        _require_file(folder / name, stage)
    try:
        sums = read_sums(folder)
    except ValueError:
        raise ValueError(f"{folder / SUMS} is damaged: {again}") from None
    if names is None:
        names = sorted({*sums, *(path.name for path in folder.iterdir())} - {SUMS})
    paths = [folder / name for name in names]
    for path in paths:
        _require_file(path, stage)
    with ThreadPoolExecutor(2) as threads:  # hashing is most of what opening a large corpus takes
        for path, found in zip(paths, threads.map(_sum, paths), strict=True):
            if found != sums.get(path.name):
                raise ValueError(f"{path} is damaged, its checksum is not the one in {SUMS}: {again}")


def copy_with_sums(source: Path, target: Path, names: Iterable[str], stage: str) -> None:
    """Copy these files of `source`, which `stage` has written, verified, and their sums. Raises as `verify`."""
    names = list(names)
    verify(source, names, stage)
    for name in names:
        shutil.copyfile(source / name, target / name)
    write_sums(target, names)


def _require_file(path: Path, stage: str) -> None:
    if not path.is_file():  # a pipe could be waited for without end
        what = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}: run the {stage} stage first (dvc repro {stage})")


def _sum(path: Path) -> str:
    state = path.stat()
    return _sum_of_state(path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=256)
def _sum_of_state(path: Path, *state: int) -> str:
    return sha256_of(path)
