"""The one seam behind which parts of a task run: in this process, or on other machines.

    results = list(Local().map(task, parts))        # [task(part) for part in parts]
    with running_on(executor):
        second_moments(lm, texts, [3])              # its parts run there

A caller cuts its work into parts that do not depend on one another. It gives them to an executor
with the function that does one part, and gets the results in the order of the parts. How work is
cut does not depend on how many workers there are, so every number of workers gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

from .checks import check_count

Part = TypeVar("Part")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs the parts of a task.

    Attributes:
        cuts: Whether work is cut into parts. If not, it runs in one piece, which needs less memory.
        part_tokens: Tokens of one part of a corpus. None: each sweep chooses.
    """

    cuts: bool
    part_tokens: int | None

    def map(
        self,
        task: Callable[[Part], Result],
        parts: Iterable[Part],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[Result]:
        """Yield the result of every part, in the order of the parts.

        Args:
            task: Does one part. It can be pickled, and leaves every model as it was.
            parts: The parts. They can be pickled, and are taken as they are needed.
            progress: Called with the sum of what the parts reported by `report_done`.
        """

    def stream(
        self, read: Callable[[Part], Iterable[Result]], units: Sequence[Part]
    ) -> Iterator[Result]:
        """Yield everything that `read` yields of each unit, in the order of the units.

        Args:
            read: Reads one unit, such as a file. It can be pickled, and holds no model.
            units: The units. They can be pickled.
        """

    def check(self, thing: object, what: str) -> None:
        """Check that something can be part of a task, before any work is done.

        Args:
            thing: The task, or a part of it.
            what: What it is, for the error, such as "the probe".

        Raises:
            ClusterError: It cannot be sent to other machines.
        """


class Local:
    """Runs the parts in this process, one after another.

    Attributes:
        cuts: Whether work is cut into the same parts as on other machines, so that the numbers are
            the same to the last bit.
        part_tokens: Tokens of one part of a corpus. None: each sweep chooses.
    """

    def __init__(self, *, cuts: bool = False, part_tokens: int | None = None) -> None:
        """Take how work is cut.

        Raises:
            InputError: when part_tokens is not a whole number of at least 1.
        """
        self.cuts, self.part_tokens = cuts, check_part_tokens(part_tokens)

    def map(
        self,
        task: Callable[[Part], Result],
        parts: Iterable[Part],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[Result]:
        """Yield the result of every part. A part starts when its result is asked for."""
        finished = 0
        for part in parts:
            # What a part cuts in turn stays in one piece, as on another machine.
            with running_on(Local()), reporting(_Sum(finished, progress)) as so_far:
                result = task(part)
            finished = so_far.total
            yield result

    def stream(
        self, read: Callable[[Part], Iterable[Result]], units: Sequence[Part]
    ) -> Iterator[Result]:
        """Yield everything that `read` yields of each unit, read as it is needed."""
        for unit in units:
            yield from read(unit)

    def check(self, thing: object, what: str) -> None:
        """Accept anything: nothing is sent anywhere."""


def check_part_tokens(part_tokens: int | None) -> int | None:
    """Return how many tokens a part has, if that is a whole number of at least 1, or None.

    Raises:
        InputError: when it is something else.
    """
    if part_tokens is None:
        return None
    what = "the number of tokens of one part of a corpus"
    return check_count(part_tokens, "part_tokens", what, also="None")


# ── which executor is in use ──────────────────────────────────────────────────────────────────────

_EXECUTOR: ContextVar[Executor | None] = ContextVar("executor", default=None)


@contextmanager
def running_on(executor: Executor) -> Iterator[None]:
    """A block in which everything that is cut into parts runs on an executor."""
    token = _EXECUTOR.set(executor)
    try:
        yield
    finally:
        _EXECUTOR.reset(token)


def executor_in_use() -> Executor:
    """Return the executor of the innermost `running_on` block, or one of this process."""
    return _EXECUTOR.get() or Local()


# ── how much of a part is done ────────────────────────────────────────────────────────────────────


class Counter(Protocol):
    """Takes how much of a part is done."""

    def __call__(self, done: int) -> object:
        """Take how much is done, from the beginning of the part."""


_COUNTER: ContextVar[Counter | None] = ContextVar("counter", default=None)

CounterT = TypeVar("CounterT", bound=Counter)


@contextmanager
def reporting(counter: CounterT) -> Iterator[CounterT]:
    """A block in which a task runs, and `report_done` calls the counter."""
    token = _COUNTER.set(counter)
    try:
        yield counter
    finally:
        _COUNTER.reset(token)


def report_done(done: int) -> None:
    """Report how much of the present part is done. Called inside a task, in any unit."""
    counter = _COUNTER.get()
    if counter is not None:
        counter(done)


class _Sum:
    """Adds what a part has done to what the parts before it have done."""

    def __init__(self, before: int, progress: Callable[[int], object] | None) -> None:
        self.before, self.total, self.progress = before, before, progress
        self.around = _COUNTER.get()

    def __call__(self, done: int) -> None:
        self.total = self.before + done
        if self.progress is None:
            return
        token = _COUNTER.set(self.around)  # progress may itself report what is done of a part
        try:
            self.progress(self.total)
        finally:
            _COUNTER.reset(token)
