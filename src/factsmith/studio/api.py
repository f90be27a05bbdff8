"""The HTTP API: every verb under /api/v1, for programs.

    curl -H "Authorization: Bearer $TOKEN" -d '{"prompt": "The currency of Bulgaria is the"}' \\
        http://127.0.0.1:8420/api/v1/ask

A POST has the arguments as JSON. Verbs that change nothing also take a GET with a query. The answer
is the document that the command prints with --json; so is an error. With `wait=0` a verb that takes
long is answered at once with its job, which /api/v1/jobs/ID follows; a POST
to /api/v1/jobs/ID/cancel cancels it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from ..core.documents import document, error_document
from ..core.errors import (
    InputError,
    LedgerError,
    ModelError,
    NumericsError,
    RevisionError,
    ServerError,
)
from ..core.plain import json_value
from .arguments import Arguments
from .jobs import BusyError, Job
from .session import Studio, finished
from .verb import Verb

PREFIX = "/api/v1"

_WAIT: dict[str, Any] = {
    "name": "wait",
    "in": "query",
    "description": "Seconds to wait for the result; then the answer is the job, with status 202. "
    "Default: no limit.",
    "schema": {"type": "number", "minimum": 0},
}

_ERROR: dict[str, Any] = {
    "description": "An error, as the command prints it with --json",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "format_version": {"type": "integer"},
                    "error": {
                        "type": "object",
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "argument": {"type": ["string", "null"]},
                            "option": {"type": ["string", "null"]},
                            "exit_code": {"type": "integer"},
                        },
                    },
                },
            }
        }
    },
}


class UnknownError(InputError):
    """What the address names is not there."""


_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (BusyError, 429),
    (UnknownError, 404),
    (RevisionError, 404),
    (InputError, 400),
    (ModelError, 422),
    (NumericsError, 422),
    (LedgerError, 409),
    (ServerError, 502),
)
"""The HTTP status of each kind of error; the first that fits counts."""


def status_of(error: Exception) -> int:
    """Return the HTTP status for an error."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


class Document(JSONResponse):
    """A JSON document. Half a character, as a token may hold, is escaped as the commands do."""

    def render(self, content: Any) -> bytes:
        """Return the document as bytes; raises ValueError for a number that is not finite."""
        return json.dumps(content, allow_nan=False).encode()


def error_response(error: Exception) -> JSONResponse:
    """Return an error as the API answers it."""
    return Document(error_document(error), status_code=status_of(error))


def routes(studio: Studio) -> APIRouter:
    """Return the routes of the API."""
    router = APIRouter(prefix=PREFIX)
    for room in studio.rooms:
        for verb in room.verbs:
            _add_verb(router, studio, verb, room.title)
    _add_jobs(router, studio)
    return router


def _add_verb(router: APIRouter, studio: Studio, verb: Verb[Any], tag: str) -> None:
    """Add the routes of one verb: POST, and GET if it changes nothing."""
    schema = verb.arguments.model_json_schema()

    async def post(request: Request) -> JSONResponse:
        values = await _body(request)
        return await _answered(studio, verb, verb.arguments.of(values), request)

    async def get(request: Request) -> JSONResponse:
        pairs = [pair for pair in request.query_params.multi_items() if pair[0] != "wait"]
        return await _answered(studio, verb, verb.arguments.of_query(pairs), request)

    body = {"content": {"application/json": {"schema": schema}}}
    described: dict[str, Any] = {
        "summary": verb.summary,
        "tags": [tag],
        "responses": {"200": {"description": "The result"}, "default": _ERROR},
    }
    router.add_api_route(
        f"/{verb.name}",
        post,
        methods=["POST"],
        operation_id=verb.name,
        openapi_extra={"requestBody": body, "parameters": [_WAIT]},
        **described,
    )
    if verb.kind != "write":
        router.add_api_route(
            f"/{verb.name}",
            get,
            methods=["GET"],
            operation_id=f"{verb.name}_by_query",
            openapi_extra={"parameters": [*_parameters(schema), _WAIT]},
            **described,
        )


def _parameters(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of a schema as parameters of a query."""
    return [
        {
            "name": name,
            "in": "query",
            "required": name in schema.get("required", ()),
            "description": field.get("description", ""),
            "schema": field,
        }
        for name, field in schema.get("properties", {}).items()
    ]


def _add_jobs(router: APIRouter, studio: Studio) -> None:
    """Add the routes of jobs."""

    async def jobs() -> JSONResponse:
        return Document(document({"jobs": [job.to_dict() for job in studio.jobs.all()]}))

    async def show(request: Request) -> JSONResponse:
        job = known_job(studio, request.path_params["identity"])
        await finished(job, _wait_of(request) or 0)
        return job_response(job)

    async def cancel(request: Request) -> JSONResponse:
        job = known_job(studio, request.path_params["identity"])
        studio.jobs.cancel(job.id)
        return Document(document({"job": job.to_dict()}))

    tags = {"tags": ["Jobs"], "responses": {"default": _ERROR}}
    add: Any = router.add_api_route
    add("/jobs", jobs, methods=["GET"], summary="List the jobs, the newest first.", **tags)
    named = {
        "name": "identity",
        "in": "path",
        "required": True,
        "description": "The id of the job.",
        "schema": {"type": "string"},
    }
    extra = {"openapi_extra": {"parameters": [named]}}
    say = "Return the result of a job, or how far it is."
    add("/jobs/{identity}", show, methods=["GET"], summary=say, **tags, **extra)
    say = "Cancel a job; model and ledger stay as they were."
    add("/jobs/{identity}/cancel", cancel, methods=["POST"], summary=say, **tags, **extra)


def known_job(studio: Studio, identity: str) -> Job:
    """Return a job by its id.

    Raises:
        UnknownError: when no such job is remembered.
    """
    job = studio.jobs.get(identity)
    if job is None:
        raise UnknownError(
            f"no job {identity[:20]!r} is remembered; the newest ones are, until studio ends. What "
            "was kept is in the ledger"
        )
    return job


async def _answered(
    studio: Studio, verb: Verb[Any], arguments: Arguments, request: Request
) -> JSONResponse:
    """Do a verb and return its response."""
    return job_response(await studio.ask(verb, arguments, _wait_of(request)))


def job_response(job: Job) -> JSONResponse:
    """Return the result of a job, its error, or how far it is."""
    if job.error is not None:
        return error_response(job.error)
    if job.answer is not None:
        try:
            return Document(document(dict(job.answer.result)))
        except ValueError as error:
            return error_response(
                NumericsError(f"the result cannot be written as JSON: {error}. Use other settings")
            )
    status = 202 if not job.is_over else 409
    return Document(document({"job": job.to_dict()}), status_code=status)


def _wait_of(request: Request) -> float | None:
    """Return how long a request wants to wait, in seconds; None: as long as it takes."""
    given = request.query_params.get("wait")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 10**6:
        raise InputError(f"wait is {given[:40]!r}; give a number of seconds, such as 0 or 30")
    return seconds


async def _body(request: Request) -> dict[str, Any]:
    """Return the JSON object that a request carries; no body is an empty one."""
    raw = await request.body()
    if not raw.strip():
        return {}
    if "json" not in request.headers.get("content-type", "json"):
        raise InputError("the body is not JSON; send it with Content-Type: application/json")
    try:
        values = await run_in_threadpool(json_value, raw.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError("the body is not a JSON object; send the arguments by their names")
    return values
