"""Arguments of an edit that cannot be used are refused in words, and nothing changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from conftest import LLAMA, TEXTS, byte_tokenizer, tiny_model
from editing import CONTEXTS, FACTS, SEARCH, full_rank_moments, new_model
from factsmith.core.errors import (
    FactsmithError,
    FingerprintError,
    InputError,
    LayerError,
    UnsupportedModelError,
)
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.edit.configs import MemitConfig, RomeConfig
from factsmith.edit.delta import Delta, applied, read_weights
from factsmith.edit.methods import memit, rome
from factsmith.edit.search import find_targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

CONFIG = MemitConfig((0, 1), moment_weight=1e-4, **SEARCH)
ROME = RomeConfig(layer=1, **SEARCH)


def test_missing_moments_and_layers_are_named() -> None:
    lm = new_model("gpt2")
    moments = full_rank_moments(lm)
    with pytest.raises(InputError, match="no second moment for layer 1") as refused:
        memit(lm, FACTS, CONFIG, moments={0: moments[0]}, contexts=CONTEXTS)
    assert refused.value.argument == "moments"
    with pytest.raises(LayerError, match="layer 7"):
        memit(lm, FACTS, MemitConfig((0, 7)), moments=moments, contexts=CONTEXTS)


def test_targets_are_those_of_the_facts_and_of_the_place() -> None:
    lm = new_model("gpt2")
    config = MemitConfig((0, 1), **SEARCH)
    stream = find_targets(lm, FACTS, 1, config, CONTEXTS, site="stream")
    moments = full_rank_moments(lm)

    def write(facts: list[Fact], config: MemitConfig, targets: Any = stream) -> Delta:
        return memit(lm, facts, config, moments=moments, contexts=CONTEXTS, targets=targets)

    assert torch.equal(write(FACTS, config).v_star, stream.v_star)
    for facts, changed, targets, words in (
        (FACTS[::-1], config, stream, "another order"),
        (FACTS[:2], config, stream, "those of 3 other facts"),
        (FACTS, config.at([0]), stream, "at layer 1; expected .* at layer 0"),
        (FACTS, config, find_targets(lm, FACTS, 1, config, CONTEXTS), 'site "ffn"'),
        (FACTS, config, 5, "targets is a int"),
    ):
        with pytest.raises(InputError, match=words):
            write(facts, changed, targets)


def test_arguments_of_another_kind_are_refused_in_words() -> None:
    lm = new_model("gpt2")
    moments = full_rank_moments(lm)
    for changes, words in (
        ({"config": RomeConfig(layer=1)}, "memit takes a MemitConfig; got a RomeConfig"),
        ({"beneath": [1]}, "beneath holds a int"),
        ({"beneath": 1}, "must be a list of Deltas"),
        ({"moments": 5}, "moments is a int"),
    ):
        arguments: dict[str, Any] = {"config": CONFIG, "moments": moments, "contexts": CONTEXTS}
        with pytest.raises(InputError, match=words):
            memit(lm, FACTS, **{**arguments, **changes})


def test_beneath_may_be_one_delta_and_may_have_its_old_name() -> None:
    lm = new_model("gpt2")
    moments = full_rank_moments(lm)
    first = memit(lm, FACTS[:1], CONFIG, moments=moments, contexts=CONTEXTS)
    alone, listed, old_name = (
        memit(lm, FACTS[1:], CONFIG, moments=moments, contexts=CONTEXTS, **options)
        for options in ({"beneath": first}, {"beneath": [first]}, {"earlier": [first]})
    )
    assert torch.equal(alone.dense(1), listed.dense(1))
    assert torch.equal(old_name.dense(1), listed.dense(1))


def test_second_moments_of_another_model_or_of_several_texts_are_refused(
    tiny_gpt2: LanguageModel,
) -> None:
    fact = Fact("Edwin", "{} is a", "king")
    config = MemitConfig((0, 1), steps=2)
    moments = second_moments(tiny_gpt2, TEXTS, [0, 1])
    first = memit(tiny_gpt2, fact, config, moments=moments, contexts=["{}"])
    foreign = {
        layer: dataclasses.replace(moment, fingerprint="0" * 64)
        for layer, moment in moments.items()
    }
    other = second_moments(tiny_gpt2, TEXTS[1:], [1])
    with applied(tiny_gpt2, first):
        more = Fact("Paris", "{} is in", "Brazil")
        delta = memit(tiny_gpt2, more, config, moments=moments, contexts=["{}"], beneath=[first])
        assert delta.rank == 1
        with pytest.raises(FingerprintError, match="without its edits"):
            memit(tiny_gpt2, more, config, moments=foreign, contexts=["{}"], beneath=[first])
    words = f"layer 0 from {moments[0].corpus[:12]}, layer 1 from {other[1].corpus[:12]}"
    with pytest.raises(InputError, match=words):
        memit(tiny_gpt2, fact, config, moments={0: moments[0], **other}, contexts=["{}"])


def test_what_cannot_be_used_is_refused_in_words(tiny_gpt2: LanguageModel) -> None:
    fact, config = Fact("Edwin", "{} is a", "king"), MemitConfig((0, 1), steps=2)
    moments = second_moments(tiny_gpt2, TEXTS, [0, 1])
    wrong: list[dict[str, Any]] = [
        {"facts": None},
        {"moments": {0: torch.eye(128), 1: moments[1]}},
        {"contexts": ["{}", 3]},
        {"contexts": None, "seed": "x"},
    ]
    for change in wrong:
        arguments: dict[str, Any] = {
            "facts": fact,
            "moments": moments,
            "contexts": ["{}"],
            **change,
        }
        with pytest.raises(InputError):
            memit(tiny_gpt2, arguments.pop("facts"), config, **arguments)


def test_bad_input_changes_nothing(tiny_gpt2: LanguageModel) -> None:
    moments = second_moments(tiny_gpt2, TEXTS, [1])
    before = read_weights(tiny_gpt2, range(3))
    foreign = SecondMoment.from_matrix(torch.eye(7), count=1)
    alike = [
        Fact(subject, "The brother of {} is", target)
        for subject, target in (("André", "Paul"), ("Andre\u0301", "Luc"))
    ]
    cases: list[tuple[type[FactsmithError], str, dict[str, Any]]] = [
        (LayerError, "layers 0 to 2", {"config": RomeConfig(layer=9)}),
        (InputError, r"second_moments\(lm, texts, \[2\]\)", {"config": RomeConfig(layer=2)}),
        (FingerprintError, "another model", {"moments": foreign}),
        (InputError, "at least one", {"facts": []}),
        (InputError, "str", {"facts": ["a fact"]}),
        (InputError, "bare prompt", {"contexts": ["Paris. {}"]}),
        (InputError, "two targets for one prompt", {"facts": alike}),
    ]
    for error, words, change in cases:
        usual = {"facts": FACTS[0], "config": ROME, "moments": moments, "contexts": CONTEXTS}
        arguments = usual | change
        with pytest.raises(error, match=words):
            rome(tiny_gpt2, arguments.pop("facts"), arguments.pop("config"), **arguments)
        assert all(torch.equal(w, tiny_gpt2.ffn[layer].weight()) for layer, w in before.items())


def test_mixture_of_experts_is_refused() -> None:
    config = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
    lm = wrap(tiny_model("mixtral", **config), byte_tokenizer(bos=True))
    moment = SecondMoment.from_matrix(torch.eye(48), count=1)
    with pytest.raises(UnsupportedModelError, match="mixture"):
        rome(lm, FACTS[0], ROME, moments=moment, contexts=CONTEXTS)
    with pytest.raises(UnsupportedModelError, match="mixture"):
        second_moments(lm, TEXTS, [1])


def test_second_moments_that_cannot_be_made_are_refused(tiny_gpt2: LanguageModel) -> None:
    for count in (float("nan"), "x", True):
        with pytest.raises(InputError, match="count is"):
            SecondMoment.from_matrix(torch.eye(3), count=count)  # type: ignore[arg-type]
    assert torch.equal(SecondMoment.from_matrix(np.eye(3), count=7).matrix, torch.eye(3).double())
    for batch in ("5", None, 0, -1, float("nan")):
        with pytest.raises(InputError, match="batch_tokens"):
            second_moments(tiny_gpt2, TEXTS, [0], batch_tokens=batch)  # type: ignore[arg-type]
