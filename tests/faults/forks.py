"""Fork processes: kill some while they work, and start some at the same moment."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Reports:
    """Reports of a process over a pipe: the begin and the end of each operation."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def __call__(self, *fields: str) -> None:
        os.write(self.pipe, (json.dumps(fields) + "\n").encode())

    @contextmanager
    def doing(self, kind: str, target: str = "") -> Iterator[list[str]]:
        """Report one operation. The block appends its result to the list."""
        given: list[str] = []
        self("begin", kind, target)
        yield given
        self("done", kind, target, *given)


def die_at_line(n: int, report: Reports) -> None:
    """Kill this process at the n-th line of factsmith that it runs after this call."""
    left = n

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if "factsmith" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def run_until_killed(
    work: Callable[[Reports], None], ready: int, delay: float | None
) -> list[list[str]]:
    """Fork a process, kill it while it works, and return its reports.

    Args:
        work: What the process does.
        ready: How many lines it reports before the delay begins.
        delay: Seconds until the kill. With None the process kills itself.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            work(Reports(write))
        except BaseException:
            os.write(write, (json.dumps(["failed", traceback.format_exc()]) + "\n").encode())
        finally:
            os._exit(1)
    os.close(write)
    reported, until = b"", time.monotonic() + 60
    while reported.count(b"\n") < ready and time.monotonic() < until:
        if select.select([read], [], [], 1)[0]:
            block = os.read(read, 65536)
            if not block:
                break
            reported += block
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    while block := os.read(read, 65536):
        reported += block
    os.close(read)
    _, status = os.waitpid(child, 0)
    lines = [json.loads(line) for line in reported.decode().splitlines()]
    failed = [line[1] for line in lines if line[0] == "failed"]
    assert not failed, failed[0]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (
        "the process was not killed"
    )
    return lines


def at_once(works: list[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run each function in a forked process, start all at once, and return their results."""
    gate_read, gate_write = os.pipe()
    children = []
    for work in works:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(gate_write)
            os.read(gate_read, 1)
            try:
                given = json.dumps(work())
            except BaseException:
                given = json.dumps({"failed": traceback.format_exc()})
            os.write(write, given.encode())
            os._exit(0)
        os.close(write)
        children.append((child, read))
    os.close(gate_write)
    results = []
    for child, read in children:
        said = b""
        while block := os.read(read, 65536):
            said += block
        os.close(read)
        os.waitpid(child, 0)
        results.append(json.loads(said))
        assert "failed" not in results[-1], results[-1]["failed"]
    return results
