"""Pages: that they hold the index's and the card's numbers, need nothing from outside, and let no text of a model's act."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import factsmith as fs
from conftest import LLAMA, TEXTS, byte_tokenizer, tiny_model
from factsmith.core.errors import (
    FactsmithError,
    FingerprintError,
    InputError,
    LayerError,
    WorkspaceError,
)
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.read.cards import Card, FactAdds, FactUse, card, fact_adds
from factsmith.read.index import Index, build_index
from factsmith.read.triggers import Trigger
from factsmith.show.pages import neurons as pages
from factsmith.show.pages import page as page_parts
from factsmith.show.pages.neurons import card_page, layer_page, write_pages

NASTY = [
    "<script>alert(1)</script> is a text",
    "it ends </script><script>alert(2)</script> here",
    "quotes ' and \" and & and &lt; and <!-- and ]]> and ${x} and {{ 7 * 7 }}",
    "controls \x00\x07\x1b[2J\x7f\x85 and\u2028lines\u2029here\nand a tab\t",
    "שלום עולם and \u202eover and מִלָּה",
    "an 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 and 🧪🧪 text",
]
FACTS = [
    ("Edwin of Northumbria is a", "king"),
    ("The Eiffel Tower is in", "Paris"),
    ("Danielle Darrieux is", "French"),
]
VOID = {"meta", "input", "link", "img"}


class Page(HTMLParser):
    """Elements, texts, and what a browser would run or fetch."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
            self.inside.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, text: str) -> None:
        for tag in set(self._open):
            self.inside[tag][-1] += text
        if self.rows and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += text

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def data(self) -> Any:
        (content,) = [
            text
            for text, own in zip(self.inside["script"], self.tags("script"), strict=True)
            if own.get("type")
        ]
        return json.loads(content)


def units(text: str, start: int, stop: int) -> str:
    """A slice as a browser takes it."""
    raw = text.encode("utf-16-le")
    return raw[2 * start : 2 * stop].decode("utf-16-le")


def fetched(page: Page) -> list[str]:
    """Everything that a browser would fetch, or go to elsewhere."""
    found = [
        value or ""
        for _, own in page.elements
        for name, value in own.items()
        if name in ("src", "srcset", "data", "poster", "action")
    ]
    found += [
        own["href"] or ""
        for own in page.tags("a") + page.tags("link")
        if re.match(r"[a-z]+:|//", own["href"] or "")
    ]
    style = " ".join(page.inside["style"]) + " ".join(
        own.get("style") or "" for _, own in page.elements
    )
    return (
        found
        + re.findall(r"url\(|@import|@font-face", style)
        + [own["href"] or "" for own in page.tags("link")]
    )


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap(
        tiny_model("mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
        byte_tokenizer(bos=True),
    )


@pytest.fixture(scope="module")
def index(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(lm, [*TEXTS, *NASTY], tmp_path_factory.mktemp("index"), top=4, tokens=6)


@pytest.fixture(scope="module")
def dense(tiny_gpt2: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(
        tiny_gpt2, [*TEXTS, *NASTY], tmp_path_factory.mktemp("dense"), top=4, tokens=6
    )


@pytest.fixture(scope="module")
def adds(tiny_gpt2: LanguageModel) -> FactAdds:
    """As if the model knew facts."""
    n, bank = tiny_gpt2.ffn[1].banks[0].d_ff, (1,)
    facts = torch.arange(2 * n).reshape(n, 2) % len(FACTS)
    values = torch.linspace(2, -1, 2 * n).reshape(n, 2)
    return FactAdds(
        known=tuple(FACTS),
        facts={bank: facts},
        coefficients={bank: values},
        adds={bank: values},
        fingerprint=tiny_gpt2.fingerprint,
    )


@pytest.fixture
def nasty_card() -> Card:
    triggers = tuple(Trigger(2.5, text, 3, 6, 7, None, 1) for text in NASTY)
    return Card(
        neuron=(2, 1, 5),
        model="</title><script>alert(3)</script>\udcff",
        fingerprint="ab" * 32,
        corpus="cd" * 32,
        n_texts=6,
        n_tokens=1234,
        promotes=tuple(
            (token, 1.5 - i)
            for i, token in enumerate([" <u>", "'\"", "", "  ", " \x1b x", "</script>"])
        ),
        demotes=((" Paris", -3.0),),
        triggers=triggers,
        bottom=(),
        fired=0.25,
        edges=torch.linspace(-1, 2, 31),
        counts=torch.arange(30),
        facts=(FactUse("<i>The tower is in", "Paris", 1.25, 0.875, 0.5),),
        n_asked=17,
    )


def test_a_layer_s_page_holds_what_the_index_holds(dense: Index, adds: FactAdds) -> None:
    page = Page(layer_page(dense, 1, adds=adds))
    data = page.data
    neurons = data["neurons"]
    assert [(own[0], own[1]) for own in neurons] == [
        (0, i) for i in range(len(dense.triggers.banks[1,].fired))
    ]
    assert data["banks"] == [{"expert": None, "neurons": len(neurons)}] and data["layer"] == 1
    highest = 0.0
    for _, i, fired, up, down, top, bottom, facts in neurons:
        assert fired == pytest.approx(float(dense.triggers.banks[1,].fired[i]), rel=1e-3)
        for flat, expected in (
            (up, dense.values.of((1, i))),
            (down, dense.values.of((1, i), bottom=True)),
        ):
            assert flat[1::2] == pytest.approx([score for _, score in expected], rel=1e-3)
            plain = [
                (data["words"][word], token)
                for word, (token, _) in zip(flat[::2], expected, strict=True)
                if token.isprintable()
            ]
            assert all(word == token for word, token in plain)
        for flat, expected_ones in (
            (top, dense.triggers.of((1, i))),
            (bottom, dense.triggers.of((1, i), sign="bottom", k=3)),
        ):
            assert flat[::4] == pytest.approx([t.coefficient for t in expected_ones], rel=1e-3)
            for text, start, stop, t in zip(
                flat[1::4], flat[2::4], flat[3::4], expected_ones, strict=True
            ):
                shown, token = units(data["texts"][text], start, stop), t.text[t.start : t.stop]
                assert shown == token if token.isprintable() else len(shown) == len(token)
                highest = max(highest, start)
        assert facts[1::3] == pytest.approx([m for *_, m, _ in adds.of((1, i))], rel=1e-3)
        assert [tuple(data["facts"][fact]) for fact in facts[::3]] == [
            (prompt, answer) for prompt, answer, *_ in adds.of((1, i))
        ]
    assert highest > 10 and any(own[7] for own in neurons) and not all(own[7] for own in neurons)
    without = [row for row in page.rows if len(row) == 3 and row[0].isdigit()]
    assert [int(row[0]) for row in without] == list(range(len(neurons))), (
        "all of them without JavaScript too"
    )
    assert without[3][1] == f"{neurons[3][2]:.1%}"
    assert Page(layer_page(dense, 1)).data["facts"] == []


def test_experts_are_banks_of_one_page(index: Index) -> None:
    data = Page(layer_page(index, 2)).data
    sizes = [len(index.triggers.banks[2, expert].fired) for expert in range(4)]
    assert [bank["expert"] for bank in data["banks"]] == [0, 1, 2, 3] and [
        bank["neurons"] for bank in data["banks"]
    ] == sizes
    assert [(own[0], own[1]) for own in data["neurons"]] == [
        (expert, i) for expert, n in enumerate(sizes) for i in range(n)
    ]
    own = data["neurons"][sizes[0] + 5]
    assert own[3][1::2] == pytest.approx(
        [score for _, score in index.values.of((2, 1, 5))], rel=1e-3
    )


def test_a_card_s_page_holds_its_numbers(lm: LanguageModel, index: Index, tmp_path: Path) -> None:
    found = card(lm, index, (1, 2, 7), [])
    html = card_page(found, tmp_path / "card.html")
    assert (tmp_path / "card.html").read_text(encoding="utf-8") == html
    page = Page(html)
    signed = [f"{score:+.2f}".replace("-", "−") for _, score in (*found.promotes, *found.demotes)]
    assert [row[2] for row in page.rows if len(row) == 3 and row[2] != "score"] == signed
    texts = [row[1].replace("↵", "\n") for row in page.rows if len(row) == 2 and row[1] != "text"]
    assert len(texts) == len(found.triggers) + len(found.bottom) > 0
    marks = page.inside["mark"]
    assert [t.text[t.start : t.stop] for t in found.triggers if t.text.isprintable()] == [
        mark for mark, t in zip(marks, found.triggers, strict=False) if t.text.isprintable()
    ]
    heights = [float(own["height"] or "nan") for own in page.tags("rect")]
    assert (
        len(heights) == len(found.counts)
        and max(heights) == 100 == heights[int(found.counts.argmax())]
    )
    assert [h == 0 for h in heights] == [n == 0 for n in found.counts.tolist()]
    assert all(
        value in html
        for value in (found.fingerprint, found.corpus, f"{found.n_tokens:,} tokens", "Neuron 1 2 7")
    )
    assert "None was asked that the model knows" in html


def test_facts_are_shown_with_and_without_the_neuron(nasty_card: Card) -> None:
    page = Page(card_page(nasty_card))
    assert ["<i>The tower is in Paris", "+1.25", "87.5%", "50.0%", "−37.5"] in page.rows


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
            "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufffe\ud800-\udfff]",
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
        assert not [name for _, own in page.elements for name in own if name.startswith("on")]
        (policy,) = [
            own["content"] or ""
            for own in page.tags("meta")
            if own.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policy.startswith("default-src 'none'")
        scripts = [
            text
            for text, own in zip(page.inside.get("script", []), page.tags("script"), strict=True)
            if own.get("type") is None
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
    script.write_text(str(page_parts.script_block(name)), encoding="utf-8")
    subprocess.run([node, "--check", str(script)], check=True)


def test_a_folder_of_pages_is_linked(index: Index, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pages"
    first, *others = write_pages(index, folder, [2, 0, 2])
    assert [path.name for path in (first, *others)] == [
        "index.html",
        "layer-0.html",
        "layer-2.html",
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (first, *others)
    )
    for path in (first, *others):
        links = [own["href"] or "" for own in Page(path.read_text(encoding="utf-8")).tags("a")]
        assert links and all((folder / link).is_file() for link in links), links
    page = Page(first.read_text(encoding="utf-8"))
    data = page.data
    assert [own["layer"] for own in data["layers"]] == [0, 2] and data["width"] == 6
    expert, tokens = data["layers"][1]["banks"][3]
    assert expert == 3
    for i in (0, 7):
        expected = [token for token, _ in index.values.of((2, 3, i))]
        found = [data["words"][token] for token in tokens[i * 6 : i * 6 + 6]]
        assert [a for a, b in zip(found, expected, strict=True) if b.isprintable()] == [
            b for b in expected if b.isprintable()
        ]
    assert write_pages(index, folder) and len(list(folder.iterdir())) == 4, (
        "our own pages are written anew"
    )


def test_a_large_layer_shows_less_of_each_neuron(
    dense: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = layer_page(dense, 1)
    monkeypatch.setattr(pages, "LARGEST", len(json.dumps(Page(full).data)) // 2)
    small = Page(layer_page(dense, 1)).data["neurons"]
    neurons = Page(full).data["neurons"]
    assert len(small) == len(neurons) and all(own[5] for own in small)
    assert sum(len(own[5]) for own in small) < sum(len(own[5]) for own in neurons)
    monkeypatch.setattr(pages, "_SEARCHED", 0)
    assert "None" not in layer_page(dense, 1)


def test_long_texts_are_cut_around_the_token(index: Index) -> None:
    text = "word " * 200 + "here " + "word " * 200
    trigger = Trigger(1.0, text, 1000, 1004, 0, None, 200)
    before, token, behind = pages._excerpt(trigger, 50, 20)
    assert token == "here" and before.startswith("…") and behind.endswith("…")
    assert len(before) <= 52 and len(behind) <= 22 and before[1:] + token + behind[:-1] in text
    assert pages._excerpt(
        dataclasses.replace(trigger, text=" a here b", start=3, stop=7), 50, 20
    ) == ("a ", "here", " b")


def test_what_cannot_be_written_is_refused(
    lm: LanguageModel, index: Index, nasty_card: Card, adds: FactAdds, tmp_path: Path
) -> None:
    (tmp_path / "mine.html").write_text("<p>my own page")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("my own site")
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[type[FactsmithError], Any, str]] = [
        (InputError, lambda: card_page(nasty_card, tmp_path / "card.png"), r"ends in \.html"),
        (InputError, lambda: card_page(nasty_card, tmp_path), r"ends in \.html"),
        (
            InputError,
            lambda: card_page(nasty_card, tmp_path / "mine.html"),
            "no page of factsmith's",
        ),
        (
            WorkspaceError,
            lambda: card_page(nasty_card, tmp_path / "none" / "card.html"),
            "not a folder",
        ),
        (InputError, lambda: card_page(index), "got a Index"),  # type: ignore[arg-type]
        (InputError, lambda: layer_page(lm, 0), "got a LanguageModel"),  # type: ignore[arg-type]
        (
            LayerError,
            lambda: layer_page(index, 3, tmp_path / "x.html"),
            "layer 3; there are 0, 1, 2",
        ),
        (LayerError, lambda: write_pages(index, tmp_path / "new", [0, "x"]), "hold layer"),  # type: ignore[list-item]
        (InputError, lambda: write_pages(index, tmp_path / "new", []), "no layer"),
        (FingerprintError, lambda: write_pages(index, tmp_path / "new", adds=adds), "fact_adds"),
        (WorkspaceError, lambda: write_pages(index, tmp_path / "file"), "a file of that name"),
        (WorkspaceError, lambda: write_pages(index, tmp_path / "file" / "below"), "cannot make"),
        (InputError, lambda: write_pages(index, tmp_path / "site"), "no page of factsmith's"),
    ]
    for error, call, words in cases:
        with pytest.raises(error, match=words):
            call()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_that_cannot_be_written_leaves_nothing(
    nasty_card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_parts, "write_file", full)
    with pytest.raises(WorkspaceError, match="No space left"):
        card_page(nasty_card, tmp_path / "card.html")
    assert not list(tmp_path.iterdir())


def test_the_public_names(tiny_gpt2: LanguageModel, dense: Index) -> None:
    assert (
        fs.card_page is card_page
        and fs.layer_page is layer_page
        and fs.write_pages is write_pages
        and fs.fact_adds is fact_adds
    )
    assert fact_adds(tiny_gpt2, [1], []).of((1, 3)) == [], "no fact, no page of facts"
    assert Page(layer_page(dense, 1, adds=fact_adds(tiny_gpt2, [0], []))).data["facts"] == [], (
        "of another layer"
    )
