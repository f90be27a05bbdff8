"""The neurons of a fact: bars and dots hold the numbers."""

from __future__ import annotations

import numpy as np
import pytest

from factsmith.core.errors import InputError
from factsmith.locate.neurons import knowledge_neurons
from factsmith.model.language_model import LanguageModel
from factsmith.show.plots.neurons import neuron_chart


@pytest.mark.parametrize("n", [2, 60])
def test_bars_of_neurons_fill_their_panel(tiny_gpt2: LanguageModel, n: int) -> None:
    neurons = knowledge_neurons(tiny_gpt2, "Paris is the capital of", "Paris", steps=2)
    bottom, top = neuron_chart(neurons, n=n).axes[0].get_ylim()
    assert -1 <= top < -0.36 and n - 0.64 < bottom <= n


def test_neuron_chart_shows_the_strongest_and_marks_the_refined(tiny_gpt2: LanguageModel) -> None:
    prompts = ["Paris is the capital of", "The Eiffel Tower is in", "Edwin is"]
    neurons = knowledge_neurons(tiny_gpt2, prompts, "Paris")
    bars, layers = neuron_chart(neurons, n=5).axes
    top = neurons.top(5)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([score for _, score in top])
    assert [label.get_text() for label in bars.get_yticklabels()] == [
        f"L{layer} · {i}" for (layer, i), _ in top
    ]
    assert [bool(bar.get_hatch()) for bar in bars.patches] == [
        neuron not in neurons.refined for neuron, _ in top
    ]
    heights = [bar.get_height() for bar in layers.patches]
    assert np.allclose(
        np.add(heights[:3], heights[3:]), neurons.scores.mean(0).clamp_min(0).sum(1), rtol=1e-5
    )
    with pytest.raises(InputError, match="n is 0"):
        neuron_chart(neurons, n=0)
