"""What is different between two revisions: facts, answers and weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.fact import Fact
from ..core.progress import Progress, Tally
from ..core.tables import Shown, Table, counted
from ..edit.delta import Delta, read_weights
from ..model.answers import say
from ..model.appended import AppendedRows, by_layer
from ..model.turns import asking
from .carried import Carried


@dataclass(frozen=True, kw_only=True)
class FactChange:
    """A fact that differs between two revisions.

    Attributes:
        prompt: The fact's prompt.
        before: Its target at the first revision. None: it was not written there.
        after: Its target at the second. None: it is not written there.
        answer_before: What the model answers at the first revision.
        answer_after: What the model answers at the second.
    """

    prompt: str
    before: str | None
    after: str | None
    answer_before: str
    answer_after: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Diff(Shown):
    """What is different between two revisions.

    Attributes:
        before: The id of the first, or "base".
        after: The id of the second, or "base".
        facts: Those that come, go, or have another target.
        norms: {layer: ‖W_after − W_before‖ / ‖W_base‖} of the layers that differ. Appended neurons
            do not count.
        neurons: {layer: (dropped, appended)} how many appended neurons the first has and the second
            does not, and the other way round, of the layers where they differ.
    """

    before: str
    after: str
    facts: tuple[FactChange, ...]
    norms: Mapping[int, float]
    neurons: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        """The facts, and the layers."""
        rows = [
            (f.prompt, f.before or "", f.after or "", f.answer_before, f.answer_after)
            for f in self.facts
        ]
        columns = dict.fromkeys(
            ("prompt", "target before", "after", "answer before", "answer after"), "<"
        )
        differ = sorted({*self.norms, *self.neurons})
        layers: list[tuple[str, ...]] = [
            (str(layer), f"{self.norms.get(layer, 0.0):.4f}") for layer in differ
        ]
        names = {"layer": ">", "‖ΔW‖/‖W‖": ">"}
        if self.neurons:
            moved = [self.neurons.get(layer, (0, 0)) for layer in differ]
            names |= {"neurons dropped": ">", "appended": ">"}
            layers = [
                (*row, *(f"{n:,}" for n in pair)) for row, pair in zip(layers, moved, strict=True)
            ]
        title = (
            f"{self.before[:10]} → {self.after[:10]}: {counted(len(self.facts), 'fact')} different"
        )
        return [
            Table(title, columns, rows),
            Table("layers", names, layers),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        norms = {str(layer): norm for layer, norm in self.norms.items()}
        return {
            **vars(self),
            "facts": [dict(vars(fact)) for fact in self.facts],
            "norms": norms,
            "neurons": {str(layer): list(pair) for layer, pair in self.neurons.items()},
        }


@asking(grad=True, changes=True)
def diff(carried: Carried, before: str, after: str, progress: Progress | None = None) -> Diff:
    """Compare two revisions ("base", "latest", or ids); the model is as before when this returns.

    Raises RevisionError, DamagedError.
    """
    ledger = carried.ledger
    sides = [_side(carried, ledger.resolve(reference)) for reference in (before, after)]
    newest = {**sides[0].facts, **sides[1].facts}
    differ = [p for p in newest if sides[0].facts.get(p) != sides[1].facts.get(p)]
    changed = {newest[p].text: p for p in differ}
    layers = sorted({layer for side in sides for delta in side.deltas for layer in delta.layers})
    targets = [[side.facts[p].target or "" for side in sides if p in side.facts] for p in differ]
    longest = [max(each, key=len) for each in targets]
    answers, weights = [], []
    tally = Tally(progress, "asking both revisions", len(sides) * len(changed))
    for side in sides:
        with carried.exactly(side.deltas):
            report = tally.part(len(changed))
            said = say(carried.lm, list(changed), longest, progress=report) if changed else []
            answers.append({p: answer.text for p, answer in zip(changed, said, strict=True)})
            weights.append(read_weights(carried.lm, layers))
    with carried.exactly([]):
        base = read_weights(carried.lm, layers)
    moved = {
        layer: (weights[1][layer].double() - weights[0][layer].double()).norm() for layer in layers
    }
    norms = {layer: float(norm / base[layer].double().norm()) for layer, norm in moved.items()}
    return Diff(
        before=sides[0].identity,
        after=sides[1].identity,
        facts=tuple(
            FactChange(
                prompt=prompt,
                before=target_text(sides[0].facts.get(asked)),
                after=target_text(sides[1].facts.get(asked)),
                answer_before=answers[0][prompt],
                answer_after=answers[1][prompt],
            )
            for prompt, asked in changed.items()
        ),
        norms={layer: norm for layer, norm in norms.items() if norm},
        neurons=_moved_rows(*(by_layer([delta.appended for delta in s.deltas]) for s in sides)),
    )


def _moved_rows(
    before: Mapping[int, AppendedRows], after: Mapping[int, AppendedRows]
) -> dict[int, tuple[int, int]]:
    """Return how many rows of each layer go and how many come, where there are any."""
    moved = {}
    for layer in sorted({*before, *after}):
        old, new = (
            Counter(rows[layer].as_bytes() if layer in rows else ()) for rows in (before, after)
        )
        dropped, appended = (old - new).total(), (new - old).total()
        if dropped or appended:
            moved[layer] = (dropped, appended)
    return moved


def target_text(fact: Fact | None) -> str | None:
    """Return a fact's target in words; None for no fact."""
    if fact is None:
        return None
    return "(forgotten)" if fact.target is None else fact.target.strip()


@dataclass(frozen=True)
class _Side:
    """A revision: its id, the facts in effect by prompt (`Fact.asked`), and the deltas."""

    identity: str
    facts: dict[str, Fact]
    deltas: list[Delta]


def _side(carried: Carried, identity: str) -> _Side:
    active = carried.ledger.active(identity)
    facts = {fact.asked: fact for revision in active for fact in revision.in_effect}
    return _Side(identity, facts, [carried.delta_of(revision) for revision in active])
