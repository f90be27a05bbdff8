"""The subject of a prompt: its characters in the text, and its token columns.

prompt = fact_prompt(fact)                  # a fact says where its subject is
prompt.text, prompt.start, prompt.stop
fact_span(lm, fact)                         # columns [start, stop)
read_prompt("The maker of {} is", "Fiat 127")
read_prompt("Iran, or Persia: in Iran the money is called", "Iran", occurrence=2)
subject_span(lm, text, "Danielle Darrieux") # a search, where there is no slot
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.checks import check_count, check_text
from ..core.errors import InputError, SubjectError
from ..core.fact import Fact
from ..core.forms import Occurrence, occurrences
from ..core.slots import Filled, count_slots, fill, literal
from .tokens import encode_prompt

_SHOWN = 5
"""Places that a message lists."""

_CONTEXT = 20
"""Characters that a message shows before and after a place."""


def fact_prompt(fact: Fact) -> Filled:
    """Return a fact's prompt with its subject, and where the subject is."""
    return fill(fact.prompt, fact.subject)


def read_prompt(prompt: str, subject: str, *, occurrence: int | None = None) -> Filled:
    """Return the text of a prompt, and where its subject is.

    Args:
        prompt: A template with one slot `{}`, or a text that has the subject.
        subject: The subject.
        occurrence: For a text: which occurrence of the subject is meant, counted from 1. None: the
            only one, or the only one that is a whole word.

    Raises:
        InputError: when one of the two is not text, or the prompt has several slots.
        SubjectError: when the subject is empty, is not in the text, or is there several times and
            `occurrence` does not say which one is meant.
    """
    prompt, subject = check_text(prompt, "the prompt"), check_text(subject, "the subject")
    if not subject.strip():
        raise SubjectError(
            f"the subject is empty; give a part of the prompt {prompt!r}", argument="subject"
        )
    n_slots = count_prompt_slots(prompt, subject)
    if n_slots > 1:
        raise InputError(
            f"{prompt!r} has {n_slots} slots {{}}. Give one, in the subject's place. "
            "Write {{}} for each {} that is no slot.",
            argument="prompt",
        )
    if not n_slots:
        text = literal(prompt)
        return Filled(text, *find_subject(text, subject, occurrence=occurrence))
    if occurrence is not None:
        raise SubjectError(
            f"occurrence is {occurrence}, and {prompt!r} has a slot {{}}, which says where the "
            "subject is; leave one out",
            argument="occurrence",
        )
    return fill(prompt, subject.strip())


def count_prompt_slots(prompt: str, subject: str) -> int:
    """Return how many slots a prompt has that may also be a text with the subject.

    A text that names the subject has no slot in a `{{}}`, and neither has one without a subject.
    """
    if "{{}}" in prompt and prompt.count("{}") == 1:
        return 0 if not subject.strip() or occurrences(prompt, subject.strip()) else 1
    return count_slots(prompt)


def find_subject(text: str, subject: str, *, occurrence: int | None = None) -> tuple[int, int]:
    """Return the characters [start, stop) of the subject in a text.

    Where the text has the subject several times, the only whole word is meant.

    Args:
        text: The text.
        subject: The subject. Its accents and spaces may have another Unicode form than the text's.
        occurrence: Which one is meant, counted from 1 in the order of the text.

    Raises:
        SubjectError: The subject is not in the text, or it is not clear which one is meant.
    """
    places = occurrences(text, subject.strip())
    if not places:
        raise SubjectError(_absent(text, subject.strip()), argument="subject")
    if occurrence is not None:
        number = check_count(occurrence, "occurrence", "a number counted from 1")
        if number > len(places):
            raise SubjectError(
                f"occurrence is {number}, and the prompt has the subject {subject!r} "
                f"{_times(len(places))}: {_listed(text, places)}",
                argument="occurrence",
            )
        return places[number - 1][:2]
    candidates = [place for place in places if place.is_whole] or places
    if len(candidates) > 1:
        raise SubjectError(
            f"subject {subject!r} occurs more than once in the prompt {text!r}: "
            f"{_listed(text, places)}. "
            "Say which one is meant by its number (occurrence), or write {} in its place",
            argument="occurrence",
        )
    return candidates[0][:2]


def subject_span(
    lm_or_tokenizer: Any, text: str, subject: str, *, occurrence: int | None = None
) -> tuple[int, int]:
    """Return the token columns [start, stop) of the subject in the tokenized text.

    A token that reaches over the subject's edge belongs to the subject.

    Raises:
        SubjectError: The subject is empty, or `find_subject` does not find it.
    """
    tokenizer = getattr(lm_or_tokenizer, "tokenizer", lm_or_tokenizer)
    if not check_text(subject, "the subject").strip():
        raise SubjectError(f"the subject is empty; give a part of the prompt {text!r}")
    start, stop = find_subject(text, subject, occurrence=occurrence)
    return token_span(encode_prompt(tokenizer, text)[1], Filled(text, start, stop))


def fact_span(lm_or_tokenizer: Any, fact: Fact) -> tuple[int, int]:
    """Return the token columns [start, stop) of a fact's subject in its text.

    Raises:
        SubjectError: The subject has no token.
    """
    tokenizer = getattr(lm_or_tokenizer, "tokenizer", lm_or_tokenizer)
    prompt = fact_prompt(fact)
    return token_span(encode_prompt(tokenizer, prompt.text)[1], prompt)


def token_span(offsets: Sequence[tuple[int, int]], prompt: Filled) -> tuple[int, int]:
    """Return the token columns [start, stop) of the subject of a prompt.

    Args:
        offsets: The characters [start, stop) of each token of the text.
        prompt: The text, and the characters of its subject.

    Raises:
        SubjectError: The subject has no token.
    """
    text, start, stop = prompt
    # A token without characters (BOS), or of white space alone, is never part of the subject.
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and text[a:b].strip()]
    if not inside:
        raise SubjectError(
            f"subject {text[start:stop]!r} in the prompt {text!r} has no token: the tokenizer "
            "drops its characters. Give a subject that the tokenizer can write",
            argument="subject",
        )
    return inside[0], inside[-1] + 1


def _absent(text: str, subject: str) -> str:
    """Say that a text does not have a subject, and what it has instead."""
    message = f"subject {subject!r} is not in the prompt {text!r}"
    if others := occurrences(text, subject, ignore_case=True):
        start, stop, _ = others[0]
        return f"{message}; the prompt has {text[start:stop]!r}: write it as the prompt does"
    return f"{message}; write it as the prompt does, or write {{}} in its place"


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def _listed(text: str, places: Sequence[Occurrence]) -> str:
    """The places of a subject with their numbers: `1: "In [Iran]ian history"`."""
    shown = []
    for number, (start, stop, _) in enumerate(places[:_SHOWN], 1):
        before, after = text[max(0, start - _CONTEXT) : start], text[stop : stop + _CONTEXT]
        shown.append(f"{number}: {f'{before}[{text[start:stop]}]{after}'!r}")
    more = f", and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return ", ".join(shown) + more
