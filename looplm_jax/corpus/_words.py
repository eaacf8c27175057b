"""Normalization of text to words for comparison: no case, no punctuation, single characters in scripts without spaces.

GPT-3 compares "lowercased, whitespace-delimited words with no punctuation" (Brown et al. 2020, appendix C). Here,
punctuation separates words, as in "and/or", except for an apostrophe, which is removed.
"""

import functools
import unicodedata
from collections.abc import Sequence

# Scripts without spaces between words, and the approximate number of characters in a word.
_HAN_AND_KANA = 2
_SOUTH_EAST_ASIAN = 4
_WITHOUT_SPACES = (
    (range(0x0E00, 0x0F00), _SOUTH_EAST_ASIAN),  # Thai, Lao
    (range(0x1000, 0x10A0), _SOUTH_EAST_ASIAN),  # Burmese
    (range(0x1780, 0x1800), _SOUTH_EAST_ASIAN),  # Khmer
    (range(0x3005, 0x3008), _HAN_AND_KANA),
    (range(0x3041, 0x3130), _HAN_AND_KANA),  # Hiragana, Katakana, Bopomofo
    (range(0x31F0, 0x3200), _HAN_AND_KANA),
    (range(0x3400, 0x4DC0), _HAN_AND_KANA),
    (range(0x4E00, 0xA000), _HAN_AND_KANA),
    (range(0xF900, 0xFB00), _HAN_AND_KANA),
    (range(0x20000, 0x40000), _HAN_AND_KANA),
)
_APOSTROPHES = "'\u2019\u02bc"
_VARIATION_SELECTORS = range(0xFE00, 0xFE10)


def words(text: str) -> list[str]:
    """Returns the words of a text, in order. In scripts without spaces, every character is a word."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_Replacements()).split()


def length_in_words(units: Sequence[str]) -> float:
    """Returns the number of words in `words(text)`, where a word of a script without spaces is several characters."""
    return sum(1 / _characters_per_word(ord(unit[0])) for unit in units)


class _Replacements:
    """A mapping for `str.translate`, computed lazily for each character."""

    def __getitem__(self, code: int) -> str | None:
        return _replacement(code)


@functools.cache
def _replacement(code: int) -> str | None:
    """Returns the replacement of a character, or None to remove it."""
    character = chr(code)
    category = unicodedata.category(character)
    if character in _APOSTROPHES or category == "Cf" or code in _VARIATION_SELECTORS:
        return None
    # Letters, marks and numbers are kept; all else separates words.
    if category[0] not in "LMN":
        return " "
    return f" {character} " if _characters_per_word(code) > 1 else character


@functools.cache
def _characters_per_word(code: int) -> int:
    """Returns the approximate number of characters in a word of the character's script."""
    return next((count for codes, count in _WITHOUT_SPACES if code in codes), 1)
