"""Causal traces: the figures hold the numbers, and the text fits the terminal."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.cells import cell_len

from factsmith.core.errors import InputError
from factsmith.locate.attribution import AttributionTrace
from factsmith.locate.average import AverageTrace
from factsmith.locate.records import CausalTrace
from factsmith.show.plots.traces import class_lines, class_map, heat_map, text_heat_map
from show.records import TOKENS, trace


def lightness(colours: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return CIE L* of sRGB colours (..., 3)."""
    light = np.where(
        colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4
    ) @ np.array([0.2126, 0.7152, 0.0722])
    above = 116 * np.cbrt(light) - 16
    return np.where(light > 0.008856, above, 903.3 * light)  # type: ignore[no-any-return]


def average() -> AverageTrace:
    """Return an average of two maps, in which no fact has middle subject tokens."""
    effects = torch.linspace(0, 0.3, 24).view(6, 4).clone()
    effects[1] = torch.nan
    tables = {"state": effects, "state, mlp severed": effects / 2}
    return AverageTrace(
        effects=tables,
        low={name: table - 0.05 for name, table in tables.items()},
        high={name: table + 0.05 for name, table in tables.items()},
        counts=(5, 0, 9, 9, 3, 9),
        total_effect=0.5,
        total_low=0.4,
        total_high=0.6,
        clean=0.9,
        corrupted=0.4,
        n_facts=9,
        n_skipped=1,
        each={},
        noise=0.1,
        window=10,
        corruption="noise",
        samples=10,
        seed=1,
    )


def test_averages_are_drawn_as_they_are_by_class() -> None:
    made = average()
    figure = class_map(made)
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "one hidden state",
        "one hidden state, FFN severed",
    ]
    for axes, name in zip(panels, made.effects, strict=True):
        shown = np.ma.getdata(axes.get_images()[0].get_array())
        assert np.array_equal(shown, made.effects[name].numpy(), equal_nan=True)
        assert axes.get_images()[0].get_clim() == (
            0,
            pytest.approx(float(made.effects[name].nan_to_num().max())),
        )
        # A kind of token that no fact has looks different from one without effect.
        assert [label.get_text() for label in axes.get_yticklabels()] == list(made.classes)
        assert [(text.get_text().strip(), text.get_position()[1]) for text in axes.texts] == [
            ("no such token", 1)
        ]
        assert [(patch.get_y(), bool(patch.get_hatch())) for patch in axes.patches] == [(0.5, True)]
    assert figure.get_supxlabel() == "restored layer, or centre of the restored layers"
    made.effects["state"][5, 2] = -0.12
    assert (
        class_map(made)
        .get_supxlabel()
        .endswith("\nwhite: no effect or a negative one; the lowest is −0.12")
    )


def estimate(**changes: Any) -> AttributionTrace:
    """Return the made-up trace as an estimate."""
    return AttributionTrace(**vars(trace(**changes)), passes=5, checked=9, rank_correlation=0.7)


def test_a_severed_and_an_estimated_trace_have_titles_and_legends_of_their_own() -> None:
    made = [trace(), trace(sever="mlp"), trace(sever="attention"), estimate()]
    figures = [heat_map(each) for each in made]
    titles = [figure.get_suptitle().replace("\n", " ") for figure in figures]
    assert titles == [
        "Restoring the hidden state after corrupting the subject",
        "Restoring the hidden state with FFN severed, after corrupting the subject",
        "Restoring the hidden state with attention severed, after corrupting the subject",
        "Estimated by gradients: restoring the hidden state after corrupting the subject",
    ]
    axes = [figure.axes[0].get_xlabel() for figure in figures]
    assert ["stay as corrupted" in text for text in axes] == [False, True, True, False]
    bars = [figure.axes[1].get_ylabel() for figure in figures]
    assert bars == ["p(Italy)"] * 3 + ["estimated p(Italy)"]
    for width in (80, 40):
        texts = [" ".join(str(text_heat_map(each, width)).split()) for each in made]
        assert all(title in text for title, text in zip(titles, texts, strict=True))
        assert ["stay as corrupted" in text for text in texts] == [False, True, True, False]
    assert "estimated p" in texts[-1] or "estimated p" in str(text_heat_map(made[-1], 80))
    notes = [each.tables()[0].note for each in made]
    assert "mlp severed" in notes[1] and "estimated" in notes[3] and "severed" not in notes[0]


def test_curves_of_averages_leave_out_what_no_fact_has() -> None:
    made = average()
    lines = [line for line in class_lines(made).axes[0].get_lines() if len(line.get_xdata()) == 4]
    assert [line.get_label() for line in lines] == [
        c for c in made.classes if c != "middle subject tokens"
    ]
    assert np.allclose(lines[1].get_ydata(), made.effects["state"][2])
    # No two lines share dash and marker, so a reader needs no colour.
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(lines)


def test_a_class_has_the_same_line_in_every_figure() -> None:
    made = average()
    all_there = dataclasses.replace(made, counts=(5, 5, 9, 9, 3, 9))

    def styles(figure: Figure) -> dict[object, tuple[object, ...]]:
        lines = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 4]
        return {
            line.get_label(): (line.get_color(), line.get_linestyle(), line.get_marker())
            for line in lines
        }

    fewer, all_six = styles(class_lines(made)), styles(class_lines(all_there))
    assert len(fewer) == 5 and len(set(all_six.values())) == 6
    assert fewer == {label: style for label, style in all_six.items() if label in fewer}


def test_heat_map_shows_the_scores_with_the_subject_marked() -> None:
    made = trace()
    axes, bar = heat_map(made).axes
    (image,) = axes.get_images()
    assert np.array_equal(image.get_array(), made.scores.numpy())
    assert image.get_clim() == (made.corrupted, pytest.approx(0.9))
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "<s>",
        "The",
        "tower",
        "of",
        "Pi*",
        "sa↵*",
        "is",
        "in",
    ]
    assert bar.get_ylabel() == "p(Italy)"


@pytest.mark.parametrize(
    ("kind", "window", "title", "axis"),
    [
        ("state", 1, "the hidden state", "restored layer"),
        ("mlp", 4, "4 FFN outputs", "centre of the 4 restored layers"),
        ("attention", 10, "up to 6 attention outputs", "centre of the restored layers, at most 6"),
    ],
)
def test_each_kind_says_what_is_restored_in_a_colour_of_its_own(
    kind: Any, window: int, title: str, axis: str
) -> None:
    figure = heat_map(trace(kind=kind, window=window))
    assert title in figure.get_suptitle()
    # Colours begin at the corrupted probability; a note gives the lowest score below it.
    assert figure.axes[0].get_xlabel().splitlines() == [
        axis,
        "white: 0.1 or less; the lowest is 0.02",
    ]
    above = heat_map(trace(kind=kind, window=window, scores=trace().scores.clamp_min(0.1)))
    assert above.axes[0].get_xlabel() == axis
    assert title in str(text_heat_map(trace(kind=kind, window=window)))
    # Equal steps of probability are equal steps of lightness, in grey print and for the
    # colour-blind too.
    levels = lightness(figure.axes[0].get_images()[0].get_cmap()(np.linspace(0, 1, 17))[:, :3])
    steps = -np.diff(levels)
    assert (
        levels[0] > 95 and levels[-1] < 30 and steps.min() > 0 and steps.max() / steps.min() < 1.25
    )


def test_labels_fit_their_axes() -> None:
    figure = heat_map(trace(n_layers=48, answer=" a very long answer that goes on"))
    figure.draw_without_rendering()
    axes, bar = figure.axes
    page = figure.bbox
    for text in (
        axes.title,
        axes.xaxis.label,
        bar.yaxis.label,
        *figure.texts,
        *axes.get_yticklabels(),
    ):
        box = text.get_window_extent()
        assert (
            box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1
        ), text
    ticks = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(ticks))


def rows(made: CausalTrace, width: int) -> list[tuple[str, str, str]]:
    """Return (label, cells, text after the frame) of each token's line."""
    lines = [line for line in str(text_heat_map(made, width)).split("\n") if line.count("│") == 2]
    return [
        (label.strip(), cells, after) for label, cells, after in (line.split("│") for line in lines)
    ]


def test_text_map_shades_what_is_gained_and_names_the_largest() -> None:
    lines = rows(trace(), 80)
    assert [label for label, _, _ in lines] == [
        "<s>",
        "The",
        "tower",
        "of",
        "Pi*",
        "sa↵*",
        "is",
        "in",
    ]
    assert lines[5][1] == "    ██      " and lines[5][2] == " 0.900 @2"
    assert lines[7][1] == "          ▒▒" and lines[7][2] == " 0.500 @5"
    for _, cells, after in [*lines[:5], lines[6]]:
        assert not cells.strip() and not after  # equal to the corrupted probability, or below it
    text = str(text_heat_map(trace(), 80))
    assert "p(Italy): clean 0.950, corrupted 0.100" in text and "0.10 ·░▒▓█ 0.90" in text


@pytest.mark.parametrize("width", [20, 24, 33, 40, 61, 80, 120])
@pytest.mark.parametrize("n_layers", [1, 6, 12, 48, 126])
def test_text_map_fits_any_terminal(width: int, n_layers: int) -> None:
    scores = torch.full((len(TOKENS), n_layers), 0.1)
    scores[5, n_layers // 2] = 0.9
    wide = trace(
        n_layers,
        scores=scores,
        tokens=(*TOKENS[:6], " 中国中国中国中国中国", " aVeryLongTokenThatGoesOnAndOn"),
        answer=" 日本国 and more",
    )
    text = str(text_heat_map(wide, width))
    assert max(cell_len(line) for line in text.split("\n")) <= width
    lines = rows(wide, width)
    assert len(lines) == len(TOKENS) and len({cell_len(cells) for _, cells, _ in lines}) == 1
    # Pooling keeps the maximum: the one full block stays where it belongs.
    cells = lines[5][1]
    assert (
        cells.count("█") in (1, 2)
        and abs(cells.index("█") / len(cells) - (n_layers // 2) / n_layers) <= 0.15
    )
    assert "█" not in "".join(c for i, (_, c, _) in enumerate(lines) if i != 5)


def test_layer_numbers_stand_under_their_cells() -> None:
    text = str(text_heat_map(trace(n_layers=48), 80)).split("\n")
    frame = next(line for line in text if "│" in line).index("│") + 1
    ruler = next(line for line in text if line.split()[:3] == ["0", "3", "6"])
    assert all(ruler[frame + layer :].startswith(str(layer)) for layer in range(0, 48, 3))


def test_a_trace_that_gains_nothing_is_blank() -> None:
    flat = trace(scores=torch.full((len(TOKENS), 6), 0.1), clean=0.1)
    assert all(not cells.strip() and not after for _, cells, after in rows(flat, 80))
    heat_map(flat)


def test_too_narrow_is_refused() -> None:
    with pytest.raises(InputError, match="at least 20"):
        text_heat_map(trace(), 10)
