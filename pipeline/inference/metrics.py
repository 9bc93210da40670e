"""How good translations are: two kinds of BLEU that must not be mixed, chrF, lengths.

sacreBLEU (detokenised text, its own tokenisation) is the number to compare across papers. The paper's BLEU and that
of the Multi30k papers are counted on Moses tokens: for the same output they differ from sacreBLEU, mostly upwards,
and compare with those papers alone.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import sacrebleu
import sacremoses
from sacrebleu.metrics import BLEU, CHRF
from sacremoses.corpus import NonbreakingPrefixes

from pipeline.common.languages import WORD_CHARACTERS, language_of, num_words

TOKENIZERS = dict.fromkeys((*WORD_CHARACTERS, "ko"), "char") | dict.fromkeys(("zh", "yue", "wuu", "lzh"), "zh")
"""sacreBLEU's tokenizers for languages that its 13a makes a single token of a sentence of. For Japanese and Korean
its own choice is MeCab, of packages that this project does without; by characters a score is the same everywhere."""
_COMPOUND = re.compile(rb"(\S)-(\S)")
BUCKET_WORDS = 5
"""Source words that a group of `bleu_by_length` spans."""


@dataclass(frozen=True)
class Score:
    """A corpus score, 0 to 100, and the conditions under which another may be compared with it."""

    value: float
    signature: str


def bleu_tokenizer(language: str) -> str:
    """sacreBLEU's tokenizer for text in this language."""
    return TOKENIZERS.get(language_of(language), BLEU.TOKENIZER_DEFAULT)


def moses_knows(language: str) -> bool:
    """Whether Moses' tokenizer has rules for it. Of Chinese it has, but leaves words together."""
    return language_of(language) not in WORD_CHARACTERS and language in NonbreakingPrefixes().available_langs


def sacre_bleu(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Score:
    """BLEU of detokenised text: mixed case, the language's `bleu_tokenizer`, else sacreBLEU's defaults."""
    _check_lengths(hypotheses, references)
    metric = BLEU(tokenize=bleu_tokenizer(language))
    value = metric.corpus_score(hypotheses, [references]).score
    return Score(value, str(metric.get_signature()))


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """chrF2: F-score of character n-grams, sacreBLEU's defaults."""
    _check_lengths(hypotheses, references)
    metric = CHRF()
    value = metric.corpus_score(hypotheses, [references]).score
    return Score(value, str(metric.get_signature()))


def paper_bleu(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Score:
    """BLEU as the paper counts it (Table 2): Moses tokens, mixed case, German compounds split."""
    outputs, expected = moses_tokens(hypotheses, language), moses_tokens(references, language)
    compounds = "whole"
    if language == "de":
        outputs, expected = list(map(split_compounds, outputs)), list(map(split_compounds, expected))
        compounds = "split"
    return Score(_token_bleu(outputs, expected), _token_signature(language, "mixed", compounds))


def lowercase_bleu(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Score:
    """BLEU as papers on Multi30k count it: Moses tokens, lower-cased, compounds whole."""
    outputs = [line.lower() for line in moses_tokens(hypotheses, language)]
    expected = [line.lower() for line in moses_tokens(references, language)]
    return Score(_token_bleu(outputs, expected), _token_signature(language, "lc", compounds="whole"))


def length_ratio(hypotheses: Sequence[str], references: Sequence[str], language: str) -> float:
    """Tokens of all hypotheses per token of the references, as the brevity penalty of `sacre_bleu` counts them."""
    _check_lengths(hypotheses, references)
    return BLEU(tokenize=bleu_tokenizer(language)).corpus_score(hypotheses, [references]).ratio


def bleu_by_length(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], src: str, tgt: str
) -> list[dict[str, float]]:
    """sacreBLEU of the sentences whose source has 1 to 5 words, 6 to 10, and so on; empty groups are left out. `src`
    and `tgt` are the languages.

    Rows of `source_words` (the most in the group), `num_sentences` and `bleu`.
    """
    _check_lengths(hypotheses, references)
    groups: dict[int, list[tuple[str, str]]] = {}
    for source, hypothesis, reference in zip(sources, hypotheses, references, strict=True):
        most = max(1, math.ceil(num_words(source, src) / BUCKET_WORDS)) * BUCKET_WORDS
        groups.setdefault(most, []).append((hypothesis, reference))
    return [
        {
            "source_words": most,
            "num_sentences": len(groups[most]),
            "bleu": sacre_bleu([pair[0] for pair in groups[most]], [pair[1] for pair in groups[most]], tgt).value,
        }
        for most in sorted(groups)
    ]


def moses_tokens(lines: Sequence[str], language: str) -> list[str]:
    """What Moses' tokenizer.perl -l `language` makes of each line: tokens between spaces, special characters
    escaped (in outputs and references alike, so that no score changes). A language that Moses does not know is
    treated as English."""
    tokenizer = sacremoses.MosesTokenizer(language)
    return [tokenizer.tokenize(line, return_str=True) for line in lines]


def split_compounds(tokens: str) -> str:
    """A hyphen between two other characters becomes a token of its own: rich-text -> rich ##AT##-##AT## text.

    Equal to the published recipe, perl -ple 's{(\\S)-(\\S)}{$1 ##AT##-##AT## $2}g': matches do not overlap, so
    a-b-c keeps its second hyphen, and perl's characters are the bytes of UTF-8, so ä-ö-ü does not.
    """
    return _COMPOUND.sub(rb"\1 ##AT##-##AT## \2", tokens.encode()).decode()


def _token_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of lines that are tokenised already, not smoothed, as Moses' multi-bleu.perl."""
    _check_lengths(hypotheses, references)
    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    return metric.corpus_score(hypotheses, [references]).score


def _token_signature(language: str, case: str, compounds: str) -> str:
    return (
        f"nrefs:1|case:{case}|tok:moses-{language}|compounds:{compounds}|smooth:none"
        f"|sacremoses:{sacremoses.__version__}|sacrebleu:{sacrebleu.__version__}"
    )


def _check_lengths(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(
            f"{len(hypotheses)} translations and {len(references)} references: as many, and at least one, are needed"
        )
