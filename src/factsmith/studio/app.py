"""The web application of studio: pages, the HTTP API, streams of events, and static files.

    app = create_app(studio)

`views` has the pages and `api` the API. `guard` decides who may come in, around all of it.
"""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from ..core.documents import error_document
from ..core.errors import FactsmithError, InputError
from . import api, api_page, events, files, tour_pages, views
from .session import Studio

_STATIC = Path(__file__).parent / "static"

_log = logging.getLogger(__name__)


def create_app(studio: Studio) -> FastAPI:
    """Return the application of a studio that is open, without any check of who asks."""
    app = FastAPI(
        title="factsmith studio",
        version=importlib.metadata.version("factsmith"),
        description="The verbs of factsmith on one workspace. Errors are the documents that the "
        "commands print with --json.",
        openapi_url=f"{api.PREFIX}/openapi.json",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(api.routes(studio))
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    app.include_router(events.routes(studio), include_in_schema=False)
    pages = views.Views(studio)
    app.include_router(api_page.routes(pages), include_in_schema=False)
    app.include_router(tour_pages.routes(pages), include_in_schema=False)
    app.include_router(files.routes(studio.desk, pages), include_in_schema=False)
    app.include_router(pages.router(), include_in_schema=False)
    _handle_errors(app, pages)
    return app


def _handle_errors(app: FastAPI, pages: views.Views) -> None:
    """Answer errors as JSON to programs, and as pages to people."""

    def respond(request: Request, error: Exception, status: int) -> Response:
        if request.url.path.startswith(api.PREFIX) or request.url.path.endswith(".json"):
            return api.Document(error_document(error), status_code=status)
        return pages.error(request, error, status)

    async def ours(request: Request, error: Any) -> Response:
        return respond(request, error, api.status_of(error))

    async def missing(request: Request, error: Any) -> Response:
        words = {
            404: f"there is no page {request.url.path[:80]!r}; the menu lists the rooms",
            405: f"{request.method} is not for {request.url.path[:80]!r}; see the page of the API",
        }
        said = InputError(words.get(error.status_code, str(error.detail)))
        return respond(request, said, error.status_code)

    async def invalid(request: Request, error: Any) -> Response:
        return respond(request, InputError(f"the request is not valid: {error}"), 400)

    async def unexpected(request: Request, error: Exception) -> Response:
        _log.exception("%s %s", request.method, request.url.path, exc_info=error)
        return respond(request, error, 500)

    app.add_exception_handler(FactsmithError, ours)
    app.add_exception_handler(HTTPException, missing)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unexpected)
