"""Made-up runs of an evaluation, with texts that try to act."""

from __future__ import annotations

from typing import Any

from factsmith.core.fact import Fact
from factsmith.judge.evaluation import Evaluation
from factsmith.judge.records import Question, QuestionKind, Record, Suite
from factsmith.judge.rows import BASE, Row
from factsmith.show.reports.record import Report

NASTY = '</td><script>alert(1)</script>|`x`\n## [a](b) \u202e&amp; "q" {{ 7*7 }} \x1b[31m'


def row(
    editor: str, unit: int, record: str, kind: QuestionKind, right: bool, written: int = 0
) -> Row:
    """Return an answer that is right, or one that tries to act."""
    stays = kind == "neighbour" and editor != BASE
    answer = "Oslo" if right else NASTY
    logs = (-0.1, -2.0) if right else (-2.0, -0.1)
    return Row(
        editor=editor,
        unit=unit,
        record=record,
        kind=kind,
        group=None,
        prompt=f"{kind} {record} {NASTY}",
        written=written,
        answer=answer,
        exact=right,
        stayed=right if stays else None,
        log_wanted=logs[0],
        log_against=logs[1],
        tokens=float(right),
    )


def evaluation(size: int, *, sequence: bool = False, wrong: int = 1) -> Evaluation:
    """Return a run of four records: the editor gets all but `wrong` of each kind right.

    The base model gets only the neighbours right.
    """
    rows: list[Row] = []
    kinds: tuple[QuestionKind, ...] = ("prompt", "paraphrase", "neighbour")
    units = range(0, 4, size)
    for at in range(4):
        rows += [
            row(BASE, at // size, f"r{at}", kind, kind == "neighbour", at // size) for kind in kinds
        ]
    for unit in range(len(units)):
        for at in range(4):
            if (sequence and at // size <= unit) or (not sequence and at // size == unit):
                rows += [
                    row("rome", unit, f"r{at}", kind, at >= wrong, at // size) for kind in kinds
                ]
    notes: dict[tuple[str, int], dict[str, float]] = {
        ("rome", unit): {"seconds": 2.0, "norm": 0.1 * (unit + 1), "kl_text": 0.1 + 0.3 * unit}
        for unit in range(len(units))
    }
    if size > 1:
        notes[BASE, 0] = {"probe: task acc": 0.5}
        notes["rome", len(units) - 1] |= {"probe: task acc": 0.25}
    return Evaluation(
        rows=tuple(rows),
        notes=notes,
        failed={("rome", 0): f"no {NASTY}"} if size > 1 else {},
        size=size,
        sequence=sequence,
        skipped=0,
        model=f"model {NASTY}",
        fingerprint="f" * 64,
    )


def suite() -> Suite:
    """Return the suite of the records."""
    records = tuple(
        Record(
            id=f"r{at}",
            facts=(Fact("x", "{} is", "Oslo"),),
            questions=(
                Question(kind="prompt", prompt=f"prompt r{at} {NASTY}", answers=(f"Oslo {NASTY}",)),
            ),
        )
        for at in range(4)
    )
    return Suite(
        name="counterfact", records=records, skipped=(), source=f"file {NASTY}", digest="d" * 64
    )


def report(**changes: Any) -> Report:
    """Return a report of two runs; `changes` replace its fields."""
    return Report(
        **{
            "runs": [evaluation(1), evaluation(2, wrong=2)],
            "suite": suite(),
            "left_out": {NASTY: 3},
            "version": "1.2",
            **changes,
        }
    )
