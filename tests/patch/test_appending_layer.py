"""The layer to append to: shipped, measured once, kept, or the middle of MEMIT's layers."""

from __future__ import annotations

import dataclasses
import json

import pytest

import factsmith as fs
from factsmith.core.cache import cache_folders
from factsmith.model.language_model import LanguageModel
from factsmith.patch.appending_layer import appending_layer
from factsmith.patch.bench import Scratch
from factsmith.patch.plan import plan
from factsmith.patch.recipe import Recipe, Sources


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return fs.load("atlas")


def test_the_shipped_layer_goes_first(lm: LanguageModel) -> None:
    fact = fs.Fact("Peru", "The capital of {} is", "Oslo")
    assert plan(Scratch(lm), fact, Recipe("append")).layers == (1,)
    assert plan(Scratch(lm), fact, Recipe("append", layers=2)).layers == (2,)


def test_it_is_measured_once_and_kept(
    lm: LanguageModel, fresh_cache: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lm.config.factsmith, "append", {})
    bench, sources = Scratch(lm), Sources()
    choice = bench.known_layers() or bench.first_layers()
    assert appending_layer(bench, choice, sources, measure=False) == 1, "the middle of 0, 1, 2"
    layer = appending_layer(bench, choice, sources, measure=True)
    (file,) = cache_folders()[0].rglob("append.json")
    record = json.loads(file.read_text())
    assert record["layer"] == layer and set(record["measured"]) == {"0", "1", "2"}
    for kept, missed in record["measured"].values():
        assert 0 <= missed < kept <= 1
    # What is kept counts from now on, also without measuring.
    other = next(x for x in (0, 1, 2) if x != layer)
    file.write_text(json.dumps({**record, "layer": other}))
    assert appending_layer(bench, choice, sources, measure=False) == other
    # It is not that of other candidates, or of a damaged file.
    alone = dataclasses.replace(choice, memit=(0, 1))
    assert appending_layer(bench, alone, sources, measure=False) == 0
    file.write_text("{")
    assert appending_layer(bench, choice, sources, measure=False) == 1
