"""A workbench keeps appended neurons: a row is dropped, and nothing is solved again."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.corpus.moments import SecondMoment
from factsmith.corpus.moments_store import find_moments
from factsmith.edit.configs import MemitConfig, RomeConfig
from factsmith.edit.delta import Delta
from factsmith.edit.resolve import resolve
from factsmith.keep import again
from factsmith.keep.revision import Revision
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from workbenches import THREE, by_hand, moments_of, same_state, some_rows

ROME = RomeConfig(layer=1, steps=3, scale="auto", lr=0.1)
MEMIT = MemitConfig(layers=(0, 1), steps=3, scale="auto", lr=0.2, moment_weight=5.0, repair=0)
MODELS = ("gpt2", "llama", "gpt2 in bfloat16", "atlas", "atlas-llama")


def model(name: str) -> tuple[LanguageModel, dict[int, SecondMoment]]:
    """Return a model, and second moments of its layers 0 and 1."""
    if name.startswith("atlas"):
        lm = load(name)
        return lm, find_moments(lm, [0, 1])
    family, _, dtype = name.partition(" in ")
    shape = GPT2 if family == "gpt2" else LLAMA
    module = tiny_model(family, **shape).to(getattr(torch, dtype or "float32"))
    lm = wrap(module, byte_tokenizer(bos=family == "llama"))
    return lm, moments_of(lm)


def state_of(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in lm.module.state_dict().items()}


class Mixed:
    """A workspace with rome, append, memit and append in the same layers, oldest first."""

    def __init__(self, name: str, folder: Path) -> None:
        self.lm, self.moments = model(name)
        self.base, self.parameters = state_of(self.lm), list(self.lm.module.parameters())
        self.bench = Workbench(self.lm, folder)
        self.states: dict[str, dict[str, torch.Tensor]] = {"base": self.base}
        self.patches = [
            self._kept(self._written(THREE[:1], "rome", ROME)),
            self._kept(self.bench.commit(some_rows(self.lm, 1))),
            self._kept(self._written(THREE[1:], "memit", MEMIT)),
            self._kept(self.bench.commit(some_rows(self.lm, 2, (0, 1), n_facts=3))),
        ]

    def _written(self, facts: Any, method: str, config: Any) -> Revision:
        options: dict[str, Any] = {"moments": self.moments, "contexts": ["{}"], "force": True}
        revision = self.bench.apply(facts, method, config, **options).revision
        assert revision is not None
        return revision

    def _kept(self, revision: Revision) -> Revision:
        assert same_state(self.lm, by_hand(self.base, self.bench))
        self.states[revision.id] = state_of(self.lm)
        return revision

    def revert(self, revision: Revision, facts: list[int] | None = None) -> Revision:
        undone = self.bench.revert(revision.id, facts, moments=self.moments, force=True)
        return self._kept(undone)

    def carried(self) -> dict[str, Delta]:
        return dict(self.bench._carried.deltas)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of the patches that are solved again."""
    methods: list[str] = []

    def counted(lm: LanguageModel, delta: Delta, *args: Any, **options: Any) -> Delta:
        if delta.layers:
            methods.append(delta.method)
        return resolve(lm, delta, *args, **options)

    monkeypatch.setattr(again, "resolve", counted)
    return methods


@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_history_in_every_order(name: str, tmp_path: Path, solved: list[str]) -> None:
    """Every revision has the weights that are computed by hand, and the base comes back."""
    orders = list(itertools.permutations(range(4)))
    orders = random.Random(name).sample(orders, {"gpt2": 3, "llama": 2}.get(name, 1))
    mixed = Mixed(name, tmp_path / "space")
    rome, rows, memit, more = mixed.patches
    appended = {rows.id, more.id}
    assert [patch.size for patch in mixed.patches] == ["", "4 neurons", "", "12 neurons"]
    for order in orders:
        gone: set[str] = set()
        for patch in (mixed.patches[i] for i in order):
            before, n_solved = mixed.carried(), len(solved)
            undo = mixed.revert(patch)
            gone.add(patch.id)
            after = mixed.carried()
            assert set(after) == {each.id for each in mixed.patches} - gone
            for identity in appended & set(after):
                assert after[identity].digest == before[identity].digest, "its rows stay"
            if patch.id in appended:
                assert len(solved) == n_solved and undo.report.get("solved_again", []) == []
                assert all(after[each].digest == before[each].digest for each in after)
            elif patch.id == rome.id and memit.id in after:
                assert memit.id in undo.report["solved_again"], "low-rank patches among themselves"
        assert same_state(mixed.lm, mixed.base)
        now = list(mixed.lm.module.parameters())
        assert all(a is b for a, b in zip(now, mixed.parameters, strict=True))
        for patch in mixed.patches:  # bring all back
            gone_by = next(r for r in mixed.bench.log() if r.reverts == patch.id)
            mixed.revert(gone_by)
    for identity in [*mixed.states][:: 1 if name == "gpt2" else 5]:
        mixed.bench.checkout(identity)
        assert same_state(mixed.lm, mixed.states[identity])
        assert same_state(mixed.lm, by_hand(mixed.base, mixed.bench))
    mixed.bench.checkout("latest")
    mixed.bench.rebuild()
    mixed.bench.close()
    assert same_state(mixed.lm, mixed.base)
