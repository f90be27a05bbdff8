"""Direct logit attribution: shares against the model's own modules, sums against its logit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError, UnsupportedModelError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.trace import hook_count
from factsmith.read.composition import compose

PROMPT = "The capital of France is"
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "gemma2": {**LLAMA, "head_dim": 8, "final_logit_softcapping": None},  # a norm after the FFN
    "gptj": {
        **GPT2,
        "rotary_dim": 4,
    },  # attention and FFN in parallel; a bias at the unembedding
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **LLAMA,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def model(family: str) -> LanguageModel:
    return wrap(
        tiny_model(family, **FAMILIES[family]), byte_tokenizer(bos=family not in ("gpt2", "gptj"))
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("contrast", [None, " Brazil"])
def test_the_parts_sum_to_the_logit(family: str, contrast: str | None) -> None:
    lm = model(family)
    composition = compose(lm, PROMPT, " Paris", contrast=contrast, position=3)
    with torch.no_grad():
        logits = lm.module(input_ids=torch.tensor([lm.prompt_ids(PROMPT)])).logits[0, 3]
    expected = logits[composition.target_id] - (
        0 if composition.contrast_id is None else logits[composition.contrast_id]
    )
    assert composition.logit == pytest.approx(float(expected), abs=1e-3)
    assert sum(part.logit for part in composition.parts) == pytest.approx(float(expected), abs=2e-3)
    assert max(abs(part.logit) for part in composition.parts) > 0.05
    assert [part.layer for part in composition.parts if part.kind == "attention"] == list(
        range(lm.n_layers)
    )
    written = {
        layer: sum(
            float(s.sum()) for bank, (_, s) in composition.neurons.items() if bank[0] == layer
        )
        for layer in range(lm.n_layers)
    }
    for part in composition.parts:
        if (
            part.kind == "ffn"
            and part.layer is not None
            and lm.ffn[part.layer].banks[0].bias is None
        ):
            assert written[part.layer] == pytest.approx(part.logit, abs=2e-3), (
                "an FFN without a bias is the sum of its sub-updates"
            )
    assert torch.isclose(
        composition.probabilities[-1], logits.softmax(-1)[composition.target_id], atol=1e-5
    )
    assert int(composition.ranks[-1]) == int((logits > logits[composition.target_id]).sum())
    assert len(composition.ranks) == len(composition.probabilities) == 2 * lm.n_layers + 1
    assert hook_count(lm.module.modules()) == 0


def test_the_share_of_a_sub_update_is_its_value_through_the_norm() -> None:
    lm = model("gpt2")
    composition = compose(lm, PROMPT)
    ids = torch.tensor([lm.prompt_ids(PROMPT)])
    kept: list[torch.Tensor] = []
    handle = lm.module.transformer.h[1].mlp.c_proj.register_forward_pre_hook(
        lambda _, args: kept.append(args[0][0, -1])
    )
    last: list[torch.Tensor] = []
    other = lm.module.transformer.ln_f.register_forward_pre_hook(
        lambda _, args: last.append(args[0][0, -1])
    )
    with torch.no_grad():
        logits = lm.module(input_ids=ids).logits[0, -1]
    handle.remove()
    other.remove()
    norm, values = lm.module.transformer.ln_f, lm.module.transformer.h[1].mlp.c_proj.weight
    through = (
        (values - values.mean(1, keepdim=True))
        * norm.weight
        / (last[0].var(unbiased=False) + norm.eps).sqrt()
    )
    expected = kept[0] * (through @ lm.module.transformer.wte.weight[composition.target_id])
    coefficients, shares = composition.neurons[1,]
    assert torch.allclose(coefficients, kept[0], atol=1e-5) and torch.allclose(
        shares, expected.detach(), atol=1e-4
    )
    assert composition.target_id == int(logits.argmax()) and int(composition.ranks[-1]) == 0


def test_the_strongest_and_how_many_make_half(tiny_llama: LanguageModel) -> None:
    composition = compose(tiny_llama, PROMPT)
    shares = {
        (*bank, i): float(s)
        for bank, (_, logits) in composition.neurons.items()
        for i, s in enumerate(logits)
    }
    assert [c.neuron for c in composition.strongest(5)] == sorted(shares, key=lambda n: -shares[n])[
        :5
    ]
    assert [c.neuron for c in composition.strongest(5, against=True)] == sorted(
        shares, key=lambda n: shares[n]
    )[:5]
    speaking = sorted((s for s in shares.values() if s > 0), reverse=True)
    assert (
        sum(speaking[: composition.half])
        >= sum(speaking) / 2
        > sum(speaking[: composition.half - 1])
    )


def test_ranks_are_read_through_the_models_own_norm_and_unembedding() -> None:
    lm = model("llama")
    composition = compose(lm, PROMPT)
    with torch.no_grad():
        states = lm.module(
            input_ids=torch.tensor([lm.prompt_ids(PROMPT)]), output_hidden_states=True
        ).hidden_states
        for layer in range(
            lm.n_layers
        ):  # the last of transformers' hidden states is normed already
            logits = lm.module.lm_head(lm.module.model.norm(states[layer][0, -1]))
            assert torch.isclose(
                logits.softmax(-1)[composition.target_id],
                composition.probabilities[2 * layer],
                atol=1e-5,
            )
            assert int((logits > logits[composition.target_id]).sum()) == int(
                composition.ranks[2 * layer]
            )


def test_a_stream_that_is_normed_in_every_layer_is_refused() -> None:
    lm = wrap(tiny_model("openai-gpt", **GPT2), byte_tokenizer())
    with pytest.raises(UnsupportedModelError, match="no share"):
        compose(lm, PROMPT)


def test_bad_input_is_refused_in_words(tiny_gpt2: LanguageModel) -> None:
    n = len(tiny_gpt2.prompt_ids(PROMPT))
    for position in (n, -n - 1, 1.5, True):
        with pytest.raises(InputError, match="position"):
            compose(tiny_gpt2, PROMPT, position=position)  # type: ignore[arg-type]
    for prompt, target in (("", None), (PROMPT, ""), (5, None)):
        with pytest.raises(InputError):
            compose(tiny_gpt2, prompt, target)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="positions for 64"):
        compose(tiny_gpt2, "king " * 100)
    assert compose(tiny_gpt2, PROMPT, position=0).position == 0


def test_a_note_says_when_only_a_first_token_is_explained(tiny_gpt2: LanguageModel) -> None:
    notes: list[tuple[str, str | None]] = []

    class Reporter:
        def __call__(self, step: str, done: int, total: int | None) -> None:
            pytest.fail("there is one pass, so there is no progress")

        def note(self, text: str, *, argument: str | None = None) -> None:
            notes.append((text, argument))

    compose(tiny_gpt2, PROMPT, " Paris Paris", contrast=" king king", progress=Reporter())
    assert [argument for _, argument in notes] == ["target", "contrast"]
    assert all("only the first" in text for text, _ in notes)
    notes.clear()
    compose(tiny_gpt2, PROMPT, progress=Reporter())
    assert not notes
