"""Translation of lines of text: empty lines, long lines, several translations of a line."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.common.settings import Evaluate
from pipeline.inference.lines import LineTranslator, _sentences
from pipeline.inference.translate import translate
from tests.support.random_models import MAX_LENGTH, random_model, random_tokenizer

TOKENIZER, MODEL = random_tokenizer(), random_model(2, "sinusoidal")
SETTINGS = Evaluate(beam=3, alpha=0.6, max_extra=5, engine="torch", batch_tokens=67, num_samples=0)
LINES = ["ein Mann singt im Haus", "das Kind malt", "eine Frau liest das Buch"]
LONGEST = MAX_LENGTH - 1


def fail(index: int, fate: str) -> None:
    pytest.fail(f"{index} {fate}")


def plain(lines: list[str], settings: Evaluate = SETTINGS):
    return translate(MODEL, TOKENIZER, TOKENIZER.encode(lines), settings, progress=False)


@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_line_translator_translates_as_evaluation_does(engine: str):
    settings = replace(SETTINGS, engine=engine)
    found = LineTranslator(MODEL, TOKENIZER, settings)(LINES, fail)
    assert [best.text for [best] in found] == [best.text for best in plain(LINES, settings)]
    assert any(best.text for [best] in found)


@pytest.mark.parametrize("line", ["", " ", "\u200b\ufeff \u2060"])
def test_line_translator_gives_an_empty_line_no_translation(line: str):
    translator = LineTranslator(MODEL, TOKENIZER, SETTINGS)
    assert translator([line], fail) == [[]]
    assert [len(found) for found in translator([line, LINES[0], line], fail)] == [0, 1, 0]
    assert translator([], fail) == []


def test_line_translator_splits_a_long_line_at_ends_of_sentences():
    messages: list[tuple[int, str]] = []
    line = "das Kind malt. Ein Mann singt im Haus! „Eine Frau liest das Buch.“  Das Kind?"
    parts = ["das Kind malt.", "Ein Mann singt im Haus!", "„Eine Frau liest das Buch.“", "Das Kind?"]
    number = len(TOKENIZER.encode(line))
    assert max(len(tokens) for tokens in TOKENIZER.encode(parts)) <= LONGEST < number
    found = LineTranslator(MODEL, TOKENIZER, SETTINGS)(["das Kind malt", line], lambda *what: messages.append(what))
    expected = plain(parts)
    assert found[1][0].text == " ".join(best.text for best in expected if best.text)
    assert found[1][0].score == pytest.approx(sum(best.score for best in expected), abs=1e-4)
    assert messages == [(1, f"has {number} tokens, more than the model's {LONGEST}: translated in 4 parts")]


def test_line_translator_cuts_a_long_sentence():
    messages: list[tuple[int, str]] = []
    line = "ein Mann " * 20
    tokens = TOKENIZER.encode(line)
    [[best]] = LineTranslator(MODEL, TOKENIZER, SETTINGS)([line], lambda *what: messages.append(what))
    [expected] = translate(MODEL, TOKENIZER, [np.array(tokens[:LONGEST])], SETTINGS, progress=False)
    assert best == expected
    left_out = len(tokens) - LONGEST
    assert messages == [
        (0, f"has {len(tokens)} tokens, more than the model's {LONGEST}: cut, {left_out} tokens are left out")
    ]


@pytest.mark.parametrize(
    ("line", "sentences"),
    [
        ("One. Two", [("One.", " "), ("Two", "")]),
        ("He met Dr. smith. Then?! \u201cYes.\u201d No", [
            ("He met Dr. smith.", " "), ("Then?!", " "), ("\u201cYes.\u201d", " "), ("No", ""),
        ]),
        ("3.14 is no end. 7 is", [("3.14 is no end.", " "), ("7 is", "")]),
        ("我来了。「他走了。」她说", [("我来了。", ""), ("「他走了。」", ""), ("她说", "")]),
        ("no end at all", [("no end at all", "")]),
        ("The end.", [("The end.", "")]),
        ("." * 60_000 + "!", [("." * 60_000 + "!", "")]),
        (". " * 30_000, [(".", " ")] * 29_999 + [(". ", "")]),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:12],
)  # fmt: skip
def test_sentences_end_where_a_reader_sees_an_end(line: str, sentences: list[tuple[str, str]]):
    assert _sentences(line) == sentences


@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_line_translator_with_num_best_gives_different_translations_best_first(engine: str):
    settings = replace(SETTINGS, engine=engine)
    found = LineTranslator(MODEL, TOKENIZER, settings, num_best=3)(LINES, fail)
    for best, several in zip(plain(LINES, settings), found, strict=True):
        assert several[0].text == best.text
        assert 1 < len(several) <= 3
        scores = [translation.score for translation in several]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) == len(scores)


def test_line_translator_with_num_best_joins_parts_of_a_line_by_rank():
    line, parts = "Ein Mann singt im Haus. Das Kind malt. " * 2, ["Ein Mann singt im Haus.", "Das Kind malt."] * 2
    translator = LineTranslator(MODEL, TOKENIZER, SETTINGS, num_best=2)
    of_parts = translator(parts, fail)
    assert {len(found) for found in of_parts} == {1, 2}
    [found] = translator([line.strip()], lambda *what: None)
    for rank in (0, 1):
        assert (
            found[rank].text.split()
            == " ".join(of_part[:2][min(rank, len(of_part) - 1)].text for of_part in of_parts).split()
        )


@pytest.fixture(autouse=True)
def one_thread(own_threads: None) -> None:
    torch.set_num_threads(1)
