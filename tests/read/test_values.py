"""What values promote, compared with a plain matrix product."""

from __future__ import annotations

import pytest
import torch

from conftest import GPT2, LLAMA, VOCAB, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError, LayerError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.read.values import value_tokens


@pytest.mark.parametrize("norm", [True, False])
def test_tokens_are_those_of_a_plain_product(norm: bool) -> None:
    lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    result = value_tokens(lm, top=7, norm=norm)
    for layer in range(lm.n_layers):
        values = lm.module.transformer.h[layer].mlp.c_proj.weight.double()
        if norm:
            values = (
                values - values.mean(1, keepdim=True)
            ) * lm.module.transformer.ln_f.weight.double()
        scores = values @ lm.module.transformer.wte.weight.double().T
        for ids, read_scores, best in (
            (result.top_ids, result.top_scores, scores.topk(7)),
            (result.bottom_ids, result.bottom_scores, (-scores).topk(7)),
        ):
            assert torch.equal(ids[layer,], best.indices)
            assert torch.allclose(
                read_scores[layer,].double(), scores.gather(1, best.indices), rtol=1e-4, atol=1e-4
            )
    other = value_tokens(lm, [1], top=7, norm=not norm)
    assert not torch.equal(other.top_ids[1,], result.top_ids[1,]), "the norm matters"
    token, score = result.of((1, 5))[0]
    assert token == lm.tokenizer.decode([int(result.top_ids[1,][5, 0])]) and score == float(
        result.top_scores[1,][5, 0]
    )
    assert result.of((1, 5), bottom=True)[0][1] < 0 < score


def test_every_bank_of_experts_is_read() -> None:
    lm = wrap(
        tiny_model("mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
        byte_tokenizer(bos=True),
    )
    result = value_tokens(lm, [0, 2], top=4, norm=False)
    assert set(result.top_ids) == {(layer, expert) for layer in (0, 2) for expert in range(4)}
    scores = lm.ffn[2].experts[3].values @ lm.module.get_output_embeddings().weight.T
    assert torch.equal(result.top_ids[2, 3], scores.topk(4).indices)
    assert result.of((2, 3, 7))[0][1] == pytest.approx(float(scores[7].max()), rel=1e-4)


def test_bad_input_is_refused_in_words(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(LayerError, match="layer 9"):
        value_tokens(tiny_gpt2, [9])
    for wrong in (0, 2.5, "many"):
        with pytest.raises(InputError, match="top"):
            value_tokens(tiny_gpt2, top=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a model"):
        value_tokens("atlas")  # type: ignore[arg-type]
    with pytest.raises(LayerError, match="not read"):
        value_tokens(tiny_gpt2, [0]).of((1, 0))
    assert value_tokens(tiny_gpt2, [0], top=10 * VOCAB).top_ids[0,].shape[1] == VOCAB
