"""What is shown while a command works, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import re
import time

import pytest
from rich.console import Console

from factsmith.cli import waiting
from factsmith.cli.printing import Manner, manner
from factsmith.core.progress import note


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first line come at once, and every command speak as it does without options."""
    monkeypatch.setattr(waiting, "_FIRST_LINE", 0.05)
    monkeypatch.setattr(waiting, "_MOST_SECONDS", 0.1)
    manner.set(Manner())


def test_a_line_now_and_then_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting.progress() as tell:
        tell("loading [b]x[/b]\x1b[31m", 0, None)
        time.sleep(0.2)
        tell("tracing", 3, 1200)
        time.sleep(0.3)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("progress: loading [b]x[/b]�[31m, 0 s\n")
    assert "progress: tracing: 3 of 1,200, 0 s\n" in err
    assert 3 <= len(err.splitlines()) <= 8, "now and then, not always"
    time.sleep(0.2)
    assert capsys.readouterr().err == "", "nothing comes after the end"


def test_quick_work_prints_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_FIRST_LINE", 2.0)
    with waiting.progress() as tell:
        tell("tracing", 3, 40)
    assert capsys.readouterr() == ("", "")


def test_lines_are_json_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    manner.set(Manner(json=True))
    with waiting.progress() as tell:
        tell("tracing", 3, 40)
        note(tell, "it takes long")
        time.sleep(0.2)
    documents = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {"format_version": 1, "note": {"message": "it takes long"}} in documents
    shown = next(d["progress"] for d in documents if "progress" in d)
    assert (shown["step"], shown["done"], shown["total"]) == ("tracing", 3, 40)


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    manner.set(Manner(quiet=True))
    with waiting.progress() as tell:
        tell("tracing", 3, 40)
        note(tell, "it takes long")
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "")


def test_a_bar_shows_the_present_step_also_when_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screens: list[str] = []

    def terminal(*, stderr: bool = False) -> Console:
        return Console(force_terminal=True, width=80, color_system=None, file=io.StringIO())

    monkeypatch.setattr(waiting, "plain_console", terminal)
    with waiting.progress() as tell:
        assert isinstance(tell, waiting._Reporter)
        for step in ("edits at layer 5", "edits at layer [6]", "edits at layer 5"):
            tell(step, 2, 24)
            console = Console(width=80, color_system=None)
            with console.capture() as captured:
                console.print(tell.bars.get_renderable())
            screens.append(captured.get())
    for screen, layer in zip(screens, ("5", "[6]", "5"), strict=True):
        assert re.findall(r"edits at layer (\S+)", screen) == [layer] and "2/24" in screen
    assert all(len(line) <= 80 for screen in screens for line in screen.splitlines())
