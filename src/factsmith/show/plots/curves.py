"""Lines with bands, for numbers that no record holds.

effect = {"top neurons": (n, share, low, high), "random neurons": (n, share_r, low_r, high_r)}
curves(effect, x_label="neurons", y_label="share of p(answer)", log_x=True, path="effect.svg")
"""

from __future__ import annotations

import itertools
import os

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from ...core.errors import InputError
from .drawing import (
    COLUMN_WIDTH,
    LINES,
    SMALL,
    Picture,
    Series,
    draw_lines,
    finish,
    headline,
    thin_frame,
)


def curves(
    series: Series,
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    mark_x: float | None = None,
    mark_y: float | None = None,
    log_x: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw lines with bands; colour, dash and marker tell the lines apart.

    Args:
        series: {label: (x, y, low, high)}, four sequences of the same length for each line.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        title: Title of the figure.
        mark_x: Where to draw a thin vertical line, if anywhere.
        mark_y: Where to draw a thin horizontal line, if anywhere.
        log_x: Whether the x axis is logarithmic.
        path: Where to save the figure, as for `heat_map`.

    Raises:
        InputError: when there is no line, or the four parts of one differ in length.
    """
    if not series or any(len({len(part) for part in parts}) != 1 for parts in series.values()):
        raise InputError(
            f"series has the lines {list(series)}; expected at least one, each with as many "
            "numbers in x as in y, low and high"
        )
    figure = Picture(figsize=(COLUMN_WIDTH, 2.4), dpi=300, layout="constrained")
    axes = figure.add_subplot()
    draw_lines(axes, series, itertools.cycle(LINES))
    for position, line in ((mark_x, axes.axvline), (mark_y, axes.axhline)):
        if position is not None:
            line(position, color="black", linewidth=0.5, linestyle=":")
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel(x_label, fontsize=SMALL)
    axes.set_ylabel(y_label, fontsize=SMALL)
    axes.legend(fontsize=6.5, frameon=False, handlelength=2.6)
    headline(figure, title, parse_math=True)
    thin_frame(axes)
    return finish(figure, path)
