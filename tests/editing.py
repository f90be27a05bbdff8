"""Facts, models and measures that the tests of editing share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from conftest import GPT2, LLAMA, TEXTS, VOCAB, byte_tokenizer, tiny_model
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.corpus.scan import Site
from factsmith.edit.delta import Delta
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


def full_rank_moments(
    lm: LanguageModel, layers: Iterable[int] = (0, 1), site: Site = "coefficients"
) -> dict[int, SecondMoment]:
    """Second moments of a few texts, with a little of the identity for the missing texts."""
    moments = second_moments(lm, TEXTS, list(layers), site=site)
    return {
        layer: dataclasses.replace(
            SecondMoment.from_matrix(
                moment.matrix + 1e-3 * moment.matrix.diagonal().mean() * torch.eye(moment.d_ff),
                count=moment.count,
            ),
            site=site,
            sample=moment.sample,
        )
        for layer, moment in moments.items()
    }


def change_of(delta: Delta) -> dict[str, Tensor]:
    """What a delta changes, by name: its dense updates, and the tensors of its appended rows."""
    updates = {f"update {layer}": delta.dense(layer) for layer in delta.layers}
    rows = {
        f"{name} {layer}": tensor
        for layer, appended in delta.appended.items()
        for name, tensor in appended.tensors().items()
    }
    return updates | rows


def same_change(one: Delta, other: Delta) -> bool:
    """Whether two deltas change the very same numbers."""
    first, second = change_of(one), change_of(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


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
