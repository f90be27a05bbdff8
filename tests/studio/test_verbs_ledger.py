"""The room Ledger: history and revisions, the way back bit for bit, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from factsmith.core.errors import FactsmithError, InputError, RevisionError
from factsmith.core.fact import Fact
from factsmith.keep.ledger import Ledger
from factsmith.studio.desk import Desk
from factsmith.studio.verb import Verb
from factsmith.studio.verbs.ledger import (
    CAPACITY,
    DIFF,
    LOG,
    SHOW,
    STATUS,
    VERIFY,
    WEIGHTS,
)
from factsmith.studio.verbs.moving import CHECKOUT, REVERT
from studio_keeping import (
    differing,
    opened_desk,
    run,
    run_command,
    run_program,
    snippets,
    without_times,
)
from workbenches import DARRIEUX, FIAT, hashes


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A desk whose workspace carries two patches: one fact, and two facts."""
    with opened_desk(tmp_path_factory.mktemp("ledger") / "space") as opened:
        opened.bench.apply(FIAT, message="<b>first</b>", force=True)
        two = [DARRIEUX, Fact("Nokia Lumia 900", "The maker of {} is", "Fiat")]
        opened.bench.apply(two, message="two", force=True)
        yield opened


def test_the_history_marks_the_checkout(desk: Desk) -> None:
    answer = run(desk, LOG)
    assert [row["message"] for row in answer.view["rows"]] == ["two", "<b>first</b>"]
    assert [row["is_current"] for row in answer.view["rows"]] == [True, False]
    assert [row[0] for row in answer.tables[0].rows] == ["→", "", ""]


def test_one_revision_lists_its_facts_with_their_numbers(desk: Desk) -> None:
    latest = desk.bench.show("latest")
    answer = run(desk, SHOW, revision=latest.id[:8])
    facts = answer.view["facts"]
    assert [fact["number"] for fact in facts] == [1, 2] and answer.view["can_revert"]
    assert [fact["target"] for fact in facts] == ["English", "Fiat"]
    with pytest.raises(RevisionError):
        run(desk, SHOW, revision="ffff")
    with pytest.raises(InputError, match="revision"):
        SHOW.arguments.of({})


@pytest.mark.parametrize(
    ("verb", "values", "argument"),
    [
        (SHOW, {"revision": "ffff"}, "revision"),
        (CHECKOUT, {"revision": "zz"}, "revision"),
        (REVERT, {"revision": "base"}, "revision"),
        (REVERT, {"revision": "latest", "facts": (3,)}, "facts"),
        (DIFF, {"before": "zz"}, "before"),
        (DIFF, {"after": "zz"}, "after"),
    ],
)
def test_an_error_names_the_field(
    desk: Desk, verb: Verb[Any], values: dict[str, Any], argument: str
) -> None:
    n_before = len(desk.bench.log())
    with pytest.raises(FactsmithError) as error:
        run(desk, verb, **values)
    assert error.value.argument == argument and len(desk.bench.log()) == n_before


def test_a_revert_gives_the_base_back_bit_for_bit(desk: Desk, tmp_path: Path) -> None:
    place = tmp_path / "space"
    shutil.copytree(desk.folder, place)
    with opened_desk(place) as other:
        one = run(other, REVERT, revision="latest", facts=(2,), message="<one>")
        assert one.result["active"] == 2 and not one.view["is_base"]
        assert one.view["before"] != one.view["after"]
        assert [
            fact["in_effect"]
            for fact in run(other, SHOW, revision=other.bench.log()[1].id).view["facts"]
        ] == [True, False]
        for revision in [r for r in other.bench.log() if r.state == "active" and r.kind == "patch"]:
            last = run(other, REVERT, revision=revision.id, force=True)
        assert last.view["is_base"] and last.view["after"] == last.view["base"]
        assert last.result["active"] == 0
        patched = hashes(other.bench.lm)
        with pytest.raises(InputError, match="numbered from 1"):
            run(other, REVERT, revision="latest", facts=(0,))
        with pytest.raises(RevisionError):
            run(other, REVERT, revision=revision.id)
        with other.bench.on_base():
            assert hashes(other.bench.lm) == patched


def test_a_checkout_moves_the_weights_and_back(desk: Desk) -> None:
    now = desk.bench.lm.fingerprint
    base = run(desk, CHECKOUT, revision="base")
    assert base.result["current"] == "base" and base.view["is_base"] and base.result["active"] == 0
    assert "latest revision" in " ".join(base.notes)
    back = run(desk, CHECKOUT, revision="latest")
    assert back.view["after"] == now and not back.view["is_base"] and back.result["asked"] == 3


def test_two_revisions_are_compared(desk: Desk) -> None:
    answer = run(desk, DIFF)
    assert {fact["after"] for fact in answer.view["facts"]} == {"Toyota", "English", "Fiat"}
    assert run(desk, DIFF, before="latest", after="latest").view["facts"] == []


def test_what_is_checked_is_said(desk: Desk) -> None:
    answer = run(desk, VERIFY)
    assert answer.failed == bool(answer.result["lost"])
    assert "all whole; weights as recorded" in answer.tables[0].title
    assert run(desk, STATUS).result["active"] == 2 or run(desk, STATUS).tables


@pytest.mark.parametrize(
    ("verb", "values"),
    [
        (LOG, {}),
        (SHOW, {"revision": "latest"}),
        (DIFF, {"before": "base"}),
        (STATUS, {}),
        (CAPACITY, {"next_facts": 50, "limit": 5.0, "verify": False}),
        (VERIFY, {}),
        (WEIGHTS, {}),
    ],
)
def test_the_snippets_of_reading_do_the_same(
    desk: Desk, verb: Verb[Any], values: dict[str, Any]
) -> None:
    answer = run(desk, verb, **values)
    program, command = snippets(desk, verb, **values)
    assert without_times(run_program(program)) == without_times(answer.result)
    if verb is not WEIGHTS:  # no command prints the digest of every tensor
        result, code = run_command(command)
        assert code in (0, 4) and not differing(answer, result)


def test_the_snippets_of_changes_do_the_same(desk: Desk, tmp_path: Path) -> None:
    place = tmp_path / "space"
    shutil.copytree(desk.folder, place)
    values: dict[str, Any] = {"revision": "latest", "facts": (2,), "message": "it's", "force": True}
    with opened_desk(place) as other:
        reverted = run(other, REVERT, **values)
        program, command = snippets(other, REVERT, **values)
        moved = snippets(other, CHECKOUT, revision="base")
    again = tmp_path / "again"
    for run_snippet in (lambda: run_command(command)[0], lambda: run_program(program)):
        shutil.rmtree(place)
        shutil.copytree(desk.folder, place)
        printed = run_snippet()
        assert printed["message"] == "it's" and printed["facts"] == reverted.result["facts"]
    assert run_program(moved[0]) == "base" and not again.exists()
    assert run_command(moved[1])[0]["current"] == "base"
    with Ledger(place) as ledger:
        assert ledger.current == "base" != ledger.head
