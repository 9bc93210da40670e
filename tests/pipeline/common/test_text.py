import sys
import unicodedata

import polars as pl
import pytest

from pipeline.common.text import VISIBLE, is_blank


@pytest.mark.parametrize("text", ["", " ", "\t\u00a0\u3000", "\u200b", "\ufeff \u00ad", "\u2800\u3164", "\U000e0041"])
def test_is_blank_is_true_of_invisible_characters(text):
    assert is_blank(text)


@pytest.mark.parametrize("text", ["a", ".", "\u200bא", "नि\u200d", "\u0301", "\ufffd", "❤\ufe0f", "\U0001f468\u200d"])
def test_is_blank_is_false_with_a_visible_character(text):
    assert not is_blank(text)


def test_is_blank_agrees_with_the_pattern_visible_in_polars():
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    frame = pl.DataFrame({"text": characters})
    polars = frame.filter(~pl.col("text").str.contains(VISIBLE))["text"].to_list()
    python = [character for character in characters if is_blank(character)]
    assert set(python) ^ set(polars) <= set("\x1c\x1d\x1e\x1f")  # only Python counts these as white space
    ignorable = frame.filter(pl.col("text").str.contains(r"\p{Default_Ignorable_Code_Point}"))["text"].to_list()
    assert set(ignorable) <= set(python)
    seen = [c for c in set(python) - set(ignorable) if not c.isspace()]
    assert {unicodedata.name(c) for c in seen} == {
        "BRAILLE PATTERN BLANK",
        *(f"INTERLINEAR ANNOTATION {end}" for end in ("ANCHOR", "SEPARATOR", "TERMINATOR")),
    }
