"""Who answers the questions of records: a model in memory, or another, such as a server.

score(lm, records)                          # ModelAsker(lm) answers
score(ServedAsker(server, "m"), records)    # a server answers
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..core.progress import Progress
from ..model.answers import answer_tokens, is_answered
from ..model.language_model import LanguageModel
from .asking import Reply, ask
from .records import Question


class Asked(NamedTuple):
    """A prompt, and what may follow it."""

    prompt: str
    candidates: Sequence[str]
    """Targets whose likelihood is asked for."""
    lines: int
    """How many lines with text the answer has at most."""


class Asker(Protocol):
    """Answers prompts, and says how likely candidates are."""

    def tokens_for(self, questions: Iterable[Question]) -> int:
        """Return how many tokens to decode for questions: the longest right answer must fit."""

    def replies(
        self, asked: Sequence[Asked], n_tokens: int, progress: Progress | None = None
    ) -> list[Reply]:
        """Return a reply to each prompt, with answers of so many tokens at most.

        A reply has no log-probabilities where the asker knows none.
        """

    def says(self, prompt: str, answer: str, target: str) -> bool:
        """Return whether an answer to a prompt begins with a target."""


@dataclass(frozen=True)
class ModelAsker:
    """A model in memory.

    Attributes:
        lm: The model, edited or not.
    """

    lm: LanguageModel

    def tokens_for(self, questions: Iterable[Question]) -> int:
        """Return one token more than the longest right answer has, and at least 8."""
        pairs = [(question.prompt, answer) for question in questions for answer in question.answers]
        return answer_tokens(self.lm, [prompt for prompt, _ in pairs], [each for _, each in pairs])

    def replies(
        self, asked: Sequence[Asked], n_tokens: int, progress: Progress | None = None
    ) -> list[Reply]:
        """Return a reply to each prompt; see `ask`."""
        return ask(
            self.lm,
            [each.prompt for each in asked],
            [each.candidates for each in asked],
            max_new_tokens=n_tokens,
            lines=[each.lines for each in asked],
            progress=progress,
        )

    def says(self, prompt: str, answer: str, target: str) -> bool:
        """Return whether an answer begins with a target, or with its form in the tokenizer."""
        return is_answered(self.lm, prompt, answer, target)
