"""Cards and folders of pages: they hold the numbers, and replace no file of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import factsmith as fs
from factsmith.core.errors import (
    FactsmithError,
    FingerprintError,
    InputError,
    LayerError,
    WorkspaceError,
)
from factsmith.model.language_model import LanguageModel
from factsmith.read.cards import Card, card
from factsmith.read.fact_adds import FactAdds, fact_adds
from factsmith.read.index import Index
from factsmith.show.pages.neurons import card_page, layer_page, write_pages
from show.html import Page


def test_a_card_s_page_holds_its_numbers(lm: LanguageModel, index: Index, tmp_path: Path) -> None:
    one = card(lm, index, (1, 2, 7), [])
    html = card_page(one, tmp_path / "card.html")
    assert (tmp_path / "card.html").read_text(encoding="utf-8") == html
    page = Page(html)
    signed = [f"{score:+.2f}".replace("-", "−") for _, score in (*one.promotes, *one.demotes)]
    assert [row[2] for row in page.rows if len(row) == 3 and row[2] != "score"] == signed
    texts = [row[1].replace("↵", "\n") for row in page.rows if len(row) == 2 and row[1] != "text"]
    assert len(texts) == len(one.triggers) + len(one.bottom) > 0
    marks = page.inside["mark"]
    assert [t.text[t.start : t.stop] for t in one.triggers if t.text.isprintable()] == [
        mark for mark, t in zip(marks, one.triggers, strict=False) if t.text.isprintable()
    ]
    heights = [float(bar["height"] or "nan") for bar in page.tags("rect")]
    assert (
        len(heights) == len(one.counts) and max(heights) == 100 == heights[int(one.counts.argmax())]
    )
    assert [h == 0 for h in heights] == [n == 0 for n in one.counts.tolist()]
    assert all(
        value in html
        for value in (one.fingerprint, one.corpus, f"{one.n_tokens:,} tokens", "Neuron 1 2 7")
    )
    assert "No fact was tested that the model knows" in html


def test_facts_are_shown_with_and_without_the_neuron(nasty_card: Card) -> None:
    page = Page(card_page(nasty_card))
    assert ["<i>The tower is in Paris", "+1.25", "87.5%", "50.0%", "−37.5"] in page.rows


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
        links = [link["href"] or "" for link in Page(path.read_text(encoding="utf-8")).tags("a")]
        assert links and all((folder / link).is_file() for link in links), links
    page = Page(first.read_text(encoding="utf-8"))
    data = page.data
    assert [layer["layer"] for layer in data["layers"]] == [0, 2] and data["width"] == 6
    expert, tokens = data["layers"][1]["banks"][3]
    assert expert == 3
    for i in (0, 7):
        expected = [token for token, _ in index.values.of((2, 3, i))]
        tokens_shown = [data["words"][token] for token in tokens[i * 6 : i * 6 + 6]]
        assert [a for a, b in zip(tokens_shown, expected, strict=True) if b.isprintable()] == [
            b for b in expected if b.isprintable()
        ]
    assert write_pages(index, folder) and len(list(folder.iterdir())) == 4, (
        "our own pages are replaced"
    )


def test_the_index_lists_the_pages_that_were_there(index: Index, tmp_path: Path) -> None:
    def linked() -> list[str | None]:
        page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
        return [link["href"] for link in page.tags("a")]

    write_pages(index, tmp_path, [0, 1])
    write_pages(index, tmp_path, [2])
    assert linked() == ["layer-0.html", "layer-1.html", "layer-2.html"]
    last = Page((tmp_path / "layer-2.html").read_text(encoding="utf-8"))
    assert "layer-1.html" in [link["href"] for link in last.tags("a")]
    # A page of another model is not listed, and neither is a page of another kind.
    other = (tmp_path / "layer-1.html").read_text(encoding="utf-8")
    fingerprint = index.triggers.fingerprint
    (tmp_path / "layer-1.html").write_text(other.replace(fingerprint, "0" * len(fingerprint)))
    (tmp_path / "layer-x.html").write_text(other)
    write_pages(index, tmp_path, [0])
    assert linked() == ["layer-0.html", "layer-2.html"]
    # A page of a layer that this index does not hold is linked, and not searched.
    (tmp_path / "layer-77.html").write_text(other)
    write_pages(index, tmp_path, [0])
    assert linked() == ["layer-0.html", "layer-2.html", "layer-77.html"]
    data = Page((tmp_path / "index.html").read_text(encoding="utf-8")).data
    assert [layer["layer"] for layer in data["layers"]] == [0, 2]


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
            "factsmith did not write it",
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
            "layer 3; it holds 0, 1, 2",
        ),
        (
            LayerError,
            lambda: write_pages(index, tmp_path / "new", [0, "x"]),  # type: ignore[list-item]
            "hold layer",
        ),
        (InputError, lambda: write_pages(index, tmp_path / "new", []), "layers is empty"),
        (FingerprintError, lambda: write_pages(index, tmp_path / "new", adds=adds), "fact_adds"),
        (WorkspaceError, lambda: write_pages(index, tmp_path / "file"), "a file of that name"),
        (WorkspaceError, lambda: write_pages(index, tmp_path / "file" / "below"), "cannot make"),
        (InputError, lambda: write_pages(index, tmp_path / "site"), "factsmith did not write it"),
    ]
    for error, call, words in cases:
        with pytest.raises(error, match=words):
            call()
    assert sorted(tmp_path.rglob("*")) == before


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
