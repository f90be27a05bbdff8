"""Full and read-only disks leave the workspace and the model unchanged."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from factsmith.core.errors import WorkspaceError
from factsmith.keep.ledger import BASE, LATEST, Ledger
from factsmith.keep.revision import Revision
from faults.spaces import commit, delta_of, linux_only, whole_state

pytestmark = linux_only


def _revert_in_the_middle(ledger: Ledger) -> Revision:
    """Revert the first patch, with another solution for the second."""
    first = ledger.log()[-1]
    again = [step.patch.id for step in ledger.undoing(first.id) if step.solve]
    assert len(again) == 1
    return ledger.revert(first.id, solved={again[0]: delta_of("two again")})


WRITES: dict[str, Callable[[Ledger], object]] = {
    "commit": lambda ledger: commit(ledger, "four"),
    "revert": lambda ledger: ledger.revert(LATEST),
    "revert in the middle": _revert_in_the_middle,
    "checkout": lambda ledger: ledger.checkout(BASE),
}


def _unchanged(folder: Path, before: dict[str, str]) -> bool:
    """Return True if nothing changed, and False if only deltas without a revision were left."""
    now = whole_state(folder)
    assert (
        now["ledger.db"] == before["ledger.db"]
        and {name: now.get(name) for name in before} == before
    )
    if now == before:
        return True
    with Ledger(folder) as ledger:
        ledger.gc()
    assert whole_state(folder) == before
    return False


@contextmanager
def _fails(
    monkeypatch: pytest.MonkeyPatch, name: str, at: int, error: OSError
) -> Iterator[list[int]]:
    """Let a function of `os` fail after `at` calls, as on a full disk."""
    real, calls = getattr(os, name), [0]

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > at:
            raise error
        return real(*arguments, **options)

    with monkeypatch.context() as patching:
        patching.setattr(os, name, wrapped)
        yield calls


@pytest.mark.parametrize("write", ["commit", "revert in the middle"])
def test_a_disk_that_fills_up_at_any_point_leaves_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    before, at = whole_state(ledger.folder), 0
    while True:
        with _fails(
            monkeypatch, "fsync", at, OSError(errno.ENOSPC, "No space left on device")
        ) as calls:
            try:
                WRITES[write](ledger)
                break
            except WorkspaceError as error:
                assert "The disk is full" in str(error) and "Free some space" in str(error)
                assert calls[0] > at
        _unchanged(ledger.folder, before)
        at += 1
    assert at >= 3, "the files, their folder and its parent are flushed"
    assert ledger.verify().revisions == 4


@contextmanager
def _files_of_at_most(n: int) -> Iterator[None]:
    """Limit files to n bytes. The system refuses longer writes, also those of SQLite."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", WRITES)
def test_files_that_cannot_grow_leave_nothing(ledger: Ledger, write: str) -> None:
    """Depending on the limit, a write to the delta's files or to the database is refused."""
    folder = ledger.folder
    ledger.close()
    before, refused = whole_state(folder), set()
    for limit in (0, 10, 100, 1000, 2000, 4000, 5000, 8000, 12_000, 20_000, 36_000):
        with _files_of_at_most(limit):
            try:
                with Ledger(folder) as opened:
                    WRITES[write](opened)
            except WorkspaceError as error:
                assert re.search(
                    "Free some space|Make it writable, or use a copy|Cannot write to", str(error)
                ), error
                refused.add(limit)
            else:
                break
        _unchanged(folder, before)
    assert {0, 100, 1000} <= refused
    with Ledger(folder) as opened:
        assert opened.verify().revisions == 3 + (write != "checkout") * (limit not in refused)
        opened.checkout(LATEST)
        commit(opened, "five")


def test_a_full_disk_leaves_model_and_workspace_as_they_were(
    lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exports import some_delta
    from factsmith.keep.workbench import Workbench

    with Workbench(lm, tmp_path / "space") as bench:
        first = bench.commit(some_delta(lm, 1))
        before, carried, at = whole_state(tmp_path / "space"), lm.fingerprint, 0
        while True:
            with _fails(monkeypatch, "fsync", at, OSError(errno.ENOSPC, "No space left on device")):
                try:
                    bench.commit(some_delta(lm, 2))
                    break
                except WorkspaceError as error:
                    assert re.search("(?i)the disk is full.*free some space", str(error))
            _unchanged(tmp_path / "space", before)
            assert lm.fingerprint == carried and bench.ledger.current == first.id
            at += 1
        assert at >= 5 and lm.fingerprint != carried and len(bench.log()) == 2


@pytest.mark.parametrize("write", [*WRITES, "gc"])
def test_a_read_only_workspace_is_refused_before_any_change(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    """`os.access` reports a read-only folder, because root can write to a real one.

    tests/keep/test_database.py tests a folder of another user.
    """
    delta_of("loose")(ledger.folder / "deltas" / ("0" * 64))
    before = whole_state(ledger.folder)
    with monkeypatch.context() as patching:
        patching.setattr(os, "access", lambda _, mode, **__: not mode & os.W_OK)
        with Ledger(ledger.folder) as opened:
            with pytest.raises(
                WorkspaceError, match=r"cannot be written: .*Make it writable, or use a copy"
            ):
                WRITES.get(write, Ledger.gc)(opened)
            assert len(opened.log()) == 3 and opened.verify().orphans == ("0" * 64,)
    assert whole_state(ledger.folder) == before
    WRITES.get(write, Ledger.gc)(ledger)  # control
    assert whole_state(ledger.folder) != before
