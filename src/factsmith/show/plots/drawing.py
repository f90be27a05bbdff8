"""Every picture: causal traces, knowledge neurons and what scaling them does, for paper and for the terminal.

    heat_map(trace, path="trace.svg")        tokens × layers, subject marked with *; PNG, SVG or PDF by the suffix
    print(text_heat_map(trace, width=80))    the same with shading blocks; in colour through a rich console
    class_map(average), class_lines(average) average indirect effects by kind of token and layer: the map, and curves with intervals
    neuron_chart(found)                      the neurons that carry one fact, and the layers they lie in
    curves({"label": (x, y, low, high)})     lines with bands, such as an effect against the number of neurons
    profile_lines(found), profile_bars(...)  what a layer's neurons go by: shares of them by feature, and one feature's values
    agreement_chart(found), census_chart(..) whether keys and values agree, by layer; what a model is made of
    evaluation_chart(runs)                   judged edits: against their number, and round by round
    prediction_chart(composition)            one prediction: how it comes up the layers, and what each part adds to it
    refinement_chart(refinement)             many of them: whose a layer's prediction is, and where answers come up

Figures are made without pyplot, so nothing here opens a window or touches the caller's plotting state.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...core.errors import InputError, WorkspaceError
from ...judge.evaluation import Evaluation
from ...locate.average import AverageTrace
from ...locate.records import CausalTrace
from ...locate.neurons import KnowledgeNeurons
from ...read.agreement import Agreement
from ...read.census import Census
from ...read.composition import Composition
from ...read.profile import Profile
from ...read.refinement import Refinement

if TYPE_CHECKING:
    pass


# Okabe and Ito's colours, which the colour-blind tell apart; dash and marker say the same without any colour.
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

# Fillings of bars, told apart by lightness and hatching as well.
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

_SUFFIXES = (".png", ".svg", ".pdf")

COLUMN_WIDTH = 3.4  # inches: one column of a two-column page

_VISIBLE = str.maketrans({"\n": "↵", "\r": "↵", "\t": "→"})

PLAIN = {"facecolor": "0.93", "linewidth": 0, "pad": 0.5}  # behind words on hatching


class Picture(Figure):
    """A figure that a notebook shows as it is, at the size of a column on the page."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return _drawn(self, "png", dpi=150), {"width": round(110 * self.get_figwidth())}


def by_title(found: Any, kind: type, drawn_by: str) -> dict[str, Any]:
    """One record, or several by title, as several by title. Raises InputError for others, or none."""
    panels = dict(found) if isinstance(found, Mapping) else {getattr(found, "model", ""): found}
    for record in list(panels.values()) or [panels]:
        check_record(record, kind, drawn_by)
    return panels


def side_by_side(n: int, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in a row, two to the width of a page, and rows of them."""
    figure = Picture(
        figsize=(COLUMN_WIDTH * max(1, n * 0.94), height),
        dpi=300 if n == 1 else 200,
        layout="constrained",
    )
    return figure, list(figure.subplots(rows, n, squeeze=False).flat)


def shared_heights(grid: Sequence[Axes], label: str) -> None:
    """The same scale from 0 for all, so that heights can be compared."""
    top = max(axes.get_ylim()[1] for axes in grid)
    for axes in grid:
        axes.set_ylim(0, top)
    grid[0].set_ylabel(label, fontsize=7.5)


def layer_axes(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("layer", fontsize=7.5)
    quiet(axes)


def legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
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


def draw_lines(
    axes: Axes,
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]],
    styles: Iterable[tuple[str, Any, str]],
) -> None:
    for (label, (x, y, low, high)), (colour, dash, marker) in zip(
        series.items(), styles, strict=False
    ):
        spacing = max(1, len(x) // 8)
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=2.6,
            markevery=spacing,
            linewidth=1.0,
            label=label,
        )
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def filling(solid: bool) -> dict[str, Any]:
    """How bars look: told apart by darkness and hatching, not by colour."""
    if solid:
        return {"facecolor": BLUE, "edgecolor": BLUE, "linewidth": 0.5}
    return {"facecolor": "white", "edgecolor": BLUE, "linewidth": 0.5, "hatch": "////"}


def check_record(record: object, kind: type, drawn_by: str) -> None:
    """Raises InputError for what this figure cannot show, and names the one that can."""
    if not isinstance(record, kind):
        other: dict[type, str] = {
            CausalTrace: "heat_map",
            AverageTrace: "class_map or class_lines",
            KnowledgeNeurons: "neuron_chart",
        }
        other |= {Composition: "prediction_chart", Refinement: "refinement_chart"}
        other |= {Evaluation: "evaluation_chart"}
        other |= {
            Profile: "profile_lines or profile_bars",
            Agreement: "agreement_chart",
            Census: "census_chart",
        }
        instead = next(
            (
                f"; draw it with {name}"
                for known, name in other.items()
                if isinstance(record, known)
            ),
            "",
        )
        raise InputError(
            f"{drawn_by} draws a {kind.__name__}; got a {type(record).__name__}{instead}"
        )


def quiet(axes: Axes) -> None:
    """Small ticks and thin frames, as everywhere here."""
    axes.tick_params(labelsize=7, length=2, width=0.5)
    for edge in axes.spines.values():
        edge.set_linewidth(0.5)


def finished(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        _save(figure, Path(path))
    return figure


def visible(token: str) -> str:
    """A token as one line of text: outer spaces dropped, line breaks shown, an all-space token as an open box."""
    return token.strip(" ").translate(_VISIBLE) or "␣"


def check_path(path: str | os.PathLike[str]) -> None:
    """Raises InputError for a suffix that cannot be drawn, WorkspaceError for a folder that is not there."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(
            f"cannot draw {path.name!r}: its suffix is {suffix or 'missing'}; expected one of {', '.join(_SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise WorkspaceError(f"cannot draw {path}: {path.parent} is not a folder; make it first")


def _save(figure: Figure, path: Path) -> None:
    check_path(path)
    picture = _drawn(figure, path.suffix.lower()[1:])  # in full before the file is touched
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise WorkspaceError(
            f"cannot write {path}: {error.strerror}; choose a folder that can be written"
        ) from None


def _drawn(figure: Figure, kind: str, dpi: float | str = "figure") -> bytes:
    written = io.BytesIO()
    with warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes; that is no reason to interrupt the caller.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(written, format=kind, dpi=dpi)
    return written.getvalue()
