"""What counts as an answer: what a model says, whether it begins with a target, and with what
probability.

said = say(lm, prompts, targets)                # greedy answers, long enough for the targets
begins_with(said[0].text, targets[0])           # as whole words; `matching` defines it
probabilities(lm, prompts, targets)             # p(target | prompt) of each pair
probabilities(lm, prompts, [said[0].begin("French")])   # the same from the tokens that were said
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..core.errors import NumericsError
from ..core.gap import Gap
from .language_model import AFTER_NUMBER, ANSWER_TOKENS, LanguageModel
from .matching import (
    as_said,
    begins_with,
    first_phrase,
    is_answered,
    n_lines,
    states,
    stayed,
)
from .tokens import target_ids

__all__ = [
    "Said",
    "answer_tokens",
    "as_said",
    "begins_with",
    "first_phrase",
    "is_answered",
    "n_lines",
    "probabilities",
    "say",
    "states",
    "stayed",
]


_WHOLE, _FEW_WORDS = 32, 2
"""Tokens of an answer that would be cut inside its first phrase, and the words of such a phrase.
With more words, answers with the same beginning are seldom different names."""


@dataclass(frozen=True)
class Said:
    """A greedy answer.

    Attributes:
        text: The answer, without white space around it.
        ids: The tokens that were said.
        decode: Turns tokens into an answer.
    """

    text: str
    ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str] = field(repr=False, compare=False)

    def begin(self, phrase: str) -> tuple[int, ...]:
        """Return the first tokens that were said, as many as a phrase takes; at most all."""
        for n in range(1, len(self.ids)):
            if begins_with(self.decode(self.ids[:n]), phrase):
                return self.ids[:n]
        return self.ids


def say(
    lm: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    n_tokens: int | None = None,
    whole: Sequence[bool] | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Said]:
    """Return the greedy answer to each prompt, with as many lines as its target.

    Args:
        lm: The model.
        prompts: The prompts.
        targets: For each prompt, what may be answered; "" if nothing is expected.
        n_tokens: The most tokens of an answer. None: as many as `answer_tokens` gives.
        whole: For each prompt, whether an answer of one or two words that would be cut inside its
            first phrase goes on, up to 32 tokens. Some tokenizers spell long names, or all words of
            another script, letter by letter. None: no answer does.
        progress: Called with the number of prompts that are answered.

    Raises:
        InputError: A prompt is too long.
    """
    if n_tokens is None:
        n_tokens = answer_tokens(lm, prompts, targets)
    lines = [n_lines(target) for target in targets]
    heads = [lm.prompt_ids(prompt) for prompt in prompts]
    new = lm.greedy_ids(heads, n_tokens, lines, progress=progress)
    cut = [
        i
        for i, wanted in enumerate(whole or ())
        if wanted
        and len(new[i]) == n_tokens < _WHOLE
        and _is_cut(lm.as_answer(new[i], lines[i]), targets[i])
    ]
    if cut:
        longer = lm.greedy_ids([heads[i] for i in cut], _WHOLE, [lines[i] for i in cut])
        for i, ids in zip(cut, longer, strict=True):
            new[i] = ids

    def decoding(n: int) -> Callable[[Sequence[int]], str]:
        return lambda ids: lm.as_answer(ids, n)

    return [
        Said(lm.as_answer(ids, n), tuple(ids), decoding(n))
        for ids, n in zip(new, lines, strict=True)
    ]


def _is_cut(answer: str, target: str) -> bool:
    """Return whether an answer may end inside a name of few words."""
    short = len(answer.split()) <= _FEW_WORDS and first_phrase(answer) == answer
    return short and not begins_with(answer, target)


def answer_tokens(lm: LanguageModel, prompts: Sequence[str], wanted: Sequence[str]) -> int:
    """Return how many tokens to decode.

    The longest target must fit. One more token shows where it ends, and a few more where a number
    ends.
    """
    asked = [pair for pair in zip(prompts, wanted, strict=True) if pair[1].strip()]
    gaps = lm.gaps([prompt for prompt, _ in asked], [target for _, target in asked])
    lengths = (
        len(target_ids(lm, *pair, gap=gap)) + (AFTER_NUMBER if pair[1].strip()[-1].isdigit() else 1)
        for pair, gap in zip(asked, gaps, strict=True)
    )
    return max(ANSWER_TOKENS, *lengths, 0)


def probabilities(
    lm: LanguageModel,
    prompts: Sequence[str],
    tails: Sequence[str | Sequence[int]],
    gaps: Sequence[Gap] | None = None,
) -> list[float | None]:
    """Return p(tail | prompt) of each pair; None where the tail is empty.

    Args:
        lm: The model.
        prompts: The prompts.
        tails: For each prompt, a target, or the tokens that were said.
        gaps: As for `LanguageModel.log_prob`.

    Raises:
        NumericsError: A probability is not a number.
    """
    asked = [i for i, tail in enumerate(tails) if (tail.strip() if isinstance(tail, str) else tail)]
    result: list[float | None] = [None] * len(prompts)
    if asked:
        logs = lm.log_prob_tokens(
            [prompts[i] for i in asked],
            [tails[i] for i in asked],
            gaps=None if gaps is None else [gaps[i] for i in asked],
        ).tolist()
        for i, log in zip(asked, logs, strict=True):
            if math.isnan(log):
                raise NumericsError(
                    f"the probability of {_text(lm, tails[i])!r} after {prompts[i]!r} is NaN: the "
                    "model's states are not finite. Load it in a wider dtype, or undo the last "
                    "change"
                )
            result[i] = math.exp(log)
    return result


def _text(lm: LanguageModel, tail: str | Sequence[int]) -> str:
    return tail if isinstance(tail, str) else lm.as_answer(tail)
