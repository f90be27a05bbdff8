"""What is shown while a command works: bars on a terminal, and a line now and then elsewhere.

with progress() as tell:
    tell("tracing", 3, 40)
with progress("loading", "solving", "proof") as tell:     # shown as steps 1 to 3
    stage(tell, "solving")
with during("drawing"):
    ...
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from ..core.progress import Pace, Progress, Stage, in_words
from ..core.tables import visible
from .printing import above_bars, complain, manner, plain_console, with_flag

PATCH_STAGES: tuple[Stage, ...] = ("loading", "planning", "second moments", "solving", "proof")
"""The parts of a command that writes facts."""

_FIRST_LINE, _MOST_SECONDS = 2.0, 10.0
"""Seconds before the first line about progress, and between two lines."""


@contextlib.contextmanager
def progress(*stages: Stage) -> Iterator[Progress]:
    """Yield a function to report progress to.

    On a terminal it shows bars on standard error, which are gone at the end. Elsewhere it prints a
    line now and then. Notes stay, wherever standard error goes. --quiet leaves out all of it.

    Args:
        stages: The parts of the command, in order, if it has several.
    """
    console = plain_console(stderr=True)
    if manner.get().quiet:
        yield _Quiet()
    elif console.is_terminal:
        pace = Pace()
        with _bars(console, pace) as bars, above_bars(console):
            yield _Reporter(bars, pace, stages)
    else:
        with _Lines(stages) as lines:
            yield lines


@contextlib.contextmanager
def during(step: str) -> Iterator[None]:
    """Show one step while the block runs, such as the import of what a command needs."""
    with progress() as tell:
        tell(step, 0, None)
        yield


def _bars(console: Console, pace: Pace) -> Bars:
    columns = (
        SpinnerColumn(),
        # A step is named after models and facts, so its name is never markup.
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1)),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _Left(pace),
    )
    return Bars(*columns, console=console, transient=True)


class _Left(ProgressColumn):
    """How long the step still takes, if its pace shows that."""

    def __init__(self, pace: Pace) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.pace = pace

    def render(self, task: Task) -> Text:
        """Return the time, or nothing."""
        left = self.pace.left()
        return Text("" if left is None else f"{in_words(left)} left")


class _Quiet:
    """Shows nothing."""

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Take no notice."""


class _Speaking:
    """Shows notes as lines that stay, and knows which part of the command runs."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self.number = 0

    def note(self, text: str, *, argument: str | None = None) -> None:
        """Print a note, with the option that changes it."""
        complain("note", text if manner.get().json else with_flag(text, argument))

    def stage(self, name: Stage) -> None:
        """Count the parts of the command. A part inside another command's part does not count."""
        if name in self.stages:
            self.number = self.stages.index(name) + 1


class _Reporter(_Speaking):
    """Shows progress as bars."""

    def __init__(self, bars: Bars, pace: Pace, stages: Sequence[Stage]) -> None:
        super().__init__(stages)
        self.bars, self.pace = bars, pace
        self.tasks: dict[str, Any] = {}

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Show how far a step is; the bar of an earlier step goes."""
        self.pace.report(step, done, total)
        text = f"{self.number}/{len(self.stages)} {step}" if self.number else step
        if text not in self.tasks:
            for task in self.tasks.values():
                self.bars.update(task, visible=False)
            self.tasks = {text: self.bars.add_task(visible(text), total=total)}
        self.bars.update(self.tasks[text], completed=done, total=total)


class _Lines(_Speaking):
    """Prints how far the work is: after two seconds, and then every ten seconds."""

    def __init__(
        self, stages: Sequence[Stage] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(stages)
        self.state: tuple[str, int, int | None] = ("working", 0, None)
        self.clock, self.start, self.pace = clock, clock(), Pace(clock)
        self.end = threading.Event()
        self.printer = threading.Thread(target=self._run, daemon=True)
        self.manner = manner.get()

    def __enter__(self) -> _Lines:
        self.printer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self.printer.join()

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Keep how far a step is, for the next line."""
        self.pace.report(step, done, total)
        self.state = (step, done, total)

    def _run(self) -> None:
        manner.set(self.manner)  # a thread has a context of its own
        seconds = _FIRST_LINE
        while not self.end.wait(seconds):
            self.print()
            seconds = _MOST_SECONDS

    def print(self) -> None:
        """Print a line about the present step."""
        (step, done, total), left = self.state, self.pace.left()
        seconds, of = round(self.clock() - self.start), len(self.stages)
        share = "" if total is None else f": {done:,} of {total:,}"
        share = share if total is not None or not done else f": {done:,}"
        part = f"step {self.number} of {of}, " if self.number else ""
        rest = "" if left is None else f", about {in_words(left)} left"
        if rest and self.number and self.number < of:
            rest += " in this step"
        fields: dict[str, Any] = {"step": step, "done": done, "total": total, "seconds": seconds}
        fields["seconds_left"] = None if left is None else round(left)
        if self.number:
            fields |= {"stage": self.number, "stages": of}
        complain("progress", f"{part}{step}{share}, {seconds} s{rest}", **fields)
