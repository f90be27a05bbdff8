"""ROME and r-ROME: what they write, one fact after another or each alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from conftest import LLAMA, TEXTS, tiny_model
from editing import (
    CONTEXTS,
    FACTS,
    SEARCH,
    full_rank_moments,
    new_model,
    output_at_subject,
    relative,
)
from factsmith.core.errors import FingerprintError
from factsmith.corpus.moments import second_moments
from factsmith.edit.configs import RomeConfig
from factsmith.edit.contexts import generate_contexts
from factsmith.edit.delta import Delta, applied, read_weights
from factsmith.edit.methods import r_rome, rome
from factsmith.edit.rome import rome_each
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

CONFIG = RomeConfig(layer=1, **SEARCH)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_edited_layer_outputs_v_star_at_the_subject(family: str) -> None:
    lm = new_model(family)
    assert lm.ffn[1].adds_directly == (family != "gemma2")
    fact = FACTS[0]
    moments = second_moments(lm, TEXTS, [1])
    before = read_weights(lm, [1])[1]
    delta = rome(lm, fact, CONFIG, moments=moments, contexts=CONTEXTS)
    assert torch.equal(lm.ffn[1].weight(), before), "the model is untouched"
    down = lm.ffn[1].down
    assert relative(output_at_subject(lm, down, fact), delta.v_star[0]) > 1e-2
    with applied(lm, delta):
        assert relative(output_at_subject(lm, down, fact), delta.v_star[0]) < 1e-4
    matrix = moments[1].matrix.double()
    ridge = 1e-9 * torch.eye(len(matrix)).double()
    u = torch.linalg.solve(matrix + ridge, delta.k_star[1][0].double())
    assert relative(delta.layers[1][1][0].double(), u / u.norm()) < 1e-2


def total(deltas: Sequence[Delta]) -> Tensor:
    """The sum of the updates of layer 1."""
    return torch.stack([delta.dense(1) for delta in deltas]).sum(0)


def test_several_facts_are_written_one_after_another(tiny_lm: LanguageModel) -> None:
    moments = second_moments(tiny_lm, TEXTS, [1])
    delta = rome(tiny_lm, FACTS, CONFIG, moments=moments, contexts=CONTEXTS)
    assert delta.rank == delta.k_star[1].shape[0] == len(delta.convergence) == 3
    assert delta.facts == tuple(FACTS)
    by_hand: list[Delta] = []
    for fact in FACTS:
        with applied(tiny_lm, by_hand):
            if by_hand:  # the moments are those of the unedited model, but `beneath` is missing
                with pytest.raises(FingerprintError, match=r"has [0-9a-f]{12} now"):
                    rome(tiny_lm, fact, CONFIG, moments=moments, contexts=CONTEXTS)
            one = rome(tiny_lm, fact, CONFIG, moments=moments, contexts=CONTEXTS, beneath=by_hand)
        by_hand.append(one)
    assert relative(delta.dense(1), total(by_hand)) < 1e-5
    with applied(tiny_lm, delta):
        output = output_at_subject(tiny_lm, tiny_lm.ffn[1].down, FACTS[-1])
        assert relative(output, delta.v_star[-1]) < 1e-4
    apart = rome_each(tiny_lm, FACTS, CONFIG, moments=moments, contexts=CONTEXTS)
    assert relative(delta.dense(1), total(apart)) > 1e-3, "the control: each solved alone"


def test_each_alone_equals_one_call_each(tiny_lm: LanguageModel) -> None:
    moments = second_moments(tiny_lm, TEXTS, [1])[1]
    facts = [*FACTS, FACTS[0], dataclasses.replace(FACTS[0], target="Danish")]
    deltas = rome_each(tiny_lm, facts, CONFIG, moments=moments, contexts=CONTEXTS)
    for fact, delta in zip(facts, deltas, strict=True):
        alone = rome(tiny_lm, fact, CONFIG, moments=moments, contexts=CONTEXTS)
        assert relative(delta.dense(1), alone.dense(1)) < 1e-4
        assert delta.facts == (fact,)


def test_the_recipe_is_recorded_and_repeats(tiny_gpt2: LanguageModel) -> None:
    moments = second_moments(tiny_gpt2, TEXTS, [0, 1])
    first = rome(tiny_gpt2, FACTS[0], RomeConfig(steps=3), moments=moments, seed=5)
    layer = first.config["layer"]
    assert (first.method, layer, first.fingerprint) == ("rome", 0, tiny_gpt2.fingerprint), (
        "a sixth of three layers"
    )
    contexts = first.config["contexts"]
    assert contexts == generate_contexts(tiny_gpt2, 5) != generate_contexts(tiny_gpt2, 6)
    config = RomeConfig(layer=0, steps=3)
    again = rome(tiny_gpt2, FACTS[0], config, moments=moments, contexts=contexts)
    assert torch.equal(again.dense(0), first.dense(0))
    json.dumps(dict(first.config))


def test_half_precision_models_are_edited_in_float32(tiny_llama: LanguageModel) -> None:
    lm = wrap(tiny_model("llama", **LLAMA).to(torch.bfloat16), tiny_llama.tokenizer)
    before = read_weights(lm, [1])[1]
    delta = rome(lm, FACTS[0], CONFIG, moments=second_moments(lm, TEXTS, [1]), contexts=CONTEXTS)
    assert all(x.dtype == torch.float32 for x in delta.layers[1])
    with applied(lm, delta):
        output = output_at_subject(lm, lm.ffn[1].down, FACTS[0])
        assert relative(output.float(), delta.v_star[0]) < 2e-2
    assert torch.equal(lm.ffn[1].weight(), before) and before.dtype == torch.bfloat16


def test_r_rome_writes_the_mean_key() -> None:
    lm = new_model("gpt2")
    moments = full_rank_moments(lm)
    delta = r_rome(lm, FACTS[0], CONFIG, moments=moments, contexts=CONTEXTS)
    weight, bias = lm.ffn[1].weight() + delta.dense(1), lm.ffn[1].bias
    assert bias is not None
    assert relative(weight @ delta.k_star[1][0] + bias, delta.v_star[0]) < 1e-4
    other = rome(lm, FACTS[0], CONFIG, moments=moments, contexts=CONTEXTS)
    output = (lm.ffn[1].weight() + other.dense(1)) @ other.k_star[1][0] + bias
    assert relative(output, other.v_star[0]) > 1e-3, "the control: ROME writes the prompt's key"


def test_a_search_reports_after_each_step_and_stops_there(tiny_lm: LanguageModel) -> None:
    """A caller that raises, as a cancelled job does, ends a long search between two steps."""
    moments = second_moments(tiny_lm, TEXTS, [1])
    config = dataclasses.replace(CONFIG, steps=50, stop_loss=0.0, optimizer="adam")
    before, reports = read_weights(tiny_lm, [1])[1], 0

    def stop(step: str, done: int, total: int | None) -> None:
        nonlocal reports
        reports += 1
        if reports == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rome(tiny_lm, FACTS[0], config, moments=moments, contexts=CONTEXTS, progress=stop)
    assert reports == 5
    assert torch.equal(read_weights(tiny_lm, [1])[1], before)
