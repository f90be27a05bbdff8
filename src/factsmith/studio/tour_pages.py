"""The addresses of the tour.

GET  /tour          the steps, and how far the workspace is
GET  /tour/3        goes to the page of step 3; from then on each page has the tour's note
GET  /tour/strip    the note alone, after the ledger moved
POST /tour/leave    ends the tour
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from . import api, tour
from .desk import Desk
from .views import Views


def routes(pages: Views) -> APIRouter:
    """Return the routes of the tour. They come before the routes of the rooms."""
    router = APIRouter()
    desk = pages.studio.desk

    async def overview(request: Request) -> Response:
        return await pages.page(request, "tour.html", **await run_in_threadpool(_overview, desk))

    async def note(request: Request, at: str = "/", state: str = "") -> Response:
        strip = await run_in_threadpool(tour.strip_of, request, desk, at)
        if strip is not None and strip.state == state:
            return Response(status_code=204)  # nothing new: the page keeps what has the focus
        return await pages.page(request, "tour_strip.html", tour=strip, at=at)

    async def leave(request: Request) -> Response:
        response = RedirectResponse("/", status_code=303)
        response.delete_cookie(tour.cookie_name(request), samesite="strict", httponly=True)
        return response

    async def begin(request: Request, number: str) -> Response:
        step = tour.step_numbered(number)
        if step is None:
            last = len(tour.STEPS)
            raise api.UnknownError(f"the tour has no step {number[:20]!r}; it has 1 to {last}")
        if not tour.is_offered(desk.place.model):
            return RedirectResponse(tour.ADDRESS, status_code=303)
        address = await run_in_threadpool(_address, desk, step)
        response = RedirectResponse(address, status_code=303)
        if address != tour.ADDRESS:
            response.set_cookie(tour.cookie_name(request), number, samesite="strict", httponly=True)
        return response

    router.add_api_route("/tour", overview, methods=["GET"])
    router.add_api_route("/tour/strip", note, methods=["GET"])
    router.add_api_route("/tour/leave", leave, methods=["POST"])
    router.add_api_route("/tour/{number}", begin, methods=["GET"])
    return router


def _overview(desk: Desk) -> dict[str, Any]:
    """Return what the template of the overview needs."""
    with desk.ledger() as ledger:
        standing = tour.standing(ledger)
    return {
        "steps": [
            (step, standing.state in step.needs, tour.was_done(step, standing))
            for step in tour.STEPS
        ],
        "offered": tour.is_offered(desk.place.model),
        "begin": tour.begin_at(standing),
        "title": "The tour",
    }


def _address(desk: Desk, step: tour.Step) -> str:
    """Return where a step is done, or the overview while it cannot be done."""
    with desk.ledger() as ledger:
        standing = tour.standing(ledger)
    return step.address(standing) if standing.state in step.needs else tour.ADDRESS
