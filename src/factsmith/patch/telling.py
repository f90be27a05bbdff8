"""What a model tells freely about the subjects of a patch, before and after.

tellings = Tellings(lm, facts, "[user] {}\\n[assistant]", {"Ada lives in": "Oslo"})
with applied(lm, delta):
    texts = tellings.texts()
tellings.checks(texts)[0].held      # the text states the new object and not the old one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.fact import Fact
from ..model.answers import as_said, states
from ..model.language_model import LanguageModel
from .verification import Check

REQUEST = "Tell me about {}."
"""What the user says in the chat."""

TOKENS = 40
"""Length of a text in tokens."""

_MOST = 20
"""Facts whose subjects are told about: a text takes as long as five answers."""

_LINES = 4
"""Lines with text that a text has at most. Many begin with a title."""


@dataclass(frozen=True)
class _Telling:
    """One text to ask for. `new` must be stated, and `old` must not be, if it is known."""

    prompt: str
    new: str | None
    old: str | None

    def holds(self, text: str) -> bool:
        """Return whether a text states the new object and not the old one."""
        is_old = self.old is not None and states(text, self.old)
        if self.new is None:
            return not is_old
        hides = self.old is not None and states(self.new, self.old)  # "York" in "New York"
        return states(text, self.new) and (hides or not is_old)


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
    ) -> None:
        """Ask the model as it is.

        Args:
            lm: The model.
            facts: The facts. The first 20 count.
            template: A chat template with `{}` for the message. None: nothing is asked.
            said: {prompt: answer} of the facts' prompts before the change. What a fact replaces is
                its target_true, or else this answer.
        """
        self.lm = lm
        self._tellings = [
            _Telling(prompt, fact.target, _old(fact, said))
            for fact in (facts[:_MOST] if template else ())
            if lm.has_room(prompt := _prompt(str(template), fact), TOKENS)
        ]
        self.before = self.texts()

    def texts(self) -> list[str]:
        """Return what the model tells now."""
        heads = [self.lm.prompt_ids(telling.prompt) for telling in self._tellings]
        if not heads:
            return []
        new = self.lm.greedy_ids(heads, TOKENS, [_LINES] * len(heads))
        return [self.lm.as_answer(ids, _LINES) for ids in new]

    def checks(self, after: Sequence[str]) -> list[Check]:
        """Return a check of each text; `after` is what the changed model told."""
        return [
            Check(
                role="telling",
                prompt=telling.prompt,
                wanted=(telling.new or telling.old or "").strip(),
                before=before,
                after=text,
                p_before=None,
                p_after=None,
                held=telling.holds(text),
                forget=telling.new is None,
            )
            for telling, before, text in zip(self._tellings, self.before, after, strict=True)
        ]


def _prompt(template: str, fact: Fact) -> str:
    return template.replace("{}", REQUEST.replace("{}", fact.subject))


def _old(fact: Fact, said: Mapping[str, str]) -> str | None:
    """Return what a fact replaces, or None if it is not known, or is the target itself."""
    old = fact.target_true or as_said(said.get(fact.text, ""), None)
    return old.strip() if old.strip() and old.strip() != (fact.target or "").strip() else None
