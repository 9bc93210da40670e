"""Learn one byte-pair encoding of both languages: first half of stage tokenize.

    python -m pipeline.train_tokenizer

The encoding is shared by source and target, as in section 5.1 of the paper.

Reads data/clean/train.*. Writes data/tokenizer/spm.model, a model of
SentencePiece, and data/tokenizer/spm.vocab, its list of tokens.
"""

import io
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from sentencepiece import SentencePieceNormalizer, SentencePieceProcessor, SentencePieceTrainer
from tqdm import tqdm

from model.config import BOS, EOS, PAD, UNK
from pipeline.common import cli
from pipeline.common.atomic_io import replace_folder
from pipeline.common.checksums import write_sums
from pipeline.common.paths import CLEAN, TOKENIZER
from pipeline.common.settings import load_settings

MAX_PAIRS = 1_000_000
"""The largest number of pairs to learn from: more do not improve the encoding, and memory stops growing."""
MAX_LINE_BYTES = 1 << 16
"""Longer lines are left out. SentencePiece's default is 4,192, which a page without line breaks exceeds."""


def train_tokenizer(src: Path, tgt: Path, folder: Path, vocab_size: int, lowercase: bool = False) -> None:
    """Learn `vocab_size` tokens from the lines of both files; write `folder`/spm.model and spm.vocab.

    The tokenizer normalises text by NFKC and, with `lowercase`, lower-cases it.

    `vocab_size` includes the reserved tokens and 256 byte tokens. The byte tokens spell characters that are not in
    the vocabulary, so every text can be encoded and decoded. If there are more than MAX_PAIRS pairs, MAX_PAIRS of
    them are taken at even distances. Lines of more than MAX_LINE_BYTES are left out. Equal texts give equal files.

    Raises ValueError if a file is missing, if both are empty, if they have different numbers of lines, or if
    vocab_size is too small or too large for the text (the message has the limit).
    """
    num_pairs, num_tgt = _count_lines(src), _count_lines(tgt)
    if num_pairs != num_tgt:
        raise ValueError(f"{src} has {num_pairs} lines and {tgt} {num_tgt}: they must have the same number")
    if num_pairs == 0:
        raise ValueError(f"{src} is empty: there is no text to learn an encoding from")
    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sentences(src, tgt, num_pairs),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            normalizer=_lowercase() if lowercase else SentencePieceNormalizer(rule_name="nfkc"),
            character_coverage=0.9999,  # the rarest characters are spelled by byte tokens
            byte_fallback=True,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=1,  # more are hardly faster, and spm.model would depend on their number
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from None
    model = written.getvalue()
    tokenizer = SentencePieceProcessor(model_proto=model)
    with replace_folder(folder) as partial:
        (partial / "spm.model").write_bytes(model)
        with open(partial / "spm.vocab", "w", encoding="utf-8", newline="\n") as file:
            for token in range(vocab_size):
                file.write(f"{tokenizer.id_to_piece(token)}\t{tokenizer.get_score(token):g}\n")
        write_sums(partial, ["spm.model", "spm.vocab"])


def _sentences(src: Path, tgt: Path, num_pairs: int) -> Iterator[str]:
    num_taken, num_long = min(num_pairs, MAX_PAIRS), 0
    with open(src, encoding="utf-8", newline="\n") as src_file, open(tgt, encoding="utf-8", newline="\n") as tgt_file:
        pairs = tqdm(zip(src_file, tgt_file, strict=True), "reading", num_pairs, unit=" pairs", unit_scale=True)
        for index, pair in enumerate(pairs):
            if (index + 1) * num_taken // num_pairs > index * num_taken // num_pairs:
                for line in (line.removesuffix("\n") for line in pair):
                    if len(line) * 4 > MAX_LINE_BYTES and len(line.encode()) > MAX_LINE_BYTES:
                        num_long += 1
                    else:
                        yield line
    if num_long:
        print(f"{num_long} lines of more than {MAX_LINE_BYTES:,} bytes are left out", file=sys.stderr)
    print("learning the encoding ...", file=sys.stderr)


def _lowercase() -> SentencePieceNormalizer:
    """NFKC and lower case. SentencePiece's own nmt_nfkc_cf folds case instead, which turns the German ß into ss."""
    rules = {chr(code): chr(code).lower() for code in range(1, sys.maxunicode + 1)}
    rules |= {spelling: normal.lower() for spelling, normal in SentencePieceNormalizer(rule_name="nfkc").decompile()}
    changes = {a: unicodedata.normalize("NFKC", b) for a, b in rules.items()}
    return SentencePieceNormalizer(norm_map=[(a, b) for a, b in changes.items() if a != b])


def _count_lines(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the validate stage first") from None


def _explain(message: str, vocab_size: int) -> str:
    """Turn SentencePiece's errors about the vocabulary size, which have no type of their own, into our message; quote
    any other error."""
    if too_large := re.search(r"value <= (\d+)", message):
        return (
            f"tokenize.vocab_size must be at most {too_large[1]} for this training text, got {vocab_size}: "
            "for a small corpus, take 500 to 5,000 (docs/pipeline.md)"
        )
    if too_small := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"tokenize.vocab_size must be at least {too_small[1]} for this training text: its characters, 256 bytes "
            f"and the reserved tokens; got {vocab_size}"
        )
    return f"SentencePiece cannot learn from the training text: {message}"


def main() -> None:
    cli.parser("pipeline.train_tokenizer", __doc__).parse_args()
    with cli.exit_on_error("tokenize"):
        settings = load_settings()
        src, tgt = (CLEAN / f"train.{code}" for code in (settings.data.src, settings.data.tgt))
        size, lowercase = settings.tokenize.vocab_size, settings.tokenize.lowercase
        cli.interruptible(lambda: train_tokenizer(src, tgt, TOKENIZER, size, lowercase))


if __name__ == "__main__":
    main()
