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
import itertools
import math
import os
import textwrap
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter
from rich.cells import cell_len, set_cell_size
from rich.text import Text
from torch import Tensor

from .checks import check_count
from .errors import InputError, WorkspaceError
from .inspect.agreement import Agreement
from .inspect.census import Census
from .inspect.composition import Composition
from .inspect.profile import Profile
from .inspect.refinement import Refinement
from .judge.evaluate import BASE, Evaluation
from .locate.average import AverageTrace
from .locate.causal import CausalTrace
from .locate.neurons import KnowledgeNeurons
from .model.ffn import Neuron

# One sequential map a kind, in the tints of the paper's figures.
_COLOUR_MAPS = {"state": "Purples", "mlp": "Greens", "attention": "Reds"}
_TERMINAL_COLOURS = {"state": "magenta", "mlp": "green", "attention": "red"}
# Okabe and Ito's colours, which the colour-blind tell apart; dash and marker say the same without any colour.
_BLUE = "#0072B2"
_LINES = (
    (_BLUE, "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#E69F00", (0, (5, 1)), "v"),
    ("#000000", (0, (1, 1)), "x"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "P"),
    ("#808080", (0, (8, 2)), "*"),
)
# Fillings of bars, told apart by lightness and hatching as well.
_FILLINGS: tuple[dict[str, Any], ...] = (
    {"facecolor": _BLUE},
    {"facecolor": "#E69F00", "hatch": "////"},
    {"facecolor": "#009E73"},
    {"facecolor": "#F0E442", "hatch": "...."},
    {"facecolor": "#D55E00"},
    {"facecolor": "#CCCCCC", "hatch": "xxxx"},
    {"facecolor": "#56B4E9"},
    {"facecolor": "#CC79A7", "hatch": "\\\\\\\\"},
)
_BLOCKS = " ·░▒▓█"
_SUFFIXES = (".png", ".svg", ".pdf")
_COLUMN_WIDTH = 3.4  # inches: one column of a two-column page
_VISIBLE = str.maketrans({"\n": "↵", "\r": "↵", "\t": "→"})
_LONGEST_LABEL = 16  # characters of a token
_MIN_WIDTH = 20
_PLAIN = {"facecolor": "0.93", "linewidth": 0, "pad": 0.5}  # behind words on hatching


class _Picture(Figure):
    """A figure that a notebook shows as it is, at the size of a column on the page."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return _drawn(self, "png", dpi=150), {"width": round(110 * self.get_figwidth())}


def heat_map(trace: CausalTrace, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw p(answer) after restoring each (token, layer), as Figure 1 of Meng et al. 2022 (arXiv 2202.05262).

    Rows are tokens, the subject's marked with *; columns are layers. The colour runs from the corrupted probability (white: restoring this
    brings nothing, or harms; a line below says down to what) to the largest score. `path` also saves it: PNG, SVG or PDF by its suffix.
    Raises InputError for another suffix or another record, and WorkspaceError when the file cannot be written.
    """
    _check_record(trace, CausalTrace, "heat_map")
    n_tokens, n_layers = trace.scores.shape
    figure = _Picture(figsize=(_COLUMN_WIDTH, 1.25 + 0.155 * n_tokens), dpi=300, layout="constrained")
    axes = figure.add_subplot()
    (low, high), lowest = _range(trace), float(trace.scores.min())
    colours = _even(_COLOUR_MAPS[trace.kind])
    image = axes.imshow(trace.scores.numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    # Token text may hold `$`, which is no formula here.
    axes.set_yticks(range(n_tokens), labels=[_fit(label, _LONGEST_LABEL).rstrip() for label in _row_labels(trace)], parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(-0.5, n_layers - 0.5)
    note = f"\nwhite: {low:.2g} or less, down to {lowest:.2g}" if lowest < low else ""
    axes.set_xlabel(_layer_axis(trace) + note, fontsize=7.5)
    figure.suptitle(_title(trace), fontsize=8, x=0.02, ha="left", parse_math=False)
    bar = figure.colorbar(image, ax=axes, aspect=18, pad=0.02, extend="min" if lowest < low else "neither")
    bar.set_label(_answer(trace), fontsize=7.5, parse_math=False)
    for each in (axes, bar.ax):
        _quiet(each)
    bar.outline.set_linewidth(0.5)
    return _finished(figure, path)


def text_heat_map(trace: CausalTrace, width: int = 80) -> Text:
    """The heat map for a terminal of `width` columns (at least 20): shading from the corrupted probability to the largest score.

    Returns a rich `Text`; `str()` of it is plain. Beside a row that beats the corrupted probability stands its largest score and the layer,
    where there is room; a trace with more layers than columns shows the maximum over neighbouring layers. Raises InputError for a
    smaller width or another record.
    """
    _check_record(trace, CausalTrace, "text_heat_map")
    width = check_count(width, "width", f"at least {_MIN_WIDTH} columns", least=_MIN_WIDTH)
    n_layers = trace.scores.shape[1]
    labels = _row_labels(trace)
    label_width = min(max(cell_len(label) for label in labels), _LONGEST_LABEL, width // 3)
    number_width = len(f" 0.000 @{n_layers - 1}") if width - label_width >= 30 else 0
    room = width - label_width - number_width - 3  # a space and two frame bars
    per_cell = math.ceil(n_layers / room)
    cell_width = 2 if 2 * math.ceil(n_layers / per_cell) <= room else 1
    low, high = _range(trace)

    text = Text(no_wrap=True, overflow="crop")
    _append_line(text, _title(trace).replace("\n", " "), width, style="bold")
    _append_line(text, f"{_answer(trace)}: clean {trace.clean:.3f}, corrupted {trace.corrupted:.3f}", width)
    for token, row in enumerate(trace.scores.tolist()):
        text.append(_fit(labels[token], label_width), style="bold" if labels[token].endswith("*") else "")
        text.append(" │")
        cells = [max(row[first : first + per_cell]) for first in range(0, n_layers, per_cell)]
        shares = [min(max((cell - low) / (high - low), 0.0), 1.0) for cell in cells]
        text.append("".join(_BLOCKS[round(s * (len(_BLOCKS) - 1))] * cell_width for s in shares), style=_TERMINAL_COLOURS[trace.kind])
        text.append("│")
        top = max(row)
        # Compared as printed: what reads the same as the corrupted probability is no gain to point at.
        if number_width and round(top, 3) > round(trace.corrupted, 3):
            text.append(f" {top:.3f} @{row.index(top)}", style="bold" if token == trace.peak[0] else "dim")
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
    _check_record(average, AverageTrace, "class_map")
    names = list(average.effects)
    figure = _Picture(figsize=(_COLUMN_WIDTH, 0.55 + 1.25 * len(names)), dpi=300, layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    lows: list[float] = []
    for axes, name in zip(panels, names, strict=True):
        effects = average.effects[name].numpy()
        colours = _even(_COLOUR_MAPS[_kind(name)])
        top = max(float(np.nan_to_num(effects).max()), 1e-6)
        image = axes.imshow(effects, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        for row, count in enumerate(average.counts):
            if not count:
                axes.axhspan(row - 0.5, row + 0.5, facecolor="0.93", edgecolor="0.7", hatch="////", linewidth=0)
                axes.text((effects.shape[1] - 1) / 2, row, "none", fontsize=6.5, ha="center", va="center", bbox=_PLAIN)
        axes.set_yticks(range(len(average.classes)), labels=average.classes)
        axes.set_title(_map_title(name, average), fontsize=7.5, loc="left", pad=3)
        lows.append(min(0.0, float(np.nan_to_num(effects).min())))
        bar = figure.colorbar(image, ax=axes, aspect=9, pad=0.02, extend="min" if lows[-1] < 0 else "neither")
        bar.outline.set_linewidth(0.5)
        for each in (axes, bar.ax):
            _quiet(each)
    panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    note = f"\nwhite: no effect, or a negative one, down to −{-min(lows):.2g}" if min(lows) < 0 else ""
    figure.supxlabel(f"restored layer, or centre of the restored layers{note}", fontsize=7.5)
    figure.suptitle(f"Average indirect effect, {average.n_facts} facts", fontsize=8, x=0.02, ha="left")
    return _finished(figure, path)


def class_lines(average: AverageTrace, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw the same averages as curves over the layers with their 95 % intervals, one panel a map.

    A class has the same line in every figure. `path` as for `heat_map`.
    """
    _check_record(average, AverageTrace, "class_lines")
    names = list(average.effects)
    figure = _Picture(figsize=(_COLUMN_WIDTH, 0.85 + 1.35 * len(names)), dpi=300, layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        tables = [getattr(average, part)[name].tolist() for part in ("effects", "low", "high")]
        n_layers = average.effects[name].shape[1]
        present = [row for row, count in enumerate(average.counts) if count]
        series = {average.classes[row]: (range(n_layers), *(table[row] for table in tables)) for row in present}
        _draw_lines(axes, series, [_LINES[row] for row in present])
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_title(_map_title(name, average), fontsize=7.5, loc="left", pad=3)
        axes.set_ylabel("AIE", fontsize=7.5)
        _quiet(axes)
    panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    panels[-1].set_xlabel("restored layer, or centre of the restored layers", fontsize=7.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=6.5, frameon=False, handlelength=2.6)
    figure.suptitle(f"Average indirect effect, {average.n_facts} facts, 95 % intervals", fontsize=8, x=0.02, ha="left")
    return _finished(figure, path)


def _kind(name: str) -> str:
    """What a map of an average restores: "state, mlp severed" restores states."""
    return name.partition(",")[0]


def _map_title(name: str, average: AverageTrace) -> str:
    kind, _, severed = name.partition(", ")
    together = min(average.window, average.effects[name].shape[1])
    what = {"state": "one hidden state", "mlp": f"{together} FFN outputs", "attention": f"{together} attention outputs"}[kind]
    part = {"mlp": "FFN", "attention": "attention"}.get(severed.removesuffix(" severed"), "")
    return f"{what}, {part} severed" if part else what


def neuron_chart(found: KnowledgeNeurons, *, n: int = 12, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw the neurons that carry one fact: the `n` strongest as bars, and below them how the layers share the attribution.

    A bar is the attribution averaged over the prompts, with a dot for each prompt; refined neurons are solid, others hatched. The lower
    panel sums each layer's positive averages, the refined neurons' part solid. `path` as for `heat_map`. Raises InputError when n < 1, or
    for another record.
    """
    _check_record(found, KnowledgeNeurons, "neuron_chart")
    n = check_count(n, "n", "the number of neurons to draw, 1 or more")
    top, refined = found.top(n), set(found.refined)
    figure = _Picture(figsize=(_COLUMN_WIDTH, 2.1 + 0.145 * len(top)), dpi=300, layout="constrained")
    bars, layers = figure.subplots(2, 1, height_ratios=(0.145 * len(top) + 0.45, 1.0))
    for row, (neuron, average) in enumerate(top):
        bars.barh(row, average, height=0.72, **_filling(neuron in refined))
        each = found.of(neuron).tolist()
        bars.plot(each, [row] * len(each), linestyle="", marker="o", markersize=2.2, color="black", alpha=0.45, markeredgewidth=0)
    bars.set_yticks(range(len(top)), labels=[_neuron_label(neuron) for neuron, _ in top])
    bars.set_ylim(len(top) - 0.4, -0.6)  # the first on top, and no empty bands, however many there are
    bars.axvline(0, color="black", linewidth=0.5)
    prompts = f"mean of {len(found.prompts)} prompts" if len(found.prompts) > 1 else "one prompt"
    bars.set_xlabel(f"attribution to p({_fit(_visible(found.target), _LONGEST_LABEL).rstrip()}), {prompts}", fontsize=7.5, parse_math=False)

    total = found.scores.mean(0).clamp_min(0).sum(1)
    solid = torch.zeros_like(total)
    for neuron in refined:
        solid[neuron[0]] += found.of(neuron).mean().clamp_min(0)
    layers.bar(range(len(total)), solid.tolist(), width=0.72, label="refined neurons", **_filling(True))
    layers.bar(range(len(total)), (total - solid).tolist(), bottom=solid.tolist(), width=0.72, label="all others", **_filling(False))
    layers.set_xlabel("layer", fontsize=7.5)
    layers.set_ylabel("positive sum", fontsize=7.5)
    layers.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    layers.legend(fontsize=6.5, frameon=False, handlelength=1.4)
    figure.suptitle("Knowledge neurons", fontsize=8, x=0.02, ha="left")
    for axes in (bars, layers):
        _quiet(axes)
    return _finished(figure, path)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    mark_x: float | None = None,
    mark_y: float | None = None,
    log_x: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Lines with bands: {label: (x, y, low, high)}, told apart by colour, dash and marker; thin lines at `mark_x` and `mark_y`.

    `path` as for `heat_map`. Raises InputError for series whose four parts differ in length, or without any.
    """
    if not series or any(len({len(part) for part in parts}) != 1 for parts in series.values()):
        raise InputError(f"series {list(series)} cannot be drawn; expected at least one, each with as many x as y, low and high")
    figure = _Picture(figsize=(_COLUMN_WIDTH, 2.4), dpi=300, layout="constrained")
    axes = figure.add_subplot()
    _draw_lines(axes, series, itertools.cycle(_LINES))
    for position, line in ((mark_x, axes.axvline), (mark_y, axes.axhline)):
        if position is not None:
            line(position, color="black", linewidth=0.5, linestyle=":")
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel(x_label, fontsize=7.5)
    axes.set_ylabel(y_label, fontsize=7.5)
    axes.legend(fontsize=6.5, frameon=False, handlelength=2.6)
    figure.suptitle(title, fontsize=8, x=0.02, ha="left")
    _quiet(axes)
    return _finished(figure, path)


def prediction_chart(found: Composition, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw one prediction on its way up: the answer's probability and rank behind each part, and below what each part adds to its logit.

    Parts stand from left to right: the embedding, then attention (hatched, open marks) and memory (solid) of every layer; last the final
    norm's shift with the unembedding's bias, where it adds anything. `path` as for `heat_map`. Raises InputError for another record.
    """
    _check_record(found, Composition, "prediction_chart")
    n_layers = len(found.ranks) // 2
    figure = _Picture(figsize=(_COLUMN_WIDTH, 3.6), dpi=300, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 1.3))
    at = _up_the_layers(n_layers)
    _draw_way_up(panels[0], at, found.probabilities.tolist(), "behind FFN", "behind attention")
    _draw_way_up(panels[1], at, (found.ranks + 1).tolist())
    panels[0].set_ylim(-0.05, 1.05)
    panels[0].set_ylabel("probability", fontsize=7.5)
    panels[0].legend(fontsize=6.5, frameon=False, handlelength=1.4, ncols=2, loc="lower right", bbox_to_anchor=(1.02, 0.97), borderpad=0)
    _rank_axis(panels[1])
    bars = panels[2]
    logits = [part.logit for part in found.parts]
    for kind, places, solid in (("embedding", at[:1], True), ("attention", at[1::2], False), ("FFN", at[2::2], True)):
        own = [logit for part, logit in zip(found.parts, logits, strict=True) if part.kind == kind.lower()]
        label = None if kind == "embedding" else kind
        bars.bar(places, own, width=0.36, label=label, **_filling(solid))
    shown = [*at, n_layers] if abs(logits[-1]) > 0.01 * max(map(abs, logits)) else at
    if len(shown) > len(at):
        bars.bar([n_layers], logits[-1:], width=0.36, facecolor="0.6", edgecolor="0.6", linewidth=0.5, label="shift and bias")
    bars.axhline(0, color="black", linewidth=0.5)
    bars.set_ylabel("added to logit" if found.contrast is None else "added to the lead", fontsize=7.5)
    bars.legend(fontsize=6.5, frameon=False, handlelength=1.4, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.32))
    _layer_ticks(bars, n_layers)
    bars.set_xlim(-1.5, shown[-1] + 0.5)
    against = "" if found.contrast is None else f", not {_visible(found.contrast).strip()}"
    title = f"{textwrap.shorten(_visible(found.prompt), 52, placeholder=' …')}\n→ {_fit(_visible(found.target) + against, 40).rstrip()}"
    figure.suptitle(title, fontsize=8, x=0.02, ha="left", parse_math=False)
    for axes in panels:
        _quiet(axes)
    return _finished(figure, path)


def refinement_chart(found: Refinement, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw many predictions by layer, in four panels: whether a layer says what one of its memories says, beside chance (dotted); whose
    prediction the stream's then is; how often the answer is the likeliest already, with its mean probability; and its rank, with quartiles.

    `path` as for `heat_map`. Raises InputError for another record.
    """
    _check_record(found, Refinement, "refinement_chart")
    n_layers = len(found.says)
    figure = _Picture(figsize=(_COLUMN_WIDTH, 6.3), dpi=300, layout="constrained")
    alone, whose, first, rank = figure.subplots(4, 1, sharex=True)
    for share, composed, chance, (colour, _, marker) in zip(found.among, found.composed, found.chance, _LINES, strict=False):
        label = "all" if share == 1 else f"strongest {share:.0%}" if share else "strongest"
        alone.plot(range(n_layers), composed.tolist(), color=colour, marker=marker, markersize=2.6, linewidth=1.0, label=label)
        alone.plot(range(n_layers), chance.tolist(), color=colour, linestyle=":", linewidth=0.8)
    alone.plot([], [], color="black", linestyle=":", linewidth=0.8, label="chance")
    alone.set_title("layer's prediction is that of none of its memories", fontsize=7.5, loc="left", pad=13)
    bottom = np.zeros(n_layers)
    fillings = (("residual", "white", ""), ("agreement", "0.8", ""), ("composition", "white", "////"), ("ffn", _BLUE, ""))
    for case, colour, hatch in fillings:
        heights = np.array(found.cases[case].tolist())
        look = {"facecolor": colour, "hatch": hatch, "edgecolor": _BLUE, "linewidth": 0.5}
        whose.bar(range(n_layers), heights, bottom=bottom, width=0.72, label="FFN" if case == "ffn" else case, **look)
        bottom += heights
    whose.set_title("stream's prediction behind the FFN is that of", fontsize=7.5, loc="left", pad=13)
    at = _up_the_layers(n_layers)
    _draw_way_up(first, at, found.first.tolist(), "the likeliest")
    colour, dash, _ = _LINES[1]
    first.plot(at, found.probabilities.double().mean(0).tolist(), color=colour, linestyle=dash, linewidth=1.0, label="mean probability")
    first.set_title("answer is", fontsize=7.5, loc="left", pad=3)
    low, median, high = (found.quantiles(0.25, 0.5, 0.75) + 1).tolist()
    _draw_way_up(rank, at, median, "median, quartiles")
    rank.fill_between(at, low, high, color=_BLUE, alpha=0.18, linewidth=0)
    _rank_axis(rank)
    rank.set_title("answer's rank", fontsize=7.5, loc="left", pad=3)
    rank.set_ylabel("")
    for axes in (alone, whose, first):
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("share", fontsize=7.5)
    for axes in (alone, whose, first, rank):
        side, x = ("left", -0.02) if axes in (alone, whose) else ("right", 1.02)
        legend = {"loc": f"lower {side}", "bbox_to_anchor": (x, 0.97), "ncols": 6, "columnspacing": 1.0, "borderpad": 0}
        axes.legend(fontsize=6, frameon=False, handlelength=1.6, **legend).set_in_layout(False)
        _quiet(axes)
    _layer_ticks(rank, n_layers)
    rank.set_xlim(-1.5, n_layers - 0.5)
    figure.suptitle(f"{len(found.answers):,} predictions of {found.model}", fontsize=8, x=0.02, ha="left", parse_math=False)
    return _finished(figure, path)


def _up_the_layers(n_layers: int) -> list[float]:
    """Where the embedding and each layer's attention and memory stand on an axis of layers."""
    return [-1.0, *(layer + side for layer in range(n_layers) for side in (-0.2, 0.2))]


def _draw_way_up(axes: Axes, at: Sequence[float], values: Sequence[float], label: str = "", attention: str = "") -> None:
    """A line through the states behind each part: open marks behind attention, solid ones behind the memory and the embedding."""
    size = 3.2 if len(at) < 30 else 1.6
    axes.plot(at, values, color=_BLUE, linewidth=1.0, marker="o", markersize=size, markevery=[0, *range(2, len(at), 2)], label=label)
    behind = {"marker": "o", "markersize": size, "markerfacecolor": "white", "markeredgecolor": _BLUE, "markeredgewidth": 0.7}
    axes.plot(at[1::2], values[1::2], linestyle="", label=attention, **behind)  # type: ignore[arg-type]


def _rank_axis(axes: Axes) -> None:
    """Ranks from 1, the likeliest, on top."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(max(high, 2), min(low, 0.8))
    axes.set_ylabel("rank", fontsize=7.5)


def _layer_ticks(axes: Axes, n_layers: int) -> None:
    """Layer numbers, evenly spaced, and before them the embedding."""
    step = math.ceil(n_layers / 8)
    layers = range(0, n_layers, step)
    axes.set_xticks([-1, *layers], labels=["emb.", *map(str, layers)])
    axes.set_xlabel("layer", fontsize=7.5)


def profile_lines(
    found: Profile | Mapping[str, Profile],
    features: Sequence[str | tuple[str, ...]] | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw by layer which share of the neurons is selective for each feature, with what chance allows: grey, up to the largest of them.

    found     one profile, or several by title, side by side
    features  which, in this order; None: all, or the eight that most neurons go by. ("relation", "token") counts the neurons selective
              for the first and for none of the others

    `path` as for `heat_map`. Raises InputError for features that are not there, more than can be told apart, or another record.
    """
    panels = _by_title(found, Profile, "profile_lines")
    features = tuple(features if features is not None else _commonest(next(iter(panels.values())), len(_LINES)))
    if not 1 <= len(features) <= len(_LINES):
        raise InputError(f"got {len(features)} features to draw; expected 1 to {len(_LINES)}: choose some with features=[...]")
    figure, grid = _side_by_side(len(panels), 2.9)
    for axes, (title, own) in zip(grid, panels.items(), strict=True):
        chance = torch.zeros(len(own.layers), dtype=torch.float64)
        lines: dict[str, Tensor] = {}
        for feature in features:
            name, *without = (feature,) if isinstance(feature, str) else feature
            lines[name + (f", not {' or '.join(without)}" if without else "")] = own.share_of(name, without=without)
            chance = torch.maximum(chance, own.chance[:, own.features.index(name)].double().nan_to_num())
        _draw_by_layer(axes, title, own.layers, lines)
        axes.fill_between(own.layers, 0, chance.tolist(), color="0.6", linewidth=0, label="by chance")
    _shared_heights(grid, "share of neurons")
    _legend_below(figure, grid[0])
    figure.suptitle("Selective neurons", fontsize=8, x=0.02, ha="left")
    return _finished(figure, path)


def _draw_by_layer(axes: Axes, title: str, layers: Sequence[int], lines: Mapping[str, Tensor]) -> None:
    """Lines (layers,) by their labels in one panel, each told from the others."""
    for (label, heights), (colour, dash, marker) in zip(lines.items(), _LINES, strict=False):
        axes.plot(layers, heights.tolist(), color=colour, linestyle=dash, marker=marker, markersize=2.6, linewidth=1.0, label=label)
    axes.set_title(title, fontsize=7.5, loc="left", pad=3)
    _layer_axes(axes)


def _commonest(found: Profile, n: int) -> list[str]:
    """The n features that the largest share of some layer's neurons is selective for, in their order."""
    most = {feature: float(found.share[:, i].nan_to_num().max()) for i, feature in enumerate(found.features)}
    kept = set(sorted(most, key=lambda feature: -most[feature])[:n])
    return [feature for feature in found.features if feature in kept]


def profile_bars(
    found: Profile | Mapping[str, Profile],
    feature: str,
    *,
    n: int = 6,
    values: Sequence[Hashable] | None = None,
    names: Mapping[Hashable, str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw by layer how many neurons are selective for which value of a feature: some values, and the others together.

    found   one profile, or several by title, side by side; a value has the same filling in all
    values  which to tell apart, from below; None: the n commonest
    names   how values are called; a value that is not there is called as it is written

    `path` as for `heat_map`. Raises InputError for a feature that is not there, n < 1, too many values to tell apart, or another record.
    """
    panels = _by_title(found, Profile, "profile_bars")
    n = check_count(n, "n", f"the number of values to tell apart, 1 to {len(_FILLINGS)}")
    tallies = {title: [own.tally(feature, layer) for layer in own.layers] for title, own in panels.items()}
    totals: Counter[Hashable] = Counter()
    for layers in tallies.values():
        for tally in layers:
            totals.update(tally)
    values = [value for value, _ in totals.most_common(n)] if values is None else list(values)
    if len(values) > len(_FILLINGS):
        raise InputError(f"got {len(values)} values to draw; expected at most {len(_FILLINGS)}: the others are drawn together")
    figure, grid = _side_by_side(len(panels), 2.9)
    for axes, (title, own) in zip(grid, panels.items(), strict=True):
        neurons = [sum(len(each) for bank, each in own.neurons.items() if bank[0] == layer) for layer in own.layers]
        heights = [[tally.get(value, 0) for tally in tallies[title]] for value in values]
        labels = [_fit((names or {}).get(value, str(value)), 28).rstrip() for value in values]
        if set(totals) - set(values):
            heights.append([sum(tally.values()) - sum(own) for tally, own in zip(tallies[title], zip(*heights, strict=True), strict=True)])
            labels.append("others")
        bottom = np.zeros(len(neurons))
        for row, (height, label) in enumerate(zip(heights, labels, strict=True)):
            shares = np.array(height) / neurons
            look: dict[str, Any] = _FILLINGS[row] if row < len(values) else {"facecolor": "white"}
            axes.bar(own.layers, shares, bottom=bottom, width=0.72, label=label, edgecolor="black", linewidth=0.4, **look)
            bottom += shares
        axes.set_title(title, fontsize=7.5, loc="left", pad=3)
        _layer_axes(axes)
    _shared_heights(grid, "share of neurons")
    _legend_below(figure, grid[0])
    figure.suptitle(f"Selective neurons, by {feature}", fontsize=8, x=0.02, ha="left", parse_math=False)
    return _finished(figure, path)


def agreement_chart(found: Agreement | Mapping[str, Agreement], *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw by layer how often a value promotes what follows its key's strongest trigger, as its first token or among the first, and chance.

    found  one record, or several by title, side by side

    `path` as for `heat_map`. Raises InputError for another record.
    """
    panels = _by_title(found, Agreement, "agreement_chart")
    figure, grid = _side_by_side(len(panels), 2.4)
    for axes, (title, own) in zip(grid, panels.items(), strict=True):
        lines = {"first token": own.share, "among the first": own.within, "first, by chance": own.chance}
        _draw_by_layer(axes, title, own.layers, lines)
    _shared_heights(grid, "share of neurons")
    _legend_below(figure, grid[0])
    figure.suptitle("Values that promote the token behind the strongest trigger", fontsize=8, x=0.02, ha="left")
    return _finished(figure, path)


def evaluation_chart(
    runs: Evaluation | Sequence[Evaluation], *, names: Mapping[str, str] | None = None, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw judged edits. Above, against the number of records an edit: what is really said (solid), and two-way success (thin, dashed).
    Below, of runs in sequence, round by round: what is left of the first round and of all, other facts changed, divergence on prose.

    runs   of one model and suite; above are those at a time (two sizes at least), below is the first in sequence of each size
    names  {editor: how it is called in the picture}

    `path` as for `heat_map`. Raises InputError when there is nothing to draw, more editors than can be told apart, or another record.
    """
    listed = [runs] if isinstance(runs, Evaluation) else list(runs)
    for run in listed:
        _check_record(run, Evaluation, "evaluation_chart")
    apart = [
        (run.size, {e: {name: share.value for name, share in own.items()} for e, own in run.summaries.items() if e != BASE})
        for run in listed
        if not run.sequence
    ]
    rounds = [(run.size, {e: round_by_round(run, e) for e in run.editors if e != BASE}) for run in listed if run.sequence]
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
    if not (above or rounds) or not 1 <= len(editors) <= len(_LINES):
        raise InputError(
            f"got {len(apart) + len(rounds)} runs of {len(editors)} editors; expected two sizes, or a run in sequence, of 1 to "
            f"{len(_LINES)} editors"
        )
    figure, grid = _side_by_side(len(_QUALITY), 1.0 + 1.9 * (above + bool(rounds)), rows=above + bool(rounds))
    styles = dict(zip(editors, _LINES, strict=False))

    def draw(axes: Axes, editor: str, dots: Sequence[tuple[float, float]], thin: bool = False) -> None:
        if dots:
            colour, dash, marker = styles[editor]
            look: dict[str, Any] = (
                {"linestyle": (0, (2, 2)), "linewidth": 0.6, "alpha": 0.7} if thin else {"linestyle": dash, "linewidth": 1.0}
            )
            label = None if thin else (names or {}).get(editor, editor)
            axes.plot(*zip(*dots, strict=True), color=colour, marker=None if thin else marker, markersize=2.6, label=label, **look)

    if above:
        for axes, (kind, measure) in zip(grid, _QUALITY, strict=False):
            for editor in editors:
                for name, thin in ((f"{kind} success", True), (f"{kind} {measure}", False)):
                    draw(axes, editor, [(n, 100 * own[editor][name]) for n, own in apart if name in own.get(editor, {})], thin)
            axes.set_xscale("log")
            axes.set_xlabel("records an edit", fontsize=7.5)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            _percent(axes, f"{kind}: {'says what it said' if measure == 'stayed' else 'says it'}")
    if rounds:
        below = grid[-len(_QUALITY) :]
        for size, told in rounds:
            for editor, own in told.items():
                for axes, name in zip(below, ("first", "so far", "changed_share", "kl_text"), strict=True):
                    scale = 1 if name == "kl_text" else 100
                    draw(axes, editor, [(at * size, scale * each[name]) for at, each in own.items() if name in each])
        for axes, title in zip(below, ("first round: still says it", "all rounds so far: says it", "other facts changed"), strict=False):
            _percent(axes, title)
        prose = below[-1]
        prose.set_title("KL on prose, nats a token", fontsize=7.5, loc="left", pad=3)
        prose.set_ylim(bottom=0)
        _quiet(prose)
        for axes in below:
            axes.set_xlabel("records written, round by round", fontsize=7.5)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    _legend_below(figure, max(grid, key=lambda axes: len(axes.get_legend_handles_labels()[1])))
    return _finished(figure, path)


_QUALITY = (("prompt", "exact"), ("paraphrase", "exact"), ("neighbour", "stayed"), ("multihop", "exact"))


def _percent(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=7.5, loc="left", pad=3)
    axes.set_ylim(-3, 103)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    _quiet(axes)


def census_chart(found: Census | Mapping[str, Census], *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw what a model is made of: parameters by layer, memory solid and attention hatched, beside the embeddings; below, where second
    moments were given, the share of the coefficients' directions that the text uses: the effective rank in a hundred neurons.

    found  one census, or several by title, side by side

    `path` as for `heat_map`. Raises InputError for another record.
    """
    panels = _by_title(found, Census, "census_chart")
    ranked = any(layer.effective_rank is not None for own in panels.values() for layer in own.layers)
    figure, grid = _side_by_side(len(panels), 3.6 if ranked else 2.2, rows=1 + ranked)
    for place, (title, own) in enumerate(panels.items()):
        axes, layers = grid[place], [layer.layer for layer in own.layers]
        memory, attention = ([getattr(layer, part) / 1e6 for layer in own.layers] for part in ("ffn", "attention"))
        axes.bar(layers, memory, width=0.72, label=f"memory {own.ffn / own.parameters:.0%}", **_filling(True))
        axes.bar(layers, attention, bottom=memory, width=0.72, label=f"attention {own.attention / own.parameters:.0%}", **_filling(False))
        look: dict[str, Any] = {"facecolor": "0.75", "edgecolor": "0.4", "linewidth": 0.5}
        axes.bar([-1.3], [own.embeddings / 1e6], width=0.72, label=f"embeddings {own.embeddings / own.parameters:.0%}", **look)
        axes.legend(fontsize=6.5, frameon=False, handlelength=1.4, loc="upper right")
        axes.set_title(f"{title}: {own.parameters / 1e6:,.1f} million parameters", fontsize=7.5, loc="left", pad=3, parse_math=False)
        ticks = range(0, len(layers), math.ceil(len(layers) / 8))
        axes.set_xticks([-1.3, *ticks], labels=["emb.", *map(str, ticks)])
        _quiet(axes)
        if ranked:
            below = grid[len(panels) + place]
            shares = [math.nan if x.effective_rank is None else x.effective_rank / x.neurons for x in own.layers]
            below.bar(layers, shares, width=0.72, **_filling(True))
            below.set_xlim(axes.get_xlim())
            below.set_xticks(list(ticks))
            below.set_xlabel("layer", fontsize=7.5)
            _quiet(below)
    _shared_heights(grid[: len(panels)], "parameters, millions")
    if ranked:
        _shared_heights(grid[len(panels) :], "effective rank / neurons")
    return _finished(figure, path)


def _by_title(found: Any, kind: type, drawn_by: str) -> dict[str, Any]:
    """One record, or several by title, as several by title. Raises InputError for others, or none."""
    panels = dict(found) if isinstance(found, Mapping) else {getattr(found, "model", ""): found}
    for record in list(panels.values()) or [panels]:
        _check_record(record, kind, drawn_by)
    return panels


def _side_by_side(n: int, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in a row, two to the width of a page, and rows of them."""
    figure = _Picture(figsize=(_COLUMN_WIDTH * max(1, n * 0.94), height), dpi=300 if n == 1 else 200, layout="constrained")
    return figure, list(figure.subplots(rows, n, squeeze=False).flat)


def _shared_heights(grid: Sequence[Axes], label: str) -> None:
    """The same scale from 0 for all, so that heights can be compared."""
    top = max(axes.get_ylim()[1] for axes in grid)
    for axes in grid:
        axes.set_ylim(0, top)
    grid[0].set_ylabel(label, fontsize=7.5)


def _layer_axes(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("layer", fontsize=7.5)
    _quiet(axes)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if figure.get_figwidth() < 1.5 * _COLUMN_WIDTH else 4
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=6.5, frameon=False, handlelength=2.6)


def _draw_lines(
    axes: Axes,
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]],
    styles: Iterable[tuple[str, Any, str]],
) -> None:
    for (label, (x, y, low, high)), (colour, dash, marker) in zip(series.items(), styles, strict=False):
        spacing = max(1, len(x) // 8)
        axes.plot(x, y, color=colour, linestyle=dash, marker=marker, markersize=2.6, markevery=spacing, linewidth=1.0, label=label)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _filling(solid: bool) -> dict[str, Any]:
    """How bars look: told apart by darkness and hatching, not by colour."""
    if solid:
        return {"facecolor": _BLUE, "edgecolor": _BLUE, "linewidth": 0.5}
    return {"facecolor": "white", "edgecolor": _BLUE, "linewidth": 0.5, "hatch": "////"}


def _check_record(record: object, kind: type, drawn_by: str) -> None:
    """Raises InputError for what this figure cannot show, and names the one that can."""
    if not isinstance(record, kind):
        other: dict[type, str] = {CausalTrace: "heat_map", AverageTrace: "class_map or class_lines", KnowledgeNeurons: "neuron_chart"}
        other |= {Composition: "prediction_chart", Refinement: "refinement_chart"}
        other |= {Evaluation: "evaluation_chart"}
        other |= {Profile: "profile_lines or profile_bars", Agreement: "agreement_chart", Census: "census_chart"}
        instead = next((f"; draw it with {name}" for known, name in other.items() if isinstance(record, known)), "")
        raise InputError(f"{drawn_by} draws a {kind.__name__}; got a {type(record).__name__}{instead}")


def _neuron_label(neuron: Neuron) -> str:
    layer, *expert, index = neuron
    return f"L{layer} · " + "".join(f"E{e} · " for e in expert) + str(index)


def _quiet(axes: Axes) -> None:
    """Small ticks and thin frames, as everywhere here."""
    axes.tick_params(labelsize=7, length=2, width=0.5)
    for edge in axes.spines.values():
        edge.set_linewidth(0.5)


def _finished(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        _save(figure, Path(path))
    return figure


def _append_line(text: Text, line: str, width: int, style: str = "") -> None:
    """Add a line of words, wrapped to the width."""
    for part in textwrap.wrap(line, width):
        text.append(_fit(part, width).rstrip() + "\n", style=style)


def _range(trace: CausalTrace) -> tuple[float, float]:
    """The probabilities that the lightest and the darkest colour stand for; never equal."""
    return trace.corrupted, max(float(trace.scores.max()), trace.corrupted + 1e-6)


def _even(name: str) -> ListedColormap:
    """A matplotlib colour map resampled so that lightness falls evenly from end to end: equal steps look equal, in grey print too."""
    share = np.linspace(0, 1, 256)
    colours = colormaps[name](share)[:, :3]
    light = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)  # out of sRGB's gamma
    lightness = np.cbrt(light @ (0.2126, 0.7152, 0.0722))  # CIE L*, up to scale and offset
    wanted = np.linspace(lightness[0], lightness[-1], 256)
    return ListedColormap(colormaps[name](np.interp(-wanted, -lightness, share)), name=f"{name}, even")


def _together(trace: CausalTrace) -> str:
    """How many layers a window holds; the model's ends cut it."""
    n_layers = trace.scores.shape[1]
    return str(trace.window) if trace.window <= n_layers else f"up to {n_layers}"


def _title(trace: CausalTrace) -> str:
    """What is restored, in two lines."""
    together = _together(trace)
    what = {"state": "the hidden state", "mlp": f"{together} FFN outputs", "attention": f"{together} attention outputs"}[trace.kind]
    return f"Restoring {what}\nafter corrupting the subject"


def _answer(trace: CausalTrace) -> str:
    return f"p({_fit(_visible(trace.answer), _LONGEST_LABEL).rstrip()})"


def _layer_axis(trace: CausalTrace) -> str:
    return "restored layer" if trace.kind == "state" else f"centre of the {_together(trace)} restored layers"


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
    """Layer numbers, each beginning under its cell, evenly spaced, apart from one another, and no further than the frame."""
    n_cells = math.ceil(n_layers / per_cell)
    stride = len(str(n_layers - 1)) // cell_width + 1  # cells from one number to the next, so that a space stays between
    numbers = [(cell, str(cell * per_cell)) for cell in range(0, n_cells, stride)]
    return "".join(n.ljust(stride * cell_width) for cell, n in numbers if cell * cell_width + len(n) <= n_cells * cell_width + 1).rstrip()


def check_path(path: str | os.PathLike[str]) -> None:
    """Raises InputError for a suffix that cannot be drawn, WorkspaceError for a folder that is not there."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(f"cannot draw {path.name!r}: its suffix is {suffix or 'missing'}; expected one of {', '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise WorkspaceError(f"cannot draw {path}: {path.parent} is not a folder; make it first")


def _save(figure: Figure, path: Path) -> None:
    check_path(path)
    picture = _drawn(figure, path.suffix.lower()[1:])  # in full before the file is touched
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise WorkspaceError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from None


def _drawn(figure: Figure, kind: str, dpi: float | str = "figure") -> bytes:
    written = io.BytesIO()
    with warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes; that is no reason to interrupt the caller.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(written, format=kind, dpi=dpi)
    return written.getvalue()
