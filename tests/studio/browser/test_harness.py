"""The harness notices what it is there to notice; a page that does nothing wrong has no problem."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from browsing import accessibility, opened, overflow, refused

pytestmark = pytest.mark.browser

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"
)

HEAD = '<!doctype html><html lang="en"><head><title>A page</title></head>'

PAGES = {
    "/right": f"{HEAD}<body><main><h1>Right</h1><script src='/right.js'></script></main></body>",
    "/right.js": "document.body.dataset.ran = 'yes';",
    "/inline": f"{HEAD}<body><main><h1>x</h1><img src=x onerror=alert(1)></main></body>",
    "/error": f"{HEAD}<body><script src='/error.js'></script></body>",
    "/error.js": "console.error('wrong'); throw new Error('thrown');",
    "/dialog": f"{HEAD}<body><script src='/dialog.js'></script></body>",
    "/dialog.js": "alert('hello');",
    "/foreign": f"{HEAD}<body><img alt='x' src='http://example.org/x.png'></body>",
    "/wide": f"{HEAD}<body><main><h1>W</h1><pre>{'wide ' * 400}</pre></main></body>",
    "/unlabelled": f"{HEAD}<body><main><h1>Form</h1><input name='a'></main></body>",
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        text = PAGES.get(self.path)
        self.send_response(200 if text is not None else 404)
        script = self.path.endswith(".js")
        self.send_header("Content-Type", "text/javascript" if script else "text/html")
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def visit(browser: Any, address: str) -> tuple[list[str], list[str], list[str], int]:
    """Return the problems of a page, what its policy refused, what axe finds, and its overflow."""
    page, watch = opened(browser, address, viewport={"width": 360, "height": 700})
    page.goto(address)
    page.wait_for_load_state("networkidle")
    seen = (list(watch.problems), refused(page), accessibility(page), overflow(page))
    page.context.close()
    return seen


def test_a_page_without_faults_has_no_problem(browser: Any, base: str) -> None:
    problems, violations, unmet, wider = visit(browser, f"{base}/right")
    # Chromium asks for an icon by itself, and this server has none.
    assert [line for line in problems if "favicon" not in line] == []
    assert (violations, unmet, wider) == ([], [], 0)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("inline", "script"),
        ("error", "console: wrong"),
        ("error", "exception: thrown"),
        ("dialog", "dialog: hello"),
        ("foreign", "request: http://example.org/x.png"),
    ],
)
def test_a_fault_is_noticed(browser: Any, base: str, name: str, part: str) -> None:
    problems, violations, *_ = visit(browser, f"{base}/{name}")
    assert any(part in line for line in problems), problems
    assert bool(violations) == (name in ("inline", "foreign"))


def test_axe_and_the_width_are_measured(browser: Any, base: str) -> None:
    *_, unmet, _ = visit(browser, f"{base}/unlabelled")
    assert any(line.startswith("label (critical)") for line in unmet), unmet
    *_, wider = visit(browser, f"{base}/wide")
    assert wider > 1000
