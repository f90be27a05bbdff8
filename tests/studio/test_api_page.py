"""The page of the HTTP API."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest

from factsmith.studio.access import Access
from factsmith.studio.api_page import call_of
from factsmith.studio.app import create_app
from factsmith.studio.guard import guard
from factsmith.studio.rooms import ROOMS
from factsmith.studio.session import Studio
from guarded import HOST, Browser
from studios import LEV, Holding, rooms_with, studio_in


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with studio_in(tmp_path_factory.mktemp("pages") / "space", rooms_with(Holding())) as opened:
        yield opened


@pytest.fixture
def browser(studio: Studio) -> Browser:
    access = Access(8420, password="correct horse battery")
    app = create_app(studio)
    guard(app, access)
    return Browser(access, app=app).enter()


def test_every_verb_is_listed_with_its_arguments(browser: Browser, studio: Studio) -> None:
    page = browser.get("/api")
    assert page.status_code == 200
    for room in studio.rooms:
        for verb in room.verbs:
            assert f"/api/v1/{verb.name}</code>" in page.text
            for name in verb.arguments.model_fields:
                assert f"<code>{name}</code>" in page.text
    assert "https://" not in page.text and "<script>" not in page.text
    described = browser.get("/api/v1/openapi.json")
    assert "/api/v1/say" in described.json()["paths"]
    for address in ("/docs", "/redoc", "/openapi.json"):
        assert browser.get(address).status_code == 404


def test_the_command_that_is_shown_works(browser: Browser, studio: Studio) -> None:
    (say,) = [verb for room in studio.rooms for verb in room.verbs if verb.name == "say"]
    words = shlex.split(call_of(say, HOST).curl)
    assert words[0] == "curl" and words[-1] == f"{HOST}/api/v1/say"
    data = json.loads(words[words.index("--json") + 1])
    name, value = words[words.index("-H") + 1].replace("$TOKEN", browser.access.token).split(": ")
    headers = {name: value, "content-type": "application/json"}
    client = browser.client
    assert client.post(words[-1], headers=headers, content=json.dumps(data)).status_code == 200
    wrong = client.post(words[-1], headers=headers, content=json.dumps({**data, "prompts": LEV}))
    assert wrong.status_code == 400 and wrong.json()["error"]["argument"] == "prompts"


@pytest.mark.parametrize(
    "verb", [verb for room in ROOMS for verb in room.verbs], ids=lambda v: v.name
)
def test_the_verbs_of_studio_are_described(verb: object) -> None:
    call = call_of(verb, HOST)  # type: ignore[arg-type]
    assert all(kind and kind != "value" for _, kind, _, _ in call.parameters)
    assert all(said for *_, said in call.parameters), "each argument says what it is"


def test_a_studio_with_a_password_can_be_left(browser: Browser) -> None:
    class Forms(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.action, self.tokens = "", {}

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            names = dict(attrs)
            if tag == "form":
                self.action = str(names.get("action"))
            if names.get("name") == "csrf" and tag == "input":
                self.tokens[self.action] = names["value"]

    forms = Forms()
    forms.feed(browser.get("/").text)
    assert browser.post("/logout", data={"csrf": forms.tokens["/logout"]}).status_code == 303
    assert browser.get("/").status_code == 401
