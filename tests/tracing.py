"""What the tests of tracing share: tiny models of many families, and the plain loop as oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import torch
from benchmarks.locate import PlainRuns, plain_trace
from torch import Tensor, nn

from conftest import (
    GPT2,
    LLAMA,
    TEXTS,
    VOCAB,
    byte_tokenizer,
    merging_tokenizer,
    tiny_model,
)
from factsmith.locate.records import CausalTrace
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

KINDS = ("state", "mlp", "attention")
PROMPT, SUBJECT = "The mother tongue of Danielle Darrieux is", "Danielle Darrieux"
SAMPLES = 3

SMALL = {**LLAMA, "head_dim": 8}
SHORT = {"n_positions": 64, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 0}
# family: (config, tokenizer, layers, FFN output, attention output). The parts have their names in
# transformers, so that the oracle uses nothing that factsmith discovers.
FAMILIES: dict[str, tuple[dict[str, Any], Callable[[], Any], str, str, str]] = {
    "gpt2": (GPT2, byte_tokenizer, "transformer.h", "mlp", "attn"),
    "llama": (LLAMA, lambda: byte_tokenizer(bos=True), "model.layers", "mlp", "self_attn"),
    "gptj": (
        {**SHORT, "n_layer": 3, "n_embd": 32, "n_head": 4, "rotary_dim": 4},
        byte_tokenizer,
        "transformer.h",
        "mlp",
        "attn",
    ),
    "gemma2": (
        {**SMALL, "sliding_window": 6},
        merging_tokenizer,
        "model.layers",
        "mlp",
        "self_attn",
    ),
    "qwen3": (SMALL, byte_tokenizer, "model.layers", "mlp", "self_attn"),
    # Both parts of a Bloom layer add the residual stream themselves. What they contribute is the
    # output of their last linear.
    "bloom": (
        {
            "n_layer": 3,
            "hidden_size": 32,
            "n_head": 4,
            "vocab_size": VOCAB,
            "bos_token_id": 1,
            "eos_token_id": 0,
        },
        byte_tokenizer,
        "transformer.h",
        "mlp.dense_4h_to_h",
        "self_attention.dense",
    ),
    "opt": (
        {
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "vocab_size": VOCAB,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        byte_tokenizer,
        "model.decoder.layers",
        "fc2",
        "self_attn",
    ),
    "mixtral": (
        {**SMALL, "num_local_experts": 4},
        byte_tokenizer,
        "model.layers",
        "mlp",
        "self_attn",
    ),
}


@lru_cache
def model(family: str) -> LanguageModel:
    """Return a tiny random model of a family."""
    config, tokenizer, *_ = FAMILIES[family]
    return wrap(tiny_model(family, **config), tokenizer())


def part(module: nn.Module, path: str) -> nn.Module:
    """Return a submodule by its path."""
    return reduce(getattr, path.split("."), module)


def sites(lm: LanguageModel, family: str, kind: str) -> list[nn.Module]:
    """Return the module that is restored in each layer, by its name in transformers."""
    _, _, layers, mlp, attention = FAMILIES[family]
    every = list(part(lm.module, layers))
    if kind == "state":
        return every
    return [part(layer, {"mlp": mlp, "attention": attention}[kind]) for layer in every]


def normal(trace: CausalTrace, width: int, seed: int = 1) -> Tensor:
    """Return the noise of a trace, drawn again."""
    start, stop = trace.subject_span
    return torch.from_numpy(
        np.random.RandomState(seed).randn(trace.samples, stop - start, width) * trace.noise
    ).float()


def oracle(family: str, trace: CausalTrace, **options: Any) -> tuple[Tensor, float, float]:
    """Run the plain loop on the question of a trace: its scores, p(clean), p(corrupted).

    Each replaced subject is a text of its own.
    """
    lm = model(family)
    others = [trace.prompt.replace(trace.subject, other) for other in trace.replacements] or [
        trace.prompt
    ] * trace.samples
    rows = [lm.tokenizer(text)["input_ids"] for text in (trace.prompt, *others)]
    noise = None if trace.replacements else normal(trace, lm.d_model)
    window = None if trace.kind == "state" else trace.window
    severed = sites(lm, family, trace.sever) if trace.sever else ()
    return plain_trace(
        lm.module,
        sites(lm, family, trace.kind),
        PlainRuns(rows, trace.answer_ids, trace.subject_span, noise),
        window=window,
        severed=severed,
        **options,
    )


def fitting(family: str) -> tuple[str, ...]:
    """Return other words with as many tokens as SUBJECT."""
    lm = model(family)
    ids = lm.tokenizer(PROMPT)["input_ids"]
    words = " ".join(TEXTS).replace(".", "").replace(",", "").split()
    made = dict.fromkeys(
        " ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, i + 5)
    )
    same = [
        m
        for m in made
        if len(lm.tokenizer(PROMPT.replace(SUBJECT, m))["input_ids"]) == len(ids) and m != SUBJECT
    ]
    assert len(same) >= 3
    return tuple(same[:3])
