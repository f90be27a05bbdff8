"""The layer of appended neurons is where subjects can be told apart, and as low as possible."""

from __future__ import annotations

import pytest
import torch

import factsmith as fs
from factsmith.core.errors import LayerError
from factsmith.corpus.moments_store import find_moments
from factsmith.edit.append_layer import choose_layer, lowest_of_the_best
from factsmith.edit.forms import has_biases
from factsmith.edit.keys import read_inputs_of
from factsmith.model.language_model import LanguageModel

FACTS = [
    fs.Fact("Bulgaria", "The capital of {} is", "Oslo"),
    fs.Fact("Georgian Orthodox Church", "The country of {} is", "Peru"),
]


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return fs.load("atlas-llama")


def likeness(lm: LanguageModel, statistics: fs.SecondMoment, layer: int) -> float:
    """The cosine of what enters a layer at two names that end alike, as seen in ordinary text."""
    names = ["The country of Georgian Orthodox Church", "The country of Russian Orthodox Church"]
    x = read_inputs_of(lm, [lm.prompt_ids(name) for name in names], layer).double()
    away = x - statistics.mean
    seen = torch.linalg.solve(statistics.covariance, away.T)
    cross = away @ seen
    return float(cross[0, 1] / (cross[0, 0] * cross[1, 1]).sqrt())


def test_a_layer_that_sees_only_the_last_token_is_not_chosen(llama: LanguageModel) -> None:
    statistics = find_moments(llama, [0, 1, 2], site="inputs")
    layer, measured = choose_layer(llama, FACTS, [2, 0, 1], ["{}"], statistics)
    assert layer in (1, 2) and sorted(measured) == [0, 1, 2]
    # Names that end alike enter the layers more and more differently.
    alike = [likeness(llama, statistics[each], each) for each in range(3)]
    assert alike[0] > alike[1] > alike[2]
    missed = [measured[each][1] for each in range(3)]
    assert missed[0] > missed[1] > missed[2] and all(kept > 0.9 for kept, _ in measured.values())
    again, _ = choose_layer(llama, FACTS, [0], ["{}"], {})
    assert again == 0, "the control: nothing to choose, nothing to measure"


def test_of_layers_that_are_nearly_as_good_the_lowest_is_chosen() -> None:
    measured = {4: (0.9, 0.5), 5: (0.95, 0.34), 6: (0.95, 0.3), 7: (0.8, 0.1)}
    assert lowest_of_the_best(measured) == 5
    assert lowest_of_the_best(measured | {8: (1.0, 0.22)}) == 7
    assert lowest_of_the_best({3: (0.1, 0.9)}) == 3


def test_layers_that_do_not_exist_are_refused(llama: LanguageModel) -> None:
    with pytest.raises(LayerError, match="empty"):
        choose_layer(llama, FACTS, [], ["{}"], {})
    with pytest.raises(LayerError):
        choose_layer(llama, FACTS, [0, 17], ["{}"], {})
    assert has_biases(llama.ffn[0]) == (False, False)
    assert has_biases(fs.load("atlas").ffn[0]) == (True, False)
