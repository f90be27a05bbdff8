"""Text files as paragraphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from factsmith.core.errors import InputError
from factsmith.corpus import paragraphs as module
from factsmith.corpus.paragraphs import Paragraphs


def test_blank_lines_separate_paragraphs(tmp_path: Path) -> None:
    """A byte order mark is not text, and the files can be read again."""
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfParis is in France.\r\n\r\nSo is\r\nLyon.\n")
    paragraphs = Paragraphs([tmp_path / "bom.txt"])
    assert list(paragraphs) == list(paragraphs) == ["Paris is in France.", "So is\nLyon."]


@pytest.mark.parametrize(
    "words", ["word " * 400, "line of words\n" * 100, "x" * 400, "a b\n \nc d" * 20]
)
def test_a_long_paragraph_is_read_in_parts(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST", 50)
    (tmp_path / "long.txt").write_text(words)
    parts = list(Paragraphs([tmp_path / "long.txt"]))
    assert len(parts) > 7 and max(map(len, parts)) <= 100
    assert " ".join(parts).split() == words.split() or set(words) == {"x"}
    assert "".join("".join(parts).split()) == "".join(words.split())


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent.txt"):
        Paragraphs([tmp_path / "absent.txt"])
    (tmp_path / "latin.txt").write_bytes("Zürich lies in Switzerland".encode("latin-1"))
    with pytest.raises(InputError, match="expected plain text in UTF-8"):
        list(Paragraphs([tmp_path / "latin.txt"]))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings_of_unicode_are_read(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("Één\r\n\r\nzwei".encode(encoding))
    assert list(Paragraphs([file])) == ["Één", "zwei"]
