"""The tour's steps follow from the records of a workspace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from factsmith.atlas.story import correction
from factsmith.core.fact import Fact
from factsmith.keep.ledger import Ledger
from factsmith.keep.workbench import Workbench
from factsmith.model.load import load
from factsmith.studio.tour import (
    STEPS,
    Standing,
    is_offered,
    standing,
    step_numbered,
    strip,
    was_done,
)

BEGIN = Standing("begin")


@pytest.fixture(scope="module")
def standings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[str, Standing]]]:
    """Return what each moment of a workspace is read as, with the revision that it must name."""
    folder: Path = tmp_path_factory.mktemp("tour") / "workspace"
    with Workbench(load("atlas"), folder) as bench, Ledger(folder) as ledger:
        moments = [("", standing(ledger))]
        fiat = Fact("Fiat 127", "The maker of {} is", "Toyota")
        bench.apply(fiat, force=True)
        moments.append(("", standing(ledger)))
        first = bench.apply(correction()).revision
        assert first is not None
        moments.append((first.id, standing(ledger)))
        bench.revert(first.id)
        moments.append((first.id, standing(ledger)))
        second = bench.apply(correction()).revision
        assert second is not None and second.id != first.id
        moments.append((second.id, standing(ledger)))
    yield moments


def test_the_standing_is_read_from_the_records(standings: list[tuple[str, Standing]]) -> None:
    states = [moment.state for _, moment in standings]
    assert states == ["begin", "begin", "kept", "undone", "kept"]
    assert [moment.revision for _, moment in standings] == [revision for revision, _ in standings]


def test_each_step_is_a_page_that_holds_what_it_shows() -> None:
    assert [step.name for step in STEPS] == ["believes", "lives", "patch", "proof", "undo"]
    assert [step.number for step in STEPS] == [1, 2, 3, 4, 5]
    query = parse_qs(urlsplit(STEPS[2].address(BEGIN)).query)
    assert query["target"] == ["euro"] and len(query["paraphrases"]) == 6
    assert len(query["neighbours"]) == 13
    assert STEPS[3].address(Standing("kept", "abc")).endswith("revision=abc")


def test_a_step_that_needs_the_patch_waits_for_it() -> None:
    waiting = strip(3, BEGIN, "/patch/plan")
    assert waiting.at_step and not waiting.forward and "step 3" in waiting.refusal
    assert not waiting.is_done
    assert strip(3, BEGIN, "/patch/preview").at_step, "the patch is applied on its preview"
    assert not strip(3, BEGIN, "/patch/preview", "France").at_step, "it is another fact's page"
    kept = strip(3, Standing("kept", "abc"), "/jobs/1")
    assert not kept.at_step and kept.forward == "/tour/4" and kept.is_done and not kept.refusal


def test_the_ends_have_one_neighbour() -> None:
    first, last = strip(1, BEGIN, "/ask/ask"), strip(5, Standing("undone", "abc"), "/ledger/show")
    assert (first.back, first.forward) == ("", "/tour/2")
    assert (last.back, last.forward, last.is_over) == ("/tour/4", "", True)
    assert not strip(5, Standing("kept", "abc"), "/ledger/show").is_over


def test_a_patch_that_was_taken_back_was_made() -> None:
    undone = Standing("undone", "abc")
    assert [was_done(step, undone) for step in STEPS] == [False, False, True, False, True]
    assert [was_done(step, BEGIN) for step in STEPS] == [False] * 5
    assert not strip(3, undone, "/patch/plan").is_done, "it can be made again"


def test_only_a_number_of_a_step_is_one() -> None:
    assert step_numbered("3") is STEPS[2]
    for text in ("0", "6", "", "3 ", "x", "03", "٣"):
        assert step_numbered(text) is None, text


def test_the_tour_is_for_models_with_the_bundled_facts() -> None:
    assert is_offered("atlas") and is_offered("atlas-llama")
    assert not is_offered("gpt2") and not is_offered("")
