"""How much a request may send, and how long it may take."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from factsmith.studio.access import Access
from factsmith.studio.guard import Guard
from factsmith.studio.uploads import (
    MOST_ADDRESS,
    MOST_SENT,
    MOST_UPLOADED,
    RefusedError,
    content_length,
    most_bytes,
    read_body,
    replayed,
)
from guarded import Browser


@pytest.fixture
def browser() -> Browser:
    return Browser(Access(8420)).enter()


def test_uploads_and_calls_may_be_larger_than_forms() -> None:
    assert most_bytes("/patch/plan", "multipart/form-data; boundary=x") == MOST_UPLOADED
    assert most_bytes("/api/v1/apply", "application/json") == MOST_UPLOADED
    for kind in ("application/x-www-form-urlencoded", "", "x; multipart/form-data"):
        assert most_bytes("/patch/plan", kind) == MOST_SENT


@pytest.mark.parametrize("announced", [True, False])
def test_large_bodies_are_refused(browser: Browser, announced: bool) -> None:
    def body(size: int) -> bytes | Iterator[bytes]:
        data = b"a=" + b"x" * (size - 2)
        return data if announced else iter([data[:1000], data[1000:]])

    headers = {
        "x-csrf-token": browser.csrf,
        "content-type": "application/x-www-form-urlencoded",
    }
    answer = browser.post("/patch/apply", content=body(MOST_SENT), headers=headers)
    assert answer.status_code == 200 and answer.json()["got"] == MOST_SENT - 2
    answer = browser.post("/patch/apply", content=body(MOST_SENT + 1), headers=headers)
    assert answer.status_code == 413
    assert "more than 1 MB" in answer.text and answer.headers["connection"] == "close"
    right = {"authorization": f"Bearer {browser.access.token}"}
    answer = browser.post("/api/v1/apply", content=body(MOST_UPLOADED), headers=right)
    assert answer.json() == {"bytes": MOST_UPLOADED}
    answer = browser.post("/api/v1/apply", content=body(MOST_UPLOADED + 1), headers=right)
    assert answer.status_code == 413 and "5 MB" in answer.json()["error"]["message"]


def test_nothing_is_kept_of_what_is_refused() -> None:
    read: list[str] = []

    async def receive() -> Any:
        read.append("a part")
        return {"type": "http.request", "body": b"x" * 10**6, "more_body": True}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody may come in")

    access = Access(8420)
    headers = [(b"host", b"127.0.0.1:8420"), (b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "method": "POST", "path": "/patch/apply", "headers": headers}
    asyncio.run(Guard(app, access)(scope, receive, send))
    assert sent[0]["status"] == 401 and len(read) == 64, "a part is dropped at once"
    scope["headers"] = [*headers, (b"cookie", f"{access.cookie}={access.begin()}".encode())]
    read.clear()
    asyncio.run(Guard(app, access)(scope, receive, send))
    assert sent[2]["status"] == 413 and len(read) == 66


def test_a_reading_request_has_no_body(browser: Browser) -> None:
    assert browser.client.request("GET", "/", content=b"x").status_code == 413
    assert browser.client.request("GET", "/").status_code == 200


def test_slow_bodies_end() -> None:
    async def slow() -> Any:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(RefusedError, match="did not arrive") as error:
        asyncio.run(read_body(slow, None, 100, seconds=0.2))
    assert error.value.status == 408

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    assert asyncio.run(read_body(gone, None, 100)) is None


def test_a_body_is_given_again_once() -> None:
    async def rest() -> Any:
        return {"type": "http.disconnect"}

    async def session() -> list[Any]:
        receive = replayed(b"abc", rest)
        return [await receive(), await receive()]

    first, second = asyncio.run(session())
    assert first == {"type": "http.request", "body": b"abc", "more_body": False}
    assert second["type"] == "http.disconnect"


def test_lengths_that_are_not_numbers() -> None:
    assert content_length(None) is None and content_length("12") == 12
    assert (content_length("9" * 5000) or 0) > MOST_UPLOADED
    for text in ("", "-1", "1 2", "+1", "١", "1e3", "0x1"):
        with pytest.raises(RefusedError):
            content_length(text)


def test_long_addresses_and_headers(browser: Browser) -> None:
    fits = "/?a=" + "x" * (MOST_ADDRESS - 10)
    assert browser.client.get(fits).status_code == 200
    answer = browser.client.get(fits + "x" * 20)
    assert answer.status_code == 414 and "Shorten" in answer.text
    assert browser.client.get("/", headers={"x-own": "y" * 33_000}).status_code == 431


def test_forms_with_many_fields(browser: Browser) -> None:
    fields = "&".join(f"f{n}=1" for n in range(3000)) + f"&csrf={browser.csrf}"
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert browser.post("/patch/apply", content=fields, headers=headers).status_code == 400
    few = "&".join(f"f{n}=1" for n in range(900)) + f"&csrf={browser.csrf}"
    assert browser.post("/patch/apply", content=few, headers=headers).status_code == 200
    files = [("file", (f"{n}.yaml", b"x")) for n in range(30)]
    answer = browser.post("/patch/apply", data={"csrf": browser.csrf}, files=files)
    assert answer.status_code == 400 and "Too many files" in answer.text
