"""What values promote: the unembedding against the model's own tail, tokens against a plain matrix product."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import GPT2, LLAMA, VOCAB, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError, LayerError, UnsupportedModelError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.tokens import word_ids
from factsmith.model.trace import hook_count
from factsmith.read import extremes
from factsmith.read.composition import compose
from factsmith.read.extremes import extreme_tokens
from factsmith.read.promoters import promoters
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
def test_the_unembedding_is_the_model_s_own_tail(family: str) -> None:
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


@pytest.mark.parametrize("norm", [True, False])
def test_tokens_are_those_of_a_plain_product(norm: bool) -> None:
    lm = model("gpt2")
    found = value_tokens(lm, top=7, norm=norm)
    for layer in range(lm.n_layers):
        values = lm.module.transformer.h[layer].mlp.c_proj.weight.double()
        if norm:
            values = (
                values - values.mean(1, keepdim=True)
            ) * lm.module.transformer.ln_f.weight.double()
        scores = values @ lm.module.transformer.wte.weight.double().T
        for ids, own, best in (
            (found.top_ids, found.top_scores, scores.topk(7)),
            (found.bottom_ids, found.bottom_scores, (-scores).topk(7)),
        ):
            assert torch.equal(ids[layer,], best.indices)
            assert torch.allclose(
                own[layer,].double(), scores.gather(1, best.indices), rtol=1e-4, atol=1e-4
            )
    other = value_tokens(lm, [1], top=7, norm=not norm)
    assert not torch.equal(other.top_ids[1,], found.top_ids[1,]), "the norm matters"
    token, score = found.of((1, 5))[0]
    assert token == lm.tokenizer.decode([int(found.top_ids[1,][5, 0])]) and score == float(
        found.top_scores[1,][5, 0]
    )
    assert found.of((1, 5), bottom=True)[0][1] < 0 < score


def test_a_norm_behind_the_memory_is_folded_in() -> None:
    lm = model("gemma2")
    layer = lm.module.model.layers[1]
    assert torch.allclose(
        output_scale(lm, 1), 1 + layer.post_feedforward_layernorm.weight, rtol=1e-3, atol=1e-3
    )
    scale = (1 + layer.post_feedforward_layernorm.weight) * (1 + lm.module.model.norm.weight)
    scores = (lm.ffn[1].values * scale) @ lm.module.get_output_embeddings().weight.T
    assert torch.equal(value_tokens(lm, [1], top=3).top_ids[1,], scores.topk(3).indices)
    assert torch.equal(output_scale(model("llama"), 1), torch.ones(32))


def test_every_bank_of_experts_is_read() -> None:
    lm = wrap(
        tiny_model("mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
        byte_tokenizer(bos=True),
    )
    found = value_tokens(lm, [0, 2], top=4, norm=False)
    assert set(found.top_ids) == {(layer, expert) for layer in (0, 2) for expert in range(4)}
    scores = lm.ffn[2].experts[3].values @ lm.module.get_output_embeddings().weight.T
    assert torch.equal(found.top_ids[2, 3], scores.topk(4).indices)
    assert found.of((2, 3, 7))[0][1] == pytest.approx(float(scores[7].max()), rel=1e-4)


def same_as_exact(vectors: torch.Tensor, weight: torch.Tensor, k: int) -> float:
    """The share of vectors whose k largest and smallest products are those found in float64; the scores must agree everywhere."""
    scores = vectors.double() @ weight.double().T
    top, top_scores, bottom, bottom_scores = extreme_tokens(vectors, weight, k)
    same = []
    for ids, own, sign in ((top, top_scores, 1), (bottom, bottom_scores, -1)):
        assert torch.allclose(
            own.double(), scores.gather(1, ids), rtol=1e-4, atol=1e-4 * float(scores.abs().max())
        )
        same.append((ids == (sign * scores).topk(k).indices).all(1))
    return float(torch.stack(same).double().mean())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 10])
def test_screening_finds_what_an_exact_product_finds(
    k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extremes, "_fastest", lambda device: dtype)
    generator = torch.Generator().manual_seed(1)
    weight, vectors = (
        torch.randn(5003, 64, generator=generator),
        torch.randn(600, 64, generator=generator),
    )
    vectors[3] = 0
    assert same_as_exact(vectors[4:], weight, k) >= 0.999
    assert extreme_tokens(vectors, weight, k)[1][3].tolist() == [0.0] * k
    assert same_as_exact(vectors[4:].bfloat16(), weight.bfloat16(), k) >= 0.99, (
        "a model in bfloat16"
    )


def test_what_screening_cannot_tell_apart_is_multiplied_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A column a thousand times the others takes the steps of int8 from them; the control takes the rough order's word for it."""
    monkeypatch.setattr(extremes, "_fastest", lambda device: torch.int8)
    generator = torch.Generator().manual_seed(1)
    weight, vectors = (
        torch.randn(5003, 64, generator=generator),
        torch.randn(600, 64, generator=generator),
    )
    weight[:, 5] = 1000 + 0.01 * weight[:, 5]
    assert same_as_exact(vectors, weight, 10) >= 0.99  # float32 itself cannot tell all apart
    monkeypatch.setattr(extremes, "_ERRORS", -torch.inf)
    assert same_as_exact(vectors, weight, 10) < 0.5


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
                rank, own = min((int((row > row[t]).sum()), -float(row[t])) for t in ids)
                expected.append((rank, own, (ffn.layer, e, i) if ffn.n_experts else (ffn.layer, i)))
    found = promoters(lm, "a", 6, demoted=demoted)
    assert [p.neuron for p in found] == [neuron for *_, neuron in sorted(expected)[:6]]
    assert [p.rank for p in found] == [rank for rank, *_ in sorted(expected)[:6]]
    assert [sign * p.score for p in found] == pytest.approx(
        [-own for _, own, _ in sorted(expected)[:6]], rel=1e-4
    )
    assert {p.token.strip().casefold() for p in found} == {"a"}


def test_a_word_of_several_tokens_is_looked_for_by_its_first(tiny_gpt2: LanguageModel) -> None:
    """Of a tokenizer of bytes every word has several."""
    first = promoters(tiny_gpt2, "zebra", 3)
    assert {p.token.strip() for p in first} <= {"z", ""} and first
    with pytest.raises(InputError, match="empty"):
        promoters(tiny_gpt2, " ")
    with pytest.raises(InputError, match="k is 0: it must be the number of neurons to find"):
        promoters(tiny_gpt2, "zebra", 0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_in_bfloat16_the_norms_are_the_model_s_own_to_the_bit(family: str) -> None:
    """Told from what a norm does with states in bfloat16, they would be off by half a per cent."""
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
    found = value_tokens(lm, [1], top=5)
    own = lm.ffn[1].values.float() * output_scale(lm, 1)
    own = own - own.mean(-1, keepdim=True) if family == "gpt2" else own
    scores = (
        own * (norm.weight.float() + more)
    ) @ lm.module.get_output_embeddings().weight.float().T
    assert torch.equal(found.top_ids[1,], scores.topk(5).indices) and torch.allclose(
        found.top_scores[1,], scores.topk(5).values, rtol=1e-4
    )


def test_a_model_that_multiplies_its_logits() -> None:
    lm = wrap(tiny_model("cohere", **{**LLAMA, "logit_scale": 0.25}), byte_tokenizer(bos=True))
    found = compose(lm, "Paris is the capital of")
    assert found.logit == pytest.approx(
        float(lm.last_logits(lm.batch(["Paris is the capital of"])).max()), rel=1e-4
    )
    assert sum(part.logit for part in found.parts) == pytest.approx(found.logit, rel=1e-4)
    assert find_unembedding(lm).multiplier == pytest.approx(0.25, rel=1e-4)
    with pytest.raises(InputError, match="same token"):
        compose(lm, "Paris is the capital of", "France", contrast="Finland")


def test_a_vocabulary_smaller_than_what_is_asked_for() -> None:
    weight = -torch.rand(5, 3) - 0.1
    top, scores, *_ = extreme_tokens(torch.ones(2, 3), weight, 10)
    assert top.shape == (2, 5) and (scores < 0).all() and sorted(top[0].tolist()) == [0, 1, 2, 3, 4]


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


def test_a_tail_that_is_no_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model("gpt2")
    monkeypatch.setattr(lm.module.transformer.ln_f, "forward", torch.sin)
    with pytest.raises(UnsupportedModelError, match="norm=False"):
        find_unembedding(lm)
    assert find_unembedding(lm, norm=False).divides is False
