"""The recommended method, by how many facts there are and how full the layers are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from conftest import LLAMA, byte_tokenizer, tiny_model
from factsmith.core.fact import Fact
from factsmith.edit.delta import Delta
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.patch.bench import Scratch
from factsmith.patch.outlook import MOST_FACTS, MOST_LOAD, Option, Outlook, outlook
from factsmith.patch.plan import plan
from factsmith.patch.recipe import Recipe
from workbenches import some_delta, some_rows

LAYERS = {"rome": (1,), "memit": (0, 1), "append": (1,)}
WIDTH = 128  # of a layer of the tiny model


def facts(delta: Delta, n: int) -> Delta:
    """The delta with so many facts."""
    return dataclasses.replace(
        delta,
        facts=tuple(Fact(f"subject {i}", "{} is", "x") for i in range(n)),
        v_star=delta.v_star[:1].repeat(n, 1),
        k_star={layer: key[:1].repeat(n, 1) for layer, key in delta.k_star.items()},
    )


def option(seen: Outlook, method: str) -> Option:
    return next(each for each in seen.options if each.method == method)


@pytest.mark.parametrize(
    ("n", "stored", "expected"),
    [
        (1, 0, "rome"),
        (2, 0, "memit"),
        (12, 0, "memit"),
        (13, 0, "append"),  # a load of 13 / 256
        (1, 11, "rome"),
        (1, 12, "append"),  # what is written there counts, too
        (5, 7, "memit"),
        (5, 8, "append"),
    ],
)
def test_few_facts_share_weights_and_many_get_neurons(
    tiny_gpt2: LanguageModel, n: int, stored: int, expected: str
) -> None:
    lm = tiny_gpt2
    beneath = [facts(some_delta(lm, 1), stored)] if stored else []
    apart = facts(some_delta(lm, 2, (2,)), 90)  # in another layer
    seen = outlook(lm, [*beneath, apart, some_rows(lm, 3, (0, 1), 40)], n, LAYERS)
    assert seen.recommended == expected
    load = (n + stored) / (2 * WIDTH)
    assert option(seen, "memit").load == pytest.approx(load)
    assert option(seen, "rome").load == pytest.approx((n + stored) / WIDTH)
    assert (load > MOST_LOAD) is (expected == "append")
    assert ("share nothing" in seen.reason) is (expected == "append")
    assert option(seen, "append").load is None and option(seen, "append").firing is None
    assert "recommended" in str(seen.table()) and seen.reason in str(seen.table())


def test_many_facts_at_once_get_neurons_in_wide_layers_too(tiny_gpt2: LanguageModel) -> None:
    lm = tiny_gpt2
    wide = {**LAYERS, "memit": (0, 1, 2) * 4}
    assert outlook(lm, [], MOST_FACTS + 1, wide).recommended == "append"
    assert "51 facts at once" in outlook(lm, [], MOST_FACTS + 1, wide).reason
    assert outlook(lm, [], MOST_FACTS, wide).recommended == "memit"
    assert outlook(lm, [], 0, LAYERS) == Outlook() and not Outlook().recommended


def test_false_firing_is_what_the_records_say(tiny_gpt2: LanguageModel) -> None:
    lm = tiny_gpt2
    rows = some_rows(lm, 1, (1,), n_facts=2)
    measured = dataclasses.replace(
        rows, convergence=({"false_firing": 0.001}, {"false_firing": 0.003})
    )
    append = option(outlook(lm, [measured], 4, LAYERS), "append")
    assert append.firing == pytest.approx(0.004 + 4 * 0.002) and "1.200%" in append.figure
    half = dataclasses.replace(rows, convergence=({"false_firing": 0.001}, {}))
    assert option(outlook(lm, [measured, half], 4, LAYERS), "append").firing is None


def test_a_model_that_cannot_be_widened_is_not_told_to_append(tmp_path: Path) -> None:
    shape = {
        **LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0, 2],
    }
    lm = wrap(tiny_model("qwen2_moe", **shape), byte_tokenizer(bos=True))
    layers = {"rome": (0,), "memit": (0,), "append": (1,)}
    seen = outlook(lm, [], 80, layers)
    assert seen.recommended == "memit" and "experts" in seen.reason
    assert "experts" in option(seen, "append").figure
    assert outlook(lm, [], 80, {**layers, "append": (0,)}).recommended == "append", "the control"


def test_a_plan_recommends_and_keeps_its_method(tiny_gpt2: LanguageModel) -> None:
    """A recommendation is no default: what is planned does not change."""
    lm = tiny_gpt2
    many = [Fact(f"Entity{i}", "The home of {} is", "x") for i in range(30)]
    decided = plan(Scratch(lm), many)
    assert (decided.recommended, decided.method) == ("append", "memit")
    assert option(decided.outlook, "memit").layers == decided.layers
    assert option(decided.outlook, "memit").n_bytes == decided.n_bytes
    record = decided.to_dict()
    assert record["recommended"] == "append" == record["outlook"]["recommended"]
    assert "append is recommended: with 30 facts more" in str(decided)
    json.dumps(record)
    alone = plan(Scratch(lm), many[0], Recipe("append"))
    assert (alone.recommended, alone.method) == ("rome", "append")
    assert option(alone.outlook, "append").layers == alone.layers
    assert option(alone.outlook, "append").n_bytes == alone.n_bytes


def test_what_is_written_counts_in_a_workspace(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    lm = tiny_gpt2
    fact = Fact("Entity", "The home of {} is", "x")
    with Workbench(lm, tmp_path) as bench:
        assert bench.plan(fact).recommended == "rome"
        layers = option(bench.plan(fact).outlook, "memit").layers
        full = facts(some_delta(lm, 1, layers[:1]), 40)
        revision = bench.commit(full)
        assert bench.plan(fact).recommended == "append"
        bench.revert(revision.id)
        assert bench.plan(fact).recommended == "rome"
