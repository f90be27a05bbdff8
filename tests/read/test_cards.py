"""A neuron's card, compared with the model's answers under a hook of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import TEXTS
from factsmith.core.errors import InputError, LayerError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.model.trace import hook_count
from factsmith.read.cards import card, find_card
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


def test_a_card_holds_what_the_index_and_the_model_say(lm: LanguageModel, index: Index) -> None:
    neuron = (5, 221)
    result = card(lm, index, neuron, FACTS, k=3)
    assert result.neuron == neuron and result.n_asked == 2, "what it does not know is not asked"
    assert (
        list(result.triggers) == index.triggers.of(neuron, k=3)
        and list(result.promotes) == index.values.of(neuron)[:3]
    )
    seen = torch.cat([lm.coefficients(text, [5])[0, :, 221] for text in index.triggers.texts])
    assert int(result.counts.sum()) == len(seen)
    assert torch.allclose(result.edges[[0, -1]], torch.stack([seen.min(), seen.max()]), atol=1e-4)
    assert int(result.counts[0]) == pytest.approx(int((seen < result.edges[1]).sum()), abs=2)
    for use in result.facts:
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
    assert any(abs(use.p - use.p_silenced) > 1e-4 for use in result.facts)
    assert hook_count(lm.module.modules()) == 0


def test_bundled_facts_are_asked_when_none_are_given(lm: LanguageModel, index: Index) -> None:
    result = card(lm, index, (2, 7), n_facts=3)
    assert result.n_asked > 300 and len(result.facts) == 3
    assert card(lm, index, (2, 7), n_facts=0).facts == () == card(lm, index, (2, 7), []).facts


def test_bad_input_is_refused_in_words(lm: LanguageModel, index: Index, tmp_path: Path) -> None:
    for neuron in ((9, 0), (0, 10_000), (1,), "3 17"):
        with pytest.raises(LayerError):
            card(lm, index, neuron, FACTS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pairs"):
        card(lm, index, (0, 0), ["no pair"])  # type: ignore[list-item]


def test_a_card_is_made_with_the_index_that_is_kept(
    lm: LanguageModel, index: Index, tmp_path: Path
) -> None:
    kept = find_card(lm, (5, 221), index.folder, k=3, n_facts=0)
    assert kept.triggers == card(lm, index, (5, 221), n_facts=0, k=3).triggers != ()
    made = find_card(lm, (5, 221), tmp_path / "new", texts=TEXTS, n_facts=0)
    assert made.n_texts == len(TEXTS) and Index.open(tmp_path / "new", lm).values.of((5, 221))
    with pytest.raises(LayerError, match="layer 9"):
        find_card(lm, (9, 0), tmp_path / "other", texts=TEXTS)
    assert not (tmp_path / "other").exists(), "the neuron is checked before an index is made"
