"""A progress that ends a server in the middle of what is reported."""

from __future__ import annotations

from collections.abc import Callable

from tools.servers import RealServer


def killer(server: RealServer, after: str) -> Callable[..., None]:
    """Return a progress that kills the server in the step after one.

    Args:
        server: The server.
        after: What the name of that step begins with.
    """
    steps: list[str] = []

    def progress(step: str, *_: object) -> None:
        if not step.startswith(after) and any(each.startswith(after) for each in steps):
            server.kill()
        steps.append(step)

    return progress
