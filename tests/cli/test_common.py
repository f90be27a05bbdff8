"""What all commands share: help that fits, quiet and verbose, errors as JSON, no control signs."""

from __future__ import annotations

import itertools
import json
import logging
import re
import warnings
from pathlib import Path

import pytest

from commands import FACT, PROMPT, Run
from factsmith import cli
from factsmith.cli import common
from factsmith.cli.printing import Manner, complain, manner
from factsmith.keep.ledger import Ledger

NAMES = [command.__name__.rstrip("_") for group in cli.COMMANDS.values() for command in group]


@pytest.fixture(autouse=True)
def _text() -> None:
    manner.set(Manner())


def test_the_help_groups_the_commands_and_fits_80_columns(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run("--help").out
    assert all(f"─ {title} ─" in text for title in cli.COMMANDS)
    for name in NAMES:
        assert len(re.findall(rf"^│ {name} ", text, re.MULTILINE)) == 1
    # One line for each command: nothing is continued below its name.
    assert not re.search(r"^│ {11}\S", text.partition("─ Start ─")[2], re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_has_no_words_of_a_programming_language(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run(name, "--help").out
    assert not re.search(r"<(int|str|bool|list|float|path)|\blist\[|\brange\b|x[<>]=", text), text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "─ Output ─" in text and "--quiet" in text and "--verbose" in text
    prose = text.partition("Example")[0].partition("Usage")[2].splitlines()[2:]
    for line, following in itertools.pairwise(prose):
        if line.strip() and following.strip():  # a line is full before the next one begins
            assert len(line.rstrip()) + len(following.split()[0]) >= 78, (line, following)


def test_a_group_needs_a_command_and_an_unknown_one_is_refused(run: Run) -> None:
    assert (run().code, run("--json").code) == (2, 2)
    assert "─ Start ─" in run().out
    refused = run("frob")
    assert refused.err == "error: No such command 'frob'. See `factsmith --help`.\n"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["ask", "m", "x", "--top", "0"], ("UsageError", "top", "--top", 2)),
        (["ask", "m", "x", "--frob"], ("UsageError", None, "--frob", 2)),
        (["show"], ("UsageError", "reference", None, 2)),
        (["log"], ("WorkspaceError", None, None, 5)),
        (["ask", "nosuchmodel", "x"], ("ModelNotFoundError", None, None, 3)),
        (["ask", "atlas", "one", "two"], ("InputError", None, None, 2)),
    ],
)
def test_errors_are_json_with_json(
    run: Run, words: list[str], wanted: tuple[str, str | None, str | None, int]
) -> None:
    plain = run(*words)
    assert plain.err.startswith("error: ") and plain.code == wanted[-1]
    done = run(*words, "--json")
    document = json.loads(done.err)
    error = document["error"]
    assert document["format_version"] == 1 and done.out == ""
    assert (error["type"], error["argument"], error["option"], error["exit_code"]) == wanted
    assert done.code == error["exit_code"] and error["message"]


def test_an_error_of_the_library_names_the_option(run: Run, model: Path) -> None:
    done = run("patch", model, *FACT, "--layer", "99", "--json")
    error = json.loads(done.err.splitlines()[-1])["error"]
    assert error["option"] == "--layer" and "--layer" not in error["message"]
    assert "--layer" in run("patch", model, *FACT, "--layer", "99").err


def test_a_fault_and_ctrl_c_are_json(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("init", model, "space")
    for raised, kind, code in (
        (ZeroDivisionError("no"), "ZeroDivisionError", 1),
        (KeyboardInterrupt(), "KeyboardInterrupt", 130),
    ):

        def fail(*_: object, raised: BaseException = raised) -> None:
            raise raised

        monkeypatch.setattr(Ledger, "log", fail)
        done = run("log", "-w", "space", "--json")
        error = json.loads(done.err)["error"]
        assert (done.code, error["type"], error["exit_code"]) == (code, kind, code)
    assert "stopped before it was done" in run("log", "-w", "space").err


def test_json_is_read_before_dashes_only(run: Run) -> None:
    assert run("ask", "nosuchmodel", "--", "--json").err.startswith("error: ")
    assert json.loads(run("ask", "nosuchmodel", "--json", "--", "x").err)["error"]


def test_every_result_has_the_version_of_its_format(run: Run, model: Path) -> None:
    for words in (["init", model, "s"], ["log", "-w", "s"], ["status", "-w", "s"], ["schema"]):
        assert run(*words, "--json").json["format_version"] == 1
    assert run("ask", "-w", "s", PROMPT, "--json").json["format_version"] == 1
    assert "format_version" not in run("schema").json, "an editor reads this one"


def test_quiet_and_verbose(run: Run, model: Path) -> None:
    for words in (["-v", "ask", model, PROMPT], ["ask", model, PROMPT, "--verbose"]):
        done = run(*words)
        assert done.code == 0 and "log: " in done.err and "log" not in done.out
    assert "log: " not in run("ask", model, PROMPT).err
    lines = run("ask", model, PROMPT, "-v", "--json").err.splitlines()
    assert all(json.loads(line)["log"]["logger"].startswith("factsmith") for line in lines)
    assert run("-q", "ask", model, PROMPT).err == "" == run("ask", model, PROMPT, "-q").err
    assert not logging.getLogger("factsmith").handlers, "the log is only for the command"


def test_warnings_of_libraries_are_messages(capsys: pytest.CaptureFixture[str]) -> None:
    with common.spoken_warnings():
        warnings.simplefilter("always")
        warnings.warn("look [/] \x1b[31mhere", stacklevel=1)
    assert capsys.readouterr().err == "warning: look [/] �[31mhere\n"


def test_messages_are_never_markup(capsys: pytest.CaptureFixture[str]) -> None:
    complain(
        "warning", "[red]a[/red] [/] \\[b] \x9b31m \u202e\u2066\u200f\x7f\udc80\U000e0041 é 日本"
    )
    assert capsys.readouterr().err == ("warning: [red]a[/red] [/] \\[b] �31m ������ é 日本\n")
