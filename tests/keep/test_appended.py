"""A workbench keeps appended neurons: a row is dropped, and nothing is solved again."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import random
import sqlite3
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import (
    DamagedError,
    FingerprintError,
    InputError,
    LayerError,
    NumericsError,
)
from factsmith.corpus.moments import SecondMoment
from factsmith.corpus.moments_store import find_moments
from factsmith.edit.configs import MemitConfig, RomeConfig
from factsmith.edit.delta import Delta
from factsmith.edit.resolve import resolve
from factsmith.keep import again, carried
from factsmith.keep.revision import Revision
from factsmith.keep.summary import revision_tables
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from workbenches import THREE, by_hand, moments_of, same_state, some_delta, some_rows

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

    def deltas(self) -> dict[str, Delta]:
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
            before, n_solved = mixed.deltas(), len(solved)
            undo = mixed.revert(patch)
            gone.add(patch.id)
            after = mixed.deltas()
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


def kept_rows(bench: Workbench, revision: Revision) -> Delta:
    """The delta that is carried for a patch, from its files."""
    now = next(each for each in bench.ledger.active() if each.id == revision.id)
    return Delta.load(bench.ledger.delta_folder(now))


def test_single_facts_are_dropped_and_come_back(
    lm: LanguageModel, bench: Workbench, solved: list[str]
) -> None:
    base = state_of(lm)
    delta = some_rows(lm, 1, (0, 1), n_facts=3)
    rows = bench.commit(delta)
    other = bench.commit(some_rows(lm, 2))
    state = state_of(lm)
    undo = bench.revert(rows.id, [1])
    assert undo.facts == (delta.facts[1],) and undo.report["solved_again"] == []
    part = kept_rows(bench, rows)
    assert part.facts == (delta.facts[0], delta.facts[2])
    for layer, whole in delta.appended.items():
        kept = [row for row, fact in enumerate(whole.facts) if fact != 1]
        for name, tensor in part.appended[layer].tensors().items():
            assert torch.equal(tensor, whole.tensors()[name][kept])
    assert same_state(lm, by_hand(base, bench)) and not same_state(lm, state)
    assert kept_rows(bench, other).digest == bench._carried.deltas[other.id].digest
    third = bench.commit(some_rows(lm, 3))
    bench.revert(rows.id, [0])
    assert kept_rows(bench, rows).facts == (delta.facts[2],)
    assert same_state(lm, by_hand(base, bench))
    bench.revert(bench.log()[0].id)  # the newest: the facts of before
    bench.revert(undo.id)  # an older one: all facts, with the delta of the commit
    assert kept_rows(bench, rows).digest == delta.digest
    assert bench.show(rows.id).carried == rows.delta
    bench.revert(third.id)
    assert same_state(lm, state) and not solved
    for index in (2, 0, 1):
        bench.revert(rows.id, [index])
    assert bench.show(rows.id).state == "reverted"
    bench.revert(other.id)
    assert same_state(lm, base) and not solved


def test_rows_leave_a_fact_that_rested_on_them_to_the_proof(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch, solved: list[str]
) -> None:
    """Nothing is solved to save it: it is named, and the revert needs force."""
    moments = moments_of(lm)
    rows = bench.commit(some_rows(lm, 1))
    options: dict[str, Any] = {"moments": moments, "contexts": ["{}"], "force": True}
    later = bench.apply(THREE[:1], "memit", MEMIT, **options).revision
    assert later is not None
    state = state_of(lm)
    proof = again.prove(lm, THREE[:1], nullcontext)
    lost = dataclasses.replace(proof.checks[0], after="x", held=False)
    monkeypatch.setattr(again._Attempt, "_lost", lambda *_: [lost])
    with pytest.raises(NumericsError, match=r"would lose 1 fact that should stay: .*force it"):
        bench.revert(rows.id)
    assert same_state(lm, state) and not solved
    report = bench.revert(rows.id, force=True).report
    assert report["lost"] == [lost.in_words] and report["solved_again"] == [] and not solved
    assert bench.show(later.id).carried == later.delta
    bench.revert("latest", force=True)
    bench.revert(later.id, force=True)
    assert not solved


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_changed_appended_number_is_noticed(name: str, tmp_path: Path) -> None:
    """On the reading side and in the values, and rebuild puts it right."""
    lm, _ = model(name)
    linears = ("c_fc.weight", "c_fc.bias", "c_proj.weight")
    if name == "llama":
        linears = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    with Workbench(lm, tmp_path) as bench:
        bench.commit(some_rows(lm, 1))
        state = state_of(lm)
        bench.rebuild()
        bench.plan(THREE[:1], config=ROME)  # the control: nothing is wrong
        for linear in linears:
            now = lm.module.state_dict()
            tensor = next(now[name] for name in now if f".1.mlp.{linear}" in name)
            tensor.reshape(-1)[-1:].add_(1.0)  # past PyTorch's counter
            assert not same_state(lm, state)
            with pytest.raises(FingerprintError, match="layer 1 were changed outside"):
                bench.plan(THREE[:1], config=ROME)
            with pytest.raises(FingerprintError, match="layer 1 were not base"):
                bench.rebuild()
            assert same_state(lm, state)
            bench.rebuild()


def test_damaged_rows_are_refused(lm: LanguageModel, bench: Workbench, tmp_path: Path) -> None:
    base = state_of(lm)
    rows = bench.commit(some_rows(lm, 1))
    tensors = bench.ledger.delta_folder(rows) / "delta.safetensors"
    whole = tensors.read_bytes()
    bench.checkout("base")
    for place in (len(whole) - 5, len(whole) // 2):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        tensors.chmod(0o644)
        tensors.write_bytes(flipped)
        with pytest.raises(DamagedError):
            bench.checkout("latest")
        assert same_state(lm, base)
    tensors.write_bytes(whole)
    bench.checkout("latest")
    assert same_state(lm, by_hand(base, bench))


def test_rows_of_another_model_are_refused(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    base, other = state_of(lm), wrap(tiny_model("llama", **LLAMA), byte_tokenizer(bos=True))
    gated = some_rows(other, 1)
    narrow = wrap(tiny_model("gpt2", **{**GPT2, "n_embd": 16}), byte_tokenizer())
    with pytest.raises(FingerprintError, match="make it again"):
        bench.commit(gated)
    for delta in (gated, some_rows(narrow, 1)):
        with pytest.raises(InputError, match="made for another model"):
            bench.commit(dataclasses.replace(delta, fingerprint=lm.fingerprint))
    deep = dataclasses.replace(some_rows(lm, 1), appended={7: some_rows(lm, 1).appended[1]})
    with pytest.raises(LayerError, match="7"):
        bench.commit(deep)
    assert same_state(lm, base) and bench.log() == []
    with Workbench(other, tmp_path / "other") as elsewhere:
        elsewhere.commit(some_rows(other, 1))
        elsewhere.export(tmp_path / "patch", format="patch")
    with pytest.raises(FingerprintError, match="was made for"):
        bench.import_patches(tmp_path / "patch")


def test_imported_rows_are_the_same_rows_on_any_history(
    lm: LanguageModel, bench: Workbench, tmp_path: Path, solved: list[str]
) -> None:
    """Rows rest on no other patch, so they are taken unchanged, and without moments."""
    base = state_of(lm)
    delta = some_rows(lm, 1)
    bench.commit(delta, message="one")
    bench.export(tmp_path / "patch", format="patch")
    bench.close()
    with Workbench(lm, tmp_path / "other") as other:
        other.commit(some_delta(lm, 3))
        other.commit(some_rows(lm, 2))
        (imported,) = other.import_patches(tmp_path / "patch", force=True)
        assert imported.appended == {1: 4} and imported.method == "append"
        assert kept_rows(other, imported).digest == delta.digest and not solved
        assert same_state(lm, by_hand(base, other))
        other.revert(imported.id)
        assert same_state(lm, by_hand(base, other))
    assert same_state(lm, base)


def test_two_workbenches_of_one_model(lm: LanguageModel, tmp_path: Path) -> None:
    base, parameters = state_of(lm), list(lm.module.parameters())
    with Workbench(lm, tmp_path / "one") as one:
        one.commit(some_rows(lm, 1))
        with pytest.raises(FingerprintError, match="close another workbench"):
            Workbench(lm, tmp_path / "one")
        assert same_state(lm, by_hand(base, one))
    forgotten = Workbench(lm, tmp_path / "one")
    assert not same_state(lm, base)
    del forgotten
    gc.collect()
    with Workbench(lm, tmp_path / "three") as three:  # gives the base back first
        assert same_state(lm, base) and three.log() == []
        assert all(a is b for a, b in zip(lm.module.parameters(), parameters, strict=True))


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), RuntimeError("anything")], ids=repr)
@pytest.mark.parametrize("place", ["widen", "put_back", "write_weights"])
def test_a_failure_while_rows_go_in_leaves_all_as_before(
    lm: LanguageModel,
    bench: Workbench,
    monkeypatch: pytest.MonkeyPatch,
    exception: BaseException,
    place: str,
) -> None:
    bench.commit(some_rows(lm, 1))
    state, log = state_of(lm), bench.log()
    original, calls = getattr(carried, place), []

    def failing(*args: Any) -> None:
        original(*args)
        calls.append(args)
        if len(calls) == 1:
            raise exception

    with monkeypatch.context() as patching:
        patching.setattr(carried, place, failing)
        with pytest.raises(type(exception)):
            bench.commit(some_rows(lm, 2, (0, 1)))
    assert calls and same_state(lm, state) and bench.log() == log
    bench.commit(some_rows(lm, 2, (0, 1)))
    bench.rebuild()


def test_the_words_count_neurons(lm: LanguageModel, bench: Workbench) -> None:
    one = bench.commit(some_rows(lm, 1, (0, 1), n_facts=1, each=3))
    two = bench.commit(some_delta(lm, 2))
    assert bench.show(one.id).to_dict()["appended"] == {"0": 3, "1": 3}
    text = "\n".join(str(table) for table in revision_tables(bench.show(one.id)))
    assert "append, layer 0, 1, 6 neurons" in text
    text = "\n".join(str(table) for table in revision_tables(bench.show(two.id)))
    assert "neuron" not in text and bench.show(two.id).appended == {}
    change = bench.diff("base", "latest")
    assert change.neurons == {0: (0, 3), 1: (0, 3)} and set(change.norms) == {1}
    assert "neurons dropped" in str(change) and change.to_dict()["neurons"]["0"] == [0, 3]
    assert bench.diff(one.id, two.id).neurons == {}
    undo = bench.revert(one.id)
    three = bench.commit(some_rows(lm, 3))
    assert bench.diff(one.id, three.id).neurons == {0: (3, 0), 1: (3, 4)}
    assert bench.diff(undo.id, undo.id).norms == {} and "6 neurons" not in str(undo)
    record = read_record(bench.ledger.folder, two.id)
    assert "appended" not in record, "a record of before has the same text"
    assert read_record(bench.ledger.folder, one.id)["appended"] == {"0": 3, "1": 3}


def read_record(folder: Path, identity: str) -> dict[str, Any]:
    """The stored record, read without the library."""
    with contextlib.closing(sqlite3.connect(folder / "ledger.db")) as db:
        (text,) = db.execute("SELECT record FROM revisions WHERE id = ?", (identity,)).fetchone()
    record: dict[str, Any] = json.loads(text)
    return record
