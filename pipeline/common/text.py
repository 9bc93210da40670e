"""Invisible characters: a text that consists only of them counts as blank."""

import re

_RANGES = (
    "\u00ad", "\u034f", "\u061c", "\u115f-\u1160", "\u17b4-\u17b5", "\u180b-\u180f", "\u200b-\u200f", "\u202a-\u202e",
    "\u2060-\u206f", "\u2800", "\u3164", "\ufe00-\ufe0f", "\ufeff", "\uffa0", "\ufff0-\ufffb",
    "\U0001bca0-\U0001bca3", "\U0001d173-\U0001d17a", "\U000e0000-\U000e0fff",
)  # fmt: skip
VISIBLE = rf"[^\s{''.join(_RANGES)}]"
"""A regular expression, for Python and for polars, that matches a visible character: not white space, none of
Unicode's Default_Ignorable_Code_Point, no annotation mark, not the empty braille cell."""


def is_blank(text: str) -> bool:
    return re.search(VISIBLE, text) is None
