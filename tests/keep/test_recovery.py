"""Lost revisions are noticed, and come back exactly or are given up."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from factsmith.core.errors import DamagedError, WorkspaceError
from factsmith.keep.database import Workspace, _seal
from factsmith.keep.ledger import BASE, Ledger
from factsmith.keep.recovery import recover
from ledgers import FINGERPRINT, commit, state_of


def history(ledger: Ledger) -> list[str]:
    """Six revisions, two of which revert others; the last three only in the log."""
    first = commit(ledger, "one", n_facts=2)
    commit(ledger, "two", (2,))
    commit(ledger, "three", (3,))
    ledger._database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    commit(ledger, "four", (4,))
    ledger.revert(first.id, facts=[1], solved={first.id: _written("one'")})
    ledger.revert("latest")
    return [each.id for each in ledger.log()]


def _written(text: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "edit.json").write_text(json.dumps({"name": text}))

    return write


def _without_log(ledger: Ledger) -> Path:
    copy = ledger.folder.with_name("copy")
    shutil.copytree(ledger.folder, copy, ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    return copy


def test_every_record_has_a_copy(ledger: Ledger) -> None:
    ids = history(ledger)
    folder = ledger.folder / "records"
    assert {path.name for path in folder.iterdir()} == {f"{identity}.json" for identity in ids}
    # A process that dies between a commit and its copy, or a full disk, leaves one out.
    (folder / f"{ids[0]}.json").unlink()
    (folder / f"{ids[3]}.json").unlink()
    with Ledger(ledger.folder) as opened:
        assert [each.id for each in opened.log()] == ids
        opened.checkout(BASE)
    assert len(list(folder.iterdir())) == 6


def test_a_history_that_lost_its_log_is_not_shown(ledger: Ledger) -> None:
    ids = history(ledger)
    copy = _without_log(ledger)
    words = (
        rf"3 revisions are in {copy} and not in its ledger\.db, the newest {ids[0][:10]} 'revert.*"
        rf"ledger\.db-wal.*run `factsmith recover -w {copy}`"
    )
    with pytest.raises(DamagedError, match=words):
        Ledger(copy)
    with pytest.raises(DamagedError, match="3 revisions"):
        Ledger(copy)
    shutil.copy(ledger.folder / "ledger.db-wal", copy)
    with Ledger(copy) as opened:
        assert [each.id for each in opened.log()] == ids, "control: with its log it is whole"


def test_lost_revisions_come_back_as_they_were(ledger: Ledger) -> None:
    ids = history(ledger)
    expected = [revision.to_dict() for revision in ledger.log()]
    copy = _without_log(ledger)
    before = state_of(copy)
    look = recover(copy, dry_run=True)
    assert [each.id for each in look.recovered] == ids[2::-1] and look.head == ids[0]
    assert state_of(copy) == before
    done = recover(copy)
    assert done.recovered == look.recovered and not (done.left or done.given_up)
    assert done.recovered[0].message == "four"
    assert json.loads(json.dumps(done.to_dict()))["recovered"][0]["id"] == ids[2]
    assert "put back" in repr(done)
    with Ledger(copy) as opened:
        assert [revision.to_dict() for revision in opened.log()] == expected
        assert opened.current == ids[0] and opened.verify() == ledger.verify()
    assert recover(copy).recovered == () and "no revision is missing" in repr(recover(copy))


def test_lost_revisions_can_be_given_up(ledger: Ledger) -> None:
    ids = history(ledger)
    copy = _without_log(ledger)
    done = recover(copy, give_up=True)
    assert {each.id for each in done.given_up} == set(ids[:3]) and not done.recovered
    with Ledger(copy) as opened:
        assert [each.id for each in opened.log()] == ids[3:]
        assert len(opened.verify().orphans) == 2, "their deltas stay"
        commit(opened, "another")
    kept = copy / "records" / "given-up"
    assert {path.stem for path in kept.iterdir()} == set(ids[:3])


def test_what_cannot_be_put_back_is_named(ledger: Ledger) -> None:
    ids = history(ledger)
    copy = _without_log(ledger)
    four = json.loads((copy / "records" / f"{ids[2]}.json").read_text())["delta"]
    shutil.rmtree(copy / "deltas" / four)
    done = recover(copy)
    assert not done.recovered and len(done.left) == 3
    problems = {each.id: each.problem for each in done.left}
    assert problems[ids[2]].endswith("is missing")
    assert problems[ids[0]] == f"it follows {ids[1][:10]}, which is not there"
    shutil.copytree(ledger.folder / "deltas" / four, copy / "deltas" / four)
    (copy / "records" / f"{ids[0]}.json").write_text("{}")
    done = recover(copy)
    assert [each.id for each in done.recovered] == ids[2:0:-1]
    assert "does not match its name" in done.left[0].problem
    with pytest.raises(DamagedError, match="1 revision is in"):
        Ledger(copy)
    recover(copy, give_up=True)
    with Ledger(copy) as opened:
        assert len(opened.log()) == 5


def test_a_history_that_went_on_without_the_lost_ones_is_not_mixed_with_them(
    ledger: Ledger,
) -> None:
    ids = history(ledger)
    copy = _without_log(ledger)
    aside = copy.with_name("aside")
    (copy / "records").rename(aside)  # a version that kept no copies goes on
    with Ledger(copy) as opened:
        other = commit(opened, "another")
    for identity in ids[:3]:
        shutil.copy(aside / f"{identity}.json", copy / "records")
    done = recover(copy)
    assert not done.recovered and {each.id for each in done.left} == set(ids[:3])
    with contextlib.closing(sqlite3.connect(copy / "ledger.db")) as db:
        assert len(db.execute("SELECT * FROM revisions").fetchall()) == 4
    recover(copy, give_up=True)
    with Ledger(copy) as opened:
        assert opened.head == other.id


def test_recover_needs_a_workspace_that_can_be_written(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history(ledger)
    copy = _without_log(ledger)
    with pytest.raises(WorkspaceError, match="not a workspace"):
        recover(tmp_path / "nowhere")
    monkeypatch.setattr(os, "access", lambda _, mode, **__: not mode & os.W_OK)
    assert len(recover(copy, dry_run=True).recovered) == 3
    with pytest.raises(WorkspaceError, match="cannot be written"):
        recover(copy)


def _edit(folder: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(folder / "ledger.db")) as db:
        db.executescript(f"DROP TRIGGER revisions_keep; DROP TRIGGER revisions_stay; {statement};")


@pytest.mark.parametrize("seqs", ["2", "1", "1, 2, 3", "2, 4", "3, 6", "5, 6"])
def test_a_revision_deleted_in_the_middle_comes_back_in_its_place(
    ledger: Ledger, seqs: str
) -> None:
    ids = history(ledger)
    ledger.checkout(ids[-2])
    expected, folder = [revision.to_dict() for revision in ledger.log()], ledger.folder
    ledger.close()
    _edit(folder, f"DELETE FROM revisions WHERE seq IN ({seqs})")
    with pytest.raises(DamagedError, match=f"`factsmith recover -w {folder}`"):
        _open_and_use(folder)
    back = [ids[-int(seq)] for seq in seqs.split(", ")]
    before = state_of(folder)
    assert [each.id for each in recover(folder, dry_run=True).recovered] == back
    assert state_of(folder) == before
    done = recover(folder)
    assert [each.id for each in done.recovered] == back and done.head == ids[0]
    with Ledger(folder) as opened:
        if "6" in seqs:
            assert opened.current == ids[0], "what is put back at the end is checked out"
        else:
            assert opened.current == ids[-2], "what is checked out stays"
        opened.checkout(ids[-2])
        assert [revision.to_dict() for revision in opened.log()] == expected


@pytest.mark.parametrize(
    ("statement", "lost", "words"),
    [
        ("DELETE FROM revisions WHERE seq = 2", "records", "has no record of it"),
        ("DELETE FROM revisions WHERE seq = 2", "deltas", "cannot be put back: .* is missing"),
        ("UPDATE revisions SET seq = 9 WHERE seq = 2", "", "Revision"),
        ("UPDATE revisions SET parent = 'ffff' WHERE seq = 2", "", "does not match its row"),
        (
            "UPDATE revisions SET record = replace(record, 'two', 'owt') WHERE seq = 2",
            "",
            "does not match",
        ),
        (
            "DELETE FROM revisions WHERE seq = 2; UPDATE revisions SET seq = 2 WHERE seq = 3",
            "",
            "Revision",
        ),
    ],
)
@pytest.mark.parametrize("give_up", [True, False])
def test_what_the_records_cannot_mend_is_said_and_nothing_changes(
    ledger: Ledger, statement: str, lost: str, words: str, give_up: bool
) -> None:
    ids, folder = history(ledger), ledger.folder
    delta = ledger.show(ids[-2]).delta
    ledger.close()
    _edit(folder, statement)
    if lost == "records":
        (folder / "records" / f"{ids[-2]}.json").unlink()
    elif lost == "deltas":
        shutil.rmtree(folder / "deltas" / str(delta))
    before = state_of(folder)
    with pytest.raises(DamagedError, match=rf"{words}.*Restore .* from a backup"):
        recover(folder, give_up=give_up)
    assert state_of(folder) == before


@pytest.mark.parametrize("content", [None, b"", b"no database" * 900])
def test_a_ledger_that_is_gone_is_built_again(
    ledger: Ledger, tmp_path: Path, content: bytes | None
) -> None:
    """As the message says: a new workspace, the two folders, recover."""
    history(ledger)
    expected, folder = [revision.to_dict() for revision in ledger.log()], ledger.folder
    ledger.close()
    (folder / "ledger.db").unlink()
    if content is not None:
        (folder / "ledger.db").write_bytes(content)
    for call in (
        lambda: Ledger(folder),
        lambda: recover(folder),
        lambda: Ledger.create(folder, model="gpt2", fingerprint=FINGERPRINT),
    ):
        with pytest.raises((DamagedError, WorkspaceError), match="`deltas` and `records` from"):
            call()
        after = (folder / "ledger.db").read_bytes() if (folder / "ledger.db").exists() else None
        assert after == content, "a refusal leaves the file as it was"
    new = tmp_path / "new"
    Ledger.create(new, model="gpt2", fingerprint=FINGERPRINT).close()
    for name in ("deltas", "records"):
        shutil.copytree(folder / name, new / name, dirs_exist_ok=True)
    assert len(recover(new).recovered) == 6
    with Ledger(new) as opened:
        assert [revision.to_dict() for revision in opened.log()] == expected


def test_records_of_another_model_are_not_taken(ledger: Ledger, tmp_path: Path) -> None:
    history(ledger)
    new = tmp_path / "new"
    Ledger.create(new, model="gpt2", fingerprint="00" * 32).close()
    for name in ("deltas", "records"):
        shutil.copytree(ledger.folder / name, new / name, dirs_exist_ok=True)
    done = recover(new)
    assert not done.recovered and len(done.left) == 6
    assert any("made for the model" in each.problem for each in done.left)


# ── the database itself ───────────────────────────────────────────────────────────────────────────


def _open_and_use(folder: Path) -> None:
    with Ledger(folder):
        pass


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM revisions WHERE seq = 2",
        "DELETE FROM revisions WHERE seq = 3",
        "DELETE FROM revisions",
        "UPDATE revisions SET record = replace(record, 'two', 'owt') WHERE seq = 2",
        "UPDATE revisions SET parent = 'ffff' WHERE seq = 2",
        "UPDATE revisions SET seq = 7 WHERE seq = 3",
        "UPDATE revisions SET seq = 9 WHERE seq = 2",
        "INSERT INTO revisions SELECT seq + 1, 'ab', id, record FROM revisions WHERE seq = 3",
        "UPDATE workspace SET current = 'base'",
        "UPDATE workspace SET model = 'other'",
        "UPDATE workspace SET dtype = 'float16'",
        "UPDATE workspace SET created = '2020-01-01T00:00:00+00:00'",
        "UPDATE workspace SET seal = 'ab'",
        "ALTER TABLE workspace DROP COLUMN seal",
        "PRAGMA user_version = 2",
    ],
)
@pytest.mark.parametrize("copies", ["with copies", "without copies"])
def test_a_revision_that_is_deleted_or_exchanged_is_seen_on_opening(
    ledger: Ledger, statement: str, copies: str
) -> None:
    commit(ledger, "one"), commit(ledger, "two"), commit(ledger, "three")
    ledger.close()
    with contextlib.closing(sqlite3.connect(ledger.folder / "ledger.db")) as db:
        db.executescript(f"DROP TRIGGER revisions_keep; DROP TRIGGER revisions_stay; {statement}; ")
    if copies == "without copies":
        shutil.rmtree(ledger.folder / "records")
    with pytest.raises(DamagedError):
        _open_and_use(ledger.folder)


def test_the_newest_revision_cannot_be_taken_out_unseen(ledger: Ledger) -> None:
    """Also where whoever did it knew how the checksum is made."""
    first, second = commit(ledger, "one"), commit(ledger, "two")
    ledger.close()
    workspace = Workspace(ledger.model, ledger.dtype, ledger.fingerprint, ledger.created)
    with contextlib.closing(sqlite3.connect(ledger.folder / "ledger.db")) as db, db:
        db.execute("DROP TRIGGER revisions_keep")
        db.execute("DELETE FROM revisions WHERE seq = 2")
        seal = _seal(workspace, first.id)
        db.execute("UPDATE workspace SET current = ?, seal = ?", (first.id, seal))
    with pytest.raises(DamagedError, match=f"1 revision is in .*{second.id[:10]} 'two'"):
        _open_and_use(ledger.folder)


def _values(db: sqlite3.Connection) -> list[tuple[str, str, str]]:
    """Every value of the workspace's row and of the revisions: table, condition, column."""
    columns = [
        ("workspace", "one = 1", name)
        for name in ("model", "dtype", "fingerprint", "created", "current", "seal")
    ]
    rows = [seq for (seq,) in db.execute("SELECT seq FROM revisions")]
    return columns + [
        ("revisions", f"seq = {seq}", name) for seq in rows for name in ("id", "parent", "record")
    ]


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    """Of each value of the workspace's row, and of the revisions; without the copies' help."""
    with Ledger.create(tmp_path / "space", model="m", fingerprint=FINGERPRINT) as ledger:
        commit(ledger, "one"), commit(ledger, "two")
    file = tmp_path / "space" / "ledger.db"
    shutil.rmtree(tmp_path / "space" / "records")
    with contextlib.closing(sqlite3.connect(file)) as db:
        texts = {
            value: db.execute(f"SELECT {value[2]} FROM {value[0]} WHERE {value[1]}").fetchone()[0]
            for value in _values(db)
        }
    content = file.read_bytes()
    assert len(texts) == 12 and content[18] == 2
    # Without a log a file can be exchanged bit by bit.
    content = content[:18] + b"\x01\x01" + content[20:]
    n_flips = 0
    for (table, _, column), text in texts.items():
        at = content.find(text.encode())
        while at >= 0:
            step = 8 if column == "record" else 1
            for bit in range(0, 8 * len(text), step):
                flipped = bytearray(content)
                flipped[at + bit // 8] ^= 1 << (bit + bit // 8) % 8
                file.unlink()
                file.write_bytes(flipped)
                try:
                    with Ledger(tmp_path / "space") as opened:
                        opened.verify()
                except (DamagedError, WorkspaceError):
                    n_flips += 1
                else:
                    raise AssertionError(f"{table}.{column}: bit {bit} of {text!r:.40}")
            at = content.find(text.encode(), at + 1)
            if column in ("id", "parent", "current") or text in ("m", "base"):
                break  # the same text is elsewhere, too, as in an index
    assert n_flips > 3000
    file.write_bytes(content)
    _open_and_use(tmp_path / "space")  # control


def test_files_of_a_workspace_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with Ledger.create(tmp_path / "space", model="m", fingerprint=FINGERPRINT) as ledger:
            commit(ledger, "one")
            files = [path for path in ledger.folder.rglob("*") if path.is_file()]
            assert {"ledger.db", "ledger.db-wal", "ledger.db-shm"} <= {each.name for each in files}
            assert {stat.S_IMODE(each.stat().st_mode) for each in files} == {0o664}
    finally:
        os.umask(before)


def test_a_new_workspace_is_flushed_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[Path] = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.add(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    Ledger.create(tmp_path / "a" / "space", model="m", fingerprint=FINGERPRINT).close()
    assert flushed == {tmp_path, tmp_path / "a", tmp_path / "a" / "space"}
