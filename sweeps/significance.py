"""The uncertainty of a difference in BLEU: intervals, sacreBLEU's paired test, Holm's correction. Pure functions.

There are two sources of randomness: another seed gives another model, and the validation split could have had other
sentences. `seed_interval` covers the first, `sentence_interval` and `paired_p` the second.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from scipy import stats

from pipeline.inference.metrics import bleu_tokenizer

LEVEL = 0.05
"""The significance level: p values below it are significant, and intervals have a coverage of 1 - LEVEL."""

RESAMPLES = 2_000
SHUFFLES = 10_000  # sacreBLEU's default


@dataclass(frozen=True)
class Interval:
    """95% interval of a difference, and what it covers: the randomness of the seeds or of the sentences."""

    low: float
    high: float
    covers: Literal["seeds", "sentences"]

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1 degrees of freedom; None for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def seed_interval(differences: Sequence[float]) -> Interval:
    """Student's t interval of the mean of differences that are paired by seed: mean -+ t(n - 1) sd / sqrt(n).

    It is wide with few seeds: t is 12.7 with two and 4.3 with three. Raises ValueError for fewer than two.
    """
    mean, deviation = mean_and_deviation(differences)
    if deviation is None:
        raise ValueError("an interval over seeds needs two seeds or more")
    half = float(stats.t.ppf(1 - LEVEL / 2, len(differences) - 1)) * deviation / len(differences) ** 0.5
    return Interval(mean - half, mean + half, "seeds")


def sentence_interval(
    base: Sequence[str], system: Sequence[str], references: Sequence[str], language: str
) -> Interval:
    """Percentile interval of BLEU(system) - BLEU(base) by paired bootstrap over the sentences (Koehn 2004).

    Both systems are scored on the same resamples, from sacreBLEU's sufficient statistics of each sentence.
    """
    systems = [sentence_statistics(translations, references, language) for translations in (base, system)]
    draw = np.random.default_rng(seed=1)
    differences = []
    for _ in range(RESAMPLES):
        chosen = draw.integers(len(references), size=len(references))
        base_bleu, system_bleu = (corpus_bleu(of_system[chosen]) for of_system in systems)
        differences.append(system_bleu - base_bleu)
    low, high = np.quantile(differences, [LEVEL / 2, 1 - LEVEL / 2])
    return Interval(float(low), float(high), "sentences")


def sentence_statistics(translations: Sequence[str], references: Sequence[str], language: str) -> np.ndarray:
    """BLEU's sufficient statistics [sentences, 10]: length, reference length, matches of 1- to 4-grams, their totals.

    Their sums over sentences give the BLEU of a corpus (`corpus_bleu`).
    """
    # sacreBLEU asks for effective_order with single sentences; it does not change the counts
    metric = BLEU(tokenize=bleu_tokenizer(language), effective_order=True)
    scores = [metric.sentence_score(text, [ref]) for text, ref in zip(translations, references, strict=True)]
    return np.array([[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores])


def corpus_bleu(rows: np.ndarray) -> float:
    """BLEU of the sentences with these `sentence_statistics`, smoothed as in sacreBLEU's default."""
    length, reference_length, *counts = rows.sum(axis=0).tolist()
    matches, totals = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    return BLEU.compute_bleu(matches, totals, length, reference_length, smooth_method="exp").score


class BleuOverSeeds(BLEU):
    """BLEU of hypotheses that have a line for each seed: a sentence's statistics are summed over the seeds.

    PairedTest accepts only texts, so the sum is made in the method that it calls for a metric's statistics.
    """

    def _extract_corpus_statistics(self, hypotheses: Any, references: Any) -> Any:
        seeds = zip(*(hypothesis.split("\n") for hypothesis in hypotheses), strict=True)
        return np.sum([super(BleuOverSeeds, self)._extract_corpus_statistics(s, references) for s in seeds], axis=0)


def paired_p(
    base: Sequence[Sequence[str]], system: Sequence[Sequence[str]], references: Sequence[str], language: str
) -> float:
    """Two-sided p value of a difference in BLEU: sacreBLEU's PairedTest with approximate randomization.

    `base` and `system` have one list of translations for each seed. The translations of a sentence by all seeds are
    swapped together, because they are not independent evidence: three copies of one model get the p value of one.

    The test swaps the two systems' translations of each sentence at random, and counts how often the difference is
    larger than the real one. sacreBLEU does not count ties, so identical systems would get p = 1 / 10,001. But of the
    2^k ways to swap k sentences that score differently, the real one and its mirror image always tie: p is at least
    2 / 2^k. The seed of the swaps is sacreBLEU's own (12345, or SACREBLEU_SEED).
    """
    metric = BleuOverSeeds(tokenize=bleu_tokenizer(language), force=True)
    systems: list[tuple[str, Sequence[str]]] = [
        (name, ["\n".join(texts) for texts in zip(*by_seed, strict=True)])
        for name, by_seed in (("base", base), ("system", system))
    ]
    test = PairedTest(systems, {"BLEU": metric}, [references], "ar", SHUFFLES)
    _, scores = test()
    result: Any = scores["BLEU"][1]
    base_sums, system_sums = (
        np.sum([sentence_statistics(texts, references, language) for texts in by_seed], axis=0)
        for by_seed in (base, system)
    )
    num_different = int((base_sums != system_sums).any(axis=1).sum())
    return min(1.0, max(result.p_value, 2.0 ** (1 - num_different)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number, so that LEVEL bounds the probability of any false positive (Holm 1979).

    The smallest of n p values is multiplied by n, the next by n - 1 and so on; none becomes smaller than the one
    before it.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
