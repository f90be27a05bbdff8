"""The headers of every answer: what a page may load, who may embed it, what a browser keeps.

    send = with_headers(send, path="/trace/trace", secure=False)

Pages load scripts, styles and fonts from studio alone, and no script inside a page runs. No other
site can put a page into a frame, read an answer, or learn an address from a referrer.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Message, Send

STATIC = "/static/"
"""Where the files of the package are."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "font-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
"""The content security policy of every answer."""

_YEAR = 365 * 24 * 3600

_ALWAYS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # With "no-referrer" a browser would send `Origin: null` with our own forms.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


def headers_of(path: str, query: bytes = b"", *, status: int = 200) -> dict[str, str]:
    """Return the headers of an answer.

    Args:
        path: The path of the request.
        query: Its query. A static file is kept for a year where its address names a version.
        status: The status of the answer. Only a whole answer is kept.
    """
    kept = path.startswith(STATIC) and status in (200, 206, 304)
    if not kept:
        cache = "no-store"
    elif query.startswith(b"v="):
        cache = f"public, max-age={_YEAR}, immutable"
    else:
        cache = "no-cache"
    return {**_ALWAYS, "cache-control": cache}


def with_headers(send: Send, path: str, query: bytes = b"", *, secure: bool = False) -> Send:
    """Return a `send` that adds the headers to what an app answers.

    It passes each message on without waiting for the next one, so that a stream of events arrives
    as it is sent. If the app sets one of these headers, its value is replaced.

    Args:
        send: Where the messages go.
        path: The path of the request.
        query: Its query.
        secure: Whether the browser should insist on TLS from now on.
    """

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            _complete(message, path, query, secure)
        await send(message)

    return send_on


def _complete(message: MutableMapping[str, Any], path: str, query: bytes, secure: bool) -> None:
    """Put the headers into the first message of an answer."""
    added = headers_of(path, query, status=message["status"])
    if secure:
        added["strict-transport-security"] = f"max-age={_YEAR}"
    names = {name.encode() for name in added} | {b"server"}
    kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in names]
    message["headers"] = [*kept, *((name.encode(), text.encode()) for name, text in added.items())]
