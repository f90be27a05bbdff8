"""Patches of another workspace are imported, solved again where the weights differ."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import GPT2, byte_tokenizer, tiny_model
from exports import appending
from factsmith.core.errors import FingerprintError, RevisionError, WorkspaceError
from factsmith.core.fact import Fact
from factsmith.edit.delta import Delta, applied
from factsmith.edit.resolve import resolve
from factsmith.keep.export.folder import read_patch
from factsmith.keep.ledger import Ledger
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from workbenches import DARRIEUX, FIAT, SPREADING, THREE, hashes, moments_of, some_delta


def test_patches_of_another_workspace_are_imported(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    moments = moments_of(lm)
    bench.apply(THREE[:1], "memit", SPREADING, moments=moments, force=True)
    bench.apply(THREE[1:2], "memit", SPREADING, moments=moments, force=True)
    state = hashes(lm)
    bench.export(tmp_path / "patch", format="patch")
    bench.close()
    with Workbench(lm, tmp_path / "same") as same:
        made = same.import_patches(tmp_path / "patch", force=True)
        assert len(made) == 2 and hashes(lm) == state, (
            "on the same weights the deltas are imported unchanged"
        )
        assert same.import_patches(tmp_path / "patch") == (), "no patch is imported twice"
    with Workbench(lm, tmp_path / "other") as other:
        other.apply(THREE[2:], "memit", SPREADING, moments=moments, force=True)
        state_of_other = hashes(lm)
        made = other.import_patches(tmp_path / "patch", moments=moments, force=True)
        assert len(made) == 2 and [r.in_effect for r in other.ledger.active()] == [
            (THREE[2],),
            (THREE[0],),
            (THREE[1],),
        ]
        original = read_patch(tmp_path / "patch").patches[0].delta
        again = Delta.load(other.ledger.delta_folder(made[0]))
        other.checkout(other.log()[-1].id)
        assert hashes(lm) == state_of_other
        expected = resolve(
            lm, original, moments=moments, beneath=[other._carried.deltas[other.log()[-1].id]]
        )
        for layer in again.layers:
            assert torch.allclose(again.dense(layer), expected.dense(layer), atol=1e-6)
            assert not torch.allclose(again.dense(layer), original.dense(layer), atol=1e-6)
    with Workbench(lm, tmp_path / "contrary") as contrary:
        against = Fact("Entity0", "The home of {} is", " z")
        contrary.apply([against], "memit", SPREADING, moments=moments, force=True)
        before = hashes(lm)
        with pytest.raises(RevisionError, match="revert that first"):
            contrary.import_patches(tmp_path / "patch", moments=moments)
        assert hashes(lm) == before and len(contrary.log()) == 1
    stranger = wrap(tiny_model("gpt2", seed=9, **GPT2), byte_tokenizer())
    with (
        Workbench(stranger, tmp_path / "stranger") as wrong,
        pytest.raises(FingerprintError, match="was made for"),
    ):
        wrong.import_patches(tmp_path / "patch")


def test_appended_neurons_are_imported_as_they_are(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    """Bit for bit, also next to patches that the other workspace did not have."""
    rows = appending(lm, 1, {0: 2, 1: 5})
    bench.commit(rows)
    state = wide_hashes(lm)
    bench.export(tmp_path / "patch", format="patch")
    bench.close()
    with Workbench(lm, tmp_path / "same") as same:
        (made,) = same.import_patches(tmp_path / "patch", force=True)
        assert wide_hashes(lm) == state
        assert Delta.load(same.ledger.delta_folder(made)).digest == rows.digest
        assert same.import_patches(tmp_path / "patch") == ()
    assert wide_hashes(lm) != state
    with Workbench(lm, tmp_path / "other") as other:
        low = some_delta(lm, 4, (0, 1))
        other.commit(low)
        (made,) = other.import_patches(tmp_path / "patch", force=True)
        assert Delta.load(other.ledger.delta_folder(made)).digest == rows.digest
        now = wide_hashes(lm)
        with other.on_base(), applied(lm, [low, rows]):
            assert wide_hashes(lm) == now
    stranger = wrap(tiny_model("gpt2", seed=9, **GPT2), byte_tokenizer())
    with (
        Workbench(stranger, tmp_path / "stranger") as wrong,
        pytest.raises(FingerprintError, match="was made for"),
    ):
        wrong.import_patches(tmp_path / "patch")


def wide_hashes(lm: LanguageModel) -> dict[str, str]:
    """Return the sha256 of every tensor, also of a widened model."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in lm.module.state_dict().items()
    }


def test_all_patches_are_imported_or_none(
    atlas_bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atlas_bench.apply(FIAT)
    atlas_bench.apply(DARRIEUX)
    atlas_bench.export(tmp_path / "out", format="patch")
    lm = atlas_bench.lm
    atlas_bench.close()
    with Workbench(lm, tmp_path / "theirs") as theirs:
        store, calls = Ledger._store, []

        def full(ledger: Ledger, write: Callable[[Path], object]) -> tuple[str, int]:
            calls.append(write)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return store(ledger, write)

        before = hashes(lm)
        with monkeypatch.context() as patching:
            patching.setattr(Ledger, "_store", full)
            with pytest.raises(WorkspaceError, match="nothing was recorded"):
                theirs.import_patches(tmp_path / "out")
        assert theirs.log() == [] and hashes(lm) == before and len(calls) == 2
        assert (
            len(theirs.import_patches(tmp_path / "out")) == 2
            and [r.state for r in theirs.log()] == ["active"] * 2
        )
    with Workbench(lm, tmp_path / "another") as another:
        another.apply(Fact("Fiat 127", "{} is made by", "Honda"))
        with pytest.raises(RevisionError, match="Honda"):  # the same question in other words
            another.import_patches(tmp_path / "out")
        assert len(another.log()) == 1
