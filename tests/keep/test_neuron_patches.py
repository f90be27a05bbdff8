"""Edits of neurons are patches like others: they survive reverts below them, exports, imports and
facts in the same layer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from factsmith.core.errors import InputError, NumericsError
from factsmith.corpus.moments import SecondMoment
from factsmith.edit.configs import RomeConfig
from factsmith.edit.delta import Delta
from factsmith.edit.methods import rome
from factsmith.edit.neurons import erase, erased_neurons, made_again, revives, rewrite
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from workbenches import EASY, QUICK, SPREADING, THREE, hashes, moments_of, some_delta

PAIR = [(1, 3), (1, 5)]
ERASED = [3, 5]


def column_norm(lm: LanguageModel, layer: int = 1) -> float:
    return float(lm.ffn[layer].values[ERASED].norm())


def test_an_erased_neuron_stays_erased_when_the_patch_below_goes(
    lm: LanguageModel, bench: Workbench
) -> None:
    below = bench.commit(some_delta(lm, 1))
    old = erase(lm, PAIR)
    kept = bench.commit(old)
    assert kept.message == "erase 2 neurons of layer 1" and column_norm(lm) == 0
    with bench._carried.exactly([old]):
        assert column_norm(lm) > 0.01, "unchanged, the delta would bring the neurons back"
    undo = bench.revert(below.id)
    assert column_norm(lm) == 0 and undo.changes[kept.id].delta not in (None, kept.delta)
    assert undo.report == {}, "no fact is in effect"
    state = hashes(lm)
    bench.revert(undo.id)
    assert column_norm(lm) == 0
    bench.revert("latest")
    assert hashes(lm) == state
    bench.revert(kept.id)
    assert torch.equal(lm.ffn[1].weight(), bench._carried.base[1])


def test_a_rewritten_neuron_is_rewritten_on_the_new_weights(
    lm: LanguageModel, bench: Workbench
) -> None:
    below = bench.commit(some_delta(lm, 1, scale=0.3))
    prompt = "Paris is the capital of"
    kept = bench.commit(rewrite(lm, PAIR, " France", " Brazil", prompt=prompt))
    bench.revert(below.id)
    now = lm.ffn[1].weight().clone()
    bench.checkout("base")
    expected = rewrite(lm, PAIR, " France", " Brazil", prompt=prompt)
    assert torch.equal(now, lm.ffn[1].weight() + expected.dense(1))
    old = Delta.load(bench.ledger.delta_folder(kept, kept.delta))
    assert not torch.allclose(now, lm.ffn[1].weight() + old.dense(1), atol=1e-4)


def test_facts_leave_erased_neurons_erased(lm: LanguageModel, bench: Workbench) -> None:
    moments = moments_of(lm)
    first = bench.apply(THREE[:1], "rome", QUICK, moments=moments, force=True).revision
    erased = bench.commit(erase(lm, PAIR))
    assert first is not None
    state = hashes(lm)
    plain = SecondMoment.from_matrix(moments[1].matrix, count=moments[1].count)
    stranger = rome(lm, THREE[2], QUICK, moments=plain, contexts=["{}"])
    assert revives(stranger, bench.beneath) == PAIR
    with pytest.raises(InputError, match=rf"neuron \(1, 3\), which {erased.id[:10]} erased"):
        bench.commit(stranger)
    assert hashes(lm) == state and bench.log()[0].id == erased.id
    for method, config, fact in (("rome", QUICK, THREE[1]), ("memit", SPREADING, THREE[2])):
        kept = bench.apply(fact, method, config, moments=moments, force=True).revision
        assert kept is not None and column_norm(lm) == 0 and hashes(lm) != state
    bench.revert(first.id, moments=moments, force=True)
    assert column_norm(lm) == 0 and [r.method for r in bench.ledger.active()] == [
        "erase",
        "rome",
        "memit",
    ]
    bench.revert(erased.id, moments=moments, force=True)
    assert column_norm(lm) > 0.01


def test_neurons_and_facts_are_imported_together(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    moments = moments_of(lm)
    bench.apply(THREE[:1], "rome", QUICK, moments=moments, force=True)
    bench.commit(erase(lm, PAIR))
    bench.commit(rewrite(lm, [(2, 4)], " France", " Brazil"))
    state = hashes(lm)
    bench.export(tmp_path / "patch", format="patch")
    bench.close()
    with Workbench(lm, tmp_path / "same") as same:
        assert len(same.import_patches(tmp_path / "patch", force=True)) == 3
        assert hashes(lm) == state
        assert same.import_patches(tmp_path / "patch") == (), "nothing is imported twice"
    with Workbench(lm, tmp_path / "other") as other:
        other.commit(some_delta(lm, 7))
        made = other.import_patches(tmp_path / "patch", moments=moments, force=True)
        assert [r.method for r in made] == ["rome", "erase", "rewrite"]
        assert column_norm(lm) == 0 and made[1].delta != bench_delta(tmp_path, "0002")
        other.checkout(other.log()[-1].id)
        assert column_norm(lm) > 0.01


def bench_delta(folder: Path, name: str) -> str:
    return Delta.load(folder / "patch" / name).digest


def test_a_folder_of_neurons_alone_asks_the_facts_in_effect(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    every = [(layer, i) for layer in range(3) for i in range(lm.ffn[0].d_ff)]
    bench.commit(erase(lm, every))
    bench.export(tmp_path / "patch", format="patch")
    bench.close()
    lm.config.factsmith = {"rome": {"scale": "auto", "steps": 40}}
    with Workbench(lm, tmp_path / "other") as other:
        outcome = other.apply(
            EASY, moments=moments_of(lm), config=RomeConfig(1, scale="auto", steps=40)
        )
        assert outcome.revision is not None, outcome.failures
        before = hashes(lm)
        with pytest.raises(NumericsError, match="1 fact would not hold: 'Edwin'"):
            other.import_patches(tmp_path / "patch")
        assert hashes(lm) == before and len(other.log()) == 1
        (made,) = other.import_patches(tmp_path / "patch", force=True)
        assert made.report["lost"] and made.report["asked"] == 1


def test_only_edits_of_neurons_are_made_again(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="method is 'rome'"):
        made_again(lm, some_delta(lm, 1))
    delta = rewrite(lm, PAIR, " France", " Brazil")
    broken = type(delta)(**{**vars(delta), "config": {"neurons": [[1, 3]]}})
    with pytest.raises(InputError, match="old_target"):
        made_again(lm, broken)
    assert made_again(lm, delta).digest == delta.digest
    assert erased_neurons([delta, erase(lm, [(2, 1), (1, 0)])]) == {1: [0], 2: [1]}
