"""Ledgers on network disks, on read-only and on full ones: all revisions are seen, or none."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from factsmith.core.errors import DamagedError, WorkspaceError
from factsmith.keep import connection as module
from factsmith.keep.connection import is_on_network
from factsmith.keep.ledger import BASE, Ledger
from ledgers import FINGERPRINT, commit

REAL = sqlite3.connect


def _mode_of(folder: Path) -> str:
    """Return the journal mode that the file's header says."""
    with (folder / "ledger.db").open("rb") as file:
        return "wal" if file.read(20)[18:19] == b"\x02" else "rollback"


class Disk:
    """A network disk without shared memory, in one of the ways in which it shows."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def connect(self, *arguments: Any, **options: Any) -> sqlite3.Connection:
        disk = self

        class Connection(sqlite3.Connection):
            exclusive = False

            def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
                self.exclusive |= "locking_mode = EXCLUSIVE" in sql
                if "journal_mode = WAL" in sql:
                    if disk.kind == "the pragma fails":
                        raise sqlite3.OperationalError("locking protocol")
                    if disk.kind == "the pragma is ignored":
                        return super().execute("PRAGMA journal_mode")
                elif "PRAGMA" not in sql and not self.exclusive:
                    path = super().execute("PRAGMA database_list").fetchone()[2]
                    is_log = path and _mode_of(Path(path).parent) == "wal"
                    if disk.kind == "no locks" or (disk.kind == "the log fails" and is_log):
                        raise sqlite3.OperationalError("locking protocol")
                return super().execute(sql, *rest)

        return REAL(*arguments, **{**options, "factory": Connection})


@pytest.mark.parametrize("kind", ["the pragma fails", "the pragma is ignored", "the log fails"])
def test_a_network_disk_gets_a_rollback_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(sqlite3, "connect", Disk(kind).connect)
    with Ledger.create(tmp_path / "space", model="gpt2", fingerprint=FINGERPRINT) as ledger:
        first, second = commit(ledger, "one"), commit(ledger, "two")
        with Ledger(ledger.folder) as other:
            assert [each.id for each in other.log()] == [second.id, first.id]
            other.revert(second.id)
        assert ledger.verify().revisions == 3
    assert _mode_of(tmp_path / "space") == "rollback"


def test_a_ledger_that_was_moved_to_a_network_disk_is_read_and_written(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("one", "two", "three"):
        commit(ledger, text)
    moved = ledger.folder.with_name("moved")
    shutil.copytree(ledger.folder, moved)  # with a log that was not yet joined
    (moved / "ledger.db-shm").unlink()
    assert (moved / "ledger.db-wal").stat().st_size and _mode_of(moved) == "wal"
    monkeypatch.setattr(sqlite3, "connect", Disk("the log fails").connect)
    with Ledger(moved) as opened:
        assert [each.message for each in opened.log()] == ["three", "two", "one"]
        commit(opened, "four")
    assert _mode_of(moved) == "rollback"


def test_a_disk_without_locks_is_named(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(ledger, "one")
    ledger.close()
    monkeypatch.setattr(sqlite3, "connect", Disk("no locks").connect)
    words = r"network disks.*Keep the workspace on a local disk"
    with pytest.raises(WorkspaceError, match=words):
        Ledger.create(tmp_path / "new", model="gpt2", fingerprint=FINGERPRINT)


def test_a_local_disk_keeps_its_log(ledger: Ledger) -> None:
    assert _mode_of(ledger.folder) == "wal"


def test_the_kind_of_a_disk_is_read_from_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    root = str(tmp_path.resolve())
    lines = [
        "22 1 0:21 / / rw - ext4 /dev/sda1 rw",
        f"23 22 0:22 / {root}/net\\040disk rw shared:1 - nfs4 server:/x rw",
        f"24 22 0:23 / {root}/net\\040disk/local rw - ext4 /dev/sdb1 rw",
        f"25 22 0:24 / {root}/tunnel rw - fuse.sshfs host:/x rw",
    ]
    mounts.write_text("\n".join(lines))
    monkeypatch.setattr(module, "_MOUNTS", mounts)
    places = {"net disk": True, "net disk/a/b": True, "net disk/local/a": False, "tunnel": True}
    for place, expected in {**places, "other": False}.items():
        assert is_on_network(tmp_path / place / "ledger.db") is expected
    with Ledger.create(tmp_path / "net disk" / "a", model="m", fingerprint=FINGERPRINT) as made:
        assert _mode_of(made.folder) == "rollback" and commit(made, "one").number == 1
    monkeypatch.setattr(module, "_MOUNTS", tmp_path / "nowhere")
    assert not is_on_network(tmp_path / "net disk" / "ledger.db")


# ── disks that cannot be written ──────────────────────────────────────────────────────────────────


def _half_joined(ledger: Ledger) -> Path:
    """Return a copy of a workspace with six revisions: three in ledger.db, three in its log."""
    for text in ("one", "two", "three"):
        commit(ledger, text)
    ledger._database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for text in ("four", "five", "six"):
        commit(ledger, text)
    copy = ledger.folder.with_name("copy")
    shutil.copytree(ledger.folder, copy)
    return copy


def _is_read_whole(folder: Path) -> None:
    """Check that a workspace shows all six revisions, and refuses to be written."""
    with Ledger(folder) as opened:
        assert [each.message for each in opened.log()][::-1] == [
            *("one", "two", "three"),
            *("four", "five", "six"),
        ]
        assert opened.status().integrity.deltas == 6 and len(opened.active()) == 6
        with pytest.raises(WorkspaceError, match=r"cannot be written|The disk is full"):
            opened.checkout(BASE)


@pytest.mark.parametrize("shm", ["no -shm", "with -shm"])
@pytest.mark.parametrize("answer", ["unable to open database file", "disk I/O error", "full"])
def test_a_log_that_cannot_be_opened_is_read_all_the_same(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, shm: str, answer: str
) -> None:
    folder = _half_joined(ledger)
    if shm == "no -shm":
        (folder / "ledger.db-shm").unlink()

    class Connection(sqlite3.Connection):
        def __init__(self, address: str, *rest: Any, **options: Any) -> None:
            self.in_memory = address == ":memory:"
            super().__init__(address, *rest, **options)

        def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
            if "sqlite_master" in sql and not self.in_memory:
                raise sqlite3.OperationalError(answer)
            return super().execute(sql, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *a, **k: REAL(*a, **{**k, "factory": Connection}))
        _is_read_whole(folder)


def test_a_backup_without_the_log_is_not_shown_as_the_whole(ledger: Ledger) -> None:
    folder = _half_joined(ledger)
    for ending in ("wal", "shm"):
        (folder / f"ledger.db-{ending}").unlink()
    with pytest.raises(DamagedError, match=r"3 revisions are in .* and not in its ledger\.db"):
        Ledger(folder)


@contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[None]:
    """Mount something at a folder, where that is permitted."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("only root can mount")
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is not permitted")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("shm", ["no -shm", "with -shm"])
def test_a_read_only_disk_shows_every_revision(ledger: Ledger, shm: str) -> None:
    folder = _half_joined(ledger)
    if shm == "no -shm":
        (folder / "ledger.db-shm").unlink()
    with _mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        _is_read_whole(folder)


@pytest.mark.parametrize("joined", [True, False])
def test_a_full_disk_can_be_read(ledger: Ledger, tmp_path: Path, joined: bool) -> None:
    folder, disk = _half_joined(ledger), tmp_path / "disk"
    if joined:
        with Ledger(folder):
            pass
    assert (folder / "ledger.db-wal").exists() != joined
    disk.mkdir()
    with _mounted(disk, "-t", "tmpfs", "-o", "size=600k", "none"):
        space = disk / "space"
        shutil.copytree(folder, space)
        (space / "ledger.db-shm").unlink(missing_ok=True)
        with pytest.raises(OSError, match="No space") as caught, (disk / "ballast").open("wb") as f:
            while True:
                f.write(bytes(4096))
                f.flush()
        assert caught.value.errno == errno.ENOSPC
        _is_read_whole(space)
        with Ledger(space) as opened, pytest.raises(WorkspaceError, match="The disk is full"):
            commit(opened, "seven")
        (disk / "ballast").unlink()
        with Ledger(space) as opened:
            assert commit(opened, "seven").number == 7


_ANOTHER_USER = """
import os, sys
from factsmith.keep.ledger import Ledger
from factsmith.core.errors import FactsmithError
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    with Ledger(sys.argv[1]) as ledger:
        print(len(ledger.log()))
except FactsmithError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        ("no -shm", "6"),
        ("-shm is private", "6"),
        ("-wal is private", "cannot be written: Permission denied|cannot be read"),
        ("no -wal", "3 revisions are in"),
    ],
)
def test_another_user_sees_every_revision(ledger: Ledger, harm: str, expected: str) -> None:
    folder = _half_joined(ledger)
    wal, shm = folder / "ledger.db-wal", folder / "ledger.db-shm"
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)
    if harm.startswith("no"):
        folder.chmod(0o755)
        (wal if harm == "no -wal" else shm).unlink()
        folder.chmod(0o555)
    else:
        (wal if harm == "-wal is private" else shm).chmod(0o000)
    done = subprocess.run(
        [sys.executable, "-c", _ANOTHER_USER, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    for path in paths:
        if path.exists():
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.returncode == 0, done.stderr
    assert any(word in done.stdout for word in expected.split("|")), done.stdout
