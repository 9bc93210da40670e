"""Learn one byte-pair encoding of both languages (section 5.1 of the paper): the first half of the stage tokenize.

    python -m pipeline.train_tokenizer

Reads data/clean/train.*; writes data/tokenizer/spm.model, of SentencePiece, and spm.vocab, its list of tokens.
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
"""The most pairs that are read: more teach the encoding nothing, and memory stops growing here."""
MAX_LINE_BYTES = 1 << 16
"""Longer lines are left out. SentencePiece's own limit is 4,192, which a page without line ends exceeds."""


def train_tokenizer(src: Path, tgt: Path, folder: Path, vocab_size: int, lowercase: bool = False) -> None:
    """Learn `vocab_size` tokens from the lines of both files; write `folder`/spm.model and spm.vocab.

    The encoding itself normalises text by NFKC and, with `lowercase`, lower-cases it.

    `vocab_size` counts all tokens: the reserved ones too, and 256 bytes that spell characters which are none of the
    tokens, so that every text can be encoded and decoded. Of more than MAX_PAIRS pairs, so many are taken at even
    distances, and of these the lines of at most MAX_LINE_BYTES. The same texts give the same bytes.

    Raises ValueError if a file is missing, both are empty or they differ in length; or if vocab_size is too
    small or too large for the text, with the number that would do.
    """
    num_pairs, num_tgt = _count_lines(src), _count_lines(tgt)
    if num_pairs != num_tgt:
        raise ValueError(f"{src} has {num_pairs} lines and {tgt} {num_tgt}: as many are needed")
    if num_pairs == 0:
        raise ValueError(f"{src} is empty: there is nothing to learn an encoding from")
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
            character_coverage=0.9999,  # the rarest characters become bytes instead of tokens
            byte_fallback=True,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=1,  # more are hardly faster, and the model file records their number
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
        print(f"{num_long} lines of more than {MAX_LINE_BYTES:,} bytes teach the encoding nothing", file=sys.stderr)
    print("learning the encoding ...", file=sys.stderr)


def _lowercase() -> SentencePieceNormalizer:
    """NFKC and lower case. SentencePiece's own nmt_nfkc_cf folds case instead, which makes German's ß two letters."""
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
    """Our message for SentencePiece's errors about the vocabulary's size, which have no type of their own; any other
    error as it is."""
    if too_large := re.search(r"value <= (\d+)", message):
        return f"tokenize.vocab_size is {vocab_size}: the training text yields at most {too_large[1]} tokens"
    if too_small := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"tokenize.vocab_size is {vocab_size}: at least {too_small[1]} is needed, "
            "for the text's characters, 256 bytes and the reserved tokens"
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
