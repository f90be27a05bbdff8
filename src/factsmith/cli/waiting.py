"""What is shown while a command works: bars on a terminal, and a line now and then elsewhere.

with progress() as tell:
    tell("tracing", 3, 40)
with during("drawing"):
    ...
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column

from ..core.progress import Progress
from ..core.tables import visible
from .printing import above_bars, complain, manner, plain_console, with_flag

_FIRST_LINE, _MOST_SECONDS = 2.0, 10.0
"""Seconds before the first line about progress, and the longest time between two lines."""


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Yield a function to report progress to.

    On a terminal it shows bars on standard error, which are gone at the end. Elsewhere it prints a
    line now and then. Notes stay, wherever standard error goes. --quiet leaves out all of it.
    """
    console = plain_console(stderr=True)
    if manner.get().quiet:
        yield _Quiet()
    elif console.is_terminal:
        with _bars(console) as bars, above_bars(console):
            yield _Reporter(bars)
    else:
        with _Lines() as lines:
            yield lines


@contextlib.contextmanager
def during(step: str) -> Iterator[None]:
    """Show one step while the block runs, such as the import of what a command needs."""
    with progress() as tell:
        tell(step, 0, None)
        yield


def _bars(console: Console) -> Bars:
    columns = (
        SpinnerColumn(),
        # A step is named after models and facts, so its name is never markup.
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1)),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Bars(*columns, console=console, transient=True)


class _Quiet:
    """Shows nothing."""

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Take no notice."""


class _Notes:
    """Shows notes as lines that stay."""

    def note(self, text: str, *, argument: str | None = None) -> None:
        """Print a note, with the option that changes it."""
        complain("note", text if manner.get().json else with_flag(text, argument))


class _Reporter(_Notes):
    """Shows progress as bars."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Show how far a step is; the bar of an earlier step goes."""
        if step not in self.tasks:
            for task in self.tasks.values():
                self.bars.update(task, visible=False)
            self.tasks = {step: self.bars.add_task(visible(step), total=total)}
        self.bars.update(self.tasks[step], completed=done, total=total)


class _Lines(_Notes):
    """Prints how far the work is: after two seconds, and then every few seconds."""

    def __init__(self) -> None:
        self.state: tuple[str, int, int | None] = ("working", 0, None)
        self.start = time.monotonic()
        self.end = threading.Event()
        self.clock = threading.Thread(target=self._run, daemon=True)
        self.manner = manner.get()

    def __enter__(self) -> _Lines:
        self.clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self.clock.join()

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Keep how far a step is, for the next line."""
        self.state = (step, done, total)

    def _run(self) -> None:
        manner.set(self.manner)  # a thread has a context of its own
        seconds = _FIRST_LINE
        while not self.end.wait(seconds):
            self._print()
            seconds = min(2 * seconds, _MOST_SECONDS)

    def _print(self) -> None:
        step, done, total = self.state
        seconds = round(time.monotonic() - self.start)
        share = "" if total is None else f": {done:,} of {total:,}"
        share = share if total is not None or not done else f": {done:,}"
        complain("progress", f"{step}{share}, {seconds} s", step=step, done=done, total=total)
