"""A neuron's card, against asking the model with a hook of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import TEXTS
from factsmith.core.errors import InputError, LayerError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.model.trace import hook_count
from factsmith.read.cards import card
from factsmith.read.fact_adds import fact_adds
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
    return build_index(
        lm,
        [*TEXTS, *(f"{prompt} {answer}." for prompt, answer in FACTS)],
        tmp_path_factory.mktemp("index"),
        top=4,
    )


def test_a_card_says_what_the_index_and_the_model_say(lm: LanguageModel, index: Index) -> None:
    neuron = (5, 221)
    found = card(lm, index, neuron, FACTS, k=3)
    assert found.neuron == neuron and found.n_asked == 2, "what it does not know is not asked"
    assert (
        list(found.triggers) == index.triggers.of(neuron, k=3)
        and list(found.promotes) == index.values.of(neuron)[:3]
    )
    seen = torch.cat([lm.coefficients(text, [5])[0, :, 221] for text in index.triggers.texts])
    assert int(found.counts.sum()) == len(seen)
    assert torch.allclose(found.edges[[0, -1]], torch.stack([seen.min(), seen.max()]), atol=1e-4)
    assert int(found.counts[0]) == pytest.approx(int((seen < found.edges[1]).sum()), abs=2)
    for use in found.facts:
        assert use.coefficient == pytest.approx(
            float(lm.coefficients(use.prompt, [5])[0, -1, 221]), abs=1e-4
        )

        def silence(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (args[0] * (torch.arange(args[0].shape[-1]) != 221),)

        before = float(lm.log_prob([use.prompt], [use.answer]).exp())
        handle = lm.ffn[5].down.register_forward_pre_hook(silence)
        try:
            after = float(lm.log_prob([use.prompt], [use.answer]).exp())
        finally:
            handle.remove()
        assert (use.p, use.p_silenced) == (
            pytest.approx(before, abs=1e-5),
            pytest.approx(after, abs=1e-5),
        )
    assert any(abs(use.p - use.p_silenced) > 1e-4 for use in found.facts)
    assert hook_count(lm.module.modules()) == 0


def test_bundled_facts_are_asked_when_none_are_given(lm: LanguageModel, index: Index) -> None:
    found = card(lm, index, (2, 7), n_facts=3)
    assert found.n_asked > 300 and len(found.facts) == 3
    assert card(lm, index, (2, 7), n_facts=0).facts == () == card(lm, index, (2, 7), []).facts


def test_bad_input_is_refused_in_words(lm: LanguageModel, index: Index, tmp_path: Path) -> None:
    for neuron in ((9, 0), (0, 10_000), (1,), "3 17"):
        with pytest.raises(LayerError):
            card(lm, index, neuron, FACTS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pairs"):
        card(lm, index, (0, 0), ["no pair"])  # type: ignore[list-item]


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


def test_facts_of_layers_that_are_not_there(lm: LanguageModel) -> None:
    with pytest.raises(LayerError, match="layer 9"):
        fact_adds(lm, [9], FACTS)
    with pytest.raises(InputError, match="layers is empty"):
        fact_adds(lm, [], FACTS)
    adds = fact_adds(lm, [1], FACTS)
    for neuron in ((2, 0), (1, 1024)):
        with pytest.raises(LayerError, match="not looked at"):
            adds.of(neuron)
