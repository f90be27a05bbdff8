"""One form for texts that a reader cannot tell apart, and the search for one text in another.

canonical("Andre\\u0301 Malraux") == canonical("André\\u00a0Malraux")     # True
occurrences("In Iranian history, Iran", "Iran")         # two, of which the second is a whole word
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
"""Every kind of space that is not the plain one: Unicode's category Zs."""

APART = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf"
    "\u3005-\u3007\u3040-\u318f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f"
    "\ua9e0-\ua9ff\uaa60-\uaadf\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff]"
)
"""Letters between which a word may begin or end.

Chinese, Japanese, Thai, Lao, Tibetan, Burmese, Khmer and Tai have no spaces between words. In
Korean, particles are joined to the word."""


class Occurrence(NamedTuple):
    """A place where a text has another text."""

    start: int
    """Its first character, counted in the text."""
    stop: int
    """The character after its last one."""
    is_whole: bool
    """Whether no word goes on before it or after it."""


def canonical(text: str) -> str:
    """Return a text with composed letters and plain spaces.

    The letters are in Unicode's composed form (NFC). Each kind of space, such as a no-break space,
    becomes a plain one. Line breaks and tabs stay.
    """
    if text.isascii():
        return text
    return _SPACE.sub(" ", unicodedata.normalize("NFC", text))


def occurrences(text: str, part: str, *, ignore_case: bool = False) -> list[Occurrence]:
    """Return the places where a text has a part, in their order.

    Texts that a reader cannot tell apart are equal: composed and decomposed letters, and all kinds
    of spaces. The places are counted in the text as it is. They may overlap.

    Args:
        text: The text.
        part: What to look for.
        ignore_case: Whether capital and small letters are equal.
    """
    letters, places = _decomposed(text, ignore_case)
    wanted, _ = _decomposed(part, ignore_case)
    listed: list[Occurrence] = []
    at = letters.find(wanted) if wanted else -1
    while at >= 0:
        end = at + len(wanted)
        if _is_edge(letters, places, at) and _is_edge(letters, places, end):
            start, stop = min(places[at:end]), max(places[at:end]) + 1
            is_whole = not (_joins(text, start) or _joins(text, stop))
            listed.append(Occurrence(start, stop, is_whole))
        at = letters.find(wanted, at + 1)
    return listed


def _decomposed(text: str, ignore_case: bool) -> tuple[str, list[int]]:
    """A text in decomposed form with plain spaces, and the place in the text of each letter."""
    if text.isascii():
        return text.casefold() if ignore_case else text, list(range(len(text)))
    pairs: list[tuple[str, int]] = []
    marks: list[tuple[str, int]] = []
    for at, character in enumerate(text):
        folded = character.casefold() if ignore_case else character
        for letter in unicodedata.normalize("NFD", folded):
            if unicodedata.combining(letter):
                marks.append((letter, at))
                continue
            pairs += sorted(marks, key=lambda mark: unicodedata.combining(mark[0]))
            marks = []
            pairs.append((_SPACE.sub(" ", letter), at))
    pairs += sorted(marks, key=lambda mark: unicodedata.combining(mark[0]))
    return "".join(letter for letter, _ in pairs), [at for _, at in pairs]


def _is_edge(letters: str, places: list[int], at: int) -> bool:
    """Whether a character of the text begins at a letter, or the text ends."""
    if at in (0, len(letters)):
        return True
    return places[at] != places[at - 1] and not unicodedata.combining(letters[at])


def _joins(text: str, at: int) -> bool:
    """Whether one word holds the characters before and after a place."""
    if at in (0, len(text)):
        return False
    return all(
        (c.isalnum() or unicodedata.category(c).startswith("M")) and not APART.match(c)
        for c in text[at - 1 : at + 1]
    )
