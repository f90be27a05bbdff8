"""show.plots.judging."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ...core.errors import InputError
from ...judge.evaluation import Evaluation
from ...judge.rows import BASE
from .drawing import LINES, check_record, finished, legend_below, quiet, side_by_side


def evaluation_chart(
    runs: Evaluation | Sequence[Evaluation],
    *,
    names: Mapping[str, str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw judged edits. Above, against the number of records an edit: what is really said (solid), and two-way success (thin, dashed).
    Below, of runs in sequence, round by round: what is left of the first round and of all, other facts changed, divergence on prose.

    runs   of one model and suite; above are those at a time (two sizes at least), below is the first in sequence of each size
    names  {editor: how it is called in the picture}

    `path` as for `heat_map`. Raises InputError when there is nothing to draw, more editors than can be told apart, or another record.
    """
    listed = [runs] if isinstance(runs, Evaluation) else list(runs)
    for run in listed:
        check_record(run, Evaluation, "evaluation_chart")
    apart = [
        (
            run.size,
            {
                e: {name: share.value for name, share in own.items()}
                for e, own in run.summaries.items()
                if e != BASE
            },
        )
        for run in listed
        if not run.sequence
    ]
    rounds = [
        (run.size, {e: round_by_round(run, e) for e in run.editors if e != BASE})
        for run in listed
        if run.sequence
    ]
    return judged_chart(apart, rounds, names=names, path=path)


def round_by_round(run: Evaluation, editor: str) -> dict[int, dict[str, float]]:
    """Of a run in sequence, behind each round (from 1): shares of the "first" round and of all "so far" that are said, and its drift."""
    left = run.remaining(editor)
    drifts = {at: run.drift(editor, at) for name, at in run.notes if name == editor}
    told: dict[int, dict[str, float]] = {at + 1: dict(own) for at, own in drifts.items()}
    for at, (first, so_far) in left.items():
        told.setdefault(at + 1, {}).update({"first": first, "so far": so_far})
    return dict(sorted(told.items()))


def judged_chart(
    apart: Sequence[tuple[int, Mapping[str, Mapping[str, float]]]],
    rounds: Sequence[tuple[int, Mapping[str, Mapping[int, Mapping[str, float]]]]],
    *,
    names: Mapping[str, str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw numbers of judged edits, as `evaluation_chart` does of runs.

    apart   [(records an edit, {editor: {measure: share}})]
    rounds  [(records a round, {editor: {round, from 1: what `round_by_round` gives}})]
    """
    apart = sorted(apart, key=lambda pair: pair[0])
    above = len({size for size, _ in apart}) > 1
    editors = list(dict.fromkeys(editor for _, own in (*apart, *rounds) for editor in own))
    if not (above or rounds) or not 1 <= len(editors) <= len(LINES):
        raise InputError(
            f"got {len(apart) + len(rounds)} runs of {len(editors)} editors; expected two sizes, or a run in sequence, of 1 to "
            f"{len(LINES)} editors"
        )
    figure, grid = side_by_side(
        len(_QUALITY), 1.0 + 1.9 * (above + bool(rounds)), rows=above + bool(rounds)
    )
    styles = dict(zip(editors, LINES, strict=False))

    def draw(
        axes: Axes, editor: str, dots: Sequence[tuple[float, float]], thin: bool = False
    ) -> None:
        if dots:
            colour, dash, marker = styles[editor]
            look: dict[str, Any] = (
                {"linestyle": (0, (2, 2)), "linewidth": 0.6, "alpha": 0.7}
                if thin
                else {"linestyle": dash, "linewidth": 1.0}
            )
            label = None if thin else (names or {}).get(editor, editor)
            axes.plot(
                *zip(*dots, strict=True),
                color=colour,
                marker=None if thin else marker,
                markersize=2.6,
                label=label,
                **look,
            )

    if above:
        for axes, (kind, measure) in zip(grid, _QUALITY, strict=False):
            for editor in editors:
                for name, thin in ((f"{kind} success", True), (f"{kind} {measure}", False)):
                    draw(
                        axes,
                        editor,
                        [
                            (n, 100 * own[editor][name])
                            for n, own in apart
                            if name in own.get(editor, {})
                        ],
                        thin,
                    )
            axes.set_xscale("log")
            axes.set_xlabel("records an edit", fontsize=7.5)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            _percent(axes, f"{kind}: {'says what it said' if measure == 'stayed' else 'says it'}")
    if rounds:
        below = grid[-len(_QUALITY) :]
        for size, told in rounds:
            for editor, own in told.items():
                for axes, name in zip(
                    below, ("first", "so far", "changed_share", "kl_text"), strict=True
                ):
                    scale = 1 if name == "kl_text" else 100
                    draw(
                        axes,
                        editor,
                        [
                            (at * size, scale * each[name])
                            for at, each in own.items()
                            if name in each
                        ],
                    )
        for axes, title in zip(
            below,
            ("first round: still says it", "all rounds so far: says it", "other facts changed"),
            strict=False,
        ):
            _percent(axes, title)
        prose = below[-1]
        prose.set_title("KL on prose, nats a token", fontsize=7.5, loc="left", pad=3)
        prose.set_ylim(bottom=0)
        quiet(prose)
        for axes in below:
            axes.set_xlabel("records written, round by round", fontsize=7.5)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    legend_below(figure, max(grid, key=lambda axes: len(axes.get_legend_handles_labels()[1])))
    return finished(figure, path)


_QUALITY = (
    ("prompt", "exact"),
    ("paraphrase", "exact"),
    ("neighbour", "stayed"),
    ("multihop", "exact"),
)


def _percent(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=7.5, loc="left", pad=3)
    axes.set_ylim(-3, 103)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    quiet(axes)
