"""Tiny models of families that differ between the down-projection and the stream."""

from __future__ import annotations

import pytest

from conftest import LLAMA, VOCAB, byte_tokenizer, tiny_model
from editing import new_model
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap


@pytest.fixture(scope="session")
def tiny_gemma2() -> LanguageModel:
    """Puts a norm between the down-projection and the stream."""
    return new_model("gemma2")


@pytest.fixture(scope="session")
def tiny_opt() -> LanguageModel:
    """Flattens (B, T) before its feed-forward network."""
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_attention_heads": 4,
    }
    return wrap(
        tiny_model("opt", **sizes, max_position_embeddings=64, vocab_size=VOCAB),
        byte_tokenizer(bos=True),
    )


@pytest.fixture(scope="session")
def tiny_granite() -> LanguageModel:
    """Multiplies the output of the feed-forward network before it is added to the stream."""
    return wrap(tiny_model("granite", **LLAMA, residual_multiplier=0.3), byte_tokenizer(bos=True))


@pytest.fixture(params=["gpt2", "llama", "gemma2", "opt", "granite"])
def family(request: pytest.FixtureRequest) -> LanguageModel:
    """Each of five families in turn."""
    lm: LanguageModel = request.getfixturevalue(f"tiny_{request.param}")
    return lm
