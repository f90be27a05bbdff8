"""A server on the loopback address that gives the answers of a script, and a progress for it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Notes:
    """A progress that keeps the notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, *_: object) -> None:
        """Keep no step."""

    def note(self, text: str, *, argument: str | None = None) -> None:
        """Keep a note."""
        self.texts.append(text)


@dataclass(frozen=True)
class Asked:
    """A request that came.

    Attributes:
        method: GET or POST.
        path: The path.
        body: What was sent, as plain values.
        headers: The headers, their names in small letters.
    """

    method: str
    path: str
    body: Any
    headers: dict[str, str]


@dataclass
class Answer:
    """What the server answers.

    Attributes:
        body: Plain values, or bytes that are sent as they are.
        status: The status.
        headers: Headers in addition.
        cut: Close the connection after this many bytes of the body.
        wait: Wait for this event before the answer.
    """

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    wait: threading.Event | None = None


@dataclass
class Scripted:
    """A running server.

    Attributes:
        url: Its address.
        asked: The requests that came, in order.
        httpd: The server itself.
    """

    url: str
    asked: list[Asked]
    httpd: ThreadingHTTPServer


@contextlib.contextmanager
def scripted(answer: Callable[[Asked], Answer]) -> Iterator[Scripted]:
    """Run a server that answers every request by a function."""
    asked: list[Asked] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            sent = self.rfile.read(size)
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Asked(self.command, self.path, json.loads(sent) if sent else None, headers)
            with lock:
                asked.append(request)
            reply = answer(request)
            if reply.wait is not None:
                reply.wait.wait(20)
            raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            with contextlib.suppress(OSError):
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(raw)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw[: reply.cut])
                if reply.cut is not None:
                    self.connection.close()

        do_GET = do_POST = respond  # noqa: N815 - the names that http.server calls

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Scripted(f"http://127.0.0.1:{httpd.server_port}", asked, httpd)
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def in_turn(*answers: Answer) -> Callable[[Asked], Answer]:
    """Return a script: one answer after another, and the last one again and again."""
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]
