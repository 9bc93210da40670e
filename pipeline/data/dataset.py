"""The encoded corpus on disk, and its tokenizer.

The source and the target of every split have two arrays each: the concatenated tokens of all sentences, and the
offset of each sentence. The arrays are memory-mapped. Opening a split reads them once to verify their checksums.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from model.config import BOS, EOS, PAD, UNK
from pipeline.common.checksums import verify

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


Side = Literal["src", "tgt"]
SPLITS = ("train", "valid", "test")
SIDES: tuple[Side, ...] = ("src", "tgt")
TOKENIZER_FILE = "spm.model"


@dataclass(frozen=True, kw_only=True)
class CorpusInfo:
    """Metadata of the encoded corpus (meta.json)."""

    src: str  # language codes
    tgt: str
    vocab_size: int
    pairs: dict[str, int]  # by split
    words: dict[str, dict[Side, int]]  # separated by white space; by split, src and tgt
    texts: dict[str, str]  # SHA-256 of each text by name: "train.en", ...
    sha256: str  # of the tokenizer and all texts

    @classmethod
    def open(cls, folder: Path) -> "CorpusInfo":
        """Read `folder`/meta.json. Raises ValueError if it is missing or damaged."""
        path = folder / "meta.json"
        verify(folder, [path.name], "tokenize")
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): run the tokenize stage again") from None


@dataclass(frozen=True)
class EncodedText:
    """The source or target sentences of a split. `text[i]` is sentence i, without BOS and EOS.

    `tokens` is the concatenation of all sentences (uint16, or uint32 for a large vocabulary). Sentence i is
    tokens[offsets[i] : offsets[i + 1]].
    """

    tokens: np.ndarray
    offsets: np.ndarray  # [sentences + 1], int64

    @classmethod
    def open(cls, folder: Path, split: str, side: Side) -> "EncodedText":
        """Memory-map the files read-only. Their checksums are verified by `EncodedSplit.open`.

        Raises ValueError that names a file that is missing or has another format.
        """
        tokens_path, offsets_path = encoded_paths(folder, split, side)
        tokens, offsets = _map(tokens_path), _map(offsets_path)
        if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
            raise ValueError(
                f"{tokens_path} must be a 1-D array of uint16 or uint32, got {tokens.dtype} {tokens.shape}"
            )
        if offsets.ndim != 1 or offsets.dtype != np.int64 or not len(offsets):
            raise ValueError(f"{offsets_path} must be a 1-D array of int64, got {offsets.dtype} {offsets.shape}")
        if offsets[0] != 0 or offsets[-1] != len(tokens):
            raise ValueError(
                f"{offsets_path} ends at token {offsets[-1]}, but {tokens_path.name} has {len(tokens)} tokens: "
                "run the tokenize stage again"
            )
        text = cls(tokens, offsets)
        if (text.lengths < 0).any():
            raise ValueError(f"{offsets_path} must not decrease: run the tokenize stage again")
        return text

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"sentence {index} is not in [0, {len(self)})")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The concatenated tokens of these sentences, and the length of each."""
        starts = self.offsets[indices]
        lengths = self.offsets[indices + 1] - starts
        ends = np.cumsum(lengths)
        return self.tokens[np.arange(lengths.sum()) + np.repeat(starts - ends + lengths, lengths)], lengths

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each sentence, [sentences], int64, without EOS."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class EncodedSplit:
    """The sentence pairs of a split: target sentence i is the translation of source sentence i."""

    src: EncodedText
    tgt: EncodedText

    @classmethod
    def open(cls, folder: Path, split: str) -> "EncodedSplit":
        """Open and verify a split. Raises ValueError if a file is missing or damaged, a token id is not in the
        vocabulary, or the numbers of source and target sentences differ."""
        verify(folder, [path.name for side in SIDES for path in encoded_paths(folder, split, side)], "tokenize")
        src, tgt = (EncodedText.open(folder, split, side) for side in SIDES)
        vocab_size = CorpusInfo.open(folder).vocab_size
        for side, text in zip(SIDES, (src, tgt), strict=True):
            if (largest := int(text.tokens.max(initial=0))) >= vocab_size:
                path, _ = encoded_paths(folder, split, side)
                raise ValueError(
                    f"{path} has token id {largest}, but the vocabulary in meta.json has {vocab_size} tokens: "
                    "run the tokenize stage again"
                )
        if len(src) != len(tgt):
            raise ValueError(
                f"{folder}: {split} has {len(src)} source but {len(tgt)} target sentences: "
                "run the tokenize stage again"
            )
        return cls(src, tgt)

    def __len__(self) -> int:
        return len(self.src)


def encoded_paths(folder: Path, split: str, side: Side) -> tuple[Path, Path]:
    """The paths of the token array and the offset array."""
    return folder / f"{split}.{side}.ids.npy", folder / f"{split}.{side}.offsets.npy"


def _map(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the tokenize stage first") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): run the tokenize stage again") from None


def load_tokenizer(folder: Path, stage: str = "tokenize") -> "SentencePieceProcessor":
    """Verify and load the joint byte-pair encoding (section 5.1) in `folder`/spm.model, written by `stage`.

    Raises ValueError if the file is missing or damaged, or its reserved tokens are not those of model.config.
    """
    from sentencepiece import SentencePieceProcessor  # imported here: training needs only torch and numpy

    path = folder / TOKENIZER_FILE
    verify(folder, [path.name], stage)
    tokenizer = SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError:
        raise ValueError(f"{path} is not a SentencePiece model: run the {stage} stage again") from None
    reserved = (tokenizer.pad_id(), tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id())
    if reserved != (PAD, UNK, BOS, EOS):
        raise ValueError(
            f"{path} must have {(PAD, UNK, BOS, EOS)} as the ids of padding, unknown, begin and end, got {reserved}"
        )
    return tokenizer
