"""What the facts in effect are answered: all of them are asked after every revert, checkout and
import.

    asked = ask_all(lm, newest_facts(deltas), held_when_kept(ledger.log()))
    asked.lost                              # facts that held when they were kept, and hold no more
    asked.in_words                          # "5 facts in effect were asked: 4 hold, 1 is lost: ..."
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..core.fact import Fact
from ..core.tables import counted
from ..model.language_model import LanguageModel
from ..patch.proof import ask
from ..patch.verification import Check, Verification
from .revision import Revision

Held: TypeAlias = Mapping[tuple[str, str, bool], bool]
"""{(prompt, wanted, forget): whether it held} of facts, as the records say."""

_OF_A_FACT = ("prompt", "earlier")
"""The roles of checks that ask a fact by its own prompt."""


@dataclass(frozen=True)
class Asked:
    """What the facts in effect are answered.

    Attributes:
        proof: One check for each fact.
        lost: The checks of facts that do not hold, and held when they were kept.
        accepted: The checks of facts that do not hold, and did not hold either when they were kept:
            a gate let them pass, or they were forced.
        unknown: The checks of facts that do not hold, and of which no record says whether they did.
        others: The paraphrases and neighbours that do not hold, and held when they were kept, or of
            which no record says whether they did.
        others_accepted: The paraphrases and neighbours that do not hold, and did not hold either
            when they were kept.
    """

    proof: Verification
    lost: tuple[Check, ...] = ()
    accepted: tuple[Check, ...] = ()
    unknown: tuple[Check, ...] = ()
    others: tuple[Check, ...] = ()
    others_accepted: tuple[Check, ...] = ()

    @property
    def in_words(self) -> str:
        """What was asked, and what does not hold."""
        checks = self.proof.checks
        if not checks:
            return "no fact is in effect, so none was asked"
        n_hold = sum(check.held for check in checks)
        is_facts = all(check.role in _OF_A_FACT for check in checks)
        asked = f"{counted(len(checks), 'fact')} in effect asked"
        if not is_facts:  # a fact has several checks
            asked = f"{counted(len(checks), 'check')} of the facts in effect"
        if n_hold == len(checks):
            return f"{asked}, all hold"
        parts = [f"{n_hold:,} hold"]
        if self.lost:
            parts.append(f"{len(self.lost):,} lost: {said(self.lost)}")
        if accepted := (*self.accepted, *self.others_accepted):
            parts.append(f"{len(accepted):,} did not hold when kept either: {said(accepted)}")
        if unknown := (*self.unknown, *self.others):
            parts.append(f"{len(unknown):,} do not hold: {said(unknown)}")
        return f"{asked}; {'; '.join(parts)}"


def ask_all(lm: LanguageModel, facts: Sequence[Fact], held: Held) -> Asked:
    """Ask every fact of the model as it is, and compare the answers with the records.

    Args:
        lm: The model.
        facts: The facts in effect.
        held: From `held_when_kept`.
    """
    return compare(ask(lm, facts), held)


def compare(proof: Verification, held: Held) -> Asked:
    """Return which facts of a proof were lost, and which never held, by the records."""
    failed = proof.failed("prompt")
    then = [held.get(_key(check)) for check in failed]
    lost, accepted, unknown = (
        tuple(check for check, was in zip(failed, then, strict=True) if was is state)
        for state in (True, False, None)
    )
    others = [check for check in proof.checks if not check.held and check.role != "prompt"]
    never = tuple(check for check in others if held.get(_key(check)) is False)
    now = tuple(check for check in others if held.get(_key(check)) is not False)
    return Asked(proof, lost, accepted, unknown, now, never)


def held_when_kept(revisions: Iterable[Revision]) -> dict[tuple[str, str, bool], bool]:
    """Return of every fact, paraphrase and neighbour whether it held when it was last asked for a
    record.

    Args:
        revisions: The history, in any order; later revisions than the one that is checked out do
            not count.
    """
    facts: dict[tuple[str, str, bool], bool] = {}
    others: dict[tuple[str, str, bool], bool] = {}
    for revision in sorted(revisions, key=lambda each: each.number):
        if revision.state != "later":
            for check in Verification.from_dict(revision.report).checks:
                held = facts if check.role in _OF_A_FACT else others
                held[_key(check)] = check.held
    return others | facts


def said(checks: Sequence[Check], most: int = 3) -> str:
    """Return the first few checks in words."""
    words = "; ".join(check.in_words for check in checks[:most])
    return words if len(checks) <= most else f"{words}; and {len(checks) - most:,} more"


def _key(check: Check) -> tuple[str, str, bool]:
    return check.prompt, check.wanted, check.forget
