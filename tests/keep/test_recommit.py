"""Patches that lost their record are told from other files, kept, and committed again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from exports import some_delta
from factsmith.core.errors import WorkspaceError
from factsmith.keep.ledger import Ledger
from factsmith.keep.recommit import recover_patches
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from ledgers import delta_of, lose_records
from workbenches import some_rows


def _workspace(lm: LanguageModel, folder: Path, n: int = 3) -> list[str]:
    """Commit some patches, each made on the one before, and return their deltas."""
    with Workbench(lm, folder) as bench:
        for seed in range(1, n + 1):
            bench.commit(some_delta(lm, seed), message=f"patch {seed}")
        return [str(each.delta) for each in bench.log()[::-1]]


def test_gc_keeps_what_can_be_read_as_a_patch(lm: LanguageModel, tmp_path: Path) -> None:
    deltas = _workspace(lm, tmp_path)
    lose_records(tmp_path, 1)
    delta_of("loose")(tmp_path / "deltas" / ("0" * 64))
    with Ledger(tmp_path) as ledger:
        patches = {patch.delta: patch for patch in ledger.unrecorded()}
        assert set(patches) == set(deltas[1:])
        patch = patches[deltas[1]]
        fact = some_delta(lm, 2).facts[0]
        assert (patch.method, patch.facts[0]) == (some_delta(lm, 2).method, str(fact))
        integrity = ledger.verify()
        assert len(integrity.orphans) == 3 and set(integrity.unrecorded) == set(patches.values())
        assert ledger.gc() == ("0" * 64,)
        assert {each.delta for each in ledger.unrecorded()} == set(deltas[1:])
        edit = tmp_path / "deltas" / deltas[1] / "edit.json"
        edit.write_bytes(edit.read_bytes().replace(b'"facts"', b'"facst"'))
        assert ledger.gc() == (deltas[1],), "what does not match its checksum is no patch"
        assert ledger.gc(patches=True, dry_run=True) == (deltas[2],) == ledger.gc(patches=True)
        assert ledger.verify().orphans == ()


def test_rows_without_a_record_are_described_and_come_back(
    lm: LanguageModel, tmp_path: Path
) -> None:
    with Workbench(lm, tmp_path) as bench:
        bench.commit(some_delta(lm, 1))
        rows = some_rows(lm, 2, (0, 1))
        revision = bench.commit(rows)
        patched = lm.fingerprint
    lose_records(tmp_path, 1)
    with Workbench(lm, tmp_path) as bench:
        (patch,) = bench.ledger.unrecorded()
        assert patch.layers == (0, 1) and patch.method == "append"
        assert lm.fingerprint != patched
        (again,) = recover_patches(bench)
        assert (again.delta, again.appended) == (revision.delta, {0: 4, 1: 4})
        assert lm.fingerprint == patched and bench.rebuild().orphans == ()


def test_patches_come_back_in_the_order_they_were_made(lm: LanguageModel, tmp_path: Path) -> None:
    deltas = _workspace(lm, tmp_path, 4)
    with Workbench(lm, tmp_path) as bench:
        patched = lm.fingerprint
        assert recover_patches(bench) == ()
    lose_records(tmp_path, 1)
    with Workbench(lm, tmp_path) as bench:
        assert lm.fingerprint != patched
        revisions = recover_patches(bench)
        assert [each.delta for each in revisions] == deltas[1:] and lm.fingerprint == patched
        assert revisions[0].message.startswith("recovered: ")
        assert bench.rebuild().orphans == () and recover_patches(bench) == ()


def test_patches_that_do_not_fit_stay(lm: LanguageModel, tmp_path: Path) -> None:
    deltas = _workspace(lm, tmp_path, 3)
    shutil.copytree(tmp_path / "deltas" / deltas[1], tmp_path.with_name("aside"))
    lose_records(tmp_path, 1)
    shutil.rmtree(tmp_path / "deltas" / deltas[1])
    with Workbench(lm, tmp_path) as bench:
        assert recover_patches(bench) == () and len(bench.log()) == 1
        assert [each.delta for each in bench.ledger.unrecorded()] == [deltas[2]]
        twins = [some_delta(lm, seed) for seed in (7, 8)]
        for n, delta in enumerate(twins):
            delta.save(tmp_path / "deltas" / (str(n) * 64))
        with pytest.raises(WorkspaceError, match=r"2 patches .* made on the same weights"):
            recover_patches(bench)
        assert len(bench.log()) == 1
