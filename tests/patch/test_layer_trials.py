"""The race of layers and the choice from its trials, on tables made by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from factsmith.core.errors import UnsupportedModelError
from factsmith.model.language_model import LanguageModel
from factsmith.patch.layer_choice import LayerScore, Trial
from factsmith.patch.layer_trials import candidates, choose, race, trace_window

FLAT = [0.0] * 12


def table(scores: dict[int, float], n: int = 4) -> dict[int, list[Trial]]:
    """Return `n` equal trials for each layer, with the given score as their harmonic mean."""
    return {layer: [(score, score, score)] * n for layer, score in scores.items()}


@pytest.mark.parametrize(
    ("scores", "effects", "expected"),
    [
        ({0: 0.5, 1: 0.9, 2: 0.7}, FLAT, (1, (1,))),
        # Effects do not outweigh measured scores.
        ({0: 0.5, 1: 0.9, 2: 0.7}, [9.0, 0.0, 8.0], (1, (1,))),
        ({0: 0.9, 1: 0.9, 2: 0.9}, FLAT, (0, (0, 1, 2))),  # a tie goes to the earliest layer
        # A tie goes to the layer with the greatest effect.
        ({0: 0.9, 1: 0.9, 2: 0.9}, [0.0, 0.1, 0.2], (2, (0, 1, 2))),
        # MEMIT's run ends at the edges of a plateau.
        ({3: 0.8, 4: 0.97, 5: 1.0, 6: 0.96, 7: 0.96, 8: 0.8}, FLAT, (5, (4, 5, 6, 7))),
        # A run has five layers at most.
        ({n: 1.0 - 0.001 * abs(n - 6) for n in range(12)}, FLAT, (6, (4, 5, 6, 7, 8))),
        ({4: 1.0, 5: 0.5, 6: 1.0}, FLAT, (4, (4,))),  # a gap ends the run
        ({2: 0.7}, FLAT, (2, (2,))),
        ({0: 0.0, 1: 0.0}, [0.1, 0.2], (1, (1,))),  # no edit holds
    ],
)
def test_choice_from_tables(
    scores: dict[int, float], effects: Sequence[float], expected: tuple[int, tuple[int, ...]]
) -> None:
    assert choose(table(scores), effects) == expected


def test_the_trace_decides_between_layers_of_equal_trials() -> None:
    sure, missed, partly = (1.0, 1.0, 1.0), (0.0, 0.8, 1.0), (1.0, 0.6, 1.0)
    always, once, often = [sure] * 24, [partly] * 3 + [sure] * 21, [partly] * 12 + [sure] * 12
    assert choose({0: once, 1: always}, [1.0, 0.0])[0] == 0, (
        "three slips of twenty-four may be chance"
    )
    assert choose({0: once, 1: always}, [0.0, 1.0])[0] == 1
    assert choose({0: often, 1: always}, [1.0, 0.0])[0] == 1, "twelve slips are not chance"
    # Edits are compared in pairs. A small gap in every edit counts. With shuffled edits the same
    # means do not count.
    low = [(1.0, 1.0, 0.5 + 0.1 * (i % 5)) for i in range(16)]
    high = [(a, b, min(1.0, c + 0.03)) for a, b, c in low]
    assert choose({0: low, 1: high}, [1.0, 0.0])[0] == 1
    assert choose({0: low, 1: high[1:] + high[:1]}, [1.0, 0.0])[0] == 0
    # A layer more than three points behind is not chosen, however uncertain the gap.
    assert choose({0: [missed] * 2 + [sure] * 14, 1: [sure] * 16}, [1.0, 0.0])[0] == 1


def test_a_layer_that_left_the_race_is_not_chosen() -> None:
    trials = {**table({0: 0.9, 1: 0.8}, 8), **table({2: 1.0}, 2)}  # two lucky edits
    assert choose(trials, FLAT) == (0, (0,))
    assert choose({**table({0: 0.9}, 8), **table({1: 0.9}, 2)}, FLAT) == (0, (0, 1)), (
        "it can belong to MEMIT's run"
    )


class Tries:
    """Answers a race from a list of efficacies for each layer.

    The last number of a trial identifies the edit.
    """

    def __init__(self, quality: dict[int, list[float]]) -> None:
        self.quality = quality
        self.asked: list[tuple[list[int], range]] = []

    def __call__(self, layers: Sequence[int], which: range) -> dict[int, list[Trial]]:
        self.asked.append((list(layers), which))
        return {
            layer: [(self.quality[layer][i], None, 1 - i / 1000) for i in which] for layer in layers
        }


def test_the_race_spends_its_edits_on_the_better_layers() -> None:
    # Layer 0 is behind at once, layer 3 from the seventh edit on.
    tries = Tries({0: [0.2] * 24, 1: [0.9] * 24, 2: [0.9] * 24, 3: [0.9] * 6 + [0.1] * 18})
    trials = race(range(4), 24, tries)
    assert tries.asked == [
        ([0, 1, 2, 3], range(6)),
        ([1, 2, 3], range(6, 12)),
        ([1, 2], range(12, 24)),
    ]
    assert {layer: len(some) for layer, some in trials.items()} == {0: 6, 1: 24, 2: 24, 3: 12}
    assert [t[2] for t in trials[1]] == [1 - i / 1000 for i in range(24)], (
        "every edit once, in order"
    )
    assert race([5], 1, lambda layers, which: {5: [(1.0, None, None)] * len(which)}) == {
        5: [(1.0, None, None)]
    }


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6])
def test_no_layer_leaves_a_race_of_few_edits(count: int) -> None:
    """A layer stays even if its first edit fails and one edit is a quarter of them all."""
    worst = Tries({0: [0.0] * count, 1: [1.0] * count})
    assert {layer: len(some) for layer, some in race([0, 1], count, worst).items()} == {
        0: count,
        1: count,
    }
    unlucky = Tries({0: [0.0] + [1.0] * (count - 1), 1: [1.0] + [0.0] * (count - 1)})
    trials = race([0, 1], count, unlucky)
    assert choose(trials, FLAT)[0] == (1 if count == 1 else 0)


@pytest.mark.parametrize("count", [8, 16, 24])
@pytest.mark.parametrize("lucky", [2, 4, 6])
def test_a_few_lucky_edits_do_not_end_the_race(count: int, lucky: int) -> None:
    """A layer that is nearly always right beats a layer that is right only at first.

    A few equal outcomes are no certainty.
    """
    tries = Tries({0: [0.93] * count, 1: [1.0] * lucky + [0.0] * (count - lucky)})
    trials = race([0, 1], count, tries)
    assert len(trials[0]) == count
    assert choose(trials, [0.0, 1.0])[0] == 0
    # Control: a layer that fails from the start leaves, if that saves edits.
    left = race([0, 1], count, Tries({0: [0.93] * count, 1: [0.0] * count}))
    assert len(left[1]) == min(count, 6) and len(left[0]) == count


def test_a_layer_that_left_comes_back_when_the_best_falls_behind_it() -> None:
    lucky = [1.0] * 12 + [0.0] * 12
    steady = [0.5] * 24
    tries = Tries({0: steady, 1: lucky, 2: [0.1] * 24})
    trials = race([0, 1, 2], 24, tries)
    assert tries.asked == [
        ([0, 1, 2], range(6)),
        ([1], range(6, 12)),
        ([1], range(12, 24)),
        ([0], range(6, 24)),  # layer 1 fell to 0.5, and 0 may have 0.5 too
    ]
    assert {layer: len(some) for layer, some in trials.items()} == {0: 24, 1: 24, 2: 6}
    assert [t[2] for t in trials[0]] == [1 - i / 1000 for i in range(24)], (
        "every edit once, in order"
    )
    # Control: when the best layer stays the best, no layer comes back.
    tries = Tries({0: steady, 1: [1.0] * 24, 2: [0.1] * 24})
    race([0, 1, 2], 24, tries)
    assert [layers for layers, _ in tries.asked] == [[0, 1, 2], [1], [1]]


@pytest.mark.parametrize("seed", range(20))
def test_the_race_ends_with_its_best_layer_measured_in_full(seed: int) -> None:
    """The chosen layer tried every edit, and no layer that left has a better score."""
    draw = random.Random(seed)
    rates = {layer: draw.random() for layer in range(6)}
    tries = Tries(
        {layer: [float(draw.random() < rate) for _ in range(24)] for layer, rate in rates.items()}
    )
    trials = race(range(6), 24, tries)
    assert (
        sum(len(layers) * len(which) for layers, which in tries.asked)
        == sum(map(len, trials.values()))
        <= 6 * 24
    )
    chosen = choose(trials, FLAT)[0]
    assert len(trials[chosen]) == 24
    score = {layer: LayerScore.of(layer, some).score for layer, some in trials.items()}
    best = max(score[layer] for layer, some in trials.items() if len(some) == 24)
    assert all(score[layer] < best for layer, some in trials.items() if len(some) < 24)


def test_candidates_are_bounded_and_dense(
    tiny_gpt2: LanguageModel,
) -> None:
    assert candidates(tiny_gpt2) == [0, 1, 2]

    class Ffn:
        def __init__(self, n_experts: int) -> None:
            self.n_experts = n_experts

    class Deep:
        name = "deep"

        def __init__(self, n_layers: int, experts: Sequence[int] = ()) -> None:
            self.n_layers = n_layers
            self.ffn = [Ffn(8 if layer in experts else 0) for layer in range(n_layers)]

    def tried(*model: Any) -> list[int]:
        return candidates(Deep(*model))  # type: ignore[arg-type]

    assert tried(12) == list(range(12)), "all layers of a shallow model"
    assert tried(30) == [2, 5, 8, 11, 14, 17] and tried(16) == [0, 2, 4, 6, 8, 10]
    for depth in (13, 24, 28, 32, 48, 80, 126):
        layers = tried(depth)
        assert len(layers) == 6 and depth // 6 in layers and max(layers) < 0.7 * depth
    assert tried(40, range(2, 40)) == [0, 1], "layers of experts are not tried"
    with pytest.raises(UnsupportedModelError, match="experts"):
        tried(40, range(40))


def test_a_run_for_memit_counts_the_layers_between_those_that_were_tried() -> None:
    spread = {2: 0.9, 5: 1.0, 8: 0.94, 11: 0.3}
    assert choose(table(spread), FLAT) == (5, (4, 5, 6, 7))
    steep = {2: 0.4, 5: 1.0, 8: 0.4}
    assert choose(table(steep), FLAT) == (5, (5,))


def test_windows_stay_small_compared_with_the_depth() -> None:
    assert [trace_window(n) for n in (1, 3, 6, 12, 24, 28, 32, 48, 80)] == [
        1,
        1,
        1,
        2,
        5,
        6,
        6,
        10,
        10,
    ]
