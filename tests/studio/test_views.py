"""Pages: forms, answers, jobs, and what is not accepted."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from factsmith.core.tables import Table
from factsmith.studio.app import create_app
from factsmith.studio.session import Studio
from factsmith.studio.sheet import csv_of
from factsmith.studio.templating import environment
from factsmith.studio.verb import Answer
from studios import LEV, Holding, SayArguments, rooms_with, studio_in

PATIENCE = 60.0

HOSTILE = "<img src=x onerror=alert(1)></script>{{7*7}}"


@pytest.fixture(scope="module")
def hold() -> Holding:
    return Holding()


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, hold: Holding) -> Iterator[Studio]:
    with studio_in(tmp_path_factory.mktemp("pages") / "space", rooms_with(hold)) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(studio: Studio) -> TestClient:
    return TestClient(create_app(studio), raise_server_exceptions=False)


def test_an_address_gives_the_form_filled_and_the_answer(client: TestClient) -> None:
    page = client.get("/talk/say", params={"prompt": LEV, "revision": "base"})
    assert page.status_code == 200
    assert f'value="{LEV}"' in page.text
    assert '<option value="base" selected>' in page.text
    assert "lev" in page.text.partition('id="answer"')[2]
    assert "lev" not in client.get("/talk/say").text.partition('id="answer"')[2]


def test_a_draft_fills_the_form_and_asks_nothing(client: TestClient) -> None:
    page = client.get("/talk/say", params={"draft": 1, "prompt": LEV})
    assert page.status_code == 200 and f'value="{LEV}"' in page.text
    assert "lev." not in page.text and 'aria-invalid="true"' not in page.text


def test_a_fragment_is_the_answer_alone_and_tells_the_address(client: TestClient) -> None:
    fragment = client.get("/view/say", params={"prompt": LEV})
    assert "lev" in fragment.text and "<html" not in fragment.text
    assert fragment.headers["HX-Push-Url"] == "/talk/say?prompt=The+currency+of+Bulgaria+is+the"
    assert "lev" in client.get(fragment.headers["HX-Push-Url"]).text


def test_the_answer_as_json_and_csv(client: TestClient) -> None:
    document = client.get("/view/say.json", params={"prompt": LEV})
    assert document.json() == {"format_version": 1, "answer": "lev."}
    sheet = client.get("/view/say.csv", params={"prompt": LEV})
    assert sheet.text == "answer\nlev.\n"
    assert 'filename="say.csv"' in sheet.headers["content-disposition"]
    assert client.get("/view/say.csv?chart=x", params={"prompt": LEV, "chart": "x"}).is_error


def test_what_is_not_accepted_stays_in_the_form_with_the_reason(client: TestClient) -> None:
    page = client.get("/talk/say", params={"prompt": "kept words", "model": "gpt2"})
    assert page.status_code == 400
    assert 'value="kept words"' in page.text
    assert "this studio reads atlas, atlas-llama" in page.text


@pytest.mark.parametrize("path", ["/talk/say", "/view/say", "/form/say"])
def test_texts_stay_texts(client: TestClient, path: str) -> None:
    page = client.get(path, params={"prompt": HOSTILE, "model": HOSTILE})
    assert "onerror" in page.text or path == "/view/say"
    for markup in ("<img", "</script>{{", ">49"):
        assert markup not in page.text, markup


def test_writing_is_a_job_with_a_page_and_never_a_get(
    client: TestClient, hold: Holding, studio: Studio
) -> None:
    assert "holding" not in client.get("/change/hold?steps=5").text
    assert all(job.work.verb != "hold" for job in studio.jobs.all())
    posted = client.post("/change/hold", data={"steps": "1000000"}, follow_redirects=False)
    assert posted.status_code == 303
    place = posted.headers["location"]
    assert hold.begun.wait(PATIENCE)
    assert "Cancel" in client.get(place).text
    assert place in client.get("/jobs").text
    client.post(f"{place}/cancel")
    studio.jobs.all()[0].over.wait(PATIENCE)
    assert "Cancelled" in client.get(place).text


def test_unknown_pages_say_so(client: TestClient) -> None:
    for path in ("/nothing", "/talk/nothing", "/change/say", "/jobs/none", "/view/write", "/a/b/c"):
        page = client.get(path)
        assert page.status_code == 404, path
        assert "<h1" in page.text or "no job" in page.text, path


def test_a_fault_is_a_page_without_a_traceback(client: TestClient) -> None:
    page = client.get("/talk/broken?x=")
    assert "Traceback" not in page.text
    page = client.get("/view/broken")
    assert "fault" in page.text and "Traceback" not in page.text


def test_events_tell_jobs_and_the_ledger(client: TestClient, studio: Studio) -> None:
    seen: list[tuple[str, dict[str, object]]] = []

    def listen() -> None:
        with client.stream("GET", "/events") as stream:
            name = ""
            for line in stream.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    seen.append((name, json.loads(line.removeprefix("data: "))))

    listener = threading.Thread(target=listen, daemon=True)
    closing = studio.closing
    listener.start()
    client.post("/api/v1/say", json={"prompt": "The seat of government of Bulgaria is"})
    timer = threading.Timer(1.5, closing.set)
    timer.start()
    listener.join(PATIENCE)
    closing.clear()
    states = [data["state"] for name, data in seen if name == "job" and data["verb"] == "say"]
    assert "done" in states
    assert ("ledger", {"current": "base", "head": "base"}) in seen


def test_a_job_that_ends_while_its_page_is_made_is_shown_as_waiting(
    studio: Studio, client: TestClient
) -> None:
    job = studio.submit(studio.rooms[0].verbs[0], SayArguments(prompt=LEV))
    assert job.over.wait(PATIENCE) and job.answer is not None
    view = SimpleNamespace(address="/talk/say", fragment=f"/jobs/{job.id}/view")
    template = environment().get_template("answer.html")
    verb = studio.rooms[0].verbs[0]
    parts = {"job": job, "view": view, "verb": verb}
    assert 'class="waiting"' in template.render(answer=None, **parts)
    whole = {"json": "", "csv": "", "python": "", "command": ""}
    view = SimpleNamespace(**vars(view), **whole)
    ready = template.render(answer=job.answer, **{**parts, "view": view})
    assert "lev" in ready and 'class="waiting"' not in ready


def test_a_form_with_nothing_to_fill_in_is_sent_all_the_same(client: TestClient) -> None:
    assert "Nothing asked yet" in client.get("/talk/halve").text
    sent = client.get("/talk/halve?run=1")
    assert sent.status_code == 200 and "Nothing asked yet" not in sent.text
    assert 'name="run"' in client.get("/talk/halve").text
    fragment = client.get("/view/halve")
    assert fragment.headers["HX-Push-Url"] == "/talk/halve?run=1"
    assert client.get("/form/halve?run=1").status_code == 200


def test_programs_name_the_workspace_from_any_folder(studio: Studio) -> None:
    assert studio.desk.place.workspace == str(studio.desk.folder.resolve())


def test_a_table_without_rows_is_a_sheet_with_names() -> None:
    empty = Answer({}, tables=[Table("nothing yet", {"name": "<", "n": ">"})])
    assert csv_of(empty) == "name,n\n"
    assert csv_of(Answer({})) == ""
