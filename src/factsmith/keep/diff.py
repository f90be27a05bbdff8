"""keep.diff."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.fact import Fact
from ..core.tables import Shown, Table, counted


@dataclass(frozen=True, kw_only=True)
class FactChange:
    """A fact that differs between two revisions: what was there (None: nothing), what is, and what the model answers at either."""

    prompt: str
    before: str | None
    after: str | None
    answer_before: str
    answer_after: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Diff(Shown):
    """What is different between two revisions.

    before, after  their ids, or "base"
    facts          those that come, go, or have another target
    norms          for each layer in which they differ, ‖W_after − W_before‖ / ‖W_base‖
    """

    before: str
    after: str
    facts: tuple[FactChange, ...]
    norms: Mapping[int, float]

    def tables(self) -> list[Table]:
        """The facts, and the layers."""
        rows = [
            (f.prompt, f.before or "", f.after or "", f.answer_before, f.answer_after)
            for f in self.facts
        ]
        columns = dict.fromkeys(
            ("prompt", "target before", "after", "answer before", "answer after"), "<"
        )
        layers = [(str(layer), f"{norm:.4f}") for layer, norm in self.norms.items()]
        title = (
            f"{self.before[:10]} → {self.after[:10]}: {counted(len(self.facts), 'fact')} different"
        )
        return [
            Table(title, columns, rows),
            Table("layers", {"layer": ">", "‖ΔW‖/‖W‖": ">"}, layers),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        norms = {str(layer): norm for layer, norm in self.norms.items()}
        return {**vars(self), "facts": [dict(vars(fact)) for fact in self.facts], "norms": norms}


def target_text(fact: Fact | None) -> str | None:
    """A fact's target in words; None for no fact."""
    return None if fact is None else "(forgotten)" if fact.target is None else fact.target.strip()
