"""Nothing that a fact, a token or a name holds reaches a terminal as a control character."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.text import Text

from commands import Done, Run
from factsmith.cli.printing import drawn

NASTY = "E\x1b[1m\x9b1m\u202ew\u2066\u200f\x7f[red]x[/]\U000e0041"
"""Escape sequences, C1, directions, DEL, a tag character, and what rich takes for markup."""

PROMPT = f"{NASTY} is"


def steering(text: str) -> list[str]:
    """Return the characters that are no line break and may steer a terminal."""
    kinds = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return [c for c in text if c != "\n" and unicodedata.category(c) in kinds]


@pytest.fixture
def nasty(run: Run, model: Path, tmp_path: Path) -> Path:
    """A workspace of a model with a nasty name, with a nasty fact."""
    folder = tmp_path / "m\x1b[32m\x9b1m[red]\u202e"
    shutil.copytree(model, folder)
    fact = {
        "subject": NASTY,
        "prompt": "{} is",
        "target": "R\x1b[1mo\u2066me[/]",
        "paraphrases": [f"In {NASTY}"],
        "neighbours": ["The [b]town[/b] of \x1b]0;x\x07 is"],
    }
    (tmp_path / "facts.json").write_text(json.dumps({"facts": [fact]}))
    return folder


def commands(model: Path) -> Iterator[tuple[object, ...]]:
    """Yield commands that print the fact, its tokens, or the model's name."""
    yield ("init", model, "space")
    yield ("ask", model, PROMPT)
    yield ("explain", model, PROMPT)
    yield ("find", model, "\x1b[31m", "--index", "index", "--max-tokens", 200)
    yield ("neuron", model, 1, 2, "--index", "index", "--facts", 0)
    yield ("browse", model, "--index", "index", "--no-facts")
    yield ("trace", model, PROMPT, "--subject", NASTY, "--samples", 2)
    yield ("trace", model, PROMPT, "--subject", NASTY, "--samples", 2, "--fast")
    yield ("trace", model, PROMPT, "--subject", "\x1b[31mNobody")
    yield ("neurons", model, PROMPT)
    yield ("neurons", model, PROMPT, "--target", "\x1b[31mx")
    yield ("plan", "facts.json", "-w", "space")
    yield ("apply", "facts.json", "-w", "space", "--force", "-m", "\x1b[31m[red] \u202e message")
    yield ("log", "-w", "space")
    yield ("show", "latest", "-w", "space")
    yield ("diff", "base", "latest", "-w", "space")
    yield ("status", "-w", "space", "--verify")
    yield ("verify", "-w", "space")
    yield ("capacity", "-w", "space")
    yield ("drift", "-w", "space", "--facts", 0, "--max-tokens", 50)
    yield ("export", "patches", "-w", "space", "--format", "patch")
    yield ("import", "patches", "-w", "space")
    yield ("revert", "latest", "-w", "space")
    yield ("init", model, "space")
    yield ("show", "\x1b[31m", "-w", "space")
    yield ("log", "-w", "\x1b[31m[/]")
    yield ("ask", "\x1b[31m\u202e[/]", "x")
    yield ("\x1b[31mfrob",)
    yield ("log", "--\x1b[31mfrob")
    yield ("trace", model, "x", "--kind", "\x1b[31m[/]")


def outputs(done: Done) -> tuple[tuple[str, list[str]], ...]:
    """Return what each stream holds that may steer a terminal."""
    return (("out", steering(done.out)), ("err", steering(done.err)))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("options", [(), ("--json",), ("-vv",), ("-vv", "--json")])
def test_no_command_prints_control_characters(
    run: Run, nasty: Path, options: tuple[str, ...]
) -> None:
    for words in commands(nasty):
        done = run(*words, *options)
        assert "Traceback" not in done.err and "fault in factsmith" not in done.err, (words, done)
        assert outputs(done) == (("out", []), ("err", [])), words
        if "--json" in options:
            assert all(isinstance(json.loads(line), dict) for line in done.err.splitlines())
            assert not done.out or json.loads(done.out)


@pytest.mark.usefixtures("quick")
def test_markup_of_rich_is_printed_as_it_is(run: Run, nasty: Path) -> None:
    run("init", nasty, "space")
    done = run("apply", "facts.json", "-w", "space", "--force", "-m", "[red]a[/red] [/] [b]")
    assert done.code == 0, done.err
    assert "[red]a[/red] [/] [b]" in run("log", "-w", "space").out
    assert "[red]x[/]" in run("show", "latest", "-w", "space").out
    assert "[red]x[/]" in run("ask", nasty, PROMPT).out


def test_json_is_read_back_as_it_was(run: Run, nasty: Path) -> None:
    done = run("ask", nasty, PROMPT, "--json")
    assert done.json["prompt"] == PROMPT and "\x1b" not in done.out
    assert steering("a\x1bb") == ["\x1b"], "a wrong one is seen"


def test_a_drawing_keeps_its_styles_and_loses_what_steers() -> None:
    text = Text.assemble(("a\x1b", "red"), "\n", ("b\u202ec", "green"))
    safe = drawn(text)
    assert safe.plain == "a�\nb�c" and safe.spans == text.spans
