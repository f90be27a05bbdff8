"""Progress, told to whoever asked for it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int | None], object]
"""Called with what is being done, how much of it is done, and how much there is (None: not known)."""

CHOOSING = "choosing layers to edit"
"""What is told before layers are tried out that nobody named: work that the caller can spare."""


def tell(progress: Progress | None, what: str, done: int, total: int | None) -> None:
    """Call it, where there is one."""
    if progress is not None:
        progress(what, done, total)
