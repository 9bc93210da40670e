import math
import shutil
import subprocess
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from pipeline.inference.metrics import (
    bleu_by_length,
    chrf,
    length_ratio,
    lowercase_bleu,
    moses_knows,
    moses_tokens,
    paper_bleu,
    sacre_bleu,
    split_compounds,
)

SOURCES = [
    "A man in a blue shirt is standing on a ladder cleaning a window.",
    "Two young, white men are outside near many bushes.",
    'A girl says: "Rock-and-roll!"',
    "Several men in hard hats are operating a giant pulley system.",
    "Someone runs.",
]
REFERENCES = [
    "Ein Mann in einem blauen Hemd steht auf einer Leiter und putzt ein Fenster.",
    "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    'Ein Mädchen im Rock-Kleid sagt: "Rock-and-Roll-Musik!"',
    "Mehrere Männer mit Schutzhelmen bedienen ein Antriebsradsystem.",
    "Jemand läuft.",
]
HYPOTHESES = [
    "Ein Mann in einem blauen hemd steht auf einer Leiter und reinigt ein Fenster.",
    "Zwei junge weiße Männer sind draußen in der Nähe vieler Büsche.",
    'Ein Mädchen im Rock-Hemd sagt: "Rock-Musik!"',
    "Mehrere Männer mit Helmen bedienen ein riesiges System.",
    "Jemand rennt.",
]


def bleu(hypotheses: list[str], references: list[str]) -> float:
    """Papineni et al. 2002, equations 1 to 3, on whitespace tokens: 100 BP exp(mean of log p_n), n = 1 to 4."""
    matches, totals = Counter(), Counter()
    hypothesis_length = reference_length = 0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        h, r = hypothesis.split(), reference.split()
        hypothesis_length += len(h)
        reference_length += len(r)
        for n in range(1, 5):
            h_grams = Counter(tuple(h[i : i + n]) for i in range(len(h) - n + 1))
            r_grams = Counter(tuple(r[i : i + n]) for i in range(len(r) - n + 1))
            matches[n] += sum(min(count, r_grams[gram]) for gram, count in h_grams.items())
            totals[n] += sum(h_grams.values())
    if not all(matches[n] for n in range(1, 5)):
        return 0.0
    mean = sum(math.log(matches[n] / totals[n]) for n in range(1, 5)) / 4
    return 100 * min(1.0, math.exp(1 - reference_length / hypothesis_length)) * math.exp(mean)


def test_scores_of_a_perfect_translation_are_100():
    assert chrf(REFERENCES, REFERENCES).value == pytest.approx(100)
    for score in (sacre_bleu, paper_bleu, lowercase_bleu):
        assert score(REFERENCES, REFERENCES, "de").value == pytest.approx(100)
    assert length_ratio(REFERENCES, REFERENCES, "de") == 1


def test_bleu_can_be_checked_by_hand():
    # 8 tokens, 7 right; 6 of 7 bigrams, 5 of 6 trigrams, 4 of 5 four-grams; as long as the reference.
    expected = 100 * (7 / 8 * 6 / 7 * 5 / 6 * 4 / 5) ** 0.25
    for score in (paper_bleu, lowercase_bleu):
        found = score(["a b c d e f g x"], ["a b c d e f g h"], "de")
        assert found.value == pytest.approx(expected)
    # 5 tokens, all right, but 3 are missing: only the brevity penalty is left.
    assert sacre_bleu(["a b c d e"], ["a b c d e f g h"], "de").value == pytest.approx(100 * math.exp(1 - 8 / 5))
    assert length_ratio(["a b c d e"], ["a b c d e f g h"], "de") == 5 / 8


def test_paper_bleu_is_plain_bleu_on_moses_tokens_with_compounds_split():
    tokens = [[split_compounds(line) for line in moses_tokens(side, "de")] for side in (HYPOTHESES, REFERENCES)]
    assert "Rock ##AT##-##AT## Hemd" in tokens[0][2]
    assert paper_bleu(HYPOTHESES, REFERENCES, "de").value == pytest.approx(bleu(*tokens))


def test_lowercase_bleu_is_plain_bleu_on_lower_cased_moses_tokens():
    tokens = [[line.lower() for line in moses_tokens(side, "de")] for side in (HYPOTHESES, REFERENCES)]
    assert lowercase_bleu(HYPOTHESES, REFERENCES, "de").value == pytest.approx(bleu(*tokens))


def test_sacre_bleu_is_plain_bleu_where_tokenisation_is_no_matter():
    hypotheses, references = (
        [line.replace(",", "").replace("-", " ").replace(":", "").replace('"', "").rstrip(".!") for line in side]
        for side in (HYPOTHESES, REFERENCES)
    )
    assert sacre_bleu(hypotheses, references, "de").value == pytest.approx(bleu(hypotheses, references))


def test_lowercase_bleu_alone_ignores_case():
    shouted = [line.upper() for line in REFERENCES]
    assert lowercase_bleu(["EIN MANN STEHT DORT"], ["Ein Mann steht dort"], "de").value == pytest.approx(100)
    assert paper_bleu(shouted, REFERENCES, "de").value < 50
    assert sacre_bleu(shouted, REFERENCES, "de").value < 50


def test_paper_bleu_splits_compounds_for_german_alone():
    half_right = (["ein Rock-Kleid liegt hier im Schrank"], ["ein Kino-Kleid liegt hier im Schrank"])
    whole, split = paper_bleu(*half_right, "fr"), paper_bleu(*half_right, "de")
    assert whole.value == pytest.approx(lowercase_bleu(*half_right, "fr").value)
    assert split.value > whole.value
    assert "compounds:split" in split.signature
    assert "compounds:whole" in whole.signature


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("rich-text format", "rich ##AT##-##AT## text format"),
        ("a-b-c", "a ##AT##-##AT## b-c"),  # the match of the first hyphen has consumed the b
        ("ab-cd-ef", "ab ##AT##-##AT## cd ##AT##-##AT## ef"),
        ("ä-ö-ü", "ä ##AT##-##AT## ö ##AT##-##AT## ü"),  # two bytes per letter
        ("a - b", "a - b"),
        ("Haupt- und -satz", "Haupt- und -satz"),
        ("a--b", "a ##AT##-##AT## -b"),
        ("", ""),
    ],
)
def test_split_compounds_makes_a_hyphen_between_characters_a_token(tokens: str, expected: str):
    assert split_compounds(tokens) == expected


@pytest.mark.skipif(shutil.which("perl") is None, reason="perl is not installed")
def test_split_compounds_does_what_the_published_perl_does():
    lines = [
        "a-b-c-d",
        "--- -- a--b",
        "ä-ö-ü-ß x-ä-y",
        "a\u00a0-\u00a0b",
        "a\t-\tb-c",
        "„Rock-’n’-Roll“-Band",
        "–-—",
        "a-",
    ]
    program = "s{(\\S)-(\\S)}{$1 ##AT##-##AT## $2}g"
    found = subprocess.run(
        ["perl", "-ple", program], input="\n".join(lines).encode(), capture_output=True, check=True
    ).stdout
    assert [split_compounds(line) for line in lines] == found.decode().rstrip("\n").split("\n")


@given(st.lists(st.sampled_from("a-b ä"), max_size=20).map("".join))
def test_split_compounds_only_adds_marks(tokens: str):
    assert split_compounds(tokens).replace(" ##AT##-##AT## ", "-") == tokens


def test_moses_tokens_know_abbreviations_and_escape_characters():
    assert moses_tokens(['Er sagt: "z.B. ca. 3,5 m" [& so].'], "de") == [
        "Er sagt : &quot; z.B. ca. 3,5 m &quot; &#91; &amp; so &#93; ."
    ]
    assert moses_tokens(["", "l'homme"], "fr") == ["", "l&apos; homme"]


def test_chrf_is_the_f2_score_of_character_n_grams():
    hypothesis, reference = "abcdefgh", "abcdefxh"
    precisions, recalls = [], []
    for n in range(1, 7):
        h = Counter(hypothesis[i : i + n] for i in range(len(hypothesis) - n + 1))
        r = Counter(reference[i : i + n] for i in range(len(reference) - n + 1))
        precisions.append((h & r).total() / h.total())
        recalls.append((h & r).total() / r.total())
    precision, recall = sum(precisions) / 6, sum(recalls) / 6
    expected = 100 * 5 * precision * recall / (4 * precision + recall)
    assert chrf([hypothesis], [reference]).value == pytest.approx(expected)


def test_scores_have_signatures_of_what_they_depend_on():
    assert sacre_bleu(HYPOTHESES, REFERENCES, "de").signature.startswith(
        "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"
    )
    assert chrf(HYPOTHESES, REFERENCES).signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert paper_bleu(HYPOTHESES, REFERENCES, "de").signature.startswith(
        "nrefs:1|case:mixed|tok:moses-de|compounds:split|smooth:none|sacremoses:"
    )
    assert lowercase_bleu(HYPOTHESES, REFERENCES, "de").signature.startswith(
        "nrefs:1|case:lc|tok:moses-de|compounds:whole|smooth:none|sacremoses:"
    )


def test_bleu_by_length_scores_each_group_of_source_lengths_alone():
    rows = bleu_by_length(SOURCES, HYPOTHESES, REFERENCES, "en", "de")
    by_length: dict[int, list[int]] = {5: [2, 4], 10: [1], 15: [0, 3]}
    assert [len(source.split()) for source in SOURCES] == [14, 9, 4, 11, 2]
    assert [(row["source_words"], row["num_sentences"]) for row in rows] == [(5, 2), (10, 1), (15, 2)]
    for row in rows:
        chosen = by_length[int(row["source_words"])]
        expected = sacre_bleu([HYPOTHESES[i] for i in chosen], [REFERENCES[i] for i in chosen], "de")
        assert row["bleu"] == expected.value


def test_bleu_by_length_counts_no_words_to_the_shortest_group():
    rows = bleu_by_length(["", "a b c d e", "a b c d e f"], ["x"] * 3, ["x"] * 3, "en", "de")
    assert [(row["source_words"], row["num_sentences"]) for row in rows] == [(5, 2), (10, 1)]


@pytest.mark.parametrize(("hypotheses", "references"), [(["a"], ["a", "b"]), ([], [])])
def test_scores_of_different_or_no_length_are_an_error(hypotheses: list[str], references: list[str]):
    message = f"must be equal and at least 1, got {len(hypotheses)} and {len(references)}$"
    with pytest.raises(ValueError, match=message):
        chrf(hypotheses, references)
    for score in (sacre_bleu, length_ratio, paper_bleu, lowercase_bleu):
        with pytest.raises(ValueError, match=message):
            score(hypotheses, references, "de")


WITHOUT_SPACES = {  # language: translation, a reference that differs in few characters, tokenizer
    "zh": ("老国王在花园里睡觉。", "老国王在花园里吃饭。", "zh"),
    "zh-Hans": ("老国王在花园里睡觉。", "老国王在花园里吃饭。", "zh"),
    "ja": ("年老いた王様は庭で眠っています。", "年老いた王様は庭で食べています。", "char"),
    "ko": ("늙은왕은정원에서잠을잔다.", "늙은왕은정원에서밥을먹는다.", "char"),
    "th": ("กษัตริย์ชรานอนหลับในสวน", "กษัตริย์ชรานั่งกินในสวน", "char"),
}


@pytest.mark.parametrize("language", WITHOUT_SPACES)
def test_sacre_bleu_of_text_without_spaces_is_by_its_languages_tokenizer(language: str) -> None:
    output, reference, tokenizer = WITHOUT_SPACES[language]
    score = sacre_bleu([output], [reference], language)
    assert score.value > 30
    assert score.value == BLEU(tokenize=tokenizer).corpus_score([output], [[reference]]).score
    assert f"|tok:{tokenizer}|" in score.signature
    assert sacre_bleu([output], [reference], "de").value < 1  # without spaces, each sentence is one token


def test_sacre_bleu_of_chinese_is_sacrebleus_own_choice() -> None:
    output, reference, _ = WITHOUT_SPACES["zh"]
    own = BLEU(trg_lang="zh")
    assert sacre_bleu([output], [reference], "zh").value == own.corpus_score([output], [[reference]]).score
    assert sacre_bleu([output], [reference], "zh").signature == str(own.get_signature())


def test_moses_knows_languages_with_words_that_it_has_rules_for() -> None:
    assert all(map(moses_knows, ("de", "en", "fr", "cs", "ru")))
    assert not any(map(moses_knows, (*WITHOUT_SPACES, "yue", "xx")))


def test_bleu_by_length_and_length_ratio_count_text_without_spaces_by_characters() -> None:
    source, output, reference = "老国王在花园里睡觉呢。", "老国王睡觉。", "老国王在睡觉。"
    (row,) = bleu_by_length([source], [output], [reference], "zh", "zh")
    assert row["source_words"] == 10  # 11 characters count as 6 words
    assert row["bleu"] == sacre_bleu([output], [reference], "zh").value
    assert length_ratio([output], [reference], "zh") == 6 / 7
