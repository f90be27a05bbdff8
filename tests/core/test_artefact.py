"""Tensors on disk: what was written is read, and what was altered is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from factsmith.core import artefact
from factsmith.core.artefact import (
    Checkpoint,
    read_artefact,
    read_metadata,
    read_tensors,
    write_tensors,
)
from factsmith.core.errors import DamagedError, FingerprintError, InputError, WorkspaceError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}
MADE_FROM = {"format": "factsmith sums 1", "fingerprint": "ab", "layers": "[0, 1]"}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.safetensors"
    write_tensors(path, TENSORS, {"format": "x"})
    tensors, metadata = read_tensors(path, "make it again")
    assert metadata == {"format": "x"} and set(tensors) == set(TENSORS)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert read_metadata(path)["format"] == "x" and read_metadata(tmp_path / "none") == {}


@pytest.mark.parametrize("at", [-1, 60])
def test_an_altered_file_is_refused_with_advice(tmp_path: Path, at: int) -> None:
    """Byte 60 is in the metadata, the last one in a tensor."""
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, {"format": "x" * 80})
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DamagedError, match="; make it again"):
        read_tensors(path, "make it again")


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, {"format": "old"})

    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefact, "write_file", full)
    with pytest.raises(WorkspaceError, match="No space left on device; choose a folder"):
        write_tensors(path, TENSORS, {"format": "new"})
    assert read_metadata(path)["format"] == "old"


def test_another_format_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "values.safetensors"
    with pytest.raises(DamagedError, match=r"no values in .*; expected values.safetensors, as f"):
        read_artefact(path, "values", "factsmith values 1", "f", "read them again")
    write_tensors(path, TENSORS, {"format": "other"})
    with pytest.raises(DamagedError, match="holds 'other'; expected 'factsmith values 1': read"):
        read_artefact(path, "values", "factsmith values 1", "f", "read them again")


def test_a_checkpoint_is_written_when_it_is_due_and_deleted_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path / "sums", MADE_FROM)
    assert checkpoint.load() is None
    checkpoint.save(lambda: (TENSORS, {"done": "1"}))
    assert checkpoint.load() is None, "it is not due yet"
    monkeypatch.setattr(artefact, "_SECONDS", 0.0)
    checkpoint = Checkpoint(tmp_path / "sums", MADE_FROM)
    checkpoint.save(lambda: (TENSORS, {"done": "2"}))
    kept = checkpoint.load()
    assert kept is not None and kept[1] == {**MADE_FROM, "done": "2"}
    assert torch.equal(kept[0]["a"], TENSORS["a"])
    checkpoint.remove()
    checkpoint.remove()
    assert checkpoint.load() is None


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"format": "factsmith sums 2"}, DamagedError, "expected 'factsmith sums 2'"),
        ({"fingerprint": "cd"}, FingerprintError, "made with fingerprint ab, not cd"),
        ({"layers": "[2]"}, InputError, r"made with layers \[0, 1\], not \[2\]"),
    ],
)
def test_a_checkpoint_of_other_work_is_refused(
    tmp_path: Path, changes: dict[str, str], error: type[Exception], words: str
) -> None:
    write_tensors(tmp_path / "sums", TENSORS, MADE_FROM)
    assert Checkpoint(tmp_path / "sums", MADE_FROM).load() is not None
    with pytest.raises(error, match=words):
        Checkpoint(tmp_path / "sums", MADE_FROM | changes).load()
