"""Predictions: the lines and bars are the numbers of the records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from factsmith.core.errors import InputError
from factsmith.model.language_model import LanguageModel
from factsmith.read.composition import compose
from factsmith.read.refinement import refinement
from factsmith.show.plots.predictions import prediction_chart, refinement_chart


@pytest.mark.parametrize("contrast", [None, " Brazil"])
def test_a_prediction_is_drawn_as_it_was_taken_apart(
    tiny_llama: LanguageModel, contrast: str | None, tmp_path: Path
) -> None:
    prediction = compose(tiny_llama, "Paris is the capital of $x_{", contrast=contrast)
    probability, rank, bars = prediction_chart(prediction, path=tmp_path / "p.svg").axes
    line, attention = probability.get_lines()
    assert list(line.get_ydata()) == prediction.probabilities.tolist()
    assert (
        list(attention.get_ydata()) == prediction.probabilities[1::2].tolist()
        and attention.get_linestyle() == "None"
    )
    assert list(rank.get_lines()[0].get_ydata()) == (prediction.ranks + 1).tolist()
    assert rank.get_ylim()[0] > rank.get_ylim()[1], "the likeliest on top"
    drawn = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in bars.patches}
    at = [-1.0] + [layer + side for layer in range(3) for side in (-0.2, 0.2)]
    for place, part in zip(at, prediction.parts, strict=False):  # without the shift
        assert drawn[round(place, 6)] == part.logit
    assert [bool(bar.get_hatch()) for bar in bars.patches[1:7]] == [True] * 3 + [False] * 3, (
        "attention is hatched"
    )
    assert bars.get_ylabel() == (
        "added to logit" if contrast is None else "added to logit\ndifference"
    )


def test_many_predictions_are_drawn_by_layer(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    predictions = refinement(
        tiny_gpt2,
        ["Paris is the capital of", "The Eiffel Tower is in", "Edwin is"],
        among=(1, 0.5, 0),
    )
    figure = refinement_chart(predictions, path=tmp_path / "r.png")
    alone, cases, first, rank = figure.axes
    lines = alone.get_lines()
    for i in range(3):
        assert list(lines[2 * i].get_ydata()) == predictions.composed[i].tolist()
        assert (
            list(lines[2 * i + 1].get_ydata()) == predictions.chance[i].tolist()
            and lines[2 * i + 1].get_linestyle() == ":"
        )
    assert [line.get_label() for line in lines[:6:2]] == ["all", "strongest 50%", "strongest"]
    heights = np.array([bar.get_height() for bar in cases.patches]).reshape(4, -1)
    assert np.allclose(heights.sum(0), 1)
    assert np.allclose(
        heights,
        [
            predictions.cases[case].tolist()
            for case in ("residual", "agreement", "composition", "ffn")
        ],
    )
    assert list(first.get_lines()[0].get_ydata()) == predictions.first.tolist()
    assert list(rank.get_lines()[0].get_ydata()) == (predictions.quantiles(0.5)[0] + 1).tolist()
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_legend().get_window_extent()
        assert box.x0 >= figure.bbox.x0 and box.x1 <= figure.bbox.x1
        title = (
            axes.title.get_window_extent()
            if axes.get_title()
            else axes._left_title.get_window_extent()
        )
        assert not title.overlaps(box), "titles and legends do not overlap"
    with pytest.raises(InputError, match="got a Refinement; draw it with refinement_chart"):
        prediction_chart(predictions)  # type: ignore[arg-type]
