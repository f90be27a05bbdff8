"""Judged edits: the lines are the shares of the runs."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from factsmith.core.errors import InputError
from factsmith.judge.evaluation import Evaluation
from factsmith.judge.rows import Row
from factsmith.show.plots.judging import evaluation_chart
from show.records import trace


def judged(size: int, right: float, *, sequence: bool = False) -> Evaluation:
    """Return a run of four records, some of whose prompts are answered right.

    In a sequence the second round loses the records of the first.
    """
    rows = []
    for at, kind in itertools.product(range(4), ("prompt", "paraphrase")):
        asked = range(at // size, 4 // size) if sequence else [at // size]
        for unit in asked:
            good = at < 4 * right if not sequence else unit == at // size
            rows.append(
                Row(
                    editor="it",
                    unit=unit,
                    record=f"r{at}",
                    kind=kind,  # type: ignore[arg-type]
                    group=None,
                    prompt="p",
                    written=at // size,
                    answer="",
                    exact=good,
                    stayed=None,
                    log_wanted=-1.0,
                    log_against=-2.0,
                    tokens=None,
                )
            )
    base = [dataclasses.replace(row, editor="base") for row in rows]
    notes = {
        ("it", unit): {"kl_text": 0.5 * (unit + 1), "changed_share": 0.1}
        for unit in range(4 // size)
    }
    return Evaluation(
        rows=(*base, *rows),
        notes=notes,
        size=size,
        sequence=sequence,
        skipped=0,
        model="m",
        fingerprint="f" * 64,
    )


def test_judged_edits_are_drawn_as_they_are(tmp_path: Path) -> None:
    runs = [judged(2, 0.5), judged(1, 1.0), judged(2, 0, sequence=True)]
    figure = evaluation_chart(runs, names={"it": "That one"}, path=tmp_path / "judged.png")
    prompt, _, neighbour, _, first, so_far, changed, prose = figure.axes
    thin, solid = prompt.get_lines()
    assert solid.get_xydata().tolist() == [[1, 100], [2, 50]] and thin.get_xydata().tolist() == [
        [1, 100],
        [2, 100],
    ]
    # Two sizes in one decade are both labelled, as plain numbers.
    figure.draw_without_rendering()
    ticks = prompt.get_xticklabels() + prompt.get_xticklabels(minor=True)
    assert [label.get_text() for label in ticks] == ["1", "2"]
    assert solid.get_label() == "That one" and not neighbour.get_lines()
    assert first.get_lines()[0].get_xydata().tolist() == [[2, 100], [4, 0]]
    assert so_far.get_lines()[0].get_xydata().tolist() == [[2, 100], [4, 50]]
    assert changed.get_lines()[0].get_ydata().tolist() == [10, 10] and prose.get_lines()[
        0
    ].get_ydata().tolist() == [0.5, 1.0]
    assert len(evaluation_chart(runs[:2]).axes) == 4 and len(evaluation_chart(runs[2]).axes) == 4
    for few in ([], [judged(1, 1.0)]):
        with pytest.raises(InputError, match="expected two sizes"):
            evaluation_chart(few)
    with pytest.raises(InputError, match="got a CausalTrace"):
        evaluation_chart([trace()])  # type: ignore[list-item]
