"""What the figures share: colours, axes, labels, and saving to a file.

    figure, panels = side_by_side(2, height=2.4)
    draw_lines(panels[0], {"label": (x, y, low, high)}, LINES)
    layer_axes(panels[0])
    headline(figure, "Selective neurons")
    finish(figure, "picture.svg")

A figure is one column of a two-column page wide, unless it has several panels in a row.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.cells import cell_len, set_cell_size

from ...core.errors import InputError, WorkspaceError
from ...core.tables import visible

Series: TypeAlias = (
    "Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]]"
)
"""Lines with bands, by their labels: (x, y, low, high)."""

COLUMN_WIDTH = 3.4
"""The width of one column of a two-column page, in inches."""

LONGEST_LABEL = 16
"""The most characters of a token that a label shows."""

SMALL = 7.5
"""The font size of axis labels and of the titles of panels, in points."""

# The colours of Okabe and Ito, which colour-blind readers can tell apart. Dash and marker say the
# same without any colour.
BLUE = "#0072B2"

LINES = (
    (BLUE, "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#E69F00", (0, (5, 1)), "v"),
    ("#000000", (0, (1, 1)), "x"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "P"),
    ("#808080", (0, (8, 2)), "*"),
)
"""The looks of lines: colour, dash and marker."""

# Lightness and hatching tell these apart as well.
FILLINGS: tuple[dict[str, Any], ...] = (
    {"facecolor": BLUE},
    {"facecolor": "#E69F00", "hatch": "////"},
    {"facecolor": "#009E73"},
    {"facecolor": "#F0E442", "hatch": "...."},
    {"facecolor": "#D55E00"},
    {"facecolor": "#CCCCCC", "hatch": "xxxx"},
    {"facecolor": "#56B4E9"},
    {"facecolor": "#CC79A7", "hatch": "\\\\\\\\"},
)
"""The looks of bars that show different things."""

_SUFFIXES = (".png", ".svg", ".pdf")

_LINE_BREAKS = str.maketrans({"\n": "↵", "\r": "↵", "\t": "→"})

_DRAWN_BY = {
    "CausalTrace": "heat_map",
    "AverageTrace": "class_map or class_lines",
    "KnowledgeNeurons": "neuron_chart",
    "Composition": "prediction_chart",
    "Refinement": "refinement_chart",
    "Evaluation": "evaluation_chart",
    "Profile": "profile_lines or profile_bars",
    "Agreement": "agreement_chart",
    "Census": "census_chart",
}
"""The functions that draw a record, by the name of its class."""


class Picture(Figure):
    """A figure that a notebook shows at the size it has on the page."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return _render(self, "png", dpi=150), {"width": round(110 * self.get_figwidth())}


# ── what is drawn ─────────────────────────────────────────────────────────────────────────────────


def check_record(record: object, kind: type, drawn_by: str) -> None:
    """Raise InputError if a function cannot draw this record, and name one that can."""
    if not isinstance(record, kind):
        name = type(record).__name__
        instead = f"; draw it with {_DRAWN_BY[name]}" if name in _DRAWN_BY else ""
        raise InputError(f"{drawn_by} draws a {kind.__name__}; got a {name}{instead}")


def by_title(records: Any, kind: type, drawn_by: str) -> dict[str, Any]:
    """Return the records by the titles of their panels; a single record has its model as title.

    Raises:
        InputError: when there is no record, or one of another kind.
    """
    panels = (
        dict(records) if isinstance(records, Mapping) else {getattr(records, "model", ""): records}
    )
    for record in list(panels.values()) or [panels]:
        check_record(record, kind, drawn_by)
    return panels


def token_label(token: str) -> str:
    """Return a token as one line: no outer spaces, marks for line breaks, "␣" for spaces alone."""
    return visible(token.strip(" ").translate(_LINE_BREAKS)) or "␣"


def fit(text: str, width: int) -> str:
    """Return the text in exactly `width` terminal cells: padded, or cut with an ellipsis.

    A trailing * marks a subject token, so it survives the cut.
    """
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    tail = "…*" if text.endswith("*") else "…"
    return set_cell_size(text, width - len(tail)) + tail


def cut(text: str, width: int) -> str:
    """Return the text, cut with an ellipsis if it needs more than `width` terminal cells."""
    return fit(text, width).rstrip()


# ── figures and axes ──────────────────────────────────────────────────────────────────────────────


def side_by_side(n: int, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure with `n` panels in a row, and its panels row by row.

    Args:
        n: Panels in a row. Two of them are as wide as a page.
        height: Of the figure, in inches.
        rows: Rows of panels.
    """
    figure = Picture(
        figsize=(COLUMN_WIDTH * max(1, n * 0.94), height),
        dpi=300 if n == 1 else 200,
        layout="constrained",
    )
    return figure, list(figure.subplots(rows, n, squeeze=False).flat)


def headline(figure: Figure, text: str, *, parse_math: bool = False) -> None:
    """Write the title of a figure; text from a model may hold `$`, so it is no formula."""
    figure.suptitle(text, fontsize=8, x=0.02, ha="left", parse_math=parse_math)


def panel_title(axes: Axes, text: str, *, pad: float = 3) -> None:
    """Write the title of a panel."""
    axes.set_title(text, fontsize=SMALL, loc="left", pad=pad, parse_math=False)


def thin_frame(axes: Axes) -> None:
    """Draw small ticks and a thin frame."""
    axes.tick_params(labelsize=7, length=2, width=0.5)
    for edge in axes.spines.values():
        edge.set_linewidth(0.5)


def layer_numbers(axes: Axes) -> None:
    """Put at most eight round layer numbers on the x axis."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))


def layer_axes(axes: Axes) -> None:
    """Finish a panel whose x axis is the layer."""
    layer_numbers(axes)
    axes.set_xlabel("layer", fontsize=SMALL)
    thin_frame(axes)


def shared_heights(panels: Sequence[Axes], label: str) -> None:
    """Give all panels the same scale from 0, so that a reader can compare heights."""
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0, top)
    panels[0].set_ylabel(label, fontsize=SMALL)


def legend_below(figure: Figure, axes: Axes, columns: int | None = None) -> None:
    """Write the legend of one panel below the figure; None: as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if columns is None:
        columns = 2 if figure.get_figwidth() < 1.5 * COLUMN_WIDTH else 4
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize=6.5,
        frameon=False,
        handlelength=2.6,
    )


def draw_lines(axes: Axes, series: Series, looks: Iterable[tuple[str, Any, str]]) -> None:
    """Draw lines with their bands, each with one of the `looks` (as `LINES` has them)."""
    for (label, (x, y, low, high)), (colour, dash, marker) in zip(
        series.items(), looks, strict=False
    ):
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=2.6,
            markevery=max(1, len(x) // 8),
            linewidth=1.0,
            label=label,
        )
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def filling(solid: bool) -> dict[str, Any]:
    """Return the look of a solid or a hatched bar: lightness tells them apart, not colour."""
    if solid:
        return {"facecolor": BLUE, "edgecolor": BLUE, "linewidth": 0.5}
    return {"facecolor": "white", "edgecolor": BLUE, "linewidth": 0.5, "hatch": "////"}


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def finish(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Save the figure if there is a path, and return it.

    Raises:
        InputError: for a suffix other than .png, .svg and .pdf.
        WorkspaceError: when the file cannot be written.
    """
    if path is not None:
        _save(figure, Path(path))
    return figure


def check_path(path: str | os.PathLike[str]) -> None:
    """Check that a figure can be saved under this name, before anything is computed.

    Raises:
        InputError: for a suffix other than .png, .svg and .pdf.
        WorkspaceError: when the folder does not exist.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(
            f"cannot draw {path.name!r}: its suffix is {suffix or 'missing'}; "
            f"expected one of {', '.join(_SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise WorkspaceError(f"cannot draw {path}: {path.parent} is not a folder; make it first")


def _save(figure: Figure, path: Path) -> None:
    check_path(path)
    picture = _render(figure, path.suffix.lower()[1:])  # first, so that an error leaves the file
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise WorkspaceError(
            f"cannot write {path}: {error.strerror}; choose a folder that can be written"
        ) from None


def _render(figure: Figure, kind: str, dpi: float | str = "figure") -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        # The font draws boxes for a script that it lacks. That is no reason to warn the caller.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(content, format=kind, dpi=dpi)
    return content.getvalue()
