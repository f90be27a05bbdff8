"""A patch by mouse and by keyboard, and back; two tabs, another process, and cancelled jobs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tools.browser import Studio

from browsing import Visitor, tab_to, weights_in

pytestmark = pytest.mark.browser

FIELDS = {"subject": "Fiat 127", "prompt": "The maker of {} is", "target": "Toyota"}

LONG = (
    "/patch/apply?subject=Fiat+127&prompt=The+maker+of+%7B%7D+is&target=Toyota"
    "&settings=optimizer%3Dadam&settings=steps%3D100000&settings=stop_loss%3D0"
)
"""A patch whose search goes on for minutes."""


def ids(running: Studio) -> list[str]:
    """Return the revisions of the workspace, the newest first."""
    return [str(revision["id"]) for revision in running.ask("log")["revisions"]]


def previewed(page: Any, visitor: Visitor) -> None:
    """Fill in the form by mouse, plan, and preview."""
    visitor.go(page, "/patch/plan")
    for name, value in FIELDS.items():
        page.locator(f"#f-{name}").click()
        page.keyboard.type(value)
    page.get_by_role("button", name="Plan", exact=True).click()
    page.get_by_role("link", name="Preview the patch").click()
    page.get_by_role("button", name="Apply", exact=True).wait_for()


def test_a_patch_by_mouse_and_its_undo(visitor: Visitor, running: Studio, workspace: Path) -> None:
    base = weights_in(workspace)
    before = ids(running)
    page = visitor.open("/")
    previewed(page, visitor)
    assert ids(running) == before
    page.get_by_role("button", name="Apply", exact=True).click()
    page.get_by_text("Kept.", exact=True).wait_for()
    patched = running.ask("weights")["tensors"]
    changed = [name for name in base if base[name] != patched[name]]
    assert len(changed) == 1 and weights_in(workspace) == patched, "the patch changes one matrix"
    page.get_by_role("button", name="Undo this patch").click()
    page.wait_for_url("**/jobs/**")
    page.get_by_text("Reverted").first.wait_for()
    weights = running.ask("weights")
    assert weights["tensors"] == base == weights_in(workspace)
    assert weights["fingerprint"] == weights["base"]
    assert len(ids(running)) == len(before) + 2, "patch and undo are both recorded"


def test_a_patch_by_keyboard_alone(visitor: Visitor, running: Studio) -> None:
    before = ids(running)
    page = visitor.open("/patch/plan")
    for name, value in FIELDS.items():
        tab_to(page, f"#f-{name}")
        page.keyboard.type(value)
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Preview the patch").wait_for()
    tab_to(page, "a[href^='/patch/preview']")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Apply", exact=True).wait_for()
    tab_to(page, "form[action='/patch/apply'] button")
    page.keyboard.press("Enter")
    page.get_by_text("Kept.", exact=True).wait_for()
    assert len(ids(running)) == len(before) + 1
    tab_to(page, "form[action='/ledger/revert'] button")
    page.keyboard.press("Space")
    page.get_by_text("Reverted").first.wait_for()
    weights = running.ask("weights")
    assert weights["fingerprint"] == weights["base"]
    with pytest.raises(AssertionError, match="does not reach"):
        tab_to(page, "#no-such-thing")


def test_two_tabs_and_another_process(visitor: Visitor, running: Studio, workspace: Path) -> None:
    watching = visitor.open("/ledger/log")
    asking = visitor.open("/jobs")
    rows = watching.locator("#answer tbody tr")
    n_rows = rows.count()
    previewed(asking, visitor)
    asking.get_by_role("button", name="Apply", exact=True).click()
    asking.get_by_text("Kept.", exact=True).wait_for()
    rows.nth(n_rows).wait_for()
    assert ids(running)[0][:10] in watching.inner_text("#answer")
    command = [sys.executable, "-m", "factsmith", "revert", "latest", "-w", str(workspace)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows.nth(n_rows + 1).wait_for()
    assert ids(running)[0][:10] in watching.inner_text("#answer")
    weights = running.ask("weights")
    assert weights["fingerprint"] == weights["base"], "the studio follows the other process"
    assert running.ask("ask", {"prompt": "The maker of Fiat 127 is"})["answer"] == "Fiat."


def test_a_cancelled_job_changes_nothing(
    visitor: Visitor, running: Studio, workspace: Path
) -> None:
    before, weights = ids(running), running.ask("weights")
    page = begun(visitor)
    assert running.ask(f"jobs/{page.url.rpartition('/')[2]}")["job"]["state"] == "running"
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("as they were before").wait_for()
    assert ids(running) == before and running.ask("weights") == weights
    assert weights_in(workspace) == weights["tensors"]


def test_a_job_survives_a_reload_and_a_closed_tab(visitor: Visitor, running: Studio) -> None:
    page = begun(visitor)
    address = page.url
    page.reload()
    assert page.url == address
    page.get_by_role("progressbar").wait_for()
    page.close()
    other = visitor.open("/jobs")
    other.locator(f"a[href='{address.removeprefix(running.base)}']").first.click()
    other.wait_for_url(address)
    other.get_by_role("progressbar").wait_for()
    assert running.ask(f"jobs/{address.rpartition('/')[2]}")["job"]["state"] == "running"
    other.get_by_role("button", name="Cancel").click()
    other.get_by_text("as they were before").wait_for()


def begun(visitor: Visitor) -> Any:
    """Return the page of a patch that takes minutes, while it runs."""
    page = visitor.open(LONG)
    page.get_by_role("button", name="Apply", exact=True).click()
    page.wait_for_url("**/jobs/**")
    page.get_by_role("progressbar").wait_for()
    return page
