"""One task on the workers of a pool: parts go out, results come back in the order of the parts.

run = Run(pool, names, models, (task_id, task, references), progress)
for result in run.results(parts):
    ...
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import ClusterError
from ..model.language_model import LanguageModel
from .installed import why
from .pool import Pool, Seat
from .shipping import Names, Packed, pack, unpack, unsendable
from .worker import Answer

AHEAD = 2
"""Parts for each worker that are handed out before the next result."""

ATTEMPTS = 4
"""How often a part is tried, if workers die of it."""

STRAGGLER = 3.0
"""How many times as long as the median a part may take before a second worker tries it too."""

STRAGGLER_SECONDS = 5.0
"""How long a part may take in any case before a second worker tries it too."""

_LOOK = 1.0
"""Seconds between two looks at how far the parts are."""


@dataclass(eq=False)
class Run:
    """A task under way. Several may be, in turn or in several threads.

    Attributes:
        pool: The workers.
        names: The names of the task's models.
        models: {key: model}, for results.
        task: The task's number, the task, and references to its models.
        progress: Called with the sum of what the parts report.
        waiting: Numbers of the parts that nobody does yet.
        packed: {number: part} of the parts that were taken and whose results are not yielded.
        answers: {number: answer} of the answers whose turn has not come.
        attempts: How often each part was tried.
        counts: {number: what it reported last}.
        seconds: How long finished parts took.
        failure: Why the run cannot go on. None: it can.
    """

    pool: Pool
    names: Names
    models: Mapping[str, LanguageModel]
    task: tuple[str, Any, dict[str, list[Any]]]
    progress: Callable[[int], object] | None
    waiting: deque[int] = field(default_factory=deque)
    packed: dict[int, Packed] = field(default_factory=dict)
    answers: dict[int, Answer] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)
    counts: dict[int, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    failure: ClusterError | None = None
    _reported: int = 0
    _looked: float = 0.0

    def results(self, parts: Iterable[Any]) -> Iterator[Any]:
        """Yield the results in the order of the parts.

        Raises:
            ClusterError: A part cost several workers their lives, or no worker can be had.
            Exception: What the task raised.
        """
        coming = enumerate(parts)
        try:
            for number in itertools.count():
                while number not in self.answers:
                    if self.pool.closed:
                        raise ClusterError(
                            "the block of this engine ended before all results were taken; take "
                            "them inside the block"
                        )
                    if self.failure is not None:
                        raise self.failure
                    self._take(coming, number + AHEAD * self.pool.n)
                    if not self.packed:
                        self._show()
                        return
                    with self.pool.lock:
                        self._hand_out()
                        self._collect()
                del self.packed[number]
                yield self._result(self.answers.pop(number))
        finally:
            for seat in self._doing():
                seat.owner = None  # what it still does is not waited for

    def _doing(self) -> list[Seat]:
        """Return the places of the workers that do parts of this run."""
        return [seat for seat in self.pool.seats if seat.owner is self]

    def _take(self, coming: Iterator[tuple[int, Any]], stop: int) -> None:
        """Take the parts below a number."""
        while max(self.packed, default=stop - 2) < stop - 1:
            number, part = next(coming, (None, None))
            if number is None:
                return
            try:
                self.packed[number] = pack(part, self.names)
            except Exception as error:
                raise unsendable(f"part {number + 1}", error) from error
            self.waiting.append(number)

    def _hand_out(self) -> None:
        """Give every idle worker something to do."""
        for seat in self.pool.idle():
            if self.waiting:
                self._give(seat, self.waiting.popleft())
            elif (late := self._straggler()) is not None:
                self._give(seat, late)

    def _give(self, seat: Seat, number: int) -> None:
        task_id, task, models = self.task
        seat.owner, seat.number = self, number
        seat.began, seat.done = time.monotonic(), 0
        seat.part_id = f"{task_id}/{number}"
        seat.answer = seat.actor.run.remote(
            task_id, seat.part_id, task, models, self.packed[number]
        )

    def _straggler(self) -> int | None:
        """Return a part that takes much longer than the others and is done by one worker alone."""
        if not self.seconds:
            return None
        workers = Counter(seat.number for seat in self._doing())
        limit = max(STRAGGLER * statistics.median(self.seconds), STRAGGLER_SECONDS)
        now = time.monotonic()
        late = [
            seat.number
            for seat in self._doing()
            if workers[seat.number] == 1
            and seat.number in self.packed  # else it was done by another worker, and yielded
            and seat.number not in self.answers
            and now - seat.began > limit
        ]
        return min(late, default=None)

    def _collect(self) -> None:
        """Wait for answers, and give each to the run that it belongs to."""
        for seat, value in self.pool.wait(_LOOK):
            owner, seat.owner = seat.owner, None
            if owner is not None:
                owner.receive(seat, value)
        now = time.monotonic()
        if now - self._looked >= _LOOK:
            self._looked = now
            self._report()

    def receive(self, seat: Seat, value: Any) -> None:
        """Keep an answer, or have the part done again if its worker died."""
        number = seat.number
        if number in self.answers or number not in self.packed:
            return  # the second answer
        if isinstance(value, Answer):
            self.answers[number] = value
            self.seconds.append(time.monotonic() - seat.began)
            self.counts[number] = value.done
            return
        self.attempts[number] += 1
        if self.attempts[number] >= ATTEMPTS:
            self.failure = ClusterError(
                f"part {number + 1} cost {ATTEMPTS} workers their lives. Ray says of the last: "
                f"{why(value)}. Often a worker has too little memory: give each more of it, or "
                "make the parts smaller"
            )
        elif all(other.number != number for other in self._doing()):
            self.waiting.appendleft(number)

    def _report(self) -> None:
        """Report how much is done, as far as the workers said so."""
        if self.progress is None:
            return
        self.pool.ask_how_far()
        for seat in self._doing():
            self.counts[seat.number] = max(seat.done, self.counts.get(seat.number, 0))
        self._show()

    def _show(self) -> None:
        """Call the progress with the sum of the counts, unless it has grown smaller."""
        total = sum(self.counts.values())
        if self.progress is not None and total >= self._reported:
            self._reported = total
            self.progress(total)

    def _result(self, answer: Answer) -> Any:
        """Return a result, or raise the error that a part raised."""
        value = unpack(answer.packed, self.models)
        if answer.kind == "error":
            raise value
        return value
