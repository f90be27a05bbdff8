"""show.plots.traces."""

from __future__ import annotations

import math
import os
import textwrap

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from ...core.checks import check_count
from ...locate.average import AverageTrace
from ...locate.records import CausalTrace
from .drawing import (
    COLUMN_WIDTH,
    LINES,
    PLAIN,
    Picture,
    check_record,
    draw_lines,
    finished,
    quiet,
    visible,
)

# One sequential map a kind, in the tints of the paper's figures.
_COLOUR_MAPS = {"state": "Purples", "mlp": "Greens", "attention": "Reds"}

_TERMINAL_COLOURS = {"state": "magenta", "mlp": "green", "attention": "red"}

_BLOCKS = " ·░▒▓█"

LONGEST_LABEL = 16  # characters of a token

_MIN_WIDTH = 20


def heat_map(trace: CausalTrace, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw p(answer) after restoring each (token, layer), as Figure 1 of Meng et al. 2022 (arXiv 2202.05262).

    Rows are tokens, the subject's marked with *; columns are layers. The colour runs from the corrupted probability (white: restoring this
    brings nothing, or harms; a line below says down to what) to the largest score. `path` also saves it: PNG, SVG or PDF by its suffix.
    Raises InputError for another suffix or another record, and WorkspaceError when the file cannot be written.
    """
    check_record(trace, CausalTrace, "heat_map")
    n_tokens, n_layers = trace.scores.shape
    figure = Picture(figsize=(COLUMN_WIDTH, 1.25 + 0.155 * n_tokens), dpi=300, layout="constrained")
    axes = figure.add_subplot()
    (low, high), lowest = _range(trace), float(trace.scores.min())
    colours = _even(_COLOUR_MAPS[trace.kind])
    image = axes.imshow(
        trace.scores.numpy(),
        cmap=colours,
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
    )
    # Token text may hold `$`, which is no formula here.
    axes.set_yticks(
        range(n_tokens),
        labels=[fit(label, LONGEST_LABEL).rstrip() for label in _row_labels(trace)],
        parse_math=False,
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(-0.5, n_layers - 0.5)
    note = f"\nwhite: {low:.2g} or less, down to {lowest:.2g}" if lowest < low else ""
    axes.set_xlabel(_layer_axis(trace) + note, fontsize=7.5)
    figure.suptitle(_title(trace), fontsize=8, x=0.02, ha="left", parse_math=False)
    bar = figure.colorbar(
        image, ax=axes, aspect=18, pad=0.02, extend="min" if lowest < low else "neither"
    )
    bar.set_label(_answer(trace), fontsize=7.5, parse_math=False)
    for each in (axes, bar.ax):
        quiet(each)
    bar.outline.set_linewidth(0.5)
    return finished(figure, path)


def text_heat_map(trace: CausalTrace, width: int = 80) -> Text:
    """The heat map for a terminal of `width` columns (at least 20): shading from the corrupted probability to the largest score.

    Returns a rich `Text`; `str()` of it is plain. Beside a row that beats the corrupted probability stands its largest score and the layer,
    where there is room; a trace with more layers than columns shows the maximum over neighbouring layers. Raises InputError for a
    smaller width or another record.
    """
    check_record(trace, CausalTrace, "text_heat_map")
    width = check_count(width, "width", "the number of columns", least=_MIN_WIDTH)
    n_layers = trace.scores.shape[1]
    labels = _row_labels(trace)
    label_width = min(max(cell_len(label) for label in labels), LONGEST_LABEL, width // 3)
    number_width = len(f" 0.000 @{n_layers - 1}") if width - label_width >= 30 else 0
    room = width - label_width - number_width - 3  # a space and two frame bars
    per_cell = math.ceil(n_layers / room)
    cell_width = 2 if 2 * math.ceil(n_layers / per_cell) <= room else 1
    low, high = _range(trace)

    text = Text(no_wrap=True, overflow="crop")
    _append_line(text, _title(trace).replace("\n", " "), width, style="bold")
    _append_line(
        text, f"{_answer(trace)}: clean {trace.clean:.3f}, corrupted {trace.corrupted:.3f}", width
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
        # Compared as printed: what reads the same as the corrupted probability is no gain to point at.
        if number_width and round(top, 3) > round(trace.corrupted, 3):
            text.append(
                f" {top:.3f} @{row.index(top)}", style="bold" if token == trace.peak[0] else "dim"
            )
        text.append("\n")
    text.append(" " * (label_width + 2) + _layer_ruler(n_layers, per_cell, cell_width) + "\n")
    pooled = f", {per_cell} a cell" if per_cell > 1 else ""
    largest = "  p @ layer: largest of its row" if number_width else ""
    _append_line(text, f"{_layer_axis(trace)}{pooled}", width)
    _append_line(text, f"{low:.2f} {_BLOCKS[1:]} {high:.2f}  * subject{largest}", width)
    text.right_crop()
    return text


def class_map(average: AverageTrace, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw average indirect effects by class of token and layer, one panel a map: Figure 2 of Meng et al. 2022 (arXiv 2202.05262).

    White is no effect, or a negative one: a line below says down to which. A class that no fact has is hatched. Each panel has a scale of
    its own. `path` as for `heat_map`.
    """
    check_record(average, AverageTrace, "class_map")
    names = list(average.effects)
    figure = Picture(
        figsize=(COLUMN_WIDTH, 0.55 + 1.25 * len(names)), dpi=300, layout="constrained"
    )
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    lows: list[float] = []
    for axes, name in zip(panels, names, strict=True):
        effects = average.effects[name].numpy()
        colours = _even(_COLOUR_MAPS[_kind(name)])
        top = max(float(np.nan_to_num(effects).max()), 1e-6)
        image = axes.imshow(
            effects, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="nearest"
        )
        for row, count in enumerate(average.counts):
            if not count:
                axes.axhspan(
                    row - 0.5,
                    row + 0.5,
                    facecolor="0.93",
                    edgecolor="0.7",
                    hatch="////",
                    linewidth=0,
                )
                axes.text(
                    (effects.shape[1] - 1) / 2,
                    row,
                    "none",
                    fontsize=6.5,
                    ha="center",
                    va="center",
                    bbox=PLAIN,
                )
        axes.set_yticks(range(len(average.classes)), labels=average.classes)
        axes.set_title(_map_title(name, average), fontsize=7.5, loc="left", pad=3)
        lows.append(min(0.0, float(np.nan_to_num(effects).min())))
        bar = figure.colorbar(
            image, ax=axes, aspect=9, pad=0.02, extend="min" if lows[-1] < 0 else "neither"
        )
        bar.outline.set_linewidth(0.5)
        for each in (axes, bar.ax):
            quiet(each)
    panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    note = (
        f"\nwhite: no effect, or a negative one, down to −{-min(lows):.2g}" if min(lows) < 0 else ""
    )
    figure.supxlabel(f"restored layer, or centre of the restored layers{note}", fontsize=7.5)
    figure.suptitle(
        f"Average indirect effect, {average.n_facts} facts", fontsize=8, x=0.02, ha="left"
    )
    return finished(figure, path)


def class_lines(average: AverageTrace, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw the same averages as curves over the layers with their 95 % intervals, one panel a map.

    A class has the same line in every figure. `path` as for `heat_map`.
    """
    check_record(average, AverageTrace, "class_lines")
    names = list(average.effects)
    figure = Picture(
        figsize=(COLUMN_WIDTH, 0.85 + 1.35 * len(names)), dpi=300, layout="constrained"
    )
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        tables = [getattr(average, part)[name].tolist() for part in ("effects", "low", "high")]
        n_layers = average.effects[name].shape[1]
        present = [row for row, count in enumerate(average.counts) if count]
        series = {
            average.classes[row]: (range(n_layers), *(table[row] for table in tables))
            for row in present
        }
        draw_lines(axes, series, [LINES[row] for row in present])
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_title(_map_title(name, average), fontsize=7.5, loc="left", pad=3)
        axes.set_ylabel("AIE", fontsize=7.5)
        quiet(axes)
    panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    panels[-1].set_xlabel("restored layer, or centre of the restored layers", fontsize=7.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2,
        fontsize=6.5,
        frameon=False,
        handlelength=2.6,
    )
    figure.suptitle(
        f"Average indirect effect, {average.n_facts} facts, 95 % intervals",
        fontsize=8,
        x=0.02,
        ha="left",
    )
    return finished(figure, path)


def _kind(name: str) -> str:
    """What a map of an average restores: "state, mlp severed" restores states."""
    return name.partition(",")[0]


def _map_title(name: str, average: AverageTrace) -> str:
    kind, _, severed = name.partition(", ")
    together = min(average.window, average.effects[name].shape[1])
    what = {
        "state": "one hidden state",
        "mlp": f"{together} FFN outputs",
        "attention": f"{together} attention outputs",
    }[kind]
    part = {"mlp": "FFN", "attention": "attention"}.get(severed.removesuffix(" severed"), "")
    return f"{what}, {part} severed" if part else what


def _append_line(text: Text, line: str, width: int, style: str = "") -> None:
    """Add a line of words, wrapped to the width."""
    for part in textwrap.wrap(line, width):
        text.append(fit(part, width).rstrip() + "\n", style=style)


def _range(trace: CausalTrace) -> tuple[float, float]:
    """The probabilities that the lightest and the darkest colour stand for; never equal."""
    return trace.corrupted, max(float(trace.scores.max()), trace.corrupted + 1e-6)


def _even(name: str) -> ListedColormap:
    """A matplotlib colour map resampled so that lightness falls evenly from end to end: equal steps look equal, in grey print too."""
    share = np.linspace(0, 1, 256)
    colours = colormaps[name](share)[:, :3]
    light = np.where(
        colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4
    )  # out of sRGB's gamma
    lightness = np.cbrt(light @ (0.2126, 0.7152, 0.0722))  # CIE L*, up to scale and offset
    wanted = np.linspace(lightness[0], lightness[-1], 256)
    return ListedColormap(
        colormaps[name](np.interp(-wanted, -lightness, share)), name=f"{name}, even"
    )


def _together(trace: CausalTrace) -> str:
    """How many layers a window holds; the model's ends cut it."""
    n_layers = trace.scores.shape[1]
    return str(trace.window) if trace.window <= n_layers else f"up to {n_layers}"


def _title(trace: CausalTrace) -> str:
    """What is restored, in two lines."""
    together = _together(trace)
    what = {
        "state": "the hidden state",
        "mlp": f"{together} FFN outputs",
        "attention": f"{together} attention outputs",
    }[trace.kind]
    return f"Restoring {what}\nafter corrupting the subject"


def _answer(trace: CausalTrace) -> str:
    return f"p({fit(visible(trace.answer), LONGEST_LABEL).rstrip()})"


def _layer_axis(trace: CausalTrace) -> str:
    return (
        "restored layer"
        if trace.kind == "state"
        else f"centre of the {_together(trace)} restored layers"
    )


def _row_labels(trace: CausalTrace) -> list[str]:
    start, stop = trace.subject_span
    return [
        visible(token) + ("*" if start <= i < stop else "") for i, token in enumerate(trace.tokens)
    ]


def fit(text: str, width: int) -> str:
    """Exactly `width` terminal cells: padded, or cut with an ellipsis; a trailing * survives the cut."""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    tail = "…*" if text.endswith("*") else "…"
    return set_cell_size(text, width - len(tail)) + tail


def _layer_ruler(n_layers: int, per_cell: int, cell_width: int) -> str:
    """Layer numbers, each beginning under its cell, evenly spaced, apart from one another, and no further than the frame."""
    n_cells = math.ceil(n_layers / per_cell)
    stride = (
        len(str(n_layers - 1)) // cell_width + 1
    )  # cells from one number to the next, so that a space stays between
    numbers = [(cell, str(cell * per_cell)) for cell in range(0, n_cells, stride)]
    return "".join(
        n.ljust(stride * cell_width)
        for cell, n in numbers
        if cell * cell_width + len(n) <= n_cells * cell_width + 1
    ).rstrip()
