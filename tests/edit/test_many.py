"""The editors that write many facts at once: formulas on tiny random models, settings on models that know facts."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import GPT2, LLAMA, TEXTS, VOCAB, byte_tokenizer, shared_dir, tiny_model
from factsmith.core.errors import FingerprintError, InputError, LayerError, NumericsError
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.corpus.moments_store import find_moments
from factsmith.edit.configs import (
    AlphaEditConfig,
    EmmetConfig,
    MemitConfig,
    RomeConfig,
    SpreadConfig,
)
from factsmith.edit.contexts import (
    chat_contexts,
    context_weights,
    generate_contexts,
    generate_openings,
)
from factsmith.edit.delta import Delta, applied, read_weights
from factsmith.edit.keys import read_keys, read_stream
from factsmith.edit.methods import METHODS, edit, memit, r_rome
from factsmith.edit.search import find_targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from factsmith.model.tokens import subject_span
from factsmith.patch.trial_facts import trial_facts

CONTEXTS = ["{}", "Paris. {}", "The king is in Brazil. {}"]
FACTS = [
    Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
    Fact("Edwin", "{} is the king of all", "France too"),
    Fact("LeBron James", "It is played by {}", "basketball"),
]
SEARCH = {"steps": 6, "lr": 0.2}
CONFIGS: dict[str, SpreadConfig] = {
    "memit": MemitConfig((0, 1), moment_weight=1e-4, **SEARCH),  # type: ignore[arg-type]
    "emmet": EmmetConfig((0, 1), ridge=0, **SEARCH),  # type: ignore[arg-type]
    "alphaedit": AlphaEditConfig((0, 1), threshold=None, energy=0.01, l2=1e-7, **SEARCH),  # type: ignore[arg-type]
}


def model(family: str) -> LanguageModel:
    changes = {"gpt2": GPT2, "llama": LLAMA}[family]
    return wrap(tiny_model(family, **changes), byte_tokenizer(bos=family != "gpt2"))


def moments_of(lm: LanguageModel, layers: tuple[int, ...] = (0, 1)) -> dict[int, SecondMoment]:
    """Of full rank: a little of the identity stands for the text these models never read."""
    found = second_moments(lm, TEXTS, layers)
    return {
        layer: SecondMoment.from_matrix(
            m.matrix + 1e-3 * m.matrix.diagonal().mean() * torch.eye(m.d_ff), count=m.count
        )
        for layer, m in found.items()
    }


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_stream_becomes_what_was_wanted(family: str, method: str) -> None:
    """With little weight on everything else, the last layer puts out v_star at every subject; the model is untouched outside the block."""
    lm = model(family)
    before = read_weights(lm, [0, 1, 2])
    delta = edit(lm, FACTS, method, CONFIGS[method], moments=moments_of(lm), contexts=["{}"])
    assert all(torch.equal(lm.ffn[layer].weight(), before[layer]) for layer in before)
    assert relative(read_stream(lm, FACTS, 1), delta.v_star) > 0.05
    with applied(lm, delta):
        assert relative(read_stream(lm, FACTS, 1), delta.v_star) < 0.02
    assert delta.method == method and sorted(delta.layers) == [0, 1] and delta.facts == tuple(FACTS)
    assert all(
        set(entry) >= {"steps", "loss", "nll", "stopped", "attempt"} for entry in delta.convergence
    )


@pytest.mark.parametrize("method", list(CONFIGS))
def test_the_order_of_facts_does_not_matter(method: str) -> None:
    lm = model("gpt2")
    moments, order = moments_of(lm), [2, 0, 1]
    config = dataclasses.replace(
        CONFIGS[method], **({"moment_weight": 1.0} if method == "memit" else {})
    )
    straight = edit(lm, FACTS, method, config, moments=moments, contexts=CONTEXTS)
    mixed = edit(lm, [FACTS[i] for i in order], method, config, moments=moments, contexts=CONTEXTS)
    for layer in (0, 1):
        assert relative(mixed.dense(layer), straight.dense(layer)) < 1e-3
        assert relative(mixed.k_star[layer], straight.k_star[layer][order]) < 1e-5
    fewer = edit(lm, FACTS[:2], method, config, moments=moments, contexts=CONTEXTS)
    assert relative(fewer.dense(0), straight.dense(0)) > 1e-2


def test_a_layer_s_share_is_least_squares_over_every_context() -> None:
    """keys="each": the first layer's update against lstsq on rows for each fact and context, with √weights, and √λ C½ below them."""
    lm = model("gpt2")
    moments = moments_of(lm)
    config = MemitConfig((0, 1), keys="each", moment_weight=2.0, **SEARCH)  # type: ignore[arg-type]
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
    mean = memit(
        lm,
        FACTS,
        dataclasses.replace(config, keys="mean"),
        moments=moments,
        contexts=CONTEXTS,
        targets=targets,
    )
    assert relative(mean.dense(0).double(), expected) > 1e-2
    assert delta.rank == len(FACTS), "the facts' contexts share their residual"


def test_a_share_for_the_subject_alone() -> None:
    """The same subject after other words is written too, and none of it without the share."""
    lm = model("gpt2")
    moments = moments_of(lm, (0,))
    plain = MemitConfig((0,), keys="each", moment_weight=0.05, **SEARCH)  # type: ignore[arg-type]
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


def test_weights_of_contexts() -> None:
    assert context_weights(["{}"]) == [1.0]
    assert context_weights(["a {}", "{}", "b {}"]) == [0.25, 0.5, 0.25]
    assert context_weights(["{}", "{}", "a {}"]) == [0.25, 0.25, 0.5] and context_weights(["{}", "{}"]) == [
        0.5,
        0.5,
    ]


def test_earlier_edits_are_kept() -> None:
    lm = model("gpt2")
    moments = moments_of(lm)
    config = MemitConfig((0,), moment_weight=0.1, **SEARCH)  # type: ignore[arg-type]
    first = memit(lm, FACTS[:1], config, moments=moments, contexts=CONTEXTS)
    with applied(lm, first):
        apart = memit(lm, FACTS[1:], config, moments=moments, contexts=CONTEXTS)
        knowing = memit(lm, FACTS[1:], config, moments=moments, contexts=CONTEXTS, beneath=[first])
    old = first.k_star[0][0]
    assert (knowing.dense(0) @ old).norm() < 0.8 * (apart.dense(0) @ old).norm()


def test_repair_writes_what_did_not_take() -> None:
    lm = load("atlas")
    facts = [
        Fact("Bulgaria", "The currency of {} is the", "euro"),
        Fact("Japan", "The capital of {} is", "Paris"),
    ]
    config = MemitConfig(
        (0, 1), **{**MemitConfig.scale_free(), "moment_weight": 3000.0, "repair": 0}
    )
    moments = find_moments(lm, [0, 1])
    said = []
    for repair in (0, 4):
        delta = memit(
            lm,
            facts,
            dataclasses.replace(config, repair=repair),
            moments=moments,
            contexts=CONTEXTS,
        )
        with applied(lm, delta):
            said.append(
                sum(lm.says([fact.text for fact in facts], [str(fact.target) for fact in facts]))
            )
    assert said == [0, 2]
    assert max(entry["attempt"] for entry in delta.convergence) > 1


def test_repair_looks_farther_once() -> None:
    """What lies beyond the clamp is found by a repair; what lies far beyond it is left, however often repairs are allowed."""
    lm = load("atlas")
    facts = [
        Fact("Bulgaria", "The currency of {} is the", "euro"),
        Fact("Japan", "The capital of {} is", "Paris"),
    ]
    moments = find_moments(lm, [0, 1])
    said, ends = {}, {}
    for clamp, repair in ((0.5, 0), (0.5, 1), (0.02, 4)):
        config = MemitConfig(
            (0, 1), **{**MemitConfig.scale_free(), "clamp": clamp, "repair": repair}
        )
        delta = memit(lm, facts, config, moments=moments, contexts=CONTEXTS)
        with applied(lm, delta):
            said[clamp, repair] = lm.says(
                [fact.text for fact in facts], [str(fact.target) for fact in facts]
            )
        ends[clamp, repair] = [entry["attempt"] for entry in delta.convergence]
    assert said == {(0.5, 0): [True, False], (0.5, 1): [True, True], (0.02, 4): [False, False]}
    assert ends == {(0.5, 0): [1, 1], (0.5, 1): [1, 2], (0.02, 4): [2, 2]}


def test_repair_leaves_given_targets_alone() -> None:
    lm = load("atlas")
    facts = [
        Fact("Bulgaria", "The currency of {} is the", "euro"),
        Fact("Japan", "The capital of {} is", "Paris"),
    ]
    config = MemitConfig(
        (0, 1), **{**MemitConfig.scale_free(), "moment_weight": 3000.0, "repair": 1}
    )
    targets = find_targets(lm, facts, 1, config, ["{}"], site="stream")
    before = targets.v_star.clone()
    delta = memit(
        lm, facts, config, moments=find_moments(lm, [0, 1]), contexts=["{}"], targets=targets
    )
    assert {entry["attempt"] for entry in delta.convergence} == {2} and not torch.equal(
        delta.v_star, before
    ), "there was a repair"
    assert torch.equal(targets.v_star, before)


def test_the_norm_anchor_sets_what_the_ffn_should_put_out() -> None:
    lm = model("gpt2")
    moments = moments_of(lm)
    config = MemitConfig((0, 1), norm_anchor="mean", moment_weight=1.0, **SEARCH)  # type: ignore[arg-type]
    delta = memit(lm, FACTS, config, moments=moments, contexts=CONTEXTS)
    targets = find_targets(lm, FACTS, 1, config, CONTEXTS, site="stream")
    ffn = delta.v_star - targets.v_initial + targets.ffn_initial
    assert torch.allclose(
        ffn.norm(dim=-1), torch.tensor(delta.config["norm_anchor"]).expand(3), rtol=1e-4
    )
    free = targets.v_star - targets.v_initial + targets.ffn_initial
    assert float(free.norm(dim=-1).std()) > 1e-3 * float(free.norm(dim=-1).mean())
    with applied(lm, delta):
        later = memit(lm, FACTS[:1], config, moments=moments, contexts=CONTEXTS, beneath=[delta])
    assert later.config["norm_anchor"] == delta.config["norm_anchor"], (
        "the first round's norm holds for later ones"
    )


def test_r_rome_writes_the_mean_key() -> None:
    lm = model("gpt2")
    moments = moments_of(lm)
    config = RomeConfig(layer=1, **SEARCH)  # type: ignore[arg-type]
    delta = r_rome(lm, FACTS[0], config, moments=moments, contexts=CONTEXTS)
    weight, bias = lm.ffn[1].weight() + delta.dense(1), lm.ffn[1].bias
    assert bias is not None
    assert relative(weight @ delta.k_star[1][0] + bias, delta.v_star[0]) < 1e-4
    rome = edit(lm, FACTS[0], "rome", config, moments=moments, contexts=CONTEXTS)
    assert (
        relative((lm.ffn[1].weight() + rome.dense(1)) @ rome.k_star[1][0] + bias, rome.v_star[0])
        > 1e-3
    ), "ROME writes the prompt's"


# ── forgetting ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_forgotten_fact_is_said_as_if_the_subject_were_not_there() -> None:
    lm = load("atlas")
    fact = Fact("Bulgaria", "The capital of {} is", None)
    config = MemitConfig((0,), **MemitConfig.scale_free())
    delta = memit(lm, fact, config, moments=find_moments(lm, [0]), contexts=["{}"])
    ids, (start, stop) = lm.prompt_ids(fact.text), subject_span(lm, fact.text, fact.subject)

    def log_p(ids: list[int]) -> Tensor:
        with torch.no_grad():
            return lm.module(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    without = log_p(ids[:start] + ids[stop:])
    before = float(
        torch.nn.functional.kl_div(log_p(ids), without, log_target=True, reduction="sum")
    )
    with applied(lm, delta):
        after = float(
            torch.nn.functional.kl_div(log_p(ids), without, log_target=True, reduction="sum")
        )
        assert not lm.says([fact.text], ["Sofia"])[0]
    assert lm.says([fact.text], ["Sofia"])[0]
    assert after < 0.2 * before
    assert delta.convergence[0]["nll"] < 0.2 and before > 1


def test_nothing_can_be_forgotten_that_ends_with_its_subject() -> None:
    with pytest.raises(InputError, match="ends with its subject"):
        find_targets(
            model("gpt2"),
            [Fact("LeBron James", "It is played by {}", None)],
            0,
            RomeConfig(layer=0),
            ["{}"],
        )


# ── contexts ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_openings_begin_with_the_authors_words() -> None:
    lm = model("gpt2")
    contexts = generate_openings(lm, 3)
    assert contexts == generate_openings(lm, 3) != generate_openings(lm, 4)
    assert contexts[0] == "{}" and len(contexts) == 6
    assert [c.split()[0][:4] for c in contexts[1:4]] == ["The", "Ther", "Beca"] or all(
        c.endswith(". {}") for c in contexts[1:]
    )


def test_a_chat_template_is_one_more_context() -> None:
    lm = model("llama")
    assert chat_contexts(lm) == []
    lm.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]\n"
    (context,) = chat_contexts(lm)
    assert context == "[user] {}\n[assistant]", "the tokenizer puts the BOS in front by itself"
    assert generate_contexts(lm)[-1] == generate_openings(lm)[-1] == context
    config = MemitConfig((0,), steps=12, lr=0.2, scale="auto", moment_weight=1e-4)
    fact = FACTS[2]
    delta = memit(lm, fact, config, moments=moments_of(lm, (0,)), contexts=["{}", context])
    asked = context.replace("{}", fact.text)
    before = float(lm.log_prob([asked], [str(fact.target)])[0])
    with applied(lm, delta):
        assert float(lm.log_prob([asked], [str(fact.target)])[0]) > before + 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "no place for it",
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content }} {}",
    ],
)
def test_a_chat_template_that_gives_no_context_is_left_out(template: str) -> None:
    lm = model("llama")
    lm.tokenizer.chat_template = template
    assert chat_contexts(lm) == [] and len(generate_openings(lm)) == 6


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system role') }}", "{% if %}", {"rag": "one of several"}]
)
def test_a_chat_template_that_cannot_be_filled_is_refused(template: object) -> None:
    lm = model("llama")
    lm.tokenizer.chat_template = template
    with pytest.raises(InputError, match=r"chat template .* cannot be filled .*give contexts"):
        memit(lm, FACTS[0], MemitConfig((0,)), moments=moments_of(lm, (0,)))
    assert memit(
        lm, FACTS[0], MemitConfig((0,), steps=2), moments=moments_of(lm, (0,)), contexts=["{}"]
    ).facts == (FACTS[0],)


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": ()},
        {"layers": (1, 1)},
        {"layers": (-1,)},
        {"layers": ("1",)},
        {"spread": "all"},
        {"keys": "some"},
        {"norm_anchor": -1.0},
        {"repair": 1.5},
        {"subject_share": 1.0, "keys": "each"},
        {"subject_share": 0.3, "keys": "mean"},
        {"moment_weight": 0.0},
        {"moment_weight": "much"},
    ],
)
def test_settings_are_checked(changes: dict[str, object]) -> None:
    with pytest.raises((InputError, LayerError)):
        MemitConfig(**{"layers": (0, 1), **changes})  # type: ignore[arg-type]
    assert MemitConfig((1, 0)).layers == (0, 1) and MemitConfig(2).layers == (2,)  # type: ignore[arg-type]


def test_missing_moments_and_layers_are_named() -> None:
    lm = model("gpt2")
    with pytest.raises(InputError, match="no second moment for layer 1"):
        memit(lm, FACTS, CONFIGS["memit"], moments={0: moments_of(lm)[0]}, contexts=CONTEXTS)  # type: ignore[arg-type]
    with pytest.raises(LayerError, match="layer 7"):
        memit(lm, FACTS, MemitConfig((0, 7)), moments=moments_of(lm), contexts=CONTEXTS)
    with pytest.raises(InputError, match="threshold or an energy"):
        AlphaEditConfig((0,), threshold=0.02, energy=0.5)


def test_the_null_space_is_told_by_a_threshold_or_an_energy() -> None:
    told = [
        (c.threshold, c.energy)
        for c in (
            AlphaEditConfig((0,)),
            AlphaEditConfig((0,), threshold=0.1),
            AlphaEditConfig((0,), energy=0.5),
        )
    ]
    assert told == [(0.02, None), (0.1, None), (None, 0.5)]


@pytest.mark.parametrize("method", list(METHODS))
def test_recommended_settings_fit_any_model(method: str) -> None:
    lm = model("llama")
    config = METHODS[method].config.recommended(lm)
    assert config.edited and max(config.edited) < lm.n_layers and config.scale == "auto"
    assert config.at([1]).edited == (1,)
    assert isinstance(
        edit(
            lm,
            FACTS[0],
            method,
            dataclasses.replace(config, steps=3).at([1]),
            moments=moments_of(lm),
        ),
        Delta,
    )
    assert len(lm.tokenizer) == VOCAB


@pytest.mark.parametrize(
    ("name", "method", "least"),
    [
        ("atlas", "memit", (1.0, 0.75, 0.85)),
        ("atlas", "emmet", (1.0, 0.75, 0.85)),
        ("atlas", "alphaedit", (1.0, 0.75, 0.85)),
        ("atlas-llama", "memit", (1.0, 0.75, 0.85)),
        (
            "golden",
            "memit",
            (0.85, 0.7, 0.5),
        ),  # it knows a tenth of the facts, not all the objects asked of it, and is easily disturbed
    ],
)
def test_recommended_settings_hold_without_tuning(
    name: str, method: str, least: tuple[float, float, float]
) -> None:
    """Real facts on models that know them: written, said in other words, and near ones kept; a random change as large does not."""
    lm = load(str(shared_dir() / "golden" / "facts-gpt2") if name == "golden" else name)
    facts = trial_facts(lm, 8, seed=11, paraphrases=3, neighbours=6, others=1)
    assert len(facts) == 8
    config = METHODS[method].config.recommended(lm)
    assert config.edited is not None
    moments = find_moments(lm, config.edited)
    delta = edit(lm, facts, method, config, moments=moments)

    def shares(*changes: Delta) -> tuple[float, float, float]:
        near = [(probe.prompt, probe.expected or "") for fact in facts for probe in fact.neighbours]
        other = [(text, fact.target or "") for fact in facts for text in fact.paraphrase_texts]
        asked = [[(fact.text, fact.target or "") for fact in facts], other, near]
        with applied(lm, changes):
            efficacy, generalization, specificity = (
                statistics.fmean(lm.says(*map(list, zip(*pairs, strict=True)))) for pairs in asked
            )
        return efficacy, generalization, specificity

    assert shares()[:2] == (0.0, 0.0) and shares()[2] == 1.0
    found = shares(delta)
    assert all(share >= bound for share, bound in zip(found, least, strict=True)), found
    noise = {
        layer: torch.randn(left.shape, generator=torch.Generator().manual_seed(0))
        for layer, (left, _) in delta.layers.items()
    }
    random = {
        layer: (noise[layer] * left.norm() / noise[layer].norm(), right)
        for layer, (left, right) in delta.layers.items()
    }
    assert max(shares(dataclasses.replace(delta, layers=random))[:2]) < 0.2


def test_targets_are_those_of_the_facts_and_of_the_place() -> None:
    lm = model("gpt2")
    config = MemitConfig((0, 1), **SEARCH)  # type: ignore[arg-type]
    found = find_targets(lm, FACTS, 1, config, CONTEXTS, site="stream")
    moments = moments_of(lm)

    def write(facts: list[Fact], config: MemitConfig, targets: object = found) -> Delta:
        return memit(lm, facts, config, moments=moments, contexts=CONTEXTS, targets=targets)  # type: ignore[arg-type]

    assert torch.equal(write(FACTS, config).v_star, found.v_star)
    for facts, changed, targets, words in (
        (FACTS[::-1], config, found, "another order"),
        (FACTS[:2], config, found, "those of 3 other facts"),
        (
            FACTS,
            dataclasses.replace(config, layers=(0,)),
            found,
            "at layer 1; expected .* at layer 0",
        ),
        (FACTS, config, find_targets(lm, FACTS, 1, config, CONTEXTS), 'site "ffn"'),
        (FACTS, config, 5, "got int"),
    ):
        with pytest.raises(InputError, match=words):
            write(facts, changed, targets)


def test_arguments_of_another_kind_are_refused_in_words() -> None:
    lm = model("gpt2")
    moments, config = moments_of(lm), CONFIGS["memit"]
    for changes, words in (
        ({"config": RomeConfig(layer=1)}, "memit takes a MemitConfig; got RomeConfig"),
        ({"earlier": [1]}, "got int"),
        ({"earlier": 1}, "must be a list of deltas"),
        ({"moments": None}, "got NoneType"),
    ):
        with pytest.raises(InputError, match=words):
            memit(
                lm, FACTS, **{"config": config, "moments": moments, "contexts": CONTEXTS, **changes}
            )
    first = memit(lm, FACTS[:1], config, moments=moments, contexts=CONTEXTS)  # type: ignore[arg-type]
    alone, listed = (
        memit(lm, FACTS[1:], config, moments=moments, contexts=CONTEXTS, beneath=e)
        for e in (first, [first])
    )  # type: ignore[arg-type]
    assert torch.equal(alone.dense(1), listed.dense(1))


@pytest.mark.parametrize("ridge", [0.1, 2.0])
def test_emmet_with_a_ridge_keeps_earlier_keys_as_memit_does(ridge: float) -> None:
    draw = torch.Generator().manual_seed(0)
    samples, keys, before, residuals = (
        torch.randn(*size, generator=draw).double()
        for size in ((400, 12), (3, 12), (4, 12), (3, 5))
    )
    moment = SecondMoment.from_matrix(samples.T @ samples / 400, count=400)
    left, right = EmmetConfig((0,), moment_weight=50.0, ridge=ridge).update(
        keys, residuals, moment, before.T @ before
    )
    system = 50 * ridge * moment.matrix + before.T @ before + keys.T @ keys
    torch.testing.assert_close(
        left @ right, torch.linalg.solve(system, keys.T @ residuals).T, rtol=1e-8, atol=1e-10
    )
    lighter = 50 * ridge * moment.matrix + ridge * before.T @ before + keys.T @ keys
    assert not torch.allclose(
        left @ right, torch.linalg.solve(lighter, keys.T @ residuals).T, rtol=1e-2
    ), "the control"


def test_second_moments_of_another_model_or_of_several_texts_are_refused(
    tiny_gpt2: LanguageModel,
) -> None:
    fact = Fact("Edwin", "{} is a", "king")
    config = MemitConfig((0, 1), steps=2)
    moments = second_moments(tiny_gpt2, TEXTS, [0, 1])
    first = memit(tiny_gpt2, fact, config, moments=moments, contexts=["{}"])
    foreign = {
        layer: dataclasses.replace(moment, fingerprint="0" * 64)
        for layer, moment in moments.items()
    }
    other = second_moments(tiny_gpt2, TEXTS[1:], [1])
    with applied(tiny_gpt2, first):
        more = Fact("Paris", "{} is in", "Brazil")
        assert (
            memit(tiny_gpt2, more, config, moments=moments, contexts=["{}"], beneath=[first]).rank
            == 1
        )
        with pytest.raises(FingerprintError, match="without its edits"):
            memit(tiny_gpt2, more, config, moments=foreign, contexts=["{}"], beneath=[first])
    with pytest.raises(
        InputError,
        match=f"layer 0 from {moments[0].corpus[:12]}, layer 1 from {other[1].corpus[:12]}",
    ):
        memit(tiny_gpt2, fact, config, moments={0: moments[0], **other}, contexts=["{}"])


def test_what_cannot_be_used_is_refused_in_words(tiny_gpt2: LanguageModel) -> None:
    fact, config, moments = (
        Fact("Edwin", "{} is a", "king"),
        MemitConfig((0, 1), steps=2),
        second_moments(tiny_gpt2, TEXTS, [0, 1]),
    )
    wrong: list[dict[str, Any]] = [
        {"facts": None},
        {"moments": {0: torch.eye(128), 1: moments[1]}},
        {"contexts": ["{}", 3]},
        {"contexts": None, "seed": "x"},
    ]
    for change in wrong:
        arguments: dict[str, Any] = {
            "facts": fact,
            "moments": moments,
            "contexts": ["{}"],
            **change,
        }
        with pytest.raises(InputError):
            memit(tiny_gpt2, arguments.pop("facts"), config, **arguments)
    for count in (float("nan"), "x", True):
        with pytest.raises(InputError, match="count is"):
            SecondMoment.from_matrix(torch.eye(3), count=count)  # type: ignore[arg-type]
    assert torch.equal(SecondMoment.from_matrix(np.eye(3), count=7).matrix, torch.eye(3).double())
    for batch in ("5", None, 0, -1, float("nan")):
        with pytest.raises(InputError, match="batch_tokens"):
            second_moments(tiny_gpt2, TEXTS, [0], batch_tokens=batch)  # type: ignore[arg-type]
    numbers = AlphaEditConfig((np.int64(0),), lr=np.float32(0.5), steps=np.int64(3))  # type: ignore[arg-type]
    assert (
        (numbers.layers, numbers.lr, numbers.steps) == ((0,), 0.5, 3)
        and type(numbers.lr) is float
        and type(numbers.steps) is int
    )
    for odd in (
        {"lr": True},
        {"clamp": True},
        {"threshold": "abc"},
        {"threshold": None, "energy": "abc"},
        {"norm_anchor": True},
    ):
        with pytest.raises(InputError):
            AlphaEditConfig((0,), **odd)  # type: ignore[arg-type]


def test_a_null_space_without_any_text_is_said_to_be_that() -> None:
    one = torch.zeros(12, 12)
    one[0, 0] = 1.0
    config = dataclasses.replace(
        AlphaEditConfig(**{**AlphaEditConfig.scale_free(), "layers": (0,)}), moment_weight=10.0
    )
    with pytest.raises(NumericsError, match="too little text"):
        config.update(
            torch.ones(2, 12), torch.ones(2, 5), SecondMoment.from_matrix(one, count=1), None
        )
    full = SecondMoment.from_matrix(torch.diag(torch.arange(1.0, 13.0)), count=100)
    assert config.update(torch.ones(2, 12), torch.ones(2, 5), full, None)[0].shape == (5, 2)
