"""The encoded corpus on disk, and its tokenizer.

The source and the target of every split are two arrays each: the tokens of all sentences end to end, and where each
sentence begins. Both are memory-mapped; to open them they are read once, for their checksums.
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
    """What training has to know of the encoded corpus besides its tokens."""

    src: str  # language codes
    tgt: str
    vocab_size: int
    pairs: dict[str, int]  # by split
    words: dict[str, dict[Side, int]]  # by split, of src and tgt, as white space separates them
    texts: dict[str, str]  # SHA-256 by name, "train.en" and so on
    sha256: str  # of the tokenizer and of all texts

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
    """The source or target sentences of a split; `text[i]` is sentence i, without begin and end of sentence.

    `tokens` holds all sentences end to end (uint16, or uint32 for a vocabulary that needs it);
    sentence i is tokens[offsets[i] : offsets[i + 1]].
    """

    tokens: np.ndarray
    offsets: np.ndarray  # int64, one more than sentences

    @classmethod
    def open(cls, folder: Path, split: str, side: Side) -> "EncodedText":
        """Map the files read-only. Raises ValueError that names a file that is missing or not ours. Their checksums
        are verified by `EncodedSplit.open`."""
        tokens_path, offsets_path = encoded_paths(folder, split, side)
        tokens, offsets = _map(tokens_path), _map(offsets_path)
        if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
            raise ValueError(
                f"{tokens_path} holds {tokens.dtype} {tokens.shape}: a row of uint16 or uint32 is needed"
            )
        if offsets.ndim != 1 or offsets.dtype != np.int64 or not len(offsets):
            raise ValueError(f"{offsets_path} holds {offsets.dtype} {offsets.shape}: a row of int64 is needed")
        if offsets[0] != 0 or offsets[-1] != len(tokens):
            raise ValueError(
                f"{offsets_path} ends at token {offsets[-1]}, {tokens_path.name} has {len(tokens)}: "
                "they do not belong together; run the tokenize stage again"
            )
        text = cls(tokens, offsets)
        if (text.lengths < 0).any():
            raise ValueError(f"{offsets_path} has an offset below the one before it: run the tokenize stage again")
        return text

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"sentence {index}: there are {len(self)}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of these sentences end to end, and the length of each."""
        starts = self.offsets[indices]
        lengths = self.offsets[indices + 1] - starts
        ends = np.cumsum(lengths)
        return self.tokens[np.arange(lengths.sum()) + np.repeat(starts - ends + lengths, lengths)], lengths

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sentence, int64, end of sentence not counted."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class EncodedSplit:
    """Sentence pairs: source sentence i and target sentence i mean the same."""

    src: EncodedText
    tgt: EncodedText

    @classmethod
    def open(cls, folder: Path, split: str) -> "EncodedSplit":
        """Raises ValueError if a file is missing or damaged, a token is not of the vocabulary, or the numbers of
        sources and targets differ."""
        verify(folder, [path.name for side in SIDES for path in encoded_paths(folder, split, side)], "tokenize")
        src, tgt = (EncodedText.open(folder, split, side) for side in SIDES)
        vocab_size = CorpusInfo.open(folder).vocab_size
        for side, text in zip(SIDES, (src, tgt), strict=True):
            if (largest := int(text.tokens.max(initial=0))) >= vocab_size:
                path, _ = encoded_paths(folder, split, side)
                raise ValueError(
                    f"{path} holds token {largest}, meta.json a vocabulary of {vocab_size}: "
                    "run the tokenize stage again"
                )
        if len(src) != len(tgt):
            raise ValueError(
                f"{folder}: {split} has {len(src)} source and {len(tgt)} target sentences; "
                "run the tokenize stage again"
            )
        return cls(src, tgt)

    def __len__(self) -> int:
        return len(self.src)


def encoded_paths(folder: Path, split: str, side: Side) -> tuple[Path, Path]:
    """The files of the tokens and of the offsets."""
    return folder / f"{split}.{side}.ids.npy", folder / f"{split}.{side}.offsets.npy"


def _map(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the tokenize stage first") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): run the tokenize stage again") from None


def load_tokenizer(folder: Path, stage: str = "tokenize") -> "SentencePieceProcessor":
    """The joint byte-pair encoding in `folder`/spm.model (section 5.1), which `stage` has written, verified.

    Raises ValueError if there is none, it is damaged, or its reserved tokens are not those of model.config.
    """
    from sentencepiece import SentencePieceProcessor  # here, so that training needs torch and numpy alone

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
            f"{path} numbers padding, unknown, begin and end {reserved}: {(PAD, UNK, BOS, EOS)} is needed"
        )
    return tokenizer
