"""Exchanged or damaged deltas, ledgers and models are refused, and nothing changes."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from factsmith.core.errors import DamagedError, FingerprintError, WorkspaceError
from factsmith.keep.ledger import BASE, LATEST, Ledger
from faults.spaces import linux_only, whole_state

pytestmark = linux_only


def _harm(harm: str, folder: Path, other: Path) -> None:
    """Damage the delta in `folder`, or exchange it for `other`."""
    file = folder / "delta.safetensors"
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "swapped":
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
    elif harm == "one file swapped":
        shutil.copy(other / file.name, file)
    elif harm == "a link to its file":
        file.rename(folder.parent.parent / "elsewhere")
        file.symlink_to(folder.parent.parent / "elsewhere")
    elif harm == "a link to its folder":
        folder.rename(folder.parent.parent / "elsewhere")
        folder.symlink_to(folder.parent.parent / "elsewhere")
    elif harm == "a link to nothing":
        shutil.rmtree(folder)
        folder.symlink_to(folder.parent.parent / "nowhere")
    elif harm == "a pipe":
        file.unlink()
        os.mkfifo(file)
    elif harm == "a file":
        shutil.rmtree(folder)
        folder.write_bytes(b"")
    elif harm == "a folder in it":
        (folder / "more").mkdir()
    else:
        shutil.rmtree(folder)


HARMS = (
    "truncated", "swapped", "one file swapped", "a link to its file", "a link to its folder",
    "a link to nothing", "a pipe", "a file", "a folder in it", "gone",
)  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_an_exchanged_or_damaged_delta_is_refused(lm: Any, tmp_path: Path, harm: str) -> None:
    """Ledger and workbench refuse and say what to do. A new commit of the delta repairs it."""
    from exports import some_delta
    from factsmith.keep.workbench import Workbench

    space = tmp_path / "space"
    with Workbench(lm, space) as bench:
        delta = some_delta(lm, 1)
        one, two = bench.commit(delta), bench.commit(some_delta(lm, 2, (2,)))
        places = [bench.ledger.delta_folder(revision) for revision in (one, two)]
    _harm(harm, *places)
    before, base = whole_state(space), lm.fingerprint
    with Ledger(space) as ledger:
        for use in (
            ledger.verify,
            ledger.status,
            lambda: ledger.checkout(one.id),
            lambda: ledger.revert(two.id),
        ):
            with pytest.raises(
                DamagedError, match=r"backup, or go back with `factsmith checkout base"
            ):
                use()
    with pytest.raises(DamagedError, match=one.id[:10]):
        Workbench(lm, space)
    assert lm.fingerprint == base and whole_state(space) == before
    with Ledger(space) as ledger:
        ledger.checkout(BASE)
    with Workbench(lm, space) as bench, pytest.raises(DamagedError):
        bench.checkout(LATEST)
    assert lm.fingerprint == base
    with Ledger(space) as ledger:
        ledger._database.check_out(two.id)
        ledger.commit(delta.save, onto=two.id, method="rome", facts=delta.facts, layers=[1])
        assert ledger.verify().deltas == 2


def test_newer_ledgers_and_other_models_are_refused(lm: Any, tmp_path: Path) -> None:
    from conftest import GPT2, byte_tokenizer, tiny_model
    from exports import some_delta
    from factsmith.keep.workbench import Workbench
    from factsmith.model.load import wrap

    space = tmp_path / "space"
    with Workbench(lm, space) as bench:
        bench.commit(some_delta(lm, 1))
    before = whole_state(space)
    stranger = wrap(tiny_model("gpt2", seed=5, **GPT2), byte_tokenizer())
    fingerprint = stranger.fingerprint
    with pytest.raises(FingerprintError, match="Load that model without patches"):
        Workbench(stranger, space)
    assert stranger.fingerprint == fingerprint and whole_state(space) == before
    db = sqlite3.connect(space / "ledger.db")
    db.execute("PRAGMA user_version = 4")
    db.close()
    before = whole_state(space)
    for use in (lambda: Ledger(space), lambda: Workbench(lm, space)):
        with pytest.raises(WorkspaceError, match=r"ledger format 4.*pip install -U factsmith"):
            use()
    assert whole_state(space) == before
