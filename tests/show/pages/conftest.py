"""Indexes of tiny models, and texts that try to act."""

from __future__ import annotations

import pytest
import torch

from conftest import LLAMA, TEXTS, byte_tokenizer, tiny_model
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.read.cards import Card, FactUse
from factsmith.read.fact_adds import FactAdds
from factsmith.read.index import Index, build_index
from factsmith.read.triggers import Trigger
from show.html import FACTS, NASTY


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
