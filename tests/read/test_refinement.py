"""Many predictions, compared with plain passes and loops, and on neurons made to decide alone.

Controls notice a wrong sign and a wrong pairing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import GPT2, LLAMA, TEXTS, byte_tokenizer, tiny_model
from devices import devices, spread
from factsmith.core.errors import InputError, UnsupportedModelError
from factsmith.model import running
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.trace import get_slot, hook_count, recording
from factsmith.read.composition import compose
from factsmith.read.refinement import CASES, Refinement, refinement
from factsmith.read.values import value_tokens

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "gemma2": {
        **LLAMA,
        "head_dim": 8,
    },  # a norm after the FFN, a softcap after the unembedding
    "gptj": {**GPT2, "rotary_dim": 4},  # attention and FFN in parallel
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **LLAMA,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
PROMPTS = [text[: 9 + 3 * i].rstrip() for i, text in enumerate(TEXTS * 3)]  # of many lengths


def model(family: str) -> LanguageModel:
    return wrap(
        tiny_model(family, **FAMILIES[family]), byte_tokenizer(bos=family not in ("gpt2", "gptj"))
    )


def sub_updates(lm: LanguageModel, prompt: str, at: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Return for each layer (coefficient, value) of every sub-update at one token."""
    by_layer: list[list[tuple[Tensor, Tensor]]] = []
    for ffn in lm.ffn:
        if not ffn.n_experts:
            by_layer.append(
                list(zip(lm.coefficients(prompt, [ffn.layer])[0, at], ffn.values, strict=True))
            )
            continue
        routing = lm.routing(prompt, ffn.layer)
        pairs = [
            pair
            for expert, weight, m in zip(
                routing.experts[at].tolist(),
                routing.weights[at],
                routing.coefficients[at],
                strict=True,
            )
            for pair in zip(weight * m, ffn.experts[expert].values, strict=True)
        ]
        if (
            routing.shared is not None
            and routing.shared_weight is not None
            and ffn.shared is not None
        ):
            pairs += list(
                zip(routing.shared_weight[at] * routing.shared[at], ffn.shared.values, strict=True)
            )
        by_layer.append(pairs)
    return by_layer


def brute_force(
    lm: LanguageModel, prompts: list[str], among: tuple[float, ...], at: int = -1
) -> dict[str, Tensor]:
    """Return the same from one plain pass a prompt and loops, with the paper's bare projection."""
    weight = lm.module.get_output_embeddings().weight.float()
    hits = torch.zeros(
        len(among), lm.n_layers, len(prompts), len(prompts)
    )  # which prompt's neurons predict which prompt's token
    by_layer, said, tops = torch.zeros(len(prompts), lm.n_layers).long(), {}, []
    halves = torch.zeros(len(prompts), lm.n_layers).long()
    counted = torch.zeros(len(among), lm.n_layers)
    for p, prompt in enumerate(prompts):
        parts: dict[Any, Any] = {("ffn", f.layer): f.module for f in lm.ffn} | {
            ("layer", i): x for i, x in enumerate(lm.layers)
        }
        with recording({"in": lm.layers[0], **parts}) as calls:
            lm.module(input_ids=torch.tensor([lm.prompt_ids(prompt)]))
        width = len(lm.prompt_ids(prompt))
        states = [get_slot(calls["in"][0], lm.slot)[0, at]]
        for layer, each in enumerate(sub_updates(lm, prompt, at)):
            out = calls["ffn", layer][0].output.reshape(width, -1)[at]
            after = calls["layer", layer][0].output[0, at]
            added = (
                out
                if lm.ffn[layer].adds_directly
                else lm.module.model.layers[layer].post_feedforward_layernorm(out)
            )
            states += [after - added, after]
            by_layer[p, layer] = int((weight @ out).argmax())
            m, values = torch.stack([m for m, _ in each]), torch.stack([v for _, v in each])
            strength = m.abs() * values.norm(dim=1)
            order = strength.argsort(descending=True).tolist()
            speak = (
                (m * (values @ weight[by_layer[p, layer]]))
                .clamp(min=0)
                .double()
                .sort(descending=True)
                .values
            )
            halves[p, layer] = 1 + int((speak.cumsum(0) < speak.sum() / 2).sum())
            for a, share in enumerate(among):
                kept: list[int] = []
                for i in order:
                    if (
                        kept
                        and share < 1
                        and float(strength[kept].double().sum())
                        >= share * float(strength.double().sum())
                    ):
                        break
                    if strength[i] > 0:
                        kept.append(i)
                said[p, a, layer] = {int((weight @ (m[i] * values[i])).argmax()) for i in kept}
                counted[a, layer] += len(kept) / len(prompts)
        tops.append(lm.head(torch.stack(states)).argmax(-1))
    for (p, a, layer), tokens in said.items():
        hits[a, layer, p] = torch.tensor(
            [float(int(token) in tokens) for token in by_layer[:, layer]]
        )
    top = torch.stack(tops)
    before, after = top[:, 1::2], top[:, 2::2]
    same_before, same_own = (after == before).double(), (after == by_layer).double()
    cases = (
        same_before * (1 - same_own),
        same_own * (1 - same_before),
        same_before * same_own,
        (1 - same_before) * (1 - same_own),
    )
    return {
        "composed": 1 - hits.diagonal(dim1=2, dim2=3).mean(-1).double(),
        "chance": 1 - hits.mean((-1, -2)).double(),
        "counted": counted.double(),
        "half_of_layer": halves,
        "says": (by_layer == top[:, -1:]).double().mean(0),
        "answers": top[:, -1],
        **{name: case.mean(0) for name, case in zip(CASES, cases, strict=True)},
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_plain_passes_and_loops(family: str) -> None:
    lm = model(family)
    average = refinement(lm, PROMPTS, among=(1.0, 0.5, 0.1, 0.0))
    with torch.no_grad():
        expected = brute_force(lm, PROMPTS, average.among)
    for name, value in expected.items():
        got = average.cases[name] if name in CASES else getattr(average, name)
        assert torch.allclose(got.double(), value.double(), atol=1e-5), name
    for i, prompt in enumerate(PROMPTS[:4]):
        single = compose(lm, prompt)
        assert (
            single.target_id == int(average.answers[i])
            and abs(single.half - int(average.half[i])) <= 1
        )
        assert torch.equal(single.ranks, average.ranks[i])
        assert torch.allclose(single.probabilities, average.probabilities[i], atol=1e-5)
        assert sum(map(len, (m for m, _ in single.neurons.values()))) == average.neurons
    assert torch.allclose(
        sum(average.cases.values(), torch.zeros(())), torch.ones(lm.n_layers, dtype=torch.float64)
    )
    assert bool((average.composed.diff(dim=0) >= 0).all()), (
        "the fewer neurons count, the fewer predictions are theirs"
    )
    assert 0 < float(average.composed[1].mean()) < 1 and not torch.allclose(
        average.composed, average.chance
    ), "there is something to tell"
    assert hook_count(lm.module.modules()) == 0


def decided(lm: LanguageModel, sign: int, others: float) -> Refinement:
    """Refine a model in whose first layer one neuron, always on, writes a token's direction.

    The values of the other neurons are scaled.
    """
    mlp, rows = lm.module.transformer.h[0].mlp, lm.module.transformer.wte.weight
    mlp.c_fc.weight[:, 7], mlp.c_fc.bias[7] = 0.0, 5.0  # GELU(5) = 5, whatever comes in
    mlp.c_proj.weight.mul_(others)
    mlp.c_proj.weight[7] = sign * rows[100]
    mlp.c_proj.bias.zero_()
    return refinement(lm, PROMPTS, among=(1.0, 0.5, 0.0))


@torch.no_grad()
def test_a_neuron_that_decides_alone() -> None:
    alone = decided(model("gpt2"), 1, 1e-3)
    assert alone.composed[:, 0].tolist() == [0, 0, 0] and alone.chance[:, 0].tolist() == [0, 0, 0]
    assert alone.counted[1:, 0].tolist() == [1, 1] and alone.half_of_layer[:, 0].tolist() == [
        1
    ] * len(PROMPTS)
    assert float(alone.composed[2, 1:].min()) > 0.5, "in the other layers no neuron decides alone"
    # The same neuron among many others that write together: its token is no longer predicted.
    among_many = decided(model("gpt2"), 1, 3.0)
    assert (
        float(among_many.composed[2, 0]) > 0.5
        and float(among_many.half_of_layer[:, 0].double().mean()) > 3
    )


@torch.no_grad()
def test_the_cases_of_a_stream_that_biases_decide() -> None:
    lm = model("gpt2")
    first, second, third = (block.mlp for block in lm.module.transformer.h)
    rows = lm.module.transformer.wte.weight
    for mlp, token in ((first, 100), (second, 100), (third, 200)):
        mlp.c_proj.weight.zero_()
        mlp.c_proj.bias.copy_(1e3 * rows[token] / rows[token].norm())
        lm.module.transformer.h[mlp is second].attn.c_proj.weight.mul_(1e-3)
    third.c_proj.bias.mul_(1e-4)
    average = refinement(lm, PROMPTS)
    assert [
        float(average.cases[case][i]) for i, case in enumerate(("ffn", "agreement", "residual"))
    ] == [1, 1, 1]
    assert average.says.tolist() == [1, 1, 0] and average.answers.tolist() == [100] * len(PROMPTS)
    assert float(average.first[2:].min()) == 1.0 and float(average.first[0]) < 1
    assert average.half.tolist() == [0] * len(PROMPTS), "biases decide, no sub-update"


@torch.no_grad()
def test_a_negative_coefficient_says_what_its_value_demotes() -> None:
    lm = wrap(tiny_model("llama", **LLAMA), byte_tokenizer(bos=True))
    mlp, rows = lm.module.model.layers[1].mlp, lm.module.lm_head.weight
    mlp.down_proj.weight.mul_(1e-3)
    mlp.down_proj.weight[:, 5] = 10 * rows[200]
    average = refinement(lm, PROMPTS, among=(0.0,))
    m = torch.stack([lm.coefficients(prompt, [1])[0, -1, 5] for prompt in PROMPTS])
    assert 0 < int((m < 0).sum()) < len(m), "either sign occurs"
    assert float(average.composed[0, 1]) == 0.0
    flipped = value_tokens(lm, top=1, norm=False)
    wrong = type(flipped)(**{**vars(flipped), "bottom_ids": flipped.top_ids})
    assert float(refinement(lm, PROMPTS, among=(0.0,), values=wrong).composed[0, 1]) == float(
        (m < 0).double().mean()
    )


def test_targets_positions_and_values_given(tiny_llama: LanguageModel) -> None:
    lm = tiny_llama
    average = refinement(
        lm, [TEXTS[0]] * 6, [" Paris"] * 6, positions=[1, 2, -3, 4, 5, -1], batch_tokens=40
    )
    n = len(lm.prompt_ids(TEXTS[0]))
    for i, position in enumerate((1, 2, n - 3, 4, 5, n - 1)):
        single = compose(lm, TEXTS[0], " Paris", position=position)
        assert single.target_id == int(average.answers[i]) and torch.equal(
            single.ranks, average.ranks[i]
        )
        assert torch.allclose(single.probabilities, average.probabilities[i], atol=1e-6)
    assert (
        torch.equal(average.first, (average.ranks == 0).double().mean(0))
        and float(average.first.max()) < 1
    )
    assert torch.equal(average.quantiles(0.0, 1.0)[1], average.ranks.max(0).values.double())
    folded = refinement(lm, PROMPTS, norm=True)
    again = refinement(lm, PROMPTS, values=value_tokens(lm, top=3), batch_tokens=64)
    assert again.norm and torch.equal(folded.composed, again.composed), (
        "how they are batched changes nothing"
    )
    assert torch.equal(folded.half_of_layer, again.half_of_layer)
    bare = refinement(lm, PROMPTS)
    assert torch.equal(bare.half, folded.half) and not torch.equal(bare.says, folded.says)
    table = bare.rows()
    assert (
        len(table) == 3
        and table[2]["ffn first"] == 1.0
        and table[1]["composed 0.5"] == float(bare.composed[1, 1])
    )
    assert "12 predictions" in repr(bare)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_model_over_several_devices(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    # The devices of the test look like another number format.
    monkeypatch.setattr(running, "packed_format", lambda module: None)
    body, ends = ("transformer.h", "transformer.wte transformer.wpe transformer.ln_f")
    if family == "gemma2":
        body, ends = ("model.layers", "model.embed_tokens model.rotary_emb model.norm")
    places = dict.fromkeys((*ends.split(), "lm_head"), "cpu:1") | {
        f"{body}.{i}": f"cpu:{i + 1}" for i in range(3)
    }
    settings = {**FAMILIES[family], "attn_implementation": "eager"}
    whole, parted = (tiny_model(family, **settings) for _ in range(2))
    one = wrap(whole, byte_tokenizer(bos=family != "gpt2"))
    expected, folded, alone = (
        refinement(one, PROMPTS),
        refinement(one, PROMPTS, norm=True),
        compose(one, PROMPTS[0]),
    )
    with devices():
        spread(parted, places)
        lm = wrap(parted, byte_tokenizer(bos=family != "gpt2"))
        average, single = refinement(lm, PROMPTS), compose(lm, PROMPTS[0])
        assert torch.allclose(refinement(lm, PROMPTS, norm=True).composed, folded.composed)
    assert torch.allclose(average.composed, expected.composed) and torch.allclose(
        average.chance, expected.chance
    )
    assert torch.equal(average.half, expected.half) and torch.equal(average.ranks, expected.ranks)
    assert single.logit == pytest.approx(alone.logit, abs=1e-4) and torch.equal(
        single.ranks, alone.ranks
    )


def test_sixteen_bits() -> None:
    whole, half = (
        model("llama"),
        wrap(tiny_model("llama", **LLAMA).to(torch.bfloat16), byte_tokenizer(bos=True)),
    )
    a, b = refinement(whole, PROMPTS), refinement(half, PROMPTS)
    assert torch.allclose(a.probabilities, b.probabilities, atol=0.1) and torch.allclose(
        a.composed, b.composed, atol=0.3
    )
    assert b.answers.tolist() == [compose(half, prompt).target_id for prompt in PROMPTS]


def test_bad_input_is_refused_in_words(tiny_gpt2: LanguageModel) -> None:
    for arguments, said in (
        (([],), "at least one"),
        (("a text",), "list of texts"),
        ((["king", ""],), "no token"),
        ((["king"], ["a", "b"]), "2 targets"),
        ((["king " * 100],), "positions for 64"),
    ):
        with pytest.raises(InputError, match=said):
            refinement(tiny_gpt2, *arguments)  # type: ignore[arg-type]
    for keywords, said in (
        ({"positions": [0, 1]}, "2 positions"),
        ({"positions": [99]}, "a position is 99"),
        ({"among": ()}, "among is empty"),
        ({"among": (1.5,)}, "from 0"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"values": value_tokens(tiny_gpt2, [0], top=1)}, "all layers"),
        ({"values": value_tokens(model("llama"), top=1)}, "all layers"),
    ):
        with pytest.raises(InputError, match=said):
            refinement(tiny_gpt2, ["king of Paris"], **keywords)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="no share"):
        refinement(wrap(tiny_model("openai-gpt", **GPT2), byte_tokenizer()), PROMPTS)
