"""The margin search next to independent computations.

They are derivatives by finite differences, quadratic problems solved by trying every set of active
constraints, and the whole model with δ added by a hook.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from editing import CONTEXTS, FACTS, new_model, relative
from factsmith.core.errors import InputError, NumericsError
from factsmith.core.fact import Fact
from factsmith.edit import batches, margin
from factsmith.edit.configs import MemitConfig, RomeConfig
from factsmith.edit.keys import Site
from factsmith.edit.margin import MarginSearch, margins_of, nearest
from factsmith.edit.questions import tokenize_facts
from factsmith.edit.search import find_targets
from factsmith.edit.target import TargetConfig, Targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.model.subject import subject_span
from factsmith.model.tokens import target_ids

ATLAS_FACTS = [
    Fact("Bulgaria", "The currency of {} is the", "euro"),
    Fact("Fiat 127", "The maker of {} is", "Toyota"),
    Fact("Sofia", "{} is a city in", "Romania"),
]
ATLAS_CONTEXTS = ["{}", "It was said. {}", "In the old town. {}"]
CONFIG = TargetConfig(scale="auto", steps=80, lr=0.05, clamp=2.0, stop_loss=0.02)


@pytest.fixture(scope="module")
def atlas() -> LanguageModel:
    return load("atlas")


def plain_losses(
    lm: LanguageModel,
    fact: Fact,
    layer: int,
    contexts: list[str],
    delta: Tensor,
    site: Site = "stream",
) -> list[float]:
    """−log p of the target in each context, by the whole model with δ added in a hook."""
    changed = lm.ffn[layer].down if site == "ffn" else lm.layers[layer]
    target = target_ids(lm.tokenizer, fact.text, str(fact.target))
    losses = []
    for context in contexts:
        text = context.replace("{}", fact.text)
        column = subject_span(lm, text, fact.subject)[1] - 1
        ids = list(lm.tokenizer(text)["input_ids"])

        def change(module: Any, args: Any, output: Any, column: int = column) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            added = states.reshape(1, -1, len(delta)).clone()
            added[0, column] += delta
            added = added.view_as(states)
            return (added, *output[1:]) if isinstance(output, tuple) else added

        handle = changed.register_forward_hook(change)
        with torch.no_grad():
            log_p = lm.module(input_ids=torch.tensor([ids + target[:-1]])).logits[0].log_softmax(-1)
        handle.remove()
        each = [float(log_p[len(ids) - 1 + i, token]) for i, token in enumerate(target)]
        losses.append(-sum(each) / len(each))
    return losses


def test_margins_and_their_derivative() -> None:
    nll = torch.tensor([1e-3, 0.02, 0.7, 5.0, 90.0, 300.0], dtype=torch.float64)
    values, rates = margins_of(nll)
    for x, value, rate in zip(nll.tolist(), values.tolist(), rates.tolist(), strict=True):
        p = math.exp(-x)
        assert value == pytest.approx(math.log(p) - math.log1p(-p), rel=1e-9)
        step = 1e-4 * x
        ends = [
            margins_of(torch.tensor([at], dtype=torch.float64))[0] for at in (x + step, x - step)
        ]
        assert rate == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-5)
    exact, rate = margins_of(torch.zeros(1))
    assert torch.isfinite(exact).all() and torch.isfinite(rate).all(), "a probability of one"


def by_every_set(slopes: Tensor, wanted: Tensor) -> Tensor:
    """The shortest s with J s ≥ wanted: the best over every set of constraints that are equal."""
    best = None
    for size in range(len(wanted) + 1):
        for chosen in itertools.combinations(range(len(wanted)), size):
            rows = slopes[list(chosen)]
            step = torch.linalg.pinv(rows) @ wanted[list(chosen)] if size else 0 * slopes[0]
            if bool((slopes @ step >= wanted - 1e-9).all()) and (
                best is None or step.norm() < best.norm()
            ):
                best = step
    assert best is not None
    return best


def test_the_step_is_the_shortest_that_reaches_every_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(margin, "_SOFTNESS", 0.0)
    draw = torch.Generator().manual_seed(0)
    slopes = torch.randn(20, 4, 9, generator=draw, dtype=torch.float64)
    slopes[:, 1:] += 0.7 * slopes[:, :1]  # the contexts of a fact ask for similar changes
    wanted = torch.randn(20, 4, generator=draw, dtype=torch.float64)
    known = torch.ones(20, 4, dtype=torch.bool)
    weights = nearest(slopes, wanted, known, sweeps=2000)
    steps = (weights[..., None] * slopes).sum(1)
    sizes = set()
    for i in range(20):
        expected = by_every_set(slopes[i], wanted[i])
        torch.testing.assert_close(steps[i], expected, rtol=1e-5, atol=1e-6)
        sizes.add(int((weights[i] > 1e-9).sum()))
    assert len(sizes) > 2, "some goals are met already, and some are not"
    equal = torch.linalg.pinv(slopes) @ wanted[..., None]
    assert float((equal[..., 0] - steps).norm(dim=-1).max()) > 0.1, "equations are another problem"
    known[:, 2:] = False
    fewer = (nearest(slopes, wanted, known, sweeps=2000)[..., None] * slopes).sum(1)
    torch.testing.assert_close(
        fewer[0], by_every_set(slopes[0, :2], wanted[0, :2]), rtol=1e-5, atol=1e-6
    )


def test_the_metric_is_that_of_dense_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest step under M is the shortest one after a change of coordinates."""
    monkeypatch.setattr(margin, "_SOFTNESS", 0.0)
    draw = torch.Generator().manual_seed(3)
    rows = 2 * torch.randn(1, 3, 7, generator=draw, dtype=torch.float64)
    slopes = torch.randn(1, 4, 7, generator=draw, dtype=torch.float64)
    wanted = torch.randn(1, 4, generator=draw, dtype=torch.float64)
    metric = margin._Metric(rows)
    dense = torch.eye(7, dtype=torch.float64) + rows[0].T @ rows[0]
    ascent = metric.solve(slopes)
    torch.testing.assert_close(ascent[0], slopes[0] @ torch.linalg.inv(dense))
    known = torch.ones(1, 4, dtype=torch.bool)
    weights = nearest(slopes, wanted, known, ascent, sweeps=2000)
    step = (weights[..., None] * ascent)[0].sum(0)
    half = torch.linalg.cholesky(dense)  # M = L Lᵀ, so s = L⁻ᵀ t costs ½ ‖t‖²
    whitened = torch.linalg.solve_triangular(half, slopes[0].T, upper=False).T
    expected = torch.linalg.solve(half.T, by_every_set(whitened, wanted[0]))
    torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-6)
    plain = by_every_set(slopes[0], wanted[0])
    assert float((step - plain).norm()) > 0.05, "the metric matters"
    nothing = margin._Metric(torch.zeros(2, 0, 7))
    assert torch.equal(nothing.solve(slopes.expand(2, 4, 7)), slopes.expand(2, 4, 7))


@pytest.mark.parametrize("site", ["ffn", "stream"])
def test_the_guards_model_is_the_measured_kl(atlas: LanguageModel, site: Site) -> None:
    """½ ‖G δ‖² is the KL of a small δ, where G comes from many samples."""
    questions = tokenize_facts(atlas, ATLAS_FACTS[:1], ATLAS_CONTEXTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(margin, "_SAMPLES", 600)
        search = MarginSearch(atlas, questions, 1, CONFIG, site, 0)
    draw = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(5):
        delta = torch.randn(1, atlas.d_model, generator=draw)
        delta *= 0.05 * search.length / delta.norm()
        after = search._guard_logits(search.guards, delta).log_softmax(-1)
        kl = float((after.exp() * (after - search.before)).sum())
        ratios.append(0.5 * float((search.sampled[0] @ delta[0]).square().sum()) / kl)
    assert 0.8 < sum(ratios) / 5 < 1.25, ratios
    # The measured gradient is met where δ is no longer small.
    delta = torch.randn(1, atlas.d_model, generator=draw)
    state = margin._State.start(search.limit, len(ATLAS_CONTEXTS), atlas.d_model)
    state.best = 0.5 * search.length * delta / delta.norm()
    weight = (margin._GUARD * CONFIG.kl_factor) ** 0.5 * search.length
    rows = search._metric(state).rows[0] / float(weight)
    ends = [
        search._guard_logits(search.guards, (1 + e) * state.best).log_softmax(-1)
        for e in (0.01, -0.01)
    ]
    above, below = (float((end.exp() * (end - search.before)).sum()) for end in ends)
    modelled = float((rows @ state.best[0].double()).square().sum())
    fisher = float((search.sampled[0] @ state.best[0]).square().sum())
    expected = max((above - below) / 0.02, fisher)
    assert modelled == pytest.approx(expected, rel=0.05)


def test_the_guard_changes_less_than_without_its_term(atlas: LanguageModel) -> None:
    free = TargetConfig(**{**vars(CONFIG), "kl_factor": 0.0})
    kept, lost = (
        find_targets(atlas, ATLAS_FACTS, 1, config, ATLAS_CONTEXTS, site="stream")
        for config in (CONFIG, free)
    )
    assert all(record["stopped"] == "loss" for record in (*kept.convergence, *lost.convergence))
    with_term, without = (sum(c["kl"] for c in t.convergence) for t in (kept, lost))
    assert with_term < 0.6 * without


def test_opposite_contexts_do_not_make_a_step_endless() -> None:
    slopes = torch.tensor([[[1.0, 0.0], [-1.0, 1e-4]]])
    weights = nearest(slopes, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert float((weights[..., None] * slopes).sum(1).norm()) < 10
    assert float((torch.linalg.pinv(slopes) @ torch.ones(1, 2, 1)).norm()) > 1e4


@pytest.mark.parametrize("site", ["ffn", "stream"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_slopes_equal_finite_differences(name: str, site: Site) -> None:
    lm = new_model(name)
    questions = tokenize_facts(lm, FACTS[:2], CONTEXTS)
    config = TargetConfig(scale="auto", steps=2)
    search = MarginSearch(lm, questions, 1, config, site, 0)
    state = margin._State.start(search.limit, len(CONTEXTS), lm.d_model)
    state.whole[:] = True
    draw = torch.Generator().manual_seed(1)
    state.delta = 0.3 * torch.randn(2, lm.d_model, generator=draw)
    answers = search._evaluate(state)
    nll = search._by_context(answers, state)
    search._learn(state, answers, nll, state.active)
    assert not answers, "the graph is freed"
    exact = new_model(name)
    exact.module.double()
    for i, fact in enumerate(FACTS[:2]):
        delta = state.delta[i].double()
        direction = torch.randn(lm.d_model, generator=draw, dtype=torch.float64)
        losses = [
            torch.tensor(
                plain_losses(exact, fact, 1, CONTEXTS, delta + e * direction, site),
                dtype=torch.float64,
            )
            for e in (0, 2e-2, -2e-2)
        ]
        torch.testing.assert_close(nll[i].double(), losses[0], rtol=1e-5, atol=1e-5)
        slope = (margins_of(losses[1])[0] - margins_of(losses[2])[0]) / 4e-2
        computed = state.slopes[i].double() @ direction
        torch.testing.assert_close(computed, slope, rtol=3e-3, atol=2e-5)
        another = state.slopes[1 - i].double() @ direction
        assert float((another - slope).abs().max()) > 3e-4, "those of another fact differ"


@pytest.mark.parametrize("site", ["stream", "ffn"])
def test_targets_are_reached_in_few_steps(atlas: LanguageModel, site: Site) -> None:
    targets = find_targets(atlas, ATLAS_FACTS, 1, CONFIG, ATLAS_CONTEXTS, site=site)
    adam = find_targets(
        atlas,
        ATLAS_FACTS,
        1,
        TargetConfig(**{**vars(CONFIG), "optimizer": "adam"}),
        ATLAS_CONTEXTS,
        site=site,
    )
    for i, fact in enumerate(ATLAS_FACTS):
        record, delta = targets.convergence[i], targets.v_star[i] - targets.v_initial[i]
        losses = plain_losses(atlas, fact, 1, ATLAS_CONTEXTS, delta, site)
        assert sum(losses) / len(losses) == pytest.approx(record["nll"], abs=1e-3)
        assert record["nll"] < 0.02 and record["stopped"] == "loss"
        before = plain_losses(atlas, fact, 1, ATLAS_CONTEXTS, torch.zeros_like(delta), site)
        assert min(before) > 1, "the model did not say it before"
        assert float(delta.norm()) == pytest.approx(record["norm"], rel=1e-4)
        assert record["norm"] <= record["limit"] * (1 + 1e-5) and record["kl"] > 0
    steps, usual = (sum(c["steps"] for c in t.convergence) for t in (targets, adam))
    assert steps < usual / 2


def same(a: Targets, b: Targets, row: int) -> None:
    assert relative(a.v_star[row] - a.v_initial[row], b.v_star[0] - b.v_initial[0]) < 1e-3
    for name in ("v_initial", "k_star", "k_prompt", "ffn_initial"):
        assert relative(getattr(a, name)[row], getattr(b, name)[0]) < 1e-4
    for name in ("steps", "stopped"):
        assert a.convergence[row][name] == b.convergence[0][name]
    assert a.convergence[row]["kl"] == pytest.approx(b.convergence[0]["kl"], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("site", ["stream", "ffn"])
def test_batch_equals_one_by_one(
    atlas: LanguageModel, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_pass_cost", lambda lm: 10**9)  # one batch, whatever the padding
    together = find_targets(atlas, ATLAS_FACTS, 1, CONFIG, ATLAS_CONTEXTS, site=site)
    assert len({c["steps"] for c in together.convergence}) > 1, "facts leave at different steps"
    again = find_targets(atlas, ATLAS_FACTS, 1, CONFIG, ATLAS_CONTEXTS, site=site)
    assert torch.equal(again.v_star, together.v_star)
    monkeypatch.undo()  # rows of different widths now run apart
    for i, fact in enumerate(ATLAS_FACTS):
        same(together, find_targets(atlas, [fact], 1, CONFIG, ATLAS_CONTEXTS, site=site), i)
    for other in (1, 2):
        moved = together.v_star - together.v_initial
        assert relative(moved[0], moved[other]) > 0.1, "the facts differ"


def test_every_family(
    family: LanguageModel, no_hooks_left: Callable[[LanguageModel], None]
) -> None:
    """A few steps lower the loss, and the loss is that of the whole model."""
    config = TargetConfig(scale="auto", steps=6, clamp=20, stop_loss=0.01)
    targets = find_targets(family, FACTS, 0, config, CONTEXTS, site="stream")
    no_hooks_left(family)
    for i, fact in enumerate(FACTS):
        record, delta = targets.convergence[i], targets.v_star[i] - targets.v_initial[i]
        before, after = (
            plain_losses(family, fact, 0, CONTEXTS, change) for change in (0 * delta, delta)
        )
        # The other contexts come in when the bare prompt is near its goal, or comes no nearer.
        pairs = [(before[0], after[0]), (sum(before) / 3, sum(after) / 3)]
        fits = [(old, new) for old, new in pairs if abs(record["nll"] - new) < 2e-3]
        assert fits and any(new < old for old, new in fits)


def test_a_target_out_of_reach_is_given_up() -> None:
    lm = new_model("llama")
    config = TargetConfig(scale="auto", steps=80, clamp=0.1)
    record = find_targets(lm, FACTS[:1], 1, config, CONTEXTS, site="stream").convergence[0]
    assert record["stopped"] == "stuck" and record["steps"] < 30
    assert record["norm"] <= record["limit"] * (1 + 1e-5)


def test_facts_to_forget_keep_the_search_of_the_papers() -> None:
    lm = new_model("gpt2")
    facts = [Fact("Edwin", "{} is the king of all", None), FACTS[0]]
    auto = TargetConfig(scale="auto", steps=5)
    adam = TargetConfig(scale="auto", steps=5, optimizer="adam")
    mixed = find_targets(lm, facts, 0, auto, CONTEXTS)
    alone = find_targets(lm, facts[:1], 0, adam, CONTEXTS)
    assert relative(mixed.v_star[0], alone.v_star[0]) < 1e-5
    assert mixed.facts == tuple(facts)
    written = find_targets(lm, facts[1:], 0, auto, CONTEXTS)
    assert relative(mixed.v_star[1], written.v_star[0]) < 1e-4
    assert (
        relative(mixed.v_star[1], find_targets(lm, facts[1:], 0, adam, CONTEXTS).v_star[0]) > 1e-3
    )


def test_settings() -> None:
    assert TargetConfig().searched_by == "adam" and CONFIG.searched_by == "margin"
    assert TargetConfig(scale="auto", optimizer="adam").searched_by == "adam"
    assert TargetConfig(optimizer="margin").searched_by == "margin"
    with pytest.raises(InputError, match='"adam", "margin" or None'):
        TargetConfig(optimizer="sgd")  # type: ignore[arg-type]


def test_smaller_steps_find_nearer_targets(atlas: LanguageModel) -> None:
    norms = [
        find_targets(
            atlas,
            ATLAS_FACTS,
            1,
            TargetConfig(**{**vars(CONFIG), "lr": lr}),
            ATLAS_CONTEXTS,
            site="stream",
        )
        for lr in (0.02, 0.5)
    ]
    near, far = (sum(c["norm"] for c in targets.convergence) for targets in norms)
    assert near < 0.95 * far


def test_nan_weights_are_an_error() -> None:
    lm = new_model("gpt2")
    with torch.no_grad():
        lm.ffn[2].weight()[0, 0] = float("nan")
    config = TargetConfig(scale="auto")
    with pytest.raises(NumericsError, match="Danielle Darrieux"):
        find_targets(lm, FACTS[:1], 0, config, CONTEXTS)


def test_half_precision_keeps_the_target_in_float32(atlas: LanguageModel) -> None:
    half = load("atlas")
    half.module.to(torch.bfloat16)
    config = MemitConfig(**{name: getattr(CONFIG, name) for name in ("scale", "lr", "clamp")})
    coarse = find_targets(half, ATLAS_FACTS, 1, config, ATLAS_CONTEXTS, site="stream")
    exact = find_targets(atlas, ATLAS_FACTS, 1, config, ATLAS_CONTEXTS, site="stream")
    assert coarse.v_star.dtype == torch.float32
    moved, wanted = coarse.v_star - coarse.v_initial, exact.v_star - exact.v_initial
    assert torch.nn.functional.cosine_similarity(moved, wanted).min() > 0.8
    assert not torch.equal(moved, moved.to(torch.bfloat16).float())


def test_progress_counts_facts_after_each_step(atlas: LanguageModel) -> None:
    seen: list[int] = []
    targets = find_targets(
        atlas, ATLAS_FACTS, 1, CONFIG, ATLAS_CONTEXTS, site="stream", memory=1, progress=seen.append
    )
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 3
    assert len(seen) == sum(record["steps"] for record in targets.convergence)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(atlas: LanguageModel, dtype: torch.dtype) -> None:
    config = RomeConfig(layer=1, steps=40)  # its guard term draws random numbers
    plain = find_targets(atlas, ATLAS_FACTS[:1], 1, config, ATLAS_CONTEXTS)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        other = find_targets(atlas, ATLAS_FACTS[:1], 1, config, ATLAS_CONTEXTS)
    finally:
        torch.set_default_dtype(before)
    assert other.v_star.dtype == plain.v_star.dtype and torch.equal(other.v_star, plain.v_star)
    assert not torch.equal(plain.v_star, plain.v_initial), "the search moved"
