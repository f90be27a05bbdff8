"""The memory view: orientation, keys, gates and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import LayerError, UnsupportedModelError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap


def test_values_are_views_in_either_orientation(
    tiny_gpt2: LanguageModel, tiny_llama: LanguageModel
) -> None:
    for lm, weight in (
        (tiny_gpt2, tiny_gpt2.module.transformer.h[1].mlp.c_proj.weight),  # Conv1D: (d_ff, d_model)
        (
            tiny_llama,
            tiny_llama.module.model.layers[1].mlp.down_proj.weight.T,
        ),  # Linear: (d_model, d_ff)
    ):
        ffn = lm.ffn[1]
        assert torch.equal(ffn.values, weight)
        assert ffn.weight().shape == (lm.d_model, ffn.d_ff)
        assert ffn.weight().data_ptr() == weight.data_ptr()
        assert ffn.module is not ffn.down and ffn.adds_directly and ffn.n_experts == 0


def test_orientation_does_not_come_from_shapes() -> None:
    square = tiny_model("gpt2", **{**GPT2, "n_inner": 32})
    lm = wrap(square, byte_tokenizer())
    assert torch.equal(lm.ffn[0].values, square.transformer.h[0].mlp.c_proj.weight)
    assert torch.equal(lm.ffn[0].keys, square.transformer.h[0].mlp.c_fc.weight.T)


def test_coefficients_are_what_the_keys_say(
    tiny_gpt2: LanguageModel, tiny_llama: LanguageModel
) -> None:
    for lm in (tiny_gpt2, tiny_llama):
        seen: list[torch.Tensor] = []
        handle = lm.ffn[1].module.register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(args[0])
        )
        coefficients = lm.coefficients("Paris is the capital")
        handle.remove()
        ffn = lm.ffn[1]
        if ffn.is_gated:
            expected = torch.nn.functional.silu(seen[0] @ ffn.gate_keys.T) * (
                seen[0] @ ffn.up_keys.T
            )
            swapped = torch.nn.functional.silu(seen[0] @ ffn.up_keys.T) * (
                seen[0] @ ffn.gate_keys.T
            )
            assert (swapped - expected).abs().max() > 1e-2
        else:
            expected = ACT2FN["gelu_new"](
                seen[0] @ ffn.keys.T + lm.module.transformer.h[1].mlp.c_fc.bias
            )
        torch.testing.assert_close(coefficients[1], expected[0], atol=1e-5, rtol=1e-5)
        assert coefficients.shape == (3, expected.shape[1], ffn.d_ff)
        assert torch.equal(
            lm.coefficients("Paris is the capital", layers=[2, 1]), coefficients[[2, 1]]
        )


def test_a_fused_gate_is_told_from_its_up_half() -> None:
    for family in ("phi3", "glm4"):
        module = tiny_model(family, **LLAMA)
        ffn = wrap(module, byte_tokenizer()).ffn[0]
        gate, up = module.model.layers[0].mlp.gate_up_proj.weight.chunk(2)
        assert torch.equal(ffn.gate_keys, gate) and torch.equal(ffn.up_keys, up)


def test_a_norm_behind_the_memory_is_noticed() -> None:
    assert wrap(tiny_model("llama", **LLAMA), byte_tokenizer()).ffn[0].adds_directly
    gemma = wrap(tiny_model("gemma2", **LLAMA, head_dim=8), byte_tokenizer())
    granite = wrap(tiny_model("granite", **LLAMA, residual_multiplier=0.5), byte_tokenizer())
    assert not gemma.ffn[0].adds_directly and not granite.ffn[0].adds_directly
    for dtype in (torch.bfloat16, torch.float16):
        half = tiny_model("granite", **LLAMA, residual_multiplier=0.5).to(dtype)
        assert not wrap(half, byte_tokenizer()).ffn[0].adds_directly
        assert wrap(tiny_model("llama", **LLAMA).to(dtype), byte_tokenizer()).ffn[0].adds_directly


def test_a_memory_that_carries_the_residual_along_is_cut_down_to_its_linear() -> None:
    module = tiny_model("bloom", n_layer=3, hidden_size=32, n_head=4, vocab_size=320)
    ffn = wrap(module, byte_tokenizer()).ffn[0]
    assert ffn.module is ffn.down is module.transformer.h[0].mlp.dense_4h_to_h


def test_a_memory_without_a_module_of_its_own_is_found() -> None:
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 320,
        "word_embed_proj_dim": 32,
    }
    module = tiny_model("opt", **sizes, max_position_embeddings=64, pad_token_id=1)
    lm = wrap(module, byte_tokenizer())
    assert lm.ffn[0].down is module.model.decoder.layers[0].fc2
    assert lm.attention[0] is module.model.decoder.layers[0].self_attn


def test_gated_and_plain_keys_are_not_mixed_up(
    tiny_gpt2: LanguageModel, tiny_llama: LanguageModel
) -> None:
    with pytest.raises(UnsupportedModelError, match="gate_keys"):
        _ = tiny_llama.ffn[0].keys
    with pytest.raises(UnsupportedModelError, match="not gated"):
        _ = tiny_gpt2.ffn[0].gate_keys
    with pytest.raises(LayerError, match="layers 0 to 2"):
        tiny_gpt2.coefficients("Paris", layers=[3])


def test_quantised_weights_are_refused() -> None:
    module = tiny_model("llama", **LLAMA)
    down = module.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        wrap(module, byte_tokenizer())
