"""Knowledge neurons against the plain loop of full passes, and sets counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from benchmarks.locate import plain_neurons
from torch import Tensor, nn

from conftest import (
    BERT,
    GPT2,
    LLAMA,
    blank_tokenizer,
    byte_tokenizer,
    masking_tokenizer,
    tiny_model,
)
from factsmith.core.errors import InputError, NumericsError
from factsmith.locate import gradients
from factsmith.locate.neurons import knowledge_neurons
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.trace import hook_count

SMALL = {**LLAMA, "head_dim": 8}
PROMPT, LONGER = "The mother tongue of Danielle Darrieux is", "Danielle lies in"
BLANK, LONGER_BLANK = (
    "The mother tongue of Danielle is [MASK].",
    "[MASK] is the mother tongue of Danielle Darrieux, and that is that.",
)

# family: (config, tokenizer, path of a layer's down-projection)
DENSE: dict[str, tuple[dict[str, Any], Callable[[], Any], str]] = {
    "gpt2": (GPT2, byte_tokenizer, "transformer.h.{}.mlp.c_proj"),
    "llama": (LLAMA, lambda: byte_tokenizer(bos=True), "model.layers.{}.mlp.down_proj"),
    "gemma2": (
        {**SMALL, "sliding_window": 6},
        lambda: byte_tokenizer(bos=True),
        "model.layers.{}.mlp.down_proj",
    ),  # a norm after the memory
    "gpt_neox": (
        LLAMA,
        byte_tokenizer,
        "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    ),  # parallel to the attention
    "openai-gpt": (
        GPT2,
        byte_tokenizer,
        "transformer.h.{}.mlp.c_proj",
    ),  # a norm after the memory, and no cache
    "opt": (
        {**LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0},
        byte_tokenizer,
        "model.decoder.layers.{}.fc2",
    ),
    "bert": (BERT, masking_tokenizer, "bert.encoder.layer.{}.output.dense"),
    "roberta": (
        {**BERT, "pad_token_id": 322, "max_position_embeddings": 400},
        blank_tokenizer,
        "roberta.encoder.layer.{}.output.dense",
    ),
}
MASKED = ("bert", "roberta")
EXPERTS = {
    "mixtral": {**SMALL, "num_local_experts": 4},
    "qwen2_moe": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "gpt_oss": {
        **SMALL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention"] * 3,
    },
}


@lru_cache
def model(family: str, **changes: Any) -> LanguageModel:
    """In float64, so that nothing but the method makes a difference."""
    config, tokenizer, _ = (
        DENSE[family] if family in DENSE else (EXPERTS[family], byte_tokenizer, "")
    )
    config = {**config, **changes}
    module = tiny_model(family, masked=family in MASKED, **config).double()
    module.config._experts_implementation = "eager"  # the fused kernels know no float64
    return wrap(module, tokenizer())


def texts(family: str) -> tuple[str, str]:
    return (BLANK, LONGER_BLANK) if family in MASKED else (PROMPT, LONGER)


def plain(family: str, prompt: str, target: str, steps: int = 20) -> Tensor:
    """Return the scores (n_layers, d_ff) by full passes, with nothing that factsmith discovers."""
    lm = model(family)
    if family in MASKED:
        text, mask = prompt.replace("[MASK]", lm.tokenizer.mask_token), lm.tokenizer.mask_token_id
        ids = lm.tokenizer(text)["input_ids"]
        columns = [i for i, token in enumerate(ids) if token == mask]
        answer = lm.question(prompt, target)[2]
    else:
        head = lm.tokenizer(prompt)["input_ids"]
        answer = lm.tokenizer(prompt + " " + target)["input_ids"][len(head) :]
        ids, columns = head + answer[:-1], [len(head) - 1 + i for i in range(len(answer))]
    downs = [lm.module.get_submodule(DENSE[family][2].format(layer)) for layer in range(3)]
    return plain_neurons(lm.module, downs, ids, columns, answer, steps)


def close(scores: Tensor, expected: Tensor, within: float = 1e-5) -> bool:
    return bool((scores - expected).abs().max() <= within * expected.abs().max())


@pytest.mark.parametrize("family", DENSE)
def test_scores_equal_the_plain_loop_one_by_one_or_together(family: str) -> None:
    lm, prompts = model(family), texts(family)
    together = knowledge_neurons(lm, prompts, "is")
    for row, prompt in enumerate(prompts):
        expected = plain(family, prompt, "is")
        assert close(together.scores[row], expected)
        assert close(knowledge_neurons(lm, prompt, "is").scores[0], expected)
        assert not close(together.scores[1 - row], expected, 0.1)  # the comparison can fail
    torch.testing.assert_close(
        together.probability.log().double(),
        lm.log_prob(list(prompts), ["is"] * 2).double(),
        rtol=1e-5,
        atol=1e-5,
    )
    assert hook_count(lm.module.modules()) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "openai-gpt"])
def test_targets_of_several_tokens_are_joint_probabilities(family: str) -> None:
    located = knowledge_neurons(model(family), [PROMPT, LONGER], "French Zürich")
    assert len(located.target_ids[0]) > 3
    for row, prompt in enumerate((PROMPT, LONGER)):
        assert close(located.scores[row], plain(family, prompt, "French Zürich"))


def test_masked_targets_of_several_tokens() -> None:
    prompt = BLANK.replace("[MASK]", "[MASK] [MASK] [MASK]")
    lm = model("bert")
    target = "French Paris is"
    assert close(knowledge_neurons(lm, prompt, target).scores[0], plain("bert", prompt, target))
    with pytest.raises(InputError, match="needs 3 masks"):
        knowledge_neurons(lm, BLANK, target)


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_any_number_of_steps_and_any_cut_of_the_batch(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = knowledge_neurons(model("gemma2"), PROMPT, "is", steps=steps)
    assert close(whole.scores[0], plain("gemma2", PROMPT, "is", steps))
    monkeypatch.setattr(gradients, "BATCH_BYTES", 1)
    monkeypatch.setattr(gradients, "HEAD_ROWS", 1)
    one_by_one = knowledge_neurons(model("gemma2"), PROMPT, "is", steps=steps)
    assert close(one_by_one.scores, whole.scores, 1e-6)
    assert torch.allclose(one_by_one.silent, whole.silent, rtol=1e-6)


@pytest.mark.parametrize("family", DENSE)
def test_few_nodes_give_what_every_point_gives(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, prompts = model(family), texts(family)
    climbed: list[int] = []
    climb = gradients._climb
    monkeypatch.setattr(
        gradients,
        "_climb",
        lambda asked, layers, *rest: climbed.append(len(layers)) or climb(asked, layers, *rest),
    )
    whole = knowledge_neurons(lm, prompts, "is", every_point=True)
    assert sum(climbed) == 2 * 3 * 20
    climbed.clear()
    few = knowledge_neurons(lm, prompts, "is")
    assert close(few.scores, whole.scores)
    torch.testing.assert_close(few.silent, whole.silent, rtol=1e-6, atol=0)
    # Some layers need no more than the nodes; in Gemma 2 none, since its norms are crossed at zero.
    if family in ("gpt2", "llama", "gpt_neox", "gemma2"):
        assert (sum(climbed) < 2 * 3 * (8 + 20)) == (family != "gemma2")


@pytest.mark.parametrize("family", DENSE)
def test_completeness_the_scores_of_a_layer_sum_to_what_silencing_it_takes_away(
    family: str,
) -> None:
    # A norm follows Gemma 2's memory. p changes within sqrt(eps) of alpha = 0, so eps is made large
    # enough for the points to notice.
    changes = {"rms_norm_eps": 0.1} if family == "gemma2" else {}
    assert_complete(model(family, **changes), texts(family)[0])
    if family == "gemma2":
        assert (
            float(knowledge_neurons(model(family), PROMPT, "is", steps=50).gaps.abs().max()) > 0.1
        )  # with the real eps the record shows a gap


@pytest.mark.parametrize("family", EXPERTS)
def test_completeness_with_experts(family: str) -> None:
    # Where every token goes to every expert, p is smooth. Otherwise p jumps when a layer above
    # chooses other experts, and no integral notices.
    assert_complete(model(family, num_experts_per_tok=4), PROMPT)
    located = knowledge_neurons(model(family), PROMPT, "is", steps=400)
    last = abs(float(located.probability[0] - located.silent[0, -1]))
    assert (
        abs(float(located.gaps[0, -1])) < 0.05 * last + 1e-7
    )  # above the last layer there is no router


def assert_complete(lm: LanguageModel, prompt: str) -> None:
    once, few, many = (knowledge_neurons(lm, prompt, "is", steps=steps) for steps in (1, 50, 400))
    # A left Riemann sum's error shrinks with 1 / steps.
    worst_few, worst_many = float(few.gaps.abs().max()), float(many.gaps.abs().max())
    assert worst_many < 0.2 * worst_few + 1e-7
    taken = (many.probability[:, None] - many.silent).abs()
    assert worst_many < 0.05 * float(taken.max())
    # One gradient, however taken, does not add up.
    assert float(once.gaps.abs().max()) > 5 * worst_few


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_silent_is_the_probability_with_the_layer_zeroed_where_it_predicts(family: str) -> None:
    lm = model(family)
    located = knowledge_neurons(lm, PROMPT, "is")
    ids, _, (answer,) = lm.question(PROMPT, "is")
    for layer in range(3):

        def silence(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            given = args[0].clone()
            given[:, -1] = 0
            return (given,)

        handle = lm.module.get_submodule(DENSE[family][2].format(layer)).register_forward_pre_hook(
            silence
        )
        p = lm.module(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[answer]
        handle.remove()
        assert float(located.silent[0, layer]) == pytest.approx(float(p), rel=1e-5)
        assert abs(float(located.silent[0, layer] / located.probability[0]) - 1) > 1e-3


def test_half_a_gated_coefficient_gives_other_numbers() -> None:
    """A gated neuron's coefficient is act(gate) * up.

    To scale the gate before its activation is to integrate along another path.
    """
    lm, layer, steps = model("llama"), 0, 100
    located = knowledge_neurons(lm, PROMPT, "is", steps=steps)
    ids, _, (answer,) = lm.question(PROMPT, "is")
    gate_projection = lm.module.model.layers[layer].mlp.gate_proj
    kept: list[Tensor] = []
    handle = gate_projection.register_forward_hook(
        lambda m, a, out: kept.append(out.detach()[:, -1])
    )
    with torch.no_grad():
        lm.module(input_ids=torch.tensor([ids]))
    handle.remove()
    points = (torch.arange(steps)[:, None].double() / steps * kept[0]).requires_grad_()

    def scale(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return torch.cat([out[:, :-1], points[:, None]], dim=1)

    handle = gate_projection.register_forward_hook(scale)
    p = (
        lm.module(input_ids=torch.tensor([ids]).expand(steps, -1))
        .logits[:, -1]
        .softmax(-1)[:, answer]
    )
    handle.remove()
    along_gate = kept[0][0] * torch.autograd.grad(p.sum(), points)[0].mean(0)
    assert not close(along_gate, located.scores[0, layer], 0.05)
    assert close(located.scores[0], plain("llama", PROMPT, "is", steps))


def expert_forward(
    holder: Any,
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    factor: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Return the output of Mixtral-like experts, by the published formula, token by token.

    factor(expert, token) multiplies the coefficients.
    """
    out = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            gate, up = (holder.gate_up_proj[expert] @ hidden[token]).chunk(2)
            coefficients = nn.functional.silu(gate) * up * factor(expert, torch.tensor(token))
            out = out.index_add(
                0, torch.tensor([token]), (weight * (holder.down_proj[expert] @ coefficients))[None]
            )
    return out


@contextmanager
def experts_written_out(holder: Any, factor: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    holder.forward = lambda hidden, chosen, weights: expert_forward(
        holder, hidden, chosen, weights, factor
    )
    try:
        yield
    finally:
        del holder.forward


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_equal_the_formula_written_out(family: str) -> None:
    lm = model(family)
    steps, d_ff = 8, lm.ffn[0].experts[0].d_ff
    located = knowledge_neurons(lm, PROMPT, "is", steps=steps)
    ids, _, (answer,) = lm.question(PROMPT, "is")
    last = len(ids) - 1
    for layer in (0, 2):
        block = lm.module.model.layers[layer].mlp
        expected = torch.zeros(4 * d_ff + (40 if family == "qwen2_moe" else 0), dtype=torch.float64)
        for step in range(steps):
            # d p / d factor at alpha is the coefficient times d p / d coefficient there.
            factors = torch.full(
                (len(expected),), step / steps, dtype=torch.float64, requires_grad=True
            )

            def factor(expert: int, token: Tensor, factors: Tensor = factors) -> Tensor:
                return (
                    factors[expert * d_ff : (expert + 1) * d_ff]
                    if int(token) == last
                    else torch.ones(d_ff, dtype=torch.float64)
                )

            def shared(
                module: nn.Module, args: tuple[Tensor, ...], factors: Tensor = factors
            ) -> tuple[Tensor]:
                at_last = (torch.arange(len(ids)) == last).view(*args[0].shape[:-1], 1)
                return (torch.where(at_last, args[0] * factors[4 * d_ff :], args[0]),)

            handles = (
                [block.shared_expert.down_proj.register_forward_pre_hook(shared)]
                if family == "qwen2_moe"
                else []
            )
            with experts_written_out(block.experts, factor):
                p = lm.module(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[answer]
            for handle in handles:
                handle.remove()
            expected += torch.autograd.grad(p, factors)[0] / steps
        assert close(located.scores[0, layer, : len(expected)], expected)
        assert int((expected != 0).sum()) == 2 * d_ff + (
            40 if family == "qwen2_moe" else 0
        )  # two experts a token
    for neuron, score in located.top(3):
        layer, expert, i = neuron
        assert float(located.scores[0, layer, expert * d_ff + i]) == pytest.approx(score)
    shared_bank = [n for n in located.coarse[0] if n[1] == 4]
    assert all(0 <= i < 40 for _, _, i in shared_bank) and (
        family == "qwen2_moe" or not shared_bank
    )


def test_the_activation_baseline_is_the_coefficients() -> None:
    lm = model("llama")
    located = knowledge_neurons(lm, [PROMPT, LONGER], "is")
    for row, prompt in enumerate((PROMPT, LONGER)):
        assert close(located.activations[row], lm.coefficients(prompt)[:, -1].float())
        activations = located.activations[row]
        strong = (activations >= 0.5 * activations.max()).nonzero().tolist()
        by_hand = {(layer, i) for layer, i in strong}
        assert set(located.baseline_coarse[row]) == by_hand
    assert located.baseline != located.refined
    # Over several tokens: their mean.
    several = knowledge_neurons(lm, PROMPT, "French")
    n = len(several.target_ids[0])
    ids, _, _ = lm.question(PROMPT, "French")
    text = lm.tokenizer.decode(ids[1:])
    assert close(several.activations[0], lm.coefficients(text)[:, -n:].mean(1).float())


def test_the_record_says_what_the_model_itself_would_answer() -> None:
    lm = model("gpt2")
    next_token = lm.next_tokens(PROMPT, 1)[0][0]
    ids = lm.prompt_ids(PROMPT)
    with torch.no_grad():
        likeliest = int(lm.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    located = knowledge_neurons(lm, PROMPT, "is")
    assert located.predicted == (next_token,) and located.is_correct == (
        located.target_ids[0][0] == likeliest,
    )
    assert not located.is_correct[0]


def test_the_record_is_plain_json_and_compact() -> None:
    located = knowledge_neurons(model("mixtral"), [PROMPT, LONGER], "French", steps=3)
    assert (
        located.scores.dtype == torch.float32
        and located.scores.shape == (2, 3, 4 * 48) == located.activations.shape
    )
    text = json.dumps(located.to_dict())
    read = json.loads(text)
    assert (
        "scores" not in read
        and len(read["top"]) == 20
        and len(read["gaps"]) == 2
        and read["steps"] == 3
    )
    assert read["coarse"][0][0] == list(located.coarse[0][0])
    assert [n for n, _ in located.top(1)] == [located.top(5)[0][0]]


@pytest.mark.parametrize(
    ("prompts", "target", "options", "message"),
    [
        ([], "is", {}, "at least one"),
        ([PROMPT, 3], "is", {}, "a prompt is 3"),
        (None, "is", {}, "prompts is None"),
        (PROMPT, None, {}, "the target is None"),
        (PROMPT, "is", {"steps": True}, "steps is True"),
        (PROMPT, "is", {"threshold": "a"}, "threshold is 'a'"),
        (PROMPT, " ", {}, "target is empty"),
        ("The mother tongue of {} is", "French", {}, "Fill the subject in"),
        (PROMPT, "is", {"steps": 0}, "steps is 0"),
        (PROMPT, "is", {"threshold": 0.0}, "threshold is 0"),
        (PROMPT, "is", {"share": 1.5}, "share is 1.5"),
        (PROMPT, "is", {"baseline_threshold": float("nan")}, "baseline_threshold is nan"),
        ("is " * 80, "is", {}, "shorten"),
        ("", "is", {}, "no token"),
    ],
)
def test_bad_input_is_refused_in_words(
    prompts: Any, target: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        knowledge_neurons(model("gpt2"), prompts, target, **options)


def test_a_target_without_probability_is_refused_in_words() -> None:
    lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    lm.module.transformer.ln_f.weight.mul_(1000)
    with pytest.raises(NumericsError, match=r"p\('French'\) .* is 0"):
        knowledge_neurons(lm, PROMPT, "French")
    lm.module.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="nan"):
        knowledge_neurons(lm, PROMPT, "French")


def test_progress_counts_prompts() -> None:
    seen: list[tuple[int, int]] = []
    knowledge_neurons(
        model("gpt2"),
        [PROMPT, LONGER, PROMPT],
        "is",
        steps=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (3, 3) and [d for d, _ in seen] == sorted({d for d, _ in seen})


def test_half_precision_models_are_attributed_in_their_own_dtype() -> None:
    lm = wrap(tiny_model("llama", **LLAMA).bfloat16(), byte_tokenizer())
    exact = wrap(tiny_model("llama", **LLAMA).bfloat16().double(), byte_tokenizer())
    located, expected = knowledge_neurons(lm, PROMPT, "is"), knowledge_neurons(exact, PROMPT, "is")
    assert located.scores.dtype == torch.float32
    assert (
        float(torch.cosine_similarity(located.scores.flatten(), expected.scores.flatten(), dim=0))
        > 0.9
    )
