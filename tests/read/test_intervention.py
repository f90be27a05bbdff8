"""Answers with and without some neurons, against a model whose values were changed by hand."""

from __future__ import annotations

import pytest
import torch

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError, LayerError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.read.intervention import ask_scaled

PROMPT = "The capital of France is"
NEURONS = [(0, 3), (1, 7), (1, 8)]


@pytest.mark.parametrize("scale", [0.0, -40.0])
def test_scaled_neurons_answer_like_scaled_values(scale: float) -> None:
    lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    tried = ask_scaled(lm, PROMPT, NEURONS, scale, top=6)
    p = lm.next_tokens(PROMPT, lm.vocabulary)
    assert tried.before == lm.answer([PROMPT])[0]
    with torch.no_grad():
        for layer, i in NEURONS:
            lm.module.transformer.h[layer].mlp.c_proj.weight[i] *= scale
    q = lm.next_tokens(PROMPT, lm.vocabulary)
    assert tried.after == lm.answer([PROMPT])[0]
    assert 6 <= len(tried.tokens) <= 12
    for row in tried.rows():
        assert (row["token"], pytest.approx(row["before"], abs=1e-6)) in p
        assert (row["token"], pytest.approx(row["after"], abs=1e-6)) in q
    assert any(abs(row["before"] - row["after"]) > 1e-6 for row in tried.rows())
    assert tried.divergence > 0


def test_a_factor_of_one_changes_nothing(tiny_gpt2: LanguageModel) -> None:
    tried = ask_scaled(tiny_gpt2, PROMPT, [(0, 3), (0, 3)], 1)
    assert tried.before == tried.after and torch.equal(tried.p_before, tried.p_after)
    assert tried.divergence == pytest.approx(0, abs=1e-9)
    assert tried.neurons == ((0, 3),)
    assert tried.to_dict()["neurons"] == [[0, 3]]
    assert "times 1" in tried.tables()[1].title


def test_what_cannot_be_scaled_is_refused(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(InputError, match="neurons is empty"):
        ask_scaled(tiny_gpt2, PROMPT, [])
    with pytest.raises(LayerError):
        ask_scaled(tiny_gpt2, PROMPT, [(99, 0)])
    with pytest.raises(InputError):
        ask_scaled(tiny_gpt2, PROMPT, NEURONS, float("nan"))
