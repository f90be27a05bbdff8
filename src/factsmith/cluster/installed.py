"""Ray, imported where it is used first."""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..core.errors import ClusterError

_log = logging.getLogger(__name__)

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

_PRINTS = "print_to_stdstream"
"""The function with which Ray prints what its machines report, such as the death of a worker."""


def need_ray() -> Any:
    """Return the module ray.

    Raises:
        ClusterError: It is not installed.
    """
    # Its workers keep the devices that the machine shows, and it sends no statistics anywhere.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("ray")
    except ImportError as error:
        raise ClusterError(
            f"Ray cannot be imported ({error}). Work on several workers needs it; install it with: "
            "pip install 'factsmith[ray]'"
        ) from None


@contextmanager
def quiet_ray() -> Iterator[None]:
    """A block in which Ray's reports go to the log.

    Ray prints them to standard output, also with its own logging turned off. They would stand in
    the JSON of a command.
    """
    module: Any = importlib.import_module("ray._private.worker")
    before = getattr(module, _PRINTS, None)
    if before is not None:
        setattr(module, _PRINTS, _logged)
    try:
        yield
    finally:
        if before is not None:
            setattr(module, _PRINTS, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A block that a Ctrl-C ends at its end.

    In the middle of its start, Ray would crash or leave processes behind. Its processes take no
    notice of a Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread
        return
    caught: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda *details: caught.append(details))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[0])


def _logged(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Log what Ray would print."""
    for line in data.get("lines", ()):
        _log.debug("Ray: %s", line)


def why(error: Exception) -> str:
    """Return in a line why a worker ended, as Ray says it."""
    plain = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")
