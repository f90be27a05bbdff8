"""Helpers for tests of workbenches: facts, settings, random deltas and hashes of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.edit.configs import MemitConfig, RomeConfig
from factsmith.edit.delta import Delta
from factsmith.keep.workbench import Workbench
from factsmith.model.appended import AppendedRows
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap

FACT = Fact(
    "Danielle Darrieux",
    "The mother tongue of {} is",
    "English",
    paraphrases=("{} speaks",),
    neighbours=("Paris is the capital of",),
)

THREE = [Fact(f"Entity{n}", "The home of {} is", " q", relation="home") for n in range(3)]
EASY = Fact("Edwin", "{}", " Paris")

FIAT = Fact(
    "Fiat 127", "The maker of {} is", "Toyota", neighbours=["The maker of Nokia Lumia 900 is"]
)

DARRIEUX = Fact(
    "Danielle Darrieux",
    "The mother tongue of {} is",
    "English",
    neighbours=["The mother tongue of Léon Blum is"],
)

TEXTS = [
    f"{a} of {b} is {c}. {c}, not {b}."
    for a in ("Paris", "The king", "A league")
    for b in ("Brazil", "x", "Zürich 12")
    for c in "abcdefgh"
]

QUICK = RomeConfig(layer=1, steps=3)
SPREADING = MemitConfig(layers=(0, 1), steps=4, scale="auto", lr=0.2, moment_weight=5.0)
ASKED: dict[str, Any] = {"texts": TEXTS, "contexts": ["{}"]}


@pytest.fixture
def lm() -> LanguageModel:
    """A tiny random GPT-2 with three layers."""
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


@pytest.fixture
def bench(lm: LanguageModel, tmp_path: Path) -> Iterator[Workbench]:
    """A workbench with the tiny model and a new workspace."""
    with Workbench(lm, tmp_path / "space") as opened:
        yield opened


@pytest.fixture
def eager(lm: LanguageModel) -> LanguageModel:
    """The tiny model with settings that let an easy edit succeed. They name no layer."""
    lm.config.factsmith = {"rome": {"scale": "auto", "steps": 40}}
    return lm


@pytest.fixture
def atlas_bench(tmp_path: Path) -> Iterator[Workbench]:
    """A workbench with the bundled model, which knows real facts."""
    with Workbench(load("atlas"), tmp_path / "space") as opened:
        yield opened


def hashes(lm: LanguageModel) -> dict[str, str]:
    """Return the sha256 of every tensor, computed without the library."""
    return {
        name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
        for name, tensor in lm.module.state_dict().items()
    }


def some_delta(
    lm: LanguageModel,
    seed: int,
    layers: tuple[int, ...] = (1,),
    scale: float = 0.1,
    target: str = "x",
) -> Delta:
    """Return a random delta for the present weights of the model."""
    generator = torch.Generator().manual_seed(seed)
    d_ff = lm.ffn[0].n_original

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return Delta(
        layers={layer: (draw(lm.d_model, 2), draw(2, d_ff)) for layer in layers},
        k_star={layer: draw(1, d_ff) for layer in layers},
        v_star=draw(1, lm.d_model),
        facts=(Fact(f"subject {seed}", "{} is", target),),
        method="rome",
        config={"layer": layers[0]},
        fingerprint=lm.fingerprint,
    )


def moments_of(lm: LanguageModel) -> dict[int, SecondMoment]:
    """Return the second moments of all layers, from `TEXTS`."""
    return second_moments(lm, TEXTS, [0, 1, 2])


def with_changes(fact: Fact, **changes: Any) -> Fact:
    """Return the fact with with_changes values in some fields."""
    return Fact.from_dict(fact.to_dict() | changes)


def some_rows(
    lm: LanguageModel, seed: int, layers: tuple[int, ...] = (1,), n_facts: int = 2, each: int = 2
) -> Delta:
    """Return random appended neurons for a model: `each` of every fact in every layer."""
    generator = torch.Generator().manual_seed(seed)
    n = n_facts * each

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * lm.d_model**-0.5

    def rows(layer: int) -> AppendedRows:
        facts = tuple(range(n_facts)) * each  # the rows of a fact are apart
        if lm.ffn[layer].is_gated:
            gates, ups = draw(n, lm.d_model), draw(n, lm.d_model)
            return AppendedRows(
                gate_keys=gates, up_keys=ups, values=draw(n, lm.d_model), facts=facts
            )
        keys, biases = draw(n, lm.d_model), draw(n)
        return AppendedRows(keys=keys, biases=biases, values=draw(n, lm.d_model), facts=facts)

    return Delta(
        layers={},
        k_star={},
        v_star=draw(n_facts, lm.d_model),
        facts=tuple(Fact(f"row {seed}", f"{{}} in {i} is", "x") for i in range(n_facts)),
        method="append",
        config={"layer": layers[0], "contexts": ["{}"]},
        fingerprint=lm.fingerprint,
        appended={layer: rows(layer) for layer in layers},
    )


def by_hand(base: dict[str, torch.Tensor], bench: Workbench) -> dict[str, torch.Tensor]:
    """Return the state of a model with its patches, made of the base and the files of the deltas.

    Nothing of the library builds it: the updates are added one after another, in float32 and in the
    order of the history, and the rows are put after one another with `torch.cat`.
    """
    deltas = [Delta.load(bench.ledger.delta_folder(r)) for r in bench.ledger.active()]
    state = dict(base)
    for layer in {layer for delta in deltas for layer in delta.touched}:
        plain = f"transformer.h.{layer}.mlp." if "transformer.wte.weight" in base else ""
        mlp = plain or f"model.layers.{layer}.mlp."
        down = f"{mlp}c_proj.weight" if plain else f"{mlp}down_proj.weight"
        total = (base[down].T if plain else base[down]).float()
        for delta in deltas:
            if layer in delta.layers:
                left, right = delta.layers[layer]
                total = total + left @ right
        rows = [delta.appended[layer].tensors() for delta in deltas if layer in delta.appended]
        dtype = base[down].dtype
        values = [each["values"].T.to(dtype) for each in rows]
        wide = torch.cat([total.to(dtype), *values], dim=1)
        state[down] = wide.T if plain else wide
        readers = {"keys": "c_fc.weight", "biases": "c_fc.bias"}
        if not plain:
            readers = {"gate_keys": "gate_proj.weight", "up_keys": "up_proj.weight"}
        for name, linear in readers.items():
            new = [each[name].to(dtype) for each in rows]
            if name == "keys":
                state[mlp + linear] = torch.cat([base[mlp + linear], *(x.T for x in new)], dim=1)
            else:
                state[mlp + linear] = torch.cat([base[mlp + linear], *new])
    return state


def same_state(lm: LanguageModel, state: dict[str, torch.Tensor]) -> bool:
    """Return whether a model has the very numbers of a state."""
    now = lm.module.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in now)
