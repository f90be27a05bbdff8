"""The weights are the base plus the sum of the active deltas, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import (
    DamagedError,
    FingerprintError,
    InputError,
    NumericsError,
    WorkspaceError,
)
from factsmith.edit.delta import applied, homes, write_weights
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


def change_in_memory(lm: LanguageModel, layer: int) -> None:
    """Change weights so that neither PyTorch's counter nor a few samples show it."""
    flat = lm.ffn[layer].down.get_parameter("weight").data.numpy().reshape(-1)
    flat[flat.size // 2 + 5] += 1


@pytest.mark.parametrize(
    "verb", ["commit", "apply", "revert", "checkout", "import", "export", "rebuild", "diff"]
)
def test_weights_changed_in_memory_are_noticed(
    lm: LanguageModel, tmp_path: Path, verb: str
) -> None:
    with Workbench(lm, tmp_path / "space") as bench:
        one = bench.commit(some_delta(lm, 1))
        bench.export(tmp_path / "patch", format="patch")
        delta, state, log = some_delta(lm, 2), hashes(lm), bench.log()
        change_in_memory(lm, 1)
        assert hashes(lm) != state and lm.fingerprint == delta.fingerprint, "the counter is blind"
        calls = {
            "commit": lambda: bench.commit(delta),
            "apply": lambda: bench.apply(FACT, config=QUICK),
            "revert": lambda: bench.revert(one.id),
            "checkout": lambda: bench.checkout(BASE),
            "import": lambda: bench.import_patches(tmp_path / "patch", force=True),
            "export": lambda: bench.export(tmp_path / "out", format="patch"),
            "rebuild": bench.rebuild,
            "diff": lambda: bench.diff(BASE),
        }
        with pytest.raises(FingerprintError, match=r"layer 1 were (changed outside|not base)"):
            calls[verb]()
        assert bench.log() == log
        if verb != "rebuild":
            with pytest.raises(FingerprintError, match="were built again"):
                bench.rebuild()
        assert hashes(lm) == state
        assert bench.rebuild().revisions == 1
        assert bench.commit(some_delta(lm, 2)).state == "active"


def test_a_base_changed_in_memory_is_noticed(lm: LanguageModel, tmp_path: Path) -> None:
    before = lm.fingerprint
    change_in_memory(lm, 2)
    assert lm.fingerprint == before, "the counter is blind"
    with pytest.raises(FingerprintError, match=r"was made for|Load that model"):
        Workbench(lm, tmp_path / "made").close()
        change_in_memory(lm, 2)
        Workbench(lm, tmp_path / "made")
    other = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    with Workbench(other, tmp_path / "space") as bench:
        bench.commit(some_delta(other, 1))
        delta = some_delta(other, 2, (2,))
        change_in_memory(other, 2)
        with pytest.raises(FingerprintError, match=r"layer 2 .* not the base's; load the model"):
            bench.commit(delta)
        assert len(bench.log()) == 1
        with pytest.raises(FingerprintError, match="not the base model any more"):
            bench.rebuild()


def tied(family: str, part: str) -> LanguageModel:
    """A tiny model whose layers share their feed-forward part, or its down-projection."""
    module = tiny_model(family, **(GPT2 if family == "gpt2" else LLAMA))
    layers = module.transformer.h if family == "gpt2" else module.model.layers
    down = "c_proj" if family == "gpt2" else "down_proj"
    for layer in layers[1:]:
        if part == "module":
            layer.mlp = layers[0].mlp
        else:
            getattr(layer.mlp, down).weight = getattr(layers[0].mlp, down).weight
    return wrap(module, byte_tokenizer(bos=family == "llama"))


@pytest.mark.parametrize("part", ["module", "parameter"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_layers_that_share_a_matrix(tmp_path: Path, family: str, part: str) -> None:
    lm = tied(family, part)
    assert homes(lm) == {0: 0, 1: 0, 2: 0}
    base, matrix = hashes(lm), lm.ffn[0].weight().clone()
    with Workbench(lm, tmp_path) as bench:
        first = some_delta(lm, 1, (0,))
        one = bench.commit(first)
        second = some_delta(lm, 2, (1, 2))
        two = bench.commit(second)
        total = matrix + first.dense(0) + second.dense(1) + second.dense(2)
        assert torch.equal(lm.ffn[2].weight(), total), "every update is in the one matrix"
        state = hashes(lm)
        bench.checkout(BASE)
        assert hashes(lm) == base
        with applied(lm, [first, second]):
            assert torch.equal(lm.ffn[0].weight(), total)
        assert hashes(lm) == base
        bench.checkout(LATEST)
        assert hashes(lm) == state and bench.rebuild().revisions == 2
        bench.revert(two.id)
        assert torch.equal(lm.ffn[1].weight(), matrix + first.dense(0))
        bench.revert(one.id)
        assert hashes(lm) == base
        bench.commit(some_delta(lm, 3, (2,)))
    assert hashes(lm) == base, "closing restores the base weights"
    twice = {0: matrix, 1: matrix + 1}
    with pytest.raises(InputError, match="share a matrix"):
        write_weights(lm, twice)
    assert hashes(lm) == base


def test_layers_with_matrices_of_their_own(lm: LanguageModel) -> None:
    assert homes(lm) == {0: 0, 1: 1, 2: 2}
