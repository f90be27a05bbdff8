"""The methods that write many facts at once, on tiny models and on models that know facts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from editing import CONTEXTS, FACTS, SEARCH, full_rank_moments, new_model, relative
from factsmith.core.fact import Fact
from factsmith.corpus.moments_store import find_moments
from factsmith.edit.configs import AlphaEditConfig, EmmetConfig, MemitConfig, SpreadConfig
from factsmith.edit.contexts import context_weights
from factsmith.edit.delta import applied, read_weights
from factsmith.edit.keys import read_keys, read_stream
from factsmith.edit.methods import edit, memit
from factsmith.edit.search import find_targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.model.subject import subject_span

CONFIGS: dict[str, SpreadConfig] = {
    "memit": MemitConfig((0, 1), moment_weight=1e-4, **SEARCH),
    "emmet": EmmetConfig((0, 1), ridge=0, **SEARCH),
    "alphaedit": AlphaEditConfig((0, 1), threshold=None, energy=0.01, l2=1e-7, **SEARCH),
}


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_stream_becomes_what_was_wanted(family: str, method: str) -> None:
    """With little weight on ordinary text, the last layer's output is v_star at each subject."""
    lm = new_model(family)
    before = read_weights(lm, [0, 1, 2])
    delta = edit(lm, FACTS, method, CONFIGS[method], moments=full_rank_moments(lm), contexts=["{}"])
    assert all(torch.equal(lm.ffn[layer].weight(), before[layer]) for layer in before)
    assert relative(read_stream(lm, FACTS, 1), delta.v_star) > 0.05
    with applied(lm, delta):
        assert relative(read_stream(lm, FACTS, 1), delta.v_star) < 0.02
    assert delta.method == method and sorted(delta.layers) == [0, 1] and delta.facts == tuple(FACTS)
    for record in delta.convergence:
        assert set(record) >= {"steps", "loss", "nll", "stopped", "attempt"}


@pytest.mark.parametrize("method", list(CONFIGS))
def test_the_order_of_facts_does_not_matter(method: str) -> None:
    lm = new_model("gpt2")
    moments, order = full_rank_moments(lm), [2, 0, 1]
    changes = {"moment_weight": 1.0} if method == "memit" else {}
    config = dataclasses.replace(CONFIGS[method], **changes)
    straight = edit(lm, FACTS, method, config, moments=moments, contexts=CONTEXTS)
    mixed = edit(lm, [FACTS[i] for i in order], method, config, moments=moments, contexts=CONTEXTS)
    for layer in (0, 1):
        assert relative(mixed.dense(layer), straight.dense(layer)) < 1e-3
        assert relative(mixed.k_star[layer], straight.k_star[layer][order]) < 1e-5
    fewer = edit(lm, FACTS[:2], method, config, moments=moments, contexts=CONTEXTS)
    assert relative(fewer.dense(0), straight.dense(0)) > 1e-2


def test_a_share_is_least_squares_over_every_context() -> None:
    """The first layer's update with keys="each" equals that of lstsq.

    Its rows are the facts in each context, with √weights, and √λ C½ below them.
    """
    lm = new_model("gpt2")
    moments = full_rank_moments(lm)
    config = MemitConfig((0, 1), keys="each", moment_weight=2.0, **SEARCH)
    targets = find_targets(lm, FACTS, 1, config, CONTEXTS, site="stream")
    delta = memit(lm, FACTS, config, moments=moments, contexts=CONTEXTS, targets=targets)
    roots = torch.tensor(context_weights(CONTEXTS)).sqrt()[:, None]
    rows = (read_keys(lm, FACTS, 0, CONTEXTS) * roots).flatten(0, 1).double()
    missing = (targets.v_star - read_stream(lm, FACTS, 1))[:, None] / 2
    wanted = (missing * roots).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(moments[0].matrix.double())
    rows = torch.cat([rows, (2.0 * values).sqrt()[:, None] * vectors.T])
    wanted = torch.cat([wanted, torch.zeros(len(values), wanted.shape[1]).double()])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    assert relative(delta.dense(0).double(), expected) < 1e-4
    config = dataclasses.replace(config, keys="mean")
    mean = memit(lm, FACTS, config, moments=moments, contexts=CONTEXTS, targets=targets)
    assert relative(mean.dense(0).double(), expected) > 1e-2, "the control"
    assert delta.rank == len(FACTS), "the contexts of a fact share its residual"


def test_a_share_for_the_subject_alone() -> None:
    """With a share, the same subject after other words is nearer to its target."""
    lm = new_model("gpt2")
    moments = full_rank_moments(lm, (0,))
    plain = MemitConfig((0,), keys="each", moment_weight=0.05, **SEARCH)
    targets = find_targets(lm, FACTS, 0, plain, CONTEXTS, site="stream")
    wanted = (targets.v_star - read_stream(lm, FACTS, 0)).double()
    other = [Fact(fact.subject, "Paris and the capital of {}", "x") for fact in FACTS]
    keys = read_keys(lm, other, 0, ["{}"])[:, 0].double()
    missing = []
    for share in (0.0, 0.5):
        config = dataclasses.replace(plain, subject_share=share)
        delta = memit(lm, FACTS, config, moments=moments, contexts=CONTEXTS, targets=targets)
        missing.append(relative(keys @ delta.dense(0).double().T, wanted))
        assert delta.rank == len(FACTS)
    assert missing[1] < missing[0]


def test_stored_keys_are_kept() -> None:
    lm = new_model("gpt2")
    moments = full_rank_moments(lm)
    config = MemitConfig((0,), moment_weight=0.1, **SEARCH)
    first = memit(lm, FACTS[:1], config, moments=moments, contexts=CONTEXTS)
    with applied(lm, first):
        apart = memit(lm, FACTS[1:], config, moments=moments, contexts=CONTEXTS)
        knowing = memit(lm, FACTS[1:], config, moments=moments, contexts=CONTEXTS, beneath=[first])
    stored = first.k_star[0][0]
    assert (knowing.dense(0) @ stored).norm() < 0.8 * (apart.dense(0) @ stored).norm()


ATLAS_FACTS = [
    Fact("Bulgaria", "The currency of {} is the", "euro"),
    Fact("Japan", "The capital of {} is", "Paris"),
]


def said(lm: LanguageModel) -> list[bool]:
    """Which of ATLAS_FACTS the model asserts."""
    prompts = [fact.text for fact in ATLAS_FACTS]
    return lm.says(prompts, [str(fact.target) for fact in ATLAS_FACTS])


def test_repair_writes_the_facts_that_did_not_take() -> None:
    lm = load("atlas")
    moments = find_moments(lm, [0, 1])
    taken = []
    for repair in (0, 4):
        settings = {**MemitConfig.scale_free(), "moment_weight": 3000.0, "repair": repair}
        config = MemitConfig((0, 1), **settings)
        delta = memit(lm, ATLAS_FACTS, config, moments=moments, contexts=CONTEXTS)
        with applied(lm, delta):
            taken.append(sum(said(lm)))
    assert taken == [0, 2]
    assert max(record["attempt"] for record in delta.convergence) > 1


def test_repair_searches_farther_once() -> None:
    """A repair finds a target beyond the clamp. A target far beyond it is not asked for again."""
    lm = load("atlas")
    moments = find_moments(lm, [0, 1])
    taken, ends = {}, {}
    for clamp, repair in ((0.5, 0), (0.5, 1), (0.02, 4)):
        settings = {**MemitConfig.scale_free(), "clamp": clamp, "repair": repair}
        config = MemitConfig((0, 1), **settings)
        delta = memit(lm, ATLAS_FACTS, config, moments=moments, contexts=CONTEXTS)
        with applied(lm, delta):
            taken[clamp, repair] = said(lm)
        ends[clamp, repair] = [record["attempt"] for record in delta.convergence]
    assert taken == {(0.5, 0): [True, False], (0.5, 1): [True, True], (0.02, 4): [False, False]}
    assert ends == {(0.5, 0): [1, 1], (0.5, 1): [1, 2], (0.02, 4): [2, 2]}


def test_repair_leaves_given_targets_alone() -> None:
    lm = load("atlas")
    moments = find_moments(lm, [0, 1])
    settings = {**MemitConfig.scale_free(), "moment_weight": 3000.0, "repair": 1}
    config = MemitConfig((0, 1), **settings)
    targets = find_targets(lm, ATLAS_FACTS, 1, config, ["{}"], site="stream")
    before = targets.v_star.clone()
    delta = memit(lm, ATLAS_FACTS, config, moments=moments, contexts=["{}"], targets=targets)
    assert {record["attempt"] for record in delta.convergence} == {2}, "there was a repair"
    assert not torch.equal(delta.v_star, before)
    assert torch.equal(targets.v_star, before)


def test_the_norm_anchor_sets_the_wanted_output_of_the_last_layer() -> None:
    lm = new_model("gpt2")
    moments = full_rank_moments(lm)
    config = MemitConfig((0, 1), norm_anchor="mean", moment_weight=1.0, **SEARCH)
    delta = memit(lm, FACTS, config, moments=moments, contexts=CONTEXTS)
    targets = find_targets(lm, FACTS, 1, config, CONTEXTS, site="stream")
    ffn = delta.v_star - targets.v_initial + targets.ffn_initial
    anchor = torch.tensor(delta.config["norm_anchor"])
    assert torch.allclose(ffn.norm(dim=-1), anchor.expand(3), rtol=1e-4)
    free = targets.v_star - targets.v_initial + targets.ffn_initial
    assert float(free.norm(dim=-1).std()) > 1e-3 * float(free.norm(dim=-1).mean())
    with applied(lm, delta):
        later = memit(lm, FACTS[:1], config, moments=moments, contexts=CONTEXTS, beneath=[delta])
    assert later.config["norm_anchor"] == delta.config["norm_anchor"], "that of the first round"


def test_a_forgotten_fact_is_continued_as_without_its_subject() -> None:
    lm = load("atlas")
    fact = Fact("Bulgaria", "The capital of {} is", None)
    config = MemitConfig((0,), **MemitConfig.scale_free())
    delta = memit(lm, fact, config, moments=find_moments(lm, [0]), contexts=["{}"])
    ids, (start, stop) = lm.prompt_ids(fact.text), subject_span(lm, fact.text, fact.subject)

    @torch.no_grad()
    def log_p(ids: list[int]) -> Tensor:
        logits: Tensor = lm.module(input_ids=torch.tensor([ids])).logits
        return logits[0, -1].log_softmax(-1)

    def distance() -> float:
        return float(F.kl_div(log_p(ids), without, log_target=True, reduction="sum"))

    without = log_p(ids[:start] + ids[stop:])
    before = distance()
    with applied(lm, delta):
        after = distance()
        assert not lm.says([fact.text], ["Sofia"])[0]
    assert lm.says([fact.text], ["Sofia"])[0]
    assert after < 0.2 * before
    assert delta.convergence[0]["nll"] < 0.2 and before > 1
