"""The tour's pages: where they lead, what they remember, and what they say when they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from factsmith.studio import tour
from factsmith.studio.app import create_app
from studios import Holding, rooms_with, studio_in


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder: Path = tmp_path_factory.mktemp("tour") / "workspace"
    with studio_in(folder, rooms_with(Holding())) as studio:
        yield TestClient(create_app(studio), base_url="http://127.0.0.1:8420")


@pytest.fixture(autouse=True)
def no_cookies(client: TestClient) -> None:
    client.cookies.clear()


def test_a_step_goes_to_its_room_and_is_remembered(client: TestClient) -> None:
    response = client.get("/tour/2", follow_redirects=False)
    assert response.status_code == 303
    assert response.headers["location"].startswith("/trace/trace?prompt=The+currency")
    cookie = response.headers["set-cookie"]
    assert "factsmith_tour_8420=2" in cookie and "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    page = client.get("/jobs").text
    assert "Tour, step 2 of 5" in page and 'href="/tour/3"' in page and 'href="/tour/1"' in page


def test_without_the_cookie_no_page_has_the_note(client: TestClient) -> None:
    assert "Tour, step" not in client.get("/jobs").text
    client.cookies.set("factsmith_tour_8421", "2")
    assert "Tour, step" not in client.get("/jobs").text, "a cookie of another port"


def test_the_tour_can_be_left(client: TestClient) -> None:
    client.get("/tour/1", follow_redirects=False)
    assert "Tour, step 1 of 5" in client.get("/jobs").text
    response = client.post("/tour/leave", follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (303, "/")
    assert "Tour, step" not in client.get("/jobs").text


def test_a_step_that_cannot_be_done_goes_to_the_overview(client: TestClient) -> None:
    response = client.get("/tour/5", follow_redirects=False)
    assert response.headers["location"] == "/tour"
    page = client.get("/tour").text
    assert "Apply it in step 3 first" in page and 'href="/tour/5"' not in page
    assert 'href="/tour/3"' in page


@pytest.mark.parametrize("number", ["0", "6", "x", "%00", "<b>"])
def test_another_number_is_no_step(client: TestClient, number: str) -> None:
    response = client.get(f"/tour/{number}", follow_redirects=False)
    assert response.status_code == 404 and "the tour has no step" in response.text
    assert "<b>" not in response.text
    client.cookies.set("factsmith_tour_8420", "6")
    assert "Tour, step" not in client.get("/jobs").text


def test_the_note_is_sent_again_only_when_the_ledger_says_more(client: TestClient) -> None:
    client.get("/tour/3", follow_redirects=False)
    same = client.get("/tour/strip", params={"at": "/patch/plan", "state": "begin"})
    assert (same.status_code, same.text) == (204, "")
    other = client.get("/tour/strip", params={"at": "/patch/plan", "state": "kept"})
    assert other.status_code == 200 and "Press Preview the patch" in other.text
    hostile = client.get("/tour/strip", params={"at": '"><script>', "state": "kept"}).text
    assert "<script>" not in hostile


def test_a_model_that_learnt_other_facts_gets_no_tour(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Take the tour" in client.get("/").text
    monkeypatch.setattr(tour.atlas, "names", lambda: ("another",))
    assert "Take the tour" not in client.get("/").text
    page = client.get("/tour").text
    assert "this workspace is of another model" in page and "Begin the tour" not in page
    assert client.get("/tour/1", follow_redirects=False).headers["location"] == "/tour"
