"""docs/studio.md names what studio has: its rooms, its addresses and the options of the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.main import get_command

from factsmith.cli import app
from factsmith.studio.app import create_app
from factsmith.studio.rooms import ROOMS
from studios import studio_in

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def manual() -> str:
    return (DOCS / "studio.md").read_text(encoding="utf-8")


def test_the_table_has_every_room_in_its_order(manual: str) -> None:
    table = manual.partition("| room |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([A-Z][\w ]+) \|", table, re.MULTILINE) == [r.title for r in ROOMS]


def test_the_options_are_those_of_the_command(manual: str) -> None:
    commands: Any = get_command(app)
    known = {name for each in commands.commands["studio"].params for name in each.opts}
    named = set(re.findall(r"(?<!-)--[a-z][\w-]+", manual)) - {"--json"}
    assert len(named) >= 3 and named <= known, named - known
    assert "--no-such-option" not in known


def test_the_example_of_the_api_is_answered(manual: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"```sh\n(TOKEN=.*?)```", manual, re.DOTALL)
    body = json.loads(block.partition("-d '")[2].partition("'")[0])
    path = re.search(r"8420(/\S+)", block)
    assert path is not None
    with studio_in(tmp_path / "space", ROOMS) as studio:
        client = TestClient(create_app(studio))
        assert client.post(path[1], json=body).json()["answer"] == "lev."
        assert client.post(path[1] + "x", json=body).status_code == 404
        described = client.get("/api/v1/openapi.json").json()["paths"]
        assert path[1] in described and "/api/v1/jobs/{identity}/cancel" in described


def test_pictures_are_small_and_those_that_are_shown(manual: str) -> None:
    shown = set(re.findall(r"\]\((studio-[\w-]+\.png)\)", manual))
    files = {path.name: path.stat().st_size for path in DOCS.glob("studio-*.png")}
    assert shown == set(files) and max(files.values()) < 150_000
