"""What counts as an answer: whether an answer begins with a target, and with what probability.

begins_with("French.", "French")            # True; "Frenchman" does not begin with "French"
first_phrase("French, of course")           # "French"
answer_tokens(lm, prompts, targets)         # how many tokens to decode
probabilities(lm, prompts, targets)         # p(target | prompt) of each pair
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from ..core.errors import NumericsError
from ..core.gap import Gap
from .language_model import LanguageModel
from .tokens import target_ids

_ANSWER_TOKENS = 8
"""Tokens that are decoded at least."""


def begins_with(answer: str, target: str) -> bool:
    """Return whether a greedy answer begins with a target, as whole words.

    "French." begins with "French", and "Frenchman" does not. "1,000" does not begin with "1". It
    does not matter how letters are composed, and how white space is written. In scripts without
    spaces there is no boundary between words. There the beginning is enough, unless a mark follows
    that belongs to the last letter.
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
    """Return what an answer says up to its first punctuation."""
    return (
        re.split(r"[.,;:!?()\[\]\n。、,]", answer.strip(), maxsplit=1)[0].strip() or answer.strip()
    )


def as_said(answer: str, expected: str | None) -> str:
    """Return `expected` if the answer begins with it, and otherwise what the answer says."""
    return (
        expected if expected is not None and begins_with(answer, expected) else first_phrase(answer)
    )


def answer_tokens(lm: LanguageModel, prompts: Sequence[str], wanted: Sequence[str]) -> int:
    """Return how many tokens to decode.

    The longest target must fit, and one more token shows where it ends.
    """
    asked = [pair for pair in zip(prompts, wanted, strict=True) if pair[1].strip()]
    gaps = lm.gaps([prompt for prompt, _ in asked], [target for _, target in asked])
    lengths = (len(target_ids(lm, *pair, gap=gap)) for pair, gap in zip(asked, gaps, strict=True))
    return max(_ANSWER_TOKENS, *(length + 1 for length in lengths), 0)


def probabilities(
    lm: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[str],
    gaps: Sequence[Gap] | None = None,
) -> list[float | None]:
    """Return p(target | prompt) of each pair; None where the target is empty.

    Args:
        lm: The model.
        prompts: The prompts.
        targets: As many targets.
        gaps: As for `LanguageModel.log_prob`.

    Raises:
        NumericsError: A probability is not a number.
    """
    asked = [i for i, target in enumerate(targets) if target.strip()]
    result: list[float | None] = [None] * len(prompts)
    if asked:
        logs = lm.log_prob(
            [prompts[i] for i in asked],
            [targets[i] for i in asked],
            gaps=None if gaps is None else [gaps[i] for i in asked],
        ).tolist()
        for i, log in zip(asked, logs, strict=True):
            if math.isnan(log):
                raise NumericsError(
                    f"the probability of {targets[i]!r} after {prompts[i]!r} is NaN: the model's "
                    "states are not finite. Load it in a wider dtype, or undo the last change"
                )
            result[i] = math.exp(log)
    return result


def _spaced(character: str) -> bool:
    """Return whether a character is of a script with spaces between words.

    That is a digit, a letter with case, or a mark on one.
    """
    return unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lm", "Mn", "Nd")
