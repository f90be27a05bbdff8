"""Helpers for tests of GGUF: tiny models written as llama.cpp's converter would, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model

gguf = pytest.importorskip("gguf", reason="the library gguf is not installed")

TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>{% endif %}"
)

SIZES: dict[str, dict[str, Any]] = {
    # Rows of 32 and 64 numbers, so that Q8_0 fits.
    "llama": {**LLAMA, "intermediate_size": 64, "hidden_act": "silu"},
    "gpt2": GPT2,
}

NAMES = {
    "llama": {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
        "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
        "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
        "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
        "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
        "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
        "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
        "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
        "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
    },
    "gpt2": {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "transformer.h.{}.ln_1": "blk.{}.attn_norm",
        "transformer.h.{}.ln_2": "blk.{}.ffn_norm",
        "transformer.h.{}.attn.c_attn": "blk.{}.attn_qkv",
        "transformer.h.{}.attn.c_proj": "blk.{}.attn_output",
        "transformer.h.{}.mlp.c_fc": "blk.{}.ffn_up",
        "transformer.h.{}.mlp.c_proj": "blk.{}.ffn_down",
    },
}


def write_gguf(
    path: Path, family: str = "llama", *, kind: str = "F32", seed: int = 0, **fields: Any
) -> Any:
    """Write a tiny random model of a family as a GGUF file, and return the model.

    Args:
        path: The file.
        family: "llama" or "gpt2".
        kind: The type of the down-projections: "F32", "F16", "BF16" or "Q8_0".
        seed: Of the weights.
        fields: More fields, with "__" for each dot. A value of None takes a field away.
    """
    module = tiny_model(family, seed=seed, **SIZES[family])
    writer = gguf.GGUFWriter(path, family)
    _add_fields(writer, family, module, fields)
    for name, tensor in module.state_dict().items():
        if name == "lm_head.weight" and module.config.tie_word_embeddings:
            continue
        target, data = gguf_tensor(family, module.config, name, tensor)
        if ".ffn_down.weight" in target and kind != "F32":
            type_ = getattr(gguf.GGMLQuantizationType, kind)
            writer.add_tensor(target, gguf.quantize(data, type_), raw_dtype=type_)
        else:
            writer.add_tensor(target, data)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return module


def _add_fields(writer: Any, family: str, module: Any, fields: dict[str, Any]) -> None:
    config = module.config
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if family == "llama":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
    else:
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    text = json.loads(byte_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(text["vocab"], key=text["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 2 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in text["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.add_add_bos_token(False)
    for name, value in fields.items():
        key = name.replace("__", ".")
        writer.kv_data[0].pop(key, None)
        if value is None:
            continue
        if isinstance(value, str):
            writer.add_key_value(key, value, gguf.GGUFValueType.STRING)
        elif isinstance(value, list):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
        elif isinstance(value, float):
            writer.add_key_value(key, value, gguf.GGUFValueType.FLOAT32)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.UINT32)


def gguf_tensor(family: str, config: Any, name: str, tensor: torch.Tensor) -> tuple[str, Any]:
    """Return the name and the numbers of a weight as llama.cpp's converter writes them."""
    stem, _, kind = name.rpartition(".")
    number = next((part for part in stem.split(".") if part.isdigit()), "")
    pattern = ".".join("{}" if part.isdigit() else part for part in stem.split("."))
    target = f"{NAMES[family][pattern].format(number)}.{kind}"
    data = tensor.numpy().copy()
    if family == "llama" and (".attn_q." in target or ".attn_k." in target):
        heads = config.num_attention_heads
        heads = config.num_key_value_heads if ".attn_k." in target else heads
        halves = data.reshape(heads, 2, data.shape[0] // heads // 2, -1)
        data = halves.swapaxes(1, 2).reshape(data.shape)
    if family == "gpt2" and kind == "weight" and (".c_" in name):
        data = data.T.copy()
    return target, np.ascontiguousarray(data)
