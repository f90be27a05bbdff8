"""The strongest neurons at one token, against coefficients and values read by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError, LayerError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.read.token_neurons import token_neurons

PROMPT = "The capital of France is"
N_NEURONS = 10_000
"""More than any layer of the tiny models has."""


@pytest.mark.parametrize("position", [2, -1])
def test_the_neurons_are_the_largest_sub_updates(tiny_gpt2: LanguageModel, position: int) -> None:
    lm = tiny_gpt2
    spot = token_neurons(lm, PROMPT, 1, position, top=N_NEURONS)
    m = lm.coefficients(PROMPT, [1])[0, position]
    values = lm.ffn[1].banks[0].values
    sizes = m.abs() * values.norm(dim=1)
    assert [each.neuron[1] for each in spot.strongest[:5]] == sizes.topk(5).indices.tolist()
    assert spot.strongest[0].size == pytest.approx(float(sizes.max()), rel=1e-4)
    assert spot.strongest[0].coefficient == pytest.approx(
        float(m[spot.strongest[0].neuron[1]]), rel=1e-4
    )
    total = (m[:, None] * values).sum(0)
    bias = lm.ffn[1].banks[0].bias
    added = total if bias is None else total + bias
    assert sum(each.share for each in spot.strongest) == pytest.approx(
        float(total @ added / (added @ added)), abs=1e-3
    )
    assert spot.position == position % len(lm.prompt_ids(PROMPT))
    assert spot.n_neurons == len(m) == len(spot.strongest)


def test_a_negative_coefficient_writes_what_the_value_demotes(tiny_gpt2: LanguageModel) -> None:
    lm = tiny_gpt2
    spot = token_neurons(lm, PROMPT, 0, top=N_NEURONS, tokens=1)
    norm, rows = lm.module.transformer.ln_f, lm.module.get_output_embeddings().weight
    signs = set()
    for each in spot.strongest:
        value = lm.ffn[0].banks[0].values[each.neuron[1]]
        logits = rows @ ((value - value.mean()) * norm.weight)
        extreme = logits.argmax() if each.coefficient > 0 else logits.argmin()
        assert each.writes == (lm.tokenizer.decode([int(extreme)]),)
        signs.add(each.coefficient > 0)
    assert signs == {True, False}, "both cases are among the neurons"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {**LLAMA, "head_dim": 8, "final_logit_softcapping": None}),
        ("mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_shares_sum_to_one_after_a_norm_and_with_experts(
    family: str, settings: dict[str, Any]
) -> None:
    lm = wrap(tiny_model(family, **settings), byte_tokenizer(bos=True))
    spot = token_neurons(lm, PROMPT, 1, 2, top=N_NEURONS)
    assert sum(each.share for each in spot.strongest) == pytest.approx(1, abs=1e-3)
    assert {len(each.neuron) for each in spot.strongest} == {3 if family == "mixtral" else 2}
    document = spot.to_dict()
    assert document["neurons"][0]["neuron"] == list(spot.strongest[0].neuron)
    assert spot.rows()[0]["neuron"] == spot.strongest[0].neuron[-1]
    assert "carry half of what it adds" in spot.tables()[0].title


def test_what_the_model_does_not_have_is_refused(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(LayerError, match="layer 99"):
        token_neurons(tiny_gpt2, PROMPT, 99)
    with pytest.raises(InputError, match="position is 99"):
        token_neurons(tiny_gpt2, PROMPT, 0, 99)
    assert torch.is_tensor(tiny_gpt2.ffn[0].banks[0].values)
