"""The methods agree with the authors' code on the same model, facts and contexts."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import shared_dir
from editing import relative
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment
from factsmith.edit.configs import AlphaEditConfig, MemitConfig, RomeConfig
from factsmith.edit.delta import applied
from factsmith.edit.keys import read_keys
from factsmith.edit.methods import alphaedit, edit, emmet, memit, r_rome, rome
from factsmith.edit.target import Targets
from factsmith.model.load import load


def golden_moments(folder: Path) -> dict[int, SecondMoment]:
    """The second moments of three layers that the authors' code worked from."""
    tensors = load_file(folder / "second_moment.safetensors")
    counts = {i: int(tensors[f"layer{i}.count"]) for i in range(3)}
    return {i: SecondMoment.from_matrix(tensors[f"layer{i}"], count=counts[i]) for i in range(3)}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """What the authors' code gave for single facts with ROME, and what it worked from."""
    folder = shared_dir() / "golden"
    return {
        "lm": load(folder / "facts-gpt2"),
        "tensors": load_file(folder / "rome.safetensors"),
        **json.loads((folder / "rome.json").read_text(encoding="utf-8")),
        "moments": golden_moments(folder),
    }


def golden_config(golden: dict[str, Any]) -> RomeConfig:
    h = golden["hparams"]
    return RomeConfig(
        layer=h["layers"][0],
        steps=h["v_num_grad_steps"],
        lr=h["v_lr"],
        kl_factor=h["kl_factor"],
        weight_decay=h["v_weight_decay"],
        clamp=h["clamp_norm_factor"],
    )


@pytest.mark.parametrize("case", range(5))
def test_agrees_with_the_reference_implementation(golden: dict[str, Any], case: int) -> None:
    request = golden["requests"][case]
    fact = Fact(request["subject"], request["prompt"], request["target_new"]["str"])
    delta = rome(
        golden["lm"],
        fact,
        golden_config(golden),
        moments=golden["moments"],
        contexts=golden["context_templates"],
    )
    expected = {
        name: golden["tensors"][f"case{request['case_id']}.h.1.{name}"]
        for name in ("u", "v", "delta")
    }
    left, right = delta.layers[1]
    assert relative(right[0], expected["u"]) < 2e-4
    assert relative(left[:, 0], expected["v"]) < 1e-5
    assert relative(delta.dense(1).T, expected["delta"]) < 2e-4
    with applied(golden["lm"], delta):
        assert golden["lm"].answer([fact.text])[0].startswith(fact.target)
    assert not golden["lm"].answer([fact.text])[0].startswith(fact.target)


def test_one_more_update_would_not_agree(golden: dict[str, Any]) -> None:
    """The control for `steps`: 20 evaluations are 19 updates."""
    request = golden["requests"][2]
    fact = Fact(request["subject"], request["prompt"], request["target_new"]["str"])
    config = RomeConfig(layer=1, steps=21)
    delta = rome(
        golden["lm"], fact, config, moments=golden["moments"], contexts=golden["context_templates"]
    )
    assert relative(delta.layers[1][0][:, 0], golden["tensors"]["case2.h.1.v"]) > 5e-3


@pytest.fixture(scope="module")
def golden_many() -> Callable[[str], dict[str, Any]]:
    """What the authors' code gave for ten facts in three layers, by method."""
    folder = shared_dir() / "golden"
    moments = golden_moments(folder)
    lm = load(folder / "facts-gpt2")

    def read(name: str) -> dict[str, Any]:
        record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        h = record["hparams"]
        settings = {
            "layers": tuple(h["layers"]),
            "steps": h["v_num_grad_steps"],
            "lr": h["v_lr"],
            "kl_factor": h["kl_factor"],
            "weight_decay": h["v_weight_decay"],
            "clamp": h["clamp_norm_factor"],
        }
        config = (
            MemitConfig(**settings, moment_weight=h["mom2_update_weight"])
            if name == "memit"
            else AlphaEditConfig(**settings, threshold=h["nullspace_threshold"], l2=h["L2"])
        )
        return {
            "lm": lm,
            "config": config,
            "facts": [
                Fact(r["subject"], r["prompt"], r["target_new"]["str"]) for r in record["requests"]
            ],
            "contexts": [context for group in record["context_templates"] for context in group],
            "moments": moments,
            "tensors": load_file(folder / f"{name}.safetensors"),
        }

    return read


def test_memit_agrees_with_the_reference_implementation(
    golden_many: Callable[[str], dict[str, Any]],
) -> None:
    g = golden_many("memit")
    delta = memit(g["lm"], g["facts"], g["config"], moments=g["moments"], contexts=g["contexts"])
    assert relative(delta.v_star.T, g["tensors"]["zs"]) < 1e-5
    for layer in range(3):
        left, right = delta.layers[layer]
        assert relative(delta.k_star[layer], g["tensors"][f"ks.L{layer}"]) < 1e-4
        assert relative(right.T, g["tensors"][f"h.{layer}.adj_k"].float()) < 1e-4
        assert relative(left, g["tensors"][f"h.{layer}.resid"].float()) < 1e-5
        assert relative(delta.dense(layer).T, g["tensors"][f"h.{layer}.delta"]) < 1e-5
    # The controls: PMET's spread, and GPT-J's weight instead of GPT-2 XL's, give something else.
    tensors = dict.fromkeys(
        ("v_star", "v_initial", "k_star", "k_prompt", "ffn_initial"), delta.v_star
    )
    targets = Targets(
        **tensors,
        convergence=({},) * 10,
        facts=tuple(g["facts"]),
        layer=max(delta.layers),
        site="stream",
    )
    for changes in ({"spread": "sqrt"}, {"moment_weight": 15_000}):
        other = memit(
            g["lm"],
            g["facts"],
            dataclasses.replace(g["config"], **changes),
            moments=g["moments"],
            contexts=g["contexts"],
            targets=targets,
        )
        assert relative(other.dense(0).T, g["tensors"]["h.0.delta"]) > 1e-2


def test_alphaedit_agrees_with_the_reference_implementation(
    golden_many: Callable[[str], dict[str, Any]],
) -> None:
    g = golden_many("alphaedit")
    delta = alphaedit(
        g["lm"], g["facts"], g["config"], moments=g["moments"], contexts=g["contexts"]
    )
    ranks = [
        g["moments"][layer].null_space(threshold=g["config"].threshold).shape[1]
        for layer in range(3)
    ]
    assert ranks == [461, 628, 593]
    for layer in range(3):
        assert relative(delta.dense(layer).T, g["tensors"][f"h.{layer}.delta"]) < 2e-4
        cached = delta.k_star[layer].square().sum(0)  # the diagonal of the K Kᵀ to keep next time
        assert relative(cached, g["tensors"]["cache_c_diag"][layer]) < 1e-4
    # The reference reads the keys again after the edit. They are the same, because only the layers
    # below change a layer's keys.
    with applied(g["lm"], delta):
        again = read_keys(g["lm"], g["facts"], 2, g["contexts"])
    weights = torch.tensor([0.5, *[0.1] * 5])[None, :, None]
    assert relative((again * weights).sum(1), delta.k_star[2]) < 1e-4


def test_aliases_show_the_options_of_edit() -> None:
    options = {
        name: (parameter.default, parameter.kind)
        for name, parameter in inspect.signature(edit).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert options["moments"][0] is None and options["seed"][0] == 0
    for alias in (rome, r_rome, memit, emmet, alphaedit):
        shown = inspect.signature(alias).parameters
        assert list(shown) == ["lm", "facts", "config", *options]
        assert {name: (shown[name].default, shown[name].kind) for name in options} == options
