"""The pages of Patch, Ledger, Judge, Export and push, asked for as a browser asks."""

from __future__ import annotations

import io
import socket
import time
import zipfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest
from fastapi.testclient import TestClient

from factsmith.studio.app import create_app
from factsmith.studio.rooms import ROOMS
from factsmith.studio.session import Studio
from studio_keeping import FIAT
from studios import studio_in

HOSTILE = "<img src=x onerror=alert(1)></script>{{7*7}}"

VALUES = {**FIAT, "neighbours": list(FIAT["neighbours"])}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """A studio on the bundled model and a new workspace."""
    with studio_in(tmp_path_factory.mktemp("keeping") / "space", ROOMS) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(studio: Studio) -> TestClient:
    return TestClient(create_app(studio), raise_server_exceptions=False)


def finished(client: TestClient, address: str, **form: Any) -> str:
    """Begin a job as a form does, wait for its end, and return its page."""
    begun = client.post(address, data=form, follow_redirects=False)
    assert begun.status_code == 303, begun.text
    assert client.get(f"/api/v1{begun.headers['location']}?wait=120").status_code != 202
    return client.get(begun.headers["location"]).text


def view(client: TestClient, verb: str, **values: Any) -> str:
    """Wait for the answer of a reading verb, and return its fragment."""
    client.get(f"/view/{verb}.json?{urlencode(values, doseq=True)}")
    return client.get(f"/view/{verb}?{urlencode(values, doseq=True)}").text


def test_every_page_opens(client: TestClient) -> None:
    for room in ROOMS:
        for verb in room.verbs:
            page = client.get(f"/{room.name}/{verb.name}")
            assert page.status_code == 200, (room.name, verb.name, page.text[:300])
            assert f">{room.title}</h1>" in page.text


def test_a_patch_by_mouse_and_its_revert(client: TestClient, studio: Studio) -> None:
    planned = view(client, "plan", **VALUES)
    assert "Toyota" in planned and "/patch/preview?" in planned
    tried = view(client, "preview", **VALUES)
    assert "Nothing is kept yet" in tried and 'action="/patch/apply"' in tried
    applied = finished(client, "/patch/apply", **VALUES, message="by mouse")
    assert "committed" in applied and "nothing was solved again" in applied
    assert 'action="/ledger/revert"' in applied
    (row,) = client.get("/view/log.json").json()["revisions"]
    shown = client.get(f"/ledger/show?revision={row['id']}").text
    assert "by mouse" in shown and 'action="/ledger/revert"' in shown
    reverted = finished(client, "/ledger/revert", revision=row["id"])
    assert "bit for bit" in reverted
    status = client.get("/view/log.json").json()
    assert [each["state"] for each in status["revisions"]] == ["active", "reverted"]


def test_the_examples_are_patches_by_one_click(client: TestClient, studio: Studio) -> None:
    (plan,) = (verb for room in ROOMS for verb in room.verbs if verb.name == "plan")
    assert plan.examples is not None
    for label, arguments in plan.examples(studio.desk):
        address = arguments.address("/patch/plan")
        assert address.replace("&", "&amp;") in client.get("/patch/plan").text, label
        tried = client.get(arguments.address("/view/preview.json")).json()
        assert all(gate["passed"] for gate in tried["gates"]), (label, tried["gates"])
        assert "It holds" in client.get(arguments.address("/patch/preview")).text


def test_a_sheet_is_dropped_and_planned(client: TestClient) -> None:
    text = "- {subject: Fiat 127, prompt: 'The maker of {} is', target: Toyota}"
    for sent in (
        {"files": {"file": ("facts.yaml", text.encode())}},
        {"data": {"text": text}},
    ):
        gone = client.post("/patch/sheet", follow_redirects=False, **sent)
        assert gone.status_code == 303
        assert gone.headers["location"].startswith("/patch/plan?sheet=")
        planned = client.get(gone.headers["location"].replace("/patch/plan", "/view/plan.json"))
        assert planned.json()["entries"]
        assert "Toyota" in client.get(gone.headers["location"]).text
    wrong = client.post("/patch/sheet", files={"file": (f"{HOSTILE}.yaml", b"- {subject: 1}")})
    assert wrong.status_code == 400 and "no prompt" in wrong.text
    assert "{{7*7}}.yaml" in wrong.text and "</script>{{" not in wrong.text


def test_a_hostile_fact_is_text_everywhere(client: TestClient) -> None:
    values = {"subject": HOSTILE, "prompt": "{} is made by", "target": f"{HOSTILE} 2"}
    pages = [view(client, "plan", **values), client.get("/patch/plan", params=values).text]
    pages.append(view(client, "preview", **values))
    pages.append(finished(client, "/patch/apply", **values, message=HOSTILE, force="true"))
    pages += [client.get("/ledger/log").text, client.get("/ledger/show?revision=latest").text]
    pages += [view(client, "diff"), client.get("/export/exports").text]
    pages.append(finished(client, "/ledger/revert", revision="latest", message=HOSTILE))
    for page in pages:
        assert "<img" not in page and ">49<" not in page and "</script>{{" not in page
    assert all("&lt;img src=x" in page for page in pages[:6])


def test_a_wrong_field_is_said_next_to_it(client: TestClient) -> None:
    page = client.get("/patch/plan", params={"subject": "Ann", "prompt": "Who is", "target": "x"})
    assert page.status_code == 400 and 'id="help-prompt"><span class="wrong-text"' in page.text
    posted = client.post("/patch/apply", data={"subject": "Ann"})
    for _ in range(100):
        if "is empty" in posted.text:
            break
        time.sleep(0.05)
        posted = client.get(str(posted.url))
    assert "prompt is empty" in posted.text


def test_files_are_saved_by_known_names_only(client: TestClient, studio: Studio) -> None:
    finished(client, "/patch/apply", **VALUES, force="true")
    made = finished(client, "/export/export", name="mine", format="patch")
    assert "/export/file/mine" in made
    assert "mine" in client.get("/export/exports").text
    saved = client.get("/export/file/mine")
    names = zipfile.ZipFile(io.BytesIO(saved.content)).namelist()
    assert "mine/factsmith.json" in names and "attachment" in saved.headers["content-disposition"]
    (studio.desk.folder / "exports" / "mine" / "passwd").symlink_to("/etc/passwd")
    again = zipfile.ZipFile(io.BytesIO(client.get("/export/file/mine").content)).namelist()
    assert again == names
    for name in ("%2e%2e", "..%2fledger.db", "none", "mine%2ffactsmith.json", "mine%00", ""):
        for room in ("export", "judge"):
            refused = client.get(f"/{room}/file/{name}")
            assert refused.status_code in (400, 404), (room, name)
            assert "attachment" not in refused.headers.get("content-disposition", "")
    (studio.desk.folder / "exports" / "link").symlink_to("/etc")
    assert client.get("/export/file/link").status_code == 400
    finished(client, "/ledger/revert", revision="latest")


def test_no_address_alone_sends_the_key_to_a_server(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTSMITH_API_KEY", "sk-secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        for verb in ("served", "push"):
            shown = client.get(f"/export/{verb}", params={"url": url})
            assert url in shown.text and "sk-secret" not in shown.text
            for path in (f"/view/{verb}", f"/view/{verb}.json", f"/api/v1/{verb}"):
                assert client.get(path, params={"url": url}).status_code in (404, 405), path
        with pytest.raises(TimeoutError):
            server.accept()
        client.post("/export/served", data={"url": url}, follow_redirects=False)
        server.settimeout(10)
        connection, _ = server.accept()  # control: a press does send it
        assert b"sk-secret" in connection.recv(4096)
        connection.close()


def test_a_campaign_by_mouse(client: TestClient) -> None:
    form = {"name": "quick", "methods": "rome", "limit": "2", "continued": "0"}
    page = finished(client, "/judge/evaluate", **form, drift_tokens="0")
    assert "rome" in page and "/judge/report?name=quick" in page
    assert "quick" in client.get("/judge/judged").text
    report = client.get("/judge/report?name=quick").text
    assert "/judge/file/quick" in report and "prompt exact" in report
    saved = client.get("/judge/file/quick")
    assert saved.status_code == 200 and b"<html" in saved.content
    assert "attachment" in saved.headers["content-disposition"]
