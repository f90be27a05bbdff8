"""The pages of the guard: how to get in, and why a request is refused.

They show nothing of the workspace, because whoever sees them has no session.
"""

from __future__ import annotations

import functools
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from starlette.responses import HTMLResponse, JSONResponse, Response

from .access import Access

FORMAT_VERSION = 1

_TITLES = {
    401: "This studio is closed",
    403: "Not from here",
    404: "No such page",
    429: "Too many guesses",
    500: "Something went wrong",
}


def refusal(
    status: int, message: str, headers: dict[str, str] | None = None, *, as_json: bool = False
) -> Response:
    """Return the answer to a request that is refused.

    Args:
        status: The status of the answer.
        message: What was got, what is accepted, what to do next.
        headers: More headers.
        as_json: Whether a program asks. It gets an error as the commands print it with --json.
    """
    if as_json:
        kind = "AccessError" if status in (401, 403, 421) else "RequestError"
        error = {"message": message, "type": kind, "argument": None, "option": None, "exit_code": 2}
        document = {"format_version": FORMAT_VERSION, "error": error}
        return JSONResponse(document, status, headers)
    return _page(status, headers, message=message, address="/", way="")


def closed(
    access: Access,
    status: int,
    address: str,
    *,
    followed: bool = False,
    message: str = "",
    headers: dict[str, str] | None = None,
) -> Response:
    """Return the page that says how to get in.

    Args:
        access: What opens this studio.
        status: The status of the answer.
        address: The address that was asked for, where the reader goes on.
        followed: Whether a link of another site was followed.
        message: What happened, if anything did.
        headers: More headers.
    """
    way = "followed" if followed else "password" if access.needs_password else "link"
    shown = {"message": message, "address": address, "way": way}
    if followed:
        shown["title"] = "A link to this studio"
    return _page(status, headers, needs_password=access.needs_password, **shown)


def onward(address: str, headers: dict[str, str]) -> Response:
    """Return a page that leads to another one at once, as a step of studio's own."""
    message = "Studio is open in this browser now."
    return _page(200, headers, title="Welcome", message=message, address=address, way="onward")


def _page(status: int, headers: dict[str, str] | None, **shown: object) -> Response:
    title = _TITLES.get(status, "This request was not taken")
    html = _template().render({"title": title, "needs_password": False, **shown})
    return HTMLResponse(html, status, headers)


@functools.cache
def _template() -> Template:
    folder = Path(__file__).with_name("templates")
    loader = FileSystemLoader(folder)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("login.html")
