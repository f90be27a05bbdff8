"""A served model that answers questions, as a model in memory does.

asker = ServedAsker(server, "capitals", base=server.base)
score(asker, suite.records)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..core.gap import Settled
from ..core.progress import Progress, Tally
from ..model.matching import begins_with
from ..remote.replies import TargetScore
from ..remote.server import Server
from .asker import Asked, Asker
from .asking import Reply
from .records import Question

_LEAST, _MOST = 8, 64
"""Tokens of an answer, at least and at most, where the server does not count tokens."""

_COUNTED = 32
"""How many of the longest answers are counted in tokens."""

_AFTER_NUMBER = 4
"""Tokens after a target that show whether its number goes on."""


@dataclass
class ServedAsker(Asker):
    """A served model that answers.

    Attributes:
        server: The server.
        model: The model's name.
        base: The name of the base model, which decides about gaps.
        gaps: {(prompt, target): gap}. The askers of all models share it.
    """

    server: Server
    model: str
    base: str
    gaps: dict[tuple[str, str], Settled] = field(default_factory=dict)

    def tokens_for(self, questions: Iterable[Question]) -> int:
        """Return one token more than the longest right answer has, and at least 8."""
        return self.tokens_of(each for question in questions for each in question.answers)

    def tokens_of(self, targets: Iterable[str]) -> int:
        """Return how many tokens to decode so that any of some targets fits."""
        texts = sorted({text.strip() for text in targets} - {""}, key=lambda t: -len(t.encode()))
        longest = texts[:_COUNTED]
        counts = self.server.n_tokens([f" {text}" for text in longest])
        if counts is None:  # a token is two bytes or longer, nearly always
            counts = [min(_MOST, math.ceil(len(text.encode()) / 2)) for text in longest]
        pairs = zip(longest, counts, strict=True)
        return max([_LEAST, *(n + (_AFTER_NUMBER if t[-1].isdigit() else 1) for t, n in pairs)])

    def replies(
        self, asked: Sequence[Asked], n_tokens: int, progress: Progress | None = None
    ) -> list[Reply]:
        """Return a reply to each prompt, with log-probabilities where the server gives them.

        Args:
            asked: The prompts.
            n_tokens: Length of the answers in tokens.
            progress: Gets the number of prompts that are done.

        Raises:
            ServerError: The server cannot be reached, refuses, or gives no answer.
        """
        tally = Tally(progress, "asking", 2 * len(asked))
        said = self.server.complete(
            self.model,
            [each.prompt for each in asked],
            n_tokens=n_tokens,
            lines=[each.lines for each in asked],
            progress=share_of(tally, len(asked)),
        )
        pairs = list(dict.fromkeys((one.prompt, each) for one in asked for each in one.candidates))
        scores: dict[tuple[str, str], TargetScore | None] = {}
        rest = share_of(tally, len(asked))
        if pairs and self.server.gives_log_probs is not False:
            heads, tails = [p for p, _ in pairs], [c for _, c in pairs]
            gaps = self._gaps_of(pairs)
            numbers = self.server.scores(self.model, heads, tails, gaps=gaps, progress=rest)
            scores = dict(zip(pairs, numbers, strict=True))
        rest("asking", 1, 1)
        return [
            _reply(answer.text, [scores.get((one.prompt, each)) for each in one.candidates])
            for one, answer in zip(asked, said, strict=True)
        ]

    def says(self, prompt: str, answer: str, target: str) -> bool:
        """Return whether an answer begins with a target."""
        return begins_with(answer, target)

    def _gaps_of(self, pairs: Sequence[tuple[str, str]]) -> list[Settled]:
        """Return the gap of each pair: decided once, by the base model."""
        new = [pair for pair in pairs if pair not in self.gaps]
        if new:
            heads, tails = [p for p, _ in new], [t for _, t in new]
            settled = self.server.gaps(self.base, heads, tails)
            self.gaps.update(zip(new, settled, strict=True))
        return [self.gaps[pair] for pair in pairs]


def _reply(answer: str, scores: Sequence[TargetScore | None]) -> Reply:
    """Return the reply to a prompt. It has no numbers unless each candidate has one."""
    known = [each for each in scores if each is not None]
    if len(known) < len(scores):
        known = []
    right = [each.right for each in known if each.right is not None]
    return Reply(
        answer=answer,
        log_probs=tuple(each.log_prob / each.n_tokens for each in known),
        right=tuple(right) if len(right) == len(known) else (),
        n_tokens=tuple(each.n_tokens for each in known),
    )


def share_of(tally: Tally, size: int) -> Progress:
    """Return what takes reports of any step, and reports that share of a part of a whole."""
    report = tally.part(size)

    def take(_: str, done: int, total: int | None) -> None:
        report(size * done // total if total else 0)

    return take
