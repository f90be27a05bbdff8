"""Delta folders are whole or refused, and deltas without a revision can be collected."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from factsmith.core.errors import DamagedError, WorkspaceError
from factsmith.keep.blobs import Blobs, folder_blob
from factsmith.keep.ledger import Ledger
from ledgers import FACT, commit, delta_of, state_of


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    """An empty store of deltas."""
    return Blobs(tmp_path / "deltas")


def test_a_delta_is_named_by_its_content(blobs: Blobs) -> None:
    one, again, two = (blobs.add(delta_of(text)) for text in ("one", "one", "two"))
    assert one == again == blobs.check(one.digest) and one != two
    files = sorted(blobs.path(one.digest).iterdir())
    listing = "".join(f"{f.name}\0{hashlib.sha256(f.read_bytes()).hexdigest()}\n" for f in files)
    assert one.digest == hashlib.sha256(listing.encode()).hexdigest()
    assert one.n_bytes == sum(f.stat().st_size for f in files)
    assert blobs.digests() == sorted({one.digest, two.digest})


def test_a_damaged_delta_is_replaced_by_a_whole_one(blobs: Blobs) -> None:
    digest = blobs.add(delta_of("one")).digest
    (blobs.path(digest) / "edit.json").write_text("{}")
    with pytest.raises(DamagedError, match="has other content"):
        blobs.check(digest)
    assert blobs.add(delta_of("one")).digest == digest
    assert blobs.check(digest).digest == digest


def _link_file(folder: Path) -> None:
    (folder / "edit.json").rename(folder.parent / "outside")
    (folder / "edit.json").symlink_to(folder.parent / "outside")


def _link_folder(folder: Path) -> None:
    folder.rename(folder.parent / "outside")
    folder.symlink_to(folder.parent / "outside")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (shutil.rmtree, "is missing"),
        (lambda f: (f / "more").mkdir(), "more is not a regular file"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe is not a regular file"),
        (_link_file, "edit.json is not a regular file"),
        (_link_folder, "a link or a file, where a folder is expected"),
    ],
)
def test_every_file_of_a_delta_lies_in_its_folder(
    blobs: Blobs, harm: Callable[[Path], object], words: str
) -> None:
    digest = blobs.add(delta_of("one")).digest
    harm(blobs.path(digest))
    with pytest.raises(DamagedError, match=words):
        blobs.check(digest)


def test_hidden_files_do_not_count(blobs: Blobs) -> None:
    blob = blobs.add(delta_of("one"))
    (blobs.path(blob.digest) / ".DS_Store").write_text("x")
    assert folder_blob(blobs.path(blob.digest)) == blob


def test_the_staging_folders_of_dead_processes_go(blobs: Blobs) -> None:
    blobs.folder.mkdir()
    (blobs.folder / ".staging-1").mkdir()
    digest = blobs.add(delta_of("one")).digest
    assert [entry.name for entry in blobs.folder.iterdir()] == [digest]


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "swap", "extra"])
def test_a_damaged_delta_is_named(ledger: Ledger, harm: str) -> None:
    first, second = commit(ledger, "one"), commit(ledger, "two")
    file = ledger.delta_folder(first) / "delta.safetensors"
    if harm == "flip":
        file.write_bytes(b"O" + file.read_bytes()[1:])
    elif harm == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "remove":
        shutil.rmtree(file.parent)
    elif harm == "swap":
        shutil.copy(ledger.delta_folder(second) / "delta.safetensors", file)
    else:
        (file.parent / "more.json").write_text("{}")
    with pytest.raises(DamagedError, match=first.id[:10]):
        ledger.delta_folder(first)
    with pytest.raises(DamagedError):
        ledger.verify()
    assert ledger.delta_folder(second).is_dir()
    if harm != "extra":
        commit(ledger, "one")  # a new write of the same delta repairs it
        assert ledger.verify().deltas == 2


class _StopError(Exception):
    pass


@pytest.mark.parametrize(
    "exception", [OSError(28, "No space left on device"), KeyboardInterrupt(), _StopError()]
)
def test_a_write_that_fails_leaves_nothing(ledger: Ledger, exception: BaseException) -> None:
    commit(ledger, "one")
    before = state_of(ledger.folder)

    def write(folder: Path) -> None:
        delta_of("two")(folder)
        raise exception

    expected = WorkspaceError if isinstance(exception, OSError) else type(exception)
    with pytest.raises(expected, match="disk is full" if isinstance(exception, OSError) else None):
        ledger.commit(write, onto=ledger.head, method="rome", facts=[FACT], layers=[1])
    assert state_of(ledger.folder) == before
    commit(ledger, "two")


def test_gc_removes_deltas_without_a_revision(ledger: Ledger) -> None:
    first = commit(ledger, "one", n_facts=2)
    ledger.revert(first.id, facts=[0], solved={first.id: delta_of("one'")})
    deltas, kept = ledger.folder / "deltas", state_of(ledger.folder)
    delta_of("loose")(deltas / ("0" * 64))
    (deltas / ".staging-1").mkdir()
    (deltas / "notes.txt").write_text("not ours")
    assert ledger.gc(dry_run=True) == (".staging-1", "0" * 64) and (deltas / ("0" * 64)).is_dir()
    assert ledger.gc() == (".staging-1", "0" * 64) and ledger.gc() == ()
    (deltas / "notes.txt").unlink()
    assert state_of(ledger.folder) == kept and ledger.verify().orphans == ()
