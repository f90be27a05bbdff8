"""Batches of questions: they fit into memory, and no other cut costs less time."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from conftest import LLAMA, byte_tokenizer, tiny_model
from editing import FACTS
from factsmith.core.fact import Fact
from factsmith.edit import batches, search
from factsmith.edit.batches import Size, fitting_batches
from factsmith.edit.search import find_targets
from factsmith.edit.target import TargetConfig
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

CONTEXTS = ["{}", "Paris. {}", "The king is in Brazil. {}", "Zürich {}"]


def peak(run: Callable[[], Any]) -> int:
    """The most bytes held at a time, in addition to those held before."""
    gc.collect()  # otherwise garbage of earlier work is freed in between
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        run()
    held = most = 0
    for event in sorted(
        (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):  # type: ignore[union-attr]
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_batch_stays_within_its_memory(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = (
        {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 64, "vocab_size": 4000}
        if family == "gpt2"
        else {
            **LLAMA,
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "intermediate_size": 384,
            "vocab_size": 4000,
        }
    )
    lm = wrap(tiny_model(family, **changes), byte_tokenizer(bos=family != "gpt2"))
    facts = [
        Fact(f"{fact.subject} {i}", fact.prompt, fact.target) for i in range(6) for fact in FACTS
    ]
    sizes: list[int] = []

    def recorded(*arguments: Any) -> list[list[int]]:
        groups = fitting_batches(*arguments)
        sizes.extend(map(len, groups))
        return groups

    monkeypatch.setattr(search, "fitting_batches", recorded)
    config = TargetConfig(steps=2, stop_loss=0)
    taken = {}
    for budget in (2**40, 20_000_000):
        sizes.clear()
        taken[budget] = peak(
            lambda budget=budget: find_targets(lm, facts, 0, config, CONTEXTS, memory=budget)
        )
        assert sum(sizes) == len(facts)
    assert taken[20_000_000] <= 20_000_000 < taken[2**40], "all facts at once would not fit"
    assert max(sizes) > 1 and taken[20_000_000] > 5_000_000, "the budget is used"


def test_batches_cost_as_little_as_any_cut(tiny_gpt2: LanguageModel) -> None:
    """Compared with every way to cut the sorted list."""
    sizes = [Size(7, width, width + 9, 8) for width in (5, 2, 12, 2, 3, 13, 2, 4, 6)]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i].width)

    def cost(groups: Sequence[Sequence[int]]) -> int:
        return sum(
            20 + sum(sizes[i].rows for i in group) * max(sizes[i].width for i in group)
            for group in groups
        )

    cuts = []
    for mask in range(2 ** (len(order) - 1)):
        at = [0, *(i + 1 for i in range(len(order) - 1) if mask >> i & 1), len(order)]
        cuts.append([order[a:b] for a, b in itertools.pairwise(at)])
    groups = fitting_batches(sizes, tiny_gpt2, 0, 2**40)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert cost(groups) == min(map(cost, cuts)) < min(cost([order]), cost([[i] for i in order]))
    alone = batches.batch_bytes(sizes[0], tiny_gpt2, 0)
    small = fitting_batches(sizes, tiny_gpt2, 0, alone)
    assert max(map(len, small)) < max(map(len, groups))
    assert fitting_batches(sizes, tiny_gpt2, 0, 1) == [[i] for i in order], "one is always tried"
