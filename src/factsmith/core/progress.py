"""Progress reports and notes, sent to whoever asked for them.

    def show(step, done, total): print(step, done, total)
    second_moments(lm, texts, [3], progress=show)

A caller passes any function of (step, done, total). Where that function has a method or attribute
`note`, it also gets notes: sentences that the caller should see while the work still runs.

Steps and notes are also logged, under the name "factsmith": notes at the level INFO, and the
beginning of each step at DEBUG.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

_log = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[str, int, int | None], object]
"""Called with the name of the step, how much is done, and how much there is (None: unknown)."""


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
