"""What every method must do, and what it must refuse: one test for all of METHODS."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conftest import GPT2, LLAMA, TEXTS, byte_tokenizer, tiny_model
from editing import FACTS, SEARCH, full_rank_moments, new_model, same_change
from factsmith.core.errors import FactsmithError, InputError, NumericsError, UnsupportedModelError
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.corpus.moments_store import find_moments
from factsmith.edit.append_config import AppendConfig
from factsmith.edit.configs import (
    AlphaEditConfig,
    EditConfig,
    EmmetConfig,
    MemitConfig,
    RomeConfig,
    SpreadConfig,
)
from factsmith.edit.delta import Delta, applied, read_weights
from factsmith.edit.methods import METHODS, method_for
from factsmith.edit.methods import edit as edit_model
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from factsmith.model.subject import subject_span

CONTEXTS = ["{}", "Paris. {}"]
CONFIGS: dict[str, EditConfig] = {
    "rome": RomeConfig(layer=1, **SEARCH),
    "r-rome": RomeConfig(layer=1, **SEARCH),
    "memit": MemitConfig((0, 1), moment_weight=1e-4, **SEARCH),
    "emmet": EmmetConfig((0, 1), ridge=0, **SEARCH),
    "alphaedit": AlphaEditConfig((0, 1), threshold=None, energy=0.01, l2=1e-7, **SEARCH),
    "append": AppendConfig(layer=1, **SEARCH),
}
every_method = pytest.mark.parametrize("method", list(METHODS))
UPDATING = [method for method in METHODS if method != "append"]
"""The methods that update weights. Appended neurons have tests of their own (test_append.py)."""
every_update = pytest.mark.parametrize("method", UPDATING)


@cache
def model() -> LanguageModel:
    return new_model("gpt2")


@cache
def moments(method: str = "rome") -> dict[int, SecondMoment]:
    return full_rank_moments(model(), site=CONFIGS[method].draws_on)


def edit(
    method: str, facts: Fact | list[Fact], lm: LanguageModel | None = None, **changes: Any
) -> Delta:
    """The delta of a method. It fails if a weight of the model changes, also after an error."""
    lm = lm or model()
    before = read_weights(lm, range(lm.n_layers)) if not lm.ffn[0].n_experts else {}
    try:
        usual = {"moments": moments(method), "contexts": CONTEXTS, "config": CONFIGS[method]}
        arguments = {**usual, **changes}
        return edit_model(lm, facts, method, arguments.pop("config"), **arguments)
    finally:
        for layer, weight in before.items():
            torch.testing.assert_close(
                lm.ffn[layer].weight(), weight, rtol=0, atol=0, equal_nan=True
            )


@torch.no_grad()
def log_p(lm: LanguageModel, ids: list[int]) -> Tensor:
    """Log-probabilities of the next token, from a plain pass."""
    logits: Tensor = lm.module(input_ids=torch.tensor([ids])).logits
    return logits[0, -1].float().log_softmax(-1)


def test_facts_without_a_method_get_one_by_one_rule() -> None:
    assert method_for(FACTS[:1]) == "rome" and method_for(FACTS) == "memit"
    assert method_for(FACTS, CONFIGS["rome"]) == "rome"
    assert method_for(FACTS[:1], CONFIGS["alphaedit"]) == "alphaedit"
    with pytest.raises(InputError, match="expected the settings of a method: RomeConfig"):
        method_for(FACTS, "steps=40")  # type: ignore[arg-type]
    delta = edit_model(
        model(), FACTS[0], config=CONFIGS["emmet"], moments=moments(), contexts=CONTEXTS
    )
    assert delta.method == "emmet"
    with pytest.raises(InputError, match="got a NoneType"):
        edit_model(None, FACTS[0], moments=moments())  # type: ignore[arg-type]


def test_every_method_is_tested() -> None:
    assert set(CONFIGS) == set(METHODS)


# ── what a target may be ──────────────────────────────────────────────────────────────────────────


@every_method
@pytest.mark.parametrize("target", ["king", "the capital of France"])
def test_targets_with_and_without_a_leading_space_are_one(method: str, target: str) -> None:
    fact = dataclasses.replace(FACTS[1], target=target)
    delta, same = edit(method, fact), edit(method, dataclasses.replace(fact, target=f" {target}"))
    assert same_change(delta, same)
    assert not same_change(delta, edit(method, dataclasses.replace(fact, target=f"{target} too")))


@every_method
def test_several_words_and_a_fact_to_forget(method: str) -> None:
    """Together, in one layer of a model that knows the facts, judged by plain passes."""
    lm = load("atlas")
    words = Fact("Japan", "The currency of {} is the", "Danish krone")
    forgotten = Fact("Bulgaria", "The capital of {} is", None)
    ids, (first, stop) = lm.prompt_ids(forgotten.text), subject_span(lm, forgotten.text, "Bulgaria")
    without = log_p(lm, ids[:first] + ids[stop:])

    def probability(fact: Fact) -> float:
        prompt, text = (
            len(lm.prompt_ids(text)) for text in (fact.text, f"{fact.text} {fact.target}")
        )
        assert text > prompt + 1, "a target of several tokens"
        tokens = lm.prompt_ids(f"{fact.text} {fact.target}")
        return sum(float(log_p(lm, tokens[:i])[tokens[i]]) for i in range(prompt, text))

    def distance() -> float:
        return float(F.kl_div(log_p(lm, ids), without, log_target=True, reduction="sum"))

    before, far = probability(words), distance()
    kind = METHODS[method].config
    changes = {"repair": 0} if issubclass(kind, SpreadConfig) else {}
    config = dataclasses.replace(kind.recommended(lm).at([0]), **changes)
    facts, held = [words, forgotten], find_moments(lm, [0], site=config.draws_on)
    delta = edit_model(lm, facts, method, config, moments=held, contexts=["{}"])
    with applied(lm, delta):
        after, near = probability(words), distance()
        assert lm.says([words.text], ["Danish krone"]) == [True]
        assert lm.says([forgotten.text], ["Sofia"]) == [False]
    assert after > before + 3 and near < 0.3 * far
    assert lm.says([forgotten.text], ["Sofia"]) == [True]


@every_update
def test_a_subject_that_is_the_whole_prompt(method: str) -> None:
    """v_star is reached after its last token: by the down-projection (ROME), or in the stream."""
    lm, fact = model(), Fact("Edwin", "{}", "Brazil")
    delta = edit(method, fact, contexts=["{}"])
    last = max(delta.layers)
    part = lm.ffn[last].down if method.endswith("rome") else lm.layers[last]
    seen: list[Tensor] = []
    handle = part.register_forward_hook(
        lambda m, args, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])
    )
    log_p(lm, lm.prompt_ids("Edwin"))
    with applied(lm, delta):
        log_p(lm, lm.prompt_ids("Edwin"))
    handle.remove()
    torch.testing.assert_close(seen[1], delta.v_star[0], rtol=1e-2, atol=1e-2)
    assert (seen[0] - delta.v_star[0]).norm() > 0.5


@every_method
def test_nothing_can_be_forgotten_that_is_the_whole_prompt(method: str) -> None:
    with pytest.raises(InputError, match="give a prompt that goes on"):
        edit(method, Fact("Edwin", "{}", None))


# ── numbers ───────────────────────────────────────────────────────────────────────────────────────


@every_update
def test_weights_in_bfloat16(method: str) -> None:
    """The delta is float32, and near that of the same weights in float32.

    W + Δ is rounded once, and W comes back bit for bit.
    """
    half = wrap(tiny_model("gpt2", **GPT2).to(torch.bfloat16), byte_tokenizer())
    wide = wrap(tiny_model("gpt2", **GPT2).to(torch.bfloat16).float(), byte_tokenizer())
    coarse, exact = edit(method, FACTS, half), edit(method, FACTS, wide)
    asked = [fact.text for fact in FACTS], [str(fact.target) for fact in FACTS]
    before = read_weights(half, range(3))
    for layer, (left, right) in coarse.layers.items():
        assert left.dtype == right.dtype == torch.float32
        flat = coarse.dense(layer).flatten(), exact.dense(layer).flatten()
        assert F.cosine_similarity(*flat, dim=0) > 0.9
    with applied(half, coarse):
        for layer in coarse.layers:
            rounded = (before[layer].float() + coarse.dense(layer)).to(torch.bfloat16)
            assert torch.equal(half.ffn[layer].weight(), rounded)
        moved = half.log_prob(*asked)
    assert all(torch.equal(half.ffn[layer].weight(), weight) for layer, weight in before.items())
    unedited = wide.log_prob(*asked)
    with applied(wide, exact):
        expected = wide.log_prob(*asked)
    assert (moved - expected).abs().max() < 0.5 * (expected - unedited).abs().max()


PLACES = [
    "wte.weight",
    "h.0.mlp.c_fc.weight",
    "h.0.mlp.c_proj.weight",
    "h.1.mlp.c_proj.bias",
    "h.2.attn.c_attn.weight",
    "ln_f.weight",
]


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_an_error(method: str, value: float) -> None:
    """In the edited layer, below it, above it, and at both ends."""
    lm = new_model("gpt2")
    for place in PLACES:
        weight = lm.module.get_parameter(f"transformer.{place}").data.view(-1)
        kept, weight[3] = weight[3].clone(), value
        with pytest.raises(NumericsError, match="not finite"):
            edit(method, FACTS, lm)
        weight[3] = kept
    assert edit(method, FACTS[:1], lm).facts == (FACTS[0],), "the control"


SINGULAR: dict[str, Callable[[], Tensor]] = {
    "one text": lambda: second_moments(model(), ["Paris is in France."], [0])[0].matrix.float(),
    "one direction": lambda: torch.ones(128, 128),
    "one neuron": lambda: torch.diag(torch.tensor([1.0] + [0.0] * 127)),
    "tiny": lambda: 1e-30 * torch.eye(128) + 1e-32,
    "huge": lambda: 1e30 * torch.eye(128) + 1e28,
}


@every_update
@pytest.mark.parametrize("kind", list(SINGULAR))
def test_a_singular_second_moment_gives_a_bounded_edit(method: str, kind: str) -> None:
    """It is solved with the jitter of `cholesky`. The edit is finite and not much longer."""
    held = {layer: SecondMoment.from_matrix(SINGULAR[kind](), count=5) for layer in (0, 1)}
    delta, plain = edit(method, FACTS, moments=held), edit(method, FACTS)
    for layer in delta.layers:
        assert delta.dense(layer).isfinite().all()
        assert delta.dense(layer).norm() < 3 * plain.dense(layer).norm()


@every_update
@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (torch.zeros(128, 128), "mean diagonal"),
        (-torch.eye(128), "mean diagonal"),
        (torch.diag(torch.tensor([-5.0] + [1.0] * 127)), "positive definite|eigenvalue of -5"),
        (torch.ones(128, 128).triu(), "symmetric"),
    ],
)
def test_what_is_no_second_moment_is_refused(method: str, matrix: Tensor, words: str) -> None:
    held = {layer: SecondMoment.from_matrix(matrix, count=5) for layer in (0, 1)}
    with pytest.raises(FactsmithError, match=words):
        edit(method, FACTS, moments=held)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_second_moment_that_is_not_finite_cannot_be_made(value: float) -> None:
    with pytest.raises(NumericsError, match="NaN or infinity"):
        SecondMoment.from_matrix(torch.full((128, 128), value), count=5)


def test_a_threshold_above_all_eigenvalues_protects_nothing_and_is_refused() -> None:
    largest = float(moments()[0].spectrum[0][-1])
    config = AlphaEditConfig((0,), threshold=2 * largest, **SEARCH)
    with pytest.raises(InputError, match="no direction would be protected"):
        edit("alphaedit", FACTS, config=config)
    assert edit(
        "alphaedit", FACTS, config=dataclasses.replace(config, threshold=0.5 * largest)
    ).facts


# ── facts that influence each other ───────────────────────────────────────────────────────────────


@every_method
def test_a_fact_given_twice_is_written_once(method: str) -> None:
    twice, once = edit(method, [*FACTS, FACTS[1]]), edit(method, FACTS)
    assert twice.facts == tuple(FACTS)
    assert same_change(twice, once)


@every_method
def test_two_targets_for_a_prompt_are_refused(method: str) -> None:
    for other in (
        dataclasses.replace(FACTS[1], target="Brazil"),
        dataclasses.replace(FACTS[1], target=None),
    ):
        with pytest.raises(InputError, match=r"two targets for one prompt.*leave one out"):
            edit(method, [*FACTS, other])
    split = Fact("Edwin is the king", "{} of all", "Brazil")  # the same words, cut elsewhere
    with pytest.raises(InputError, match="two targets for one prompt"):
        edit(method, [*FACTS, split])


SAME_KEY = [FACTS[1], Fact("Edwin", "{} plays", "basketball")]
"""A key does not depend on what follows the subject, so these two share one."""


@pytest.mark.parametrize("method", [m for m in UPDATING if m != "emmet"])
def test_one_key_with_two_targets_is_recorded(method: str) -> None:
    """The edit is not much longer than one for either fact."""
    delta = edit(method, SAME_KEY)
    for i, record in enumerate(delta.convergence):
        assert record["shares_key_with"] == 1 - i and record["cosine"] == pytest.approx(1, abs=1e-6)
    for layer in delta.layers:
        longest = max(edit(method, fact).dense(layer).norm() for fact in SAME_KEY)
        assert delta.dense(layer).isfinite().all() and delta.dense(layer).norm() < 2.5 * longest
    together = edit(method, FACTS)
    assert not any("shares_key_with" in record for record in together.convergence), "the control"
    same_target = [FACTS[1], dataclasses.replace(FACTS[1], prompt="{} is a king of")]
    delta = edit(method, same_target)
    assert not any("shares_key_with" in record for record in delta.convergence), "one target"


def test_one_key_with_two_targets_has_no_exact_solution() -> None:
    with pytest.raises(NumericsError, match=r"facts 0 and 1 are the closest.*give a ridge above 0"):
        edit("emmet", SAME_KEY)
    delta = edit("emmet", SAME_KEY, config=EmmetConfig((0, 1), **SEARCH))
    assert [record["shares_key_with"] for record in delta.convergence] == [1, 0]


LONG = "The Eiffel Tower is in Paris, the Louvre too. The official religion of Edwin is"
NEAR_KEYS = [Fact(f"a a a {LONG}", "{} now", "a king"), Fact(f"a b a {LONG}", "{} now", "Brazil")]
"""Two long subjects that differ in one letter near the beginning."""
GENTLE: dict[str, EditConfig] = {
    **CONFIGS,
    "memit": MemitConfig((0, 1), moment_weight=1.0, **SEARCH),
    "emmet": EmmetConfig((0, 1), moment_weight=10.0, **SEARCH),
    "alphaedit": AlphaEditConfig((0, 1), threshold=None, energy=0.5, l2=0.1, **SEARCH),
}
"""With ridges that are large compared with the differences between keys."""


@every_update
def test_nearly_collinear_keys_are_recorded_and_do_not_break_the_model(method: str) -> None:
    """A ridge bounds the length of the edit. Other text stays even without one."""
    lm = model()

    def surprise() -> Tensor:
        return -lm.log_prob(TEXTS, [" Edwin is a king."] * len(TEXTS))

    before, longer = surprise(), []
    for config in (GENTLE[method], CONFIGS[method]):
        delta = edit(method, NEAR_KEYS, config=config, contexts=["{}"])
        alone = edit(method, NEAR_KEYS[0], config=config, contexts=["{}"])
        assert [record["shares_key_with"] for record in delta.convergence] == [1, 0]
        assert all(0.95 < record["cosine"] < 1 for record in delta.convergence)
        lengths = (delta.dense(layer).norm() / alone.dense(layer).norm() for layer in delta.layers)
        longer.append(max(map(float, lengths)))
        with applied(lm, delta):
            assert (surprise() / before - 1).abs().max() < 0.1
    assert longer[0] < 7 and (longer[1] > 2 * longer[0] or GENTLE[method] is CONFIGS[method])


# ── experts ───────────────────────────────────────────────────────────────────────────────────────

MIXTRAL = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {
    **LLAMA,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}


@every_method
def test_experts_are_refused(method: str) -> None:
    lm = wrap(tiny_model("mixtral", **MIXTRAL), byte_tokenizer(bos=True))
    held = {layer: SecondMoment.from_matrix(torch.eye(48), count=1) for layer in (0, 1)}
    before = lm.fingerprint
    for config in (None, CONFIGS[method]):
        with pytest.raises(
            UnsupportedModelError,
            match=r"every layer .* mixture of experts.*take a model without experts",
        ):
            edit(method, FACTS, lm, moments=held, config=config)
    assert lm.fingerprint == before


@every_method
def test_dense_layers_next_to_experts_are_named_and_edited(method: str) -> None:
    lm = wrap(tiny_model("qwen2_moe", **QWEN_MOE, mlp_only_layers=[0, 2]), byte_tokenizer(bos=True))
    assert [ffn.n_experts for ffn in lm.ffn] == [0, 4, 0]
    held = {layer: SecondMoment.from_matrix(torch.eye(48), count=1) for layer in (0, 1, 2)}
    if method == "append":
        held = full_rank_moments(lm, (0, 2), site="inputs")
    with pytest.raises(
        UnsupportedModelError,
        match=r"layer 1 is a mixture of 4 experts.*choose among layers \[0, 2\]",
    ):
        edit_model(lm, FACTS[0], method, CONFIGS[method].at([1]), moments=held, contexts=CONTEXTS)
    fact, config = FACTS[0], CONFIGS[method].at([0])
    before = lm.fingerprint
    delta = edit_model(lm, fact, method, config, moments=held, contexts=CONTEXTS)
    assert lm.fingerprint == before
    said = float(lm.log_prob([fact.text], [str(fact.target)])[0])
    with applied(lm, delta):
        assert float(lm.log_prob([fact.text], [str(fact.target)])[0]) > said
