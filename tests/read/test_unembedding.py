"""The unembedding, compared with the model's own last step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError, UnsupportedModelError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.trace import hook_count
from factsmith.read.composition import compose
from factsmith.read.unembedding import find_unembedding, output_scale
from factsmith.read.values import value_tokens

GEMMA = {**LLAMA, "head_dim": 8, "final_logit_softcapping": None}


FAMILIES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "gpt2": (GPT2, True, True),
    "llama": (LLAMA, False, True),
    "gemma2": (GEMMA, False, True),
    "phi": ({**LLAMA, "num_key_value_heads": 4}, True, True),  # its unembedding has a bias
    "openai-gpt": (GPT2, False, False),  # no norm comes last
}


def model(family: str) -> LanguageModel:
    return wrap(
        tiny_model(family, **FAMILIES[family][0]),
        byte_tokenizer(bos=family not in ("gpt2", "openai-gpt")),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unembedding_is_the_models_own_last_step(family: str) -> None:
    lm = model(family)
    head = find_unembedding(lm)
    assert (head.centres, head.divides) == FAMILIES[family][1:]
    states = 3 * torch.randn(5, lm.d_model) + 0.5
    logits = (head.fold(states) / head.size(states)[:, None] + head.shift) @ head.weight.T + (
        0 if head.bias is None else head.bias
    )
    assert torch.allclose(logits, lm.head(states), rtol=1e-3, atol=1e-3)
    assert (
        not torch.allclose(states @ head.weight.T, lm.head(states), rtol=1e-1, atol=1e-1)
        or not head.divides
    )
    assert hook_count(lm.module.modules()) == 0


def test_a_norm_after_the_ffn_is_folded_in() -> None:
    lm = model("gemma2")
    layer = lm.module.model.layers[1]
    assert torch.allclose(
        output_scale(lm, 1), 1 + layer.post_feedforward_layernorm.weight, rtol=1e-3, atol=1e-3
    )
    scale = (1 + layer.post_feedforward_layernorm.weight) * (1 + lm.module.model.norm.weight)
    scores = (lm.ffn[1].values * scale) @ lm.module.get_output_embeddings().weight.T
    assert torch.equal(value_tokens(lm, [1], top=3).top_ids[1,], scores.topk(3).indices)
    assert torch.equal(output_scale(model("llama"), 1), torch.ones(32))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_in_bfloat16_the_norms_are_the_models_own_to_the_bit(family: str) -> None:
    """Computed from what a norm does with bfloat16 states, they would be off by half a per cent."""
    lm = model(family)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in lm.module.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    lm = wrap(lm.module.bfloat16(), lm.tokenizer)
    base = lm.module.base_model
    norm = base.ln_f if family == "gpt2" else base.norm
    more = 1 if family == "gemma2" else 0
    head = find_unembedding(lm)
    assert torch.equal(head.scale, norm.weight.float() + more)
    assert torch.equal(
        head.shift, norm.bias.float() if family == "gpt2" else torch.zeros(lm.d_model)
    )
    if family == "gemma2":
        assert torch.equal(
            output_scale(lm, 1), base.layers[1].post_feedforward_layernorm.weight.float() + 1
        )
    result = value_tokens(lm, [1], top=5)
    folded = lm.ffn[1].values.float() * output_scale(lm, 1)
    folded = folded - folded.mean(-1, keepdim=True) if family == "gpt2" else folded
    scores = (
        folded * (norm.weight.float() + more)
    ) @ lm.module.get_output_embeddings().weight.float().T
    assert torch.equal(result.top_ids[1,], scores.topk(5).indices) and torch.allclose(
        result.top_scores[1,], scores.topk(5).values, rtol=1e-4
    )


def test_a_model_that_multiplies_its_logits() -> None:
    lm = wrap(tiny_model("cohere", **{**LLAMA, "logit_scale": 0.25}), byte_tokenizer(bos=True))
    composition = compose(lm, "Paris is the capital of")
    assert composition.logit == pytest.approx(
        float(lm.last_logits(lm.batch(["Paris is the capital of"])).max()), rel=1e-4
    )
    assert sum(part.logit for part in composition.parts) == pytest.approx(
        composition.logit, rel=1e-4
    )
    assert find_unembedding(lm).multiplier == pytest.approx(0.25, rel=1e-4)
    with pytest.raises(InputError, match="same token"):
        compose(lm, "Paris is the capital of", "France", contrast="Finland")


def test_a_last_step_that_is_not_a_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model("gpt2")
    monkeypatch.setattr(lm.module.transformer.ln_f, "forward", torch.sin)
    with pytest.raises(UnsupportedModelError, match="norm=False"):
        find_unembedding(lm)
    assert find_unembedding(lm, norm=False).divides is False
