"""The frame of the pages: templates, what they escape, the served files, and the terms."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tools.vendor import offences

from charted import HOSTILE, charts
from factsmith.core.tables import Table
from factsmith.studio.glossary import TERMS, explain
from factsmith.studio.templating import STATIC, environment, static

TEMPLATES = STATIC.parent / "templates"

MOST_BYTES = 900_000
"""Of all served files together: they are part of the wheel."""


def rendered(source: str, **context: object) -> str:
    """Return a piece of a page that uses the macros."""
    template = '{% import "ui.html" as ui with context %}' + source
    return environment().from_string(template).render(**context)


def test_hostile_text_stays_text_in_every_macro() -> None:
    table = Table(HOSTILE, {HOSTILE: "<", "ok": "ok"}, [(HOSTILE, "failed")], note=HOSTILE)
    chart = charts()["trigger_bars"]
    page = rendered(
        "{{ ui.table(t) }}{{ ui.chart(c) }}{{ ui.note(x) }}{{ ui.warning(x) }}{{ ui.error(x) }}"
        "{{ ui.token(x) }}{{ ui.post('/a', x, {'value': x}) }}{{ ui.snippet('as Python', x, 'p') }}"
        "{{ ui.disabled(x, x) }}",
        t=table,
        c=chart,
        x=HOSTILE,
    )
    assert "<img" not in page and "{{7*7}}" in page and "49" not in page
    assert "</script>" not in page and page.count("</template>") == 1
    assert "&lt;img" in page
    unsafe = environment().from_string("{{ x | safe }}").render(x=HOSTILE)
    assert "<img" in unsafe, "the check sees what is not escaped"


def test_a_verdict_is_a_word_and_a_mark_besides_its_colour() -> None:
    page = rendered("{{ ui.verdict('failed') }}{{ ui.verdict('ok') }}")
    assert "✗" in page and "failed" in page and "✓" in page
    assert "✓" not in rendered("{{ ui.verdict('later') }}")


def test_numbers_of_a_chart_are_a_table_with_links() -> None:
    chart = charts()["norm_bars"].linked(lambda row: f"/x?layer={row['label']}&a=1")
    page = rendered("{{ ui.chart(c) }}", c=chart)
    assert '<a href="/x?layer=layer 1&amp;a=1">layer 1</a>' in page
    assert page.count("<tr>") == 1 + len(chart.rows)


def test_terms_are_explained_once_each_and_unknown_ones_are_plain() -> None:
    assert explain("Indirect effect") == TERMS["indirect effect"]
    assert explain("neurons") == TERMS["neuron"]
    assert explain("no such term") == ""
    assert list(TERMS) == sorted(TERMS)
    page = rendered("{{ ui.term('ledger') }}{{ ui.term('ledger') }}{{ ui.term('nothing') }}")
    names = re.findall(r' id="(term-[^"]+)"', page)
    assert len(names) == len(set(names)) == 2
    assert [f'aria-describedby="{name}"' in page for name in names] == [True, True]


def test_a_job_shows_its_state_and_how_to_cancel_it() -> None:
    job = SimpleNamespace(
        id="j1",
        state="running",
        work=SimpleNamespace(title="Trace"),
        wants_cancel=False,
        is_over=False,
        stage="",
        step="tracing",
        done=3,
        total=12,
        started=1.0,
        seconds=4.2,
        left="about 3 s left",
        share=0.25,
        notes=[HOSTILE],
        error=None,
        ahead=(),
    )
    page = rendered("{{ ui.progress(job) }}", job=job, csrf="secret")
    assert 'action="/jobs/j1/cancel"' in page and 'value="secret"' in page
    assert "3 of 12" in page and 'value="0.250"' in page
    job.is_over, job.state = True, "done"
    assert "cancel" not in rendered("{{ ui.progress(job) }}", job=job)


@pytest.mark.parametrize("path", sorted(TEMPLATES.rglob("*.html")), ids=lambda path: path.name)
def test_templates_have_no_inline_script_and_no_inline_style(path: Path) -> None:
    assert inline(path.read_text(encoding="utf-8")) == []


def test_inline_scripts_and_styles_are_seen() -> None:
    wrong = '<a onclick="x()"><script>x()</script><p style="top:0" hx-on:click="x"><b a="js:">'
    assert len(inline(wrong)) == 5


def inline(text: str) -> list[str]:
    """Return what the content security policy would refuse in a template, and unescaped text."""
    text = re.sub(r"\{#.*?#\}", "", text, flags=re.DOTALL)
    scripts = re.findall(r"<script(?![^>]*(?:src=|application/json))[^>]*>", text)
    attributes = re.findall(r"\s(?:on[a-z]+|style|hx-on[a-z:-]*)\s*=\s*[\"']", text)
    return scripts + attributes + re.findall(r"\|\s*safe\b|js:", text)


def test_served_files_are_small_and_their_addresses_change_with_them() -> None:
    files = [path for path in STATIC.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert re.fullmatch(r"/static/studio\.css\?v=[0-9a-f]{12}", static("studio.css"))
    assert static("studio.css") != static("studio.js").replace("studio.js", "studio.css")


def test_scripts_use_no_eval_and_no_markup() -> None:
    for path in STATIC.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        wrong = re.findall(r"\beval\b\(|innerHTML|outerHTML|insertAdjacent|document\.write", text)
        assert wrong == [], path.name
        assert len(text.splitlines()) <= 400


def test_vendored_files_are_those_that_are_recorded(tmp_path: Path) -> None:
    assert offences() == []
    copy = tmp_path / "vendor"
    shutil.copytree(STATIC / "vendor", copy)
    (copy / "htmx.min.js").write_text("changed", encoding="utf-8")
    (copy / "more.js").write_text("", encoding="utf-8")
    assert offences(copy) == [
        "more.js is not recorded",
        "htmx.min.js has another digest than vendored.json records",
    ]
