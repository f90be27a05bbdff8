"""Gates: what a patch has to pass before it is committed, and which fact fails where.

results = check_gates(Gates(paraphrases=0.8), verification, drift)
all(result.passed for result in results)
results[1].failures                             # ("paraphrase 'Where does Ann live?' is answered 'Rome', not 'Oslo'",)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..core.fact import Gates
from ..core.tables import Table
from ..judge.drift import LIMITS, Drift
from .proof import Check, Role, Verification

_ROLES: dict[str, Role] = {
    "efficacy": "prompt",
    "paraphrases": "paraphrase",
    "neighbours": "neighbour",
    "earlier": "earlier",
}


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One gate: its threshold, what was measured (None: there was nothing to ask), whether it was passed, and what failed, in words."""

    name: str
    threshold: float
    value: float | None
    passed: bool
    failures: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {**vars(self), "failures": list(self.failures)}


def measures_drift(gates: Gates) -> bool:
    """Whether any gate asks for drift."""
    return any(getattr(gates, name) is not None for name in LIMITS)


def check_gates(
    gates: Gates, verification: Verification, drift: Drift | None = None
) -> tuple[GateResult, ...]:
    """Hold what was measured against every gate that is asked; a share of nothing passes, drift that was not measured does not."""
    found = []
    for field in dataclasses.fields(gates):
        threshold = getattr(gates, field.name)
        if threshold is None:
            continue
        if field.name in _ROLES:
            checks = [check for check in verification.checks if check.role == _ROLES[field.name]]
            value = sum(check.held for check in checks) / len(checks) if checks else None
            lost = tuple(_failure(check) for check in checks if not check.held)
            found.append(
                GateResult(
                    name=field.name,
                    threshold=threshold,
                    value=value,
                    passed=value is None or value >= threshold,
                    failures=lost,
                )
            )
        else:
            broken = (
                ("it was not measured",)
                if drift is None
                else drift.exceeded(**{field.name: threshold})
            )
            measured = None if drift is None else drift.measures[field.name]
            found.append(
                GateResult(
                    name=field.name,
                    threshold=threshold,
                    value=measured,
                    passed=not broken,
                    failures=broken,
                )
            )
    return tuple(found)


def gates_table(results: tuple[GateResult, ...]) -> Table:
    """A row a gate."""
    rows = [
        (
            result.name,
            "nothing to ask"
            if result.value is None
            else f"{result.value:.1%}"
            if result.name in _ROLES
            else f"{result.value:.3g}",
            ("at least " if result.name in _ROLES else "at most ")
            + (f"{result.threshold:.0%}" if result.name in _ROLES else f"{result.threshold:g}"),
            "passed" if result.passed else "failed",
        )
        for result in results
    ]
    return Table("gates", {"": "<", "measured": ">", "asked": "<", " ": "ok"}, rows)


def _failure(check: Check) -> str:
    """Which prompt failed, and how."""
    said = f"{check.role} {check.prompt!r} is {'still ' if check.forget else ''}answered {check.after!r}"
    return said if check.forget else f"{said}, not {check.wanted!r}"
