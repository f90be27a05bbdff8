"""A revision is exported without moving the ledger's checkout or the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from factsmith.core.errors import InputError, RevisionError
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from workbenches import hashes, some_delta


def exported_after_checkout(bench: Workbench, folder: Path, reference: str) -> dict[str, bytes]:
    """Return the files of an export that is made with the revision checked out."""
    before = bench.ledger.current
    bench.checkout(reference)
    files = exported(bench, folder)
    bench.checkout(before)
    return files


def exported(
    bench: Workbench, folder: Path, revision: str | None = None, format: str = "checkpoint"
) -> dict[str, bytes]:
    """Return the files of an export by their names."""
    bench.export(folder, format, revision=revision, verify=False)
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_of_a_revision_is_the_export_after_its_checkout(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    one = bench.commit(some_delta(lm, 1, (0,)))
    two = bench.commit(some_delta(lm, 2, (1, 2)))
    undone = bench.revert(one.id, force=True)
    state = hashes(lm)
    files = {
        each.id: exported_after_checkout(bench, tmp_path / f"checkout {each.number}", each.id)
        for each in (one, two, undone)
    }
    assert len({parts["model.safetensors"] for parts in files.values()}) == 3
    assert hashes(lm) == state
    for reference in (one.id, two.id[:8], "latest"):
        identity = bench.ledger.resolve(reference)
        assert exported(bench, tmp_path / reference, reference) == files[identity]
        assert (bench.ledger.current, hashes(lm)) == (undone.id, state)
    assert exported(bench, tmp_path / "now") == files[undone.id]
    bench.rebuild()


def test_a_revision_is_exported_from_a_checkout_of_the_base(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    one = bench.commit(some_delta(lm, 1, (1,)))
    bench.commit(some_delta(lm, 2, (2,)))
    expected = exported_after_checkout(bench, tmp_path / "expected", one.id)
    bench.checkout("base")
    base = hashes(lm)
    assert exported(bench, tmp_path / "out", one.id) == expected
    assert (bench.ledger.current, hashes(lm)) == ("base", base)


def test_what_cannot_be_exported_is_refused(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    bench.commit(some_delta(lm, 1, (1,)))
    state = hashes(lm)
    with pytest.raises(InputError, match=r"revision is 'base': no patch is in effect there"):
        bench.export(tmp_path / "out", "checkpoint", revision="base")
    with pytest.raises(RevisionError):
        bench.export(tmp_path / "out", "checkpoint", revision="0123456789")
    assert hashes(lm) == state and not (tmp_path / "out").exists()
