"""Word counts of texts, also in languages that are written without spaces between words."""

WORD_CHARACTERS = {
    **dict.fromkeys(("zh", "yue", "wuu", "lzh", "ja"), 2),
    **dict.fromkeys(("th", "lo", "km", "my", "bo", "dz"), 4),
}
"""Approximate characters per word of the languages without spaces, by ISO 639 code."""


def language_of(code: str) -> str:
    """The language code without script and country, in lower case: zh for zh-Hans, zh_TW or ZH."""
    return code.lower().replace("_", "-").partition("-")[0]


def num_words(text: str, code: str) -> int:
    """The words of a text; in a language without spaces, its characters / WORD_CHARACTERS, rounded up."""
    characters = WORD_CHARACTERS.get(language_of(code))
    return len(text.split()) if characters is None else -(-len(text.replace(" ", "")) // characters)
