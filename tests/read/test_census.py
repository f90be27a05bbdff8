"""Counting parameters and idle neurons, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from conftest import GPT2, LLAMA, TEXTS, VOCAB, byte_tokenizer, tiny_model
from factsmith.core.errors import FingerprintError, InputError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.read.census import census, effective_rank
from factsmith.read.trigger_scan import find_triggers


def test_parameters_by_part(tiny_gpt2: LanguageModel) -> None:
    found = census(tiny_gpt2)
    assert found.ffn == 3 * (32 * 128 + 128 + 128 * 32 + 32)
    assert found.attention == 3 * (32 * 96 + 96 + 32 * 32 + 32)
    assert found.embeddings == VOCAB * 32 + 64 * 32, "tied words once, and positions"
    assert found.other == 7 * 2 * 32, "norms"
    assert (
        found.parameters == sum(p.numel() for p in tiny_gpt2.module.parameters())
        and found.neurons == 3 * 128
    )
    assert [
        (layer.layer, layer.neurons, layer.experts, layer.idle, layer.effective_rank)
        for layer in found.layers
    ] == [(layer, 128, 0, None, None) for layer in range(3)]


def test_experts_and_an_unembedding_of_its_own() -> None:
    lm = wrap(
        tiny_model(
            "mixtral",
            **LLAMA,
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=False,
        ),
        byte_tokenizer(bos=True),
    )
    found = census(lm)
    assert found.ffn == 3 * (4 * 3 * 32 * 48 + 4 * 32), "with the router"
    assert found.embeddings == 2 * VOCAB * 32 and found.neurons == 3 * 4 * 48
    assert (
        found.parameters == sum(p.numel() for p in lm.module.parameters())
        and found.layers[1].experts == 4
    )


def test_idle_neurons_are_those_that_write_next_to_nothing() -> None:
    lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    with torch.no_grad():
        lm.module.transformer.h[1].mlp.c_fc.weight[:, 5:9] = 0
        lm.module.transformer.h[1].mlp.c_fc.bias[5:9] = -30  # GELU is zero there
    found = census(lm, triggers=find_triggers(lm, TEXTS, [0, 1], top=1))
    assert [layer.idle for layer in found.layers] == [0, 4, None]


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(7, 7)) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0]))) == pytest.approx(2)
    assert effective_rank(torch.zeros(3, 3)) == 0
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert effective_rank(torch.diag(4 * shares)) == pytest.approx(2**1.5)


def test_bad_input_is_refused_in_words(tiny_gpt2: LanguageModel, tiny_llama: LanguageModel) -> None:
    assert census(tiny_gpt2, moments={1: torch.eye(128)}).layers[1].effective_rank == pytest.approx(
        128
    )
    with pytest.raises(InputError, match="layer 1"):
        census(tiny_gpt2, moments={1: torch.eye(7)})
    with pytest.raises(FingerprintError, match="another model"):
        census(tiny_gpt2, triggers=find_triggers(tiny_llama, TEXTS, [0], top=1))
