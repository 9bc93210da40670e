"""Sentence pairs as tokens and as text: what is translated and scored."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.common.paths import CLEAN, ENCODED
from pipeline.data.dataset import EncodedSplit


@dataclass(frozen=True)
class Split:
    """Sentence pairs as tokens and as text."""

    name: str
    tokens: EncodedSplit
    sources: list[str]
    references: list[str]


def read_split(name: str, src: str, tgt: str, root: Path = Path()) -> Split:
    """Raises ValueError if text and tokens do not belong together."""
    tokens = EncodedSplit.open(root / ENCODED, name)
    texts = []
    for code in (src, tgt):
        path = root / CLEAN / f"{name}.{code}"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: run the validate stage first")
        texts.append(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
        if len(texts[-1]) != len(tokens):
            raise ValueError(
                f"{path} has {len(texts[-1])} lines, {root / ENCODED} {len(tokens)} sentences: "
                "run the tokenize stage again"
            )
    return Split(name, tokens, *texts)
