"""Hostile facts, notes, prompts and file names are text on every page."""

from __future__ import annotations

import html
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from browsing import Visitor, opened, refused
from factsmith.core.fact import Fact
from factsmith.keep.workbench import Workbench
from factsmith.model.load import load

pytestmark = pytest.mark.browser

IMAGE = "<img src=x onerror=alert(1)>"
SCRIPT = "</script><script>alert(2)</script>"
BRACES = "{{7*7}}"
MARK = "\u202e"

HOSTILE = Fact(
    f"Bul{IMAGE}garia",
    f"The {SCRIPT} of {{}} is",
    f"{BRACES} {MARK}evil",
    paraphrases=(f"{{}} {SCRIPT} pays",),
    neighbours=("<svg onload=alert(3)> is",),
)

NOTE = f"{IMAGE} {BRACES} {SCRIPT} {MARK}evil"

PLANTED = "img[src='x'], main script:not([type='application/json']), svg[onload]"
"""What is on a page only if the text of a fact has become an element."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with a hostile fact and a hostile note, and a hostile name of its own."""
    folder = tmp_path_factory.mktemp("hostile") / "<b onclick=alert(4)>space"
    with warnings.catch_warnings(), Workbench(load("atlas"), folder) as bench:
        warnings.simplefilter("ignore")
        assert bench.apply(HOSTILE, message=NOTE, force=True).revision is not None
    return folder


def queries() -> list[str]:
    """Return addresses that carry hostile text to every kind of view."""
    fact = {"subject": HOSTILE.subject, "prompt": HOSTILE.prompt, "target": HOSTILE.target}
    return [
        "/",
        "/jobs",
        "/ledger/log",
        "/ledger/show?revision=latest",
        "/ledger/diff",
        "/ledger/verify",
        "/ledger/show?" + urlencode({"revision": NOTE}),
        "/patch/plan?" + urlencode(fact),
        "/patch/plan?" + urlencode({**fact, "method": IMAGE}),
        "/patch/preview?" + urlencode(fact),
        "/ask/ask?" + urlencode({"prompt": HOSTILE.text}),
        "/ask/ask?" + urlencode({"prompt": HOSTILE.text, "revision": NOTE}),
        "/trace/trace?" + urlencode({"prompt": HOSTILE.text, "subject": HOSTILE.subject}),
        "/lens/lens?" + urlencode({"prompt": HOSTILE.text}),
        "/memory/find?" + urlencode({"word": IMAGE}),
        f"/{html.escape(IMAGE)}/x?y={IMAGE}",
        "/tour/strip?" + urlencode({"at": IMAGE, "state": "x"}),
    ]


def planted(page: Any) -> list[str]:
    """Return the elements of a page that came from a text."""
    return [str(each.evaluate("e => e.outerHTML")) for each in page.query_selector_all(PLANTED)]


def test_hostile_text_is_text_on_every_page(entered: Visitor) -> None:
    page = entered.open()
    faults = {}
    for address in queries():
        entered.go(page, address)
        lines = planted(page) + refused(page)
        before, mark, _ = page.inner_text("body").partition(MARK)
        lines += [f"a mark that turns the text, after {before[-80:]!r}"] if mark else []
        if lines:
            faults[address] = lines
    assert not faults, "\n".join(f"{a}: {lines}" for a, lines in faults.items())
    entered.go(page, "/ledger/log")
    text = page.inner_text("main")
    assert IMAGE in text and BRACES in text and SCRIPT in text, "the note is shown as it is"
    assert all("status of 4" in line for line in entered.problems), entered.problems
    entered.close()


def test_the_name_of_a_file_is_text(entered: Visitor, tmp_path: Path) -> None:
    page = entered.open("/patch/plan")
    page.get_by_text("Several facts").click()
    chooser = page.get_by_label("File", exact=True)
    content = 'facts:\n- {subject: "' + IMAGE + '", prompt: "{} is", target: "' + BRACES + '"}\n'
    chooser.set_input_files(
        {"name": f"{IMAGE}.yaml", "mimeType": "text/yaml", "buffer": content.encode()}
    )
    page.get_by_role("button", name="Read the facts").click()
    page.wait_for_url("**/patch/**sheet=**")
    entered.go(page, page.url.removeprefix(entered.running.base))
    assert planted(page) == [] and refused(page) == [] and entered.problems == []
    assert BRACES in page.inner_text("main")
    entered.close()


def test_a_page_that_does_not_escape_is_noticed(browser: Any, entered: Visitor) -> None:
    page = entered.open()

    def unescaped(route: Any) -> None:
        response = route.fetch()
        route.fulfill(response=response, body=html.unescape(response.text()))

    page.route("**/ledger/log", unescaped)
    page.goto(entered.running.base + "/ledger/log")
    page.wait_for_timeout(200)
    assert planted(page), "the note has become elements"
    assert any("script-src" in line for line in refused(page)), "and the policy stops its scripts"
    assert any(line.startswith("console:") for line in entered.problems)
    entered.close()


def test_a_dialog_would_be_noticed(browser: Any, entered: Visitor) -> None:
    page, watch = opened(browser, entered.running.link)
    page.set_content(f"<p>{IMAGE}</p>")
    page.wait_for_timeout(200)
    assert watch.dialogs == ["1"], "without a policy and without escaping the text runs"
    page.context.close()
