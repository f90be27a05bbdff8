"""Models that the dry run does not understand are refused, and the others are what they seem."""

from __future__ import annotations

import warnings

import pytest
from torch import nn

from conftest import BERT, GPT2, LLAMA, VOCAB, byte_tokenizer, masking_tokenizer, tiny_model
from factsmith.core.errors import (
    ModelError,
    NumericsError,
    TokenizerError,
    UnsupportedModelError,
)
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.trace import hook_count

MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}


def test_what_is_found_is_what_the_model_has(
    tiny_gpt2: LanguageModel, tiny_llama: LanguageModel, tiny_uncached: LanguageModel
) -> None:
    assert tiny_gpt2.layers == tuple(tiny_gpt2.module.transformer.h)
    assert tiny_llama.layers == tuple(tiny_llama.module.model.layers)
    for layer, block in enumerate(tiny_llama.layers):
        assert tiny_llama.ffn[layer].module is block.mlp
        assert tiny_llama.attention[layer] is block.self_attn
    for lm, caches in ((tiny_gpt2, True), (tiny_llama, True), (tiny_uncached, False)):
        assert (lm.n_layers, lm.d_model, lm.caches_prefix) == (3, 32, caches)
        assert lm.hides_padding and lm.is_causal and lm.slot == 0
        assert not set(lm.plain_ids) & set(lm.tokenizer.all_special_ids)
        assert hook_count(lm.module.modules()) == 0


def test_a_vocabulary_without_plain_tokens_is_refused() -> None:
    module = tiny_model("gpt2", **GPT2)
    tokenizer = byte_tokenizer()
    third = tokenizer.convert_ids_to_tokens(list(range(VOCAB // 3, VOCAB // 3 + 64)))
    tokenizer.add_special_tokens({"additional_special_tokens": third})
    with pytest.raises(UnsupportedModelError, match="too small for a dry run"):
        wrap(module, tokenizer)


def test_a_head_that_looks_at_other_positions_is_refused() -> None:
    module = tiny_model("gpt2", **GPT2)
    module.transformer.ln_f.register_forward_hook(
        lambda m, args, out: out + 0.1 * out.cumsum(1) if out.shape[1] > 1 else out
    )
    with pytest.raises(UnsupportedModelError, match="its head does more"):
        wrap(module, byte_tokenizer())


def test_a_dry_run_that_fails_is_refused_with_the_reason() -> None:
    module = tiny_model("gpt2", **GPT2)
    module.transformer.h[1].register_forward_hook(lambda m, args, out: 1 / 0)
    with pytest.raises(UnsupportedModelError, match="dry run ended in ZeroDivisionError"):
        wrap(module, byte_tokenizer())


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(TokenizerError, match="another"):
        wrap(tiny_model("llama", **{**LLAMA, "vocab_size": 100}), byte_tokenizer())


@pytest.mark.parametrize(
    "weight", ["transformer.wte", "transformer.h.0.ln_1", "transformer.h.2.mlp.c_proj"]
)
def test_a_weight_that_is_not_finite_is_named(weight: str) -> None:
    module = tiny_model("gpt2", **GPT2)
    wrap(module, byte_tokenizer())  # the control
    module.get_parameter(f"{weight}.weight").data.view(-1)[-1] = float("nan")
    with pytest.raises(
        ModelError, match=rf"1 of the \d+ entries of {weight}.weight are not finite"
    ):
        wrap(module, byte_tokenizer())


def test_outputs_that_outgrow_the_dtype_are_said() -> None:
    module = tiny_model("gpt2", **GPT2)
    for parameter in module.parameters():
        parameter.data.mul_(1e30)
    with pytest.raises(
        NumericsError,
        match=r"from layer 0 on its outputs are not finite, .* too large for torch.float32",
    ):
        wrap(module, byte_tokenizer())


def test_a_second_memory_in_a_layer_is_refused_by_name() -> None:
    module = tiny_model("llama", **LLAMA)
    for layer in module.model.layers:
        layer.extra = nn.Linear(32, 32)
        layer.register_forward_hook(lambda m, args, out: out + m.extra(out))
    with pytest.raises(UnsupportedModelError, match=r"extra"):
        wrap(module, byte_tokenizer())


def test_a_down_projection_with_an_adapter_is_refused() -> None:
    module = tiny_model("llama", **LLAMA)
    down = module.model.layers[2].mlp.down_proj
    down.register_forward_hook(lambda m, args, out: out * 1.5)
    with pytest.raises(UnsupportedModelError, match=r"layer 2.*adapters"):
        wrap(module, byte_tokenizer())


def test_a_model_without_feed_forward_memories_is_refused_in_words() -> None:
    with (
        pytest.raises(UnsupportedModelError, match=r"layer 0 .*no feed-forward memory"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        wrap(tiny_model("mamba", **MAMBA), byte_tokenizer())


def test_a_model_that_looks_ahead_is_refused_in_words() -> None:
    module = tiny_model("llama", **LLAMA)
    for layer in module.model.layers:
        layer.register_forward_hook(lambda m, args, out: out + 0.1 * out.mean(dim=1, keepdim=True))
    with pytest.raises(UnsupportedModelError):
        wrap(module, byte_tokenizer())


def test_structures_that_are_not_understood_are_refused() -> None:
    shared = tiny_model(
        "albert", masked=True, **{**BERT, "embedding_size": 16}
    )  # one layer's weights, run three times
    with pytest.raises(UnsupportedModelError, match="decoder layers"):
        wrap(shared, masking_tokenizer())
    with pytest.raises(TokenizerError, match="no mask token"):
        wrap(tiny_model("bert", masked=True, **BERT), byte_tokenizer())
    blind = tiny_model(
        "bert", masked=True, **{**BERT, "is_decoder": True}
    )  # sees only what comes before
    with pytest.raises(UnsupportedModelError, match="not a masked language model"):
        wrap(blind, masking_tokenizer())
