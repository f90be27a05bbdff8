"""The gap between a prompt and the text that continues it: a space, or nothing.

    before_gap("The capital of France is ")        # "The capital of France is"
    plain_gap("The capital of France is", "Paris") # Rule("space", sure=True)
    plain_gap("法国的首都是", "巴黎")                # Rule("none", sure=True)
    plain_gap('{"capital": "', "Paris")            # Rule("none", sure=False): ask the model

Words of one text are parted by spaces in most scripts, and by nothing in some. After a bracket, a
quotation mark or a sign it depends on the text, so the model must say which form it expects.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

Gap: TypeAlias = Literal["auto", "space", "none"]
"""What stands between a prompt and its target. "auto": what the model itself goes on with."""

Settled: TypeAlias = Literal["space", "none"]
"""A gap that is decided."""

_UNSPACED = (
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
    "TIBETAN ",
    "JAVANESE ",
    "BALINESE ",
    "TAI ",
    "NEW TAI ",
    "HALFWIDTH KATAKANA ",
)
"""Beginnings of the names of characters in scripts without spaces between words. The wide scripts
of East Asia are known by their width."""

_CLOSING = frozenset(".,;:!?%)]}»”’'\"")
"""Marks that follow a word without a space."""

_ATTACHED = frozenset(".,;:!?%)]}»”’-/_")
"""Marks that go on with a word or a sentence."""

_QUOTES = frozenset("\"'`")
"""Marks that open and close alike."""


class Rule(NamedTuple):
    """What the two texts alone say about the gap between them.

    Attributes:
        gap: The gap that is usual.
        sure: Whether it is the gap in any text. False: the model decides, where there is one.
    """

    gap: Settled
    sure: bool


def before_gap(prompt: str) -> str:
    """Return a prompt without the spaces at its end.

    These spaces are the gap before the continuation. Most tokenizers write a space and the word
    after it as one token, so a model hardly ever meets a space alone. Line breaks and tabs stay,
    and so do spaces that indent a line, and a no-break space after an opening mark, as in French.
    """
    end = len(prompt)
    while end and unicodedata.category(prompt[end - 1]) == "Zs":
        end -= 1
    if not end or prompt[end - 1].isspace():
        return prompt
    typographic = prompt[end:].strip(" ") and unicodedata.category(prompt[end - 1]) in ("Ps", "Pi")
    return prompt if typographic else prompt[:end]


def gap_notes(prompts: Iterable[str]) -> tuple[str, ...]:
    """Return warnings about white space at the end of prompts.

    Spaces are not part of a prompt. A line break or a tab is, and it changes what the model says.
    """
    texts = list(dict.fromkeys(prompts))
    notes = []
    if spaced := [prompt for prompt in texts if before_gap(prompt) != prompt]:
        subject, verb, each = _named(spaced)
        notes.append(
            f"{subject} {verb} in white space. The space belongs to the answer, so {each} asked "
            "without the space."
        )
    if broken := [prompt for prompt in texts if prompt.strip() and prompt[-1] in "\n\r\t"]:
        subject, verb, each = _named(broken)
        notes.append(
            f"{subject} {verb} in a line break or a tab, and {each} asked with it. It changes the "
            "answer; remove it unless you mean it."
        )
    return tuple(notes)


def _named(prompts: list[str]) -> tuple[str, str, str]:
    """Return the subject, the verb and "it is" of a sentence about prompts."""
    if len(prompts) == 1:
        return repr(prompts[0]), "ends", "it is"
    return f"{len(prompts):,} prompts (the first: {prompts[0]!r})", "end", "they are"


def plain_gap(prompt: str, target: str) -> Rule:
    """Return the gap between a prompt and a target, as the two texts alone show it.

    Args:
        prompt: The prompt, without spaces at its end.
        target: The target, without white space around it.
    """
    if not prompt or prompt[-1].isspace():
        return Rule("none", True)
    last, first = _kind(prompt[-1]), _kind(target[0])
    if last == first == "spaced":
        # "in 19" may be continued with "45".
        return Rule("space", not (prompt[-1].isdigit() and target[0].isdigit()))
    if last == first == "unspaced":
        return Rule("none", not _parted(prompt))
    if "unspaced" in (last, first):
        return Rule("none", False)
    if first == "sign" and target[0] in _CLOSING and last != "sign":
        return Rule("none" if target[0] not in _QUOTES else "space", False)
    return Rule("none" if _opens(prompt) else "space", False)


def goes_on(prompt: str, text: str) -> bool:
    """Return whether a text is more of the prompt's last word or sentence, and no answer to it."""
    return bool(prompt and text) and prompt[-1].isalnum() and text[0] in _ATTACHED


def _opens(prompt: str) -> bool:
    """Return whether a prompt ends in an opening bracket or quotation mark."""
    last, before = prompt[-1], prompt[-2:-1]
    if last in _QUOTES:
        return not before or before.isspace() or before in "([{=:," or prompt.count(last) % 2 == 1
    return unicodedata.category(last) in ("Ps", "Pi")


def _parted(prompt: str) -> bool:
    """Return whether a space parts two letters of scripts that have no spaces between words."""
    at = (i for i, character in enumerate(prompt) if unicodedata.category(character) == "Zs")
    return any(
        0 < i < len(prompt) - 1 and _kind(prompt[i - 1]) == _kind(prompt[i + 1]) == "unspaced"
        for i in at
    )


@functools.lru_cache(maxsize=4096)
def _kind(character: str) -> Literal["spaced", "unspaced", "sign"]:
    """Return whether a character is a letter or digit of a script with or without spaces, or a
    sign.

    The signs of East Asia count as letters there, because no space follows them.
    """
    category, name = unicodedata.category(character), unicodedata.name(character, "")
    wide = unicodedata.east_asian_width(character) in "WF" and not name.startswith("HANGUL")
    if category[0] in "LMN":
        return "unspaced" if wide or name.startswith(_UNSPACED) else "spaced"
    return "unspaced" if wide and category[0] == "P" else "sign"
