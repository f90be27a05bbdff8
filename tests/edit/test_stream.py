"""What an edit of several layers does to the stream, in families that differ in what stands between a memory and the stream.

Everything is read with plain hooks in plain forward passes of the edited model.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import LLAMA, TEXTS, VOCAB, byte_tokenizer, tiny_model
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.edit import methods
from factsmith.edit.configs import MemitConfig
from factsmith.edit.delta import Delta, applied
from factsmith.edit.keys import to_down
from factsmith.edit.methods import memit
from factsmith.edit.search import find_targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.tokens import subject_span

FACTS = [
    Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
    Fact("Edwin", "{} is the king of all", "France too"),
    Fact("LeBron James", "It is played by {}", "basketball"),
]
LAYERS = (1, 2, 3)
DEEP = {**LLAMA, "num_hidden_layers": 5}
GPT = {
    "n_layer": 5,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "llama": DEEP,
    "gptj": {**GPT, "rotary_dim": 4},  # attention and FFN side by side
    "gpt_neox": {**DEEP, "use_parallel_residual": True},
    "granite": {**DEEP, "residual_multiplier": 0.3},  # a multiplier behind the FFN
    "gemma2": {**DEEP, "head_dim": 8, "sliding_window": 16},  # a norm behind it
    "gemma3_text": {**DEEP, "head_dim": 8, "sliding_window": 16},
}
DIRECT = {"gpt2", "llama", "gptj", "gpt_neox"}
NORMED = {"gemma2", "gemma3_text"}
CONFIG = MemitConfig(LAYERS, moment_weight=1e-4, steps=8, lr=0.2)


@cache
def model(family: str) -> LanguageModel:
    return wrap(tiny_model(family, **FAMILIES[family]), byte_tokenizer(bos=True))


@cache
def moments_of(family: str) -> dict[int, SecondMoment]:
    """Of full rank: a little of the identity stands for the text these models never read."""
    found = second_moments(model(family), TEXTS, LAYERS)
    return {
        layer: SecondMoment.from_matrix(
            m.matrix + 1e-3 * m.matrix.diagonal().mean() * torch.eye(m.d_ff), count=m.count
        )
        for layer, m in found.items()
    }


@torch.no_grad()
def put_out(lm: LanguageModel, module: torch.nn.Module) -> Tensor:
    """What a module puts out at each fact's subject, (n, d_model): a pass for each fact, with a hook."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    rows = []
    for fact in FACTS:
        seen.clear()
        lm.module(input_ids=torch.tensor([lm.tokenizer(fact.text)["input_ids"]]))
        rows.append(
            seen[0]
            .reshape(-1, lm.d_model)[subject_span(lm, fact.text, fact.subject)[1] - 1]
            .clone()
        )
    handle.remove()
    return torch.stack(rows)


def nearest(lm: LanguageModel, layer: int, wanted: Tensor) -> Tensor:
    """How near (n,) the layer's output can come to `wanted`, whatever its down-projection puts out.

    What comes from behind the norm is g ⊙ s with g = 1 + w and ‖s‖² = d. The least distance under that constraint belongs to
    s = g t / (g² + μ), with a multiplier μ that bisection finds.
    """
    norm = lm.layers[layer].post_feedforward_layernorm
    assert isinstance(norm, torch.nn.Module)
    gain = norm.weight.detach().double() + 1
    rest = (put_out(lm, lm.layers[layer]) - put_out(lm, norm)).double()  # what comes from elsewhere
    found = []
    for t in (wanted.double() - rest).unbind():
        low, high = -float(gain.square().min()), 1e6
        for _ in range(200):
            middle = (low + high) / 2
            s = gain * t / (gain.square() + middle)
            low, high = (middle, high) if s.norm() ** 2 > len(t) else (low, middle)
        found.append((gain * s - t).norm())
    return torch.stack(found)


def distances(family: str, delta: Delta) -> Tensor:
    """For every edited layer, with those below it in place: how much farther its output is from its share of what is missing than it could
    be at the nearest, in lengths of that share, (n_layers, n)."""
    lm, found = model(family), []
    for done, layer in enumerate(LAYERS):
        below = [only(delta, lower) for lower in LAYERS[:done]]
        with applied(lm, below):
            share = (delta.v_star - put_out(lm, lm.layers[LAYERS[-1]])) / (len(LAYERS) - done)
            wanted = put_out(lm, lm.layers[layer]) + share
        with applied(lm, [*below, only(delta, layer)]):
            off = (put_out(lm, lm.layers[layer]) - wanted).norm(dim=-1)
            least = nearest(lm, layer, wanted) if family in NORMED else torch.zeros(len(FACTS))
        found.append((off - least) / share.norm(dim=-1))
    return torch.stack(found)


def only(delta: Delta, layer: int) -> Delta:
    """The part of an edit that is one layer's."""
    return dataclasses.replace(
        delta, layers={layer: delta.layers[layer]}, k_star={layer: delta.k_star[layer]}
    )


def off_target(lm: LanguageModel, delta: Delta) -> Tensor:
    """How far the stream after the last edited layer is from v_star, relative, (n,)."""
    return (put_out(lm, lm.layers[LAYERS[-1]]) - delta.v_star).norm(dim=-1) / delta.v_star.norm(
        dim=-1
    )


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_layer_takes_its_share_and_the_stream_becomes_v_star(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a norm fixes the length of what the FFN adds, each layer comes as near to its share as any down-projection could."""
    lm = model(family)
    assert lm.ffn[1].adds_directly == (family in DIRECT)
    targets = find_targets(lm, FACTS, LAYERS[-1], CONFIG, ["{}"], site="stream")

    def edited() -> Delta:
        return memit(
            lm, FACTS, CONFIG, moments=moments_of(family), contexts=["{}"], targets=targets
        )

    delta = edited()
    assert off_target(lm, delta).min() > 0.1, "the targets are somewhere else"
    with applied(lm, delta):
        assert off_target(lm, delta).max() < (0.1 if family in NORMED else 1e-4)
    assert distances(family, delta).max() < 1e-2
    if family in DIRECT:
        return
    with monkeypatch.context() as patching:  # the control: as if nothing stood between
        patching.setattr(methods, "to_down", lambda lm, facts, layer, change: change)
        ignoring = edited()
    with applied(lm, ignoring):
        assert off_target(lm, ignoring).min() > 0.05
    assert distances(family, ignoring).max() > 0.1
    if family in NORMED:  # part of what would do it all is not what does that part
        with monkeypatch.context() as patching:
            patching.setattr(
                methods,
                "to_down",
                lambda lm, facts, layer, part: to_down(lm, facts, layer, 3 * part) / 3,
            )
            assert distances(family, edited())[0].max() > 0.05
