"""The sentence pairs of a split, as tokens to translate and as text to score."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.common.atomic_io import sha256_of
from pipeline.common.paths import CLEAN, ENCODED
from pipeline.data.dataset import CorpusInfo, EncodedSplit


@dataclass(frozen=True)
class Split:
    """A split of the corpus: its sentence pairs as tokens and as text. `src` and `tgt` are the languages."""

    name: str
    src: str
    tgt: str
    tokens: EncodedSplit
    sources: list[str]
    references: list[str]


def read_split(name: str, src: str, tgt: str, root: Path = Path()) -> Split:
    """Read a split from `root`/data. Raises ValueError if the tokens were not made from these texts."""
    tokens, info = EncodedSplit.open(root / ENCODED, name), CorpusInfo.open(root / ENCODED)
    texts = []
    for code in (src, tgt):
        path = root / CLEAN / f"{name}.{code}"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: run the validate stage first")
        if sha256_of(path) != info.texts.get(path.name):
            raise ValueError(
                f"{path} is not the text that {root / ENCODED} was made from: it is damaged or was changed; run the "
                "stages up to tokenize again (dvc repro --force tokenize)"
            )
        texts.append(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    return Split(name, src, tgt, tokens, *texts)
