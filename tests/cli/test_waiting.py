"""What is shown while a command works, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import select
import sys
import time
import warnings
from collections.abc import Iterator

import pytest
from rich.console import Console

from clocks import Clock
from factsmith.cli import waiting
from factsmith.cli.common import logged, spoken_warnings
from factsmith.cli.printing import Manner, complain, manner
from factsmith.core.progress import Pace, note, stage


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


def test_a_line_says_how_far_the_work_is_and_how_long_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    lines = waiting._Lines(("loading", "solving", "proof"), clock)
    stage(lines, "loading")
    lines("loading hf", 0, None)
    clock.now = 4
    lines.print()
    stage(lines, "solving")
    lines("searching targets", 0, 20)
    clock.now = 6
    lines("searching targets", 0, 20)
    lines.print()
    clock.now = 14
    lines("searching targets", 5, 20)
    lines.print()
    stage(lines, "second moments")  # not a part of this command
    stage(lines, "proof")
    lines("verifying", 0, None)
    clock.now = 60
    lines.print()
    assert capsys.readouterr().err.splitlines() == [
        "progress: step 1 of 3, loading hf, 4 s",
        "progress: step 2 of 3, searching targets: 0 of 20, 6 s",
        "progress: step 2 of 3, searching targets: 5 of 20, 14 s, about 30 s left in this step",
        "progress: step 3 of 3, verifying, 60 s",
    ]


def test_without_parts_the_time_left_is_that_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    lines = waiting._Lines((), clock)
    stage(lines, "solving")
    lines("tracing", 0, 4)
    clock.now = 600
    lines("tracing", 1, 4)
    lines.print()
    manner.set(Manner(json=True))
    lines.print()
    text, document = capsys.readouterr().err.splitlines()
    assert text == "progress: tracing: 1 of 4, 600 s, about 30 min left"
    shown = json.loads(document)["progress"]
    assert (shown["seconds"], shown["seconds_left"]) == (600, 1800) and "stage" not in shown


TIMES = {0.2: "5 s", 7: "5 s", 8: "10 s", 57: "55 s", 58: "1 min", 89: "1 min", 150: "2 min"}
TIMES |= {3540: "59 min", 3590: "1 h", 4800: "1 h 20 min", 7200: "2 h"}


@pytest.mark.parametrize("seconds", TIMES)
def test_a_time_in_words_is_as_rough_as_the_estimate(seconds: float) -> None:
    assert waiting.in_words(seconds) == TIMES[seconds]


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


def test_a_bar_shows_the_part_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def terminal(*, stderr: bool = False) -> Console:
        return Console(force_terminal=True, width=80, color_system=None, file=io.StringIO())

    monkeypatch.setattr(waiting, "plain_console", terminal)
    monkeypatch.setattr(waiting, "Pace", lambda: Pace(clock))
    with waiting.progress("loading", "solving") as tell:
        assert isinstance(tell, waiting._Reporter)
        stage(tell, "solving")
        screens = []
        for done in (0, 6):
            tell("searching targets", done, 24)
            console = Console(width=80, color_system=None)
            with console.capture() as captured:
                console.print(tell.bars.get_renderable())
            screens.append(captured.get())
            clock.now += 10
    assert all("2/2 searching targets" in screen for screen in screens)
    assert "30 s left" in screens[1] and "left" not in screens[0]


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


class Pty:
    """A terminal of 60 columns that takes standard error."""

    def __init__(self) -> None:
        self.reader, writer = os.openpty()
        self.file = os.fdopen(writer, "w", encoding="utf-8", buffering=1)

    def text(self) -> str:
        """Return all that was written; a pty writes a carriage return at each line's end."""
        self.file.flush()
        parts = []
        while select.select([self.reader], [], [], 0.2)[0]:  # a read may end before the text does
            parts.append(os.read(self.reader, 65536))
        return b"".join(parts).decode().replace("\r\n", "\n")


@pytest.fixture
def pty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pty]:
    """Yield a terminal that can be standard error."""
    for name, value in {"TERM": "xterm", "COLUMNS": "60", "LINES": "24", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    terminal = Pty()
    yield terminal
    terminal.file.close()
    os.close(terminal.reader)


def shown(text: str) -> list[str]:
    """Return the lines that a terminal shows where each is cleared before it is written."""
    plain = re.sub(r"\x1b\[[?0-9;]*[a-zJ-Z]", lambda m: "\r" if "K" in m[0] else "", text)
    return [line.rpartition("\r")[2].rstrip() for line in plain.split("\n")]


@pytest.mark.parametrize("as_json", [False, True])
def test_messages_stand_on_lines_of_their_own_above_the_bar(
    pty: Pty, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", pty.file)
    manner.set(Manner(json=as_json))
    with spoken_warnings(), logged(1), waiting.progress() as tell:
        tell("loading atlas", 0, None)
        time.sleep(0.2)
        note(tell, "it takes long")
        logging.getLogger("factsmith.test").info("a log")
        warnings.simplefilter("always")
        warnings.warn("a warning", stacklevel=1)
    lines = shown(pty.text())
    for message in ("it takes long", "a log", "a warning"):
        those = [line for line in lines if message in line]
        kinds = '{"format_version"' if as_json else ("note: ", "log: ", "warning: ")
        assert those and all(line.startswith(kinds) for line in those), those


def test_messages_wrap_by_word_on_a_terminal_alone(
    pty: Pty, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/a/folder" * 12
    text = f"the file {path} cannot be read; choose another one that can be read by everybody"
    monkeypatch.setattr(sys, "stderr", pty.file)
    complain("error", text)
    lines = shown(pty.text())
    assert path in lines and " ".join(lines).rstrip() == f"error: {text}"
    assert all(len(line) <= 60 for line in lines if line != path) and len(lines) > 3
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stderr", piped)
    complain("error", text)
    assert piped.getvalue() == f"error: {text}\n"
