"""The room Export and push: files in one folder, reasons for what cannot be, and servers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from factsmith import atlas
from factsmith.core.errors import InputError, ServerError
from factsmith.core.fact import Fact
from factsmith.studio.desk import Desk
from factsmith.studio.verbs.export import (
    EXPORT,
    EXPORTS,
    PURPOSES,
    _offered,
    _why_not,
    impossible,
)
from factsmith.studio.verbs.push import PUSH, SERVED
from model_server import ModelServer
from studio_keeping import (
    differing,
    opened_desk,
    run,
    run_command,
    run_program,
    snippets,
    without_times,
)

FACT = Fact("Lyon", "{} is a city in the country of", "Italy")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A desk on the bundled model of Llama's kind, with one patch."""
    with opened_desk(tmp_path_factory.mktemp("export") / "space", "atlas-llama") as opened:
        assert set(impossible(opened)) == set(PURPOSES)
        assert "Patch a fact first" in _why_not(opened, {})[""]
        opened.bench.apply(FACT, force=True, message="<i>a city</i>")
        yield opened


def test_an_export_is_in_its_folder_and_in_the_list(desk: Desk) -> None:
    made = run(desk, EXPORT, name="one", format="adapter", verify=False)
    folder = desk.folder / "exports" / "one"
    assert made.result["folder"] == str(folder.resolve()) and folder.is_dir()
    run(desk, EXPORT, name="two", format="patch")
    (folder.parent / "notes.txt").write_text("no export")
    listed = run(desk, EXPORTS).view["exports"]
    assert [(each["name"], each["format"]) for each in listed] == [
        ("one", "adapter"),
        ("two", "patch"),
    ]
    assert "Lyon" in listed[0]["card"] and listed[0]["can_download"]
    with pytest.raises(InputError, match="earlier export"):
        run(desk, EXPORT, name="one", format="adapter", verify=False)
    replaced = run(desk, EXPORT, name="one", format="adapter", verify=False, overwrite=True)
    assert replaced.result["files"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "../out"}, "name is"),
        ({"name": "/tmp/out"}, "name is"),
        ({"format": "exe"}, "format"),
        ({"base": "/etc"}, "base"),
        ({"base": "../x"}, "base"),
        ({"revision": "base", "format": "patch"}, "no patch is in effect"),
        ({"format": "patch", "rank": 2}, "rank"),
    ],
)
def test_what_cannot_be_written_is_refused(desk: Desk, values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(desk, EXPORT, **{"name": "wrong", **values})
    assert not (desk.folder / "exports" / "wrong").exists()


def test_formats_that_cannot_be_have_a_reason(desk: Desk) -> None:
    assert "GGUF" in impossible(desk)["gguf"] and "patch" not in impossible(desk)
    off = _why_not(desk, {"format": "gguf"})
    assert "rank" in off and "tensor_type" not in off and "" not in off
    labels = dict(_offered(desk)["format"])
    assert "Not now: The workspace's model" in labels["gguf"] and "Not now" not in labels["patch"]


def test_a_revision_is_pushed_proved_and_rolled_back(desk: Desk) -> None:
    with ModelServer(atlas.folder("atlas-llama")) as server:
        pushed = run(desk, PUSH, url=server.url, alias="cities")
        assert pushed.view["model"] in server.names and not pushed.failed
        compared = run(desk, SERVED, url=server.url)
        assert compared.view["up_to_date"] and pushed.view["model"] in compared.notes[0]
        program, command = snippets(desk, SERVED, url=server.url)
        result, code = run_command(command)
        assert code == 0 and not differing(compared, result)
        assert without_times(run_program(program)) == without_times(compared.result["servers"][0])
        back = run(desk, PUSH, url=server.url, rollback=True)
        assert pushed.view["model"] not in server.names and back.view["model"] == "base-model"
        assert not run(desk, SERVED, url=server.url).view["up_to_date"]
        url = server.url
    with pytest.raises(ServerError) as error:
        run(desk, SERVED, url=url)
    assert error.value.argument == "url"
    with pytest.raises(InputError, match="url"):
        run(desk, SERVED, url="file:///etc/passwd")


def test_the_key_is_in_no_answer(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTSMITH_API_KEY", "sk-secret")
    with ModelServer(atlas.folder("atlas-llama")) as server:
        server.faults.key = "sk-secret"
        compared = run(desk, SERVED, url=server.url)
        texts = [*snippets(desk, SERVED, url=server.url), *snippets(desk, PUSH, url=server.url)]
    assert "sk-secret" not in json.dumps(dict(compared.result), default=str) + str(texts)


def test_the_snippets_of_an_export_do_the_same(desk: Desk) -> None:
    values: dict[str, Any] = {"name": "three", "format": "patch", "revision": "latest"}
    made = run(desk, EXPORT, **values)
    program, command = snippets(desk, EXPORT, **values)
    folder = desk.folder / "exports" / "three"
    shutil.rmtree(folder)
    result, code = run_command(command)
    assert code == 0 and not differing(made, result)
    shutil.rmtree(folder)
    assert without_times(run_program(program)) == without_times(
        json.loads(json.dumps(dict(made.result)))
    )
    assert run_program(snippets(desk, EXPORTS)[0]) == sorted(
        each.name for each in folder.parent.iterdir()
    )


def test_the_snippets_of_a_push_push(desk: Desk, tmp_path: Path) -> None:
    with ModelServer(atlas.folder("atlas-llama")) as server:
        program, command = snippets(desk, PUSH, url=server.url, dtype="float32")
        result, code = run_command(command)
        assert code == 0 and result["model"] in server.names
        program_of_rollback, _ = snippets(desk, PUSH, url=server.url, rollback=True)
        (back,) = run_program(program_of_rollback)
        assert back["model"] == "base-model" and result["model"] not in server.names
        (pushed,) = run_program(program)
        assert pushed["model"] in server.names
