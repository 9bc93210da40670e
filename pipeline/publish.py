"""Put the encoded corpus where all nodes of a cluster can read it; each copies it to its own disk, once.

    python -m pipeline.publish          to the folder or store that RUN_STORAGE names

What training, search and scoring read goes to <RUN_STORAGE>/data/<name>-<digest>/: pieces, tokenizer, and the texts
of the validation and test splits. A corpus with other contents gets another digest, so that a run in progress keeps
its own; <RUN_STORAGE>/data/<name>.json says which one is the newest.
"""

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from pipeline.corpus import CLEAN, ENCODED, TOKENIZER, CorpusInfo
from pipeline.files import SUMS, read_sums, replace_folder, sha256_of, sums_text, write_json, write_text
from pipeline.params import Settings, load_settings
from pipeline.storage import VARIABLE, Folder, cache, copy_file, errors_of, run_storage


def publish(settings: Settings, root: Path, storage: Folder) -> Folder:
    """Copy data/ of `root` to `storage`, unless it is there; returns its folder there. Raises ValueError and OSError
    with one line."""
    target = storage / "data" / f"{settings.data_name}-{CorpusInfo.open(root / ENCODED).sha256[:12]}"
    paths = _files(settings, root)
    with errors_of(storage):
        if not (target / SUMS).exists():
            size = sum(path.stat().st_size for path in paths)
            with tqdm(total=size, desc=f"publish to {storage}", unit="B", unit_scale=True) as bar:
                names = {path: path.relative_to(root).as_posix() for path in paths}
                sums = {name: copy_file(path, target / name, bar.update) for path, name in names.items()}
            write_text(target / SUMS, sums_text(sums))  # last: with it the folder is whole
    write_json(storage / "data" / f"{settings.data_name}.json", {"folder": target.name})
    return target


def published(settings: Settings, storage: Folder) -> Folder:
    """Where `publish` has put the corpus of these settings. Raises ValueError if it has not, OSError if the storage
    cannot be reached."""
    path = storage / "data" / f"{settings.data_name}.json"
    try:
        with errors_of(path):
            name = json.loads(path.read_text(encoding="utf-8"))["folder"]
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: where the corpus is encoded, run {VARIABLE}={storage} python -m pipeline.publish"
        ) from None
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): run python -m pipeline.publish again") from None
    return storage / "data" / PurePosixPath(name).name


def fetch(source: Folder) -> Path:
    """A folder of this machine with the data/ of a published corpus: copied by whoever comes first, while others
    wait, and verified each time. Raises ValueError if what arrives is not what was published, OSError."""
    target = cache() / source.name
    with _locked(cache() / f"{source.name}.lock"), errors_of(source):
        if not _is_whole(target):
            sums = _read_sums(source)
            with replace_folder(target) as partial:
                for name, digest in sums.items():
                    if copy_file(source / name, partial / name) != digest:
                        raise ValueError(f"{source / name} is not what was published: publish the corpus again")
                copy_file(source / SUMS, partial / SUMS)
    return target


def _is_whole(folder: Path) -> bool:
    """Whether the copy is all there: what cleans up temporary folders may have taken some of it."""
    try:
        sums = _read_sums(folder)
        return all(sha256_of(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def bring(settings: Settings, root: Path, storage: Folder) -> Folder | None:
    """Make data/ of `root` be there, from what is published if need be; where other machines find the same, None if
    it is not published. Raises ValueError if both are there and differ, or neither is."""
    if storage == root.resolve():  # where other machines see it too, if there are any
        return None
    source = published(settings, storage)
    links = [root / name for name in (ENCODED, TOKENIZER, CLEAN)]
    if any(path.exists() and not path.is_symlink() for path in links):
        digest = CorpusInfo.open(root / ENCODED).sha256[:12]
        if source.name != f"{settings.data_name}-{digest}":
            raise ValueError(
                f"{source} is another corpus than {root / ENCODED} ({digest}): run python -m pipeline.publish again"
            )
        return source
    there = fetch(source)
    for link in links:
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{link.name}.{os.getpid()}")
        temporary.symlink_to(there / link.relative_to(root))
        temporary.replace(link)
    return source


def _files(settings: Settings, root: Path) -> list[Path]:
    """What `publish` copies. Raises ValueError for what is not there."""
    texts = [
        root / CLEAN / f"{split}.{language}"
        for split in ("valid", "test")
        for language in (settings.download.src, settings.download.tgt)
    ]
    paths = [*sorted((root / ENCODED).iterdir()), root / TOKENIZER / "spm.model", *texts]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} does not exist: run dvc repro tokenize first")
    return paths


def _read_sums(source: Folder) -> dict[str, str]:
    try:
        sums = read_sums(source)
    except FileNotFoundError:
        raise ValueError(f"{source} is not whole: run python -m pipeline.publish again") from None
    except ValueError as error:
        raise ValueError(f"{source / SUMS} is damaged ({error}): run python -m pipeline.publish again") from None
    for name in sums:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{source / SUMS} names {name!r}, outside of its folder")
    return sums


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """For one process of this machine at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    root = Path().resolve()
    try:
        storage = run_storage(root)
        if storage == root:
            raise ValueError(
                f"{VARIABLE} is not set: name a folder that all nodes see, or a URI such as s3://bucket/runs"
            )
        print(publish(load_settings(), root, storage))
    except (ValueError, OSError) as error:
        print(f"publish: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
