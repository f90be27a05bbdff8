"""What is printed: JSON for programs, and commands that can be typed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from factsmith.cli import printing, story
from factsmith.cli.printing import as_json_text, program, runnable, suggested


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A project folder with a virtual environment, and nothing of factsmith on the PATH."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    return tmp_path


def make(path: Path) -> Path:
    """Make a program of this path."""
    path.touch(0o755)
    return path


def test_a_program_on_the_path_is_named(folder: Path) -> None:
    make(folder / "elsewhere" / "factsmith")
    assert program() == "factsmith" and runnable("`factsmith log` lists") == "`factsmith log` lists"


def test_a_program_that_is_not_on_the_path_is_named_by_its_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program() == ".venv/bin/python -m factsmith"
    make(folder / ".venv" / "bin" / "factsmith")
    assert program() == ".venv/bin/factsmith"
    monkeypatch.chdir(folder / "elsewhere")
    assert program() == str(folder / ".venv" / "bin" / "factsmith")
    (folder / "my tools").mkdir()
    monkeypatch.setattr(sys, "argv", [str(make(folder / "my tools" / "factsmith"))])
    assert program() == f"'{folder}/my tools/factsmith'"


def test_every_suggestion_can_be_typed(folder: Path) -> None:
    make(folder / ".venv" / "bin" / "factsmith")
    assert suggested("log", Path("a b")) == ".venv/bin/factsmith log -w 'a b'"
    assert suggested("ask", None, "'x y'") == ".venv/bin/factsmith ask 'x y'"
    assert runnable("`factsmith log` and `factsmith-x`; factsmith") == (
        "`.venv/bin/factsmith log` and `factsmith-x`; factsmith"
    )
    step = story._next(Path("played"))
    commands = step.data["commands"]
    assert commands and all(each.startswith(".venv/bin/factsmith ") for each in commands)
    assert os.linesep not in "".join(commands)


@pytest.mark.parametrize(
    "text", ["\x9b", "\u202e", "\u2066", "\u200f", "\x1b", "\x7f", "\x00", "\ud800", "\U000e0041"]
)
def test_json_escapes_all_but_printable_text(text: str) -> None:
    for indent in (None, 2):
        written = as_json_text({"token": f"a{text}b é 日本", text: [1]}, indent=indent)
        assert json.loads(written) == {"token": f"a{text}b é 日本", text: [1]}
        assert text not in written and written.replace("\n", "").isprintable()
        assert "é 日本" in written, "what is printable is readable"


def test_the_style_of_a_note_is_no_alarm() -> None:
    assert {"warning", "note", "progress", "log"} == set(printing._STYLES)
