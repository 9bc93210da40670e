import gzip
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.common.settings import Data
from pipeline.data.catalog import Corpus, RemoteFile
from pipeline.download import download
from pipeline.preset import write_presets

ROOT = Path(__file__).parents[2]
SETTINGS = Data(corpus="toy", src="en", tgt="de")
TEXTS = {
    f"{split}.{code}": "".join(f"{split} sentence {i * i} in {code}: ä\n" for i in range(lines))
    for split, lines in (("train", 2003), ("valid", 53), ("test", 47))
    for code in ("en", "de")
}
PACKED = {f"/toy/{name}.gz": gzip.compress(text.encode(), mtime=0) for name, text in TEXTS.items()}
TRAIN = "/toy/train.en.gz"


class Server(http.server.ThreadingHTTPServer):
    """Serves PACKED, with support for Range.

    `faults` has an item for each of the next requests: a status, a number of bytes after which the connection
    breaks, or None for no fault. `hold` is a number of bytes after which every answer pauses, with the connection
    open.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(PACKED)
        self.faults = []
        self.hold = None
        self.drip = None  # "body" or "head": the part that is sent one byte at a time
        self.knows_ranges = True
        self.requests = []  # (path, first byte)
        self.released = threading.Event()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(requested[1]) if requested else 0
        server.requests.append((self.path, first))
        fault = server.faults.pop(0) if server.faults else None
        if fault in (404, 416, 503) or self.path not in server.files:
            return self.send_error(fault or 404)
        content = server.files[self.path]
        if not server.knows_ranges:
            first = 0
        elif first >= len(content):
            return self.send_error(416)
        if server.drip == "head":
            return self.drip_bytes(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 80)
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("Content-Encoding", "gzip")  # as some servers label every .gz
        self.end_headers()
        if server.hold is not None:
            self.wfile.write(content[first : server.hold])
            server.released.wait(20)
        elif server.drip == "body":
            self.drip_bytes(content[first:])
        else:
            self.wfile.write(content[first:][:fault])

    def drip_bytes(self, content):
        for place in range(len(content)):
            self.wfile.write(content[place : place + 1])
            if self.server.released.wait(0.02):
                return

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty project whose catalogue has one corpus, "toy", without pauses between attempts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.download.RETRY_PAUSES_S", (0, 0))
    monkeypatch.setattr("pipeline.download.CORPORA", catalogue("http://127.0.0.1:9"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path


def catalogue(address):
    files = {
        name: RemoteFile(
            path=f"toy/{name}.gz",
            url=f"{address}/toy/{name}.gz",
            num_bytes=len(packed),
            sha256=hashlib.sha256(packed).hexdigest(),
        )
        for name, packed in zip(TEXTS, PACKED.values(), strict=True)
    }
    return {"toy": Corpus(licence="none", languages=("en", "de"), files=files)}


@pytest.fixture
def mirror(tmp_path):
    folder = tmp_path / "mirror"
    (folder / "toy").mkdir(parents=True)
    for path, packed in PACKED.items():
        (folder / path[1:]).write_bytes(packed)
    return folder


def assert_whole():
    assert {file.name for file in Path("data/raw").iterdir()} == {*TEXTS, "corpus.json"}
    for name, text in TEXTS.items():
        assert Path("data/raw", name).read_bytes() == text.encode()


def test_download_from_a_mirror_gives_the_texts_and_their_origin(mirror):
    download(SETTINGS, str(mirror))
    assert_whole()
    described = json.loads(Path("data/raw/corpus.json").read_text())
    assert (described["corpus"], described["src"], described["tgt"]) == ("toy", "en", "de")
    assert described["origin"]["valid.de"] == {
        "url": "http://127.0.0.1:9/toy/valid.de.gz",
        "sha256": hashlib.sha256(PACKED["/toy/valid.de.gz"]).hexdigest(),
    }
    assert not Path("data/downloads").exists()


def test_download_from_web_and_mirror_gives_the_same_bytes(server, mirror):
    download(SETTINGS, str(mirror))
    first = {file.name: file.read_bytes() for file in Path("data/raw").iterdir()}
    shutil.rmtree("data")
    download(SETTINGS, server.address + "/")
    assert {file.name: file.read_bytes() for file in Path("data/raw").iterdir()} == first


def test_download_without_a_mirror_uses_the_public_address(server, monkeypatch):
    monkeypatch.setattr("pipeline.download.CORPORA", catalogue(server.address))
    download(SETTINGS)
    assert_whole()


def test_download_does_not_fetch_verified_files_again(server):
    download(SETTINGS, server.address)
    download(SETTINGS, server.address)
    assert len(server.requests) == len(PACKED)
    Path("data/downloads/toy/train.en.gz").write_bytes(b"damaged since")
    download(SETTINGS, server.address)
    assert server.requests[len(PACKED) :] == [(TRAIN, 0)]
    assert_whole()


def test_download_continues_a_broken_connection_where_it_broke(server):
    server.faults = [701, 503, None]
    download(SETTINGS, server.address)
    assert server.requests[:4] == [(TRAIN, 0), (TRAIN, 701), (TRAIN, 701), ("/toy/train.de.gz", 0)]
    assert_whole()


def test_download_continues_a_failed_run(server):
    server.faults = [None, 307, 503, 503]  # train.en arrives; train.de breaks in all attempts
    with pytest.raises(ValueError, match=r"503 Service Unavailable; 307 of .* Run again to continue") as caught:
        download(SETTINGS, server.address)
    assert "\n" not in str(caught.value)
    assert not Path("data/raw").exists()
    server.requests.clear()
    download(SETTINGS, server.address)
    assert server.requests[:2] == [("/toy/train.de.gz", 307), ("/toy/valid.en.gz", 0)]
    assert_whole()


def test_download_continues_a_killed_run(server, project):
    server.hold = 997
    code = (
        "from test_download import catalogue, SETTINGS\n"
        "import pipeline.download as stage\n"
        f"stage.CORPORA = catalogue({server.address!r})\n"
        "stage.CHUNK_BYTES = 100\n"
        "stage.download(SETTINGS)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    part = Path("data/downloads/toy/train.en.gz.part")
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= 900) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("data/raw").exists()
    have = part.stat().st_size

    server.hold = None
    download(SETTINGS, server.address)
    assert server.requests[:2] == [(TRAIN, 0), (TRAIN, have)]
    assert 900 <= have <= 997
    assert_whole()


def test_download_gets_the_whole_file_from_a_server_without_ranges(server):
    server.knows_ranges = False
    server.faults = [701]
    download(SETTINGS, server.address)
    assert_whole()


def test_download_discards_a_part_of_another_file(server):
    part = Path("data/downloads/toy/train.en.gz.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"?" * 503)
    download(SETTINGS, server.address)
    assert server.requests[:2] == [(TRAIN, 503), (TRAIN, 0)]
    assert_whole()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PACKED[TRAIN][:601], r"is truncated: 601 of [\d,]+ bytes"),
        (b"?" * len(PACKED[TRAIN]), "wrong SHA-256: expected [0-9a-f]{64}, got [0-9a-f]{64}"),
        (PACKED[TRAIN] * 2, "wrong SHA-256"),
    ],
)
def test_download_refuses_and_removes_wrong_content(server, mirror, content, message):
    download(SETTINGS, str(mirror))
    server.files[TRAIN] = content
    with pytest.raises(ValueError, match=f"{TRAIN} .*{message}.* it was deleted here. Run again, or set"):
        download(SETTINGS, server.address)
    assert list(Path("data/downloads/toy").iterdir()) == []
    assert_whole()  # data/raw of the first run is kept


def test_download_reports_a_missing_file_at_once(server):
    del server.files[TRAIN]
    with pytest.raises(ValueError, match=f"{TRAIN} cannot be downloaded: the server answers 404 Not Found"):
        download(SETTINGS, server.address)
    assert server.requests == [(TRAIN, 0)]


def test_download_reports_a_host_that_is_down():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        message = r"train\.en\.gz cannot be downloaded: Failed to .*refused; 0 of"
        with pytest.raises(ValueError, match=message) as caught:
            download(SETTINGS, address)
    assert "\n" not in str(caught.value)


def test_download_reports_an_unknown_host(monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ValueError, match=r"downloaded: Failed to resolve 'corpora\.invalid'.*Name or service"):
        download(SETTINGS, "http://corpora.invalid")


def test_download_reports_a_silent_host(monkeypatch):
    monkeypatch.setattr("pipeline.download.TIMEOUT_S", (0.05, 0.05))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ValueError, match="the server does not answer in time"):
            download(SETTINGS, address)


@pytest.mark.parametrize("what", ["head", "body"])
def test_download_gives_up_a_server_that_drips(server, monkeypatch, what):
    monkeypatch.setattr("pipeline.download.WINDOW_S", 0.2)
    server.drip = what
    started = time.monotonic()
    with pytest.raises(
        ValueError, match=r"downloaded: the server sends less than [\d,]+ bytes a second; \d+ of [\d,]+ b"
    ):
        download(SETTINGS, server.address)
    assert time.monotonic() - started < 5  # three attempts
    assert len(server.requests) == 3


def test_download_continues_after_a_drip(server, monkeypatch):
    monkeypatch.setattr("pipeline.download.WINDOW_S", 0.2)
    monkeypatch.setattr("pipeline.download.RETRY_PAUSES_S", (0.1,))
    server.drip = "body"
    threading.Timer(0.25, setattr, (server, "drip", None)).start()
    download(SETTINGS, server.address)
    assert server.requests[1][1] > 0
    assert_whole()


def test_download_reports_a_server_that_answers_416_for_ever(server):
    server.faults = [701, 416]
    with pytest.raises(ValueError, match=r"is truncated: 701 of [\d,]+ bytes; it was deleted here"):
        download(SETTINGS, server.address)
    server.faults = [416] * 9
    with pytest.raises(ValueError, match=r"downloaded: the server answers 416 .*; 0 of [\d,]+ bytes are here"):
        download(SETTINGS, server.address)


def test_download_takes_an_address_in_any_case(server):
    download(SETTINGS, server.address.replace("http", "HTTP"))
    assert_whole()


@pytest.mark.parametrize("name", ["train.en.gz", "train.en.gz.part"])
def test_download_replaces_a_pipe_or_a_link_where_its_own_file_belongs(server, name):
    file, outside = Path("data/downloads/toy", name), Path("outside")
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    download(SETTINGS, server.address)
    assert_whole()
    shutil.rmtree("data")
    file.parent.mkdir(parents=True)
    outside.write_bytes(b"not to be touched")
    file.symlink_to(outside.resolve())
    download(SETTINGS, server.address)
    assert_whole()
    assert outside.read_bytes() == b"not to be touched"


def test_download_reports_a_full_disk_with_the_file(server, monkeypatch):
    part = Path("data/downloads/toy/train.en.gz.part")
    path_open = Path.open

    def full(path, *arguments):
        return path_open(Path("/dev/full") if path == part else path, *arguments)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="free some space and run again") as caught:
        download(SETTINGS, server.address)
    assert caught.value.filename == str(part)
    assert not Path("data/raw").exists()


def test_download_reports_a_mirror_that_is_no_folder():
    with pytest.raises(ValueError, match=r"CORPUS_MIRROR must be a folder or an http\(s\) address, got 'nowhere'"):
        download(SETTINGS, "nowhere")


@pytest.mark.parametrize(
    "mirror",
    [
        "us:secret@host",
        "ftp://us:secret@host/x",
        "http://us:sec/ret@host",
        "http://us:secret@:80/x",
        "http://us:secret@[::bad/x",
        "http://us:secret@host:port/x",
    ],
)
def test_download_shows_no_password_of_an_address_that_is_none(mirror):
    with pytest.raises(ValueError, match=r"^CORPUS_MIRROR must be (a folder|the address)") as caught:
        download(SETTINGS, mirror)
    assert not re.search("us:|sec", str(caught.value))


def test_download_shows_no_password_of_a_server_that_refuses(server, project):
    """Runs the command, whose error line leaves the password out."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, name)
    shutil.copytree(ROOT / "conf", "conf")
    write_presets(["data=multi30k"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    mirror = server.address.replace("//", "//us:sec%40ret@")
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.download"],
        env=environment | {"CORPUS_MIRROR": mirror},
        capture_output=True,
        text=True,
    )
    assert "404" in result.stderr
    assert not re.search("us:|sec", result.stdout + result.stderr)


def test_download_reports_faults_of_a_mirror_with_the_file(mirror):
    file = mirror / "toy" / "test.de.gz"
    file.write_bytes(PACKED["/toy/test.de.gz"][:-1])
    with pytest.raises(ValueError, match=r"mirror/toy/test\.de\.gz is truncated: .* bytes: copy http"):
        download(SETTINGS, str(mirror))
    file.unlink()
    with pytest.raises(ValueError, match=r"test\.de\.gz does not exist: .*CORPUS_MIRROR.* toy/test\.de\.gz"):
        download(SETTINGS, str(mirror))
    assert not Path("data/raw").exists()


def test_download_takes_own_files_plain_or_packed():
    write_own_files()
    shutil.move("data/own/train.de", "data/own/unpacked")
    Path("data/own/train.de.gz").write_bytes(PACKED["/toy/train.de.gz"])
    download(Data(corpus="own", src="en", tgt="de"))
    assert_whole()
    origin = json.loads(Path("data/raw/corpus.json").read_text())["origin"]
    assert origin["train.de"]["url"] == "data/own/train.de.gz"
    assert origin["test.en"]["sha256"] == hashlib.sha256(TEXTS["test.en"].encode()).hexdigest()


def test_download_reports_own_files_missing_double_or_broken():
    settings = Data(corpus="own", src="en", tgt="de")
    write_own_files()
    packed = Path("data/own/valid.en.gz")
    packed.write_bytes(PACKED["/toy/valid.en.gz"][:-9])
    with pytest.raises(ValueError, match=r"both data/own/valid\.en and data/own/valid\.en\.gz exist"):
        download(settings)
    Path("data/own/valid.en").unlink()
    with pytest.raises(ValueError, match=r"data/own/valid\.en\.gz is not a complete gzip file"):
        download(settings)
    packed.write_bytes(b"plain after all")
    with pytest.raises(ValueError, match=r"data/own/valid\.en\.gz is not a complete gzip file"):
        download(settings)
    packed.unlink()
    Path("data/own/test.de").unlink()
    with pytest.raises(ValueError, match=r"data/own has no valid\.en, test\.de \(plain or \.gz\)"):
        download(settings)
    assert not Path("data/raw").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_download_refuses_own_files_that_are_no_text(make):
    write_own_files()
    Path("data/own/train.en").unlink()
    make("data/own/train.en")
    with pytest.raises(ValueError, match=r"data/own/train\.en is neither a file nor a link to one"):
        download(Data(corpus="own", src="en", tgt="de"))


def test_download_takes_a_link_to_an_own_file():
    write_own_files()
    shutil.move("data/own/train.en", "elsewhere")
    Path("data/own/train.en").symlink_to(Path("elsewhere").resolve())
    download(Data(corpus="own", src="en", tgt="de"))
    assert_whole()


def test_download_refuses_packed_files_under_the_name_of_text():
    settings, path = Data(corpus="own", src="en", tgt="de"), Path("data/own/train.en")
    write_own_files()
    path.write_bytes(PACKED[TRAIN])
    with pytest.raises(ValueError, match=r"train\.en is compressed by gzip, not text: rename it to train\.en\.gz"):
        download(settings)
    path.unlink()
    path.with_name("train.en.gz").write_bytes(gzip.compress(PACKED[TRAIN]))
    with pytest.raises(ValueError, match=r"train\.en\.gz is compressed by gzip, not text: decompress it"):
        download(settings)


def write_own_files():
    Path("data/own").mkdir(parents=True)
    for name, text in TEXTS.items():
        Path("data/own", name).write_text(text, encoding="utf-8")


def test_download_generates_and_describes_the_grammar():
    download(Data(corpus="grammar", src="en", tgt="de", seed=3, train_pairs=101, valid_pairs=7, test_pairs=5))
    lines = {file.name: len(file.read_text().splitlines()) for file in Path("data/raw").iterdir()}
    del lines["corpus.json"]
    assert lines == {
        f"{split}.{kind}": number
        for split, number in (("train", 101), ("valid", 7), ("test", 5))
        for kind in ("en", "de", "trees")
    }
    origin = json.loads(Path("data/raw/corpus.json").read_text())["origin"]
    assert set(origin) == set(lines)
    assert {entry["url"] for entry in origin.values()} == {"generated"}


@pytest.mark.parametrize(
    ("corpus", "src", "tgt", "message"),
    [
        ("toy", "en", "fr", "data.tgt must be one of en, de for the corpus toy, got 'fr'"),
        ("toi", "en", "de", "data.corpus must be one of grammar, own, toy, got 'toi'"),
    ],
)
def test_download_refuses_an_unknown_corpus_or_language(corpus, src, tgt, message):
    with pytest.raises(ValueError, match=message):
        download(Data(corpus=corpus, src=src, tgt=tgt))


def test_main_reports_a_fault_in_one_line_with_exit_code_1(project):
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, name)
    shutil.copytree(ROOT / "conf", "conf")
    write_presets(["data=multi30k"])
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.download"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CORPUS_MIRROR": "nowhere"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "download: CORPUS_MIRROR must be a folder or an http(s) address, got 'nowhere'\n"
