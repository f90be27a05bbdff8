"""The facts that neurons add most to, compared with a plain product of values and answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import TEXTS
from factsmith.core.errors import InputError, LayerError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.read.cards import card
from factsmith.read.fact_adds import fact_adds, find_index_and_facts
from factsmith.read.index import Index, build_index

FACTS = [
    ("The mother tongue of Danielle Darrieux is", "French"),
    ("The currency of Bulgaria is the", "lev"),
    ("The currency of Bulgaria is the", "euro"),
]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load("atlas")


@pytest.fixture(scope="module")
def index(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(lm, TEXTS, tmp_path_factory.mktemp("index"), top=2)


def test_the_facts_each_neuron_of_a_layer_adds_most_to(lm: LanguageModel, index: Index) -> None:
    asked = [
        *FACTS,
        ("Michel Brault grew up speaking", "French"),
        ("Alain Prost carries the passport of", "France"),
    ]
    adds = fact_adds(lm, [5, 2], asked, n=2)
    assert set(adds.facts) == {(2,), (5,)} and FACTS[0] in adds.known and FACTS[2] not in adds.known
    head, norm = lm.module.lm_head.weight.double(), lm.module.transformer.ln_f.weight.double()
    for layer in (2, 5):
        values = lm.ffn[layer].values.double()
        due = torch.tensor([lm.tokenizer(" " + answer)["input_ids"][0] for _, answer in adds.known])
        units = (values - values.mean(1, keepdim=True)) * norm @ head[due].T  # (d_ff, facts)
        m = torch.stack(
            [lm.coefficients(prompt, [layer])[0, -1].double() for prompt, _ in adds.known], 1
        )
        expected = (m * units).sort(1, descending=True)
        assert torch.allclose(
            adds.adds[layer,].double(), expected.values[:, :2].clamp(min=0), atol=1e-3
        )
        clear = (expected.values[:, :1] - expected.values[:, 1:2] > 1e-3)[:, 0] & (
            expected.values[:, 0] > 1e-3
        )
        assert clear.sum() > 500 and torch.equal(
            adds.facts[layer,][clear, 0], expected.indices[clear, 0]
        )
        assert torch.allclose(
            adds.coefficients[layer,][clear, 0].double(),
            m.gather(1, expected.indices)[clear, 0],
            atol=1e-3,
        )
    for i in (221, 992):
        used = {
            (use.prompt, use.answer): use.coefficient
            for use in card(lm, index, (5, i), asked, n_facts=2).facts
        }
        assert {
            (prompt, answer): pytest.approx(m, abs=1e-4) for prompt, answer, m, _ in adds.of((5, i))
        } == used


def test_layers_and_neurons_that_were_not_looked_at_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(LayerError, match="layer 9"):
        fact_adds(lm, [9], FACTS)
    with pytest.raises(InputError, match="layers is empty"):
        fact_adds(lm, [], FACTS)
    adds = fact_adds(lm, [1], FACTS)
    for neuron in ((2, 0), (1, 1024)):
        with pytest.raises(LayerError, match="not looked at"):
            adds.of(neuron)


def test_the_index_and_its_facts_come_together(
    lm: LanguageModel, index: Index, tmp_path: Path
) -> None:
    opened, adds = find_index_and_facts(lm, index.folder, [1])
    assert opened.triggers.corpus == index.triggers.corpus
    assert adds is not None and set(adds.facts) == {(1,)} and len(adds.known) > 300
    assert find_index_and_facts(lm, index.folder, facts=False)[1] is None
    with pytest.raises(LayerError, match="layer 9"):
        find_index_and_facts(lm, tmp_path / "new", [9])
    assert not (tmp_path / "new").exists(), "layers are checked before an index is made"
