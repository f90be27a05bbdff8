"""What layers hold: the lines and bars are the numbers of the records."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TEXTS
from factsmith.core.errors import InputError
from factsmith.model.language_model import LanguageModel
from factsmith.read.agreement import agreement
from factsmith.read.census import census
from factsmith.read.profile import profile
from factsmith.read.trigger_scan import find_triggers
from factsmith.read.triggers import Triggers
from factsmith.read.values import value_tokens
from factsmith.show.plots.reading import (
    agreement_chart,
    census_chart,
    profile_bars,
    profile_lines,
)
from show.records import trace


@pytest.fixture(scope="module")
def scanned(tiny_gpt2: LanguageModel) -> Triggers:
    words = " ".join(TEXTS).split()
    return find_triggers(
        tiny_gpt2, [" ".join(random.Random(n).sample(words, 6)) for n in range(60)], top=12
    )


def test_profile_lines_are_the_shares_above_chance(scanned: Triggers, tmp_path: Path) -> None:
    record = profile(scanned, {"length": {text: len(text) % 3 for text in scanned.texts}})
    figure = profile_lines(
        {"one": record, "again": record},
        ["token", ("position", "token"), "length"],
        path=tmp_path / "lines.png",
    )
    assert (tmp_path / "lines.png").stat().st_size > 1000
    for axes in figure.axes:
        token, position, length = axes.get_lines()
        assert np.allclose(token.get_ydata(), record.share[:, 0]) and np.allclose(
            length.get_ydata(), record.share[:, 4]
        )
        assert position.get_label() == "position, not token" and np.allclose(
            position.get_ydata(), record.share_of("position", without=["token"])
        )
        grey = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert grey.max() == pytest.approx(float(record.chance[:, [0, 3, 4]].max()))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "again"]
    assert (
        len(profile_lines(record).axes[0].get_lines()) == 5
        and profile_lines(record).get_figwidth() < 3.5
    )
    with pytest.raises(InputError, match="got 0 features"):
        profile_lines(record, [])
    with pytest.raises(InputError, match="no profile of 'noun'"):
        profile_lines(record, ["noun"])


def test_profile_bars_stack_up_to_the_selective_share(scanned: Triggers) -> None:
    record = profile(scanned)
    figure = profile_bars(record, "position", n=2, names={0: "the first"})
    axes = figure.axes[0]
    heights = np.array([[bar.get_height() for bar in container] for container in axes.containers])
    assert np.allclose(heights.sum(0), record.share[:, 3], atol=1e-6)
    tallies = [record.tally("position", layer) for layer in record.layers]
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
    chosen = profile_bars(record, "position", values=[second, first]).axes[0].containers
    assert [bar.get_height() for bar in chosen[1]] == pytest.approx(heights[0]) and len(chosen) == 3
    with pytest.raises(InputError, match="got 9 values"):
        profile_bars(record, "position", values=range(9))
    with pytest.raises(InputError, match="n is 0"):
        profile_bars(record, "position", n=0)
    with pytest.raises(InputError, match="no profile of 'noun'"):
        profile_bars(record, "noun")


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
