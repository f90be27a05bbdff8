"""The page of a layer: it holds what the index holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from factsmith.read.fact_adds import FactAdds
from factsmith.read.index import Index
from factsmith.show.pages import layers
from factsmith.show.pages.neurons import layer_page, write_pages
from show.html import Page, units


def test_a_layer_s_page_holds_what_the_index_holds(dense: Index, adds: FactAdds) -> None:
    page = Page(layer_page(dense, 1, adds=adds))
    data = page.data
    neurons = data["neurons"]
    assert [(neuron[0], neuron[1]) for neuron in neurons] == [
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
    assert (
        highest > 10
        and any(neuron[7] for neuron in neurons)
        and not all(neuron[7] for neuron in neurons)
    )
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
    assert [(neuron[0], neuron[1]) for neuron in data["neurons"]] == [
        (expert, i) for expert, n in enumerate(sizes) for i in range(n)
    ]
    neuron = data["neurons"][sizes[0] + 5]
    assert neuron[3][1::2] == pytest.approx(
        [score for _, score in index.values.of((2, 1, 5))], rel=1e-3
    )


def test_a_large_layer_shows_less_of_each_neuron(
    dense: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = layer_page(dense, 1)
    monkeypatch.setattr(layers, "LARGEST", len(json.dumps(Page(full).data)) // 2)
    small = Page(layer_page(dense, 1)).data["neurons"]
    neurons = Page(full).data["neurons"]
    assert len(small) == len(neurons) and all(neuron[5] for neuron in small)
    assert sum(len(neuron[5]) for neuron in small) < sum(len(neuron[5]) for neuron in neurons)
    monkeypatch.setattr(layers, "SEARCHED", 0)
    first, *_ = write_pages(dense, tmp_path / "pages")
    html = first.read_text(encoding="utf-8")
    assert Page(html).data["width"] == 0 and "None" not in html
