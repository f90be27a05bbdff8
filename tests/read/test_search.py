"""A word's neurons: the two searches together, and how they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from factsmith.core.errors import InputError
from factsmith.model.language_model import LanguageModel
from factsmith.read.index import Index
from factsmith.read.promoters import promoters
from factsmith.read.search import search_word


def test_both_searches_are_those_of_the_model_and_the_index(
    index: Index, tiny_gpt2: LanguageModel
) -> None:
    result = search_word(tiny_gpt2, "is", index.folder, k=4)
    assert list(result.promoting) == promoters(tiny_gpt2, "is", 4)
    assert list(result.firing) == index.triggered_by("is", 4) != []
    record = result.to_dict()
    assert [each["neuron"] for each in record["promoted_by"]] == [
        list(p.neuron) for p in result.promoting
    ]
    assert [each["prefix"] for each in record["triggers"]] == [
        f.trigger.prefix for f in result.firing
    ]
    assert (record["n_texts"], record["index"]) == (index.triggers.n_texts, str(index.folder))


def test_the_tables_say_what_was_found_and_what_was_not(
    index: Index, tiny_gpt2: LanguageModel
) -> None:
    shown = repr(search_word(tiny_gpt2, "is", index.folder, k=4))
    assert "values that promote 'is'\n" in shown and "neurons that fire after 'is'\n" in shown
    assert f"from {index.triggers.n_texts} texts, {index.triggers.n_tokens:,} tokens, in" in shown
    nothing = repr(search_word(tiny_gpt2, "xyzzy", index.folder))
    assert "values that promote 'xyzzy', by the first of its tokens" in nothing
    assert "neurons that fire after 'xyzzy': none, in the texts that were scanned" in nothing


def test_a_word_is_checked_before_an_index_is_made(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    for word, options in ((" ", {}), ("is", {"k": 0})):
        with pytest.raises(InputError):
            search_word(tiny_gpt2, word, tmp_path / "new", texts=["Paris is"], **options)
    assert not (tmp_path / "new").exists()
