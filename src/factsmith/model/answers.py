"""model.answers."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from ..core.errors import NumericsError
from .language_model import LanguageModel
from .tokens import target_ids

_ANSWER_TOKENS = 8


def begins_with(answer: str, target: str) -> bool:
    """Whether a greedy answer begins with a target, as whole words: "French." begins with "French", "Frenchman" does not.

    However letters are composed and white space is written; "1,000" does not begin with "1". Scripts that write no spaces have no such
    boundary, so there the beginning is enough, but for marks that belong to the last letter.
    """
    answer, target = (
        " ".join(unicodedata.normalize("NFC", text).split()) for text in (answer, target)
    )
    if not target or not answer.startswith(target):
        return False
    following = answer[len(target) :]
    if target[-1].isdigit() and re.match(r"[.,]\d", following):
        return False
    mark = following[:1] and unicodedata.category(following[0]).startswith("M")
    return not (following and (mark or (_spaced(target[-1]) and _spaced(following[0]))))


def first_phrase(answer: str) -> str:
    """What an answer says before it goes on: up to the first punctuation."""
    return (
        re.split(r"[.,;:!?()\[\]\n。、,]", answer.strip(), maxsplit=1)[0].strip() or answer.strip()
    )


def as_said(answer: str, expected: str | None) -> str:
    """What was expected, where the answer begins with it; else what the answer says."""
    return (
        expected if expected is not None and begins_with(answer, expected) else first_phrase(answer)
    )


def answer_tokens(lm: LanguageModel, prompts: Sequence[str], wanted: Sequence[str]) -> int:
    """How many tokens to decode so that the longest target fits, and one more to see where it ends."""
    lengths = (
        len(target_ids(lm.tokenizer, prompt, target))
        for prompt, target in zip(prompts, wanted, strict=True)
        if target.strip()
    )
    return max(_ANSWER_TOKENS, *(length + 1 for length in lengths), 0)


def probabilities(
    lm: LanguageModel, prompts: Sequence[str], targets: Sequence[str]
) -> list[float | None]:
    """p(target | prompt) of each pair; None where the target is empty. Raises NumericsError when one is not a number."""
    asked = [i for i, target in enumerate(targets) if target.strip()]
    found: list[float | None] = [None] * len(prompts)
    if asked:
        logs = lm.log_prob([prompts[i] for i in asked], [targets[i] for i in asked]).tolist()
        for i, log in zip(asked, logs, strict=True):
            if math.isnan(log):
                raise NumericsError(
                    f"the model gives NaN as probability of {targets[i]!r} after {prompts[i]!r}; it does not compute finite states"
                )
            found[i] = math.exp(log)
    return found


def _spaced(character: str) -> bool:
    """A digit or a letter with case, or a mark on one: the scripts with spaces between words."""
    return unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lm", "Mn", "Nd")
