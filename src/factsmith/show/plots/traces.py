"""Causal traces and their averages, as figures and for the terminal.

    heat_map(trace, path="trace.svg")         tokens by layers, for one prompt
    print(text_heat_map(trace, width=80))     the same in the terminal; in colour on a rich console
    class_map(average, path="average.png")    kinds of token by layers, for many facts
    class_lines(average, path="lines.png")    the same as curves with 95 % intervals

Each kind of trace has one colour: hidden states purple, FFN outputs green, attention outputs red.
"""

from __future__ import annotations

import math
import os
import textwrap

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rich.cells import cell_len
from rich.text import Text

from ...core.checks import check_count
from ...locate.average import AverageTrace
from ...locate.records import CausalTrace
from .drawing import (
    COLUMN_WIDTH,
    LINES,
    LONGEST_LABEL,
    SMALL,
    Picture,
    check_record,
    cut,
    draw_lines,
    finish,
    fit,
    headline,
    layer_numbers,
    legend_below,
    panel_title,
    thin_frame,
    token_label,
)

# The tints of the figures of Meng et al. 2022.
_COLOUR_MAPS = {"state": "Purples", "mlp": "Greens", "attention": "Reds"}

_PARTS = {"mlp": "FFN", "attention": "attention"}

_TERMINAL_COLOURS = {"state": "magenta", "mlp": "green", "attention": "red"}

_BLOCKS = " ·░▒▓█"

_MIN_WIDTH = 20

_CENTRE = "restored layer, or centre of the restored layers"


def heat_map(trace: CausalTrace, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw p(answer) after restoring each token and layer (Meng et al. 2022, Figure 1).

    A row is a token; a * marks those of the subject. A column is a layer. White is the probability
    of the corrupted run or less, and the darkest colour is the largest score. If some restorations
    lower the probability, a line below the figure gives the lowest one. The title says which part
    was severed, and whether the scores are an estimate. See arXiv 2202.05262.

    Args:
        trace: The trace to draw.
        path: Where to save the figure: PNG, SVG or PDF, by the suffix. None: it is only returned.

    Raises:
        InputError: for another suffix or another record.
        WorkspaceError: when the file cannot be written.
    """
    check_record(trace, CausalTrace, "heat_map")
    n_tokens, n_layers = trace.scores.shape
    figure = Picture(figsize=(COLUMN_WIDTH, 1.25 + 0.155 * n_tokens), dpi=300, layout="constrained")
    axes = figure.add_subplot()
    (low, high), lowest = _range(trace), float(trace.scores.min())
    image = axes.imshow(
        trace.scores.numpy(),
        cmap=_even(_COLOUR_MAPS[trace.kind]),
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
    )
    # A token may hold `$`, which starts no formula in a label.
    labels = [cut(label, LONGEST_LABEL) for label in _row_labels(trace)]
    axes.set_yticks(range(n_tokens), labels=labels, parse_math=False)
    layer_numbers(axes)
    axes.set_xlim(-0.5, n_layers - 0.5)
    note = f"\nwhite: {low:z.2g} or less; the lowest is {lowest:z.2g}" if lowest < low else ""
    severed = f"\n{_severed(trace)}" if trace.sever else ""
    axes.set_xlabel(_layer_axis(trace) + severed + note, fontsize=SMALL)
    headline(figure, _title(trace))
    bar = figure.colorbar(
        image, ax=axes, aspect=18, pad=0.02, extend="min" if lowest < low else "neither"
    )
    estimated = "estimated " if trace.is_estimate else ""
    bar.set_label(f"{estimated}{_answer(trace)}", fontsize=SMALL, parse_math=False)
    for each in (axes, bar.ax):
        thin_frame(each)
    bar.outline.set_linewidth(0.5)
    return finish(figure, path)


def text_heat_map(trace: CausalTrace, width: int = 80) -> Text:
    """Return the heat map as text: the darker the shading, the larger the probability.

    A row that beats the corrupted run ends with its largest score and the layer of that score, if
    the terminal is wide enough. If the model has more layers than fit, a cell shows the largest
    score of several neighbouring layers.

    Args:
        trace: The trace to draw.
        width: Columns of the terminal, at least 20.

    Returns:
        A rich `Text` in colour. `str()` of it is plain.

    Raises:
        InputError: for a smaller width or another record.
    """
    check_record(trace, CausalTrace, "text_heat_map")
    width = check_count(width, "width", "the number of columns", least=_MIN_WIDTH)
    n_layers = trace.scores.shape[1]
    labels = _row_labels(trace)
    label_width = min(max(cell_len(label) for label in labels), LONGEST_LABEL, width // 3)
    number_width = len(f" 0.000 @{n_layers - 1}") if width - label_width >= 30 else 0
    room = width - label_width - number_width - 3  # a space and the two bars of the frame
    per_cell = math.ceil(n_layers / room)
    cell_width = 2 if 2 * math.ceil(n_layers / per_cell) <= room else 1
    low, high = _range(trace)

    text = Text(no_wrap=True, overflow="crop")
    _append_line(text, _title(trace).replace("\n", " "), width, style="bold")
    _append_line(
        text, f"{_answer(trace)}: clean {trace.clean:z.3f}, corrupted {trace.corrupted:z.3f}", width
    )
    for token, row in enumerate(trace.scores.tolist()):
        text.append(
            fit(labels[token], label_width), style="bold" if labels[token].endswith("*") else ""
        )
        text.append(" │")
        cells = [max(row[first : first + per_cell]) for first in range(0, n_layers, per_cell)]
        shares = [min(max((cell - low) / (high - low), 0.0), 1.0) for cell in cells]
        text.append(
            "".join(_BLOCKS[round(s * (len(_BLOCKS) - 1))] * cell_width for s in shares),
            style=_TERMINAL_COLOURS[trace.kind],
        )
        text.append("│")
        top = max(row)
        # Compare the printed numbers: a gain that does not show in print is not worth pointing at.
        if number_width and round(top, 3) > round(trace.corrupted, 3):
            text.append(
                f" {top:z.3f} @{row.index(top)}", style="bold" if token == trace.peak[0] else "dim"
            )
        text.append("\n")
    text.append(" " * (label_width + 2) + _layer_ruler(n_layers, per_cell, cell_width) + "\n")
    pooled = f"; per cell the largest of {per_cell}" if per_cell > 1 else ""
    estimated = "estimated " if trace.is_estimate else ""
    largest = f"  right: row's largest {estimated}p @ layer" if number_width else ""
    _append_line(
        text, "; ".join(filter(None, (_layer_axis(trace), _severed(trace)))) + pooled, width
    )
    _append_line(text, f"{low:z.2f} {_BLOCKS[1:]} {high:z.2f}  *: subject{largest}", width)
    text.right_crop()
    return text


def class_map(average: AverageTrace, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw average indirect effects by kind of token and layer (Meng et al. 2022, Figure 2).

    Each kind of restoration has a panel with a colour scale of its own. White is no effect or a
    negative one; if there are negative ones, a line below gives the lowest. A kind of token that
    no fact has is hatched. See arXiv 2202.05262.

    Args:
        average: The average to draw.
        path: Where to save the figure, as for `heat_map`.
    """
    check_record(average, AverageTrace, "class_map")
    figure, panels = _panels(average, 0.55, 1.25)
    lows: list[float] = []
    for axes, name in zip(panels, average.effects, strict=True):
        effects = average.effects[name].numpy()
        top = max(float(np.nan_to_num(effects).max()), 1e-6)
        image = axes.imshow(
            effects,
            cmap=_even(_COLOUR_MAPS[_kind(name)]),
            vmin=0,
            vmax=top,
            aspect="auto",
            interpolation="nearest",
        )
        for row, count in enumerate(average.counts):
            if not count:
                _hatch_row(axes, row, effects.shape[1])
        axes.set_yticks(range(len(average.classes)), labels=average.classes)
        panel_title(axes, _map_title(name, average))
        lows.append(min(0.0, float(np.nan_to_num(effects).min())))
        bar = figure.colorbar(
            image, ax=axes, aspect=9, pad=0.02, extend="min" if lows[-1] < 0 else "neither"
        )
        bar.outline.set_linewidth(0.5)
        for each in (axes, bar.ax):
            thin_frame(each)
    layer_numbers(panels[-1])
    lowest = min(lows)
    note = (
        f"\nwhite: no effect or a negative one; the lowest is −{-lowest:.2g}" if lowest < 0 else ""
    )
    figure.supxlabel(_CENTRE + note, fontsize=SMALL)
    headline(figure, f"Average indirect effect, {average.n_facts} facts")
    return finish(figure, path)


def class_lines(average: AverageTrace, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw average indirect effects as curves over the layers, with their 95 % intervals.

    Each kind of restoration has a panel. A kind of token has the same line in every figure.

    Args:
        average: The average to draw.
        path: Where to save the figure, as for `heat_map`.
    """
    check_record(average, AverageTrace, "class_lines")
    figure, panels = _panels(average, 0.85, 1.35)
    for axes, name in zip(panels, average.effects, strict=True):
        tables = [getattr(average, part)[name].tolist() for part in ("effects", "low", "high")]
        n_layers = average.effects[name].shape[1]
        present = [row for row, count in enumerate(average.counts) if count]
        series = {
            average.classes[row]: (range(n_layers), *(table[row] for table in tables))
            for row in present
        }
        draw_lines(axes, series, [LINES[row] for row in present])
        axes.axhline(0, color="black", linewidth=0.5)
        panel_title(axes, _map_title(name, average))
        axes.set_ylabel("AIE", fontsize=SMALL)
        thin_frame(axes)
    layer_numbers(panels[-1])
    panels[-1].set_xlabel(_CENTRE, fontsize=SMALL)
    legend_below(figure, panels[0], columns=2)
    headline(figure, f"Average indirect effect (AIE), {average.n_facts} facts, 95 % intervals")
    return finish(figure, path)


# ── averages ──────────────────────────────────────────────────────────────────────────────────────


def _panels(average: AverageTrace, margin: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel below another for each map; sizes in inches."""
    n = len(average.effects)
    figure = Picture(figsize=(COLUMN_WIDTH, margin + height * n), dpi=300, layout="constrained")
    return figure, list(figure.subplots(n, 1, sharex=True, squeeze=False)[:, 0])


def _hatch_row(axes: Axes, row: int, n_layers: int) -> None:
    """Mark a kind of token that no fact has."""
    axes.axhspan(row - 0.5, row + 0.5, facecolor="0.93", edgecolor="0.7", hatch="////", linewidth=0)
    axes.text(
        (n_layers - 1) / 2,
        row,
        "no such token",
        fontsize=6.5,
        ha="center",
        va="center",
        bbox={"facecolor": "0.93", "linewidth": 0, "pad": 0.5},
    )


def _kind(name: str) -> str:
    """Return what a map restores: "state, mlp severed" restores states."""
    return name.partition(",")[0]


def _map_title(name: str, average: AverageTrace) -> str:
    kind, _, severed = name.partition(", ")
    together = min(average.window, average.effects[name].shape[1])
    restored = _restored(kind, "one hidden state", str(together))
    part = _PARTS.get(severed.removesuffix(" severed"))
    return f"{restored}, {part} severed" if part else restored


# ── traces ────────────────────────────────────────────────────────────────────────────────────────


def _range(trace: CausalTrace) -> tuple[float, float]:
    """Return the probabilities of the lightest and the darkest colour; they always differ."""
    return trace.corrupted, max(float(trace.scores.max()), trace.corrupted + 1e-6)


def _even(name: str) -> ListedColormap:
    """Resample a matplotlib colour map, so that its lightness falls evenly from end to end.

    Equal steps then look equal, in grey print too.
    """
    share = np.linspace(0, 1, 256)
    colours = colormaps[name](share)[:, :3]
    light = np.where(  # sRGB with its gamma undone
        colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4
    )
    lightness = np.cbrt(light @ (0.2126, 0.7152, 0.0722))  # CIE L*, up to scale and offset
    wanted = np.linspace(lightness[0], lightness[-1], 256)
    return ListedColormap(
        colormaps[name](np.interp(-wanted, -lightness, share)), name=f"{name}, even"
    )


def _title(trace: CausalTrace) -> str:
    """Return what is restored, what is severed, and whether it is estimated; in two lines."""
    n_layers = trace.scores.shape[1]
    together = str(trace.window) if trace.window <= n_layers else f"up to {n_layers}"
    restored = _restored(trace.kind, "the hidden state", together)
    severed = "" if trace.sever is None else f" with {_PARTS[trace.sever]} severed,"
    if trace.is_estimate:
        return f"Estimated by gradients: restoring {restored}\nafter corrupting the subject"
    return f"Restoring {restored}{severed}\nafter corrupting the subject"


def _severed(trace: CausalTrace) -> str:
    """Return what `severed` in the title means, or nothing."""
    part = None if trace.sever is None else _PARTS[trace.sever]
    return f"severed: {part} outputs above stay as corrupted" if part else ""


def _layer_axis(trace: CausalTrace) -> str:
    if trace.kind == "state":
        return "restored layer"
    n_layers = trace.scores.shape[1]
    if trace.window <= n_layers:
        return f"centre of the {trace.window} restored layers"
    return f"centre of the restored layers, at most {n_layers}"


def _restored(kind: str, state: str, together: str) -> str:
    """Return what is restored at once: `state`, or so many outputs."""
    part = _PARTS.get(kind)
    return f"{together} {part} outputs" if part else state


def _answer(trace: CausalTrace) -> str:
    """Return the name of the probability, as a colour bar and a legend have it."""
    return f"p({cut(token_label(trace.answer), LONGEST_LABEL)})"


def _row_labels(trace: CausalTrace) -> list[str]:
    start, stop = trace.subject_span
    return [
        token_label(token) + ("*" if start <= i < stop else "")
        for i, token in enumerate(trace.tokens)
    ]


# ── text ──────────────────────────────────────────────────────────────────────────────────────────


def _append_line(text: Text, line: str, width: int, style: str = "") -> None:
    """Add a line of words, wrapped to the width."""
    for part in textwrap.wrap(line, width):
        text.append(cut(part, width) + "\n", style=style)


def _layer_ruler(n_layers: int, per_cell: int, cell_width: int) -> str:
    """Return layer numbers, evenly spaced, each at the first column of its cell.

    Spaces separate the numbers, and the last one ends at the frame or before it.
    """
    n_cells = math.ceil(n_layers / per_cell)
    stride = len(str(n_layers - 1)) // cell_width + 1  # cells from one number to the next
    numbers = [(cell, str(cell * per_cell)) for cell in range(0, n_cells, stride)]
    return "".join(
        n.ljust(stride * cell_width)
        for cell, n in numbers
        if cell * cell_width + len(n) <= n_cells * cell_width + 1
    ).rstrip()
