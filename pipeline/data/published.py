"""The published corpus: find it in run storage, copy it to this machine, verify it."""

import json
import os
from pathlib import Path, PurePosixPath

from filelock import FileLock

from pipeline.common.atomic_io import SUMS, read_sums, replace_folder, sha256_of
from pipeline.common.environment import RUN_STORAGE_ENV
from pipeline.common.paths import CLEAN, ENCODED, TOKENIZER
from pipeline.common.settings import Settings
from pipeline.common.storage import AnyPath, as_os_error, cache, copy_file, home
from pipeline.data.dataset import CorpusInfo


def find_published(settings: Settings, storage: AnyPath) -> AnyPath:
    """The folder in `storage` with the published corpus of these settings.

    Raises ValueError if pipeline.publish has not run, and OSError if the storage cannot be reached.
    """
    path = storage / "data" / f"{settings.data_name}.json"
    try:
        with as_os_error(path):
            name = json.loads(path.read_text(encoding="utf-8"))["folder"]
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: on the machine with the encoded corpus, run "
            f"{RUN_STORAGE_ENV}={storage} python -m pipeline.publish"
        ) from None
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): run python -m pipeline.publish again") from None
    return storage / "data" / PurePosixPath(name).name


def fetch(source: AnyPath) -> Path:
    """A local copy of a published corpus: a folder with data/.

    The first process copies it while the others wait; every call verifies it. Raises ValueError if the copy differs
    from what was published, and OSError if the storage cannot be reached.
    """
    target = cache() / source.name
    with FileLock(cache() / f"{source.name}.lock"), as_os_error(source):
        if not _is_whole(target):
            sums = _read_sums(source)
            with replace_folder(target) as partial:
                for name, digest in sums.items():
                    if copy_file(source / name, partial / name) != digest:
                        raise ValueError(f"{source / name} is damaged: run python -m pipeline.publish again")
                copy_file(source / SUMS, partial / SUMS)
    return target


def _is_whole(folder: Path) -> bool:
    """Whether the copy is complete. A clean-up of temporary folders may have removed files of it."""
    try:
        sums = _read_sums(folder)
        return all(sha256_of(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def ensure_local_data(settings: Settings, root: Path, storage: AnyPath) -> AnyPath | None:
    """Ensure that `root`/data exists, linking the published copy if needed.

    Returns the published folder, or None if the storage is `root` itself. Raises ValueError if the local and the
    published corpus differ, or neither exists.
    """
    if storage == home(root):  # other machines, if any, see this folder too
        return None
    source = find_published(settings, storage)
    links = [root / name for name in (ENCODED, TOKENIZER, CLEAN)]
    if any(path.exists() and not path.is_symlink() for path in links):
        digest = CorpusInfo.open(root / ENCODED).sha256[:12]
        if source.name != f"{settings.data_name}-{digest}":
            raise ValueError(
                f"{source} differs from {root / ENCODED} ({digest}): run python -m pipeline.publish again"
            )
        return source
    there = fetch(source)
    for link in links:
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{link.name}.{os.getpid()}")
        temporary.symlink_to(there / link.relative_to(root))
        temporary.replace(link)
    return source


def _read_sums(source: AnyPath) -> dict[str, str]:
    try:
        sums = read_sums(source)
    except FileNotFoundError:
        raise ValueError(f"{source} is incomplete: run python -m pipeline.publish again") from None
    except ValueError as error:
        raise ValueError(f"{source / SUMS} is damaged ({error}): run python -m pipeline.publish again") from None
    for name in sums:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{source / SUMS} names {name!r}, which is outside its folder")
    return sums
