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


@dataclass(frozen=True)
class Asked:
    """What the facts in effect are answered.

    Attributes:
        proof: One check for each fact.
        lost: The checks of facts that do not hold, and held when they were kept.
        accepted: The checks of facts that do not hold, and did not hold either when they were kept:
            a gate let them pass, or they were forced.
        unknown: The checks of facts that do not hold, and of which no record says whether they did.
    """

    proof: Verification
    lost: tuple[Check, ...] = ()
    accepted: tuple[Check, ...] = ()
    unknown: tuple[Check, ...] = ()

    @property
    def in_words(self) -> str:
        """What was asked, and what does not hold."""
        checks = self.proof.checks
        if not checks:
            return "no fact is in effect, so none was asked"
        n_hold = sum(check.held for check in checks)
        if n_hold == len(checks):
            return f"{counted(n_hold, 'fact')} in effect asked, all hold"
        parts = [f"{n_hold:,} hold"]
        if self.lost:
            parts.append(f"{len(self.lost):,} lost: {said(self.lost)}")
        if self.accepted:
            parts.append(
                f"{len(self.accepted):,} did not hold when kept either: {said(self.accepted)}"
            )
        if self.unknown:
            parts.append(f"{len(self.unknown):,} do not hold: {said(self.unknown)}")
        return f"{counted(len(checks), 'fact')} in effect asked; {'; '.join(parts)}"


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
    return Asked(proof, lost, accepted, unknown)


def held_when_kept(revisions: Iterable[Revision]) -> dict[tuple[str, str, bool], bool]:
    """Return of every fact whether it held when it was last asked for a record.

    Args:
        revisions: The history, in any order; later revisions than the one that is checked out do
            not count.
    """
    held: dict[tuple[str, str, bool], bool] = {}
    for revision in sorted(revisions, key=lambda each: each.number):
        if revision.state != "later":
            for check in Verification.from_dict(revision.report).checks:
                if check.role in ("prompt", "earlier"):
                    held[_key(check)] = check.held
    return held


def said(checks: Sequence[Check], most: int = 3) -> str:
    """Return the first few checks in words."""
    words = "; ".join(check.in_words for check in checks[:most])
    return words if len(checks) <= most else f"{words}; and {len(checks) - most:,} more"


def _key(check: Check) -> tuple[str, str, bool]:
    return check.prompt, check.wanted, check.forget
