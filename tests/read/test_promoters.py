"""Neurons that promote a word, compared with the rank of the word in a full product."""

from __future__ import annotations

import pytest

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.tokens import word_ids
from factsmith.read.promoters import promoters
from factsmith.read.unembedding import find_unembedding


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
@pytest.mark.parametrize("demoted", [False, True])
def test_promoters_are_those_whose_values_rank_a_word_first(family: str, demoted: bool) -> None:
    config = (
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else GPT2
    )
    lm = wrap(tiny_model(family, **config), byte_tokenizer(bos=False))
    head, token = find_unembedding(lm), lm.tokenizer("a", add_special_tokens=False)["input_ids"][0]
    ids, sign = word_ids(lm.tokenizer, "a"), -1 if demoted else 1
    assert token in ids
    expected = []
    for ffn in lm.ffn:
        for e, bank in enumerate(ffn.banks):
            scores = sign * (head.fold(bank.values).double() @ head.weight.double().T)
            for i, row in enumerate(scores):
                rank, negative = min((int((row > row[t]).sum()), -float(row[t])) for t in ids)
                expected.append(
                    (rank, negative, (ffn.layer, e, i) if ffn.n_experts else (ffn.layer, i))
                )
    result = promoters(lm, "a", 6, demoted=demoted)
    assert [p.neuron for p in result] == [neuron for *_, neuron in sorted(expected)[:6]]
    assert [p.rank for p in result] == [rank for rank, *_ in sorted(expected)[:6]]
    assert [sign * p.score for p in result] == pytest.approx(
        [-negative for _, negative, _ in sorted(expected)[:6]], rel=1e-4
    )
    assert {p.token.strip().casefold() for p in result} == {"a"}


def test_a_word_of_several_tokens_is_looked_for_by_its_first(tiny_gpt2: LanguageModel) -> None:
    """With a tokenizer of bytes every word has several tokens."""
    first = promoters(tiny_gpt2, "zebra", 3)
    assert {p.token.strip() for p in first} <= {"z", ""} and first
    with pytest.raises(InputError, match="empty"):
        promoters(tiny_gpt2, " ")
    with pytest.raises(InputError, match="k is 0: it must be the number of neurons to find"):
        promoters(tiny_gpt2, "zebra", 0)
