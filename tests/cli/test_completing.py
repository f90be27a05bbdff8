"""A shell completes commands, models, methods, formats and revisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from commands import FACT, Run
from factsmith.cli import completing
from factsmith.keep.export.manifest import FORMATS
from factsmith.patch.editors import NAMES

Complete = Callable[[str], list[str]]


@pytest.fixture
def complete(run: Run, monkeypatch: pytest.MonkeyPatch) -> Complete:
    """Return what bash offers after some words; the last one is not finished."""

    def offered(words: str) -> list[str]:
        with monkeypatch.context() as patched:
            patched.setenv("_FACTSMITH_COMPLETE", "complete_bash")
            patched.setenv("COMP_WORDS", f"factsmith {words}")
            patched.setenv("COMP_CWORD", str(len(f"factsmith {words}".split(" ")) - 1))
            return run().out.split()

    return offered


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("lo", ["log"]),
        ("ask ", ["atlas", "atlas-llama"]),
        ("init atlas-", ["atlas-llama"]),
        ("ask ./fold", []),
        ("patch --method r", ["rome", "r-rome"]),
        ("evaluate atlas --methods rome,mem", ["rome,memit"]),
        ("evaluate atlas --suite at", ["atlas"]),
        ("export out --format a", ["adapter"]),
        ("trace atlas x --kind m", ["mlp"]),
        ("show ", ["latest"]),
        ("show x", []),
        ("checkout b", ["base"]),
        ("log --work", ["--workspace"]),
    ],
)
def test_words(complete: Complete, words: str, wanted: list[str]) -> None:
    assert complete(words) == wanted


@pytest.mark.usefixtures("quick")
def test_the_revisions_of_a_workspace(
    run: Run, complete: Complete, model: Path, tmp_path: Path
) -> None:
    run("init", model, "space")
    done = run("patch", *FACT, "--force", "-w", "space", "--json")
    assert done.code == 0, done.err
    identity = done.json["revision"]["id"]
    assert complete("show -w space ") == ["latest", identity[:10]]
    assert complete(f"revert -w space {identity[:4]}") == [identity[:10]]
    assert complete(f"show -w space {identity[:14]}") == [identity[:14]]
    (tmp_path / "space" / "ledger.db").write_bytes(b"damaged")
    assert complete("show -w space l") == ["latest"]


def test_the_lists_are_those_of_the_library() -> None:
    assert NAMES == completing.JUDGED
    assert list(completing.FORMATS) == list(FORMATS)


def test_a_shell_can_be_set_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # Typer asks which shell started the process, and that may be make's own.
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: ("bash", "/bin/bash"))
    assert "_FACTSMITH_COMPLETE" in run("--show-completion", "bash").out
    assert "--install-completion" in run("--help").out
