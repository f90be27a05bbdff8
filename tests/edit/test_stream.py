"""An edit of several layers in families that differ between the down-projection and the stream.

Everything is read with plain hooks in plain passes of the edited model.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import LLAMA, VOCAB, byte_tokenizer, tiny_model
from editing import FACTS, full_rank_moments, output_at_subject
from factsmith.corpus.moments import SecondMoment
from factsmith.edit import spread as editing_all_at_once
from factsmith.edit.configs import MemitConfig
from factsmith.edit.delta import Delta, applied
from factsmith.edit.keys import to_down
from factsmith.edit.methods import memit
from factsmith.edit.search import find_targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

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
    "gptj": {**GPT, "rotary_dim": 4},  # attention parallel to the feed-forward network
    "gpt_neox": {**DEEP, "use_parallel_residual": True},
    "granite": {**DEEP, "residual_multiplier": 0.3},  # a multiplier follows
    "gemma2": {**DEEP, "head_dim": 8, "sliding_window": 16},  # a norm follows
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
    return full_rank_moments(model(family), LAYERS)


def put_out(lm: LanguageModel, module: torch.nn.Module) -> Tensor:
    """The output of a module at each fact's subject, (n, d_model)."""
    return torch.stack([output_at_subject(lm, module, fact) for fact in FACTS])


def nearest(lm: LanguageModel, layer: int, wanted: Tensor) -> Tensor:
    """The least distance (n,) of the layer's output from `wanted`, for any down-projection.

    The norm's output is g ⊙ s with g = 1 + w and ‖s‖² = d. The least distance under that
    constraint is that of s = g t / (g² + μ), with a multiplier μ that bisection finds.
    """
    norm = lm.layers[layer].post_feedforward_layernorm
    assert isinstance(norm, torch.nn.Module)
    gain = norm.weight.detach().double() + 1
    rest = (put_out(lm, lm.layers[layer]) - put_out(lm, norm)).double()  # from other parts
    least = []
    for t in (wanted.double() - rest).unbind():
        low, high = -float(gain.square().min()), 1e6
        for _ in range(200):
            middle = (low + high) / 2
            s = gain * t / (gain.square() + middle)
            low, high = (middle, high) if s.norm() ** 2 > len(t) else (low, middle)
        least.append((gain * s - t).norm())
    return torch.stack(least)


def distances(family: str, delta: Delta) -> Tensor:
    """How far each layer's output is from its share, more than the least possible distance.

    The layers below are in place. The unit is the length of the share. Shape (n_layers, n).
    """
    lm, excess = model(family), []
    for done, layer in enumerate(LAYERS):
        below = [only(delta, lower) for lower in LAYERS[:done]]
        with applied(lm, below):
            share = (delta.v_star - put_out(lm, lm.layers[LAYERS[-1]])) / (len(LAYERS) - done)
            wanted = put_out(lm, lm.layers[layer]) + share
        with applied(lm, [*below, only(delta, layer)]):
            off = (put_out(lm, lm.layers[layer]) - wanted).norm(dim=-1)
            least = nearest(lm, layer, wanted) if family in NORMED else torch.zeros(len(FACTS))
        excess.append((off - least) / share.norm(dim=-1))
    return torch.stack(excess)


def only(delta: Delta, layer: int) -> Delta:
    """The part of an edit in one layer."""
    return dataclasses.replace(
        delta, layers={layer: delta.layers[layer]}, k_star={layer: delta.k_star[layer]}
    )


def off_target(lm: LanguageModel, delta: Delta) -> Tensor:
    """The relative distance (n,) of the stream after the last edited layer from v_star."""
    distance = put_out(lm, lm.layers[LAYERS[-1]]) - delta.v_star
    return distance.norm(dim=-1) / delta.v_star.norm(dim=-1)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_layer_takes_its_share_and_the_stream_becomes_v_star(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer reaches its share, or comes as near as its norm allows."""
    lm = model(family)
    assert lm.ffn[1].adds_directly == (family in DIRECT)
    targets = find_targets(lm, FACTS, LAYERS[-1], CONFIG, ["{}"], site="stream")

    def edited() -> Delta:
        return memit(
            lm, FACTS, CONFIG, moments=moments_of(family), contexts=["{}"], targets=targets
        )

    delta = edited()
    assert off_target(lm, delta).min() > 0.1, "the unedited model is not at the targets"
    with applied(lm, delta):
        assert off_target(lm, delta).max() < (0.1 if family in NORMED else 1e-4)
    assert distances(family, delta).max() < 1e-2
    if family in DIRECT:
        return
    with monkeypatch.context() as patching:  # the control: as if nothing followed
        patching.setattr(editing_all_at_once, "to_down", lambda lm, facts, layer, change: change)
        ignoring = edited()
    with applied(lm, ignoring):
        assert off_target(lm, ignoring).min() > 0.05
    assert distances(family, ignoring).max() > 0.1
    if family in NORMED:  # the control: a third of the addition that would change it all

        def third_of_all(lm: LanguageModel, facts: Any, layer: int, part: Tensor) -> Tensor:
            return to_down(lm, facts, layer, 3 * part) / 3

        with monkeypatch.context() as patching:
            patching.setattr(editing_all_at_once, "to_down", third_of_all)
            assert distances(family, edited())[0].max() > 0.05
