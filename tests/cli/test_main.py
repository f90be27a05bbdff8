"""Every command explains itself, prints one JSON document, and fails with its exit code."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import FACT, PROMPT, Run
from factsmith import cli
from factsmith.keep.ledger import Ledger

DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMANDS = sorted(
    command.callback.__name__.rstrip("_")
    for command in cli.app.registered_commands
    if command.callback is not None
)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_is_documented(run: Run, name: str) -> None:
    done = run(name, "--help")
    assert done.code == 0
    assert re.search(rf"Examples?:\s+factsmith {name}\b", done.out), "no example"
    assert "--json" in done.out
    pages = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    assert re.search(rf"^factsmith {name}\b", pages, re.MULTILINE), "not shown in docs/"


def test_examples_fit_a_terminal_of_80_columns() -> None:
    def examples(text: str) -> list[str]:
        return text.partition("Example")[2].splitlines()

    wide = [
        line
        for command in cli.app.registered_commands
        for line in examples(inspect.getdoc(command.callback) or "")
        if len(line) > 77
    ]
    assert wide == []
    assert len(examples("Run it.\n\nExamples:\n  factsmith ask")) == 2, "examples are seen"


def test_the_commands_are_those_promised(run: Run) -> None:
    assert {
        "init",
        "ask",
        "trace",
        "neurons",
        "layers",
        "patch",
        "log",
        "show",
        "revert",
        "checkout",
        "status",
    } <= set(COMMANDS)
    assert re.fullmatch(r"factsmith \d+\.\d+\S*\n", run("--version").out)


def test_help_needs_no_torch() -> None:
    slow = {"torch", "transformers", "matplotlib"}
    code = f"import sys, factsmith.cli; print({slow} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "set()\n"
    )


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "factsmith", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("factsmith ")


def test_exit_codes(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("facts: [1, {subject: x}]")
    run("init", model, "space")
    cases: list[tuple[int, list[object], str]] = [
        (2, ["frob"], "No such command"),
        (2, ["ask"], "Missing argument"),
        (2, ["ask", model, PROMPT, "--top", "0"], "--top"),
        (2, ["ask", model, "one", "two"], "Put the text in quotes"),
        (2, ["ask", model, "\udcff"], "UTF-8"),
        (2, ["patch", model], "--subject"),
        (2, ["patch", model, *FACT[:-1], " "], "target"),
        (
            2,
            ["patch", model, "--subject", "Edwin", "--prompt", "Edwin is", "--target", "a king"],
            "prompt has 0 slots `{}` in 'Edwin is'; expected exactly one, where the subject goes. "
            "Write the prompt as '{} is'",
        ),
        (
            2,
            [
                "patch",
                model,
                "--subject",
                "Edwin",
                "--prompt",
                "Edwin and {} are {}",
                "--target",
                "kings",
            ],
            "prompt has 2 slots",
        ),
        (2, ["patch", model, *FACT, "--layer", "3"], "layer 3"),
        (2, ["patch", model, *FACT, "--layer", "-1"], "layer"),
        (2, ["patch", model, *FACT, "--texts", "nowhere.txt"], "nowhere.txt"),
        (2, ["patch", model, "bad.yaml"], "bad.yaml, entry 1"),
        (2, ["patch", model, "nowhere.yaml"], "nowhere.yaml"),
        (2, ["trace", model, PROMPT, "--subject", "Nobody"], "Nobody"),
        (2, ["trace", model, PROMPT, "--subject", "Danielle", "--out", "x.doc"], ".doc"),
        (2, ["trace", model, PROMPT, "--subject", " "], "option: --subject"),
        (2, ["trace", model, " ", "--subject", "x"], "is empty"),
        (2, ["trace", model, "{} and {}", "--subject", "Edwin"], "2 slots"),
        (2, ["trace", model, "Edwin, Edwin", "--subject", "Edwin"], "more than once"),
        (2, ["trace", model, "Edwin", "--subject", "Edwin", "--occurrence", "2"], "--occurrence"),
        (2, ["trace", model, "{}", "--subject", "Edwin", "--occurrence", "1"], "leave one out"),
        (2, ["trace", model, PROMPT, "--subject", "Danielle", "--window", "3"], "--kind mlp"),
        (
            2,
            ["trace", model, PROMPT, "--subject", "Danielle", "--kind", "state", "--window", "3"],
            "--kind mlp",
        ),
        (2, ["trace", model, PROMPT, "--subject", "Danielle", "--seed", "-1"], "--seed"),
        (2, ["trace", PROMPT, "--subject", "Danielle"], "name a model"),
        (2, ["trace", "Danielle wrote facts.yaml", "--subject", "Danielle"], "name a model"),
        (2, ["trace", "bad.yaml", model], "Name the model first"),
        (2, ["neurons", model, PROMPT, "--subject", "Romania"], "'Romania' is not in"),
        (2, ["neurons", model, PROMPT, "--subject", ""], "option: --subject"),
        (2, ["neurons", model, ""], "is empty"),
        (2, ["neurons", model, PROMPT, "--seed", "-1"], "--seed"),
        (2, ["neurons", model, PROMPT, "--top", "61"], "--top"),
        (2, ["neurons", PROMPT], "name a model"),
        (2, ["layers", model, "--seed", "-1"], "--seed"),
        (2, ["layers", model, "--refresh"], "--refresh"),
        (3, ["ask", "nosuchmodel", PROMPT], "nosuchmodel"),
        (3, ["ask", "./empty", PROMPT], "empty"),
        (3, ["init", "nosuchmodel", "other"], "nosuchmodel"),
        (5, ["ask", PROMPT], 'name a model (`factsmith ask atlas "..."`) or a workspace (-w DIR)'),
        (5, ["patch", *FACT], "name a model (`factsmith patch atlas ...`)"),
        (2, ["ask", "atlas"], "the text is missing: 'atlas' is a bundled model"),
        (2, ["neurons", "atlas"], "the text is missing"),
        (2, ["pach"], "Did you mean 'patch', 'cache'? See"),
        (2, ["patch", model, *FACT[:-1], ""], "--target is empty"),
        (3, ["ask", "atlass", PROMPT], "(atlas, atlas-llama). Perhaps 'atlas' is meant. As a hub"),
        (2, ["ask", model, PROMPT, "--device", "gpu"], "give cpu, cuda, cuda:1 or mps"),
        (5, ["log"], "factsmith init"),
        (5, ["init", model, "space"], "is a workspace already"),
        (5, ["show", "ffff", "-w", "space"], "ffff"),
        (5, ["revert", "latest", "-w", "space"], "no record"),
        (5, ["checkout", "../..", "-w", "space"], "names no revision"),
    ]
    before = sorted(
        str(path) for path in tmp_path.rglob("*") if not path.name.startswith("ledger.db-")
    )
    for code, arguments, words in cases:
        done = run(*arguments)
        assert (done.code, done.out) == (code, ""), (arguments, done)
        assert words in done.err and "Traceback" not in done.err, (arguments, done.err)
    assert (
        sorted(str(path) for path in tmp_path.rglob("*") if not path.name.startswith("ledger.db-"))
        == before
    )


def test_a_fault_of_ours_is_said_without_a_traceback(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    run("init", model, "space")
    monkeypatch.setattr(Ledger, "log", fault)
    done = run("log", "-w", "space")
    assert (
        done.code == 1
        and "ZeroDivisionError: division by zero" in done.err
        and "report" in done.err
    )
    monkeypatch.setenv("FACTSMITH_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["log", "-w", "space"])


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given: str | None) -> None:
    code = (
        "import os, factsmith.cli\n"
        "try: factsmith.cli.main(['--version'])\n"
        "except SystemExit: print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split()[-1] == (given or "PASSIVE")
    # Once torch is loaded the variable counts no more, so it is left alone.
    late = subprocess.run(
        [sys.executable, "-c", f"import torch\n{code}"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert late.stdout.split()[-1] == str(given)
