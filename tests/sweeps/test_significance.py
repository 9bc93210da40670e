import itertools
import logging
import random
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from sweeps.significance import (
    Interval,
    corpus_bleu,
    holm,
    mean_and_deviation,
    paired_p,
    seed_interval,
    sentence_interval,
    sentence_statistics,
)

WORDS = [f"w{i}" for i in range(29)]


def corpus(num_sentences: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(6, 11))) for _ in range(num_sentences)]


def spoilt(references: list[str], share: float, seed: int) -> list[str]:
    """Return translations with this share of wrong words."""
    chance = random.Random(seed)
    return [" ".join("x" if chance.random() < share else word for word in line.split()) for line in references]


def bleu(hypotheses: list[str], references: list[str]) -> float:
    return BLEU(force=True).corpus_score(hypotheses, [references]).score


def test_mean_and_deviation_can_be_checked_by_hand():
    assert mean_and_deviation([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == (5.0, pytest.approx((32 / 7) ** 0.5))
    assert mean_and_deviation([3.5]) == (3.5, None)


@pytest.mark.parametrize(
    ("differences", "quantile"),  # 97.5% quantiles of Student's t, from a printed table
    [([-1.0, 4.0], 12.706), ([1.0, 2.0, 3.0], 4.303), ([0.5, -0.7, 1.1, 1.3, 0.2], 2.776)],
)
def test_seed_interval_is_that_of_the_textbook(differences: list[float], quantile: float):
    half = quantile * statistics.stdev(differences) / len(differences) ** 0.5
    found = seed_interval(differences)
    assert found.low == pytest.approx(statistics.fmean(differences) - half, rel=1e-3)
    assert found.high == pytest.approx(statistics.fmean(differences) + half, rel=1e-3)
    assert found.covers == "seeds"


def test_seed_interval_of_seeds_that_agree_is_a_point():
    assert seed_interval([0.0, 0.0, 0.0]) == Interval(0.0, 0.0, "seeds")
    assert seed_interval([2.5, 2.5]) == Interval(2.5, 2.5, "seeds")


def test_seed_interval_of_one_seed_is_an_error():
    with pytest.raises(ValueError, match=r"^an interval over seeds needs two seeds or more$"):
        seed_interval([1.0])


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 2.0, True), (-2.0, -0.1, True), (-0.1, 0.2, False), (0.0, 0.0, False)]
)
def test_interval_excludes_zero_if_both_ends_have_one_sign(low: float, high: float, expected: bool):
    assert Interval(low, high, "seeds").excludes_zero is expected


def test_corpus_bleu_and_paired_p_use_the_tokenizer_of_a_language_without_spaces():
    references = ["老国王在花园里睡觉。"] * 7
    translations = ["老国王在花园里吃饭。"] * 7
    found = corpus_bleu(sentence_statistics(translations, references, "zh"))
    assert found == BLEU(tokenize="zh").corpus_score(translations, [references]).score
    assert paired_p([references], [translations], references, "zh") < 0.05
    assert sentence_interval(references, translations, references, "zh").high < -30


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_corpus_bleu_of_sentence_statistics_is_sacrebleus(share: float):
    references = corpus(31, seed=1)
    translations = [*spoilt(references, share, seed=2)[:-1], ""]
    assert corpus_bleu(sentence_statistics(translations, references, "en")) == bleu(translations, references)


def test_sentence_interval_is_that_of_scoring_resampled_texts():
    references = corpus(31, seed=1)
    base, system = spoilt(references, 0.1, seed=2), spoilt(references, 0.25, seed=3)
    chance = random.Random(4)
    differences = []
    for _ in range(700):
        chosen = chance.choices(range(len(references)), k=len(references))
        sides = [[side[i] for i in chosen] for side in (base, system, references)]
        differences.append(bleu(sides[1], sides[2]) - bleu(sides[0], sides[2]))
    low, high = np.percentile(differences, [2.5, 97.5])
    found = sentence_interval(base, system, references, "en")
    assert found.covers == "sentences"
    assert found.low < bleu(system, references) - bleu(base, references) < found.high
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.05 * (high - low))


def test_sentence_interval_of_identical_systems_is_zero():
    references = corpus(17, seed=1)
    system = spoilt(references, 0.2, seed=2)
    assert sentence_interval(system, system, references, "en") == Interval(0.0, 0.0, "sentences")


def test_paired_p_is_the_share_of_all_swaps_that_differ_more():
    references = corpus(9, seed=5)
    base, system = spoilt(references, 0.1, seed=6), spoilt(references, 0.3, seed=7)
    real = abs(bleu(base, references) - bleu(system, references))
    more = 0
    for swaps in itertools.product([False, True], repeat=len(references)):
        pairs = [
            pair[::-1] if swap else pair for swap, pair in zip(swaps, zip(base, system, strict=True), strict=True)
        ]
        one, other = (list(side) for side in zip(*pairs, strict=True))
        more += abs(bleu(one, references) - bleu(other, references)) > real + 1e-9
    exact = more / 2 ** len(references)
    assert 0.03 < exact < 0.9
    assert paired_p([base], [system], references, "en") == pytest.approx(exact, abs=0.015)


def test_paired_p_of_several_seeds_swaps_whole_sentences():
    references = corpus(8, seed=5)
    sides = [
        [spoilt(references, 0.1, seed=6), spoilt(references, 0.2, seed=7)],
        [spoilt(references, 0.25, seed=8), spoilt(references, 0.2, seed=9)],
    ]

    def difference(swaps: Sequence[bool]) -> float:
        """Return the difference in BLEU over all texts. A swap exchanges a sentence under both seeds."""
        mixed = [
            [sides[side ^ swap][seed][i] for seed in (0, 1) for i, swap in enumerate(swaps)] for side in (False, True)
        ]
        return abs(bleu(mixed[0], references * 2) - bleu(mixed[1], references * 2))

    real = difference([False] * len(references)) + 1e-9
    more = sum(difference(swaps) > real for swaps in itertools.product([False, True], repeat=len(references)))
    exact = more / 2 ** len(references)
    assert 0.03 < exact < 0.9
    assert paired_p(*sides, references, "en") == pytest.approx(exact, abs=0.015)


def test_paired_p_of_the_same_models_three_times_is_that_of_once():
    references = corpus(43, seed=1)
    base, system = spoilt(references, 0.1, seed=2), spoilt(references, 0.13, seed=3)
    once = paired_p([base], [system], references, "en")
    assert 0.01 < once < 0.9
    assert paired_p([base] * 3, [system] * 3, references, "en") == pytest.approx(once, abs=0.01)


def test_paired_p_of_identical_systems_is_1():
    references = corpus(13, seed=1)
    system = spoilt(references, 0.2, seed=2)
    assert paired_p([system], [system], references, "en") == 1


@pytest.mark.parametrize(("num_differing", "least"), [(1, 1), (2, 1 / 2), (3, 1 / 4), (5, 1 / 16)])
def test_paired_p_of_a_few_different_sentences_is_never_significant(num_differing: int, least: float):
    references = corpus(101, seed=1)
    system = ["x y z x y z"] * num_differing + references[num_differing:]
    assert paired_p([references], [system], references, "en") >= least


def test_paired_p_and_sentence_interval_find_a_clearly_worse_system():
    references = corpus(101, seed=1)
    base, system = spoilt(references, 0.05, seed=2), spoilt(references, 0.3, seed=3)
    assert paired_p([base], [system], references, "en") == pytest.approx(1 / 10_001)
    assert sentence_interval(base, system, references, "en").high < 0
    assert sentence_interval(system, base, references, "en").low > 0


def test_paired_p_and_sentence_interval_are_the_same_every_time():
    references = corpus(23, seed=1)
    sides = spoilt(references, 0.1, seed=2), spoilt(references, 0.15, seed=3)
    assert paired_p(sides[:1], sides[1:], references, "en") == paired_p(sides[:1], sides[1:], references, "en")
    assert sentence_interval(*sides, references, "en") == sentence_interval(*sides, references, "en")


def test_paired_p_and_sentence_interval_print_and_log_nothing(
    capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    references = [f"{line} ." for line in corpus(127, seed=1)]  # sacreBLEU would warn that this is tokenized
    sides = references, [f"{line} ." for line in spoilt(references, 0.1, seed=2)]
    with caplog.at_level(logging.WARNING):
        paired_p(sides[:1], sides[1:], references, "en")
        sentence_interval(*sides, references, "en")
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 0.04 x 1 would be less than 0.03 x 2
        ([0.01, 0.01, 0.2], [0.03, 0.03, 0.2]),
        ([0.6, 0.02, 0.7], [1.0, 0.06, 1.0]),
        ([0.049], [0.049]),
        ([], []),
    ],
)
def test_holm_is_that_of_a_table_made_by_hand(p_values: list[float], adjusted: list[float]):
    assert holm(p_values) == pytest.approx(adjusted)


@pytest.mark.parametrize(("num_different", "least"), [(1, 1.0), (2, 0.5), (4, 0.125)])
def test_paired_p_is_at_least_the_share_of_swaps_that_tie(num_different, least):
    """Each differing sentence is worse in `system`, so no swap differs more, and 2 of 2^k swaps differ as much."""
    references = corpus(23, seed=3)
    system = [*spoilt(references[:num_different], 1.0, seed=4), *references[num_different:]]
    assert sum(a != b for a, b in zip(references, system, strict=True)) == num_different
    assert paired_p([references], [system], references, "en") == least
