"""The proof of a patch as a record: every check, and the shares of those that held.

    verification.efficacy, verification.specificity, verification.checks[0].after
    Verification.from_dict(revision.report)          # as a ledger keeps it

No model is needed to read one: `proof.prove` makes them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..core.tables import Shown, Table

Role: TypeAlias = Literal["prompt", "chat", "telling", "paraphrase", "neighbour", "earlier"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One prompt, asked before and after.

    Attributes:
        role: "prompt" or "paraphrase" of a fact that was written, its prompt in a "chat" template,
            a "telling" (a free text about its subject in a chat), a "neighbour" whose answer must
            stay, or the prompt of an "earlier" patch that must still hold.
        prompt: The whole text.
        wanted: What the answer must begin with afterwards; what it must not begin with, if the fact
            was to be forgotten.
        before: The greedy answer before.
        after: The greedy answer after.
        p_before: p(wanted) before. None: there is nothing to want, since the model ended the text
            at once.
        p_after: p(wanted) after.
        held: Whether `after` begins with `wanted`, by exact match; for a fact to be forgotten,
            whether it does not. In a chat it also holds, and a telling only holds, if the text
            states `wanted` anywhere, and not what the fact replaced.
        forget: Whether the fact was to be forgotten.
    """

    role: Role
    prompt: str
    wanted: str
    before: str
    after: str
    p_before: float | None
    p_after: float | None
    held: bool
    forget: bool = False

    @property
    def in_words(self) -> str:
        """What was answered after the prompt, and what was wanted: for messages about a check that
        failed.
        """
        return wrongly_answered(self.prompt, self.after, self.wanted, self.forget)


def wrongly_answered(prompt: str, answer: str, wanted: str, forget: bool) -> str:
    """Return what was answered after a prompt, and what was wanted, in words."""
    if forget:
        return f"{prompt!r} is still answered {answer!r}"
    return f"{prompt!r} is answered {answer!r}, not {wanted!r}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Verification(Shown):
    """The proof of a patch: every check, and the shares of those that held.

    Attributes:
        checks: The checks.
        notes: What was not asked, and why, in words.
    """

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def efficacy(self) -> float | None:
        """Share of the written prompts that are answered with the target.

        None: nothing was asked.
        """
        return self._share("prompt")

    @property
    def chat(self) -> float | None:
        """The same, with the prompts in a chat: alone, after a system prompt, in a second turn."""
        return self._share("chat")

    @property
    def telling(self) -> float | None:
        """Share of the free texts about a subject that state the new object and not the old one."""
        return self._share("telling")

    @property
    def generalization(self) -> float | None:
        """The same for paraphrases."""
        return self._share("paraphrase")

    @property
    def specificity(self) -> float | None:
        """Share of the neighbours whose answer stayed."""
        return self._share("neighbour")

    @property
    def retention(self) -> float | None:
        """Share of the earlier patches that still hold."""
        return self._share("earlier")

    @property
    def shares(self) -> dict[str, float]:
        """{"efficacy": 1.0, ...} of everything that was asked."""
        every = {name: getattr(self, name) for name in _SHARES}
        return {name: share for name, share in every.items() if share is not None}

    def failed(self, *roles: Role) -> list[Check]:
        """The checks of these roles that did not hold; of all roles, if none is named."""
        return [
            check for check in self.checks if not check.held and (not roles or check.role in roles)
        ]

    def tables(self) -> list[Table]:
        """The shares, and the checks: failed ones first, the others unless they are many."""
        title = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items())
        shown = sorted(self.checks, key=lambda check: check.held)
        notes = [*self.notes]
        if len(self.checks) > _MANY:
            failed = self.failed()
            title += f"; {len(failed):,} of {len(self.checks):,} checks failed"
            # What was written comes before what follows from it.
            shown = sorted(failed, key=lambda check: list(_PLURALS).index(check.role))[:_MANY]
            notes = [*self._not_shown(len(failed) - len(shown)), *notes]
        if not shown:
            return [Table(title or "nothing was asked", {}, note="; ".join(notes))]
        legend = "p: of the target; for neighbours, of the answer before"
        note = "; ".join([legend, *notes])
        return [Table(title, _COLUMNS, [_row(check) for check in shown], note)]

    def _not_shown(self, failed: int) -> list[str]:
        """How many checks of each kind are left out of the table, in words."""
        held = Counter(check.role for check in self.checks if check.held)
        names = ", ".join(f"{count:,} {_PLURALS[role]}" for role, count in held.items())
        return [
            *([f"{failed:,} more checks that failed"] if failed > 0 else []),
            *([f"held and not shown: {names}"] if names else []),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the shares included."""
        shares = {name: getattr(self, name) for name in _SHARES}
        checks = [dict(vars(check)) for check in self.checks]
        return {**shares, "checks": checks, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Verification:
        """Make a proof from what `to_dict` gave, as a ledger keeps it; without checks for {}."""
        names = {field.name for field in dataclasses.fields(Check)}
        rows = ({k: v for k, v in row.items() if k in names} for row in fields.get("checks") or ())
        notes = tuple(str(note) for note in fields.get("notes") or ())
        return cls(checks=tuple(Check(**row) for row in rows), notes=notes)

    def _share(self, role: Role) -> float | None:
        held = [check.held for check in self.checks if check.role == role]
        return sum(held) / len(held) if held else None


_MANY = 20
"""More checks than this are counted, except the first of those that failed."""
_PLURALS: dict[Role, str] = {
    "prompt": "prompts",
    "earlier": "earlier facts",
    "chat": "prompts in the chat template",
    "telling": "texts about a subject",
    "paraphrase": "paraphrases",
    "neighbour": "neighbours",
}
_SHARES = ("efficacy", "chat", "telling", "generalization", "specificity", "retention")
_LONGEST = 120
"""Characters of an answer that a table shows."""
_COLUMNS = {
    "": "<",
    "prompt": "<",
    "before": "<",
    "p before": ">",
    "after": "<",
    "p after": ">",
    "held": "ok",
}


def _row(check: Check) -> tuple[str, ...]:
    before, after = ("" if p is None else f"{p:.3f}" for p in (check.p_before, check.p_after))
    verdict = "ok" if check.held else "no"
    said, says = (_shortened(text) for text in (check.before, check.after))
    return (check.role, check.prompt, said, before, says, after, verdict)


def _shortened(text: str) -> str:
    """A text that fits into a table: one that a model tells freely may have 40 words."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1].rstrip()}…"
