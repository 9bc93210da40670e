"""Scores of translations: two kinds of BLEU that must not be mixed, chrF, and the length ratio.

sacreBLEU (detokenised text, its own tokenisation) is the number to compare across papers. The BLEU of the paper and
that of the Multi30k papers are computed on Moses tokens. For the same output they differ from sacreBLEU, and are
mostly higher, so compare them only with those papers.
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
"""sacreBLEU's tokenizers for languages in which its default, 13a, finds one token per sentence. For Japanese and
Korean its own choice is MeCab, which needs further packages; by characters, a score is the same everywhere."""
_COMPOUND = re.compile(rb"(\S)-(\S)")
BUCKET_WORDS = 5
"""The range of source lengths, in words, of a group of `bleu_by_length`."""


@dataclass(frozen=True)
class Score:
    """A corpus score in [0, 100], and its signature: scores are comparable only if their signatures are equal."""

    value: float
    signature: str


def bleu_tokenizer(language: str) -> str:
    """Return the name of sacreBLEU's tokenizer for this language."""
    return TOKENIZERS.get(language_of(language), BLEU.TOKENIZER_DEFAULT)


def moses_knows(language: str) -> bool:
    """Whether Moses' tokenizer has rules for the language. False for Chinese: its rules do not separate words."""
    return language_of(language) not in WORD_CHARACTERS and language in NonbreakingPrefixes().available_langs


def sacre_bleu(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Score:
    """BLEU of detokenised text, mixed case, with the language's `bleu_tokenizer`, else with sacreBLEU's defaults."""
    _check_lengths(hypotheses, references)
    metric = BLEU(tokenize=bleu_tokenizer(language))
    value = metric.corpus_score(hypotheses, [references]).score
    return Score(value, str(metric.get_signature()))


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """chrF2, the F-score of character n-grams, with sacreBLEU's defaults."""
    _check_lengths(hypotheses, references)
    metric = CHRF()
    value = metric.corpus_score(hypotheses, [references]).score
    return Score(value, str(metric.get_signature()))


def paper_bleu(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Score:
    """BLEU as in the paper (Table 2): on Moses tokens, mixed case, with German compounds split."""
    outputs, expected = moses_tokens(hypotheses, language), moses_tokens(references, language)
    compounds = "whole"
    if language == "de":
        outputs, expected = list(map(split_compounds, outputs)), list(map(split_compounds, expected))
        compounds = "split"
    return Score(_token_bleu(outputs, expected), _token_signature(language, "mixed", compounds))


def lowercase_bleu(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Score:
    """BLEU as in papers on Multi30k: on lower-cased Moses tokens, with compounds whole."""
    outputs = [line.lower() for line in moses_tokens(hypotheses, language)]
    expected = [line.lower() for line in moses_tokens(references, language)]
    return Score(_token_bleu(outputs, expected), _token_signature(language, "lc", compounds="whole"))


def length_ratio(hypotheses: Sequence[str], references: Sequence[str], language: str) -> float:
    """Tokens of all hypotheses divided by tokens of all references, as in the brevity penalty of `sacre_bleu`."""
    _check_lengths(hypotheses, references)
    return BLEU(tokenize=bleu_tokenizer(language)).corpus_score(hypotheses, [references]).ratio


def bleu_by_length(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], src: str, tgt: str
) -> list[dict[str, float]]:
    """sacreBLEU of the sentences whose source has 1 to 5 words, 6 to 10, and so on.

    `src` and `tgt` are the languages. Returns a row for each group that is not empty: `source_words` (the largest
    length of the group), `num_sentences` and `bleu`.
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
    """Tokenize each line as Moses' tokenizer.perl -l `language` does: tokens separated by spaces, special characters
    escaped (in outputs and references alike, which changes no score). A language without rules in Moses is treated
    as English."""
    tokenizer = sacremoses.MosesTokenizer(language)
    return [tokenizer.tokenize(line, return_str=True) for line in lines]


def split_compounds(tokens: str) -> str:
    """Make each hyphen between two other characters a token: rich-text -> rich ##AT##-##AT## text.

    It equals the published recipe, perl -ple 's{(\\S)-(\\S)}{$1 ##AT##-##AT## $2}g'. Matches do not overlap, so a-b-c
    keeps its second hyphen. Perl matches the bytes of UTF-8, so both hyphens of ä-ö-ü are split.
    """
    return _COMPOUND.sub(rb"\1 ##AT##-##AT## \2", tokens.encode()).decode()


def _token_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of tokenised lines, without smoothing, as Moses' multi-bleu.perl computes it."""
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
            f"the numbers of translations and references must be equal and at least 1, got {len(hypotheses)} and "
            f"{len(references)}"
        )
