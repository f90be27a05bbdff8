"""A small app behind the guard, and a browser for it."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.testclient import TestClient

from factsmith.studio.access import Access
from factsmith.studio.guard import guard

HOST = "http://127.0.0.1:8420"


def small_app(access: Access) -> FastAPI:
    """Return an app with a page, a form and a call, which says what it got."""
    app = FastAPI(docs_url=None, redoc_url=None)

    @app.get("/")
    @app.get("/ask/ask")
    def page(request: Request) -> HTMLResponse:
        return HTMLResponse(f"<p>page</p><i>{request.state.csrf}</i>")

    @app.post("/patch/apply")
    async def form(request: Request) -> JSONResponse:
        async with request.form() as fields:
            return JSONResponse({"got": len(await _text(fields))})

    @app.get("/api/v1/log")
    @app.post("/api/v1/apply")
    async def call(request: Request) -> JSONResponse:
        return JSONResponse({"bytes": len(await request.body())})

    @app.get("/static/{name:path}")
    def static(name: str) -> HTMLResponse:
        return HTMLResponse(f"static {name}")

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("a secret")

    guard(app, access)
    return app


async def _text(fields: Any) -> str:
    parts = [
        value if isinstance(value, str) else str(await value.read()) for value in fields.values()
    ]
    return "".join(parts)


class Browser:
    """A client that does as browsers do: it keeps cookies, and says which site asks."""

    def __init__(self, access: Access, address: str = HOST, app: FastAPI | None = None) -> None:
        self.access = access
        self.client = TestClient(
            app or small_app(access),
            base_url=address,
            follow_redirects=False,
            raise_server_exceptions=False,
        )

    def enter(self) -> Browser:
        """Come in by the start-up link."""
        assert self.get(f"/?token={self.access.token}").status_code == 303
        return self

    def get(self, address: str, site: str = "same-origin", **headers: str) -> Any:
        """Follow a link that is on a page of some site."""
        sent = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
        return self.client.get(address, headers={**sent, **_dashed(headers)})

    def post(self, address: str, site: str = "same-origin", **options: Any) -> Any:
        """Send a form."""
        headers = {"sec-fetch-site": site, "origin": HOST, **options.pop("headers", {})}
        return self.client.post(address, headers=headers, **options)

    @property
    def csrf(self) -> str:
        """The token that a page of this session has."""
        match = re.search("<i>(.*)</i>", self.get("/").text)
        assert match is not None
        return match[1]


def _dashed(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): text for name, text in headers.items()}
