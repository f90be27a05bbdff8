"""Targets by replay against a plain loop: every context alone, unpadded, through the whole model, with torch's own Adam."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from conftest import LLAMA, VOCAB, byte_tokenizer, merging_tokenizer, tiny_model
from factsmith.edit.target import TargetConfig, Targets, find_targets
from factsmith.errors import InputError, LayerError, NumericsError, SubjectError
from factsmith.fact import Fact
from factsmith.model.load import LanguageModel, wrap
from factsmith.model.tokens import subject_span, target_ids

CONTEXTS = ["{}", "Paris. {}", "The king is in Brazil. {}", "Zürich {}"]
FACTS = [
    Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
    Fact("Edwin", "{} is the king of all", "France too"),
    Fact("LeBron James", "It is played by {}", "basketball"),
]
GEMMA2 = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "vocab_size": VOCAB,
}


@pytest.fixture(scope="module")
def tiny_gemma2() -> LanguageModel:
    return wrap(tiny_model("gemma2", **GEMMA2), byte_tokenizer(bos=True))


@pytest.fixture(scope="module")
def tiny_opt() -> LanguageModel:
    """Flattens (B, T) before its feed-forward part."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4}
    return wrap(tiny_model("opt", **sizes, max_position_embeddings=64, vocab_size=VOCAB), byte_tokenizer(bos=True))


@pytest.fixture(params=["gpt2", "llama", "gemma2", "opt"])
def family(request: pytest.FixtureRequest) -> LanguageModel:
    found: LanguageModel = request.getfixturevalue(f"tiny_{request.param}")
    return found


def plain_search(lm: LanguageModel, fact: Fact, layer: int, config: TargetConfig, contexts: Sequence[str]) -> dict[str, Any]:
    """Equation 4 of ROME, as slowly and as plainly as it can be written."""
    down = lm.ffn[layer].down
    delta = torch.zeros(lm.d_model, requires_grad=True)
    place, seen = 0, torch.empty(0)

    def change(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        changed = output.reshape(1, -1, len(delta)).clone()
        seen = changed[0, place].detach().clone()
        changed[0, place] = changed[0, place] + delta
        return changed.view_as(output)

    def log_p(ids: list[int], column: int) -> torch.Tensor:
        nonlocal place
        place = column
        out: torch.Tensor = lm.module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return out

    def token_ids(text: str) -> list[int]:
        return list(lm.tokenizer(text)["input_ids"])

    target = target_ids(lm.tokenizer, fact.text, fact.target)
    guard = f"{fact.subject} is a"
    guard_column = subject_span(lm, guard, fact.subject)[1] - 1
    adam = torch.optim.Adam([delta], lr=config.lr)
    handle = down.register_forward_hook(change)
    try:
        first: torch.Tensor | None = None
        v_initial = torch.empty(0)
        for step in range(1, config.steps + 1):
            nll = torch.zeros(())
            for context in contexts:
                text = context.replace("{}", fact.text)
                ids = token_ids(text)
                p = log_p(ids + target[:-1], subject_span(lm, text, fact.subject)[1] - 1)
                if context == "{}" and step == 1:
                    v_initial = seen
                nll = nll - sum(p[len(ids) - 1 + i, t] for i, t in enumerate(target)) / len(target) / len(contexts)
            p = log_p(token_ids(guard), guard_column)[guard_column]
            first = p.detach() if first is None else first
            kl = F.kl_div(first, p, log_target=True, reduction="sum")
            loss = nll + config.kl_factor * kl + config.weight_decay * delta.norm() / v_initial.norm() ** 2
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
    return {"v_star": v_initial + delta.detach(), "steps": step, "loss": loss.item(), "nll": nll.item(), "kl": kl.item()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("layer", [0, 1])  # at the last layer nothing but the guard depends on δ: Adam would amplify rounding
def test_equals_the_plain_loop(family: LanguageModel, layer: int, no_hooks_left: Callable[[LanguageModel], None]) -> None:
    config = TargetConfig(steps=8, lr=0.2, weight_decay=0.1)
    found = find_targets(family, FACTS, layer, config, CONTEXTS)
    no_hooks_left(family)
    for i, fact in enumerate(FACTS):
        expected = plain_search(family, fact, layer, config, CONTEXTS)
        assert relative(found.v_star[i], expected["v_star"]) < 1e-4
        assert relative(found.v_initial[i], expected["v_star"]) > 1e-2, "the search moved"
        record = found.convergence[i]
        assert record["steps"] == expected["steps"]
        for name in ("loss", "nll", "kl"):
            assert record[name] == pytest.approx(expected[name], abs=1e-4)


def test_keys_are_the_down_projections_input(tiny_lm: LanguageModel) -> None:
    found = find_targets(tiny_lm, FACTS, 1, TargetConfig(steps=1), CONTEXTS)
    for i, fact in enumerate(FACTS):
        keys = []
        for context in CONTEXTS:
            text = context.replace("{}", fact.text)
            keys.append(tiny_lm.coefficients(text, [1])[0, subject_span(tiny_lm, text, fact.subject)[1] - 1])
        torch.testing.assert_close(found.k_prompt[i], keys[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.k_star[i], torch.stack(keys).mean(0), rtol=1e-4, atol=1e-5)
        bias = tiny_lm.ffn[1].bias
        output = tiny_lm.ffn[1].weight() @ keys[0] + (0 if bias is None else bias)
        torch.testing.assert_close(found.v_initial[i], output, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.v_star[i], found.v_initial[i]), "one evaluation, no update"


def same(a: Targets, b: Targets, row: int) -> None:
    for name in ("v_star", "v_initial", "k_star", "k_prompt"):
        assert relative(getattr(a, name)[row], getattr(b, name)[0]) < 1e-4
    assert a.convergence[row]["steps"] == b.convergence[0]["steps"]
    assert a.convergence[row]["stopped"] == b.convergence[0]["stopped"]


@pytest.mark.parametrize("scale", ["paper", "auto"])
def test_batch_equals_one_by_one_while_facts_leave(family: LanguageModel, scale: Any) -> None:
    config = TargetConfig(steps=16, stop_loss=0, lr=0.4, kl_factor=0.01, weight_decay=0.01, clamp=20, scale=scale)
    reached = sorted(c["loss" if scale == "paper" else "nll"] for c in find_targets(family, FACTS, 0, config, CONTEXTS).convergence)
    config = dataclasses.replace(config, stop_loss=reached[1] + 0.02)  # two facts get there, the third goes on to the end
    together = find_targets(family, FACTS, 0, config, CONTEXTS)
    steps = [c["steps"] for c in together.convergence]
    assert len(set(steps)) > 1 and any(1 < s < 16 for s in steps), f"the facts should leave at different steps; got {steps}"
    for i, fact in enumerate(FACTS):
        same(together, find_targets(family, [fact], 0, config, CONTEXTS), i)
    tight = find_targets(family, FACTS, 0, config, CONTEXTS, memory=1)  # one fact a batch
    for name in ("v_star", "k_star"):
        assert relative(getattr(tight, name), getattr(together, name)) < 1e-4


def test_paper_stops_on_the_loss_and_clamps(tiny_gpt2: LanguageModel) -> None:
    found = find_targets(tiny_gpt2, FACTS[:1], 0, TargetConfig(clamp=0.5, steps=10), CONTEXTS)
    record = found.convergence[0]
    delta = found.v_star[0] - found.v_initial[0]
    assert float(delta.norm()) == pytest.approx(0.5 * float(found.v_initial[0].norm()), rel=1e-5)
    assert record["limit"] == pytest.approx(record["norm"], rel=1e-5) and record["stopped"] == "steps"
    early = find_targets(tiny_gpt2, FACTS[:1], 0, TargetConfig(stop_loss=100), CONTEXTS).convergence[0]
    assert (early["steps"], early["stopped"]) == (1, "loss")


def test_auto_does_not_depend_on_the_units_of_the_stream(tiny_llama: LanguageModel) -> None:
    """A Llama whose residual stream is ten times as long computes the same function; "auto" finds the same target, ten times as long."""
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
    assert large["auto"].convergence[0]["nll"] == pytest.approx(small["auto"].convergence[0]["nll"], abs=1e-3)
    assert relative(large["paper"].v_star, 10 * small["paper"].v_star) > 0.1, "the reference formulas do depend on them"


def test_merging_tokenizer() -> None:
    """Tokens that reach over the subject's edge; the same answer as the plain loop."""
    lm = wrap(tiny_model("llama", **LLAMA), merging_tokenizer())
    fact = Fact("Danielle Darrieux", "The mother tongue of {} is", "French")
    config = TargetConfig(steps=4)
    found = find_targets(lm, [fact], 1, config, CONTEXTS[:2])
    assert relative(found.v_star[0], plain_search(lm, fact, 1, config, CONTEXTS[:2])["v_star"]) < 1e-4


@pytest.mark.parametrize(
    ("fact", "contexts"),
    [
        (Fact("A", "{} is", "B"), ["{}"]),  # nothing before the subject
        (Fact("Edwin", "{}", "king"), ["{}", "The. {}"]),  # nothing but the subject
        (Fact(" Edwin ", "So {}, the", "king of all of them"), ["{}", "The. {}"]),  # white space around it, a long target
        (Fact("São Paulo", "{} lies in", "日本"), ["{}", "X {}"]),  # characters of several tokens
    ],
)
def test_odd_facts(tiny_lm: LanguageModel, fact: Fact, contexts: list[str]) -> None:
    config = TargetConfig(steps=4)
    found = find_targets(tiny_lm, [fact], 0, config, contexts)
    assert relative(found.v_star[0], plain_search(tiny_lm, fact, 0, config, contexts)["v_star"]) < 1e-4


def test_targets_with_and_without_leading_space_are_one(tiny_lm: LanguageModel) -> None:
    spaced = [Fact("Edwin", "{} is a", target) for target in ("king", " king")]
    found = find_targets(tiny_lm, spaced, 1, TargetConfig(steps=3), CONTEXTS)
    torch.testing.assert_close(found.v_star[0], found.v_star[1])


def test_a_context_may_name_the_subject(tiny_gpt2: LanguageModel) -> None:
    fact = Fact("Paris", "{} is the capital of", "Brazil")
    found = find_targets(tiny_gpt2, [fact], 1, TargetConfig(steps=1), ["{}", "Paris is in France. {}"])
    text = "Paris is in France. Paris is the capital of"
    last = max(i for i, (a, b) in enumerate(tiny_gpt2.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]) if a < 25 and b > 20)
    expected = (found.k_prompt[0] + tiny_gpt2.coefficients(text, [1])[0, last]) / 2
    torch.testing.assert_close(found.k_star[0], expected, rtol=1e-4, atol=1e-5)


def test_bad_input(tiny_gpt2: LanguageModel) -> None:
    config = TargetConfig()
    with pytest.raises(LayerError, match="layers 0 to 2"):
        find_targets(tiny_gpt2, FACTS, 3, config, CONTEXTS)
    with pytest.raises(InputError, match="bare prompt"):
        find_targets(tiny_gpt2, FACTS, 0, config, ["Paris. {}"])
    with pytest.raises(InputError, match="exactly one"):
        find_targets(tiny_gpt2, FACTS, 0, config, ["{}", "Paris."])
    with pytest.raises(SubjectError, match="more than once"):
        find_targets(tiny_gpt2, [Fact("Edwin", "Edwin and {} are", "kings")], 0, config, CONTEXTS)


def test_nan_weights_are_an_error() -> None:
    lm = wrap(tiny_model("gpt2", n_layer=2, n_embd=32, n_head=4, n_positions=64, vocab_size=VOCAB), byte_tokenizer())
    with torch.no_grad():
        lm.ffn[1].weight()[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="Danielle Darrieux"):
        find_targets(lm, FACTS[:1], 0, TargetConfig(), CONTEXTS)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"lr": 0},
        {"lr": float("nan")},
        {"clamp": -1},
        {"kl_factor": -0.1},
        {"scale": "big"},
        {"stop_loss": "no"},
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        TargetConfig(**settings)
