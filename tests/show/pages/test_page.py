"""What all pages share: no text acts, nothing is fetched, and a failure leaves no file."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from factsmith.core.errors import (
    WorkspaceError,
)
from factsmith.read.cards import Card
from factsmith.read.index import Index
from factsmith.read.triggers import Trigger
from factsmith.show.pages import page as shared
from factsmith.show.pages.neurons import card_page, layer_page, write_pages
from factsmith.show.pages.page import excerpt, script_block
from show.html import Page, fetched


def test_no_text_acts(dense: Index, index: Index, nasty_card: Card) -> None:
    alarm = Page("<p><script>alert(1)</script></p>")
    assert len(alarm.tags("script")) == 1 and alarm.inside["script"] == ["alert(1)"], (
        "the parser would see it"
    )
    page = Page(card_page(nasty_card))
    assert not page.tags("script") and not page.tags("u") and not page.tags("i")
    assert any("<script>alert(1)</script>" in text for text in page.inside["tbody"]), (
        "shown as it is written"
    )
    assert "alert(3)" in page.inside["title"][0] and "\ufffd" in page.inside["h1"][0]
    for layer_html in (layer_page(dense, 0), layer_page(index, 0)):
        page = Page(layer_html)
        assert len(page.tags("script")) == 2 and any(
            "<script>alert(1)</script>" in text for text in page.data["texts"]
        )
        assert any("\u2028" not in text and "lines" in text for text in page.data["texts"])
    for html in (card_page(nasty_card), layer_page(dense, 0)):
        assert not re.search(
            "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029"
            "\u202a-\u202e\u2066-\u2069\ufffe\ud800-\udfff]",
            html,
        )
        assert "{{ 7 * 7 }}" in html


def test_nothing_is_fetched_and_only_our_script_runs(
    dense: Index, nasty_card: Card, tmp_path: Path
) -> None:
    first, *_ = write_pages(dense, tmp_path / "pages")
    for html in (card_page(nasty_card), layer_page(dense, 0), first.read_text(encoding="utf-8")):
        page = Page(html)
        assert fetched(page) == []
        assert not [
            name for _, attributes in page.elements for name in attributes if name.startswith("on")
        ]
        (policy,) = [
            attributes["content"] or ""
            for attributes in page.tags("meta")
            if attributes.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policy.startswith("default-src 'none'")
        scripts = [
            text
            for text, attributes in zip(
                page.inside.get("script", []), page.tags("script"), strict=True
            )
            if attributes.get("type") is None
        ]
        hashes = [
            "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"
            for script in scripts
        ]
        assert re.findall(r"script-src ([^;]*)", policy) == [" ".join(hashes) or "'none'"]
        assert page.tags("html")[0]["lang"] == "en" and len(page.tags("h1")) == 1
        assert len(page.tags("caption")) == len(page.tags("table")) > 0
    assert (
        fetched(Page('<style>a{background:url(x)}</style><a href="//x">x</a><img src="https://x">'))
        != []
    )


@pytest.mark.parametrize("name", ["layer.js", "index.js"])
def test_scripts_parse(name: str, tmp_path: Path) -> None:
    if (node := shutil.which("node")) is None:
        pytest.skip("no node to parse them with")
    script = tmp_path / name
    script.write_text(script_block(name), encoding="utf-8")
    subprocess.run([node, "--check", str(script)], check=True)


def test_long_texts_are_cut_around_the_token(index: Index) -> None:
    text = "word " * 200 + "here " + "word " * 200
    trigger = Trigger(1.0, text, 1000, 1004, 0, None, 200)
    before, token, after = excerpt(trigger, 50, 20)
    assert token == "here" and before.startswith("…") and after.endswith("…")
    assert len(before) <= 52 and len(after) <= 22 and before[1:] + token + after[:-1] in text
    assert excerpt(dataclasses.replace(trigger, text=" a here b", start=3, stop=7), 50, 20) == (
        "a ",
        "here",
        " b",
    )


def test_a_page_that_cannot_be_written_leaves_nothing(
    nasty_card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared, "write_file", full)
    with pytest.raises(WorkspaceError, match="No space left"):
        card_page(nasty_card, tmp_path / "card.html")
    assert not list(tmp_path.iterdir())
