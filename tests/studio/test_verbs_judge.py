"""The room Judge: a campaign that goes on, its report, and what a form may name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from factsmith.core.errors import InputError
from factsmith.studio.desk import Desk
from factsmith.studio.names import checked_name, inside
from factsmith.studio.verbs.judge import EVALUATE, JUDGED, REPORT, suite_of
from studio_keeping import (
    differing,
    opened_desk,
    run,
    run_command,
    run_program,
    silent,
    snippets,
    without_times,
)

QUICK: dict[str, Any] = {
    "name": "quick",
    "methods": ("rome",),
    "limit": 3,
    "drift_tokens": 0,
    "continued": 0,
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A desk whose workspace holds one campaign of three records."""
    with opened_desk(tmp_path_factory.mktemp("judge") / "space") as opened:
        assert run(opened, JUDGED).view["campaigns"] == []
        run(opened, EVALUATE, **QUICK)
        yield opened


def test_a_campaign_is_listed_and_read(desk: Desk) -> None:
    (campaign,) = run(desk, JUDGED).view["campaigns"]
    assert campaign["name"] == "quick" and campaign["methods"] == ["rome"] and campaign["page"]
    report = run(desk, REPORT, name="quick")
    assert report.result["finished"] and not report.notes
    assert [row[2:] for row in report.tables[0].rows] == [("3", "3"), ("3", "3")]
    assert any("rome" in table.columns for table in report.tables[1:])


def test_a_campaign_that_stopped_goes_on(desk: Desk) -> None:
    class Stop:
        """Progress that ends the job after the first edit, as a cancelled job does."""

        def __call__(self, step: str, done: int, total: int | None) -> None:
            if step.startswith("judging") and done == 4:  # three of them the base model's
                raise KeyboardInterrupt

    weights = desk.bench.lm.fingerprint
    arguments = EVALUATE.arguments.of({**QUICK, "name": "stopped"})
    with pytest.raises(KeyboardInterrupt):
        EVALUATE.run(desk, arguments, Stop())
    part = run(desk, REPORT, name="stopped")
    assert not part.result["finished"] and "go on" in part.notes[0]
    rows = (desk.folder / "studio/judged/stopped/size-1/rows.jsonl").read_text()
    EVALUATE.run(desk, arguments, silent)
    after = (desk.folder / "studio/judged/stopped/size-1/rows.jsonl").read_text()
    assert after.startswith(rows) and len(after) > len(rows)
    assert run(desk, REPORT, name="stopped").result["finished"]
    assert desk.bench.lm.fingerprint == weights


def test_a_name_of_another_campaign_is_refused(desk: Desk) -> None:
    with pytest.raises(InputError, match="another drift_tokens; choose another name") as error:
        run(desk, EVALUATE, **{**QUICK, "drift_tokens": 7})
    assert error.value.argument == "name" and str(desk.folder) not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../out"}, "name is '../out'"),
        ({"name": "/tmp/x"}, "name is"),
        ({"suite": "/etc/passwd"}, "suite is '/etc/passwd'"),
        ({"suite": "../suites/x.json"}, "suite is"),
        ({"suite": "zsre-rome:/etc/passwd"}, "suite is"),
        ({"methods": ("evil.py:write",)}, "methods"),
        ({"methods": ("os:system",)}, "methods"),
        ({"sizes": (0,)}, "sizes"),
        ({"model": "/tmp/other"}, "this studio reads"),
    ],
)
def test_a_form_opens_nothing_outside(desk: Desk, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(desk, EVALUATE, **{**QUICK, **changes})


def test_a_suite_of_the_workspace_may_be_named(desk: Desk, tmp_path: Path) -> None:
    folder = desk.folder / "studio" / "suites"
    folder.mkdir(parents=True)
    (folder / "mine.json").write_text("[]")
    assert suite_of(desk.folder, "mine.json") == str(folder / "mine.json")
    assert suite_of(desk.folder, "zsre-rome:mine.json") == f"zsre-rome:{folder / 'mine.json'}"
    assert "mine.json" in run(desk, JUDGED).view["suites"]
    (tmp_path / "secret.json").write_text("[]")
    (folder / "link.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError, match="suite is"):
        suite_of(desk.folder, "link.json")


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a.", "a\0", "ü", "x" * 65, "a b", "-w"])
def test_a_name_is_one_part(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="letters, digits"):
        checked_name(name, "name")
    (tmp_path / "out").symlink_to("/tmp")
    with pytest.raises(InputError, match="link"):
        inside(tmp_path, "out", "name")
    assert inside(tmp_path, "a.b-1_2", "name") == tmp_path / "a.b-1_2"


def test_the_snippets_do_the_same(desk: Desk) -> None:
    answer = run(desk, EVALUATE, **QUICK)
    program, command = snippets(desk, EVALUATE, **QUICK)
    result, code = run_command(command)
    assert code == 0 and not differing(answer, result)
    shown = without_times({k: v for k, v in answer.result.items() if k != "out"})
    assert without_times(run_program(program)) == shown
    read = run(desk, REPORT, name="quick")
    runs = run_program(snippets(desk, REPORT, name="quick")[0])
    assert without_times(runs) == without_times(read.result["runs"])
    assert run_program(snippets(desk, JUDGED)[0]) == ["quick", "stopped"]
