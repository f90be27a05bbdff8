"""A studio for tests: the bundled model in a workspace, with verbs that tests control."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.core.progress import Progress
from factsmith.core.tables import Table
from factsmith.keep.workbench import Workbench
from factsmith.model.load import load
from factsmith.studio.arguments import Arguments, Source
from factsmith.studio.desk import Desk, Place
from factsmith.studio.rooms import Room
from factsmith.studio.session import Studio
from factsmith.studio.verb import Answer, Verb

LEV = "The currency of Bulgaria is the"
FACT = Fact("Bulgaria", "The currency of {} is the", "euro")


class SayArguments(Source):
    prompt: str = Field(title="Prompt", description="The text that the model continues.")


class WriteArguments(Arguments):
    target: str = Field(title="Target", description="What the model should say.")


class HoldArguments(Arguments):
    steps: int = Field(default=10**6, ge=1, title="Steps", description="How long it takes.")


def say(desk: Desk, arguments: SayArguments, tell: Progress) -> Answer:
    """Ask the model."""
    with desk.reading(arguments, tell) as lm:
        text = lm.answer([arguments.prompt])[0]
    if text.startswith("refuse"):
        raise InputError("refused", argument="prompt")
    return Answer({"answer": text}, tables=[Table("", {"answer": "<"}, [(text,)])])


def write(desk: Desk, arguments: WriteArguments, tell: Progress) -> Answer:
    """Patch the model, whatever the proof says."""
    fact = Fact(FACT.subject, FACT.prompt, arguments.target)
    outcome = desk.bench.apply(fact, force=True, progress=tell)
    return Answer({"revision": outcome.revision and outcome.revision.id})


def count(desk: Desk, arguments: Arguments, tell: Progress) -> Answer:
    """Give a number that JSON does not have."""
    return Answer({"number": float("inf")})


def halve(desk: Desk, arguments: Arguments, tell: Progress) -> Answer:
    """Give half a character, as a token may be."""
    return Answer({"token": "\udce2"}, tables=[Table("", {"token": "<"}, [("\udce2",)])])


def break_down(desk: Desk, arguments: Arguments, tell: Progress) -> Answer:
    """Fail as only a fault of ours would."""
    raise ZeroDivisionError("a fault of the test")


class Holding:
    """A verb that goes on until the test lets it end."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self, desk: Desk, arguments: HoldArguments, tell: Progress) -> Answer:
        """Change the weights, and hold them so."""
        with desk.bench.on_base():
            for number in range(arguments.steps):
                tell("holding", number, arguments.steps)
                self.begun.set()
                if self.may_end.wait(0.005):
                    break
        return Answer({"held": True})


def _python(arguments: Arguments, place: Place) -> str:
    return f"print({arguments!r})"


def _command(arguments: Arguments, place: Place) -> list[str]:
    return ["factsmith test"]


def rooms_with(hold: Holding) -> tuple[Room, ...]:
    """Return rooms with verbs for tests."""
    asking = Verb("say", "Say", "Ask the model.", SayArguments, say, _python, _command)
    broken = Verb("broken", "Broken", "Fail.", Arguments, break_down, _python, _command)
    counting = Verb("count", "Count", "Count.", Arguments, count, _python, _command)
    halving = Verb("halve", "Halve", "Halve.", Arguments, halve, _python, _command)
    writing = Verb(
        "write", "Write", "Patch the model.", WriteArguments, write, _python, _command, "write"
    )
    holding = Verb("hold", "Hold", "Go on.", HoldArguments, hold, _python, _command, "write")
    return (
        Room("talk", "Talk", "Ask the model things.", (asking, broken, counting, halving)),
        Room("change", "Change", "Change the model.", (writing, holding), ("write", "hold")),
    )


@contextmanager
def studio_in(folder: Path, rooms: tuple[Room, ...]) -> Iterator[Studio]:
    """A block with a studio that is open on the bundled model."""
    desk = Desk(
        folder,
        lambda tell: Workbench(load("atlas", progress=tell), folder),
        lambda name, tell: load(name, progress=tell),
        ["atlas", "atlas-llama"],
    )
    studio = Studio(desk, rooms)
    try:
        studio.open(lambda *_: None)
        yield studio
    finally:
        studio.close()
