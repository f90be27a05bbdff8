"""The one seam behind which parts of a task run: in this process, or on other machines.

    results = list(Local().map(task, parts))        # [task(part) for part in parts]

A caller cuts its work into parts that do not depend on one another. It gives them to an executor
with the function that does one part, and gets the results in the order of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs the parts of a task."""

    def map(self, task: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[Result]:
        """Yield the result of every part, in the order of the parts."""


class Local:
    """Runs the parts in this process, one after another."""

    def map(self, task: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[Result]:
        """Yield the result of every part. A part starts when its result is asked for."""
        return map(task, parts)
