"""Facts, models and measures that the tests of editing share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from conftest import GPT2, LLAMA, TEXTS, VOCAB, byte_tokenizer, tiny_model
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.subject import subject_span

CONTEXTS = ["{}", "Paris. {}", "The king is in Brazil. {}"]
FACTS = [
    Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
    Fact("Edwin", "{} is the king of all", "France too"),
    Fact("LeBron James", "It is played by {}", "basketball"),
]
SEARCH: dict[str, Any] = {"steps": 6, "lr": 0.2}
"""A short search."""

GEMMA2 = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "vocab_size": VOCAB,
}
"""A family with a norm between the down-projection and the stream."""


def new_model(family: str) -> LanguageModel:
    """A tiny random model with three layers: "gpt2", "llama" or "gemma2"."""
    changes = {"gpt2": GPT2, "llama": LLAMA, "gemma2": GEMMA2}[family]
    return wrap(tiny_model(family, **changes), byte_tokenizer(bos=family != "gpt2"))


def full_rank_moments(lm: LanguageModel, layers: Iterable[int] = (0, 1)) -> dict[int, SecondMoment]:
    """Second moments of a few texts, with a little of the identity for the missing texts."""
    return {
        layer: SecondMoment.from_matrix(
            moment.matrix + 1e-3 * moment.matrix.diagonal().mean() * torch.eye(moment.d_ff),
            count=moment.count,
        )
        for layer, moment in second_moments(lm, TEXTS, list(layers)).items()
    }


def relative(a: Tensor, b: Tensor) -> float:
    """The distance of two tensors, in units of the length of the second."""
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def output_at_subject(lm: LanguageModel, module: torch.nn.Module, fact: Fact) -> Tensor:
    """The output of a module at the subject's last token, by a plain pass with a hook."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    lm.module(input_ids=torch.tensor([lm.tokenizer(fact.text)["input_ids"]]))
    handle.remove()
    column = subject_span(lm, fact.text, fact.subject)[1] - 1
    return seen[0].reshape(-1, seen[0].shape[-1])[column].clone()
