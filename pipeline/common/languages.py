"""Languages that are written without spaces between words, by their codes (ISO 639: zh, or zh-Hans)."""

WORD_CHARACTERS = {
    **dict.fromkeys(("zh", "yue", "wuu", "lzh", "ja"), 2),
    **dict.fromkeys(("th", "lo", "km", "my", "bo", "dz"), 4),
}
"""How many characters make a word of such a language, about: what is counted in words is counted so."""


def language_of(code: str) -> str:
    """The code without script and country: zh of zh-Hans, zh_TW, ZH."""
    return code.lower().replace("_", "-").partition("-")[0]


def num_words(text: str, code: str) -> int:
    """What spaces separate; of a language without them, each WORD_CHARACTERS characters, and a rest, are a word."""
    characters = WORD_CHARACTERS.get(language_of(code))
    return len(text.split()) if characters is None else -(-len(text.replace(" ", "")) // characters)
