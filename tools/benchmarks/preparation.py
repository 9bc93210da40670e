"""Data stages: encoding by the stage encode and by SentencePiece alone, decoding of its tokens, and the batch plan of
4.5 million pairs."""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline.common.paths import CLEAN, TOKENIZER
from pipeline.data.batching import BatchPlan, Position
from pipeline.data.dataset import SPLITS, EncodedSplit, load_tokenizer
from pipeline.encode import encode_corpus
from tools.benchmarks.harness import sentence_lengths, serve

PAIRS = 4_500_000  # WMT 2014 English-German
CHUNK = 20_000  # lines


def encode(data: Path) -> Callable[[], dict[str, float]]:
    """The stage encode."""
    num_pairs = len(EncodedSplit.open(data / "encoded", "train"))

    def block() -> dict[str, float]:
        with TemporaryDirectory(dir=data) as folder:
            return _rates(
                num_pairs,
                lambda: encode_corpus(data / CLEAN.name, data / TOKENIZER.name, Path(folder) / "encoded", "en", "de"),
            )

    return block


def sentencepiece(data: Path) -> Callable[[], dict[str, float]]:
    """SentencePiece alone: reads lines, makes tokens, keeps nothing."""
    tokenizer = load_tokenizer(data / TOKENIZER.name)
    num_pairs = len(EncodedSplit.open(data / "encoded", "train"))

    def work() -> None:
        for path in sorted((data / CLEAN.name).glob("*.??")):
            lines = path.read_text(encoding="utf-8").splitlines()
            for start in range(0, len(lines), CHUNK):
                tokenizer.encode(lines[start : start + CHUNK])

    return lambda: _rates(num_pairs, work)


def decode(data: Path) -> Callable[[], dict[str, float]]:
    """Decode all tokens, as encode does to compare them with the text. The time to read them is left out."""
    tokenizer = load_tokenizer(data / TOKENIZER.name)
    splits = [EncodedSplit.open(data / "encoded", split) for split in SPLITS]

    def block() -> dict[str, float]:
        rates = []
        for split in splits:
            for text in (split.src, split.tgt):
                for start in range(0, len(text), CHUNK):
                    tokens: Any = [text[i].astype(np.int32) for i in range(start, min(start + CHUNK, len(text)))]
                    rates.append(_rates(len(tokens), partial(tokenizer.decode, tokens)))
        return {key: sum(rate[key] for rate in rates) for key in ("seconds", "cores_s")}

    return block


def plan() -> dict[str, float]:
    """Seconds to plan the batches once, to plan an epoch, and to the first batch of a run resumed within an epoch."""
    src, tgt = sentence_lengths(PAIRS)
    sizes = {"batch_tokens": 25_000, "micro_batch_tokens": 25_000, "max_length": 1024, "seed": 1}
    started = time.perf_counter()
    made = BatchPlan(src, tgt, **sizes)
    plan_s = time.perf_counter() - started
    started = time.perf_counter()
    made.steps(1)
    epoch_s = time.perf_counter() - started
    started = time.perf_counter()
    next(BatchPlan(src, tgt, **sizes).from_position(Position(7, made.num_steps // 2)))
    return {"plan_s": plan_s, "epoch_s": epoch_s, "resume_s": time.perf_counter() - started}


def _rates(num_pairs: int, work: Callable[[], object]) -> dict[str, float]:
    """Time `work`. `cores_s` is its processor time in seconds, over all cores."""
    started, cores_started = time.perf_counter(), time.process_time()
    work()
    seconds, cores_s = time.perf_counter() - started, time.process_time() - cores_started
    return {"seconds": seconds, "pairs_per_s": num_pairs / seconds, "cores_s": cores_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=["encode", "sentencepiece", "decode", "plan"])
    parser.add_argument("--data", type=Path, help="data/ with the encoded corpus; all but plan need it")
    arguments = parser.parse_args()
    if arguments.system == "plan":
        serve(plan, warm_up=False)
    else:
        serve({"encode": encode, "sentencepiece": sentencepiece, "decode": decode}[arguments.system](arguments.data))


if __name__ == "__main__":
    main()
