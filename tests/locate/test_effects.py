"""The effect of scaled neurons against a model whose weights were scaled by hand."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from conftest import LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError, LayerError
from factsmith.locate.effects import check_neurons, effect, random_neurons
from factsmith.locate.neurons import knowledge_neurons
from factsmith.model.intervene import intervene
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

PROMPTS = ["The mother tongue of Danielle Darrieux is", "Danielle lies in"]
NEURONS = [(0, 3), (1, 47), (2, 0)]
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2_moe": {
        **LLAMA,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
}


@lru_cache
def model(family: str) -> LanguageModel:
    return wrap(tiny_model(family, **CONFIGS[family]), byte_tokenizer())


def test_the_effect_is_the_relative_change_of_the_mean_probability() -> None:
    lm = model("llama")
    measured = effect(lm, NEURONS, PROMPTS, "is")
    plain = lm.log_prob(PROMPTS, ["is", "is"]).exp().mean()
    changed = {}
    for scale in (0, 2):
        module = copy.deepcopy(lm.module)
        for layer, i in NEURONS:
            module.model.layers[layer].mlp.down_proj.weight[:, i].mul_(scale)
        edited = wrap(module, lm.tokenizer)
        changed[scale] = edited.log_prob(PROMPTS, ["is", "is"]).exp().mean()
    assert measured.n_neurons == 3 and measured.before == pytest.approx(float(plain))
    assert measured.suppressed == pytest.approx(float(changed[0] / plain - 1), rel=1e-3)
    assert measured.amplified == pytest.approx(float(changed[2] / plain - 1), rel=1e-3)
    assert (
        abs(measured.suppressed) > 1e-3 and measured.to_dict()["suppressed"] == measured.suppressed
    )
    nothing = effect(lm, [], PROMPTS, "is")
    assert nothing.n_neurons == 0 and nothing.suppressed == nothing.amplified == 0


def test_random_neurons_are_as_many_others_of_the_same_places() -> None:
    lm = model("qwen2_moe")
    given = [(0, 4, 39), (1, 0, 3), (1, 0, 7), (1, 4, 0)]
    drawn = random_neurons(lm, given, seed=3)
    assert sorted(n[:2] for n in drawn) == sorted(n[:2] for n in given) and not set(drawn) & set(
        given
    )
    assert drawn == random_neurons(lm, given, seed=3) != random_neurons(lm, given, seed=4)
    assert all(len(n) == 2 for n in random_neurons(model("llama"), [(0, 1), (2, 1)], seed=0))
    with pytest.raises(LayerError, match="does not exist"):
        random_neurons(lm, [(0, 9, 0)], seed=0)


@pytest.mark.parametrize(
    "rows",
    [
        [(np.int64(0), np.int64(5)), (2, 7)],
        torch.tensor([[0, 5], [2, 7]]),
        np.array([[0, 5], [2, 7]]),
        [[0, 5], torch.tensor([2, 7])],
    ],
)
def test_neurons_may_be_rows_of_arrays_and_tensors(rows: Any) -> None:
    lm = model("llama")
    drawn = random_neurons(lm, rows, seed=0)
    assert drawn == random_neurons(lm, [(0, 5), (2, 7)], seed=0) and all(
        type(n) is int for place in drawn for n in place
    )
    assert effect(lm, rows, PROMPTS, "is").n_neurons == 2


def test_a_control_is_smaller_where_a_bank_has_too_few_others() -> None:
    lm = model("llama")
    given = [(0, i) for i in range(40)] + [(1, 0)]
    drawn = random_neurons(lm, given, seed=0)
    assert (
        sorted(n for n in drawn if n[0] == 0) == [(0, i) for i in range(40, 48)] and len(drawn) == 9
    )
    assert effect(lm, drawn, PROMPTS, "is").n_neurons == 9
    with pytest.raises(InputError, match="seed is None"):
        random_neurons(lm, given, seed=None)  # type: ignore[arg-type]


def test_a_check_measures_the_located_neurons_and_two_other_sets() -> None:
    lm = model("llama")
    located = knowledge_neurons(lm, PROMPTS, "is")
    check = check_neurons(lm, located, seed=1)
    assert list(check.effects) == ["refined", "random", "activation baseline"]
    with intervene(lm, located.refined, 0):
        silenced = float(lm.log_prob(PROMPTS, ["is", "is"]).exp().mean())
    assert check.effects["refined"].silenced == pytest.approx(silenced, rel=1e-5)
    assert check.effects["random"].n_neurons == len(located.refined)
    assert check.effects["random"].silenced != check.effects["refined"].silenced
    assert check.effects["activation baseline"].n_neurons == len(located.baseline)
    strongest, sets = check.tables(4)
    assert len(strongest.rows) == 4 and strongest.rows[0][2] == f"{located.top(1)[0][1]:.4f}"
    assert sets.rows[0][:3] == (
        "refined",
        str(len(located.refined)),
        f"{check.effects['refined'].suppressed:+.1%}",
    )
    read = json.loads(json.dumps(check.to_dict()))
    assert read["effects"]["random"]["n_neurons"] == len(located.refined)
    assert {k: v for k, v in read.items() if k != "effects"} == json.loads(
        json.dumps(located.to_dict())
    )
