"""Search for a phrase in a text, in any case and any script, and return where it ends.

    phrase_end("Parish and Paris", folded("PARIS"))        # 16: it is not found inside Parish
    phrase_end("東京は日本の首都です", folded("首都"))      # 8: Japanese has no spaces
    phrase_end("Die Straße", folded("STRASSE"))            # 10

A phrase matches whole words where the script separates words by spaces.
"""

from __future__ import annotations

import bisect
import itertools
import unicodedata

from ..core.forms import APART, canonical, occurrences


def folded(text: str) -> str:
    """Return a text in one Unicode form and without case, for comparison. It may be longer."""
    return canonical(text).casefold()


def phrase_end(text: str, phrase: str) -> int | None:
    """Return the character after the first match of a phrase in a text.

    Args:
        text: The text.
        phrase: The phrase, `folded`.

    Returns:
        The index of the character. None if the text does not hold the phrase.
    """
    if canonical(text) != text:
        places = occurrences(text, phrase, ignore_case=True)
        return next((place.stop for place in places if place.is_whole), None)
    without_case = folded(text)
    at = without_case.find(phrase)
    while at >= 0 and not (_breaks(without_case, at) and _breaks(without_case, at + len(phrase))):
        at = without_case.find(phrase, at + 1)
    if at < 0:
        return None
    end = at + len(phrase)
    if len(without_case) == len(text):  # no character has become more than one
        return end
    ends = list(itertools.accumulate(len(folded(c)) for c in text))
    return bisect.bisect_left(ends, end) + 1


def _breaks(text: str, at: int) -> bool:
    """Return whether a word may begin or end before a character of a text."""
    if not 0 < at < len(text):
        return True
    before, after = text[at - 1], text[at]
    return not (_in_word(before) and _in_word(after)) or bool(
        APART.match(before) or APART.match(after)
    )


def _in_word(c: str) -> bool:
    """Return whether a character belongs to a word: letters, digits, marks and underscores."""
    return c.isalnum() or c == "_" or unicodedata.category(c).startswith("M")
