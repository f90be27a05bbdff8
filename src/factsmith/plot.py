"""Every picture: a causal trace as the literature's heat map, on paper and in the terminal.

    heat_map(trace, path="trace.svg")        tokens × layers, subject marked with *, PNG, SVG or PDF by the suffix
    print(text_heat_map(trace, width=80))    the same with shading blocks; in colour through a rich console

Figures are made without pyplot, so nothing here opens a window or touches the caller's plotting state.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from .errors import InputError, WorkspaceError
from .locate.causal import CausalTrace

# One sequential map a kind, as in the paper's figures; lightness falls evenly, so the order survives grey print and colour blindness.
_COLOUR_MAPS = {"state": "Purples", "mlp": "Greens", "attention": "Reds"}
_TERMINAL_COLOURS = {"state": "magenta", "mlp": "green", "attention": "red"}
_BLOCKS = " ░▒▓█"
_SUFFIXES = (".png", ".svg", ".pdf")
_COLUMN_WIDTH = 3.4  # inches: one column of a two-column page
_VISIBLE = str.maketrans({"\n": "↵", "\r": "↵", "\t": "→"})
_LONGEST_LABEL = 18  # terminal cells
_MIN_WIDTH = 20


def heat_map(trace: CausalTrace, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw p(answer) after restoring each (token, layer), as Figure 1 of Meng et al. 2022 (arXiv 2202.05262).

    Rows are tokens, the subject's marked with *; columns are layers. The colour runs from the corrupted to the clean probability, so maps
    of different kinds of one prompt can be compared. `path` also saves it: PNG, SVG or PDF by its suffix. Raises InputError for another
    suffix and WorkspaceError when the file cannot be written.
    """
    n_tokens, n_layers = trace.scores.shape
    figure = Figure(figsize=(_COLUMN_WIDTH, 1.15 + 0.155 * n_tokens), dpi=300, layout="constrained")
    axes = figure.add_subplot()
    low, high = _range(trace)
    image = axes.imshow(
        trace.scores.cpu().numpy(), cmap=_COLOUR_MAPS[trace.kind], vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    # Token text may hold `$`, which is no formula here.
    axes.set_yticks(range(n_tokens), labels=_row_labels(trace), fontsize=7, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(length=2, width=0.5)
    axes.set_xlim(-0.5, n_layers - 0.5)
    for edge in axes.spines.values():
        edge.set_linewidth(0.5)
    axes.set_xlabel(_layer_axis(trace), fontsize=7.5)
    axes.set_title(_title(trace), fontsize=8, loc="left", parse_math=False)
    bar = figure.colorbar(image, ax=axes, aspect=18, pad=0.02)
    bar.outline.set_linewidth(0.5)
    bar.ax.tick_params(labelsize=7, length=2, width=0.5)
    bar.ax.set_title(f"p({_fit(_visible(trace.answer), 12).rstrip()})", fontsize=7, parse_math=False)
    if path is not None:
        _save(figure, Path(path))
    return figure


def text_heat_map(trace: CausalTrace, width: int = 80) -> Text:
    """The heat map for a terminal of `width` columns (at least 20): shading from the corrupted to the clean probability, one line a token.

    Returns a rich `Text`; `str()` of it is plain. Beside each row stands its largest probability and the layer, where there is room; a
    trace with more layers than columns shows the maximum over neighbouring layers. Raises InputError when `width` is below 20.
    """
    if width < _MIN_WIDTH:
        raise InputError(f"width is {width}; expected at least {_MIN_WIDTH} columns")
    n_layers = trace.scores.shape[1]
    labels = _row_labels(trace)
    label_width = min(max(cell_len(label) for label in labels), _LONGEST_LABEL, width // 3)
    number_width = len(f" 0.000 @{n_layers - 1}") if width - label_width >= 30 else 0
    room = width - label_width - number_width - 3  # a space and two frame bars
    per_cell = math.ceil(n_layers / room)
    n_cells = math.ceil(n_layers / per_cell)
    cell_width = 2 if 2 * n_cells <= room else 1
    low, high = _range(trace)
    style = _TERMINAL_COLOURS[trace.kind]
    best = divmod(int(trace.scores.argmax()), n_layers)

    text = Text(no_wrap=True, overflow="crop")
    for line in (_title(trace, " "), f"p({_visible(trace.answer)}) clean {trace.clean:.3f}, corrupted {trace.corrupted:.3f}"):
        text.append(_fit(line, width).rstrip() + "\n", style="bold" if not text else "")
    for token, row in enumerate(trace.scores.tolist()):
        text.append(_fit(labels[token], label_width), style="bold" if labels[token].endswith("*") else "")
        text.append(" │")
        for first in range(0, n_layers, per_cell):
            share = (max(row[first : first + per_cell]) - low) / (high - low)
            text.append(_BLOCKS[round(share * (len(_BLOCKS) - 1))] * cell_width, style=style)
        text.append("│")
        if number_width:
            top = max(row)
            number = f" {top:.3f} @{row.index(top)}" if top > trace.corrupted else ""
            text.append(number, style="bold" if token == best[0] else "dim")
        text.append("\n")
    text.append(" " * (label_width + 2) + _layer_ruler(n_layers, per_cell, cell_width) + "\n")
    pooled = f", {per_cell} a cell" if per_cell > 1 else ""
    text.append(_fit(f"{_layer_axis(trace)}{pooled}", width).rstrip() + "\n")
    legend = f"{_BLOCKS[0]}{low:.2f} {_BLOCKS[1:]} {high:.2f}"
    text.append(_fit(f"{legend}  * subject", width).rstrip())
    return text


def _range(trace: CausalTrace) -> tuple[float, float]:
    """The probabilities that the lightest and darkest colour stand for; never equal."""
    low = min(trace.corrupted, float(trace.scores.min()))
    high = max(trace.clean, float(trace.scores.max()))
    return low, max(high, low + 1e-6)


def _title(trace: CausalTrace, separator: str = "\n") -> str:
    what = {"state": "the hidden state", "mlp": f"{trace.window} FFN outputs", "attention": f"{trace.window} attention outputs"}[trace.kind]
    return f"Restoring {what}{separator}after corrupting the subject"


def _layer_axis(trace: CausalTrace) -> str:
    return "restored layer" if trace.kind == "state" else f"centre of the {trace.window} restored layers"


def _row_labels(trace: CausalTrace) -> list[str]:
    start, stop = trace.subject_span
    return [_visible(token) + ("*" if start <= i < stop else "") for i, token in enumerate(trace.tokens)]


def _visible(token: str) -> str:
    """A token as one line of text: outer spaces dropped, line breaks shown, an all-space token as an open box."""
    return token.strip(" ").translate(_VISIBLE) or "␣"


def _fit(text: str, width: int) -> str:
    """Exactly `width` terminal cells: padded, or cut with an ellipsis; a trailing * survives the cut."""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    tail = "…*" if text.endswith("*") else "…"
    return set_cell_size(text, width - len(tail)) + tail


def _layer_ruler(n_layers: int, per_cell: int, cell_width: int) -> str:
    """Layer numbers under the first cell they belong to, as many as fit without touching."""
    ruler = ""
    for first in range(0, n_layers, per_cell):
        at = first // per_cell * cell_width
        if at >= len(ruler) + (1 if ruler else 0):
            ruler = ruler.ljust(at) + str(first)
    return ruler


def _save(figure: Figure, path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(f"cannot draw {path.name!r}: the suffix is {suffix or 'missing'}; expected one of {', '.join(_SUFFIXES)}")
    picture = io.BytesIO()  # drawn in full before the file is touched
    with warnings.catch_warnings():
        # A script the font lacks is drawn as boxes; that is no reason to interrupt the caller.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(picture, format=suffix[1:])
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise WorkspaceError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from None
