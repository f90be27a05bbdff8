"""Gates: what a patch has to pass before it is kept, and which fact fails where.

    results = check_gates(Gates(paraphrases=0.8), verification, drift)
    all(result.passed for result in results)
    results[1].failures      # ("paraphrase 'Where is Ann?' is answered 'Rome', not 'Oslo'",)

The thresholds are in `core/gates.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..core.gates import Gates
from ..core.tables import Table
from ..judge.drift import LIMITS, Drift
from .verification import Role, Verification

_ROLES: dict[str, Role] = {
    "efficacy": "prompt",
    "paraphrases": "paraphrase",
    "neighbours": "neighbour",
    "earlier": "earlier",
}


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """How a patch stood at one gate.

    Attributes:
        name: The gate.
        threshold: What it asks for: at least this share, or for drift at most this much.
        value: What was measured. None: there was nothing to ask, or drift was not measured.
        passed: Whether the patch passed.
        failures: What failed, in words.
    """

    name: str
    threshold: float
    value: float | None
    passed: bool
    failures: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "failures": list(self.failures)}


def measures_drift(gates: Gates) -> bool:
    """Return whether any gate asks for drift."""
    return any(getattr(gates, name) is not None for name in LIMITS)


def check_gates(
    gates: Gates, verification: Verification, drift: Drift | None = None
) -> tuple[GateResult, ...]:
    """Compare what was measured with every gate that is set.

    A gate passes if there was nothing to ask. A drift gate fails if drift was not measured.
    """
    names = [field.name for field in dataclasses.fields(gates)]
    limits = {name: value for name in names if (value := getattr(gates, name)) is not None}
    return tuple(
        _share_gate(name, limit, verification)
        if name in _ROLES
        else _drift_gate(name, limit, drift)
        for name, limit in limits.items()
    )


def gates_table(results: tuple[GateResult, ...]) -> Table:
    """Return a table with a row for each gate."""
    columns = {"": "<", "measured": ">", "asked": "<", " ": "ok"}
    return Table("gates", columns, [_row(result) for result in results])


def _share_gate(name: str, threshold: float, verification: Verification) -> GateResult:
    checks = [check for check in verification.checks if check.role == _ROLES[name]]
    value = sum(check.held for check in checks) / len(checks) if checks else None
    return GateResult(
        name=name,
        threshold=threshold,
        value=value,
        passed=value is None or value >= threshold,
        failures=tuple(f"{check.role} {check.in_words}" for check in checks if not check.held),
    )


def _drift_gate(name: str, threshold: float, drift: Drift | None) -> GateResult:
    failures = ("it was not measured",) if drift is None else drift.exceeded(**{name: threshold})
    value = None if drift is None else drift.measures[name]
    return GateResult(
        name=name, threshold=threshold, value=value, passed=not failures, failures=failures
    )


def _row(result: GateResult) -> tuple[str, ...]:
    is_share = result.name in _ROLES
    measured = "nothing to ask"
    if result.value is not None:
        measured = f"{result.value:.1%}" if is_share else f"{result.value:.3g}"
    asked = f"at least {result.threshold:.0%}" if is_share else f"at most {result.threshold:g}"
    return (result.name, measured, asked, "passed" if result.passed else "failed")
