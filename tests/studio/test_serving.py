"""The port, the server, TLS, and how it ends."""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, StreamingResponse

from factsmith.core.errors import InputError
from factsmith.studio import serving
from factsmith.studio.access import Access
from factsmith.studio.serving import Serving

PASSWORD = "correct horse battery"


@pytest.fixture
def password(tmp_path: Path) -> Path:
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    file.chmod(0o600)
    return file


class Session:
    """What `serve` needs of a studio."""

    def __init__(self) -> None:
        self.closing = threading.Event()
        self.cancelled: list[str] = []
        job = SimpleNamespace(id="a job")
        self.jobs = SimpleNamespace(all=lambda: [job], cancel=self.cancelled.append)


def pages(session: Any) -> FastAPI:
    """Return an app with a page, and a stream that never ends by itself."""
    app = FastAPI()

    async def endless() -> Any:
        import asyncio

        while True:
            yield "data: 1\n\n"
            await asyncio.sleep(0.05)

    app.get("/")(lambda: PlainTextResponse("page"))
    app.get("/events")(lambda: StreamingResponse(endless(), media_type="text/event-stream"))
    return app


@contextmanager
def serving_pages(
    monkeypatch: pytest.MonkeyPatch, options: Serving
) -> Iterator[tuple[Session, Access, threading.Thread]]:
    """Serve pages in a thread."""
    monkeypatch.setattr(serving, "create_app", pages)
    session, begun = Session(), threading.Event()
    with options.bound() as listener:
        access = options.access(listener)
        arguments = (session, access, listener, options, begun.set)
        thread = threading.Thread(target=serving.serve, args=arguments)
        thread.start()
        try:
            assert begun.wait(10)
            yield session, access, thread
        finally:
            session.closing.set()
            thread.join(10)


def raw(port: int, request: bytes, wait: float = 5.0) -> bytes:
    """Send bytes and return what comes back until the connection ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def test_who_may_connect() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.5"):
        assert Serving(host).is_local and Serving(host).check() == []
    for host in ("0.0.0.0", "::", "192.0.2.7", "gpu-3.example", ""):
        assert not Serving(host).is_local
        with pytest.raises(InputError, match="only with a password") as refused:
            Serving(host).check()
        assert refused.value.argument == "password_file"


def test_warnings(password: Path) -> None:
    (warning,) = Serving("0.0.0.0", password_file=password).check()
    assert "unencrypted" in warning
    password.chmod(0o644)
    assert len(Serving("0.0.0.0", password_file=password).check()) == 2
    assert len(Serving(password_file=password).check()) == 1


def test_a_port_in_use_and_hosts_that_are_not_here() -> None:
    with Serving(port=0).bound() as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is in use") as refused:
            Serving(port=port).bound().__enter__()
        assert refused.value.argument == "port"
    with Serving(port=port).bound():
        pass
    for host in ("192.0.2.7", "no-such-host.invalid", "a" * 300, "\0"):
        with pytest.raises(InputError, match="cannot listen") as refused:
            Serving(host, 0).bound().__enter__()
        assert refused.value.argument == "host"


def test_links_name_a_host_that_a_browser_can_open(password: Path) -> None:
    for host, shown in (
        ("127.0.0.1", "http://127.0.0.1:8420/?token="),
        ("::1", "http://[::1]:8420/?token="),
        ("0.0.0.0", f"http://{socket.gethostname()}:8420/?token="),
    ):
        assert Serving(host).link(Access(8420)).startswith(shown)


def test_a_studio_for_others_answers_to_its_name(password: Path) -> None:
    options = Serving("0.0.0.0", 0, ("proxy.example",), password)
    with options.bound() as listener:
        access = options.access(listener)
    port = access.port
    assert access.needs_password and access.is_password(PASSWORD)
    for host in (f"{socket.gethostname()}:{port}", "proxy.example", f"192.0.2.7:{port}"):
        assert access.is_host(host), host
    assert not access.is_host(f"evil.example:{port}")
    with Serving(port=0).bound() as listener:
        access = Serving(port=0).access(listener)
    assert not access.needs_password
    assert not access.is_host(f"192.0.2.7:{access.port}")


def test_a_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with Serving(port=0).bound() as listener:
        monkeypatch.setenv(serving.TOKEN_VARIABLE, "t" * 30)
        assert Serving().access(listener).token == "t" * 30
        monkeypatch.setenv(serving.TOKEN_VARIABLE, "short")
        with pytest.raises(InputError, match="at least 20"):
            Serving().access(listener)


def test_it_ends_while_streams_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_pages(monkeypatch, Serving(port=0)) as (session, access, thread):
        connection = http.client.HTTPConnection("127.0.0.1", access.port, timeout=10)
        cookie = {"Cookie": f"{access.cookie}={access.begin()}"}
        connection.request("GET", "/events", headers=cookie)
        answer = connection.getresponse()
        assert answer.readline() == b"data: 1\n", "events are not held back"
        begin = time.monotonic()
        session.closing.set()
        thread.join(10)
        assert not thread.is_alive() and time.monotonic() - begin < 5
        assert session.cancelled == ["a job"] and not access.streams
        connection.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", access.port), timeout=1)


def test_slow_heads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_HEAD_SECONDS", 0.3)
    with serving_pages(monkeypatch, Serving(port=0)) as (_, access, _thread):
        head = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{access.port}\r\n".encode()
        begin = time.monotonic()
        assert raw(access.port, b"") == b""
        assert raw(access.port, head) == b""
        assert 0.5 < time.monotonic() - begin < 5
        whole = raw(access.port, head + b"Connection: close\r\n\r\n")
        assert whole.startswith(b"HTTP/1.1 401")
        # A request that is answered leaves no timer: the next one on the connection may come later.
        connection = http.client.HTTPConnection("127.0.0.1", access.port, timeout=5)
        for _ in range(2):
            connection.request("GET", "/")
            assert connection.getresponse().read()
            time.sleep(0.5)
        connection.close()


@pytest.mark.parametrize("session", [True, False])
def test_a_body_that_is_refused_is_read_so_that_its_sender_reads_why(
    monkeypatch: pytest.MonkeyPatch, session: bool
) -> None:
    with serving_pages(monkeypatch, Serving(port=0)) as (_, access, _thread):
        cookie = {"Cookie": f"{access.cookie}={access.begin()}"} if session else {}
        with httpx.Client(base_url=access.address("127.0.0.1"), headers=cookie) as client:
            answer = client.post("/x", files={"file": ("facts.csv", b"x" * 8_000_000)})
            assert answer.status_code == (413 if session else 401)
            parts = iter([b"x" * 100_000] * 80)
            answer = client.post("/x", content=parts, headers={"content-type": "text/plain"})
            assert answer.status_code == (413 if session else 401)
        waiting = b"POST /x HTTP/1.1\r\nContent-Length: 8000000\r\nExpect: 100-continue\r\n"
        name = f"Connection: close\r\nHost: 127.0.0.1:{access.port}\r\n\r\n".encode()
        assert raw(access.port, waiting + name).startswith(b"HTTP/1.1 401")


def test_requests_that_no_browser_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_pages(monkeypatch, Serving(port=0)) as (_, access, _thread):
        name = f"127.0.0.1:{access.port}".encode()
        cookie = f"Cookie: {access.cookie}={access.begin()}\r\n".encode()
        close = b"Host: " + name + b"\r\nConnection: close\r\n"
        cases = {
            b"GET / HTTP/1.0\r\n\r\n": 421,
            b"GET / HTTP/1.1\r\nHost: " + name + b"\r\nHost: evil\r\n\r\n": 400,
            b"GET http://evil.example/ HTTP/1.1\r\n" + close + cookie + b"\r\n": 404,
            b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + close + b"\r\n": 414,
            b"GET /%00 HTTP/1.1\r\n" + close + cookie + b"\r\n": 400,
            b"GET /\xff HTTP/1.1\r\n" + close + b"\r\n": 400,
            b"GET /x\x00y HTTP/1.1\r\n" + close + b"\r\n": 400,
            b"CONNECT evil:80 HTTP/1.1\r\n" + close + b"\r\n": 405,
            b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\nHost: "
            + name
            + b"\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n": 401,
            b"GET / HTTP/1.1\r\n" + close + cookie + b"\r\n": 200,
            b"garbage\r\n\r\n": 400,
        }
        for request, status in cases.items():
            answer = raw(access.port, request)
            assert int(answer.split(None, 2)[1]) == status, (request[:80], answer[:80])
            assert b"Traceback" not in answer


def test_tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate of this test")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext"
    words = f"openssl {words} subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
    subprocess.run(words.split(), check=True, capture_output=True)
    options = Serving("localhost", 0, certificate=certificate, key=key)
    assert options.check() == []
    with serving_pages(monkeypatch, options) as (_, access, _thread):
        assert options.link(access).startswith("https://localhost:")
        context = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection(
            "localhost", access.port, timeout=10, context=context
        )
        connection.request("GET", f"/?token={access.token}")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 303
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-") and cookie.endswith("Secure")
        connection.close()
    for wrong in (certificate, tmp_path / "none"):
        with pytest.raises(InputError, match="belong together"):
            Serving(certificate=certificate, key=wrong).check()
    with pytest.raises(InputError, match="without a certificate"):
        Serving(key=key).check()


def test_a_browser_gets_a_file_and_not_the_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    link = Access(8420).link("127.0.0.1")
    seen: list[tuple[str, int, str]] = []

    def open_(address: str) -> None:
        (file,) = tmp_path.iterdir()
        seen.append((address, file.stat().st_mode & 0o777, file.read_text()))
        raise OSError("no browser")

    monkeypatch.setattr(serving.webbrowser, "open", open_)
    monkeypatch.setattr(serving, "_FILE_SECONDS", 0.0)
    serving._open(link, tmp_path)
    ((address, mode, page),) = seen
    assert "token" not in address and address.startswith("file://")
    assert mode == 0o600 and link in page
    assert list(tmp_path.iterdir()) == []
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serving.sys, "platform", "linux")
    serving.open_browser(link, tmp_path)
    time.sleep(0.1)
    assert len(seen) == 1, "there is no screen"
    assert list(tmp_path.iterdir()) == []
