"""Translate text with a trained model, one sentence per line.

    python -m pipeline.translate sentences.en > sentences.de
    python -m pipeline.translate --nbest 3 --scores --format tsv sentences.en
    echo "A man is singing." | python -m pipeline.translate

Reads files or standard input, and the model's folder, which the train stage has
written; it needs no other file of the project. Writes to standard output, one
line for each line of input, in the same order, as soon as it is translated. An
empty line stays empty. A line with more tokens than the model takes
(model.max_length) is split at the ends of its sentences, and a sentence that is
still too long is cut; standard error has the number of each such line.

Formats of the output:

text    The translation; with --scores, also a tab and its score. With --nbest
        N, N lines for each line of input, empty if the search found fewer.
tsv     A heading, then a line for each translation: the source, the translation
        and, with --scores, the score.
jsonl   An object for each line of input:
        {"line": 1, "source": "...", "translations": [{"text": "..."}]}
        With --scores, each translation has a "score" too.

A score is the log-probability (in nats) divided by the length penalty. If a
line was split, it is the sum of the scores of its parts.
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
"""An output has at most this many tokens more than its source, as in section 6.1 of the paper."""
CHUNK_LINES, CHUNK_BYTES = 1_000, 1 << 20
"""The most that is translated together. Up to CHUNK_LINES further lines are read meanwhile."""
LONGEST_LINE = 1 << 16
"""The most bytes of a line that are read; the rest of a longer line is left out."""


@dataclass(frozen=True)
class Line:
    """A line of the input: its place (file and line number), its text, its number of bytes."""

    place: str
    text: str
    size: int


def main() -> None:
    parser = cli.parser("pipeline.translate", __doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help="text in UTF-8; none, or -: standard input")
    parser.add_argument(
        "--model", type=Path, default=FINAL, metavar="FOLDER", help="the trained model (default: %(default)s)"
    )
    parser.add_argument("--beam", type=int, default=4, help="beam size; 1 is greedy search (default: %(default)s)")
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.6,
        help="exponent of the length penalty ((5 + |Y|) / 6)^alpha (default: %(default)s)",
    )
    parser.add_argument(
        "--nbest", type=int, default=1, metavar="N", help="the N best translations, N <= beam (default: %(default)s)"
    )
    parser.add_argument("--scores", action="store_true", help="print the score of each translation")
    parser.add_argument(
        "--format", choices=("text", "tsv", "jsonl"), default="text", help="see above (default: %(default)s)"
    )
    parser.add_argument(
        "--engine",
        choices=("torch", "ctranslate2", "ctranslate2-int8"),
        default="torch",
        help="ctranslate2 runs on CPUs, is faster and gives nearly always the same; ctranslate2-int8 is faster "
        "still, with weights rounded to 8 bits (default: %(default)s)",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with cli.exit_on_error("translate"):
        translate(arguments)


def translate(arguments: argparse.Namespace) -> None:
    """Run the command. Raises ValueError or OSError with a one-line message."""
    settings = _settings(arguments)
    names = arguments.files or ["-"]
    for name in names:
        if name != "-" and (Path(name).is_dir() or not os.access(name, os.R_OK)):
            raise ValueError(f"{name} is not a readable file")
    model, tokenizer = load_trained(arguments.model)
    if torch.cuda.is_available() and arguments.engine == "torch":
        model = model.cuda()
    translator = LineTranslator(model, tokenizer, settings, arguments.nbest)
    write = _Writer(sys.stdout.buffer, arguments.format, arguments.nbest, arguments.scores)
    for chunk in _chunks(_ahead(_lines(names))):

        def log(index: int, message: str, chunk: list[Line] = chunk) -> None:
            print(f"translate: {chunk[index].place} {message}", file=sys.stderr, flush=True)

        write(chunk, translator([line.text for line in chunk], log))


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
    """Yield the lines of all inputs. Raises ValueError with file, line and byte if a line is not UTF-8."""
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
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=whole)  # drops a character cut in half
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}, byte {error.start + 1:,} (0x{raw[error.start]:02x}) is not UTF-8: convert the text, or "
            "correct the line"
        ) from None
    return Line(place, text.removesuffix("\n").removesuffix("\r"), len(raw))


def _ahead(lines: Iterator[Line]) -> Iterator[Line | None]:
    """Yield the same lines, which a thread reads ahead, and None whenever no further line has arrived yet. After a
    None the lines so far are translated, so that a program that waits for each translation gets it."""
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
            yield None  # translate the lines before the error first
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
