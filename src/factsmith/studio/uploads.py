"""How much a request may send, and how long it may take.

    body = await read_body(receive, content_length(headers), most_bytes(path, content_type))
    receive = replayed(body, receive)

The whole body is in memory before the app sees it. The limit makes that safe: a request cannot
fill the memory, and a slow one holds nothing but its own connection.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Message, Receive

MEGABYTE = 10**6

MOST_UPLOADED = 5 * MEGABYTE
"""Bytes of a form with files, and of a call of the API."""

MOST_SENT = 1 * MEGABYTE
"""Bytes of any other form."""

MOST_ADDRESS = 16_000
"""Bytes of a path with its query. An address holds the whole state of a view."""

MOST_HEADERS = 32_000
"""Bytes of all headers together."""

MOST_FIELDS, MOST_FILES = 1_000, 20
"""Fields and files of one form."""

MOST_DISCARDED = 64 * MEGABYTE
"""Bytes that are read and dropped of a request that is refused."""

SECONDS = 30.0
"""How long a body may take."""


class RefusedError(Exception):
    """A request that is not answered as it asks.

    Attributes:
        status: The status of the answer.
        headers: More headers of the answer.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


def most_bytes(path: str, content_type: str) -> int:
    """Return how many bytes a request may send to a path."""
    is_upload = content_type.partition(";")[0].strip().lower() == "multipart/form-data"
    return MOST_UPLOADED if is_upload or path.startswith("/api/") else MOST_SENT


def check_head(path: bytes, query: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Refuse an address or headers that are too long."""
    length = len(path) + len(query) + 1
    if length > MOST_ADDRESS:
        raise RefusedError(
            414,
            f"The address has {length:,} bytes; at most {MOST_ADDRESS:,} are accepted. Shorten the "
            "texts, or send them as a file.",
        )
    size = sum(len(name) + len(value) for name, value in headers)
    if size > MOST_HEADERS:
        raise RefusedError(
            431,
            f"The headers have {size:,} bytes; at most {MOST_HEADERS:,} are accepted. Delete the "
            "cookies of this host, and try again.",
        )


def content_length(value: str | None) -> int | None:
    """Return the length that a request announces; None where it does not say."""
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()):
        raise RefusedError(400, "Content-Length is not a number; send the length in bytes.")
    return int(value) if len(value) < 20 else 10**19


def check_length(length: int | None, most: int) -> None:
    """Refuse a body that announces more than it may have."""
    if length is not None and length > most:
        raise _too_large(most)


class Incoming:
    """The messages of a request, and whether its body has come to an end."""

    def __init__(self, receive: Receive) -> None:
        """Take what gives the messages."""
        self._receive, self.ended = receive, False

    async def __call__(self) -> Message:
        """Return the next message."""
        message = await self._receive()
        self.ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def discard(self, most: int = MOST_DISCARDED, seconds: float = SECONDS) -> None:
        """Read the rest of the body and drop it, so that the sender reads the answer.

        A browser that is still sending when the connection closes shows an error of its own.
        """
        end = time.monotonic() + seconds
        while not self.ended and most > 0:
            try:
                message = await asyncio.wait_for(self(), max(end - time.monotonic(), 0.001))
            except TimeoutError:
                return
            most -= len(message.get("body", b""))


async def read_body(
    receive: Receive, length: int | None, most: int, seconds: float = SECONDS
) -> bytes | None:
    """Return the body of a request; None where the sender went away.

    Args:
        receive: Gives the messages of the request.
        length: The length that the request announces. None: it does not say.
        most: How many bytes the body may have.
        seconds: How long it may take.

    Raises:
        RefusedError: when there are more bytes, or it takes longer.
    """
    check_length(length, most)
    parts: list[bytes] = []
    size, end = 0, time.monotonic() + seconds
    while True:
        try:
            message = await asyncio.wait_for(receive(), max(end - time.monotonic(), 0.001))
        except TimeoutError:
            raise RefusedError(
                408,
                f"The request did not arrive within {seconds:g} seconds; send it again.",
                {"connection": "close"},
            ) from None
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body in one message, and then what `receive` gives."""
    left = [body]

    async def receive_again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return receive_again


def _too_large(most: int) -> RefusedError:
    return RefusedError(
        413,
        f"The request has more than {most // MEGABYTE} MB; at most that is accepted. Split the "
        "file, or use the command line, which reads files of any size.",
        {"connection": "close"},
    )
