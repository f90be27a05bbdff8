"""The weights are the base plus the sum of the active deltas, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import DamagedError, FingerprintError, NumericsError, WorkspaceError
from factsmith.keep.ledger import BASE, LATEST, Ledger
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from workbenches import FACT, QUICK, hashes, moments_of, some_delta


def test_commit_and_back_to_base(lm: LanguageModel, bench: Workbench) -> None:
    base, matrices = hashes(lm), {layer: lm.ffn[layer].weight().clone() for layer in range(3)}
    first = some_delta(lm, 1)
    one = bench.commit(first)
    after_one = hashes(lm)
    assert sum(after_one[name] != base[name] for name in base) == 1, "exactly one matrix changes"
    second = some_delta(lm, 2, (0, 1))
    two = bench.commit(second)
    after_two = hashes(lm)
    # The sum, computed without the library.
    assert torch.equal(
        lm.ffn[1].weight(),
        matrices[1]
        + first.layers[1][0] @ first.layers[1][1]
        + second.layers[1][0] @ second.layers[1][1],
    )
    assert torch.equal(lm.ffn[0].weight(), matrices[0] + second.layers[0][0] @ second.layers[0][1])
    for reference, expected in (
        (BASE, base),
        (one.id, after_one),
        (two.id[:8], after_two),
        (BASE, base),
        (LATEST, after_two),
    ):
        bench.checkout(reference)
        assert hashes(lm) == expected, reference
    bench.revert(two.id)
    assert hashes(lm) == after_one
    bench.revert(one.id)
    assert hashes(lm) == base


def test_the_other_orientation(tmp_path: Path) -> None:
    """A model with nn.Linear and a gated FFN gives the same results as one with Conv1D."""
    lm = wrap(tiny_model("llama", **LLAMA), byte_tokenizer(bos=True))
    base, moments = hashes(lm), moments_of(lm)
    matrix = lm.module.model.layers[1].mlp.down_proj.weight.clone()
    with Workbench(lm, tmp_path) as bench:
        delta = some_delta(lm, 1)
        revision = bench.commit(delta)
        assert torch.equal(
            lm.module.model.layers[1].mlp.down_proj.weight,
            matrix + delta.layers[1][0] @ delta.layers[1][1],
        )
        outcome = bench.apply(FACT, config=QUICK, moments=moments, contexts=["{}"], force=True)
        assert outcome.revision is not None
        bench.revert(outcome.revision.id)
        bench.revert(revision.id)
        assert hashes(lm) == base


def test_subtracting_would_not_do(lm: LanguageModel, bench: Workbench) -> None:
    """W + Δ − Δ differs from W, so a revert that gives the base's bits did not subtract."""
    delta = some_delta(lm, 1)
    weight = lm.ffn[1].weight().clone()
    assert not torch.equal(weight + delta.dense(1) - delta.dense(1), weight)
    bench.revert(bench.commit(delta).id)
    assert torch.equal(lm.ffn[1].weight(), weight)


def test_opening_again_gives_the_same_bits(lm: LanguageModel, tmp_path: Path) -> None:
    base = hashes(lm)
    with Workbench(lm, tmp_path) as bench:
        bench.commit(some_delta(lm, 1))
        bench.commit(some_delta(lm, 2))
        patched = hashes(lm)
    assert hashes(lm) == base, "closing restores the base weights"
    other = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    with Workbench(other, tmp_path) as bench:
        assert hashes(other) == patched
        bench.checkout(BASE)
    with Workbench(other, tmp_path) as bench:
        assert hashes(other) == base, "a workspace with base checked out opens at base"
        with pytest.raises(WorkspaceError, match="checkout latest"):
            bench.commit(some_delta(other, 3))
        assert hashes(other) == base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_too(tmp_path: Path, dtype: torch.dtype) -> None:
    lm = wrap(tiny_model("gpt2", **GPT2).to(dtype), byte_tokenizer())
    base = lm.ffn[1].weight().clone()
    with Workbench(lm, tmp_path) as bench:
        delta = some_delta(lm, 1)
        revision = bench.commit(delta)
        assert torch.equal(lm.ffn[1].weight(), (base.float() + delta.dense(1)).to(dtype))
        bench.revert(revision.id)
        assert torch.equal(lm.ffn[1].weight(), base)
        assert bench.ledger.dtype == str(dtype).removeprefix("torch.")


def test_weights_changed_from_outside_are_noticed(lm: LanguageModel, bench: Workbench) -> None:
    delta = some_delta(lm, 1)
    with torch.no_grad():
        lm.ffn[1].weight()[0, 0] += 1
    with pytest.raises(FingerprintError, match="outside"):
        bench.commit(delta)
    assert bench.log() == []


def test_a_delta_for_other_weights_is_refused(lm: LanguageModel, bench: Workbench) -> None:
    stale = some_delta(lm, 1)
    bench.commit(some_delta(lm, 2))
    before = hashes(lm)
    with pytest.raises(FingerprintError, match="made on"):
        bench.commit(stale)
    assert hashes(lm) == before and len(bench.log()) == 1


def test_overflow_is_refused_before_it_is_recorded(tmp_path: Path) -> None:
    lm = wrap(tiny_model("gpt2", **GPT2).half(), byte_tokenizer())
    before = hashes(lm)
    with Workbench(lm, tmp_path) as bench:
        with pytest.raises(NumericsError):
            bench.commit(some_delta(lm, 1, scale=1e4))
        assert hashes(lm) == before and bench.log() == []


def test_a_damaged_delta_is_refused_and_an_older_revision_opens(
    lm: LanguageModel, tmp_path: Path
) -> None:
    with Workbench(lm, tmp_path) as bench:
        one = bench.commit(some_delta(lm, 1))
        after_one = hashes(lm)
        two = bench.commit(some_delta(lm, 2))
    base = hashes(lm)
    file = tmp_path / "deltas" / str(two.delta) / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(DamagedError, match=two.id[:10]) as refusal:
        Workbench(lm, tmp_path)
    assert f"factsmith checkout {one.id[:10]}" in str(refusal.value)
    assert hashes(lm) == base
    with Ledger(tmp_path) as ledger:
        ledger.checkout(one.id)
    with Workbench(lm, tmp_path) as bench:
        assert hashes(lm) == after_one
        with pytest.raises(DamagedError):
            bench.checkout(LATEST)
        assert hashes(lm) == after_one
