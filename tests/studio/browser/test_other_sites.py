"""What pages of other sites can do to a studio, in a real browser: nothing.

Two sites attack. One is on another port of 127.0.0.1, so that the browser sends the cookie along.
The other is under another name, as every page of the internet is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from factsmith.studio import serving
from factsmith.studio.access import Access
from factsmith.studio.serving import Serving

pytestmark = pytest.mark.browser

PATIENCE = 10_000
"""Milliseconds."""


class Victim:
    """A studio without a model, which counts what reaches it."""

    def __init__(self) -> None:
        self.closing = threading.Event()
        self.jobs = SimpleNamespace(all=tuple)
        self.reached: list[str] = []

    def app(self, _: object) -> FastAPI:
        """Return an app with a page that has a form, and a form that writes."""
        app = FastAPI()

        @app.get("/{path:path}")
        def page(path: str, request: Request) -> HTMLResponse:
            if not path.startswith(("static/", "favicon")):
                self.reached.append(f"GET /{path}")
            return HTMLResponse(
                f"<title>studio</title><h1>studio /{path}</h1>"
                '<form method="post" action="/patch/apply">'
                f'<input type="hidden" name="csrf" value="{request.state.csrf}">'
                '<input name="a" value="1"><button>Apply</button></form>'
            )

        @app.post("/{path:path}")
        def write(path: str) -> HTMLResponse:
            self.reached.append(f"POST /{path}")
            return HTMLResponse("<h1>written</h1>")

        return app


@contextmanager
def another_site(pages: dict[str, str]) -> Iterator[int]:
    """Serve pages of another site, and yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.get(self.path, "").encode()
            self.send_response(200 if body else 404)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def victim(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Victim, Access, str]]:
    """A studio that is served, and its address."""
    studio, begun, options = Victim(), threading.Event(), Serving(port=0)
    monkeypatch.setattr(serving, "create_app", studio.app)
    with options.bound() as listener:
        access = options.access(listener)
        arguments: Any = (studio, access, listener, options, begun.set)
        thread = threading.Thread(target=serving.serve, args=arguments)
        thread.start()
        try:
            assert begun.wait(10)
            yield studio, access, access.address("127.0.0.1")
        finally:
            studio.closing.set()
            thread.join(20)


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    """A window of its own, with cookies of its own."""
    made = browser.new_context()
    made.set_default_timeout(PATIENCE)
    yield made
    made.close()


ATTACKS = {
    "form": """<form id="f" method="post" action="{base}/patch/apply">
        <input name="a" value="1"><input name="csrf" value="{guess}"></form>
        <script>document.getElementById("f").submit()</script>""",
    "fetch": """<script>
        fetch("{base}/patch/apply", {{method: "POST", mode: "no-cors", credentials: "include",
            body: new URLSearchParams({{a: 1, csrf: "{guess}"}})}})
            .finally(() => document.title = "over")</script>""",
    "api": """<script>
        fetch("{base}/api/v1/apply", {{method: "POST", credentials: "include",
            headers: {{"content-type": "application/json", "x-csrf-token": "{guess}"}},
            body: "{{}}"}})
            .finally(() => document.title = "over")</script>""",
    "embedding": """<iframe src="{base}/frame"></iframe><img src="{base}/picture">
        <script src="{base}/script"></script><link rel="stylesheet" href="{base}/style">
        <script>window.onload = () => document.title = "over"</script>""",
    "reading": """<script>
        fetch("{base}/secret", {{credentials: "include"}})
            .then((answer) => answer.text()).then((text) => document.title = "read " + text)
            .catch(() => document.title = "over")</script>""",
    "socket": """<script>
        const socket = new WebSocket("{socket}/events");
        socket.onopen = () => document.title = "open";
        socket.onerror = () => document.title = "over"</script>""",
}


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_other_sites_reach_nothing(
    victim: tuple[Victim, Access, str], context: Any, name: str
) -> None:
    studio, access, base = victim
    page = context.new_page()
    page.goto(access.link("127.0.0.1"))
    assert page.inner_text("h1") == "studio /" and "token" not in page.url
    page.click("button")
    page.wait_for_selector("text=written")
    assert studio.reached == ["GET /", "POST /patch/apply"], "its own form is taken"
    studio.reached.clear()
    words = {"base": base, "socket": base.replace("http", "ws"), "guess": "0" * 64}
    link = f'<a href="{base}/ask/ask?prompt=x">link</a>'
    pages = {"/link": link} | {
        f"/{attack}": text.format(**words) for attack, text in ATTACKS.items()
    }
    with another_site(pages) as port:
        for attack in ATTACKS:
            page.goto(f"http://{name}:{port}/{attack}")
            if attack == "form":
                page.wait_for_url(f"{base}/patch/apply")
                assert "Another site" in page.inner_text("main")
            else:
                page.wait_for_function("document.title != ''")
                assert page.title() == "over", attack
            assert studio.reached == [], attack
        page.goto(f"http://{name}:{port}/link")
        page.click("a")
        page.wait_for_selector("text=Continue")
        assert studio.reached == [], "the page did not open, and started no job"
        page.click("text=Continue")
        page.wait_for_selector("text=studio /ask/ask")


def test_a_link_of_another_site_goes_on_after_a_click(
    victim: tuple[Victim, Access, str], context: Any
) -> None:
    studio, access, base = victim
    pages = {
        "/start": f'<a href="{access.link("127.0.0.1")}">start</a>',
        "/view": f'<a href="{base}/trace/trace?prompt=a%26b">view</a>',
    }
    page = context.new_page()
    with another_site(pages) as port:
        page.goto(f"http://localhost:{port}/view")
        page.click("a")
        page.click("text=Continue")
        assert "Open the link that" in page.inner_text("main"), "there is no session yet"
        page.goto(f"http://localhost:{port}/start")
        page.click("a")
        page.wait_for_selector("text=studio /")
        assert page.url == f"{base}/"
        page.goto(f"http://localhost:{port}/view")
        page.click("a")
        assert studio.reached == ["GET /"], "the browser kept the cookie to itself"
        page.click("text=Continue")
        page.wait_for_selector("text=studio /trace/trace")
        assert page.url == f"{base}/trace/trace?prompt=a%26b"
