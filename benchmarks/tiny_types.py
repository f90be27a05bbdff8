"""Tiny random models of every type that transformers knows, and a tokenizer for them.

    lm = wrap(tiny_model("llama"), letters())

A type's default config is shrunk: what makes it large is recognised by its name.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

VOCAB = 320
LAYERS = 3
# The names under which configs keep what makes them large, as regular expressions, and the small
# values. The first that matches the whole name decides.
SIZES: list[tuple[int, str]] = [
    (
        LAYERS,
        "num_hidden_layers n_layers? num_layers num_decoder_layers decoder_layers encoder_layers "
        "num_encoder_layers",
    ),
    (
        32,
        "hidden_size n_embd d_model model_dim embedding_size embed_dim dim emb_dim "
        "word_embed_proj_dim width",
    ),
    (24, "moe_intermediate_size expert_ffn_hidden_size expert_dim moe_ffn_dim"),
    (40, ".*shared_expert.*size .*shared_intermediate.*size"),
    (
        48,
        ".*intermediate_size(_mlp)? .*ffn_dim(_mlp)? .*ffn_hidden_size(_mlp)? .*d_ff(_mlp)? "
        ".*inner_dim(_mlp)? .*n_inner(_mlp)? .*dff(_mlp)? .*ffn_size(_mlp)? .*mlp_dim(_mlp)?",
    ),
    (
        4,
        "num_attention_heads n_heads? num_heads decoder_attention_heads encoder_attention_heads "
        "num_q_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads n_kv_heads num_kv_groups kv_n_heads "
        "attention_num_kv_heads",
    ),
    (
        8,
        "head_dim d_kv attention_head_dim v_head_dim qk_nope_head_dim kv_channels global_head_dim "
        "attention_head_size",
    ),
    (4, "qk_rope_head_dim rotary_dim qk_head_dim"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank"),
    (VOCAB, "vocab_size vocab_size_per_layer_input padded_vocab_size"),
    (
        64,
        "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length context_length "
        "block_size max_target_positions seq_length",
    ),
    (4, "num_local_experts num_experts n_routed_experts moe_num_experts n_experts"),
    (
        2,
        "num_experts_per_tok num_experts_per_token top_k_experts moe_top_k moe_topk top_k "
        "n_experts_per_tok moe_k",
    ),
    (1, "n_group topk_group num_nextn_predict_layers first_k_dense_replace"),
    (4, "sliding_window attention_window window_size local_attention_window_size"),
    (8, "hidden_size_per_layer_input laurel_rank altup_rank"),
    (8, "mamba_n_heads mamba_num_heads ssm_heads n_mamba_heads"),
    (8, "mamba_d_head mamba_head_dim ssm_head_dim"),
    (8, "mamba_d_state ssm_state_size state_size mamba_d_ssm"),
    (4, "linear_num_key_heads linear_num_value_heads"),
    (8, "linear_key_head_dim linear_value_head_dim"),
    (2, "index_n_heads"),
    (8, "index_head_dim"),
    (64, "index_topk"),
]
# Values for entries that are None by default.
ABSENT = {
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "head_dim": 8,
}
# Sizes that depend on one another in ways that their names do not show.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1], [["global"], 1]],
        "attention_layers": ["global", "local", "global"],
    },
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
}
KINDS_OF_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type", "attention_layers")


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config's values with everything large made small."""
    small = {name: shrunk(name, value) for name, value in values.items()}
    if "qk_rope_head_dim" in values:
        # Latent attention: "head_dim" is the rotated part of a head.
        latent = {"head_dim": 4, "qk_head_dim": 12, "num_key_value_heads": 4}
        small.update({name: size for name, size in latent.items() if name in values})
    return small


def shrunk(name: str, value: Any) -> Any:
    """Return one value of a config made small."""
    if isinstance(value, dict):
        if name.endswith("_config"):
            return shrink(value)
        unset = name == "rope_parameters" and value.get("rope_theta", 0) is None
        return {"rope_type": "default", "rope_theta": 10000.0} if unset else value
    size = next((n for n, names in SIZES if re.fullmatch("|".join(names.split()), name)), None)
    if isinstance(value, list) and value and name in KINDS_OF_LAYERS:
        kinds = list(dict.fromkeys(map(str, value)))
        return [kinds[-1 - i % len(kinds)] for i in range(LAYERS)][::-1]
    is_numbers = isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)
    if is_numbers and len(value) > LAYERS:
        return [v if size is None else size for v in value[:LAYERS]]
    if name.endswith("token_id"):
        return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, VOCAB - 1)
    if name == "is_decoder":
        return True
    if isinstance(value, float):
        return 0.0 if "dropout" in name or name.endswith("pdrop") or "layerdrop" in name else value
    if value is None:
        return ABSENT.get(name)
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return size if size is not None and is_count else value


def tiny_config(family: str) -> PretrainedConfig:
    """Return the default config of a family, shrunk. Transformers may raise anything."""
    default = AutoConfig.for_model(family)
    leave = {"model_type", "transformers_version", "architectures", "dtype", "per_layer_config"}
    values = {k: v for k, v in default.to_dict().items() if k not in leave}
    return type(default)(**{**shrink(values), **SPECIAL.get(family, {})})


def tiny_model(family: str, seed: int = 0) -> nn.Module:
    """Return a random model of a family, with weights so large that every layer matters."""
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(tiny_config(family))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.float().eval()


def letters() -> PreTrainedTokenizerFast:
    """Return a byte tokenizer: enough to have ids and text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: i for i, token in enumerate(["<|end|>", "<|begin|>", "<|stop|>", *alphabet])
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocab={**vocabulary, **{f"extra{i}": i for i in range(len(vocabulary), VOCAB)}},
            merges=[],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|stop|>", bos_token="<|begin|>"
    )
