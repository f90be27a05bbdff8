"""An export is written whole or not at all, and an earlier export is not lost."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
import torch

from conftest import GPT2, byte_tokenizer, tiny_model
from exports import names, some_delta
from factsmith.core.errors import InputError, WorkspaceError
from factsmith.keep.export.folder import read_patch
from factsmith.keep.export.patch import export_patch
from factsmith.keep.export.staging import staged
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A tiny random model."""
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "a/b/out", False) as folder:
        (folder / "part").write_text("x")
        raise ZeroDivisionError
    assert names(tmp_path) == [], "nothing is written, not even the parent folders"
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out", False):
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with staged(tmp_path / "a/b/out", False) as folder:
        (folder / "whole").write_text("x")
        assert not (tmp_path / "a/b/out").exists()
    assert names(tmp_path) == ["a", "a/b", "a/b/out", "a/b/out/whole"]


def test_existing_files_are_not_overwritten(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta, out = some_delta(lm, 1), tmp_path / "out"
    out.mkdir()
    export_patch(lm, delta, out)  # an empty folder is accepted
    with pytest.raises(InputError, match=r"is an earlier export\. Allow to overwrite it") as caught:
        export_patch(lm, delta, out)
    assert caught.value.argument == "overwrite"
    export_patch(lm, some_delta(lm, 2), out, overwrite=True)
    assert torch.equal(read_patch(out).patches[0].delta.v_star, some_delta(lm, 2).v_star)
    (out / "0001/mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"'0001/mine.txt' in it does not belong to it"):
        export_patch(lm, delta, out, overwrite=True)
    (out / "0001/mine.txt").unlink()
    (out / "factsmith.json").write_text("{}")
    with pytest.raises(InputError, match="not an export by factsmith"):
        export_patch(lm, delta, out, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        export_patch(lm, delta, tmp_path / "file", overwrite=True)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(InputError, match="is a link"):
        export_patch(lm, delta, tmp_path / "link", overwrite=True)
    current = tmp_path / "current"
    current.mkdir()
    monkeypatch.chdir(current)
    for folder in (".", "..", current):
        with pytest.raises(InputError, match="is the current folder or one above it"):
            export_patch(lm, delta, folder)
    assert names(current) == []


def test_an_earlier_export_survives_a_failure(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_patch(lm, some_delta(lm, 1), out)
    before = (out / "factsmith.json").read_bytes()

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("factsmith.keep.export.patch.read_patch", broken)
        export_patch(lm, some_delta(lm, 2), out, overwrite=True)
    rename, calls = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(WorkspaceError, match="Input/output error"):
        patch.setattr(Path, "rename", second_fails)
        export_patch(lm, some_delta(lm, 2), out, overwrite=True)
    assert len(calls) == 3, "the earlier export is moved aside and back"
    assert (out / "factsmith.json").read_bytes() == before and read_patch(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@contextmanager
def files_of_at_most(n: int) -> Iterator[None]:
    """Limit files to n bytes. A longer write fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_is_reported_and_leaves_nothing(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = some_delta(lm, 1)
    with files_of_at_most(500), pytest.raises(WorkspaceError, match=r"(?i)cannot write"):
        export_patch(lm, delta, tmp_path / "out")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(WorkspaceError, match=r"a file of that name|Not a directory"):
        export_patch(lm, delta, tmp_path / "file/out")
    with pytest.raises(WorkspaceError, match="cannot write into"):
        export_patch(lm, delta, "/proc/out")
    for error in (
        OSError(28, "No space left on device"),
        safetensors.SafetensorError("I/O error: ... (os error 28)"),
    ):

        def full(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        with (
            monkeypatch.context() as patch,
            pytest.raises(WorkspaceError, match="The disk is full: nothing was written"),
        ):
            patch.setattr("factsmith.keep.export.manifest.write_file", full)
            export_patch(lm, delta, tmp_path / "out")
    assert names(tmp_path) == ["file"]
