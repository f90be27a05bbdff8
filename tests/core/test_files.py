"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from factsmith.core.files import flush_folder, make_folder, settle_folder, write_file


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_gets_the_permissions_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_file(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each of three umasks in turn: others may read, a group may write, nobody else may read."""
    before = os.umask(request.param)
    yield int(request.param)
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_every_file_follows_the_umask(tmp_path: Path, umask: int) -> None:
    """Also those that a library writes under another name, for its owner alone."""

    def save(path: Path) -> None:
        save_file({"x": torch.zeros(2)}, path)
        path.chmod(0o600)  # as newer versions of safetensors do

    write_file(tmp_path / "tensors", save)
    write_file(tmp_path / "bytes", b"x")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    save(folder / "deep" / "tensors")
    assert _mode(folder / "deep" / "tensors") == 0o600
    settle_folder(folder)
    for file in (tmp_path / "tensors", tmp_path / "bytes", folder / "deep" / "tensors"):
        assert _mode(file) == 0o666 & ~umask
    assert [path.name for path in folder.iterdir()] == ["deep"]


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths that were flushed to disk."""
    paths: list[Path] = []

    def fsync(descriptor: int) -> None:
        paths.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


def test_new_folders_and_what_is_in_them_are_flushed(tmp_path: Path, flushed: list[Path]) -> None:
    make_folder(tmp_path / "a/b/c")
    assert flushed == [tmp_path, tmp_path / "a", tmp_path / "a/b"]
    flushed.clear()
    make_folder(tmp_path / "a/b/c")
    assert flushed == [], "nothing is new"
    (tmp_path / "a/b/file").write_text("x")
    settle_folder(tmp_path / "a")
    expected = ["a", "a/b", "a/b/c", "a/b/file"]
    assert sorted(flushed) == [tmp_path / name for name in expected]


@pytest.mark.parametrize(
    ("number", "is_error"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)]
)
def test_a_network_disk_that_cannot_flush_a_folder_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_error: bool
) -> None:
    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if is_error:
        with pytest.raises(OSError, match=os.strerror(number)):
            flush_folder(tmp_path)
    else:
        flush_folder(tmp_path)
