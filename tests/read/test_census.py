"""Counting parameters and idle neurons, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from conftest import GPT2, LLAMA, TEXTS, VOCAB, byte_tokenizer, tiny_model
from factsmith.core.errors import FingerprintError, InputError
from factsmith.corpus.moments import second_moments
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.read.census import ReadCensus, census, effective_rank, find_census
from factsmith.read.index import Index
from factsmith.read.trigger_scan import find_triggers


def test_parameters_by_part(tiny_gpt2: LanguageModel) -> None:
    result = census(tiny_gpt2)
    assert result.ffn == 3 * (32 * 128 + 128 + 128 * 32 + 32)
    assert result.attention == 3 * (32 * 96 + 96 + 32 * 32 + 32)
    assert result.embeddings == VOCAB * 32 + 64 * 32, "tied words once, and positions"
    assert result.other == 7 * 2 * 32, "norms"
    assert (
        result.parameters == sum(p.numel() for p in tiny_gpt2.module.parameters())
        and result.neurons == 3 * 128
    )
    assert [
        (layer.layer, layer.neurons, layer.experts, layer.idle, layer.effective_rank)
        for layer in result.layers
    ] == [(layer, 128, 0, None, None) for layer in range(3)]


def test_experts_and_an_unembedding_of_its_own() -> None:
    lm = wrap(
        tiny_model(
            "mixtral",
            **LLAMA,
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=False,
        ),
        byte_tokenizer(bos=True),
    )
    result = census(lm)
    assert result.ffn == 3 * (4 * 3 * 32 * 48 + 4 * 32), "with the router"
    assert result.embeddings == 2 * VOCAB * 32 and result.neurons == 3 * 4 * 48
    assert (
        result.parameters == sum(p.numel() for p in lm.module.parameters())
        and result.layers[1].experts == 4
    )


def test_idle_neurons_write_almost_nothing() -> None:
    lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    with torch.no_grad():
        lm.module.transformer.h[1].mlp.c_fc.weight[:, 5:9] = 0
        lm.module.transformer.h[1].mlp.c_fc.bias[5:9] = -30  # GELU is zero there
    result = census(lm, triggers=find_triggers(lm, TEXTS, [0, 1], top=1))
    assert [layer.idle for layer in result.layers] == [0, 4, None]


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(7, 7)) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0]))) == pytest.approx(2)
    assert effective_rank(torch.zeros(3, 3)) == 0
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert effective_rank(torch.diag(4 * shares)) == pytest.approx(2**1.5)


def test_bad_input_is_refused_in_words(tiny_gpt2: LanguageModel, tiny_llama: LanguageModel) -> None:
    assert census(tiny_gpt2, moments={1: torch.eye(128)}).layers[1].effective_rank == pytest.approx(
        128
    )
    with pytest.raises(InputError, match="layer 1"):
        census(tiny_gpt2, moments={1: torch.eye(7)})
    with pytest.raises(FingerprintError, match="another model"):
        census(tiny_gpt2, triggers=find_triggers(tiny_llama, TEXTS, [0], top=1))


def test_a_census_reads_the_text_that_it_needs(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    result = find_census(tiny_gpt2, tmp_path / "index", texts=TEXTS)
    index = Index.open(tmp_path / "index", tiny_gpt2)
    moments = second_moments(tiny_gpt2, TEXTS, [0, 1, 2])
    matrices = {layer: moment.matrix for layer, moment in moments.items()}
    assert result.census == census(tiny_gpt2, triggers=index.triggers, moments=matrices)
    read = result.to_dict()["read"]
    assert read["idle"] == {
        "n_texts": 4,
        "n_tokens": index.triggers.n_tokens,
        "index": str(index.folder),
    }
    assert read["effective_rank"] == {"n_tokens": moments[0].count, "of": "the texts"}
    assert f"effective rank in the first {moments[0].count} tokens of the texts" in repr(result)
    part = find_census(tiny_gpt2, tmp_path / "part", texts=TEXTS, max_tokens=50)
    assert part.idle is not None and part.idle.n_tokens == 50
    assert part.effective_rank is not None and part.effective_rank.n_tokens == 50
    with pytest.raises(InputError, match="read twice"):
        find_census(tiny_gpt2, tmp_path / "other", texts=iter(TEXTS))
    assert ReadCensus(census(tiny_gpt2)).to_dict()["read"] == {}


def test_without_dense_layers_there_is_no_effective_rank(tmp_path: Path) -> None:
    lm = wrap(
        tiny_model("mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
        byte_tokenizer(bos=True),
    )
    result = find_census(lm, tmp_path, texts=TEXTS)
    assert result.effective_rank is None and result.census.layers[0].idle is not None


def test_layers_of_equal_numbers_are_one_row(tiny_gpt2: LanguageModel) -> None:
    (row,) = census(tiny_gpt2).tables()[1].rows
    assert row[0] == "0–2" and row[3] == "128"
    whole = census(tiny_gpt2)
    other = dataclasses.replace(whole.layers[1], neurons=7)
    changed = dataclasses.replace(whole, layers=(whole.layers[0], other, *whole.layers[2:]))
    assert [row[0] for row in changed.tables()[1].rows] == ["0", "1", "2"]
