"""The bytes of a database and its log are joined as SQLite itself joins them."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from factsmith.core.errors import WorkspaceError
from factsmith.keep import image as module
from factsmith.keep.image import image


def _dump(connection: sqlite3.Connection) -> list[str]:
    with connection:
        lines = list(connection.iterdump())
    connection.close()
    return lines


def _by_image(file: Path) -> list[str]:
    connection = sqlite3.connect(":memory:")
    connection.deserialize(image(file))
    return _dump(connection)


def _by_sqlite(file: Path) -> list[str]:
    """What SQLite reads, from a copy, since it joins the files."""
    copy = file.with_name("copy.db")
    for ending in ("", "-wal"):
        source = file.with_name(file.name + ending)
        target = copy.with_name(copy.name + ending)
        target.unlink(missing_ok=True)
        if source.exists():
            shutil.copy(source, target)
    copy.with_name(copy.name + "-shm").unlink(missing_ok=True)
    return _dump(sqlite3.connect(copy))


def _write(connection: sqlite3.Connection, rng: random.Random) -> None:
    """One transaction; some are rolled back, some are so large that they spill into the log."""
    connection.execute("BEGIN")
    for _ in range(rng.choice([1, 3, 60])):
        connection.execute("INSERT INTO t (x) VALUES (?)", (rng.randbytes(rng.choice([5, 3000])),))
    if rng.random() < 0.3:
        connection.execute("DELETE FROM t WHERE rowid % 3 = 0")
    connection.execute(rng.choice(["COMMIT", "COMMIT", "ROLLBACK"]))
    if rng.random() < 0.2:
        connection.execute(f"PRAGMA wal_checkpoint({rng.choice(['PASSIVE', 'RESTART'])})")
    if rng.random() < 0.1:
        connection.execute("VACUUM")


@pytest.mark.parametrize("seed", range(12))
def test_database_and_log_are_joined_as_sqlite_joins_them(tmp_path: Path, seed: int) -> None:
    rng, file = random.Random(seed), tmp_path / "a.db"
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute(f"PRAGMA page_size = {rng.choice([512, 1024, 4096])}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA cache_size = 5")
    connection.execute("CREATE TABLE t (x)")
    differing = 0
    for _ in range(12):
        _write(connection, rng)
        dump = _by_image(file)
        assert dump == _by_sqlite(file)
        alone = tmp_path / "alone.db"
        shutil.copy(file, alone)
        try:
            differing += _by_image(alone) != dump
        except sqlite3.DatabaseError:
            differing += 1  # pages of two states
    assert differing, "control: without the log the content is another"
    log = file.with_name("a.db-wal")
    whole = log.read_bytes()
    for _ in range(20):  # a log that is cut off, or damaged, counts up to its last whole commit
        torn = bytearray(whole[: rng.randrange(len(whole) + 1)])
        if torn and rng.random() < 0.7:
            torn[rng.choice([rng.randrange(len(torn)), rng.randrange(min(40, len(torn)))])] ^= 1
        log.write_bytes(torn)
        try:
            expected = _by_sqlite(file)
        except sqlite3.DatabaseError:
            continue  # a checkpoint had begun
        assert _by_image(file) == expected
    log.write_bytes(whole)
    connection.close()


def test_a_write_that_has_begun_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.db"
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("CREATE TABLE t (x)")
    connection.execute("PRAGMA cache_size = 1")
    before = _by_image(file)
    connection.execute("BEGIN IMMEDIATE")
    for _ in range(200):
        connection.execute("INSERT INTO t VALUES (zeroblob(2000))")
    assert file.with_name("a.db-journal").stat().st_size

    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    with pytest.raises(WorkspaceError, match="being written by another process"):
        image(file)
    monkeypatch.setattr(module.time, "sleep", lambda _: connection.execute("ROLLBACK"))
    assert _by_image(file) == before
    connection.close()


def test_a_log_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.db"
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (x)")
    read, calls = Path.read_bytes, []

    def slowly(path: Path) -> bytes:
        content = read(path)
        if path == file and len(calls) < 3:
            calls.append(path)
            connection.execute("INSERT INTO t VALUES (1)")
            connection.execute("PRAGMA wal_checkpoint(RESTART)")
        return content

    monkeypatch.setattr(Path, "read_bytes", slowly)
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    assert _by_image(file).count('INSERT INTO "t" VALUES(1);') == 3
    connection.close()
