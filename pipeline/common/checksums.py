"""Checksums of a stage's output folder: written into its SHA256SUMS, and verified when the files are opened.

A faulty disk or faulty memory changes bytes but no time stamps, so DVC does not notice the damage.
"""

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from pipeline.common.atomic_io import SUMS, read_sums, sha256_of, sums_text


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Add the checksums of these files to the folder's SHA256SUMS. Entries of other files are kept."""
    known = read_sums(folder) if (folder / SUMS).exists() else {}
    found = {name: sha256_of(folder / name) for name in names}
    (folder / SUMS).write_text(sums_text(known | found), encoding="utf-8")


def verify(folder: Path, names: Iterable[str] | None, stage: str) -> None:
    """Check that these files of the folder are as `stage` wrote them.

    With `names` None, check every file in the folder or in its SHA256SUMS. A process reads a file only once, unless
    its size or time stamps change. Raises ValueError that names the first file that is missing or differs.
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
    with ThreadPoolExecutor(2) as threads:  # opening a large corpus is mostly hashing
        for path, found in zip(paths, threads.map(_sum, paths), strict=True):
            if found != sums.get(path.name):
                raise ValueError(f"{path} is damaged (its checksum differs from {SUMS}): {again}")


def copy_with_sums(source: Path, target: Path, names: Iterable[str], stage: str) -> None:
    """Verify these files of `source`, written by `stage`, and copy them with their checksums. Raises ValueError."""
    names = list(names)
    verify(source, names, stage)
    for name in names:
        shutil.copyfile(source / name, target / name)
    write_sums(target, names)


def _require_file(path: Path, stage: str) -> None:
    if not path.is_file():  # a read from a pipe could wait forever
        what = "is not a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}: run the {stage} stage first (dvc repro {stage})")


def _sum(path: Path) -> str:
    state = path.stat()
    return _sum_of_state(path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=256)
def _sum_of_state(path: Path, *state: int) -> str:
    return sha256_of(path)
