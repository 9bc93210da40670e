"""Translate text by a trained model, a sentence a line: from files or standard input to standard output.

    python -m pipeline.translate sentences.en > sentences.de
    python -m pipeline.translate --model models/final --nbest 3 --scores --format tsv sentences.en

Reads the model's folder, which the train stage has written, and nothing else of the project. A line of input is a
line of output, in order, as soon as it is translated; an empty one stays empty. A line with more tokens than the
model takes (model.max_length) is split at ends of sentences or else cut, and standard error has its number.

--format text is the translation, with --scores then a tab and its score; with --nbest, that many lines for each line
of input, empty ones where the search has found fewer. tsv has a heading, the source first, and a line for each
translation. jsonl has an object for each line of input: {"line", "source", "translations": [{"text", "score"}]}. A
score is the logarithm of the probability (nats) over the length penalty; of a line in parts it is the sum.
"""

import argparse
import codecs
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from pipeline.common import cli
from pipeline.common.paths import FINAL
from pipeline.common.settings import Evaluate
from pipeline.inference.lines import BATCH_TOKENS, LineTranslator
from pipeline.inference.trained_model import load_trained
from pipeline.inference.translate import Translation

MAX_EXTRA = 50
"""Tokens that an output may have more than its source, as in section 6.1 of the paper."""
CHUNK_LINES, CHUNK_BYTES = 1_000, 1 << 20
"""What is translated together at most; as many lines wait meanwhile."""
LONGEST_LINE = 1 << 16
"""Bytes of a line; the rest of a longer one is left out."""


@dataclass(frozen=True)
class Line:
    """A line of the input: where it is, its text, how many bytes it has."""

    place: str
    text: str
    size: int


def main() -> None:
    parser = cli.parser("pipeline.translate", __doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help="UTF-8; none, or -: standard input")
    parser.add_argument("--model", type=Path, default=FINAL, metavar="FOLDER", help=f"a trained model ({FINAL})")
    parser.add_argument("--beam", type=int, default=4, help="1 is greedy search (4)")
    parser.add_argument("--alpha", type=float, default=0.6, help="length penalty ((5 + |Y|) / 6)^alpha (0.6)")
    parser.add_argument("--nbest", type=int, default=1, metavar="N", help="the N best translations, up to --beam (1)")
    parser.add_argument("--scores", action="store_true", help="each translation with its score")
    parser.add_argument("--format", choices=("text", "tsv", "jsonl"), default="text", help="of the output (text)")
    parser.add_argument(
        "--engine",
        choices=("torch", "ctranslate2", "ctranslate2-int8"),
        default="torch",
        help="ctranslate2: on CPUs, faster, nearly always the same; ctranslate2-int8: faster still, rounded (torch)",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with cli.exit_on_error("translate"):
        translate(arguments)


def translate(arguments: argparse.Namespace) -> None:
    """The command. Raises ValueError and OSError with one line."""
    settings = _settings(arguments)
    names = arguments.files or ["-"]
    for name in names:
        if name != "-" and (Path(name).is_dir() or not os.access(name, os.R_OK)):
            raise ValueError(f"{name} is no file that can be read")
    model, tokenizer = load_trained(arguments.model)
    if torch.cuda.is_available() and arguments.engine == "torch":
        model = model.cuda()
    translator = LineTranslator(model, tokenizer, settings, arguments.nbest)
    write = _Writer(sys.stdout.buffer, arguments.format, arguments.nbest, arguments.scores)
    for chunk in _chunks(_ahead(_lines(names))):

        def say(index: int, fate: str, chunk: list[Line] = chunk) -> None:
            print(f"translate: {chunk[index].place} {fate}", file=sys.stderr, flush=True)

        write(chunk, translator([line.text for line in chunk], say))


def _settings(arguments: argparse.Namespace) -> Evaluate:
    search = {name: getattr(arguments, name) for name in ("beam", "alpha", "engine")}
    try:
        settings = Evaluate(**search, max_extra=MAX_EXTRA, batch_tokens=BATCH_TOKENS, num_samples=0)
    except ValueError as error:
        raise ValueError(str(error).replace("evaluate.", "--")) from None
    if not 1 <= arguments.nbest <= settings.beam:
        raise ValueError(f"--nbest must be in [1, --beam ({settings.beam})], got {arguments.nbest}")
    return settings


def _lines(names: Sequence[str]) -> Iterator[Line]:
    """The lines of all inputs. Raises ValueError with file and line where bytes are not UTF-8."""
    for name in names:
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as file:
            shown, number = "standard input" if name == "-" else name, 0
            while raw := file.readline(LONGEST_LINE + 1):
                number += 1
                yield _line(f"{shown} line {number:,}", raw, file)


def _line(place: str, raw: bytes, file: BinaryIO) -> Line:
    whole = len(raw) <= LONGEST_LINE or raw.endswith(b"\n")
    if not whole:
        print(f"translate: {place} has more than {LONGEST_LINE:,} bytes: the rest is left out", file=sys.stderr)
        while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
            pass
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=whole)  # without half of a character
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}, byte {error.start + 1:,} (0x{raw[error.start]:02x}) is not UTF-8: convert the text, or "
            "correct the line"
        ) from None
    return Line(place, text.removesuffix("\n").removesuffix("\r"), len(raw))


def _ahead(lines: Iterator[Line]) -> Iterator[Line | None]:
    """The same, read by a thread while others are translated; None where the next is not there yet, so that who
    writes a line and waits for its translation gets it."""
    waiting: queue.Queue[Line | Exception | None] = queue.Queue(CHUNK_LINES)

    def read() -> None:
        try:
            for line in lines:
                waiting.put(line)
            waiting.put(None)
        except Exception as error:
            waiting.put(error)

    threading.Thread(target=read, name="reads", daemon=True).start()
    while True:
        try:
            found = waiting.get_nowait()
        except queue.Empty:
            yield None
            found = waiting.get()
        if found is None:
            return
        if isinstance(found, Exception):
            yield None  # first what came before it
            raise found
        yield found


def _chunks(lines: Iterator[Line | None]) -> Iterator[list[Line]]:
    chunk: list[Line] = []
    size = 0
    for line in lines:
        if line is not None:
            chunk.append(line)
            size += line.size
        if chunk and (line is None or len(chunk) == CHUNK_LINES or size > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Writer:
    """Writes the translations of lines to `file`, in UTF-8 whatever the locale."""

    def __init__(self, file: BinaryIO, form: str, num_best: int, scores: bool) -> None:
        self._file, self._form, self._num_best, self._scores = file, form, num_best, scores
        self._number = 0
        if form == "tsv":
            self._write(["\t".join(["source", "translation", *(["score"] if scores else [])])])

    def __call__(self, lines: list[Line], translations: list[list[Translation]]) -> None:
        for line, found in zip(lines, translations, strict=True):
            self._number += 1
            self._write(self._rows(line.text, found))
        self._file.flush()

    def _rows(self, source: str, found: list[Translation]) -> list[str]:
        if self._form == "jsonl":
            shown = [{"text": best.text} | ({"score": best.score} if self._scores else {}) for best in found]
            return [json.dumps({"line": self._number, "source": source, "translations": shown}, ensure_ascii=False)]
        rows = [[best.text, *([f"{best.score:.4f}"] if self._scores else [])] for best in found]
        if self._form == "tsv":
            nothing = [["", *([""] if self._scores else [])]]
            return ["\t".join((" ".join(source.split()), *row)) for row in rows or nothing]
        return ["\t".join(row) for row in rows] + [""] * (self._num_best - len(rows))

    def _write(self, rows: list[str]) -> None:
        self._file.write("".join(f"{row}\n" for row in rows).encode())


if __name__ == "__main__":
    main()
