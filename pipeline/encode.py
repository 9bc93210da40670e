"""Encode the corpus as token ids: the second half of the stage tokenize.

    python -m pipeline.encode

Reads data/clean/ and data/tokenizer/. Writes data/encoded/, the token ids that
training maps into memory, and reports/tokenization.json. The memory that it
needs does not grow with the corpus.
"""

import hashlib
import sys
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from model.config import UNK
from pipeline.common import cli
from pipeline.common.atomic_io import replace_folder, write_json
from pipeline.common.checksums import write_sums
from pipeline.common.languages import num_words
from pipeline.common.paths import CLEAN, ENCODED, REPORTS, TOKENIZER
from pipeline.common.settings import load_settings
from pipeline.data.dataset import SIDES, SPLITS, CorpusInfo, Side, encoded_paths, load_tokenizer

CHUNK = 20_000  # lines


def encode_corpus(clean: Path, tokenizer_folder: Path, encoded: Path, src: str, tgt: str) -> dict[str, Any]:
    """Encode `clean`/{train,valid,test}.{src,tgt} into the folder `encoded`; return the report.

    Every sentence is also decoded. "not_restored" counts the sentences that differ from their text, apart from NFKC,
    extra spaces and, if the tokenizer lower-cases, case. The first of them is printed on stderr.

    Raises ValueError if a file is missing, or if a split has more sentences in one language than in the other.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    digest = hashlib.sha256(tokenizer.serialized_model_proto())
    counts: dict[str, dict[Side, Counter[str]]] = {}
    texts: dict[str, str] = {}
    with replace_folder(encoded) as partial:
        for split in SPLITS:
            counts[split] = {}
            for side, code in zip(SIDES, (src, tgt), strict=True):
                text = clean / f"{split}.{code}"
                of_text = hashlib.sha256()
                digests = (digest, of_text)
                counts[split][side] = _encode_text(text, code, tokenizer, partial, split, side, digests)
                texts[text.name] = of_text.hexdigest()
            num_src, num_tgt = (counts[split][side]["sentences"] for side in SIDES)
            if num_src != num_tgt:
                raise ValueError(f"{clean}: {split} has {num_src} {src} and {num_tgt} {tgt} sentences")
        info = CorpusInfo(
            src=src,
            tgt=tgt,
            vocab_size=tokenizer.get_piece_size(),
            pairs={split: counts[split]["src"]["sentences"] for split in SPLITS},
            words={split: {side: counts[split][side]["words"] for side in SIDES} for split in SPLITS},
            texts=texts,
            sha256=digest.hexdigest(),
        )
        write_json(partial / "meta.json", asdict(info))
        write_sums(partial, sorted(file.name for file in partial.iterdir()))
        num_bytes = sum(file.stat().st_size for file in partial.iterdir())
    train = counts["train"]
    everywhere = [counts[split][side] for split in SPLITS for side in SIDES]
    return {
        "vocab_size": info.vocab_size,
        "pairs": info.pairs,
        "tokens_per_word": {side: train[side]["tokens"] / max(1, train[side]["words"]) for side in SIDES},
        "longest": {side: max(counts[split][side]["longest"] for split in SPLITS) for side in SIDES},
        "byte_tokens": sum(count["byte_tokens"] for count in everywhere),
        "unknown_tokens": sum(count["unknown_tokens"] for count in everywhere),
        "not_restored": sum(count["not_restored"] for count in everywhere),
        "bytes": num_bytes,
    }


def _encode_text(
    path: Path,
    language: str,
    tokenizer: SentencePieceProcessor,
    folder: Path,
    split: str,
    side: Side,
    digests: "tuple[hashlib._Hash, ...]",
) -> "Counter[str]":
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run the validate stage first")
    vocab_size = tokenizer.get_piece_size()
    lowercase = tokenizer.decode(tokenizer.encode("A")) == "a"
    is_byte = np.array([tokenizer.is_byte(token) for token in range(vocab_size)])  # [vocab_size]
    tokens_path, offsets_path = encoded_paths(folder, split, side)
    count: Counter[str] = Counter()
    with (
        open(path, "rb") as file,
        _NpyWriter(tokens_path, np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)) as tokens_file,
        _NpyWriter(offsets_path, np.dtype(np.int64)) as offsets_file,
        tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True) as progress,
    ):
        offsets_file.append(np.zeros(1, np.int64))
        for chunk, sentences, encoded in _encoded(file, tokenizer):
            for index, (text, decoded) in enumerate(zip(sentences, tokenizer.decode(encoded), strict=True)):
                if not _same(text, decoded, lowercase):
                    if not count["not_restored"]:
                        line = count["sentences"] + index + 1
                        tqdm.write(f"{path}, line {line}, is decoded as {decoded!r}", file=sys.stderr)
                    count["not_restored"] += 1
            lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
            tokens = np.concatenate(encoded)
            tokens_file.append(tokens)
            offsets_file.append(count["tokens"] + np.cumsum(lengths))
            count["sentences"] += len(sentences)
            count["words"] += sum(num_words(sentence, language) for sentence in sentences)
            count["tokens"] += len(tokens)
            count["longest"] = max(count["longest"], int(lengths.max()))
            count["byte_tokens"] += int(is_byte[tokens].sum())
            count["unknown_tokens"] += int((tokens == UNK).sum())
            for digest in digests:
                digest.update(chunk)
            progress.update(len(chunk))
    return count


def _encoded(file: BinaryIO, tokenizer: SentencePieceProcessor) -> Iterator[tuple[bytes, list[str], list[Any]]]:
    """Yield for each chunk of CHUNK lines its bytes, its sentences and the tokens of each sentence (int32).

    While the caller uses a chunk, a thread encodes the next one, on all cores.
    """
    waiting: deque[tuple[bytes, list[str], Future]] = deque()
    with ThreadPoolExecutor(max_workers=1) as thread:
        while True:
            while len(waiting) < 2 and (chunk := b"".join(islice(file, CHUNK))):
                sentences = chunk.decode("utf-8").removesuffix("\n").split("\n")
                waiting.append((chunk, sentences, thread.submit(tokenizer.encode, sentences, return_type="numpy")))
            if not waiting:
                return
            chunk, sentences, encoded = waiting.popleft()
            yield chunk, sentences, encoded.result()


def _same(text: str, decoded: str, lowercase: bool) -> bool:
    if text == decoded:
        return True
    if lowercase:
        text = "".join(map(str.lower, text))  # by character: str.lower of a whole word changes its final sigma
    return " ".join(filter(None, unicodedata.normalize("NFKC", text).split(" "))) == decoded


class _NpyWriter:
    """Writes a one-dimensional array to a .npy file, chunk by chunk.

    `np.save` needs the whole array in memory, and `open_memmap` needs its length before the first sentence is
    encoded. NumPy leaves room in the header for a larger length, so the header is written first with length 0, and
    again at the end."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self._length = 0
        self._file = open(path, "xb")  # noqa: SIM115, closed by __exit__

    def __enter__(self) -> "_NpyWriter":
        self._write_header()
        return self

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self.dtype, copy=False).tobytes())
        self._length += len(values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._file.seek(0)
                self._write_header()

    def _write_header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self._length,),
            },
        )


def main() -> None:
    cli.parser("pipeline.encode", __doc__).parse_args()
    with cli.exit_on_error("tokenize"):
        settings = load_settings()
        report = encode_corpus(CLEAN, TOKENIZER, ENCODED, settings.data.src, settings.data.tgt)
        write_json(REPORTS / "tokenization.json", report)


if __name__ == "__main__":
    main()
