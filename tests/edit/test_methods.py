from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import GPT2, LLAMA, TEXTS, VOCAB, byte_tokenizer, shared_dir, tiny_model
from factsmith.core.errors import (
    FactsmithError,
    FingerprintError,
    InputError,
    LayerError,
    SubjectError,
    UnsupportedModelError,
)
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.edit.configs import AlphaEditConfig, MemitConfig, RomeConfig
from factsmith.edit.contexts import generate_contexts
from factsmith.edit.delta import Delta, applied, read_weights
from factsmith.edit.keys import read_keys
from factsmith.edit.methods import alphaedit, memit, rome
from factsmith.edit.rome import rome_each
from factsmith.edit.target import Targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from factsmith.model.tokens import subject_span

CONTEXTS = ["{}", "Paris. {}", "The king is in Brazil. {}"]
FACTS = [
    Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
    Fact("Edwin", "{} is the king of all", "France too"),
    Fact("LeBron James", "It is played by {}", "basketball"),
]
CONFIG = RomeConfig(layer=1, steps=6, lr=0.2)
GEMMA2 = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
}


def at_subject(lm: LanguageModel, fact: Fact, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of the down-projection at the subject's last token in the bare prompt, from the model's own forward pass."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = lm.ffn[layer].down.register_forward_hook(
        lambda module, args, output: seen.append((args[0], output))
    )
    with torch.no_grad():
        lm.module(input_ids=torch.tensor([lm.tokenizer(fact.text)["input_ids"]]))
    handle.remove()
    column = subject_span(lm, fact.text, fact.subject)[1] - 1
    return seen[0][0][0, column], seen[0][1][0, column]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ── the reference implementation ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    folder = shared_dir() / "golden"
    moments = load_file(folder / "second_moment.safetensors")
    return {
        "lm": load(folder / "facts-gpt2"),
        "tensors": load_file(folder / "rome.safetensors"),
        **json.loads((folder / "rome.json").read_text(encoding="utf-8")),
        "moments": {
            i: SecondMoment.from_matrix(moments[f"layer{i}"], count=int(moments[f"layer{i}.count"]))
            for i in range(3)
        },
    }


def golden_config(golden: dict[str, Any]) -> RomeConfig:
    h = golden["hparams"]
    return RomeConfig(
        layer=h["layers"][0],
        steps=h["v_num_grad_steps"],
        lr=h["v_lr"],
        kl_factor=h["kl_factor"],
        weight_decay=h["v_weight_decay"],
        clamp=h["clamp_norm_factor"],
    )


@pytest.mark.parametrize("case", range(5))
def test_agrees_with_the_reference_implementation(golden: dict[str, Any], case: int) -> None:
    request = golden["requests"][case]
    fact = Fact(request["subject"], request["prompt"], request["target_new"]["str"])
    delta = rome(
        golden["lm"],
        fact,
        golden_config(golden),
        moments=golden["moments"],
        contexts=golden["context_templates"],
    )
    expected = {
        name: golden["tensors"][f"case{request['case_id']}.h.1.{name}"]
        for name in ("u", "v", "delta")
    }
    left, right = delta.layers[1]
    assert relative(right[0], expected["u"]) < 2e-4
    assert relative(left[:, 0], expected["v"]) < 1e-5
    assert relative(delta.dense(1).T, expected["delta"]) < 2e-4
    with applied(golden["lm"], delta):
        assert golden["lm"].answer([fact.text])[0].startswith(fact.target)
    assert not golden["lm"].answer([fact.text])[0].startswith(fact.target)


def test_one_more_update_would_not_agree(golden: dict[str, Any]) -> None:
    """The control for the trap of `steps`: 20 evaluations are 19 updates."""
    request = golden["requests"][2]
    fact = Fact(request["subject"], request["prompt"], request["target_new"]["str"])
    config = RomeConfig(layer=1, steps=21)
    delta = rome(
        golden["lm"], fact, config, moments=golden["moments"], contexts=golden["context_templates"]
    )
    assert relative(delta.layers[1][0][:, 0], golden["tensors"]["case2.h.1.v"]) > 5e-3


@pytest.fixture(scope="module")
def golden_many() -> Callable[[str], dict[str, Any]]:
    """What the authors' code gave for ten facts in three layers, by method."""
    folder = shared_dir() / "golden"
    moments = load_file(folder / "second_moment.safetensors")
    lm = load(folder / "facts-gpt2")

    def read(name: str) -> dict[str, Any]:
        found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        h = found["hparams"]
        settings = {
            "layers": tuple(h["layers"]),
            "steps": h["v_num_grad_steps"],
            "lr": h["v_lr"],
            "kl_factor": h["kl_factor"],
            "weight_decay": h["v_weight_decay"],
            "clamp": h["clamp_norm_factor"],
        }
        config = (
            MemitConfig(**settings, moment_weight=h["mom2_update_weight"])
            if name == "memit"
            else AlphaEditConfig(**settings, threshold=h["nullspace_threshold"], l2=h["L2"])
        )
        return {
            "lm": lm,
            "config": config,
            "facts": [
                Fact(r["subject"], r["prompt"], r["target_new"]["str"]) for r in found["requests"]
            ],
            "contexts": [context for group in found["context_templates"] for context in group],
            "moments": {
                i: SecondMoment.from_matrix(
                    moments[f"layer{i}"], count=int(moments[f"layer{i}.count"])
                )
                for i in range(3)
            },
            "tensors": load_file(folder / f"{name}.safetensors"),
        }

    return read


def test_memit_agrees_with_the_reference_implementation(
    golden_many: Callable[[str], dict[str, Any]],
) -> None:
    g = golden_many("memit")
    delta = memit(g["lm"], g["facts"], g["config"], moments=g["moments"], contexts=g["contexts"])
    assert relative(delta.v_star.T, g["tensors"]["zs"]) < 1e-5
    for layer in range(3):
        left, right = delta.layers[layer]
        assert relative(delta.k_star[layer], g["tensors"][f"ks.L{layer}"]) < 1e-4
        assert relative(right.T, g["tensors"][f"h.{layer}.adj_k"].float()) < 1e-4
        assert relative(left, g["tensors"][f"h.{layer}.resid"].float()) < 1e-5
        assert relative(delta.dense(layer).T, g["tensors"][f"h.{layer}.delta"]) < 1e-5
    # The controls: PMET's spread, and GPT-J's weight instead of GPT-2 XL's, are something else.
    tensors = dict.fromkeys(
        ("v_star", "v_initial", "k_star", "k_prompt", "ffn_initial"), delta.v_star
    )
    targets = Targets(
        **tensors,
        convergence=({},) * 10,
        facts=tuple(g["facts"]),
        layer=max(delta.layers),
        site="stream",
    )
    for changes in ({"spread": "sqrt"}, {"moment_weight": 15_000}):
        other = memit(
            g["lm"],
            g["facts"],
            dataclasses.replace(g["config"], **changes),
            moments=g["moments"],
            contexts=g["contexts"],
            targets=targets,
        )
        assert relative(other.dense(0).T, g["tensors"]["h.0.delta"]) > 1e-2


def test_alphaedit_agrees_with_the_reference_implementation(
    golden_many: Callable[[str], dict[str, Any]],
) -> None:
    g = golden_many("alphaedit")
    delta = alphaedit(
        g["lm"], g["facts"], g["config"], moments=g["moments"], contexts=g["contexts"]
    )
    ranks = [
        g["moments"][layer].null_space(threshold=g["config"].threshold).shape[1]
        for layer in range(3)
    ]
    assert ranks == [461, 628, 593]
    for layer in range(3):
        assert relative(delta.dense(layer).T, g["tensors"][f"h.{layer}.delta"]) < 2e-4
        cached = (
            delta.k_star[layer].square().sum(0)
        )  # the diagonal of K Kᵀ: what the next round has to keep
        assert relative(cached, g["tensors"]["cache_c_diag"][layer]) < 1e-4
    with applied(
        g["lm"], delta
    ):  # the reference reads them again after the edit; they are the same, since only lower layers change them
        again = read_keys(g["lm"], g["facts"], 2, g["contexts"])
    assert (
        relative((again * torch.tensor([0.5, *[0.1] * 5])[None, :, None]).sum(1), delta.k_star[2])
        < 1e-4
    )


# ── properties ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_edited_layer_outputs_v_star_at_the_subject(family: str) -> None:
    changes = {"gpt2": GPT2, "llama": LLAMA, "gemma2": GEMMA2}[family]
    lm = wrap(tiny_model(family, **changes), byte_tokenizer(bos=family != "gpt2"))
    assert lm.ffn[1].adds_directly == (family != "gemma2")
    fact = FACTS[0]
    moments = second_moments(lm, TEXTS, [1])
    before = read_weights(lm, [1])[1]
    delta = rome(lm, fact, CONFIG, moments=moments, contexts=CONTEXTS)
    assert torch.equal(lm.ffn[1].weight(), before), "the model is untouched"
    _, unedited = at_subject(lm, fact, 1)
    assert relative(unedited, delta.v_star[0]) > 1e-2
    with applied(lm, delta):
        key, output = at_subject(lm, fact, 1)
        assert relative(output, delta.v_star[0]) < 1e-4
    u = torch.linalg.solve(
        moments[1].matrix.double() + 1e-9 * torch.eye(len(key)).double(),
        delta.k_star[1][0].double(),
    )
    assert relative(delta.layers[1][1][0].double(), u / u.norm()) < 1e-2


def test_several_facts_are_written_one_after_another(tiny_lm: LanguageModel) -> None:
    moments = second_moments(tiny_lm, TEXTS, [1])
    delta = rome(tiny_lm, FACTS, CONFIG, moments=moments, contexts=CONTEXTS)
    assert (
        delta.rank == 3
        and delta.k_star[1].shape[0] == 3
        and len(delta.convergence) == 3
        and delta.facts == tuple(FACTS)
    )
    by_hand: list[Delta] = []
    for fact in FACTS:
        with applied(tiny_lm, by_hand):
            if by_hand:
                with pytest.raises(
                    FingerprintError, match=r"has [0-9a-f]{12} now"
                ):  # moments of the unedited model, without saying so
                    rome(tiny_lm, fact, CONFIG, moments=moments, contexts=CONTEXTS)
            one = rome(tiny_lm, fact, CONFIG, moments=moments, contexts=CONTEXTS, beneath=by_hand)
        by_hand.append(one)
    assert relative(delta.dense(1), sum(d.dense(1) for d in by_hand)) < 1e-5  # type: ignore[arg-type]
    with applied(tiny_lm, delta):
        assert relative(at_subject(tiny_lm, FACTS[-1], 1)[1], delta.v_star[-1]) < 1e-4
    apart = rome_each(tiny_lm, FACTS, CONFIG, moments=moments, contexts=CONTEXTS)
    assert relative(delta.dense(1), sum(d.dense(1) for d in apart)) > 1e-3, (
        "solved apart they would miss one another"
    )  # type: ignore[arg-type]


def test_each_alone_equals_one_call_each(tiny_lm: LanguageModel) -> None:
    moments = second_moments(tiny_lm, TEXTS, [1])[1]
    for fact, delta in zip(
        FACTS, rome_each(tiny_lm, FACTS, CONFIG, moments=moments, contexts=CONTEXTS), strict=True
    ):
        alone = rome(tiny_lm, fact, CONFIG, moments=moments, contexts=CONTEXTS)
        assert relative(delta.dense(1), alone.dense(1)) < 1e-4
        assert delta.facts == (fact,)


def test_the_recipe_is_recorded_and_repeats(tiny_gpt2: LanguageModel) -> None:
    moments = second_moments(tiny_gpt2, TEXTS, [0, 1])
    first = rome(tiny_gpt2, FACTS[0], RomeConfig(steps=3), moments=moments, seed=5)
    layer = first.config["layer"]
    assert (first.method, layer, first.fingerprint) == ("rome", 0, tiny_gpt2.fingerprint), (
        "a sixth of three layers"
    )
    contexts = first.config["contexts"]
    assert contexts == generate_contexts(tiny_gpt2, 5) != generate_contexts(tiny_gpt2, 6)
    again = rome(
        tiny_gpt2, FACTS[0], RomeConfig(layer=0, steps=3), moments=moments, contexts=contexts
    )
    assert torch.equal(again.dense(0), first.dense(0))
    json.dumps(dict(first.config))


def test_generated_contexts(tiny_lm: LanguageModel) -> None:
    state = torch.get_rng_state()
    contexts = generate_contexts(tiny_lm, 0)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is nobody's business"
    assert contexts[0] == "{}" and len(contexts) == 21
    assert all(
        c.endswith(". {}") and c.count("{") == c.count("}") == 1 and "\n" not in c and "<|" not in c
        for c in contexts[1:]
    )
    assert len(set(contexts)) > 10
    # The same draws by a plain loop: each text alone, the whole of it at every step.
    draw, texts = (
        torch.Generator().manual_seed(0),
        [[tiny_lm.tokenizer.bos_token_id] for _ in range(20)],
    )
    for _ in range(9):
        with torch.no_grad():
            logits = torch.stack(
                [tiny_lm.module(input_ids=torch.tensor([ids])).logits[0, -1] for ids in texts]
            )
        logits[:, tiny_lm.tokenizer.all_special_ids] = -torch.inf
        values, indices = logits.topk(5)
        picked = torch.multinomial(values.softmax(-1), 1, generator=draw)[:, 0]
        texts = [
            [*ids, int(row[column])]
            for ids, row, column in zip(texts, indices, picked, strict=True)
        ]
    decoded = [
        tiny_lm.tokenizer.decode(ids[1 : 5 if i < 10 else 10]) for i, ids in enumerate(texts)
    ]
    for context, text in zip(contexts[1:], decoded, strict=True):
        assert (
            context.removesuffix(". {}").split()
            == unicodedata.normalize("NFKC", re.sub("[{}]", " ", text)).split()
        )


def test_settings_shipped_with_a_model(tiny_gpt2: LanguageModel) -> None:
    lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    assert RomeConfig.recommended(lm) == RomeConfig(layer=0, scale="auto", steps=80, lr=0.1)
    lm.config.factsmith = {"rome": {"layer": 2, "steps": 2, "clamp": 3}}
    assert RomeConfig.recommended(lm) == RomeConfig(layer=2, steps=2, clamp=3)
    delta = rome(lm, FACTS[0], moments=second_moments(lm, TEXTS, [2]), contexts=CONTEXTS)
    assert delta.config["layer"] == 2 and delta.convergence[0]["steps"] <= 2
    lm.config.factsmith = {"rome": {"steps": 3}}
    assert RomeConfig.recommended(lm) == RomeConfig(layer=0, steps=3), (
        "the layer has a rule of its own"
    )
    for odd in ({"rome": {"momentum": 1}}, {"rome": 3}, "rome"):
        lm.config.factsmith = odd
        with pytest.raises(InputError, match="expected some of"):
            RomeConfig.recommended(lm)


def test_half_precision_models_are_edited_in_float32(tiny_llama: LanguageModel) -> None:
    lm = wrap(tiny_model("llama", **LLAMA).to(torch.bfloat16), tiny_llama.tokenizer)
    before = read_weights(lm, [1])[1]
    delta = rome(lm, FACTS[0], CONFIG, moments=second_moments(lm, TEXTS, [1]), contexts=CONTEXTS)
    assert all(x.dtype == torch.float32 for x in delta.layers[1])
    with applied(lm, delta):
        assert relative(at_subject(lm, FACTS[0], 1)[1].float(), delta.v_star[0]) < 2e-2
    assert torch.equal(lm.ffn[1].weight(), before) and before.dtype == torch.bfloat16


def test_bad_input_changes_nothing(tiny_gpt2: LanguageModel) -> None:
    moments = second_moments(tiny_gpt2, TEXTS, [1])
    before = read_weights(tiny_gpt2, range(3))
    cases: list[tuple[type[FactsmithError], str, dict[str, Any]]] = [
        (LayerError, "layers 0 to 2", {"config": RomeConfig(layer=9)}),
        (InputError, r"second_moments\(lm, texts, \[2\]\)", {"config": RomeConfig(layer=2)}),
        (
            FingerprintError,
            "another model",
            {"moments": SecondMoment.from_matrix(torch.eye(7), count=1)},
        ),
        (InputError, "at least one", {"facts": []}),
        (InputError, "str", {"facts": ["a fact"]}),
        (InputError, "bare prompt", {"contexts": ["Paris. {}"]}),
        (
            SubjectError,
            "more than once",
            {"facts": [FACTS[0], Fact("Edwin", "Edwin and {} are", "kings")]},
        ),
    ]
    for error, words, change in cases:
        arguments = {
            "facts": FACTS[0],
            "config": CONFIG,
            "moments": moments,
            "contexts": CONTEXTS,
        } | change
        with pytest.raises(error, match=words):
            rome(tiny_gpt2, arguments.pop("facts"), arguments.pop("config"), **arguments)
        assert all(torch.equal(w, tiny_gpt2.ffn[layer].weight()) for layer, w in before.items())
    for layer in (-1, 1.0, "1", True):
        with pytest.raises(LayerError, match="counted from 0"):
            RomeConfig(layer=layer)  # type: ignore[arg-type]


def test_mixture_of_experts_is_refused() -> None:
    config = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
    lm = wrap(tiny_model("mixtral", **config), byte_tokenizer(bos=True))
    with pytest.raises(UnsupportedModelError, match="mixture"):
        rome(
            lm,
            FACTS[0],
            CONFIG,
            moments=SecondMoment.from_matrix(torch.eye(48), count=1),
            contexts=CONTEXTS,
        )
    with pytest.raises(UnsupportedModelError, match="mixture"):
        second_moments(lm, TEXTS, [1])
