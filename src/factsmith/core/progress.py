"""Progress reports, stages and notes, sent to whoever asked for them.

    def show(step, done, total): print(step, done, total)
    second_moments(lm, texts, [3], progress=show)

A caller passes any function of (step, done, total). Where that function has a method or attribute
`note`, it also gets notes: sentences that the caller should see while the work still runs. Where it
has `stage`, it learns which part of the whole work begins.

Steps and notes are also logged, under the name "factsmith": notes at the level INFO, and the
beginning of each step at DEBUG.

    pace = Pace()
    pace.report("tracing", 3, 40)
    pace.left()                      # seconds; None where it would be a guess
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

_log = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[str, int, int | None], object]
"""Called with the name of the step, how much is done, and how much there is (None: unknown)."""

Stage: TypeAlias = Literal["loading", "planning", "second moments", "solving", "proof"]
"""A part of a command that has several. Each may have many steps."""

_SURE_AFTER = 2.0
"""Seconds that a step must have run before its pace says how long the rest takes."""


def tell(progress: Progress | None, step: str, done: int, total: int | None) -> None:
    """Report how far a step is."""
    if not done:
        _log.debug("%s", step)
    if progress is not None:
        progress(step, done, total)


def note(progress: Progress | None, text: str, *, argument: str | None = None) -> None:
    """Send a note.

    Args:
        progress: Gets the note if it has a `note`.
        text: One sentence or two.
        argument: The Python argument with which the caller can change this, such as "layer".
    """
    _log.info("%s", text)
    send = getattr(progress, "note", None)
    if send is not None:
        send(text, argument=argument)


def stage(progress: Progress | None, name: Stage) -> None:
    """Say that a part of the whole work begins, to a progress that has a `stage`."""
    send = getattr(progress, "stage", None)
    if send is not None:
        send(name)


def in_words(seconds: float) -> str:
    """Return a time that is not known to the second: "5 s", "2 min", "1 h 20 min"."""
    if seconds <= 57.5:
        return f"{max(5, 5 * math.ceil(seconds / 5 - 0.5))} s"
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(5 * round(minutes / 5), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


class Tally:
    """What several calls do of one step, added up.

    tally = Tally(progress, "asking", 30)
    first(progress=tally.part(10))       # reports 0 to 10
    second(progress=tally.part(20))      # reports 10 to 30
    """

    def __init__(self, progress: Progress | None, step: str, total: int) -> None:
        """Begin a step that has this much to do."""
        self._progress, self._step, self._total = progress, step, total
        self._done = self._reported = 0
        tell(progress, step, 0, total)

    def part(self, size: int, weight: int = 1) -> Callable[[int], object]:
        """Return what takes reports of the next part of the step, and count it as done after that.

        Args:
            size: How much the part has to do, by its own count.
            weight: How much each of it counts.
        """
        start = self._done
        self._done += size * weight

        def report(done: int) -> None:
            now = start + min(done, size) * weight
            if now > self._reported:
                self._reported = now
                tell(self._progress, self._step, now, self._total)

        return report


@dataclass(frozen=True)
class _Reported:
    """The newest report of a step, and its first one.

    Attributes:
        step: The name of the step.
        done: How much is done.
        total: How much there is.
        at: When that was reported.
        first_done: How much was done when the step was first reported.
        first_at: When that was.
    """

    step: str
    done: int
    total: int | None
    at: float
    first_done: int
    first_at: float


class Pace:
    """How fast the present step goes, from its reports."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the clock, which gives seconds."""
        self._clock = clock
        self._last: _Reported | None = None

    def report(self, step: str, done: int, total: int | None) -> None:
        """Keep how far a step is. Another step, or one that begins again, starts the clock."""
        now, last = self._clock(), self._last
        if last is None or last.step != step or done < last.done:
            self._last = _Reported(step, done, total, now, done, now)
        else:
            at = now if done > last.done else last.at
            self._last = _Reported(step, done, total, at, last.first_done, last.first_at)

    def left(self) -> float | None:
        """Return how many seconds the rest of the step takes at its present pace.

        None: nobody knows how much there is, nothing was finished yet, or the step has only begun.
        """
        last = self._last
        if last is None or last.total is None or last.done <= last.first_done:
            return None
        now, rest = self._clock(), last.total - last.done
        if rest <= 0 or now - last.first_at < _SURE_AFTER:
            return None
        finished = last.done - last.first_done
        pace = (last.at - last.first_at) / finished
        waited = now - last.at
        if waited > pace:  # what runs now takes longer than what is done
            pace, waited = (now - last.first_at) / (finished + 1), 0.0
        return max(pace * rest - waited, 0.0)
