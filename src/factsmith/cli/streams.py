"""Standard output and standard error that never fail a command that has done its work.

    with forgiving_streams():
        with printing_output():
            print("all of it")

A terminal of another encoding than UTF-8 lacks characters: they are replaced. A reader may close a
pipe early, as `head` does. Either stream may be closed from the start.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_STRICT = ("strict", "surrogateescape")
"""How streams treat characters that they lack, where that is an error."""


@contextlib.contextmanager
def forgiving_streams() -> Iterator[None]:
    """Replace characters that a stream cannot write, and a closed stream by nothing."""
    before: list[tuple[io.TextIOWrapper, str]] = []
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:
                stack.callback(setattr, sys, name, None)
                nothing = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                setattr(sys, name, nothing)
            elif isinstance(stream, io.TextIOWrapper) and stream.errors in _STRICT:
                before.append((stream, stream.errors))
                stream.reconfigure(errors="replace")
        try:
            yield
        finally:
            for stream, errors in before:
                with contextlib.suppress(OSError, ValueError):
                    stream.reconfigure(errors=errors)


class UnwrittenError(Exception):
    """The output cannot be written, for the reason that `__cause__` gives."""


@contextlib.contextmanager
def printing_output() -> Iterator[None]:
    """Tell the errors of standard output from those of other files: raises UnwrittenError."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        raise UnwrittenError(error.strerror or str(error)) from error


def can_write(text: str, *, err: bool = False) -> bool:
    """Return whether standard output, or standard error, has every character of a text."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def go_silent() -> None:
    """Let all later output go nowhere: whoever read it is gone, or the disk is full."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
