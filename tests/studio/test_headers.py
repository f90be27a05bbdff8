"""What browsers may load, embed and keep; and that streams are not held back."""

from __future__ import annotations

import asyncio
from typing import Any

from factsmith.studio.access import Access
from factsmith.studio.guard import Guard
from factsmith.studio.headers import POLICY, headers_of, with_headers
from guarded import Browser


def directives(policy: str) -> dict[str, list[str]]:
    parts = [part.split() for part in policy.split(";")]
    return {part[0]: part[1:] for part in parts}


def test_the_policy_lets_nothing_in_from_elsewhere() -> None:
    policy = directives(POLICY)
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == ["'none'"]
    for name in ("script-src", "style-src", "connect-src", "font-src", "form-action"):
        assert policy[name] == ["'self'"], name
    assert "unsafe" not in POLICY and "http" not in POLICY and "*" not in POLICY


def test_every_answer_has_the_headers() -> None:
    browser = Browser(Access(8420))
    answers = [browser.get("/"), browser.get("/static/a.css"), browser.get("/", host="evil")]
    answers += [browser.client.put("/"), browser.client.get("/api/v1/log")]
    browser.enter()
    answers += [browser.get("/"), browser.get("/broken"), browser.get("/nowhere")]
    answers += [browser.post("/patch/apply"), browser.get(f"/?token={browser.access.token}")]
    for answer in answers:
        headers = answer.headers
        assert headers["content-security-policy"] == POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers and "server" not in headers
        if "/static/" not in str(answer.url):
            assert headers["cache-control"] == "no-store"


def test_versioned_files_are_kept_and_pages_are_not() -> None:
    assert "immutable" in headers_of("/static/studio.js", b"v=1a2b")["cache-control"]
    assert headers_of("/static/studio.js")["cache-control"] == "no-cache"
    assert headers_of("/static/studio.js", b"v=1", status=404)["cache-control"] == "no-store"
    assert headers_of("/ask", b"v=1")["cache-control"] == "no-store"


def test_the_app_cannot_weaken_a_header() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    weak = [(b"Content-Security-Policy", b"script-src *"), (b"server", b"x"), (b"x-own", b"1")]
    message = {"type": "http.response.start", "status": 200, "headers": weak}
    asyncio.run(with_headers(send, "/")(message))
    headers = sent[0]["headers"]
    names = [name.lower() for name, _ in headers]
    assert names.count(b"content-security-policy") == 1 and b"server" not in names
    assert (b"x-own", b"1") in headers
    assert dict(headers)[b"content-security-policy"] == POLICY.encode()


def test_events_go_on_at_once_and_end_with_studio() -> None:
    access = Access(8420)
    order: list[str] = []

    async def events(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        order.append("sent")
        assert (await receive())["type"] == "http.disconnect"
        order.append("ended")

    async def session() -> None:
        cookie = f"{access.cookie}={access.begin()}".encode()
        headers = [(b"host", b"127.0.0.1:8420"), (b"cookie", cookie)]
        scope = {"type": "http", "method": "GET", "path": "/events", "headers": headers}
        arrived = asyncio.Event()

        async def send(message: Any) -> None:
            order.append(message["type"])
            if message.get("body"):
                arrived.set()

        async def receive() -> Any:
            await asyncio.sleep(3600)

        task = asyncio.ensure_future(Guard(events, access)(scope, receive, send))
        await asyncio.wait_for(arrived.wait(), 5)
        assert len(access.streams) == 1
        assert not task.done()
        access.end_streams()
        await asyncio.wait_for(task, 5)

    asyncio.run(session())
    assert order == ["http.response.start", "http.response.body", "sent", "ended"]
    assert not access.streams
