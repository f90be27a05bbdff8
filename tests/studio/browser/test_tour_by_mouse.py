"""The five steps of the tour, by clicks, on an empty workspace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tools.browser import Studio, settle

from browsing import Visitor, accessibility, overflow, weights_in
from factsmith.atlas.story import PROMPT, SUBJECT

pytestmark = pytest.mark.browser

NEXT = re.compile("^Next")

QUESTION = PROMPT.replace("{}", SUBJECT)


def note_of(page: Any, number: int) -> Any:
    """Return the note of the tour, which must be at this step."""
    note = page.get_by_role("region", name="Tour")
    note.get_by_text(f"step {number} of 5").wait_for()
    return note


def test_the_five_steps_by_clicks(visitor: Visitor, running: Studio, workspace: Path) -> None:
    base = weights_in(workspace)
    page = visitor.open("/")
    page.get_by_role("link", name="Take the tour").click()
    page.get_by_role("link", name="Begin the tour").click()

    note = note_of(page, 1)
    settle(page)
    assert "lev" in page.inner_text("#answer") and "euro" in note.inner_text()
    note.get_by_role("link", name=NEXT).click()

    note = note_of(page, 2)
    settle(page)
    chart = page.locator("[data-chart] :is(svg, canvas)").first
    assert chart.is_visible() and chart.bounding_box()["width"] > 200
    note.get_by_role("link", name=NEXT).click()

    note = note_of(page, 3)
    settle(page)
    waiting = note.get_by_role("button", name=NEXT)
    assert waiting.get_attribute("aria-disabled") == "true", "there is no proof yet"
    assert running.ask("log")["revisions"] == []
    page.get_by_role("link", name="Preview the patch").click()
    page.get_by_text("It holds.").wait_for()
    assert running.ask("log")["revisions"] == [], "a preview keeps nothing"
    page.get_by_role("button", name="Apply", exact=True).click()
    page.get_by_text("Kept.", exact=True).wait_for()
    note_of(page, 3).get_by_text("This step is done").wait_for()
    (revision,) = running.ask("log")["revisions"]
    patched = running.ask("weights")
    assert patched["fingerprint"] != patched["base"] and weights_in(workspace) != base
    note_of(page, 3).get_by_role("link", name=NEXT).click()

    note = note_of(page, 4)
    settle(page)
    answer = page.inner_text("#answer")
    assert revision["id"] in page.url and "euro" in answer and "lev" in answer
    note.get_by_role("link", name=NEXT).click()

    note_of(page, 5)
    page.get_by_role("button", name="Revert", exact=True).click()
    note_of(page, 5).get_by_text("The tour is over").wait_for()
    settle(page)
    weights = running.ask("weights")
    assert weights["fingerprint"] == weights["base"]
    assert weights["tensors"] == base == weights_in(workspace), "bit for bit"
    assert "lev" in running.ask("ask", {"prompt": QUESTION})["answer"]

    page.get_by_role("button", name="Leave the tour").click()
    page.wait_for_url(running.base + "/")
    assert not page.get_by_text("step 5 of 5").is_visible()


def test_the_tour_goes_on_where_it_was_left(visitor: Visitor, running: Studio) -> None:
    page = visitor.open("/tour/2")
    visitor.go(page, "/jobs")
    note = note_of(page, 2)
    note.get_by_role("link", name="the page of this step").click()
    page.wait_for_url("**/trace/trace?**")
    note_of(page, 2)


def test_the_note_is_for_everybody(visitor: Visitor) -> None:
    page = visitor.open("/tour/3", viewport={"width": 360, "height": 700})
    assert overflow(page) == 0
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        assert accessibility(page) == []
