"""A revert in the middle solves the patches after it again and proves them."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import GPT2, TEXTS, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError, NumericsError
from factsmith.core.fact import Fact
from factsmith.corpus import moments_store
from factsmith.edit.configs import RomeConfig
from factsmith.edit.delta import Delta
from factsmith.edit.resolve import resolve
from factsmith.keep import again
from factsmith.keep.revision import Revision
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from workbenches import EASY, SPREADING, THREE, hashes, moments_of, some_delta


def test_middle_revert(lm: LanguageModel, bench: Workbench) -> None:
    one = bench.commit(some_delta(lm, 1, (1,)))
    apart = bench.commit(some_delta(lm, 2, (2,)))
    before_apart = hashes(lm)
    last = bench.commit(some_delta(lm, 3, (1,)))
    state = hashes(lm)
    # The patches after it have no recipe, so nothing can solve them again.
    with pytest.raises(InputError, match="write its facts again"):
        bench.revert(one.id)
    assert hashes(lm) == state and bench.log()[0].id == last.id
    bench.revert(apart.id)
    assert torch.equal(lm.ffn[2].weight(), bench._carried.base[2])
    bench.revert(last.id)
    assert {n for n, h in hashes(lm).items() if h != before_apart[n]} == {
        n for n in state if ".2.mlp.c_proj.weight" in n
    }


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_patches_after_a_reverted_patch_are_solved_again(
    lm: LanguageModel, bench: Workbench, tmp_path: Path, method: str
) -> None:
    config = RomeConfig(layer=1, steps=4) if method == "rome" else SPREADING
    moments = moments_of(lm)

    def put(facts: list[Fact]) -> Revision:
        done = bench.apply(facts, method, config, moments=moments, force=True)
        assert done.revision is not None
        return done.revision

    base = hashes(lm)
    one, two = put(THREE[:1]), put(THREE[1:])
    both = hashes(lm)
    undo = bench.revert(one.id, moments=moments, force=True)
    without = hashes(lm)
    assert without not in (base, both)
    (left,) = bench.ledger.active()
    assert left.id == two.id and left.in_effect == tuple(THREE[1:]) and left.carried != two.delta
    original = Delta.load(bench.ledger.delta_folder(left, two.delta))
    again = Delta.load(bench.ledger.delta_folder(left))
    equal = torch.equal if method == "rome" else torch.allclose
    assert equal(again.v_star, original.v_star)
    with Workbench(wrap(tiny_model("gpt2", **GPT2), byte_tokenizer()), tmp_path / "other") as alone:
        expected = resolve(alone.lm, original, moments=moments)
    for layer in again.layers:
        assert torch.allclose(again.dense(layer), expected.dense(layer), atol=1e-6)
        assert not torch.allclose(original.dense(layer), expected.dense(layer), atol=1e-6)
    asked = [check["prompt"] for check in undo.report["checks"] if check["role"] == "prompt"]
    assert asked == [fact.text for fact in THREE[1:]]
    part = bench.revert(two.id, facts=[1], moments=moments, force=True)
    assert part.facts == (THREE[2],) and bench.ledger.active()[0].in_effect == (THREE[1],)
    bench.revert(part.id)
    assert hashes(lm) == without, "reverting the newest restores the same bits"
    bench.checkout(two.id)
    assert hashes(lm) == both
    bench.checkout("latest")
    assert hashes(lm) == without
    bench.close()
    with Workbench(lm, bench.ledger.folder) as opened:
        assert hashes(lm) == without
        opened.checkout("base")
        assert hashes(lm) == base


def test_a_revert_that_would_lose_a_fact_is_not_recorded(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = moments_of(lm)
    one = bench.apply(THREE[:1], "memit", SPREADING, moments=moments, force=True).revision
    two = bench.apply([EASY], "memit", SPREADING, moments=moments, force=True).revision
    assert one is not None and two is not None
    state = hashes(lm)
    proof = again.prove(lm, [EASY], nullcontext)
    lost = dataclasses.replace(proof.checks[0], wanted=" Paris", after="x", held=False)
    monkeypatch.setattr(again._Attempt, "_lost", lambda *_: [lost])
    with pytest.raises(NumericsError, match="would lose 1 fact"):
        bench.revert(one.id, moments=moments)
    assert hashes(lm) == state and bench.log()[0].id == two.id
    report = bench.revert(one.id, moments=moments, force=True).report
    assert report["lost"] == [lost.in_words] and report["forced"] is True
    assert report["asked"] == 1 and report["solved_again"] == [two.id]
    monkeypatch.undo()
    other = {
        layer: dataclasses.replace(moment, matrix=moment.matrix * 1.5)
        for layer, moment in moments.items()
    }
    bench.revert("latest")
    monkeypatch.setattr(bench, "find_moments", lambda *_, **__: other)
    with pytest.raises(InputError, match="not in the workspace any more"):
        bench.revert(one.id)


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_a_patch_is_solved_again_with_the_second_moments_it_recorded(
    lm: LanguageModel,
    bench: Workbench,
    fresh_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """Another text was given since, the cache is gone, and nothing can be computed."""
    config = RomeConfig(layer=1, steps=4) if method == "rome" else SPREADING

    def put(fact: Fact, **options: Any) -> Revision:
        done = bench.apply([fact], method, config, force=True, **options)
        assert done.revision is not None
        return done.revision

    one, two = put(THREE[0]), put(THREE[1])
    three = put(THREE[2], texts=[*TEXTS] * 20)
    assert one.moments == two.moments != three.moments
    shutil.rmtree(fresh_cache)
    monkeypatch.setattr(
        moments_store, "moments_with_total", lambda *_, **__: pytest.fail("computed again")
    )
    bench.revert(one.id, force=True)
    assert [left.id for left in bench.ledger.active()] == [two.id, three.id]
    assert all(left.carried != left.delta for left in bench.ledger.active())
    bench.revert("latest", force=True)
    # A control: without the file that the patch recorded there is nothing to solve it with.
    for file in (bench.ledger.folder / "moments").glob("layer*-*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="not in the workspace any more"):
        bench.revert(one.id, force=True)
