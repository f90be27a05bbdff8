"""Targets searched in parts: the same bits wherever the parts run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from factsmith.core.executor import Executor, Local, running_on
from factsmith.core.fact import Fact
from factsmith.corpus.second_moment import SecondMoment
from factsmith.edit import keys, spread
from factsmith.edit import search as search_module
from factsmith.edit.batches import Size, fitting_batches
from factsmith.edit.configs import RomeConfig
from factsmith.edit.delta import applied
from factsmith.edit.methods import edit
from factsmith.edit.search import find_targets
from factsmith.edit.target import TargetConfig, Targets
from factsmith.model.language_model import LanguageModel

pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")

from executors import Sending

FACTS = [
    Fact(subject, f"{{}} {rest}", target)
    for subject, rest, target in [
        ("Paris", "is the capital of", "Spain"),
        ("The old harbour of Marseille", "lies in", "Italy"),
        ("Rome", "is a city in the middle of the country of", "France"),
        ("Kyoto", "is in", "China"),
        ("Lima", "is the capital of", "Chile"),
    ]
]
CONTEXTS = ["{}", "Well then. {}"]
CONFIG = TargetConfig(steps=4, scale="auto")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each part two facts at most."""
    monkeypatch.setattr(search_module, "_MOST", 2)


def searched(executor: Executor, lm: LanguageModel, **options: object) -> Targets:
    with running_on(executor):
        return find_targets(lm, FACTS, 1, CONFIG, CONTEXTS, **options)  # type: ignore[arg-type]


def equal(one: Targets, other: Targets) -> bool:
    """Return whether targets are the same bits."""
    names = ("v_star", "v_initial", "k_star", "k_prompt", "ffn_initial")
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
    return same and one.convergence == other.convergence and one.facts == other.facts


@pytest.mark.usefixtures("few")
def test_parts_are_the_same_bits_elsewhere(tiny_lm: LanguageModel) -> None:
    executor, done = Sending(), list[int]()
    apart = searched(executor, tiny_lm, progress=done.append)
    assert executor.maps[0] >= 3  # at most two facts each
    assert equal(apart, searched(Local(cuts=True), tiny_lm))
    assert apart.v_star.device == tiny_lm.device
    assert done == sorted(done)
    assert done[-1] == len(FACTS)
    whole = searched(Local(), tiny_lm)
    assert torch.allclose(apart.v_star, whole.v_star, atol=1e-3)
    assert apart.facts == whole.facts == tuple(FACTS)


@pytest.mark.usefixtures("few")
def test_workers_get_the_model_with_its_patch(tiny_gpt2: LanguageModel) -> None:
    moments = {1: SecondMoment.from_matrix(torch.eye(tiny_gpt2.ffn[1].d_ff), count=1000)}
    config = RomeConfig(layer=1, steps=3)
    delta = edit(tiny_gpt2, FACTS[:1], "rome", config, moments=moments, contexts=["{}"])
    plain, executor = searched(Sending(), tiny_gpt2), Sending()
    with applied(tiny_gpt2, delta):
        patched = searched(executor, tiny_gpt2)
        assert equal(patched, searched(Local(cuts=True), tiny_gpt2))
        assert executor.sent == [tiny_gpt2.fingerprint]
    assert not torch.equal(patched.v_star, plain.v_star)
    assert executor.sent != [tiny_gpt2.fingerprint]


def test_a_single_part_is_not_sent(tiny_gpt2: LanguageModel) -> None:
    executor = Sending()
    with running_on(executor):
        find_targets(tiny_gpt2, FACTS[:1], 1, CONFIG, CONTEXTS)
    assert not executor.maps
    searched(executor, tiny_gpt2)  # of two widths
    assert executor.maps


def test_facts_to_forget_have_parts_too(tiny_gpt2: LanguageModel, few: None) -> None:
    facts = [*FACTS[:3], *(dataclasses.replace(fact, target=None) for fact in FACTS[3:])]
    executors: list[Executor] = [Sending(), Local(cuts=True)]
    results = []
    for executor in executors:
        with running_on(executor):
            results.append(find_targets(tiny_gpt2, facts, 1, CONFIG, CONTEXTS))
    assert equal(*results)
    assert results[0].facts == tuple(facts)


def test_no_batch_has_more_than_the_most(tiny_gpt2: LanguageModel) -> None:
    sizes = [Size(2, 4 + i % 3, 9, 2) for i in range(20)]
    batches = fitting_batches(sizes, tiny_gpt2, 1, 2**40, 3)
    assert sorted(i for batch in batches for i in batch) == list(range(20))
    assert max(map(len, batches)) == 3
    assert max(map(len, fitting_batches(sizes, tiny_gpt2, 1, 2**40))) > 3


def read(executor: Executor, lm: LanguageModel) -> list[torch.Tensor]:
    with running_on(executor):
        return [
            keys.read_keys(lm, FACTS, 1, CONTEXTS),
            keys.read_inputs(lm, FACTS, 1, CONTEXTS),
            keys.read_outputs(lm, FACTS, 1),
            keys.read_stream(lm, FACTS, 1),
        ]


def test_keys_are_read_in_parts(tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_PART", 4)
    executor = Sending()
    apart, cut = read(executor, tiny_lm), read(Local(cuts=True), tiny_lm)
    assert executor.maps == [3, 3, 2, 2]
    for sent, local, whole in zip(apart, cut, read(Local(), tiny_lm), strict=True):
        assert torch.equal(sent, local)
        assert torch.allclose(sent, whole, atol=1e-5)
        assert not torch.allclose(sent, whole.flip(0), atol=1e-5)  # the order matters
    monkeypatch.setattr(keys, "_PART", 10)
    once = Sending()
    read(once, tiny_lm)
    assert not once.maps, "control: a single part is read at once"


def test_facts_are_asked_in_parts(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten = [dataclasses.replace(f, target=None, target_true=f.target) for f in FACTS[1:3]]
    facts = [FACTS[0], *forgotten, *FACTS[3:]]
    whole = spread.not_taken(tiny_gpt2, facts, ["{}"])
    assert 0 < len(whole) < len(facts), "control: some take, and some do not"
    monkeypatch.setattr(spread, "_ASKED", 2)
    executor = Sending()
    with running_on(executor):
        assert spread.not_taken(tiny_gpt2, facts, ["{}"]) == whole
        assert spread.not_taken(tiny_gpt2, [], ["{}"]) == []
    assert executor.maps == [3]
