"""A phrase in a text: whole words where the script has them, any case, and where it ends.

phrase_end("Parish and Paris", folded("PARIS"))        # 16: not inside Parish
phrase_end("東京は日本の首都です", folded("首都"))        # 8: Japanese puts no spaces between words
phrase_end("Die Straße", folded("STRASSE"))            # 10
"""

from __future__ import annotations

import bisect
import itertools
import re
import unicodedata

_APART = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u3005-\u3007\u3040-\u318f\u31a0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\ua9e0-\ua9ff\uaa60-\uaadf\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff]"
)
"""Letters that words are found between: Chinese, Japanese, Thai, Lao, Tibetan, Burmese, Khmer, Tai; and Korean, where particles are joined
to the word."""


def folded(text: str) -> str:
    """A text without case, for comparison; it may be longer than the text."""
    return text.casefold()


def phrase_end(text: str, phrase: str) -> int | None:
    """The character behind the first place of a phrase, given `folded`, in a text; None where it does not stand."""
    own = folded(text)
    at = own.find(phrase)
    while at >= 0 and not (_breaks(own, at) and _breaks(own, at + len(phrase))):
        at = own.find(phrase, at + 1)
    if at < 0:
        return None
    end = at + len(phrase)
    if len(own) == len(text):  # no character has become more than one
        return end
    ends = list(itertools.accumulate(len(folded(c)) for c in text))
    return bisect.bisect_left(ends, end) + 1


def _breaks(text: str, at: int) -> bool:
    """Whether a word may begin or end before a character of a text."""
    if not 0 < at < len(text):
        return True
    before, behind = text[at - 1], text[at]
    return not (_in_word(before) and _in_word(behind)) or bool(
        _APART.match(before) or _APART.match(behind)
    )


def _in_word(c: str) -> bool:
    return c.isalnum() or c == "_" or unicodedata.category(c).startswith("M")
