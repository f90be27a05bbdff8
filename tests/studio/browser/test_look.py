"""Charts, theme, keys and copies in a real browser, under the content security policy."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

import charted
from browsing import Watch, accessibility, opened, overflow, refused

pytestmark = pytest.mark.browser

PROMPT = "The currency of Bulgaria is the"

TRACE = "/trace/trace?" + urlencode({"prompt": PROMPT, "subject": "Bulgaria", "samples": 2})

LONG = "/trace/neurons?" + urlencode(
    [("prompt", PROMPT), ("paraphrases", "Bulgaria pays with the"), ("steps", "1000")]
)
"""Takes seconds."""

LENS = "/lens/lens?" + urlencode({"prompt": PROMPT})

DRAWN = "figure[data-drawn='true']"


@pytest.fixture(scope="module")
def running(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a studio process on a workspace of its own."""
    from tools.browser import studio

    with studio(tmp_path_factory.mktemp("look") / "space") as started:
        yield started


@pytest.fixture(scope="module")
def state(browser: Any, running: Any) -> Any:
    """Return the cookies of somebody who followed the link."""
    page, _ = opened(browser, running.link)
    page.goto(running.link)
    return page.context.storage_state()


Open = Callable[..., tuple[Any, Watch]]


@pytest.fixture
def show(browser: Any, running: Any, state: Any) -> Iterator[Open]:
    """Return a function that opens an address in a context of its own."""
    contexts = []

    def open_page(address: str, **options: Any) -> tuple[Any, Watch]:
        page, watch = opened(browser, running.link, state=state, **options)
        page.context.set_default_timeout(60_000)  # of a machine that is busy
        contexts.append(page.context)
        page.goto(running.base + address)
        return page, watch

    yield open_page
    for context in contexts:
        context.close()


def colour(page: Any) -> str:
    """Return the colour of the page's ground."""
    return str(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Return whether a condition holds before the time is over."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_charts_are_drawn_under_the_policy_and_their_cells_lead_on(show: Open) -> None:
    page, watch = show(TRACE)
    page.locator(DRAWN).first.wait_for()
    cells = page.locator("figure.chart .mark-rect path")
    assert cells.count() > 30
    cells.nth(3).hover()
    tip = page.locator(".vega-tip")
    assert "layer" in tip.inner_text() and "score" in tip.inner_text()
    cells.nth(3).click()
    page.wait_for_url("**/trace/at?**")
    assert refused(page) == [] and watch.problems == []


PUT = """(html) => {
    document.getElementById("answer").innerHTML = html;
    document.dispatchEvent(new CustomEvent("htmx:afterSettle", {detail: {}}));
}"""
"""Puts charts into a page as htmx does."""


def put(page: Any, *charts: Any) -> None:
    """Show charts on a page, and wait until each is drawn or has failed."""
    from factsmith.studio.templating import environment

    macros = '{% import "ui.html" as ui with context %}'
    source = macros + "{% for c in charts %}{{ ui.chart(c) }}{% endfor %}"
    page.evaluate(PUT, environment().from_string(source).render(charts=charts))
    over = page.locator(f"{DRAWN}, figure:has(.plot.failed)")
    assert until(lambda: over.count() == len(charts), 60)


def test_every_chart_is_drawn_and_texts_of_models_stay_texts(show: Open) -> None:
    page, watch = show("/ask/ask")
    charts = [*charted.charts().values(), charted.many()]
    put(page, *charts)
    assert page.locator(DRAWN).count() == len(charts)
    assert page.locator("figure canvas").count() == 1, "many marks are drawn on a canvas"
    assert page.locator("figure img").count() == 0
    assert "<img" in page.locator("#answer").inner_text()
    page.locator("figure", has_text="fires most").locator(".mark-rect path").first.hover()
    assert "<img" in page.locator(".vega-tip").inner_text()
    assert refused(page) == [] and watch.problems == []


def test_a_specification_that_cannot_be_drawn_says_so(show: Open) -> None:
    page, watch = show("/ask/ask")
    wrong = {"mark": {"type": "nothing"}, "encoding": {"x": {"field": "x", "type": "q"}}}
    put(page, dataclasses.replace(charted.many(), spec=wrong))
    assert "cannot be drawn" in page.locator(".plot.failed").inner_text()
    assert page.locator(".numbers summary").is_visible()
    assert watch.problems != []


def test_a_click_leads_to_pages_of_studio_alone(show: Open) -> None:
    page, _ = show("/ask/ask")
    marks = page.locator("figure .mark-rect path")
    for address in ("//127.0.0.2/x", "javascript:window.bad=1", "https://127.0.0.2/", "/\\x"):
        put(page, charted.charts()["norm_bars"].linked(lambda row, to=address: to))
        marks.first.click()
        assert page.evaluate("() => window.bad") is None
    assert page.url.endswith("/ask/ask")
    put(page, charted.charts()["norm_bars"].linked(lambda row: "/ledger/log"))
    marks.first.click()
    page.wait_for_url("**/ledger/log")


def test_a_script_from_elsewhere_is_refused_so_the_policy_is_in_force(show: Open) -> None:
    page, _ = show("/ask/ask")
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.bad = 1';"
        " document.head.append(s); }"
    )
    assert until(lambda: bool(refused(page)))
    assert page.evaluate("() => window.bad") is None


def test_a_chart_is_saved_as_png_svg_and_csv(show: Open, tmp_path: Path) -> None:
    page, watch = show(TRACE)
    page.locator(DRAWN).first.wait_for()
    for kind, begin in (("PNG", b"\x89PNG"), ("SVG", b"<svg"), ("CSV", b"label,")):
        with page.expect_download() as saved:
            page.locator(".chart-tools").first.get_by_text(kind, exact=True).click()
        path = tmp_path / kind
        saved.value.save_as(path)
        assert path.read_bytes().startswith(begin), kind
        assert saved.value.suggested_filename == f"trace.{kind.lower()}"
    assert watch.problems == []


def test_a_chart_is_maximised_and_comes_back(show: Open) -> None:
    page, watch = show(LENS)
    page.locator(DRAWN).first.wait_for()
    width = page.locator("figure.chart svg").first.bounding_box()["width"]
    page.locator("[data-do=maximise]").first.click()
    whole = page.locator("dialog.whole")
    assert until(lambda: whole.locator("svg").first.bounding_box()["width"] > 1.2 * width)
    page.keyboard.press("Escape")
    assert until(lambda: page.locator("dialog.whole").count() == 0)
    assert until(lambda: page.locator("#answer figure.chart svg").count() == 2)
    assert watch.problems == []


def test_the_theme_is_kept_and_set_before_the_page_is_drawn(show: Open) -> None:
    page, watch = show(TRACE, color_scheme="light")
    page.locator(DRAWN).first.wait_for()
    ink = "() => document.querySelector('.plot .role-axis-label text').getAttribute('fill')"
    light, light_ink = colour(page), page.evaluate(ink)
    page.locator("[data-theme-switch]").select_option("dark")
    assert until(lambda: page.evaluate(ink) != light_ink), "the chart is drawn again"
    dark = colour(page)
    assert dark != light
    page.add_init_script(
        "document.addEventListener('readystatechange', () => {"
        " if (document.readyState === 'interactive')"
        "   window.first = getComputedStyle(document.body).backgroundColor; });"
    )
    page.reload()
    assert page.evaluate("() => window.first") == dark, "no flash of the other theme"
    assert page.locator("[data-theme-switch]").input_value() == "dark"
    page.locator("[data-theme-switch]").select_option("system")
    assert colour(page) == light
    page.emulate_media(color_scheme="dark")
    assert colour(page) == dark
    assert watch.problems == []


def test_keys_lead_to_rooms_fields_and_the_list(show: Open) -> None:
    page, watch = show("/ask/ask")
    page.keyboard.press("?")
    dialog = page.locator("#shortcuts")
    assert dialog.is_visible()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.keyboard.press("/")
    name = "() => document.activeElement.name"
    assert page.evaluate(name) == "prompt"
    page.keyboard.type("g t ?")
    assert page.locator("[name=prompt]").input_value() == "g t ?", "keys in a field are text"
    page.locator("h1").click()
    page.keyboard.press("g")
    page.keyboard.press("t")
    page.wait_for_url("**/trace/trace")
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "skip"
    assert watch.problems == []


def test_an_answer_comes_in_place_and_its_address_is_short(show: Open) -> None:
    page, watch = show("/ask/ask")
    page.evaluate("() => { window.same = true; }")
    page.fill("[name=prompt]", PROMPT)
    page.locator("button.main").click()
    page.locator("#answer .says").wait_for()
    assert page.evaluate("() => window.same"), "the page was not loaded again"
    query = page.url.partition("?")[2]
    assert query.startswith("prompt=") and "revision=&" not in query and "model=" not in query
    page.reload()
    assert "lev" in page.locator("#answer .says").inner_text()
    page.go_back()
    assert until(lambda: page.locator("#answer .says").count() == 0)
    assert watch.problems == []


def test_what_cannot_be_combined_is_greyed_out_with_the_reason(show: Open) -> None:
    page, watch = show("/trace/trace")
    page.fill("[name=prompt]", PROMPT)
    page.fill("[name=subject]", "Bulgaria")
    page.locator("summary", has_text="More settings").click()
    page.wait_for_load_state("networkidle")
    assert page.locator("[name=sever]").is_enabled()
    page.locator("[name=fast][type=checkbox]").focus()
    with page.expect_response("**/form/trace?**"):
        page.keyboard.press("Space")
    assert until(page.locator("[name=sever]").is_disabled)
    assert until(lambda: page.locator("details.advanced[open]").count() == 1), "it stays unfolded"
    assert "cannot" in page.locator("#help-sever").inner_text()
    assert page.evaluate("() => document.activeElement.name") == "fast", "the focus stays"
    page.locator("button.main").click()
    page.locator(DRAWN).first.wait_for()
    assert page.url.endswith("subject=Bulgaria&fast=true")
    assert refused(page) == [] and watch.problems == []


def test_code_is_copied(show: Open, running: Any) -> None:
    page, _ = show(TRACE)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=running.base)
    page.get_by_text("as command").click()
    page.locator("[data-copy=snippet-command]").click()
    assert until(lambda: page.locator("#said").inner_text() == "Copied.")
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied == page.locator("#snippet-command").inner_text()
    assert copied.startswith("factsmith trace")


def test_a_form_works_without_javascript(show: Open) -> None:
    page, watch = show("/ask/ask", java_script_enabled=False)
    page.fill("[name=prompt]", PROMPT)
    page.locator("button.main").click()
    assert "lev" in page.locator("#answer .says").inner_text()
    assert page.locator("[data-theme-switch]").is_hidden()
    assert watch.problems == []


def test_code_and_numbers_scroll_inside_their_boxes(show: Open) -> None:
    page, watch = show(LENS, viewport={"width": 360, "height": 780})
    page.locator(DRAWN).nth(1).wait_for()
    for summary in ("as Python", "Numbers"):
        page.locator("summary", has_text=summary).first.click()
    boxes = page.locator(".snippet[open] pre[tabindex='0'], .numbers[open] .scroll[tabindex='0']")
    assert until(lambda: boxes.count() == 2), "a box that scrolls is reached by keyboard"
    assert overflow(page) <= 0
    assert accessibility(page) == []
    assert watch.problems == []


def test_the_menu_folds_on_small_screens(show: Open) -> None:
    page, _ = show("/ask/ask", viewport={"width": 360, "height": 780})
    rooms, button = page.locator("#rooms"), page.locator("[data-menu]")
    assert rooms.is_hidden() and button.get_attribute("aria-expanded") == "false"
    button.click()
    assert rooms.is_visible() and button.get_attribute("aria-expanded") == "true"
    wide, _ = show("/ask/ask")
    assert wide.locator("#rooms").is_visible() and wide.locator("[data-menu]").is_hidden()


def test_a_job_is_cancelled_on_the_page_where_it_is_shown(show: Open) -> None:
    page, watch = show(LONG)
    page.locator(".waiting .job").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    assert "/trace/neurons?" in page.url
    assert page.get_by_role("link", name="Ask again").is_visible()
    assert watch.problems == []


def test_a_file_that_is_too_large_is_not_sent(show: Open) -> None:
    page, watch = show("/patch/plan")
    page.locator("summary", has_text="Several facts").click()
    field = page.locator("#sheet-file")
    large = {"name": "facts.csv", "mimeType": "text/csv", "buffer": b"x" * 5_100_000}
    field.set_input_files(large)
    message = "(input) => input.validationMessage"
    assert "5.1 MB; studio takes 5.0 MB" in field.evaluate(message)
    page.get_by_role("button", name="Read the facts").click()
    assert page.url.endswith("/patch/plan")
    field.set_input_files({**large, "buffer": b"subject,prompt,target"})
    assert field.evaluate(message) == ""
    assert watch.problems == []


def test_a_page_says_when_studio_is_gone(
    browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tools.browser import studio

    with studio(tmp_path_factory.mktemp("gone") / "space") as started:
        page, _ = opened(browser, started.link)
        page.goto(started.link)
        assert page.locator("#lost").is_hidden()
    page.locator("#lost").wait_for(timeout=30_000)
    page.context.close()
