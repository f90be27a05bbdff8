"""The charts of a report page, as shapes in per cent of their width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ...judge.rows import BASE, Share
from .record import DRIFT_NAMES, PAIRS, Report, cell


def bars(summary: Mapping[str, Mapping[str, Share]]) -> list[dict[str, Any]]:
    """For each editor and kind of question, success by comparison against exact match."""
    return [
        {
            "editor": editor,
            "kind": kind,
            "success": own[f"{kind} success"],
            "exact": own[f"{kind} exact"],
        }
        for kind in dict.fromkeys(
            name.rpartition(" ")[0] for own in summary.values() for name in own
        )
        for editor, own in summary.items()
        if kind and {f"{kind} success", f"{kind} exact"} <= set(own)
    ]


_Dots: TypeAlias = "Mapping[str, Sequence[tuple[int, float, str]]]"
"""Of a chart's lines, {editor: [(x, y, what it says)]}."""


def report_charts(found: Report) -> list[dict[str, Any]]:
    """Quality and drift against the number of edits, and what is left of a sequence after each round."""
    charts = []
    apart = [at for at, run in enumerate(found.runs) if not run.sequence]
    if len({found.runs[at].size for at in apart}) > 1:
        for kind, measure in PAIRS:
            name = f"{kind} {measure}"
            shares = {
                e: [(found.runs[at].size, found.summaries[at].get(e, {}).get(name)) for at in apart]
                for e in found.editors
            }
            dots = {
                e: [(size, share.value, cell(share)) for size, share in own if share]
                for e, own in shares.items()
            }
            charts.append(
                line_chart(
                    f"{name} against the number of edits",
                    dots,
                    "records an edit",
                    top=1.0,
                    logarithmic=True,
                )
            )
        told = {
            e: [(run.size, run.drift(e)) for run in found.runs if not run.sequence]
            for e in found.editors
            if e != BASE
        }
        charts += [
            _drift_chart(
                name, "against the number of edits", told, "records an edit", logarithmic=True
            )
            for name in DRIFT_NAMES
        ]
    for run in found.runs:
        if run.sequence:
            left = {e: run.remaining(e) for e in run.editors if e != BASE}
            for at, of in enumerate(("the first round", "all rounds so far")):
                dots = {
                    e: [(k + 1, own[at], f"{100 * own[at]:.0f} %") for k, own in each.items()]
                    for e, each in left.items()
                }
                charts.append(
                    line_chart(
                        f"prompts of {of} answered right, {run.pace}", dots, "rounds", top=1.0
                    )
                )
            told = {
                e: [(k + 1, run.drift(e, k)) for name, k in run.notes if name == e] for e in left
            }
            charts += [_drift_chart(name, run.pace, told, "rounds") for name in DRIFT_NAMES]
    return [chart for chart in charts if chart["lines"]]


def _drift_chart(
    name: str,
    of: str,
    told: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]],
    unit: str,
    *,
    logarithmic: bool = False,
) -> dict[str, Any]:
    dots = {
        e: [(x, own[name], f"{own[name]:.3g}") for x, own in each if name in own]
        for e, each in told.items()
    }
    return line_chart(
        f"{DRIFT_NAMES[name]}, {of}",
        dots,
        unit,
        top=1.0 if name == "changed_share" else None,
        logarithmic=logarithmic,
    )


def line_chart(
    title: str, lines: _Dots, unit: str, *, top: float | None = None, logarithmic: bool = False
) -> dict[str, Any]:
    """Lines in a box of 100 x 60 right of `left`, over a grid with its values, y from 0 to `top`, which is 100 %; None: to the largest."""
    most = top
    xs = [x for dots in lines.values() for x, *_ in dots]
    top = (
        max((y for dots in lines.values() for _, y, _ in dots), default=1.0) or 1.0
        if most is None
        else most
    )
    low, high = (
        (math.log(end(xs)) if logarithmic else end(xs) for end in (min, max)) if xs else (0.0, 1.0)
    )
    found = []
    for editor, dots in lines.items():
        places = [
            (
                round(
                    _LEFT
                    + 2
                    + (96 - _LEFT)
                    * ((math.log(x) if logarithmic else x) - low)
                    / max(high - low, 1e-9),
                    2,
                ),
                _height(y / top),
                f"{editor}, {x:,} {unit}: {text}",
            )
            for x, y, text in sorted(dots)
        ]
        if places:
            found.append(
                {
                    "editor": editor,
                    "dots": places,
                    "points": " ".join(f"{x},{y}" for x, y, _ in places),
                }
            )
    ends = [f"{x:,}" for x in (min(xs), max(xs))] if xs else ["", ""]
    grid = [
        (_height(y / top), f"{100 * y:.0f} %" if most else f"{y:.3g}") for y in _round_values(top)
    ]
    told = {
        "first": ends[0],
        "last": ends[1],
        "unit": unit,
        "top": "100 %" if most else f"{top:.3g}",
    }
    return {"title": title, "lines": found, "grid": grid, "left": _LEFT, **told}


_LEFT = 10  # of a chart's 100, where the values of its grid stand


def _round_values(top: float) -> list[float]:
    """Round numbers from 0 to the largest, three to six of them."""
    power = 10.0 ** math.floor(math.log10(top / 2))
    step = next(n * power for n in (1, 2, 5, 10) if top / (n * power) <= 5)
    return [k * step for k in range(math.floor(top / step * (1 + 1e-9)) + 1)]


def _height(share: float) -> float:
    """Where a share of what a chart reaches up to is drawn."""
    return round(58 - 56 * share, 2)
