"""Hidden folders of killed exports go, and those of living processes stay."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exports import names
from factsmith.core import leftovers as module
from factsmith.core.errors import WorkspaceError
from factsmith.core.leftovers import OLDER, WRITING, held, leftovers, remove_leftovers
from factsmith.keep.export.staging import staged
from factsmith.keep.ledger import Ledger

_EXPORT = """
import sys, time
from factsmith.keep.export.staging import staged
with staged(sys.argv[1], False) as folder:
    (folder / "part").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


def _killed_export(target: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _EXPORT, str(target)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        hidden = [name for name in names(target.parent) if name.startswith(".")]
        assert hidden and remove_leftovers(target.parent) == (), "it is alive"
        process.send_signal(signal.SIGKILL)
    assert [name for name in names(target.parent) if name.startswith(".")] == hidden


def test_the_next_export_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    _killed_export(tmp_path / "out")
    with staged(tmp_path / "another", False) as living, staged(tmp_path / "out", False) as folder:
        hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert sorted(hidden) == sorted([living.name, folder.name])
    assert names(tmp_path) == ["another", "out"]


def test_gc_removes_what_a_killed_export_left_in_the_workspace(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "space", model="m", fingerprint="ab" * 32) as ledger:
        _killed_export(tmp_path / "space/out")
        with held(tmp_path / "space", "mine", WRITING) as living:
            (name,) = ledger.gc(dry_run=True)
            assert name.startswith(".out.writing-") and (ledger.folder / name).is_dir()
            assert ledger.gc() == (name,) and ledger.gc() == () and living.is_dir()


def test_an_earlier_export_that_was_moved_aside_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("earlier")
    with held(tmp_path, "out", OLDER, source=tmp_path / "out") as older:
        assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []
    assert remove_leftovers(tmp_path) == (older.name,)
    assert names(tmp_path) == ["out", "out/file"]
    with held(tmp_path, "out", OLDER, source=tmp_path / "out"):
        (tmp_path / "out").mkdir()  # by an export that finished and was then killed
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("elsewhere", ["another machine", "a disk without locks"])
def test_what_cannot_be_seen_stays_for_a_week(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: str
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    with monkeypatch.context() as patch:
        if elsewhere == "another machine":
            patch.setattr(module, "_machine", lambda: "0" * 8)
        else:
            patch.setattr(fcntl, "flock", no_locks)
        with held(tmp_path, "out", WRITING) as folder:
            (folder / "part").write_text("x")
    assert remove_leftovers(tmp_path) == ()
    month_ago = time.time() - 30 * 24 * 3600
    os.utime(folder / "part", (month_ago, month_ago))
    assert remove_leftovers(tmp_path) == (), "the folder itself is new"
    os.utime(folder, (month_ago, month_ago))
    assert remove_leftovers(tmp_path) == (folder.name,)


def test_other_hidden_folders_stay(tmp_path: Path) -> None:
    for name in (".git", ".out.0123456789abcdef", ".out.writing-1", "out.writing-" + "0" * 8):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    (tmp_path / f".link.writing-{module._machine()}-{'0' * 16}").symlink_to(tmp_path / ".git")
    assert remove_leftovers(tmp_path) == () and set(before) < set(names(tmp_path))
    assert leftovers(tmp_path / "nowhere") == []


def test_an_export_beside_a_cleaner_is_never_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may lock and remove the new folder before its owner locks it."""
    lock, taken = module._lock, []

    def late(folder: Path) -> tuple[int | None, bool]:
        if len(taken) < 2:
            taken.append(folder)
            folder.rmdir()
        return lock(folder)

    monkeypatch.setattr(module, "_lock", late)
    with held(tmp_path, "out", WRITING) as folder:
        assert folder.is_dir() and folder not in taken and leftovers(tmp_path) == []
    monkeypatch.setattr(module, "_lock", lambda folder: (None, False))
    with (
        pytest.raises(WorkspaceError, match="being cleaned up"),
        staged(tmp_path / "out", False),
    ):
        pass
