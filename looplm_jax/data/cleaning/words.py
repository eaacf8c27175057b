"""Text as the words that comparisons look at: no case, no punctuation, single characters where a script has no spaces.

GPT-3 compares "lowercased, whitespace-delimited words with no punctuation" (Brown et al. 2020, appendix C). Here
punctuation ends a word, as it does in "and/or", except for an apostrophe, which is dropped.
"""

import functools
import unicodedata
from collections.abc import Sequence

# Scripts without spaces between words, and how many characters a word of theirs has, about.
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
    """The words of a text in order; a character of a script without spaces counts as one."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_Replacements()).split()


def length_in_words(units: Sequence[str]) -> float:
    """How many words `words(text)` amounts to, where a word of a script without spaces is several characters."""
    return sum(1 / _characters_per_word(ord(unit[0])) for unit in units)


class _Replacements:
    """What `str.translate` puts for each character."""

    def __getitem__(self, code: int) -> str | None:
        return _replacement(code)


@functools.cache
def _replacement(code: int) -> str | None:
    character = chr(code)
    category = unicodedata.category(character)
    if character in _APOSTROPHES or category == "Cf" or code in _VARIATION_SELECTORS:
        return None
    if category[0] not in "LMN":
        return " "
    return f" {character} " if _characters_per_word(code) > 1 else character


@functools.cache
def _characters_per_word(code: int) -> int:
    return next((count for codes, count in _WITHOUT_SPACES if code in codes), 1)
