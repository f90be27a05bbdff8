"""Targets by replay equal those of a plain loop.

The loop runs each context alone and unpadded through the whole model, with torch's own Adam.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from conftest import LLAMA, VOCAB, byte_tokenizer, merging_tokenizer, tiny_model
from editing import FACTS, new_model, output_at_subject, relative
from factsmith.core.errors import InputError, LayerError, NumericsError
from factsmith.core.fact import Fact
from factsmith.edit import batches
from factsmith.edit.keys import Site
from factsmith.edit.search import find_targets, known_targets
from factsmith.edit.target import TargetConfig, Targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.subject import subject_span
from factsmith.model.tokens import target_ids

CONTEXTS = ["{}", "Paris. {}", "The king is in Brazil. {}", "Zürich {}"]


def plain_search(
    lm: LanguageModel,
    fact: Fact,
    layer: int,
    config: TargetConfig,
    contexts: Sequence[str],
    site: Site = "ffn",
) -> dict[str, Any]:
    """Equation 4 of ROME, written as plainly as possible."""
    changed_module = lm.ffn[layer].down if site == "ffn" else lm.layers[layer]
    delta = torch.zeros(lm.d_model, requires_grad=True)
    place, seen = 0, torch.empty(0)

    def change(module: Any, args: Any, output: Any) -> Any:
        nonlocal seen
        states = output[0] if isinstance(output, tuple) else output
        changed = states.reshape(1, -1, len(delta)).clone()
        seen = changed[0, place].detach().clone()
        changed[0, place] = changed[0, place] + delta
        changed = changed.view_as(states)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def log_p(ids: list[int], column: int) -> torch.Tensor:
        nonlocal place
        place = column
        out: torch.Tensor = lm.module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return out

    def token_ids(text: str) -> list[int]:
        return list(lm.tokenizer(text)["input_ids"])

    target = [] if fact.target is None else target_ids(lm.tokenizer, fact.text, fact.target)
    guard = f"{fact.subject} is a"
    guard_column = subject_span(lm, guard, fact.subject)[1] - 1
    adam = torch.optim.Adam([delta], lr=config.lr)
    without = (
        [said_without(lm, fact, context) for context in contexts] if fact.target is None else []
    )
    handle = changed_module.register_forward_hook(change)
    try:
        first: torch.Tensor | None = None
        v_initial = torch.empty(0)
        for step in range(1, config.steps + 1):
            nll = torch.zeros(())
            for c, context in enumerate(contexts):
                text = context.replace("{}", fact.text)
                ids = token_ids(text)
                p = log_p(ids + target[:-1], subject_span(lm, text, fact.subject)[1] - 1)
                if context == "{}" and step == 1:
                    v_initial = seen
                if fact.target is None:
                    nll = nll + F.kl_div(p[-1], without[c], log_target=True, reduction="sum") / len(
                        contexts
                    )
                    continue
                nll = nll - sum(p[len(ids) - 1 + i, t] for i, t in enumerate(target)) / len(
                    target
                ) / len(contexts)
            p = log_p(token_ids(guard), guard_column)[guard_column]
            first = p.detach() if first is None else first
            kl = F.kl_div(first, p, log_target=True, reduction="sum")
            loss = (
                nll
                + config.kl_factor * kl
                + config.weight_decay * delta.norm() / v_initial.norm() ** 2
            )
            if loss < config.stop_loss or step == config.steps:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                limit = config.clamp * v_initial.norm()
                if delta.norm() > limit:
                    delta *= limit / delta.norm()
    finally:
        handle.remove()
    return {
        "v_star": v_initial + delta.detach(),
        "steps": step,
        "loss": loss.item(),
        "nll": nll.item(),
        "kl": kl.item(),
    }


@torch.no_grad()
def said_without(lm: LanguageModel, fact: Fact, context: str) -> torch.Tensor:
    """Log-probabilities after the prompt without the subject's tokens."""
    text = context.replace("{}", fact.text)
    ids = list(lm.tokenizer(text)["input_ids"])
    first, stop = subject_span(lm, text, fact.subject)
    out: torch.Tensor = (
        lm.module(input_ids=torch.tensor([ids[:first] + ids[stop:]])).logits[0, -1].log_softmax(-1)
    )
    return out


@pytest.mark.parametrize("site", ["ffn", "stream"])
# At the last layer only the guard depends on δ, and Adam would amplify rounding.
@pytest.mark.parametrize("layer", [0, 1])
def test_equals_the_plain_loop(
    family: LanguageModel, layer: int, site: Site, no_hooks_left: Callable[[LanguageModel], None]
) -> None:
    config = TargetConfig(steps=8, lr=0.2, weight_decay=0.1)
    targets = find_targets(family, FACTS, layer, config, CONTEXTS, site=site)
    no_hooks_left(family)
    for i, fact in enumerate(FACTS):
        expected = plain_search(family, fact, layer, config, CONTEXTS, site)
        assert relative(targets.v_star[i], expected["v_star"]) < 1e-4
        assert relative(targets.v_initial[i], expected["v_star"]) > 1e-2, "the search moved"
        record = targets.convergence[i]
        assert record["steps"] == expected["steps"]
        for name in ("loss", "nll", "kl"):
            assert record[name] == pytest.approx(expected[name], abs=1e-4)


def test_keys_are_the_down_projections_input(tiny_lm: LanguageModel) -> None:
    targets = find_targets(tiny_lm, FACTS, 1, TargetConfig(steps=1), CONTEXTS)
    for i, fact in enumerate(FACTS):
        keys = []
        for context in CONTEXTS:
            text = context.replace("{}", fact.text)
            column = subject_span(tiny_lm, text, fact.subject)[1] - 1
            keys.append(tiny_lm.coefficients(text, [1])[0, column])
        mean = torch.stack(keys).mean(0)
        torch.testing.assert_close(targets.k_prompt[i], keys[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(targets.k_star[i], mean, rtol=1e-4, atol=1e-5)
        bias = tiny_lm.ffn[1].bias
        output = tiny_lm.ffn[1].weight() @ keys[0] + (0 if bias is None else bias)
        torch.testing.assert_close(targets.v_initial[i], output, rtol=1e-4, atol=1e-5)
        assert torch.equal(targets.v_star[i], targets.v_initial[i]), "one evaluation, no update"


def same(a: Targets, b: Targets, row: int) -> None:
    for name in ("v_star", "v_initial", "k_star", "k_prompt"):
        assert relative(getattr(a, name)[row], getattr(b, name)[0]) < 1e-4
    assert a.convergence[row]["steps"] == b.convergence[0]["steps"]
    assert a.convergence[row]["stopped"] == b.convergence[0]["stopped"]


@pytest.mark.parametrize(
    ("scale", "site"), [("paper", "ffn"), ("auto", "ffn"), ("paper", "stream")]
)
def test_batch_equals_one_by_one_while_facts_leave(
    family: LanguageModel, scale: Any, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_pass_cost", lambda lm: 10**9)  # one batch, whatever the padding
    config = TargetConfig(
        steps=16,
        stop_loss=0,
        lr=0.4,
        kl_factor=0.01,
        weight_decay=0.01,
        clamp=20,
        scale=scale,
        optimizer="adam",
    )
    reached = sorted(
        c["loss" if scale == "paper" else "nll"]
        for c in find_targets(family, FACTS, 0, config, CONTEXTS, site=site).convergence
    )
    # Two facts get there. The third goes on to the last step.
    config = dataclasses.replace(config, stop_loss=reached[1] + 0.02)
    together = find_targets(family, FACTS, 0, config, CONTEXTS, site=site)
    steps = [c["steps"] for c in together.convergence]
    assert len(set(steps)) > 1 and any(1 < s < 16 for s in steps), (
        f"the facts should leave at different steps; got {steps}"
    )
    for i, fact in enumerate(FACTS):
        same(together, find_targets(family, [fact], 0, config, CONTEXTS, site=site), i)
    # One fact in each batch.
    tight = find_targets(family, FACTS, 0, config, CONTEXTS, site=site, memory=1)
    for name in ("v_star", "k_star"):
        assert relative(getattr(tight, name), getattr(together, name)) < 1e-4


def test_paper_stops_on_the_loss_and_clamps(tiny_gpt2: LanguageModel) -> None:
    targets = find_targets(tiny_gpt2, FACTS[:1], 0, TargetConfig(clamp=0.5, steps=10), CONTEXTS)
    record = targets.convergence[0]
    delta, limit = targets.v_star[0] - targets.v_initial[0], 0.5 * targets.v_initial[0].norm()
    assert float(delta.norm()) == pytest.approx(float(limit), rel=1e-5)
    assert record["limit"] == pytest.approx(record["norm"], rel=1e-5)
    assert record["stopped"] == "steps"
    easy = find_targets(tiny_gpt2, FACTS[:1], 0, TargetConfig(stop_loss=100), CONTEXTS)
    early = easy.convergence[0]
    assert (early["steps"], early["stopped"]) == (1, "loss")


def test_auto_does_not_depend_on_the_units_of_the_stream(tiny_llama: LanguageModel) -> None:
    """A Llama with a stream ten times as long computes the same function.

    With "auto" its target is ten times as long.
    """
    module = tiny_model("llama", **{**LLAMA, "rms_norm_eps": 1e-12})
    lm = wrap(module, tiny_llama.tokenizer)
    auto, paper = (TargetConfig(scale=s, steps=6, clamp=20) for s in ("auto", "paper"))
    small = {c.scale: find_targets(lm, FACTS[:1], 1, c, CONTEXTS) for c in (auto, paper)}
    with torch.no_grad():
        module.model.embed_tokens.weight.mul_(10)
        for layer in module.model.layers:
            layer.mlp.down_proj.weight.mul_(10)
            layer.self_attn.o_proj.weight.mul_(10)
    large = {c.scale: find_targets(lm, FACTS[:1], 1, c, CONTEXTS) for c in (auto, paper)}
    assert relative(large["auto"].v_star, 10 * small["auto"].v_star) < 1e-3
    assert large["auto"].convergence[0]["nll"] == pytest.approx(
        small["auto"].convergence[0]["nll"], abs=1e-3
    )
    assert relative(large["paper"].v_star, 10 * small["paper"].v_star) > 0.1, (
        "the formulas of the papers depend on them"
    )


def test_merging_tokenizer() -> None:
    """Tokens may reach over the subject's edge."""
    lm = wrap(tiny_model("llama", **LLAMA), merging_tokenizer())
    fact = Fact("Danielle Darrieux", "The mother tongue of {} is", "French")
    config = TargetConfig(steps=4)
    targets = find_targets(lm, [fact], 1, config, CONTEXTS[:2])
    expected = plain_search(lm, fact, 1, config, CONTEXTS[:2])["v_star"]
    assert relative(targets.v_star[0], expected) < 1e-4


@pytest.mark.parametrize(
    ("fact", "contexts"),
    [
        (Fact("A", "{} is", "B"), ["{}"]),  # nothing before the subject
        (Fact("Edwin", "{}", "king"), ["{}", "The. {}"]),  # only the subject
        # White space around the subject, and a long target.
        (Fact(" Edwin ", "So {}, the", "king of all of them"), ["{}", "The. {}"]),
        (Fact("São Paulo", "{} lies in", "日本"), ["{}", "X {}"]),  # characters of several tokens
    ],
)
def test_odd_facts(tiny_lm: LanguageModel, fact: Fact, contexts: list[str]) -> None:
    config = TargetConfig(steps=4)
    targets = find_targets(tiny_lm, [fact], 0, config, contexts)
    expected = plain_search(tiny_lm, fact, 0, config, contexts)["v_star"]
    assert relative(targets.v_star[0], expected) < 1e-4


def test_targets_with_and_without_leading_space_are_one(tiny_lm: LanguageModel) -> None:
    spaced = [Fact("Edwin", "{} is a", target) for target in ("king", " king")]
    targets = find_targets(tiny_lm, spaced, 1, TargetConfig(steps=3), CONTEXTS)
    torch.testing.assert_close(targets.v_star[0], targets.v_star[1])


def test_a_context_may_name_the_subject(tiny_gpt2: LanguageModel) -> None:
    fact = Fact("Paris", "{} is the capital of", "Brazil")
    contexts = ["{}", "Paris is in France. {}"]
    targets = find_targets(tiny_gpt2, [fact], 1, TargetConfig(steps=1), contexts)
    text = "Paris is in France. Paris is the capital of"
    offsets = tiny_gpt2.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    last = max(i for i, (a, b) in enumerate(offsets) if a < 25 and b > 20)
    expected = (targets.k_prompt[0] + tiny_gpt2.coefficients(text, [1])[0, last]) / 2
    torch.testing.assert_close(targets.k_star[0], expected, rtol=1e-4, atol=1e-5)


def test_bad_input(tiny_gpt2: LanguageModel) -> None:
    config = TargetConfig()
    with pytest.raises(LayerError, match="layers 0 to 2"):
        find_targets(tiny_gpt2, FACTS, 3, config, CONTEXTS)
    with pytest.raises(InputError, match="bare prompt"):
        find_targets(tiny_gpt2, FACTS, 0, config, ["Paris. {}"])
    with pytest.raises(InputError, match="exactly one"):
        find_targets(tiny_gpt2, FACTS, 0, config, ["{}", "Paris."])


def test_the_slot_says_which_mention_is_the_subject(tiny_gpt2: LanguageModel) -> None:
    config = TargetConfig(steps=1)
    for subject, prompt in (("Edwin", "Edwin and {} are"), ("win", "Edwin and {} are")):
        targets = find_targets(tiny_gpt2, [Fact(subject, prompt, "kings")], 0, config, ["{}"])
        text = prompt.replace("{}", subject)
        column = subject_span(tiny_gpt2, text, subject, occurrence=2)[1] - 1
        keys = tiny_gpt2.coefficients(text, [0])[0]
        torch.testing.assert_close(targets.k_star[0], keys[column], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(keys[column], keys[4], rtol=1e-2)


def test_nan_weights_are_an_error() -> None:
    lm = wrap(
        tiny_model("gpt2", n_layer=2, n_embd=32, n_head=4, n_positions=64, vocab_size=VOCAB),
        byte_tokenizer(),
    )
    with torch.no_grad():
        lm.ffn[1].weight()[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="Danielle Darrieux"):
        find_targets(lm, FACTS[:1], 0, TargetConfig(), CONTEXTS)


def test_forgetting_equals_the_plain_loop(family: LanguageModel) -> None:
    """Together with a fact that is written, so that both kinds share a batch."""
    facts = [
        Fact("Edwin", "{} is the king of all", None),
        FACTS[0],
        Fact("LeBron James", "What {} plays is", None),
    ]
    config = TargetConfig(steps=8, lr=0.2, weight_decay=0.01, stop_loss=0)
    targets = find_targets(family, facts, 0, config, CONTEXTS[:2])
    for i, fact in enumerate(facts):
        expected = plain_search(family, fact, 0, config, CONTEXTS[:2])
        assert relative(targets.v_star[i], expected["v_star"]) < 1e-4
        assert targets.convergence[i]["nll"] == pytest.approx(expected["nll"], abs=1e-4)
    first = find_targets(family, facts, 0, TargetConfig(steps=1), CONTEXTS[:2])
    for i in (0, 2):
        assert targets.convergence[i]["nll"] < 0.95 * first.convergence[i]["nll"], (
            "closer to what the model says without the subject"
        )


def test_nothing_can_be_forgotten_that_ends_with_its_subject() -> None:
    fact = Fact("LeBron James", "It is played by {}", None)
    with pytest.raises(InputError, match="ends with its subject"):
        find_targets(new_model("gpt2"), [fact], 0, TargetConfig(), ["{}"])


@pytest.mark.parametrize("site", ["ffn", "stream"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_known_targets_are_those_of_the_search(name: str, site: Site) -> None:
    lm, contexts = new_model(name), ["{}", "Then, {}"]
    targets = find_targets(lm, FACTS, 1, TargetConfig(steps=2), contexts, site=site)
    known = known_targets(lm, FACTS, 1, contexts, targets.v_star, site=site)
    for field in ("v_star", "v_initial", "k_star", "k_prompt", "ffn_initial"):
        assert torch.allclose(getattr(known, field), getattr(targets, field), atol=1e-5), field
    output = output_at_subject(lm, lm.ffn[1].down, FACTS[0])
    assert torch.allclose(known.ffn_initial[0], output, atol=1e-5)
    assert "3 at layer 1" in repr(known) and "2 to 2 steps" in repr(targets)
    with pytest.raises(InputError, match="a target for each fact"):
        known_targets(lm, FACTS, 1, ["{}"], targets.v_star[:2])


def test_no_gradient_of_a_weight_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a caller has switched on the gradients of the weights."""
    lm = wrap(tiny_model("llama", **LLAMA), byte_tokenizer(bos=True))
    expected = find_targets(lm, FACTS[:1], 0, TargetConfig(steps=3), CONTEXTS).v_star
    lm.module.requires_grad_(True)
    weight = lm.layers[2].mlp.down_proj.weight  # type: ignore[union-attr]
    weight.register_hook(lambda gradient: pytest.fail("a weight's gradient was computed"))
    torch.testing.assert_close(
        find_targets(lm, FACTS[:1], 0, TargetConfig(steps=3), CONTEXTS).v_star, expected
    )
    assert all(p.grad is None for p in lm.module.parameters())


def test_autocast_keeps_the_target_in_float32(tiny_llama: LanguageModel) -> None:
    config = TargetConfig(steps=6, lr=0.05)
    exact = find_targets(tiny_llama, FACTS, 0, config, CONTEXTS, site="stream")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = find_targets(tiny_llama, FACTS, 0, config, CONTEXTS, site="stream")
    half = wrap(tiny_model("llama", **LLAMA).to(torch.bfloat16), tiny_llama.tokenizer)
    coarse = find_targets(half, FACTS, 0, config, CONTEXTS, site="stream")
    for other in (mixed, coarse):
        assert other.v_star.dtype == other.k_star.dtype == torch.float32
        moved, wanted = other.v_star - other.v_initial, exact.v_star - exact.v_initial
        assert torch.nn.functional.cosine_similarity(moved, wanted).min() > 0.9
        assert not torch.equal(moved, moved.to(torch.bfloat16).float()), (
            "δ is not rounded to the model's dtype"
        )
