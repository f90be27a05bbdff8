"""A studio: answers by revision, cancelling, errors, and a workspace that somebody else moves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from factsmith.core.errors import FingerprintError, InputError
from factsmith.keep.workbench import Workbench
from factsmith.model.fingerprint import weight_digests
from factsmith.model.load import load
from factsmith.studio.app import create_app
from factsmith.studio.session import Studio
from studios import FACT, LEV, Holding, rooms_with, studio_in

PATIENCE = 60.0


@pytest.fixture
def hold() -> Holding:
    return Holding()


@pytest.fixture
def studio(tmp_path: Path, hold: Holding) -> Iterator[Studio]:
    with studio_in(tmp_path / "space", rooms_with(hold)) as opened:
        yield opened


@pytest.fixture
def client(studio: Studio) -> TestClient:
    return TestClient(create_app(studio), raise_server_exceptions=False)


def answer(client: TestClient, **arguments: Any) -> str:
    response = client.post("/api/v1/say", json={"prompt": LEV, **arguments})
    assert response.status_code == 200, response.text
    return str(response.json()["answer"])


def digests_of(studio: Studio) -> dict[str, str]:
    return dict(weight_digests(studio.desk.lm.module))


def test_every_revision_and_model_has_its_own_answer(client: TestClient) -> None:
    assert answer(client).startswith("lev")
    revision = client.post("/api/v1/write", json={"target": "euro"}).json()["revision"]
    assert answer(client).startswith("euro")
    assert answer(client, revision="base").startswith("lev")
    assert answer(client, revision=revision[:12]).startswith("euro")
    assert answer(client, model="atlas-llama").startswith("lev")
    assert answer(client, revision="latest").startswith("euro"), "the weights are back"


def test_reading_another_revision_leaves_the_weights(client: TestClient, studio: Studio) -> None:
    client.post("/api/v1/write", json={"target": "euro"})
    before = digests_of(studio)
    answer(client, revision="base")
    assert digests_of(studio) == before


def test_a_reading_is_done_once_for_each_state(client: TestClient, studio: Studio) -> None:
    answer(client)
    answer(client)
    assert len(studio.jobs.all()) == 1
    client.post("/api/v1/write", json={"target": "euro"})
    answer(client)
    assert [job.work.verb for job in studio.jobs.all()] == ["say", "write", "say"]


def test_another_process_moves_the_workspace_and_studio_follows(
    client: TestClient, studio: Studio
) -> None:
    assert answer(client).startswith("lev")
    with Workbench(load("atlas"), studio.desk.folder) as other:
        revision = other.apply(FACT, force=True).revision
    assert revision is not None
    assert studio.standing.current == revision.id
    assert answer(client).startswith("euro")
    written = client.post("/api/v1/write", json={"target": "yen"})
    assert written.status_code == 200, written.text
    assert answer(client).startswith("yen")
    with studio.desk.ledger() as ledger:
        assert [each.id for each in ledger.log()][1] == revision.id


def test_a_cancelled_job_leaves_model_and_ledger(
    client: TestClient, studio: Studio, hold: Holding
) -> None:
    client.post("/api/v1/write", json={"target": "euro"})
    weights, standing = digests_of(studio), studio.standing
    job = client.post("/api/v1/hold?wait=0", json={}).json()["job"]
    assert hold.begun.wait(PATIENCE)
    assert digests_of(studio) != weights, "control: the job has the base weights in"
    client.post(f"/api/v1/jobs/{job['id']}/cancel")
    response = client.get(f"/api/v1/jobs/{job['id']}?wait={PATIENCE}")
    assert response.status_code == 409
    assert response.json()["job"]["state"] == "cancelled"
    assert (digests_of(studio), studio.standing) == (weights, standing)


def test_errors_are_documents_with_their_status(client: TestClient) -> None:
    cases: list[tuple[str, str, dict[str, Any], int, str, str | None]] = [
        ("post", "/api/v1/say", {"json": {}}, 400, "InputError", "prompt"),
        ("post", "/api/v1/say", {"json": {"prompt": LEV, "x": 1}}, 400, "InputError", "x"),
        ("post", "/api/v1/say", {"json": [1]}, 400, "InputError", None),
        ("post", "/api/v1/say", {"content": '{"a": 1, "a": 2}'}, 400, "InputError", None),
        ("post", "/api/v1/say", {"content": b"\xff"}, 400, "InputError", None),
        ("post", "/api/v1/say?wait=-1", {"json": {"prompt": LEV}}, 400, "InputError", None),
        ("get", f"/api/v1/say?prompt={LEV}&revision=abcd", {}, 404, "RevisionError", None),
        ("get", f"/api/v1/say?prompt={LEV}&model=gpt2", {}, 400, "InputError", "model"),
        ("get", "/api/v1/write?target=a", {}, 405, "InputError", None),
        ("get", "/api/v1/nothing", {}, 404, "InputError", None),
        ("get", "/api/v1/jobs/none", {}, 404, "UnknownError", None),
        ("post", "/api/v1/count", {"json": {}}, 422, "NumericsError", None),
        ("post", "/api/v1/broken", {"json": {}}, 500, "ZeroDivisionError", None),
    ]
    for method, path, options, status, kind, argument in cases:
        response = client.request(method, path, **options)
        error = response.json()["error"]
        assert (response.status_code, error["type"]) == (status, kind), (path, response.text)
        assert error["argument"] == argument, path
        assert error["message"] and "Traceback" not in response.text


def test_half_a_character_is_escaped(client: TestClient) -> None:
    assert client.get("/api/v1/halve").json()["token"] == "\udce2"
    assert client.get("/view/halve").status_code == 200
    assert client.get("/view/halve.csv").status_code == 200


def test_a_long_verb_is_answered_with_its_job(client: TestClient, hold: Holding) -> None:
    response = client.post("/api/v1/hold?wait=0", json={"steps": 10**6})
    assert response.status_code == 202
    job = response.json()["job"]
    hold.may_end.set()
    done = client.get(f"/api/v1/jobs/{job['id']}?wait={PATIENCE}")
    assert (done.status_code, done.json()["held"]) == (200, True)
    listed = client.get("/api/v1/jobs").json()["jobs"]
    assert [each["id"] for each in listed] == [job["id"]]


def test_the_description_names_every_verb_and_field(client: TestClient, studio: Studio) -> None:
    paths = client.get("/api/v1/openapi.json").json()["paths"]
    for room in studio.rooms:
        for verb in room.verbs:
            methods = paths[f"/api/v1/{verb.name}"]
            assert ("get" in methods) == (verb.kind != "write")
            body = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert set(body.get("properties", {})) == set(verb.arguments.model_fields)
    assert "/api/v1/jobs/{identity}" in paths


def test_a_workspace_of_another_model_is_refused_before_anything_starts(
    tmp_path: Path, hold: Holding
) -> None:
    with Workbench(load("atlas-llama"), tmp_path / "space"):
        pass
    refused = pytest.raises(FingerprintError, match="was made for 'atlas-llama'")
    with refused, studio_in(tmp_path / "space", rooms_with(hold)):
        pass


def test_no_reading_verb_may_carry_patches_in_another_model(studio: Studio) -> None:
    with pytest.raises(InputError, match="not the workspace's model"):
        studio.desk.resolve("latest", "atlas-llama")
    assert studio.desk.resolve("base", "atlas-llama") == "base"


@pytest.mark.parametrize(("age", "is_new"), [(-3600, True), (3600, False)])
def test_a_standing_is_not_kept_while_a_commit_may_be_on_its_way_to_the_disk(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, age: int, is_new: bool
) -> None:
    stamp = (time.time_ns() - age * 10**9, 4096, 0, 0)
    monkeypatch.setattr(studio, "_stamp", lambda: stamp)
    before = studio.standing.head
    with Workbench(load("atlas"), studio.desk.folder) as bench:
        bench.apply(FACT, force=True)
    assert (studio.standing.head != before) == is_new
