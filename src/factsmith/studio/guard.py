"""The guard: every request passes it before the app sees it.

    guard(app, access)                  # around everything that a FastAPI app does
    request.state.csrf                  # in the app: what forms send back; "" for the API
    request.state.may_leave             # whether there is a login page to go back to

It checks, in this order: the size of address and headers, the method, the Host header, which site
sent the request, the session or the bearer token, the size of the body, and the token of the form.
It answers the start-up link, /login and /logout. No answer is held back on its way out, so a
stream of events stays a stream.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote_plus

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from . import entrance
from .access import Access, Session
from .headers import STATIC, with_headers
from .uploads import (
    MOST_FIELDS,
    MOST_FILES,
    Incoming,
    RefusedError,
    check_head,
    content_length,
    most_bytes,
    read_body,
    replayed,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

API = "/api/"
"""Where programs ask."""

LOGIN, LOGOUT = "/login", "/logout"

CSRF_HEADER, CSRF_FIELD = "x-csrf-token", "csrf"
"""Where a request has the token of its session: in a header, or in a field of its form."""

METHODS = ("GET", "HEAD", "POST")

_log = logging.getLogger(__name__)

_MOST_LOGIN = 10_000
"""Bytes of the login form."""


def guard(app: FastAPI, access: Access) -> None:
    """Put the guard around everything that an app does, its error pages included."""
    build = app.build_middleware_stack
    vars(app)["build_middleware_stack"] = lambda: Guard(build(), access)


class Visit:
    """A request, as the guard reads it.

    Attributes:
        scope: The request, by ASGI.
        method: Its method.
        path: Its path, decoded.
        query: Its query, as it was sent.
    """

    def __init__(self, scope: Scope) -> None:
        """Read a request."""
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope.get("query_string", b"")

    @property
    def is_api(self) -> bool:
        """Whether a program asks, and gets errors as JSON."""
        return self.path.startswith(API)

    @property
    def writes(self) -> bool:
        """Whether the request may change something."""
        return self.method not in ("GET", "HEAD")

    @property
    def waits(self) -> bool:
        """Whether the sender waits for a word before it sends the body."""
        return any(name.lower() == b"expect" for name, _ in self.scope["headers"])

    @property
    def came_from(self) -> str:
        """Which site the request comes from, as a browser says it; "" where it does not say."""
        return self.header("sec-fetch-site") or ""

    @property
    def is_foreign(self) -> bool:
        """Whether a page of another site sends the request."""
        return self.came_from in ("cross-site", "same-site")

    @property
    def client(self) -> str:
        """The network address that the request came from; of IPv6, the network of one user."""
        client = self.scope.get("client")
        try:
            address = ipaddress.ip_address(client[0] if client else "")
        except ValueError:
            return "unknown"
        if isinstance(address, ipaddress.IPv6Address):
            return str(ipaddress.ip_network((address, 64), strict=False))
        return str(address)

    def header(self, name: str) -> str | None:
        """Return a header that may be sent once; None where it is not sent."""
        name_bytes = name.encode()
        values = [value for key, value in self.scope["headers"] if key.lower() == name_bytes]
        if len(values) > 1:
            raise RefusedError(400, f"The header {name} is sent {len(values)} times; send it once.")
        return values[0].decode("latin-1").strip() if values else None

    def cookies(self, name: str) -> list[str]:
        """Return the values of a cookie. Other programs of this machine may have set one, too."""
        pairs = (
            pair.partition("=")
            for key, value in self.scope["headers"]
            if key.lower() == b"cookie"
            for pair in value.decode("latin-1").split(";")
        )
        return [value.strip() for key, _, value in pairs if key.strip() == name]

    def tokens(self) -> list[str]:
        """Return the values of "token" in the address."""
        return [unquote_plus(text) for name, text in self._parts() if name == "token"]

    def address(self, *, without: str | None = None) -> str:
        """Return the address within studio, for a link or a redirect.

        Args:
            without: A token to leave out. None: the address stays whole.
        """
        parts = [
            "=".join(part) if part[1] is not None else part[0]
            for part in self._parts(blank=None)
            if without is None or part[0] != "token" or unquote_plus(part[1] or "") != without
        ]
        path = quote(self.path, safe="/:@!$&'()*+,;=~")
        return local(path + ("?" + "&".join(parts) if any(parts) else ""))

    def _parts(self, blank: Any = "") -> list[tuple[str, Any]]:
        """Return the query as it was sent, in pairs."""
        parts = (part.partition("=") for part in self.query.decode("latin-1").split("&"))
        return [(name, text if equals else blank) for name, equals, text in parts]


def local(address: str) -> str:
    """Return an address within studio, or "/" for one that leads elsewhere.

    Browsers read a backslash as a slash, and leave out tabs and line ends.
    """
    plain = "".join(c for c in address if c > " " and c != "\x7f").replace("\\", "/")
    if not plain.startswith("/") or plain.startswith("//"):
        return "/"
    return quote(plain, safe="/%:@!$&'()*+,;=~?#[]")


class Guard:
    """An ASGI app around another one, which admits requests."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        """Take the app that answers what is admitted."""
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the app answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        visit, incoming = Visit(scope), Incoming(receive)
        send = with_headers(send, visit.path, visit.query, secure=self.access.secure)
        admitted: Response | Receive | None
        try:
            admitted = await self._admit(visit, incoming)
        except RefusedError as error:
            admitted = entrance.refusal(
                error.status, str(error), error.headers, as_json=visit.is_api
            )
        except Exception:  # a request that cannot be checked is not admitted
            _log.exception("the guard failed at %s", visit.path)
            admitted = entrance.refusal(400, "The request cannot be read.", as_json=visit.is_api)
        if isinstance(admitted, Response):
            if visit.writes and not visit.waits:
                await incoming.discard()
            await admitted(scope, receive, send)
        elif admitted is not None:
            await self._run(scope, admitted, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the app answer. An error that the app does not answer gets a page of its own."""
        started = False

        async def send_on(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        stream = asyncio.Event()
        self.access.streams.add(stream)
        try:
            await self.app(scope, _until(stream, receive), send_on)
        except Exception:
            if not started:
                text = "factsmith could not answer; the terminal says why."
                page = entrance.refusal(500, text, as_json=scope["path"].startswith(API))
                await page(scope, receive, send)
            raise
        finally:
            self.access.streams.discard(stream)

    # ── admission ─────────────────────────────────────────────────────────────────────────────────

    async def _admit(self, visit: Visit, receive: Receive) -> Response | Receive | None:
        """Return what the app may receive, or an answer. None: the sender went away."""
        host = self._check_shape(visit)
        self._check_site(visit, host)
        if visit.path.startswith(STATIC) and not visit.writes:
            return receive
        authorization = visit.header("authorization")
        if visit.is_api and authorization is not None:
            self._check_bearer(authorization)
            self._mark(visit, "")
            return await self._with_body(visit, receive, None)
        name, session = self._session(visit)
        if visit.path == LOGIN and visit.writes and self.access.needs_password:
            return await self._login(visit, receive)
        if visit.method == "GET" and not visit.is_api:
            answer = self._by_link(visit, session)
            if answer is not None:
                return answer
        if session is None:
            return self._closed(visit)
        if (
            visit.is_foreign
        ):  # another port of this host: the cookie came along, and views start jobs
            return entrance.closed(self.access, 403, visit.address(), followed=True)
        if visit.path == LOGIN:
            return RedirectResponse("/", 303)
        self._mark(visit, session.csrf)
        body = await self._with_body(visit, receive, session)
        if visit.path == LOGOUT and visit.writes and body is not None:
            self.access.end(name)
            return RedirectResponse("/", 303, {"set-cookie": self.access.set_cookie("")})
        return body

    def _check_shape(self, visit: Visit) -> str:
        """Refuse what no browser sends, and other names of the machine; return the Host header."""
        scope = visit.scope
        path = scope.get("raw_path") or visit.path.encode("utf-8", "replace")
        check_head(path, visit.query, scope["headers"])
        if visit.method not in METHODS:
            allowed = ", ".join(METHODS)
            text = f"The method {visit.method} is not used by studio; it takes {allowed}."
            raise RefusedError(405, text, {"allow": allowed})
        if any(c < " " or c == "\x7f" for c in visit.path) or ".." in visit.path.split("/"):
            text = "The address holds '..' or characters that no address has; follow a link."
            raise RefusedError(400, text)
        host = visit.header("host")
        if host is None or not self.access.is_host(host):
            address = self.access.address("127.0.0.1")
            raise RefusedError(
                421,
                f"This studio does not answer under the name {(host or '')[:100]!r}. Open {address}"
                ", or start it with --allow-host and the name that you use.",
            )
        return host

    def _check_site(self, visit: Visit, host: str) -> None:
        """Refuse what another site sends, except a link that somebody follows."""
        origin = visit.header("origin")
        # Of requests that read, the handshake of a WebSocket has nothing but an origin.
        refused = origin is not None and not self.access.is_origin(origin, host)
        if visit.writes:
            refused |= visit.came_from not in ("", "same-origin", "none")
        elif visit.is_foreign:
            goes = visit.header("sec-fetch-mode"), visit.header("sec-fetch-dest")
            refused |= visit.is_api or goes != ("navigate", "document")
        if refused:
            raise RefusedError(
                403,
                "Another site sent this request, and studio takes requests of its own pages alone. "
                "Open the page in studio, and send the form from there.",
            )

    def _check_bearer(self, authorization: str) -> None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not self.access.is_token(token.strip()):
            raise RefusedError(
                401,
                "The token is not this studio's; send `Authorization: Bearer TOKEN` with the token "
                "of the start-up link.",
                {"www-authenticate": "Bearer"},
            )

    def _session(self, visit: Visit) -> tuple[str, Session | None]:
        """Return the cookie of a session that is open, and the session."""
        for name in visit.cookies(self.access.cookie)[:10]:
            session = self.access.session(name)
            if session is not None:
                return name, session
        return "", None

    def _mark(self, visit: Visit, csrf: str) -> None:
        """Say in the request's state what templates need."""
        state = visit.scope.get("state", {})
        may_leave = bool(csrf) and self.access.needs_password
        visit.scope["state"] = {**state, "csrf": csrf, "may_leave": may_leave}

    async def _with_body(
        self, visit: Visit, receive: Receive, session: Session | None
    ) -> Receive | None:
        """Return what gives the body again, after the checks of its size and of its form's token.

        Args:
            visit: The request.
            receive: Gives its messages.
            session: The session whose token the form must have. None: a program asks.
        """
        kind = visit.header("content-type") or ""
        length = content_length(visit.header("content-length"))
        most = most_bytes(visit.path, kind) if visit.writes else 0
        if not visit.writes and not length and visit.header("transfer-encoding") is None:
            return receive
        body = await read_body(receive, length, most)
        if body is None:
            return None
        if session is not None and visit.writes:
            token = visit.header(CSRF_HEADER)
            if token is None:
                token = await _csrf_field(visit.scope, body, kind)
            if not self.access.same(token, session.csrf):
                raise RefusedError(
                    403,
                    "The form is not of your session, which may have ended since you opened the "
                    "page. Load the page again, and send the form from there.",
                )
        return replayed(body, receive)

    # ── ways in ───────────────────────────────────────────────────────────────────────────────────

    def _by_link(self, visit: Visit, session: Session | None) -> Response | None:
        """Answer an address with the token: the same address without it, and a session.

        Views may have an argument of that name, so another value is left to them.
        """
        right = next(filter(self.access.is_token, visit.tokens()), None)
        if right is None:
            return None
        headers = {}
        if session is None:
            headers["set-cookie"] = self.access.set_cookie(self.access.begin())
        address = visit.address(without=right)
        if visit.is_foreign:
            # A redirect would count as the other site's, and go without the new cookie.
            return entrance.onward(address, headers)
        return RedirectResponse(address, 303, headers)

    async def _login(self, visit: Visit, receive: Receive) -> Response | None:
        """Answer the login form."""
        length = content_length(visit.header("content-length"))
        body = await read_body(receive, length, _MOST_LOGIN)
        if body is None:
            return None
        form = dict(_pairs(body))
        address = local(form.get("next", "/"))
        wait = math.ceil(self.access.guesses.wait(visit.client))
        if wait:
            message = f"There were too many wrong passwords. Try again in {wait} seconds."
            headers = {"retry-after": str(wait)}
            return entrance.closed(self.access, 429, address, message=message, headers=headers)
        if not self.access.is_password(form.get("password", "")):
            self.access.guesses.wrong(visit.client)
            message = "The password is wrong. It is the first line of the password file."
            return entrance.closed(self.access, 401, address, message=message)
        self.access.guesses.right(visit.client)
        cookie = self.access.set_cookie(self.access.begin())
        return RedirectResponse(address, 303, {"set-cookie": cookie})

    def _closed(self, visit: Visit) -> Response:
        """Answer a request without a session: how to get in."""
        if visit.is_api:
            text = (
                "There is no token; send `Authorization: Bearer TOKEN` with the token of the "
                "start-up link that `factsmith studio` prints."
            )
            raise RefusedError(401, text, {"www-authenticate": "Bearer"})
        # The browser keeps the cookie to itself when a link of another site is followed.
        address = "/" if visit.writes or visit.path == LOGIN else visit.address()
        message = ""
        if visit.path == "/" and visit.tokens():
            message = "The token in this address is of an earlier start of studio."
        return entrance.closed(
            self.access, 401, address, followed=visit.is_foreign, message=message
        )


async def _csrf_field(scope: Scope, body: bytes, content_type: str) -> str:
    """Return the token in a form; "" where there is none."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded":
        return dict(_pairs(body)).get(CSRF_FIELD, "")
    if kind != "multipart/form-data":
        return ""
    inner = {key: value for key, value in scope.items() if key != "app"}
    request = Request(inner, replayed(body, _nothing_more))
    try:
        async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
            token = form.get(CSRF_FIELD, "")
    except (MultiPartException, HTTPException, ValueError, KeyError) as error:
        reason = getattr(error, "message", None) or getattr(error, "detail", None) or str(error)
        raise RefusedError(400, f"The form cannot be read ({reason}); send it again.") from None
    return token if isinstance(token, str) else ""


def _pairs(body: bytes) -> list[tuple[str, str]]:
    """Return the fields of a plain form."""
    try:
        return parse_qsl(body.decode("latin-1"), keep_blank_values=True, max_num_fields=MOST_FIELDS)
    except ValueError:
        text = f"The form has more than {MOST_FIELDS:,} fields; send a file instead."
        raise RefusedError(400, text) from None


async def _nothing_more() -> Message:
    return {"type": "http.disconnect"}


def _until(stream: asyncio.Event, receive: Receive) -> Receive:
    """Return a `receive` that says that the browser went away when the stream should end."""

    async def receive_until() -> Message:
        message = asyncio.ensure_future(receive())
        end = asyncio.ensure_future(stream.wait())
        try:
            await asyncio.wait((message, end), return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else {"type": "http.disconnect"}
        finally:
            message.cancel()
            end.cancel()

    return receive_until
