"""Judged edits, as a figure.

    runs = [fs.evaluate(lm, records, writers, size=n) for n in (1, 10, 100)]
    evaluation_chart(runs, names={"memit": "MEMIT"}, path="edits.svg")

`judged_chart` draws the same from plain numbers, for example from the JSON of several models.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ...core.errors import InputError
from ...judge.evaluation import Evaluation
from ...judge.rows import BASE
from .drawing import (
    LINES,
    SMALL,
    check_record,
    finish,
    legend_below,
    panel_title,
    side_by_side,
    thin_frame,
)

Apart: TypeAlias = "Sequence[tuple[int, Mapping[str, Mapping[str, float]]]]"
"""Runs of separate edits: (records per edit, {editor: {measure: share}})."""

Rounds: TypeAlias = "Sequence[tuple[int, Mapping[str, Mapping[int, Mapping[str, float]]]]]"
"""Runs in sequence: (records per round, {editor: {round, from 1: {name: number}}})."""

_QUALITY = (
    ("prompt", "exact", "prompt: says the target"),
    ("paraphrase", "exact", "paraphrase: says the target"),
    ("neighbour", "stayed", "neighbour: same answer"),
    ("multihop", "exact", "multihop: says the target"),
)
"""The upper panels: the kind of question, the measure, and the title."""

_LEFT = (
    ("first", "first round: still says the target"),
    ("so far", "all rounds so far: says the target"),
    ("changed_share", "other facts: changed answer"),
    ("kl_text", "KL on prose, nats per token"),
)
"""The lower panels: the number of a round, and the title."""


def evaluation_chart(
    runs: Evaluation | Sequence[Evaluation],
    *,
    names: Mapping[str, str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw judged edits: their quality by the number of records, and what happens in a sequence.

    The upper panels show runs of separate edits, if there are at least two sizes. A thick line is
    what the model says; a thin, dashed line is success by comparison of two candidates. The lower
    panels show runs in sequence, round by round: what is left of the first round and of all
    rounds, how many other facts changed, and the divergence on prose.

    Args:
        runs: Runs of one model and suite.
        names: {editor: what the legend calls it}.
        path: Where to save the figure, as for `heat_map`.

    Raises:
        InputError: when there is nothing to draw, when there are more editors than lines that a
            reader can tell apart, or for another record.
    """
    runs = [runs] if isinstance(runs, Evaluation) else list(runs)
    for run in runs:
        check_record(run, Evaluation, "evaluation_chart")
    apart = [(run.size, _shares(run)) for run in runs if not run.sequence]
    rounds = [
        (run.size, {e: round_by_round(run, e) for e in run.editors if e != BASE})
        for run in runs
        if run.sequence
    ]
    return judged_chart(apart, rounds, names=names, path=path)


def _shares(run: Evaluation) -> dict[str, dict[str, float]]:
    """Return {editor: {measure: its share}}, without the base model."""
    return {
        editor: {name: share.value for name, share in summary.items()}
        for editor, summary in run.summaries.items()
        if editor != BASE
    }


def round_by_round(run: Evaluation, editor: str) -> dict[int, dict[str, float]]:
    """Return what a run in sequence measured after each round, from 1.

    The names are those of the drift, "first" for the share of the first round's prompts that are
    still answered, and "so far" for the share of all prompts so far.
    """
    rounds: dict[int, dict[str, float]] = {
        at + 1: dict(run.drift(editor, at)) for name, at in run.notes if name == editor
    }
    for at, (first, so_far) in run.remaining(editor).items():
        rounds.setdefault(at + 1, {}).update({"first": first, "so far": so_far})
    return dict(sorted(rounds.items()))


def judged_chart(
    apart: Apart,
    rounds: Rounds,
    *,
    names: Mapping[str, str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the numbers of judged edits, as `evaluation_chart` draws runs.

    Args:
        apart: The shares of separate edits.
        rounds: The numbers of runs in sequence, as `round_by_round` gives them.
        names: {editor: what the legend calls it}.
        path: Where to save the figure, as for `heat_map`.

    Raises:
        InputError: when there is nothing to draw, or when there are too many editors.
    """
    apart = sorted(apart, key=lambda pair: pair[0])
    above = len({size for size, _ in apart}) > 1
    editors = list(dict.fromkeys(editor for _, numbers in (*apart, *rounds) for editor in numbers))
    if not (above or rounds) or not 1 <= len(editors) <= len(LINES):
        raise InputError(
            f"got {len(apart) + len(rounds)} runs of {len(editors)} editors; expected two sizes, "
            f"or a run in sequence, of 1 to {len(LINES)} editors"
        )
    n_rows = above + bool(rounds)
    figure, panels = side_by_side(len(_QUALITY), 1.0 + 1.9 * n_rows, rows=n_rows)
    looks = {
        editor: {"color": colour, "linestyle": dash, "marker": marker, "label": label}
        for editor, (colour, dash, marker) in zip(editors, LINES, strict=False)
        for label in [(names or {}).get(editor, editor)]
    }
    if above:
        _draw_apart(panels[: len(_QUALITY)], apart, looks)
    if rounds:
        _draw_rounds(panels[-len(_LEFT) :], rounds, looks)
    legend_below(figure, max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[1])))
    return finish(figure, path)


def _draw_apart(
    panels: Sequence[Axes], apart: Apart, looks: Mapping[str, Mapping[str, Any]]
) -> None:
    """Draw the quality of separate edits by the number of records."""
    for axes, (kind, measure, title) in zip(panels, _QUALITY, strict=True):
        for editor, look in looks.items():
            for name, thin in ((f"{kind} success", True), (f"{kind} {measure}", False)):
                shares = [(n, numbers.get(editor, {}).get(name)) for n, numbers in apart]
                points = [(n, 100 * share) for n, share in shares if share is not None]
                _draw_line(axes, points, look, thin=thin)
        _size_axis(axes, [n for n, _ in apart])
        _percent(axes, title)


def _draw_rounds(
    panels: Sequence[Axes], rounds: Rounds, looks: Mapping[str, Mapping[str, Any]]
) -> None:
    """Draw what is left of a sequence and what it changed, after each round."""
    for axes, (name, title) in zip(panels, _LEFT, strict=True):
        scale = 1 if name == "kl_text" else 100
        for size, editors in rounds:
            for editor, numbers in editors.items():
                points = [
                    (at * size, scale * each[name]) for at, each in numbers.items() if name in each
                ]
                _draw_line(axes, points, looks[editor])
        if name == "kl_text":
            panel_title(axes, title)
            axes.set_ylim(bottom=0)
            thin_frame(axes)
        else:
            _percent(axes, title)
        axes.set_xlabel("records written, round by round", fontsize=SMALL)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _draw_line(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    look: Mapping[str, Any],
    *,
    thin: bool = False,
) -> None:
    """Draw a line through some points, if there are any; a thin one has no marker and no label."""
    if not points:
        return
    style = {"linewidth": 1.0, "markersize": 2.6, **look}
    if thin:
        style |= {"linestyle": (0, (2, 2)), "linewidth": 0.6, "alpha": 0.7}
        style |= {"marker": None, "label": None}
    axes.plot(*zip(*points, strict=True), **style)


def _size_axis(axes: Axes, sizes: Iterable[int]) -> None:
    """Make the x axis logarithmic, with plain numbers."""
    axes.set_xscale("log")
    axes.set_xlabel("records per edit", fontsize=SMALL)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:z,.0f}"))
    sizes = sorted(set(sizes))
    if sizes[-1] < 10 * sizes[0]:  # less than a decade has at most one power of ten to label
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())


def _percent(axes: Axes, title: str) -> None:
    """Give a panel its title and an axis from 0 to 100 %."""
    panel_title(axes, title)
    axes.set_ylim(-3, 103)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:z.0f} %"))
    thin_frame(axes)
