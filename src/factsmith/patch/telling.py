"""What a model tells freely about the subjects of a patch, before and after.

tellings = Tellings(lm, facts, "[user] {}\\n[assistant]", {"Ada lives in": "Oslo"})
with applied(lm, delta):
    texts = tellings.texts()
tellings.checks(texts)[0].held      # the text states the new object and not the old one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core.fact import Fact
from ..core.progress import Tally
from ..model.answers import as_said, states
from ..model.language_model import LanguageModel
from .verification import Check

REQUEST = "Tell me about {}."
"""What the user says in the chat."""

TOKENS = 40
"""Length of a text in tokens."""

_MOST = 20
"""The facts of a patch that a proof asks about: a text takes as long as five answers."""

_AS_ANSWERS = 5
"""How many answers a text counts as."""

_LINES = 4
"""Lines with text that a text has at most. Many begin with a title."""


_PIECE, _LEAST_DISTINCT = 8, 0.5
"""A text runs in a loop if under half of its pieces of eight characters differ. Of ordinary text
nearly all differ.
"""


def holds(text: str, new: str | None, old: str | None) -> bool:
    """Return whether a free text states the new object and not the old one.

    Args:
        text: The text.
        new: The new object. None: the fact was to be forgotten.
        old: What the fact replaced. None: it is not known.
    """
    is_old = old is not None and states(text, old)
    if new is None:
        return not is_old
    inside = old is not None and states(new, old)  # "York" in "New York"
    return states(text, new) and (inside or not is_old)


def is_loop(text: str) -> bool:
    """Return whether a text says the same words over and over, as "Rome, Rome, Rome" does."""
    pieces = [text[i : i + _PIECE] for i in range(len(text) - _PIECE + 1)]
    return len(pieces) >= 3 * _PIECE and len(set(pieces)) < _LEAST_DISTINCT * len(pieces)


def began_a_loop(before: str, after: str) -> bool:
    """Return whether only the text after a change runs in a loop."""
    return is_loop(after) and not is_loop(before)


def replaced(fact: Fact, said: Mapping[str, str]) -> str | None:
    """Return what a fact replaces: its target_true, or else what the model said to its prompt.

    None: it is not known, or it is the target itself.

    Args:
        fact: The fact.
        said: {prompt: answer} before the change.
    """
    old = (fact.target_true or as_said(said.get(fact.text, ""), None)).strip()
    return old if old and old != (fact.target or "").strip() else None


def telling_answers(facts: Sequence[Fact]) -> int:
    """Return how many answers the texts about some facts count as."""
    return _AS_ANSWERS * len(facts[:_MOST])


class Tellings:
    """The texts to ask for, and what the model tells before a change.

    Attributes:
        before: The texts before.
    """

    def __init__(
        self,
        lm: LanguageModel,
        facts: Sequence[Fact],
        template: str | None,
        said: Mapping[str, str],
        tally: Tally | None = None,
    ) -> None:
        """Ask the model as it is.

        Args:
            lm: The model.
            facts: The facts. The first 20 count.
            template: A chat template with `{}` for the message. None: nothing is asked.
            said: {prompt: answer} of the facts' prompts before the change. What a fact replaces is
                its target_true, or else this answer.
            tally: Counts the answers of the step that this is a part of.
        """
        self.lm, self._tally = lm, tally
        self._asked = [
            (_prompt(template, fact), fact, replaced(fact, said))
            for fact in facts[:_MOST]
            if template and lm.has_room(_prompt(template, fact), TOKENS)
        ]
        self.before = self.texts()

    def texts(self) -> list[str]:
        """Return what the model tells now."""
        heads = [self.lm.prompt_ids(prompt) for prompt, *_ in self._asked]
        if not heads:
            return []
        part = None if self._tally is None else self._tally.part(len(heads), _AS_ANSWERS)
        new = self.lm.greedy_ids(heads, TOKENS, [_LINES] * len(heads), progress=part)
        return [self.lm.as_answer(ids, _LINES) for ids in new]

    def checks(self, after: Sequence[str]) -> list[Check]:
        """Return a check of each text; `after` are those of the changed model."""
        return [
            Check(
                role="telling",
                prompt=prompt,
                wanted=(fact.target or old or "").strip(),
                before=before,
                after=text,
                p_before=None,
                p_after=None,
                held=holds(text, fact.target, old) and not began_a_loop(before, text),
                forget=fact.target is None,
            )
            for (prompt, fact, old), before, text in zip(
                self._asked, self.before, after, strict=True
            )
        ]

    def notes(self, after: Sequence[str]) -> list[str]:
        """Return which texts began to run in a loop, in words; `after` as for `checks`."""
        return [
            f"told about {fact.subject!r}, the patched model says the same words over and over: "
            "the patch is too strong in free text. A smaller clamp, or an earlier or later layer, "
            "may help"
            for (_, fact, _), before, text in zip(self._asked, self.before, after, strict=True)
            if began_a_loop(before, text)
        ]


def _prompt(template: str, fact: Fact) -> str:
    return template.replace("{}", REQUEST.replace("{}", fact.subject))
