"""Download or generate the corpus that params.yaml names.

    python -m pipeline.download
    CORPUS_MIRROR=/mnt/corpora python -m pipeline.download

Reads params.yaml. Writes data/raw/: train, valid and test as plain text, one
file for each language, and corpus.json with the origin and checksum of every
file. Where the text comes from depends on data.corpus:

- A public corpus, such as multi30k, is downloaded from its URL. With
  CORPUS_MIRROR set, it is taken from a folder or web address that has the same
  files under the same names. Every file is checked against its SHA-256. Files
  from the web are kept in data/downloads/. An interrupted download continues
  where it stopped.
- "own" is your own text: data/own/{train,valid,test}.{src,tgt}, plain or .gz,
  where src and tgt are the languages of params.yaml (data/own/train.en).
- "grammar" is generated from data.seed.
"""

import gzip
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import requests
import urllib3
from tqdm import tqdm

from pipeline.common import cli
from pipeline.common.atomic_io import name_enospc, replace_folder, sha256_of, write_json
from pipeline.common.environment import CORPUS_MIRROR_ENV
from pipeline.common.paths import DOWNLOADS, OWN, RAW
from pipeline.common.retry import retry
from pipeline.common.settings import Data, load_settings
from pipeline.data import grammar
from pipeline.data.catalog import CORPORA, RemoteFile

CHUNK_BYTES = 1 << 16
TIMEOUT_S = (10, 30)  # to connect, and to receive the next bytes
MIN_BYTES, WINDOW_S = 30_000, 30.0  # a server that sends fewer bytes in this time is too slow
RETRY_PAUSES_S = (1, 2, 4, 8)
PACKED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh9": "bzip2"}
BUSY = (408, 429, 500, 502, 503, 504)  # HTTP statuses that are worth a retry


class SlowError(Exception):
    """A server is too slow, although it sends often enough that no timeout ends the download."""


def download(settings: Data, mirror: str | None = None) -> None:
    """Write {train,valid,test}.{src,tgt} and corpus.json, with the origin of each file, to data/raw/.

    `mirror` is a folder or an http(s) address. Raises ValueError or OSError with a one-line message and the way out.
    """
    names = [f"{split}.{code}" for split in ("train", "valid", "test") for code in (settings.src, settings.tgt)]
    if settings.corpus == "grammar":
        _check_languages(settings, ("en", "de"))
        _generate(settings)
    elif settings.corpus == "own":
        sources = _own_files(names)
        origin = {name: _origin(path.as_posix(), sha256_of(path)) for name, path in sources.items()}
        _unpack(settings, sources, origin, licence="the user's own")
    elif settings.corpus in CORPORA:
        corpus = CORPORA[settings.corpus]
        _check_languages(settings, corpus.languages)
        remote = {name: corpus.files[name] for name in names}
        # The public URL even with a mirror: equal checksums mean equal bytes, so the output has to be equal too.
        origin = {name: _origin(file.url, file.sha256) for name, file in remote.items()}
        _unpack(settings, _obtain(remote, mirror), origin, corpus.licence)
    else:
        known = ", ".join(sorted((*CORPORA, "own", "grammar")))
        raise ValueError(f"data.corpus must be one of {known}, got {settings.corpus!r}")


def _check_languages(settings: Data, languages: tuple[str, ...]) -> None:
    for key in ("src", "tgt"):
        if getattr(settings, key) not in languages:
            raise ValueError(
                f"data.{key} must be one of {', '.join(languages)} for the corpus {settings.corpus}, "
                f"got {getattr(settings, key)!r}"
            )


def _generate(settings: Data) -> None:
    with replace_folder(RAW) as folder:
        grammar.generate(
            folder,
            seed=cast(int, settings.seed),
            train_pairs=cast(int, settings.train_pairs),
            valid_pairs=cast(int, settings.valid_pairs),
            test_pairs=cast(int, settings.test_pairs),
        )
        origin = {file.name: _origin("generated", sha256_of(file)) for file in sorted(folder.iterdir())}
        _describe(folder, settings, origin, licence="this project's own")


def _own_files(names: list[str]) -> dict[str, Path]:
    found = {name: [path for path in (OWN / name, OWN / f"{name}.gz") if os.path.lexists(path)] for name in names}
    missing = [name for name, paths in found.items() if not paths]
    if missing:
        raise ValueError(
            f"{OWN} has no {', '.join(missing)} (plain or .gz): add each, in UTF-8, one sentence per line"
        )
    for paths in found.values():
        if len(paths) > 1:
            raise ValueError(f"both {paths[0]} and {paths[1]} exist: remove one")
        if not paths[0].is_file():
            raise ValueError(f"{paths[0]} is neither a file nor a link to one: put the text itself there")
    return {name: paths[0] for name, paths in found.items()}


def _obtain(remote: dict[str, RemoteFile], mirror: str | None) -> dict[str, Path]:
    """Download or find each file; return its local path, once the file is complete and verified."""
    address = mirror is not None and mirror.lower().startswith(("http://", "https://"))
    folder = None if mirror is None or address else Path(mirror).expanduser()
    shown = (mirror or "").rpartition("@")[2]  # without name and password
    if folder is not None and not folder.is_dir():
        raise ValueError(f"CORPUS_MIRROR must be a folder or an http(s) address, got {shown!r}")
    if address and not _is_sound(cast(str, mirror)):
        raise ValueError(
            f"CORPUS_MIRROR must be the address of a host, got one that ends with {shown!r}: in a user name or "
            "password, write %2F for /, %40 for @ and so on"
        )
    total = sum(file.num_bytes for file in remote.values())
    have = 0 if folder else sum(_bytes_there(DOWNLOADS / file.path) for file in remote.values())
    paths = {}
    with _bar("verify" if folder else "download", total, initial=have) as bar:
        for name, file in remote.items():
            bar.set_postfix_str(Path(file.path).name)
            if folder is not None:
                paths[name] = folder / file.path
                _check_mirrored(paths[name], file)
                bar.update(file.num_bytes)
            else:
                url = file.url if mirror is None else f"{mirror.rstrip('/')}/{file.path}"
                paths[name] = DOWNLOADS / file.path
                _fetch(url, file, paths[name], bar)
    return paths


def _is_sound(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _check_mirrored(path: Path, file: RemoteFile) -> None:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the folder CORPUS_MIRROR must contain {file.path}")
    if problem := _problem(path, file):
        raise ValueError(f"{path} {problem}: copy {file.url} there again")


def _problem(path: Path, file: RemoteFile) -> str | None:
    if (size := path.stat().st_size) < file.num_bytes:
        return f"is truncated: {size:,} of {file.num_bytes:,} bytes"
    if (found := sha256_of(path)) != file.sha256:
        return f"has the wrong SHA-256: expected {file.sha256}, got {found}"
    return None


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _bytes_there(target: Path) -> int:
    return next((path.stat().st_size for path in (target, _part(target)) if path.is_file()), 0)


# Why not a library: pooch restarts an interrupted file at its first byte; mtdata does not verify checksums; SacreBLEU
# reads a whole archive into memory and has test sets only.


def _fetch(url: str, file: RemoteFile, target: Path, bar: tqdm) -> None:
    """Download the file to `target` and verify it. Continues the download of an earlier run."""
    if target.is_file():
        if _problem(target, file) is None:
            return
        bar.update(-target.stat().st_size)
    target.unlink(missing_ok=True)
    part = _part(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    if part.is_symlink() or not part.is_file():  # opening a pipe would block; a link would overwrite another file
        part.unlink(missing_ok=True)
    continued = part.exists()
    _fetch_part(url, file, part, bar)
    problem = _problem(part, file)
    if problem and continued:  # the server's file may have changed since: download it again from the first byte
        bar.update(-part.stat().st_size)
        part.unlink()
        _fetch_part(url, file, part, bar)
        problem = _problem(part, file)
    if problem:
        part.unlink()
        raise ValueError(f"{url} {problem}; it was deleted here. Run again, or set CORPUS_MIRROR to another source")
    os.replace(part, target)


def _fetch_part(url: str, file: RemoteFile, part: Path, bar: tqdm) -> None:
    def request() -> None:
        bar.set_postfix_str(Path(file.path).name)
        _request_rest(url, file, part, bar)

    def log(error: Exception, pause_s: float) -> None:
        bar.set_postfix_str(f"{file.path}: {_reason(error)}, next try in {pause_s} s")

    try:
        retry(request, RETRY_PAUSES_S, _may_pass, log)
    except (requests.RequestException, urllib3.exceptions.HTTPError, SlowError) as error:
        have = part.stat().st_size if part.exists() else 0
        raise ValueError(
            f"{url} cannot be downloaded: {_reason(error)}; {have:,} of {file.num_bytes:,} bytes are here. "
            f"Run again to continue, or set CORPUS_MIRROR to a source of {file.path}"
        ) from None


def _request_rest(url: str, file: RemoteFile, part: Path, bar: tqdm) -> None:
    """Request the bytes that `part` lacks and append them. Raises the errors of requests and urllib3, also if the
    response is cut off."""
    have = part.stat().st_size if part.exists() else 0
    if have >= file.num_bytes:
        return
    headers = {"Accept-Encoding": "identity"}  # not compressed for transfer: a Range counts the file's own bytes
    if have:
        headers["Range"] = f"bytes={have}-"
    received = 0
    with (
        _no_slower(lambda: received),
        requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer,
    ):
        if have and answer.status_code == requests.codes.requested_range_not_satisfiable:
            return  # the server's file ends where ours does: it is too short, which `_problem` reports
        answer.raise_for_status()
        if have and answer.status_code != requests.codes.partial_content:  # this server does not support Range
            bar.update(-have)
            have = 0
        with name_enospc(part), part.open("ab" if have else "wb") as out:
            # Not iter_content: it would decompress a .gz that the server sends with Content-Encoding: gzip.
            while chunk := answer.raw.read1(CHUNK_BYTES, decode_content=False):
                received += len(chunk)
                out.write(chunk)
                out.flush()  # so that the next run can continue if this one is killed
                bar.update(len(chunk))
                if out.tell() > file.num_bytes:
                    return  # at most one chunk too many; `_problem` reports it
    if part.stat().st_size < file.num_bytes:
        raise urllib3.exceptions.ProtocolError("the response ended before the file was complete")


@contextmanager
def _no_slower(received: Callable[[], int]) -> Iterator[None]:
    """Raise SlowError in the block as soon as `received()` grows by less than MIN_BYTES in WINDOW_S seconds, whether
    the headers or the body of a response are being read."""
    before = 0

    def check(*_: object) -> None:
        nonlocal before
        if (now := received()) - before < MIN_BYTES:
            raise SlowError(f"the server sends less than {MIN_BYTES / WINDOW_S:,.0f} bytes a second")
        before = now

    handler = signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, WINDOW_S, WINDOW_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def _may_pass(error: Exception) -> bool:
    if (answer := getattr(error, "response", None)) is not None:
        return answer.status_code in BUSY
    return isinstance(error, requests.ConnectionError | requests.Timeout | urllib3.exceptions.HTTPError | SlowError)


def _reason(error: Exception) -> str:
    if (answer := getattr(error, "response", None)) is not None:
        return f"the server answers {answer.status_code} {answer.reason}"
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return "the server does not answer in time"
    if isinstance(error, urllib3.exceptions.ProtocolError):
        return "the connection broke"
    cause = getattr(error.args[0], "reason", error) if error.args else error  # requests wraps a MaxRetryError
    text = " ".join(str(cause).split())
    return text.partition("): ")[2] or text


def _unpack(settings: Data, sources: dict[str, Path], origin: dict[str, dict], licence: str) -> None:
    total = sum(path.stat().st_size for path in sources.values())
    with replace_folder(RAW) as folder, _bar("unpack", total) as bar:
        for name, path in sources.items():
            bar.set_postfix_str(name)
            with path.open("rb") as packed, (folder / name).open("wb") as out:
                text = cast(BinaryIO, gzip.GzipFile(fileobj=packed)) if path.suffix == ".gz" else packed
                before = 0
                while chunk := _read(text, path):
                    if not before:
                        _refuse_packed(chunk, path)
                    out.write(chunk)
                    bar.update(packed.tell() - before)
                    before = packed.tell()
        _describe(folder, settings, origin, licence)


def _refuse_packed(start: bytes, path: Path) -> None:
    if kind := next((PACKED[mark] for mark in PACKED if start.startswith(mark)), None):
        way_out = f"rename it to {path.name}.gz" if kind == "gzip" and path.suffix != ".gz" else "decompress it"
        raise ValueError(f"{path} is compressed by {kind}, not text: {way_out}")


def _read(text: BinaryIO, path: Path) -> bytes:
    try:
        return text.read(CHUNK_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}): compress it again") from None


def _describe(folder: Path, settings: Data, origin: dict[str, dict], licence: str) -> None:
    languages = {"src": settings.src, "tgt": settings.tgt}
    values = {"corpus": settings.corpus, **languages, "licence": licence, "origin": origin}
    write_json(folder / "corpus.json", values)


def _origin(url: str, sha256: str) -> dict[str, str]:
    return {"url": url, "sha256": sha256}


def _bar(title: str, total: int, initial: int = 0) -> tqdm:
    return tqdm(desc=title, total=total, initial=initial, unit="B", unit_scale=True)


def main() -> None:
    cli.parser("pipeline.download", __doc__).parse_args()
    with cli.exit_on_error("download", interrupted="stopped; run again to continue"):
        download(load_settings().data, os.environ.get(CORPUS_MIRROR_ENV) or None)


if __name__ == "__main__":
    main()
