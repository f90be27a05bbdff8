"""The stream of events that a page listens to: jobs that change, and a ledger that moves.

    event: job
    data: {"id": "5f0c...", "state": "running", "step": "tracing", "done": 3, "total": 40, ...}

    event: ledger
    data: {"current": "0a8b...", "head": "0a8b..."}

A page that connects first gets every job that waits, runs, or ended a moment ago, so nothing is
missed between a page and its stream.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from ..core.errors import FactsmithError
from .session import Studio

_LOOK_AGAIN = 0.25
"""Seconds between two looks at the jobs."""

_LEDGER_EVERY = 4
"""Looks at the jobs between two looks at the ledger."""

_SILENCE = 60
"""Looks without news after which a line is sent, so that nobody takes the stream for dead."""

_RECENT = 60.0
"""Seconds for which a job that ended is sent to pages that connect."""


def routes(studio: Studio) -> APIRouter:
    """Return the route of the stream."""
    router = APIRouter()

    async def events(request: Request) -> StreamingResponse:
        return StreamingResponse(
            stream(studio, request),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    router.add_api_route("/events", events, methods=["GET"])
    return router


async def stream(studio: Studio, request: Request) -> AsyncIterator[str]:
    """Yield the events for one page until it goes away or the studio closes."""
    seen: dict[str, int] = {}
    ledger: tuple[str, str] | None = None
    look = quiet = 0
    yield "retry: 2000\n\n"
    while not studio.closing.is_set() and not await request.is_disconnected():
        lines: list[str] = []
        for job in reversed(studio.jobs.all()):
            if seen.get(job.id) == job.version:
                continue
            is_news = job.id in seen or job.ended is None or time.time() - job.ended < _RECENT
            seen[job.id] = job.version
            if is_news:
                lines.append(_event("job", job.to_dict()))
        if look % _LEDGER_EVERY == 0:
            now = await run_in_threadpool(_ledger, studio)
            if now is not None and now != ledger:
                ledger = now
                lines.append(_event("ledger", {"current": now[0], "head": now[1]}))
        look += 1
        quiet = 0 if lines else quiet + 1
        if quiet >= _SILENCE:
            lines, quiet = [": still here\n\n"], 0
        for line in lines:
            yield line
        await asyncio.sleep(_LOOK_AGAIN)


def _ledger(studio: Studio) -> tuple[str, str] | None:
    """Return the current and the newest revision; None while the ledger cannot be read."""
    try:
        standing = studio.standing
    except FactsmithError:  # a page that needs the ledger says why
        return None
    return standing.current, standing.head


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
