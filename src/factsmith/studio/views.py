"""The pages: every verb has one, whose address holds all of its state.

    GET  /trace/trace?prompt=...      the page: form and answer, or how far the answer is
    GET  /view/trace?prompt=...       the answer alone, which htmx puts into the page
    GET  /view/trace.json?...  .csv   the same for programs
    POST /patch/apply                 begins a job that writes, and goes to /jobs/ID
    GET  /jobs, /jobs/ID              what runs and what ran

Templates get `room`, `verb`, `values`, `errors`, `job`, `answer` and `view`, and what `Views.page`
gives to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from ..core.documents import fault_in_words
from ..core.errors import FactsmithError
from . import api
from .arguments import Arguments
from .desk import CURRENT
from .jobs import Job
from .rooms import RUN, Room
from .session import Studio
from .sheet import csv_of
from .templating import environment
from .tour import is_offered, strip_of
from .verb import Verb

_AT_ONCE = 0.3
"""Seconds that a page waits for an answer before it shows how far it is."""

_DRAFT = "draft"
"""With this in its query, an address fills in the form and asks nothing yet."""

_MARKS = (_DRAFT, RUN)
"""Names in an address that are no arguments."""

_CSRF = "csrf"
"""The field by which a form shows that it is ours; no verb has an argument of that name."""


_NOTHING: Mapping[str, Any] = dict.fromkeys(("job", "answer", "view", "arguments"))
"""What templates get where nothing was asked."""


@dataclass(frozen=True)
class View:
    """The other forms of a view.

    Attributes:
        address: The page. "": the verb writes, so it has none to come back to.
        fragment: The answer alone, or how far it is.
        json: The result as JSON.
        csv: The chart's rows, or the first table, as a sheet.
        python: The program that does the same.
        command: The command that does the same.
    """

    address: str
    fragment: str
    json: str
    csv: str
    python: str
    command: str


class Views:
    """The pages of a studio."""

    def __init__(self, studio: Studio) -> None:
        """Take the studio."""
        self.studio, self.rooms = studio, studio.rooms
        self._verbs = {verb.name: (room, verb) for room in self.rooms for verb in room.verbs}

    def router(self) -> APIRouter:
        """Return the routes of the pages."""
        router = APIRouter()
        routes: tuple[tuple[str, Any, str], ...] = (
            ("/", self.home, "GET"),
            ("/jobs", self.jobs, "GET"),
            ("/jobs/indicator", self.indicator, "GET"),
            ("/jobs/{identity}", self.job, "GET"),
            ("/jobs/{identity}/view", self.job_view, "GET"),
            ("/jobs/{identity}/cancel", self.cancel, "POST"),
            ("/view/{name}.json", self.as_json, "GET"),
            ("/view/{name}.csv", self.as_csv, "GET"),
            ("/view/{name}", self.fragment, "GET"),
            ("/form/{name}", self.form, "GET"),
            ("/{room}", self.front, "GET"),
            ("/{room}/{name}", self.verb, "GET"),
            ("/{room}/{name}", self.write, "POST"),
        )
        for path, endpoint, method in routes:
            router.add_api_route(path, endpoint, methods=[method], response_class=HTMLResponse)
        return router

    # ── pages ─────────────────────────────────────────────────────────────────────────────────────

    async def home(self, request: Request) -> Response:
        """Show the rooms."""
        offered = is_offered(self.studio.desk.place.model)
        return await self.page(request, "home.html", tour_offered=offered)

    async def front(self, request: Request, room: str) -> Response:
        """Go to the first page of a room."""
        known = next((each for each in self.rooms if each.name == room), None)
        if known is None:
            raise _missing(request)
        return RedirectResponse(f"/{known.name}/{known.verbs[0].name}", status_code=307)

    async def verb(self, request: Request, room: str, name: str) -> Response:
        """Show a verb's form, and its answer if the address has what it needs."""
        known, verb = self._known(request, name)
        if known.name != room:
            raise _missing(request)
        names, pairs = request.query_params.keys(), _arguments(request)
        is_asked = _DRAFT not in names and (bool(names) or not verb.needs_form)
        if not is_asked or verb.kind == "write":
            return await self._verb_page(request, known, verb, _by_name(verb, pairs))
        try:
            arguments = verb.arguments.of_query(pairs)
            job = await self.studio.ask(verb, arguments, _AT_ONCE)
        except FactsmithError as error:
            return await self._refused(request, known, verb, pairs, error)
        if job.error is not None and isinstance(job.error, FactsmithError):
            return await self._refused(request, known, verb, pairs, job.error)
        context = self._answered(job, verb, arguments)
        page = await self._verb_page(request, known, verb, arguments, **context)
        if request.headers.get("hx-trigger", "").startswith("form-"):
            page.headers["HX-Push-Url"] = context["view"].address  # without a form's defaults
        return page

    async def write(self, request: Request, room: str, name: str) -> Response:
        """Begin a verb that writes, and go to the page of its job."""
        known, verb = self._known(request, name)
        form = await request.form()
        pairs = [
            (key, value)
            for key, value in form.multi_items()
            if key != _CSRF and isinstance(value, str)
        ]
        try:
            arguments = verb.arguments.of_query(pairs)
            job = await run_in_threadpool(self.studio.submit, verb, arguments)
        except FactsmithError as error:
            return await self._refused(request, known, verb, pairs, error)
        return RedirectResponse(f"/jobs/{job.id}", status_code=303)

    async def fragment(self, request: Request, name: str) -> Response:
        """Show a verb's answer alone, or how far it is."""
        room, verb = self._reading(request, name)
        pairs = _arguments(request)
        try:
            arguments = verb.arguments.of_query(pairs)
            job = await self.studio.ask(verb, arguments, _AT_ONCE)
        except FactsmithError as error:
            text = _in_words(error)
            return await self.page(request, "error_fragment.html", error=text)
        context = self._answered(job, verb, arguments)
        response = await self.page(request, verb.template, room=room, verb=verb, **context)
        response.headers["HX-Push-Url"] = context["view"].address
        return response

    async def form(self, request: Request, name: str) -> Response:
        """Show a verb's form alone, with what cannot be used together greyed out."""
        room, verb = self._known(request, name)
        values = _by_name(verb, _arguments(request))
        return await self.page(request, "form.html", **self._form(room, verb, values))

    async def as_json(self, request: Request, name: str) -> Response:
        """Give a verb's result as JSON."""
        _, verb = self._reading(request, name)
        arguments = verb.arguments.of_query(request.query_params.multi_items())
        response = api.job_response(await self.studio.ask(verb, arguments, None))
        return _as_file(response, f"{verb.name}.json")

    async def as_csv(self, request: Request, name: str) -> Response:
        """Give the numbers of a verb's answer as a sheet."""
        _, verb = self._reading(request, name)
        pairs = request.query_params.multi_items()
        charts = [value for key, value in pairs if key == "chart"]
        arguments = verb.arguments.of_query([pair for pair in pairs if pair[0] != "chart"])
        job = await self.studio.ask(verb, arguments, None)
        if job.answer is None:
            return api.job_response(job)
        text = csv_of(job.answer, charts[0] if charts else None)
        response = Response(text.encode("utf-8", "replace"), media_type="text/csv; charset=utf-8")
        return _as_file(response, f"{verb.name}.csv")

    # ── jobs ──────────────────────────────────────────────────────────────────────────────────────

    async def jobs(self, request: Request) -> Response:
        """Show what runs, what waits, and what ended."""
        return await self.page(request, "jobs.html", jobs=self.studio.jobs.all())

    async def indicator(self, request: Request) -> Response:
        """Show how many jobs run or wait, for the head of every page."""
        return await self.page(request, "indicator.html")

    async def job(self, request: Request, identity: str) -> Response:
        """Show a job: how far it is, and then its answer."""
        job = api.known_job(self.studio, identity)
        return await self.page(request, "job.html", **self._of_job(job))

    async def job_view(self, request: Request, identity: str) -> Response:
        """Show a job's answer alone, or how far it is."""
        job = api.known_job(self.studio, identity)
        context = self._of_job(job)
        template = context["answer_template"] if job.is_over else "job_state.html"
        return await self.page(request, template, **context)

    async def cancel(self, request: Request, identity: str) -> Response:
        """Cancel a job, and show it."""
        job = api.known_job(self.studio, identity)
        self.studio.jobs.cancel(job.id)
        if "hx-request" in request.headers:
            return await self.page(request, "job_state.html", **self._of_job(job))
        return RedirectResponse(f"/jobs/{job.id}", status_code=303)

    # ── what templates get ────────────────────────────────────────────────────────────────────────

    async def page(
        self, request: Request, template: str, status: int = 200, **context: Any
    ) -> HTMLResponse:
        """Return a template as a response.

        Args:
            request: The request.
            template: The name of the template.
            status: The HTTP status.
            context: What the template gets besides what every template gets.
        """
        html = await run_in_threadpool(self._render, request, template, context)
        return HTMLResponse(html, status_code=status)

    def error(self, request: Request, error: Exception, status: int) -> HTMLResponse:
        """Return a page about an error."""
        text = _in_words(error)
        template = "error_fragment.html" if "hx-request" in request.headers else "error.html"
        return HTMLResponse(self._render(request, template, {"error": text}), status_code=status)

    def _render(self, request: Request, template: str, context: Mapping[str, Any]) -> str:
        try:
            standing = self.studio.standing
        except FactsmithError:  # the page that needs the ledger says why
            standing = None
        shared = {
            "request": request,
            "desk": self.studio.desk,
            "place": self.studio.desk.place,
            "rooms": self.rooms,
            "standing": standing,
            "running": sum(not job.is_over for job in self.studio.jobs.all()),
            "at": request.url.path,
            "tour": None if standing is None else strip_of(request, self.studio.desk),
            "csrf": getattr(request.state, "csrf", ""),
            "room": None,
            "verb": None,
        }
        return environment().get_template(template).render({**shared, **context})

    async def refused(
        self, request: Request, name: str, pairs: list[tuple[str, str]], error: FactsmithError
    ) -> HTMLResponse:
        """Show a verb's form again, with what was given and what is wrong with it."""
        room, verb = self._known(request, name)
        return await self._refused(request, room, verb, pairs, error)

    async def _verb_page(
        self,
        request: Request,
        room: Room,
        verb: Verb[Any],
        values: Mapping[str, Any] | Arguments,
        **context: Any,
    ) -> HTMLResponse:
        """Return the page of a verb."""
        filled = values.model_dump() if isinstance(values, Arguments) else values
        nothing: dict[str, Any] = {
            "errors": {},
            "job": None,
            "answer": None,
            "view": None,
            "arguments": None,
        }
        form = await run_in_threadpool(self._form, room, verb, filled)
        return await self.page(request, room.template, **{**nothing, **form, **context})

    def _form(self, room: Room, verb: Verb[Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what templates get of a form."""
        desk = self.studio.desk
        examples = () if verb.examples is None else verb.examples(desk)
        return {
            "room": room,
            "verb": verb,
            "verbs": [each for each in room.verbs if each.name in room.menu],
            "values": values,
            "errors": {},
            "options": self._options(verb),
            "disabled": {} if verb.disabled is None else verb.disabled(desk, values),
            "examples": [(label, room.address(verb, example)) for label, example in examples],
            "answer_template": verb.template,
        }

    async def _refused(
        self,
        request: Request,
        room: Room,
        verb: Verb[Any],
        pairs: list[tuple[str, str]],
        error: FactsmithError,
    ) -> HTMLResponse:
        """Return the page of a verb whose arguments are not accepted, with what was given."""
        errors, status = _errors_by_field(verb, error), api.status_of(error)
        values = _by_name(verb, pairs)
        return await self._verb_page(request, room, verb, values, errors=errors, status=status)

    def _answered(self, job: Job, verb: Verb[Any], arguments: Arguments) -> dict[str, Any]:
        """Return what templates get of a job whose arguments are known."""
        return {
            "job": job,
            "answer": job.answer,
            "arguments": arguments,
            "view": self._view(job, verb, arguments),
            "answer_template": verb.template,
        }

    def _of_job(self, job: Job) -> dict[str, Any]:
        """Return what templates get of a job that is remembered."""
        room, verb = self._verbs[job.work.verb]
        return {"room": room, "verb": verb, **self._answered(job, verb, job.work.arguments)}

    def _view(self, job: Job, verb: Verb[Any], arguments: Arguments) -> View:
        """Return the other forms of a view."""
        room, _ = self._verbs[verb.name]
        address = room.address(verb, arguments)
        is_read = verb.kind != "write"
        return View(
            address=address if is_read else "",
            fragment=f"/jobs/{job.id}/view",
            json=arguments.address(f"/view/{verb.name}.json") if is_read else "",
            csv=arguments.address(f"/view/{verb.name}.csv") if is_read else "",
            python=verb.python(arguments, self.studio.desk.place),
            command="\n".join(verb.command(arguments, self.studio.desk.place)),
        )

    def _options(self, verb: Verb[Any]) -> dict[str, Any]:
        """Return what the fields of a verb's form offer."""
        options: dict[str, Any] = {}
        fields = verb.arguments.model_fields
        if "model" in fields:
            options["model"] = self.studio.desk.model_options
        for name, field in fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("widget") == "revision":
                revisions = self.studio.revision_options()
                options[name] = revisions if field.default == CURRENT else revisions[1:]
        if verb.options is not None:
            options |= verb.options(self.studio.desk)
        return options

    def _known(self, request: Request, name: str) -> tuple[Room, Verb[Any]]:
        if name not in self._verbs:
            raise _missing(request)
        return self._verbs[name]

    def _reading(self, request: Request, name: str) -> tuple[Room, Verb[Any]]:
        """Return a verb that changes nothing, with its room."""
        room, verb = self._known(request, name)
        if verb.kind == "write":
            raise _missing(request)
        return room, verb


def _missing(request: Request) -> api.UnknownError:
    path = request.url.path[:80]
    return api.UnknownError(f"there is no page {path!r}; the menu lists the rooms")


def _arguments(request: Request) -> list[tuple[str, str]]:
    """Return the pairs of an address that are arguments of a verb."""
    return [pair for pair in request.query_params.multi_items() if pair[0] not in _MARKS]


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, FactsmithError) else fault_in_words(error)


def _by_name(verb: Verb[Any], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the values of a query or a form, as the form shows them again."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if verb.arguments.is_list(name):
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    return values


def _errors_by_field(verb: Verb[Any], error: Exception) -> dict[str, str]:
    """Return an error in words by the field that it is about; "" is the whole form."""
    text = _in_words(error)
    argument = getattr(error, "argument", None)
    names = (name for name in (argument, f"{argument}s") if name in verb.arguments.model_fields)
    return {next(names, "") or "": text}


def _as_file(response: Response, name: str) -> Response:
    """Tell the browser to save a response under a name."""
    if response.status_code == 200:
        response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return response
