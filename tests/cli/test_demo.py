"""The demonstration as it is printed: nothing is cut, and JSON holds the same."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from commands import Run
from factsmith.cli.demo import _print_step
from factsmith.cli.story import Step
from factsmith.patch.proof import Check, Verification

LONG = "What is the currency that people in the Republic of Bulgaria use in shops today? It is the"


def printed(step: Step, width: int) -> str:
    """Return a step as it is printed in a terminal of this width."""
    written = io.StringIO()
    _print_step(Console(file=written, width=width, color_system=None), 4, step)
    return written.getvalue()


@pytest.fixture
def proved() -> Step:
    """A proof with a long prompt, long answers, and a check that failed."""
    check = Check(
        role="prompt",
        prompt=LONG,
        wanted="euro",
        before="Bulgarian lev.",
        after="European euro.",
        p_before=0.125,
        p_after=0.875,
        held=True,
    )
    failed = dataclasses.replace(
        check, role="neighbour", after="euro.", p_before=None, held=False, prompt="It is"
    )
    return Step(
        name="proved",
        title="The proof",
        before=("one sentence",),
        proof=Verification(checks=(check, failed)),
        after=("another sentence",),
        data={},
    )


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_proof_is_whole_in_every_terminal(proved: Step, width: int) -> None:
    text = printed(proved, width)
    assert max(map(cell_len, text.splitlines())) <= width
    words = text.split()
    assert set(LONG.split()) <= set(words)
    for part in ("Bulgarian", "European", "0.125", "0.875", "ok", "no", "neighbour"):
        assert part in words
    assert text.index("one sentence") < text.index("0.875") < text.index("another sentence")
    assert "efficacy" not in text, "the sentences of the story give the shares"


@pytest.mark.slow
def test_the_demonstration_prints_its_steps_and_gives_them_as_json(run: Run) -> None:
    done = run("demo", "played", "--json")
    assert done.code == 0
    steps = [name for name in done.json if name != "format_version"]
    assert (steps[0], steps[-1]) == ("believes", "next")
    assert done.json["reverted"]["equal"] == done.json["reverted"]["tensors"]
    again = run("demo", "played")
    assert (
        again.code == 0 and "\n4. The proof" in again.out and "factsmith log -w played" in again.out
    )
