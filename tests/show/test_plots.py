"""Pictures of a trace: that they hold the numbers, fit where they are shown, and leave nothing behind."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.cells import cell_len

from conftest import TEXTS
from factsmith.core.errors import InputError, WorkspaceError
from factsmith.judge.evaluation import Evaluation
from factsmith.judge.rows import Row
from factsmith.locate.average import AverageTrace
from factsmith.locate.records import CausalTrace
from factsmith.locate.neurons import knowledge_neurons
from factsmith.model.language_model import LanguageModel
from factsmith.read.agreement import agreement
from factsmith.read.census import census
from factsmith.read.composition import compose
from factsmith.read.profile import profile
from factsmith.read.refinement import refinement
from factsmith.read.trigger_scan import find_triggers
from factsmith.read.triggers import Triggers
from factsmith.read.values import value_tokens
from factsmith.show.plots.judging import evaluation_chart
from factsmith.show.plots.neurons import neuron_chart
from factsmith.show.plots.reading import (
    agreement_chart,
    census_chart,
    curves,
    prediction_chart,
    profile_bars,
    profile_lines,
    refinement_chart,
)
from factsmith.show.plots.traces import class_lines, class_map, heat_map, text_heat_map

TOKENS = ("<s>", "The", " tower", " of", " Pi", "sa\n", " is", " in")


def trace(n_layers: int = 6, **changes: Any) -> CausalTrace:
    """A made-up trace: nothing gained, but 0.9 at the last subject token a third of the way up, and 0.5 at the very last state."""
    scores = torch.full((len(TOKENS), n_layers), 0.1)
    scores[5, n_layers // 3], scores[-1, -1], scores[4, 0] = 0.9, 0.5, 0.02
    made = CausalTrace(
        prompt="The tower of Pisa is in",
        subject="Pisa",
        answer=" Italy",
        answer_ids=(7,),
        predicted=" Italy",
        is_correct=True,
        kind="state",
        window=1,
        sever=None,
        tokens=TOKENS,
        subject_span=(4, 6),
        scores=scores,
        clean=0.95,
        corrupted=0.1,
        corruption="noise",
        replacements=(),
        noise=0.2,
        samples=10,
        seed=1,
    )
    return dataclasses.replace(made, **changes)


def lightness(colours: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """CIE L* of sRGB colours (..., 3)."""
    light = np.where(
        colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4
    ) @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(light > 0.008856, 116 * np.cbrt(light) - 16, 903.3 * light)  # type: ignore[no-any-return]


def average() -> AverageTrace:
    """A made-up average of two maps; no fact has middle subject tokens."""
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
        # A class that no fact has does not look like one without effect.
        assert [label.get_text() for label in axes.get_yticklabels()] == list(made.classes)
        assert [(text.get_text().strip(), text.get_position()[1]) for text in axes.texts] == [
            ("none", 1)
        ]
        assert [(patch.get_y(), bool(patch.get_hatch())) for patch in axes.patches] == [(0.5, True)]
    assert figure.get_supxlabel() == "restored layer, or centre of the restored layers"
    made.effects["state"][5, 2] = -0.12
    assert (
        class_map(made)
        .get_supxlabel()
        .endswith("\nwhite: no effect, or a negative one, down to −0.12")
    )


def test_curves_of_averages_leave_out_what_no_fact_has() -> None:
    made = average()
    lines = [line for line in class_lines(made).axes[0].get_lines() if len(line.get_xdata()) == 4]
    assert [line.get_label() for line in lines] == [
        c for c in made.classes if c != "middle subject tokens"
    ]
    assert np.allclose(lines[1].get_ydata(), made.effects["state"][2])
    # Told apart without colour: no two share dash and marker.
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


@pytest.mark.parametrize("n", [2, 60])
def test_bars_of_neurons_fill_their_panel(tiny_gpt2: LanguageModel, n: int) -> None:
    found = knowledge_neurons(tiny_gpt2, "Paris is the capital of", "Paris", steps=2)
    bottom, top = neuron_chart(found, n=n).axes[0].get_ylim()
    assert -1 <= top < -0.36 and n - 0.64 < bottom <= n


def test_another_record_is_refused_with_what_draws_it(tiny_gpt2: LanguageModel) -> None:
    found = knowledge_neurons(tiny_gpt2, "Paris is the capital of", "Paris", steps=2)
    for draw in (heat_map, text_heat_map, class_map, class_lines):
        with pytest.raises(InputError, match="got a KnowledgeNeurons; draw it with neuron_chart"):
            draw(found)  # type: ignore[operator]
    with pytest.raises(
        InputError, match="draws a KnowledgeNeurons; got a CausalTrace; draw it with heat_map"
    ):
        neuron_chart(trace())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="width is 'x'"):
        text_heat_map(trace(), "x")  # type: ignore[arg-type]


def test_neuron_chart_shows_the_strongest_and_marks_the_refined(tiny_gpt2: LanguageModel) -> None:
    prompts = ["Paris is the capital of", "The Eiffel Tower is in", "Edwin is"]
    found = knowledge_neurons(tiny_gpt2, prompts, "Paris")
    bars, layers = neuron_chart(found, n=5).axes
    top = found.top(5)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([score for _, score in top])
    assert [label.get_text() for label in bars.get_yticklabels()] == [
        f"L{layer} · {i}" for (layer, i), _ in top
    ]
    assert [bool(bar.get_hatch()) for bar in bars.patches] == [
        neuron not in found.refined for neuron, _ in top
    ]
    heights = [bar.get_height() for bar in layers.patches]
    assert np.allclose(
        np.add(heights[:3], heights[3:]), found.scores.mean(0).clamp_min(0).sum(1), rtol=1e-5
    )
    with pytest.raises(InputError, match="n is 0"):
        neuron_chart(found, n=0)


def test_curves_draw_what_they_are_given_and_refuse_ragged_series() -> None:
    figure = curves(
        {"a": ([1, 2], [0.1, 0.2], [0, 0.1], [0.2, 0.3])}, x_label="k", y_label="share", mark_x=1.5
    )
    line, mark = figure.axes[0].get_lines()
    assert list(line.get_ydata()) == [0.1, 0.2] and list(mark.get_xdata()) == [1.5, 1.5]
    with pytest.raises(InputError, match="'a'"):
        curves({"a": ([1, 2], [0.1], [0, 0.1], [0.2, 0.3])}, x_label="k", y_label="share")
    with pytest.raises(InputError):
        curves({}, x_label="k", y_label="share")


@pytest.fixture(scope="module")
def scanned(tiny_gpt2: LanguageModel) -> Triggers:
    words = " ".join(TEXTS).split()
    return find_triggers(
        tiny_gpt2, [" ".join(random.Random(n).sample(words, 6)) for n in range(60)], top=12
    )


def test_profile_lines_are_the_shares_above_chance(scanned: Triggers, tmp_path: Path) -> None:
    found = profile(scanned, {"length": {text: len(text) % 3 for text in scanned.texts}})
    figure = profile_lines(
        {"one": found, "again": found},
        ["token", ("position", "token"), "length"],
        path=tmp_path / "lines.png",
    )
    assert (tmp_path / "lines.png").stat().st_size > 1000
    for axes in figure.axes:
        token, position, length = axes.get_lines()
        assert np.allclose(token.get_ydata(), found.share[:, 0]) and np.allclose(
            length.get_ydata(), found.share[:, 4]
        )
        assert position.get_label() == "position, not token" and np.allclose(
            position.get_ydata(), found.share_of("position", without=["token"])
        )
        grey = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert grey.max() == pytest.approx(float(found.chance[:, [0, 3, 4]].max()))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "again"]
    assert (
        len(profile_lines(found).axes[0].get_lines()) == 5
        and profile_lines(found).get_figwidth() < 3.5
    )
    with pytest.raises(InputError, match="got 0 features"):
        profile_lines(found, [])
    with pytest.raises(InputError, match="no profile of 'noun'"):
        profile_lines(found, ["noun"])


def test_profile_bars_stack_up_to_the_selective_share(scanned: Triggers) -> None:
    found = profile(scanned)
    figure = profile_bars(found, "position", n=2, names={0: "the first"})
    axes = figure.axes[0]
    heights = np.array([[bar.get_height() for bar in container] for container in axes.containers])
    assert np.allclose(heights.sum(0), found.share[:, 3], atol=1e-6)
    tallies = [found.tally("position", layer) for layer in found.layers]
    total = {
        position: sum(tally.get(position, 0) for tally in tallies)
        for tally in tallies
        for position in tally
    }
    (first, second) = sorted(total, key=lambda position: -total[position])[:2]
    assert [container.get_label() for container in axes.containers] == [
        *("the first" if position == 0 else str(position) for position in (first, second)),
        "others",
    ]
    assert np.allclose(heights[0], [tally.get(first, 0) / 128 for tally in tallies])
    chosen = profile_bars(found, "position", values=[second, first]).axes[0].containers
    assert [bar.get_height() for bar in chosen[1]] == pytest.approx(heights[0]) and len(chosen) == 3
    with pytest.raises(InputError, match="got 9 values"):
        profile_bars(found, "position", values=range(9))
    with pytest.raises(InputError, match="n is 0"):
        profile_bars(found, "position", n=0)
    with pytest.raises(InputError, match="no profile of 'noun'"):
        profile_bars(found, "noun")


def test_agreement_and_census_are_drawn_as_they_are(
    scanned: Triggers, tiny_gpt2: LanguageModel
) -> None:
    agree = agreement(scanned, value_tokens(tiny_gpt2))
    share, within, chance = agreement_chart(agree).axes[0].get_lines()
    for line, part in ((share, agree.share), (within, agree.within), (chance, agree.chance)):
        assert np.allclose(line.get_ydata(), part)
    bare = census(tiny_gpt2)
    (axes,) = census_chart(bare).axes
    memory, attention, embeddings = (
        [bar.get_height() * 1e6 for bar in container] for container in axes.containers
    )
    assert np.allclose(
        [sum(memory), sum(attention), *embeddings], [bare.ffn, bare.attention, bare.embeddings]
    )
    assert axes.get_title(loc="left").startswith(bare.model)
    measured = census(tiny_gpt2, moments={1: torch.eye(128)})
    _, below = census_chart(measured).axes
    assert [bar.get_height() for bar in below.containers[0]][1] == pytest.approx(1)
    assert len(census_chart({"a": measured, "b": bare}).axes) == 4
    for draw in (profile_lines, agreement_chart, census_chart):
        with pytest.raises(InputError, match="got a CausalTrace; draw it with heat_map"):
            draw(trace())  # type: ignore[operator]
        with pytest.raises(InputError, match="got a dict"):
            draw({})


def judged(size: int, right: float, *, sequence: bool = False) -> Evaluation:
    """Four records, of whose prompts a share is answered right; in a sequence those of the first round are lost in the second."""
    rows = []
    for at, kind in itertools.product(range(4), ("prompt", "paraphrase")):
        asked = range(at // size, 4 // size) if sequence else [at // size]
        for unit in asked:
            good = at < 4 * right if not sequence else unit == at // size
            rows.append(
                Row(editor="it", unit=unit, record=f"r{at}", kind=kind, group=None, prompt="p", written=at // size, answer="",  # type: ignore[arg-type]
                    exact=good, stayed=None, log_wanted=-1.0, log_against=-2.0, tokens=None)
            )  # fmt: skip
    base = [dataclasses.replace(row, editor="base") for row in rows]
    notes = {
        ("it", unit): {"kl_text": 0.5 * (unit + 1), "changed_share": 0.1}
        for unit in range(4 // size)
    }
    return Evaluation(
        rows=(*base, *rows),
        notes=notes,
        size=size,
        sequence=sequence,
        skipped=0,
        model="m",
        fingerprint="f" * 64,
    )


def test_judged_edits_are_drawn_as_they_are(tmp_path: Path) -> None:
    runs = [judged(2, 0.5), judged(1, 1.0), judged(2, 0, sequence=True)]
    figure = evaluation_chart(runs, names={"it": "That one"}, path=tmp_path / "judged.png")
    prompt, _, neighbour, _, first, so_far, changed, prose = figure.axes
    thin, solid = prompt.get_lines()
    assert solid.get_xydata().tolist() == [[1, 100], [2, 50]] and thin.get_xydata().tolist() == [
        [1, 100],
        [2, 100],
    ]
    assert solid.get_label() == "That one" and not neighbour.get_lines()
    assert first.get_lines()[0].get_xydata().tolist() == [[2, 100], [4, 0]]
    assert so_far.get_lines()[0].get_xydata().tolist() == [[2, 100], [4, 50]]
    assert changed.get_lines()[0].get_ydata().tolist() == [10, 10] and prose.get_lines()[
        0
    ].get_ydata().tolist() == [0.5, 1.0]
    assert len(evaluation_chart(runs[:2]).axes) == 4 and len(evaluation_chart(runs[2]).axes) == 4
    for few in ([], [judged(1, 1.0)]):
        with pytest.raises(InputError, match="expected two sizes"):
            evaluation_chart(few)
    with pytest.raises(InputError, match="got a CausalTrace"):
        evaluation_chart([trace()])  # type: ignore[list-item]


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
        ("attention", 10, "up to 6 attention outputs", "centre of the up to 6 restored layers"),
    ],
)
def test_each_kind_says_what_is_restored_in_a_colour_of_its_own(
    kind: Any, window: int, title: str, axis: str
) -> None:
    figure = heat_map(trace(kind=kind, window=window))
    assert title in figure.get_suptitle()
    # Colours begin at the corrupted probability; that there are scores below it is said, with the lowest.
    assert figure.axes[0].get_xlabel().splitlines() == [axis, "white: 0.1 or less, down to 0.02"]
    above = heat_map(trace(kind=kind, window=window, scores=trace().scores.clamp_min(0.1)))
    assert above.axes[0].get_xlabel() == axis
    assert title in str(text_heat_map(trace(kind=kind, window=window)))
    # Equal steps of probability are equal steps of lightness: the order survives grey print and colour blindness.
    levels = lightness(figure.axes[0].get_images()[0].get_cmap()(np.linspace(0, 1, 17))[:, :3])
    steps = -np.diff(levels)
    assert (
        levels[0] > 95 and levels[-1] < 30 and steps.min() > 0 and steps.max() / steps.min() < 1.25
    )


@pytest.mark.parametrize(
    ("suffix", "starts"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")]
)
def test_saved_by_suffix(tmp_path: Path, suffix: str, starts: bytes) -> None:
    # Text that is no formula, in a script that the font does not have: neither may fail or warn.
    odd = trace(
        answer=" $x_{$",
        tokens=("$", "^_{", "中", "\n", "   ", "\\frac", "�", "aVeryLongTokenThatGoesOnAndOn"),
    )
    figure = heat_map(odd, path=tmp_path / f"map{suffix}")
    assert (tmp_path / f"map{suffix}").read_bytes().startswith(starts)
    assert isinstance(figure, Figure) and figure.get_figwidth() < 3.5  # one column of a page


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


def test_drawing_does_not_start_pyplot() -> None:
    before = "matplotlib.pyplot" in sys.modules
    heat_map(trace())
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize("name", ["map.jpeg", "map"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"\.png, \.svg, \.pdf"):
        heat_map(trace(), path=tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="is not a folder"):
        heat_map(trace(), path=tmp_path / "absent" / "map.png")


def rows(made: CausalTrace, width: int) -> list[tuple[str, str, str]]:
    """(label, cells, what stands behind) of each token's line."""
    lines = [line for line in str(text_heat_map(made, width)).split("\n") if line.count("│") == 2]
    return [
        (label.strip(), cells, behind)
        for label, cells, behind in (line.split("│") for line in lines)
    ]


def test_text_map_shades_what_is_gained_and_names_the_largest() -> None:
    found = rows(trace(), 80)
    assert [label for label, _, _ in found] == [
        "<s>",
        "The",
        "tower",
        "of",
        "Pi*",
        "sa↵*",
        "is",
        "in",
    ]
    assert found[5][1] == "    ██      " and found[5][2] == " 0.900 @2"
    assert found[7][1] == "          ▒▒" and found[7][2] == " 0.500 @5"
    for _, cells, behind in [*found[:5], found[6]]:
        assert not cells.strip() and not behind  # equal to the corrupted probability, or below it
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
    found = rows(wide, width)
    assert len(found) == len(TOKENS) and len({cell_len(cells) for _, cells, _ in found}) == 1
    # Pooling keeps the maximum: the one full block stays where it belongs.
    cells = found[5][1]
    assert (
        cells.count("█") in (1, 2)
        and abs(cells.index("█") / len(cells) - (n_layers // 2) / n_layers) <= 0.15
    )
    assert "█" not in "".join(c for i, (_, c, _) in enumerate(found) if i != 5)


def test_layer_numbers_stand_under_their_cells() -> None:
    text = str(text_heat_map(trace(n_layers=48), 80)).split("\n")
    frame = next(line for line in text if "│" in line).index("│") + 1
    ruler = next(line for line in text if line.split()[:3] == ["0", "3", "6"])
    assert all(ruler[frame + layer :].startswith(str(layer)) for layer in range(0, 48, 3))


def test_a_trace_that_gains_nothing_is_blank() -> None:
    flat = trace(scores=torch.full((len(TOKENS), 6), 0.1), clean=0.1)
    assert all(not cells.strip() and not behind for _, cells, behind in rows(flat, 80))
    heat_map(flat)


def test_too_narrow_is_refused() -> None:
    with pytest.raises(InputError, match="at least 20"):
        text_heat_map(trace(), 10)


@pytest.mark.parametrize("contrast", [None, " Brazil"])
def test_a_prediction_is_drawn_as_it_was_taken_apart(
    tiny_llama: LanguageModel, contrast: str | None, tmp_path: Path
) -> None:
    found = compose(tiny_llama, "Paris is the capital of $x_{", contrast=contrast)
    probability, rank, bars = prediction_chart(found, path=tmp_path / "p.svg").axes
    line, attention = probability.get_lines()
    assert list(line.get_ydata()) == found.probabilities.tolist()
    assert (
        list(attention.get_ydata()) == found.probabilities[1::2].tolist()
        and attention.get_linestyle() == "None"
    )
    assert list(rank.get_lines()[0].get_ydata()) == (found.ranks + 1).tolist()
    assert rank.get_ylim()[0] > rank.get_ylim()[1], "the likeliest on top"
    drawn = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in bars.patches}
    at = [-1.0] + [layer + side for layer in range(3) for side in (-0.2, 0.2)]
    for place, part in zip(at, found.parts, strict=False):  # but the shift
        assert drawn[round(place, 6)] == part.logit
    assert [bool(bar.get_hatch()) for bar in bars.patches[1:7]] == [True] * 3 + [False] * 3, (
        "attention is hatched"
    )
    assert bars.get_ylabel() == ("added to logit" if contrast is None else "added to the lead")


def test_many_predictions_are_drawn_by_layer(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    found = refinement(
        tiny_gpt2,
        ["Paris is the capital of", "The Eiffel Tower is in", "Edwin is"],
        among=(1, 0.5, 0),
    )
    figure = refinement_chart(found, path=tmp_path / "r.png")
    alone, whose, first, rank = figure.axes
    lines = alone.get_lines()
    for i in range(3):
        assert list(lines[2 * i].get_ydata()) == found.composed[i].tolist()
        assert (
            list(lines[2 * i + 1].get_ydata()) == found.chance[i].tolist()
            and lines[2 * i + 1].get_linestyle() == ":"
        )
    assert [line.get_label() for line in lines[:6:2]] == ["all", "strongest 50%", "strongest"]
    heights = np.array([bar.get_height() for bar in whose.patches]).reshape(4, -1)
    assert np.allclose(heights.sum(0), 1)
    assert np.allclose(
        heights,
        [found.cases[case].tolist() for case in ("residual", "agreement", "composition", "ffn")],
    )
    assert list(first.get_lines()[0].get_ydata()) == found.first.tolist()
    assert list(rank.get_lines()[0].get_ydata()) == (found.quantiles(0.5)[0] + 1).tolist()
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_legend().get_window_extent()
        assert box.x0 >= figure.bbox.x0 and box.x1 <= figure.bbox.x1
        title = (
            axes.title.get_window_extent()
            if axes.get_title()
            else axes._left_title.get_window_extent()
        )
        assert not title.overlaps(box), "a title beside or above its legend"
    with pytest.raises(InputError, match="got a Refinement; draw it with refinement_chart"):
        prediction_chart(found)  # type: ignore[arg-type]


def test_a_notebook_shows_a_picture_at_the_size_of_a_column() -> None:
    drawn = curves({"line": ([0, 1], [0.0, 1.0], [0.0, 0.9], [0.1, 1.1])}, x_label="x", y_label="y")
    png, size = drawn._repr_png_()  # type: ignore[attr-defined]
    assert png.startswith(b"\x89PNG") and 200 < size["width"] < 600
