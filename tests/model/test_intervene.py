"""Scaled neurons, compared with weights edited by hand and with first-order predictions."""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import BERT, GPT2, LLAMA, byte_tokenizer, masking_tokenizer, tiny_model
from factsmith.core.errors import InputError, LayerError
from factsmith.locate.neurons import knowledge_neurons
from factsmith.model.intervene import intervene
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.trace import hook_count

SMALL = {**LLAMA, "head_dim": 8}
PROMPTS = ["The mother tongue of Danielle Darrieux is", "Danielle lies in"]
BLANKS = [
    "The mother tongue of Danielle is [MASK].",
    "[MASK] is the mother tongue of Danielle Darrieux, and that is that.",
]
SHARED = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
# family: (config, neurons, the parameter that holds a neuron's value and where in it)
MODELS: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]] = {
    "gpt2": (GPT2, [(0, 3), (2, 120), (2, 121)]),
    "llama": (LLAMA, [(0, 3), (1, 47), (2, 0)]),
    "gemma2": ({**SMALL, "sliding_window": 6}, [(0, 3), (1, 47), (2, 0)]),
    "mixtral": (
        {**SMALL, "num_local_experts": 4},
        [(0, e, 3) for e in range(4)] + [(2, e, i) for e in range(3) for i in range(20)],
    ),
    "qwen2_moe": (
        {**SMALL, **SHARED},
        [(0, 4, 39), *[(1, e, i) for e in range(5) for i in range(15)]],
    ),
    "gpt_oss": (
        {
            **SMALL,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention"] * 3,
        },
        [(1, e, i) for e in range(4) for i in range(15)],
    ),
    "bert": (BERT, [(0, 3), (1, 47), (2, 0)]),
}


@lru_cache
def model(family: str) -> LanguageModel:
    masked = family == "bert"
    return wrap(
        tiny_model(family, masked=masked, **MODELS[family][0]),
        masking_tokenizer() if masked else byte_tokenizer(),
    )


def neurons(family: str) -> Any:
    return MODELS[family][1]


def value(module: Any, family: str, neuron: tuple[int, ...]) -> Tensor:
    """Where a neuron's value lies, by the names in transformers: (d_model,), a view."""
    layer, *expert, i = neuron
    weight: Tensor  # (d_model, d_ff)
    if family == "gpt2":
        weight = module.transformer.h[layer].mlp.c_proj.weight.T
    elif family == "bert":
        weight = module.bert.encoder.layer[layer].output.dense.weight
    elif not expert:
        weight = module.model.layers[layer].mlp.down_proj.weight
    elif expert == [4]:
        weight = module.model.layers[layer].mlp.shared_expert.down_proj.weight
    else:
        weight = module.model.layers[layer].mlp.experts.down_proj[expert[0]]
        weight = weight.T if family == "gpt_oss" else weight
    return weight[:, i]


def edited(family: str, scale: float) -> Any:
    """A copy of the model with the neurons' values scaled, which equals scaled coefficients."""
    module = copy.deepcopy(model(family).module)
    for neuron in neurons(family):
        value(module, family, neuron).mul_(scale)
    return module


def logits(lm: LanguageModel, module: Any, prompt: str) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(input_ids=torch.tensor([lm.prompt_ids(prompt)])).logits
    return out


@pytest.mark.parametrize("scale", [0, 2, -1.5])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.filterwarnings("ignore:.*experts.*")
def test_equals_a_model_whose_values_were_scaled_by_hand(family: str, scale: float) -> None:
    lm = model(family)
    prompts = BLANKS if family == "bert" else PROMPTS
    other = wrap(edited(family, scale), lm.tokenizer)
    before = lm.log_prob(prompts, ["is", "is"])
    with intervene(lm, neurons(family), scale):
        for prompt in prompts:
            torch.testing.assert_close(
                logits(lm, lm.module, prompt),
                logits(lm, other.module, prompt),
                rtol=1e-4,
                atol=1e-4,
            )
        during = lm.log_prob(prompts, ["is", "is"])
        torch.testing.assert_close(
            during, other.log_prob(prompts, ["is", "is"]), rtol=1e-4, atol=1e-4
        )
        if family != "bert":
            assert lm.answer(prompts) == other.answer(prompts)  # token by token, with a cache
    assert float((during - before).abs().max()) > 1e-3
    assert torch.equal(lm.log_prob(prompts, ["is", "is"]), before)
    assert hook_count(lm.module.modules()) == 0


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen2_moe"])
def test_blocks_inside_one_another_multiply(family: str) -> None:
    lm = model(family)
    expected = logits(lm, edited(family, -3.0), PROMPTS[0])
    with (
        intervene(lm, neurons(family), 2),
        intervene(lm, neurons(family) * 2, -1.5),
    ):  # given twice, scaled once
        torch.testing.assert_close(
            logits(lm, lm.module, PROMPTS[0]), expected, rtol=1e-4, atol=1e-4
        )
    with intervene(lm, neurons(family), 2):
        doubled = logits(lm, lm.module, PROMPTS[0])
        with intervene(lm, neurons(family), 0):
            assert not torch.allclose(logits(lm, lm.module, PROMPTS[0]), doubled)
        assert torch.equal(logits(lm, lm.module, PROMPTS[0]), doubled)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_everything_is_put_back_after_an_error(family: str) -> None:
    lm = model(family)
    before = logits(lm, lm.module, PROMPTS[0])
    state = {name: p.clone() for name, p in lm.module.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), intervene(lm, neurons(family), 0):
        raise RuntimeError("inside")
    with pytest.raises(LayerError), intervene(lm, neurons(family), 0), intervene(lm, [(99, 0)], 0):
        raise AssertionError("unreachable")
    assert hook_count(lm.module.modules()) == 0 and not any(
        "forward" in vars(m) for m in lm.module.modules()
    )
    assert torch.equal(logits(lm, lm.module, PROMPTS[0]), before)
    assert all(torch.equal(p, state[name]) for name, p in lm.module.named_parameters())


def test_changes_are_what_gradients_and_scores_predict() -> None:
    lm = wrap(tiny_model("llama", **LLAMA).double(), byte_tokenizer())
    prompt, layer, e = lm.tokenizer.decode([90]), 2, 1e-3
    (token,) = lm.prompt_ids(prompt)  # one token, so that every token is the one that predicts
    scored = knowledge_neurons(lm, prompt, "is", steps=4000)
    answer = scored.target_ids[0][0]

    def p() -> Tensor:
        out: Tensor = lm.module(input_ids=torch.tensor([[token]])).logits[0, -1]
        return out.softmax(-1)[answer]

    # First order: scaling neuron i by 1 + e changes p by e times dp/d factor_i.
    with torch.enable_grad():
        factors = torch.ones(lm.ffn[layer].d_ff, dtype=torch.float64, requires_grad=True)
        handle = lm.ffn[layer].down.register_forward_pre_hook(lambda m, a: (a[0] * factors,))
        slope = torch.autograd.grad(p(), factors)[0]
        handle.remove()
    for i in scored.scores[0, layer].abs().topk(3).indices.tolist():
        with intervene(lm, [(layer, i)], 1 + e):
            up = float(p())
        with intervene(lm, [(layer, i)], 1 - e):
            down = float(p())
        assert (up - down) / (2 * e) == pytest.approx(float(slope[i]), rel=5e-3)
    # Completeness: silencing a whole layer takes away the sum of its scores.
    before = float(p())
    with intervene(lm, [(layer, i) for i in range(lm.ffn[layer].d_ff)], 0):
        assert before - float(p()) == pytest.approx(
            float(scored.scores[0, layer].sum()), rel=2e-2, abs=1e-7
        )
        assert float(p()) == pytest.approx(float(scored.silent[0, layer]), rel=1e-5)


def test_gradients_pass_through_scaled_experts() -> None:
    lm = model("mixtral")
    other = edited("mixtral", 2.0)
    embeddings = lm.embedding(torch.tensor([lm.prompt_ids(PROMPTS[0])])).detach()

    def gradient(module: Any) -> Tensor:
        leaf = embeddings.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(
                module(inputs_embeds=leaf).logits[0, -1].softmax(-1)[7], leaf
            )[0]

    plain = gradient(lm.module)
    with intervene(lm, neurons("mixtral"), 2):
        torch.testing.assert_close(gradient(lm.module), gradient(other), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(plain, gradient(other), rtol=1e-2)


def test_what_is_read_inside_the_block_is_scaled() -> None:
    lm = model("llama")
    plain = lm.coefficients(PROMPTS[0])
    with intervene(lm, [(2, 5)], 3):
        scaled = lm.coefficients(PROMPTS[0])
    torch.testing.assert_close(scaled[2, :, 5], 3 * plain[2, :, 5])
    assert torch.equal(scaled[:2], plain[:2]) and torch.equal(scaled[2, :, :5], plain[2, :, :5])
    moe = model("mixtral")
    routing = moe.routing(PROMPTS[0], 2)
    expert = int(routing.experts[-1, 0])
    with intervene(moe, [(2, expert, 5)], 3):
        inside = moe.routing(PROMPTS[0], 2)
    torch.testing.assert_close(inside.coefficients[-1, 0, 5], 3 * routing.coefficients[-1, 0, 5])


@pytest.mark.parametrize(
    "rows",
    [
        [(np.int64(0), np.int64(5)), (2, 7)],
        torch.tensor([[0, 5], [2, 7]]),
        np.array([[0, 5], [2, 7]]),
        [[0, 5], torch.tensor([2, 7])],
    ],
)
def test_neurons_may_be_rows_of_arrays_and_tensors(rows: Any) -> None:
    lm = model("llama")
    with intervene(lm, [(0, 5), (2, 7)], 0):
        plain = logits(lm, lm.module, PROMPTS[0])
    with intervene(lm, rows, 0):
        assert torch.equal(logits(lm, lm.module, PROMPTS[0]), plain)
    assert not torch.equal(logits(lm, lm.module, PROMPTS[0]), plain)


def test_no_neuron_is_no_change() -> None:
    lm = model("llama")
    before = logits(lm, lm.module, PROMPTS[0])
    with intervene(lm, [], 0):
        assert torch.equal(logits(lm, lm.module, PROMPTS[0]), before)


@pytest.mark.parametrize(
    ("family", "neuron", "message"),
    [
        ("llama", (3, 0), "layer 3 does not exist"),
        ("llama", (-1, 0), "layer -1 does not exist"),
        ("llama", (0, 48), "neurons 0 to 47"),
        ("llama", (0, -1), "neurons 0 to 47"),
        ("llama", (0, 0, 0), "no experts"),
        ("llama", (0,), "not a neuron"),
        ("llama", (0, 1.0), "not a neuron"),
        ("llama", (0, True), "not a neuron"),
        ("llama", torch.tensor([0.0, 1.0]), "not a neuron"),
        ("llama", torch.tensor([True, False]), "not a neuron"),
        ("llama", "ab", "not a neuron"),
        ("mixtral", (0, 0), "4 experts"),
        ("mixtral", (0, 4, 0), "expert 4 does not exist"),
        ("qwen2_moe", (0, 5, 0), "shared bank, number 4"),
        ("qwen2_moe", (0, 0, 24), "neurons 0 to 23"),
    ],
)
def test_neurons_that_do_not_exist_are_refused_in_words(
    family: str, neuron: Any, message: str
) -> None:
    with pytest.raises(LayerError, match=message), intervene(model(family), [neuron], 0):
        raise AssertionError("unreachable")


@pytest.mark.parametrize("scale", [math.nan, math.inf, "2", None])
def test_scales_that_are_no_numbers_are_refused_in_words(scale: Any) -> None:
    with pytest.raises(InputError, match="scale is"), intervene(model("llama"), [(0, 0)], scale):
        raise AssertionError("unreachable")
    with pytest.raises(InputError, match="neurons is"), intervene(model("llama"), "ab", 0):
        raise AssertionError("unreachable")
