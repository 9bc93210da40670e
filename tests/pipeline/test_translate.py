"""The command that translates: every line of input gets a line of output or a reason."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest
import torch

from pipeline import translate as command
from pipeline.common.checksums import write_sums
from pipeline.common.settings import Evaluate
from pipeline.inference.lines import BATCH_TOKENS, LineTranslator
from pipeline.inference.trained_model import load_trained
from pipeline.training.checkpoint import save_model
from tests.support.random_models import MAX_LENGTH, random_model, random_tokenizer

LINES = ["ein Mann singt im Haus", "", "das Kind malt", "\u200b", "eine Frau liest das Buch"]


@pytest.fixture(scope="module")
def final(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "final"
    folder.mkdir()
    model = random_model(2, "sinusoidal")
    save_model(folder, model.state_dict(), model.config)
    (folder / "spm.model").write_bytes(random_tokenizer().serialized_model_proto())
    write_sums(folder, ["spm.model"])
    return folder


@pytest.fixture
def run(final: Path, tmp_path: Path, monkeypatch, capfdbinary, own_threads) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command outside a project and returns exit code, stdout and stderr."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})

    def with_arguments(*arguments: str, text: bytes | None = None) -> tuple[int, str, str]:
        files = []
        if text is not None:
            (tmp_path / "elsewhere/text").write_bytes(text)
            files = ["text"]
        monkeypatch.setattr(sys, "argv", ["translate", "--model", str(final), *arguments, *files])
        code = 0
        try:
            command.main()
        except SystemExit as ended:
            code = ended.code
        written = capfdbinary.readouterr()
        return code, written.out.decode(), written.err.decode()

    return with_arguments


def encoded(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def expected(final: Path, lines: list[str], num_best: int = 1, **search):
    settings = {"beam": 4, "alpha": 0.6, "engine": "torch"} | search
    evaluate = Evaluate(**settings, max_extra=50, batch_tokens=BATCH_TOKENS, num_samples=0)
    return LineTranslator(*load_trained(final), evaluate, num_best)(lines, lambda *what: None)


@pytest.mark.parametrize("search", [{}, {"beam": 2, "alpha": 1.5}, {"engine": "ctranslate2"}, {"beam": 1}])
def test_translate_writes_a_line_for_each_line(run, final: Path, search: dict):
    options = [f"--{key}={value}" for key, value in search.items()]
    code, out, err = run(*options, text=encoded(LINES))
    assert (code, err) == (0, "")
    found = expected(final, LINES, **search)
    assert out.split("\n") == [*(best[0].text if best else "" for best in found), ""]
    assert out.split("\n")[1] == out.split("\n")[3] == ""
    assert len({best[0].text for best in found if best}) == 3


@pytest.mark.parametrize(("chunk_lines", "chunk_bytes"), [(1, 10**6), (2, 10**6), (1_000, 1), (1_000, 30)])
def test_translate_keeps_the_order_of_lines_in_any_batches(run, monkeypatch, chunk_lines, chunk_bytes):
    lines = LINES * 7
    once = run(text=encoded(lines))[1]
    monkeypatch.setattr(command, "CHUNK_LINES", chunk_lines)
    monkeypatch.setattr(command, "CHUNK_BYTES", chunk_bytes)
    assert run(text=encoded(lines))[1] == once


def test_translate_reads_several_files_in_turn(run, tmp_path: Path):
    for name, line in (("a", LINES[0]), ("b", LINES[2])):
        (tmp_path / name).write_text(line)  # the last line has no newline
    out = run(str(tmp_path / "b"), str(tmp_path / "a"))[1]
    assert out == run(text=encoded([LINES[2], LINES[0]]))[1]


def test_translate_takes_line_ends_of_windows_and_no_others_for_ends(run):
    plain = run(text=encoded([LINES[0], LINES[2]]))[1]
    assert run(text=f"{LINES[0]}\r\n{LINES[2]}\r\n".encode())[1] == plain
    assert run(text="ein\u2028Mann\x85singt\x0cim Haus\n".encode())[1].count("\n") == 1


def test_translate_writes_scores_and_several_translations(run, final: Path):
    found = expected(final, LINES, num_best=3)
    code, out, _ = run("--nbest=3", "--scores", text=encoded(LINES))
    assert code == 0
    rows = []
    for best in found:
        rows += [f"{one.text}\t{one.score:.4f}" for one in best] + [""] * (3 - len(best))
    assert out.split("\n") == [*rows, ""]
    assert len(rows) == 3 * len(LINES)


def test_translate_writes_tsv_with_a_heading_and_the_sources(run, final: Path):
    lines = ["ein\tMann  singt", ""]
    [best] = expected(final, lines[:1])[0]
    assert run("--format=tsv", text=encoded(lines))[1] == f"source\ttranslation\nein Mann singt\t{best.text}\n\t\n"
    assert run("--format=tsv", "--scores", text=encoded(lines))[1] == (
        f"source\ttranslation\tscore\nein Mann singt\t{best.text}\t{best.score:.4f}\n\t\t\n"
    )


def test_translate_writes_an_object_for_each_line(run, final: Path):
    out = run("--format=jsonl", "--nbest=2", "--scores", text=encoded(LINES))[1]
    found = expected(final, LINES, num_best=2)
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "line": number,
            "source": line,
            "translations": [{"text": best.text, "score": pytest.approx(best.score)} for best in of_line],
        }
        for number, (line, of_line) in enumerate(zip(LINES, found, strict=True), start=1)
    ]
    assert "score" not in run("--format=jsonl", text=encoded(LINES))[1]


def test_translate_logs_what_is_split_or_cut(run):
    code, out, err = run(text=encoded(["das Kind malt", "Das Kind malt. " * 9, "", "ein Mann " * 20]))
    assert (code, out.count("\n")) == (0, 4)
    first, second = err.splitlines()
    assert first.startswith("translate: text line 2 has ")
    assert first.endswith(f"more than the model's {MAX_LENGTH - 1}: translated in 9 parts")
    assert second.startswith("translate: text line 4 has ")
    assert second.endswith("tokens are left out")


def test_translate_reads_no_more_of_a_line_than_it_may_hold(run, monkeypatch):
    monkeypatch.setattr(command, "LONGEST_LINE", 20)
    short = ["das Kind malt", "ein Männchen singt x", "ä" * 10]  # 13, 21 and 20 bytes
    code, out, err = run(text=encoded([*short, "das Kind malt, " * 50, short[0]]))
    assert code == 0
    assert [line.partition(":")[2] for line in err.splitlines() if "bytes" in line] == [
        " text line 2 has more than 20 bytes: the rest is left out",
        " text line 4 has more than 20 bytes: the rest is left out",
    ]
    assert out.count("\n") == 5
    assert out.split("\n")[4] == out.split("\n")[0]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b"das Kind malt\n\xff\n", r"text line 2, byte 1 (0xff)"),
        (b"das Kind malt\nab\xc3\n", r"text line 2, byte 3 (0xc3)"),
        (b"das Kind malt\nab\xe4\xb8", r"text line 2, byte 3 (0xe4)"),
        (b"das Kind malt\nein" + "Männchen".encode("latin-1"), r"text line 2, byte 5 (0xe4)"),
    ],
)
def test_translate_ends_at_bytes_that_are_not_utf8_with_what_came_before(run, text: bytes, place: str):
    code, out, err = run(text=text)
    assert code == 1
    assert out == run(text=b"das Kind malt\n")[1]
    assert err == f"translate: {place} is not UTF-8: convert the text, or correct the line\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--beam=0"], "--beam must be >= 1, got 0"),
        (["--alpha=-1"], "--alpha must be >= 0, got -1.0"),
        (["--alpha=nan"], "--alpha must be a number >= 0, got nan"),
        (["--nbest=5"], "--nbest must be in [1, --beam (4)], got 5"),
        (["--nbest=0"], "--nbest must be in [1, --beam (4)], got 0"),
        (["gone"], "gone is not a readable file"),
        (["."], ". is not a readable file"),
        (["--model=gone"], "gone/weights.safetensors does not exist: run the train stage first (dvc repro train)"),
    ],
)
def test_translate_refuses_what_cannot_be_in_one_line(run, arguments: list[str], reason: str):
    assert run(*arguments) == (1, "", f"translate: {reason}\n")


def arguments_of(final: Path, *files: Path) -> argparse.Namespace:
    return argparse.Namespace(
        files=[str(file) for file in files], model=final, beam=1, alpha=0.6, nbest=1, scores=False, format="text",
        engine="torch",
    )  # fmt: skip


@pytest.fixture
def standard_input() -> Iterator[BinaryIO]:
    """A pipe to the command's standard input."""
    before, (reader, writer) = os.dup(0), os.pipe()
    os.dup2(reader, 0)
    with os.fdopen(writer, "wb", buffering=0) as file:
        yield file
    os.dup2(before, 0)
    for descriptor in (before, reader):
        os.close(descriptor)


def test_translate_answers_a_line_before_the_next_is_written(final: Path, standard_input, monkeypatch, own_threads):
    torch.set_num_threads(1)
    reader, writer = os.pipe()
    answers = []
    with os.fdopen(reader, "rb") as out, os.fdopen(writer, "wb") as buffer, ThreadPoolExecutor(1) as thread:
        monkeypatch.setattr(command.sys, "stdout", SimpleNamespace(buffer=buffer))
        running = thread.submit(command.translate, arguments_of(final))
        for line in LINES:
            standard_input.write(f"{line}\n".encode())
            answers.append(out.readline().decode().removesuffix("\n"))
        standard_input.close()
        running.result(timeout=30)
    assert answers == [best[0].text if best else "" for best in expected(final, LINES, beam=1)]


def test_ahead_holds_no_more_than_a_chunk_in_memory(monkeypatch):
    monkeypatch.setattr(command, "CHUNK_LINES", 5)
    read = []

    def lines():
        for number in range(100):
            read.append(number)
            yield command.Line(f"line {number}", "x", 2)

    chunks = command._chunks(command._ahead(lines()))
    sizes = [len(next(chunks)) for _ in range(3)]
    time.sleep(0.2)
    assert len(read) <= sum(sizes) + 5 + 1 + 5  # queued, held by the thread, next chunk
    assert sum(sizes) + sum(map(len, chunks)) == 100


def test_translate_takes_memory_for_a_chunk_whatever_the_input(final: Path, tmp_path: Path, monkeypatch, own_threads):
    """The writer gets at most CHUNK_LINES lines at once."""
    torch.set_num_threads(1)
    (tmp_path / "text").write_bytes(encoded(["das Kind malt"] * 25))
    monkeypatch.setattr(command, "CHUNK_LINES", 10)
    seen = []
    monkeypatch.setattr(command._Writer, "__call__", lambda self, lines, found: seen.append(len(lines)))
    command.translate(arguments_of(final, tmp_path / "text"))
    assert sum(seen) == 25
    assert max(seen) <= 10
