"""Targets by replay against a plain loop: every context alone, unpadded, through the whole model, with torch's own Adam."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from conftest import LLAMA, VOCAB, byte_tokenizer, merging_tokenizer, tiny_model
from factsmith.core.errors import InputError, LayerError, NumericsError, SubjectError
from factsmith.core.fact import Fact
from factsmith.edit import target as search
from factsmith.edit.keys import Site, read_keys, read_stream, to_down
from factsmith.edit.search import find_targets
from factsmith.edit.target import TargetConfig, Targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
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
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_attention_heads": 4,
    }
    return wrap(
        tiny_model("opt", **sizes, max_position_embeddings=64, vocab_size=VOCAB),
        byte_tokenizer(bos=True),
    )


@pytest.fixture(scope="module")
def tiny_granite() -> LanguageModel:
    """Multiplies what the FFN puts out before it adds it to the stream."""
    return wrap(tiny_model("granite", **LLAMA, residual_multiplier=0.3), byte_tokenizer(bos=True))


@pytest.fixture(params=["gpt2", "llama", "gemma2", "opt", "granite"])
def family(request: pytest.FixtureRequest) -> LanguageModel:
    found: LanguageModel = request.getfixturevalue(f"tiny_{request.param}")
    return found


def plain_search(
    lm: LanguageModel,
    fact: Fact,
    layer: int,
    config: TargetConfig,
    contexts: Sequence[str],
    site: Site = "ffn",
) -> dict[str, Any]:
    """Equation 4 of ROME, as slowly and as plainly as it can be written."""
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


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("site", ["ffn", "stream"])
@pytest.mark.parametrize(
    "layer", [0, 1]
)  # at the last layer nothing but the guard depends on δ: Adam would amplify rounding
def test_equals_the_plain_loop(
    family: LanguageModel, layer: int, site: Site, no_hooks_left: Callable[[LanguageModel], None]
) -> None:
    config = TargetConfig(steps=8, lr=0.2, weight_decay=0.1)
    found = find_targets(family, FACTS, layer, config, CONTEXTS, site=site)
    no_hooks_left(family)
    for i, fact in enumerate(FACTS):
        expected = plain_search(family, fact, layer, config, CONTEXTS, site)
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
            keys.append(
                tiny_lm.coefficients(text, [1])[0, subject_span(tiny_lm, text, fact.subject)[1] - 1]
            )
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


@pytest.mark.parametrize(
    ("scale", "site"), [("paper", "ffn"), ("auto", "ffn"), ("paper", "stream")]
)
def test_batch_equals_one_by_one_while_facts_leave(
    family: LanguageModel, scale: Any, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_PASS", (10**9, 10**9))  # one batch, whatever it costs in padding
    config = TargetConfig(
        steps=16, stop_loss=0, lr=0.4, kl_factor=0.01, weight_decay=0.01, clamp=20, scale=scale
    )
    reached = sorted(
        c["loss" if scale == "paper" else "nll"]
        for c in find_targets(family, FACTS, 0, config, CONTEXTS, site=site).convergence
    )
    config = dataclasses.replace(
        config, stop_loss=reached[1] + 0.02
    )  # two facts get there, the third goes on to the end
    together = find_targets(family, FACTS, 0, config, CONTEXTS, site=site)
    steps = [c["steps"] for c in together.convergence]
    assert len(set(steps)) > 1 and any(1 < s < 16 for s in steps), (
        f"the facts should leave at different steps; got {steps}"
    )
    for i, fact in enumerate(FACTS):
        same(together, find_targets(family, [fact], 0, config, CONTEXTS, site=site), i)
    tight = find_targets(
        family, FACTS, 0, config, CONTEXTS, site=site, memory=1
    )  # one fact a batch
    for name in ("v_star", "k_star"):
        assert relative(getattr(tight, name), getattr(together, name)) < 1e-4


def test_paper_stops_on_the_loss_and_clamps(tiny_gpt2: LanguageModel) -> None:
    found = find_targets(tiny_gpt2, FACTS[:1], 0, TargetConfig(clamp=0.5, steps=10), CONTEXTS)
    record = found.convergence[0]
    delta = found.v_star[0] - found.v_initial[0]
    assert float(delta.norm()) == pytest.approx(0.5 * float(found.v_initial[0].norm()), rel=1e-5)
    assert (
        record["limit"] == pytest.approx(record["norm"], rel=1e-5) and record["stopped"] == "steps"
    )
    early = find_targets(
        tiny_gpt2, FACTS[:1], 0, TargetConfig(stop_loss=100), CONTEXTS
    ).convergence[0]
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
    assert large["auto"].convergence[0]["nll"] == pytest.approx(
        small["auto"].convergence[0]["nll"], abs=1e-3
    )
    assert relative(large["paper"].v_star, 10 * small["paper"].v_star) > 0.1, (
        "the reference formulas do depend on them"
    )


def test_merging_tokenizer() -> None:
    """Tokens that reach over the subject's edge; the same answer as the plain loop."""
    lm = wrap(tiny_model("llama", **LLAMA), merging_tokenizer())
    fact = Fact("Danielle Darrieux", "The mother tongue of {} is", "French")
    config = TargetConfig(steps=4)
    found = find_targets(lm, [fact], 1, config, CONTEXTS[:2])
    assert (
        relative(found.v_star[0], plain_search(lm, fact, 1, config, CONTEXTS[:2])["v_star"]) < 1e-4
    )


@pytest.mark.parametrize(
    ("fact", "contexts"),
    [
        (Fact("A", "{} is", "B"), ["{}"]),  # nothing before the subject
        (Fact("Edwin", "{}", "king"), ["{}", "The. {}"]),  # nothing but the subject
        (
            Fact(" Edwin ", "So {}, the", "king of all of them"),
            ["{}", "The. {}"],
        ),  # white space around it, a long target
        (Fact("São Paulo", "{} lies in", "日本"), ["{}", "X {}"]),  # characters of several tokens
    ],
)
def test_odd_facts(tiny_lm: LanguageModel, fact: Fact, contexts: list[str]) -> None:
    config = TargetConfig(steps=4)
    found = find_targets(tiny_lm, [fact], 0, config, contexts)
    assert (
        relative(found.v_star[0], plain_search(tiny_lm, fact, 0, config, contexts)["v_star"]) < 1e-4
    )


def test_targets_with_and_without_leading_space_are_one(tiny_lm: LanguageModel) -> None:
    spaced = [Fact("Edwin", "{} is a", target) for target in ("king", " king")]
    found = find_targets(tiny_lm, spaced, 1, TargetConfig(steps=3), CONTEXTS)
    torch.testing.assert_close(found.v_star[0], found.v_star[1])


def test_a_context_may_name_the_subject(tiny_gpt2: LanguageModel) -> None:
    fact = Fact("Paris", "{} is the capital of", "Brazil")
    found = find_targets(
        tiny_gpt2, [fact], 1, TargetConfig(steps=1), ["{}", "Paris is in France. {}"]
    )
    text = "Paris is in France. Paris is the capital of"
    last = max(
        i
        for i, (a, b) in enumerate(
            tiny_gpt2.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        )
        if a < 25 and b > 20
    )
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
    lm = wrap(
        tiny_model("gpt2", n_layer=2, n_embd=32, n_head=4, n_positions=64, vocab_size=VOCAB),
        byte_tokenizer(),
    )
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


# ── facts to be forgotten ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_forgetting_equals_the_plain_loop(family: LanguageModel) -> None:
    """Beside a fact that is written, so that both kinds share a batch."""
    facts = [
        Fact("Edwin", "{} is the king of all", None),
        FACTS[0],
        Fact("LeBron James", "What {} plays is", None),
    ]
    config = TargetConfig(steps=8, lr=0.2, weight_decay=0.01, stop_loss=0)
    found = find_targets(family, facts, 0, config, CONTEXTS[:2])
    for i, fact in enumerate(facts):
        expected = plain_search(family, fact, 0, config, CONTEXTS[:2])
        assert relative(found.v_star[i], expected["v_star"]) < 1e-4
        assert found.convergence[i]["nll"] == pytest.approx(expected["nll"], abs=1e-4)
    first = find_targets(family, facts, 0, TargetConfig(steps=1), CONTEXTS[:2])
    for i in (0, 2):
        assert found.convergence[i]["nll"] < 0.95 * first.convergence[i]["nll"], (
            "closer to what is said without the subject"
        )


# ── what stands in a pass today ─────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def plain_states(
    lm: LanguageModel, template: str, subject: str, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The down-projection's input and the layer's output at the subject, from one unpadded pass with plain hooks."""
    seen: dict[str, torch.Tensor] = {}
    text = template.replace("{}", subject)
    column = subject_span(lm, text, subject)[1] - 1

    def of(value: Any) -> torch.Tensor:
        states: torch.Tensor = value[0] if isinstance(value, (tuple, list)) else value
        return states.reshape(-1, states.shape[-1])[column].clone()

    handles = [
        lm.ffn[layer].down.register_forward_hook(lambda m, args, out: seen.update(key=of(args))),
        lm.layers[layer].register_forward_hook(lambda m, args, out: seen.update(stream=of(out))),
    ]
    lm.module(input_ids=torch.tensor([lm.tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return seen["key"], seen["stream"]


@pytest.mark.parametrize(
    "name", ["tiny_gpt2", "tiny_llama", "tiny_gemma2", "tiny_opt", "tiny_uncached"]
)
def test_keys_and_stream_equal_plain_hooks(name: str, request: pytest.FixtureRequest) -> None:
    lm: LanguageModel = request.getfixturevalue(name)
    for facts in (
        FACTS,
        FACTS[:1],
        [*FACTS, Fact("A", "{} is", "B")],
    ):  # rows of different lengths in one batch; one row
        for layer in (0, 2):
            keys, stream = read_keys(lm, facts, layer, CONTEXTS), read_stream(lm, facts, layer)
            assert keys.dtype == stream.dtype == torch.float32
            for i, fact in enumerate(facts):
                torch.testing.assert_close(
                    stream[i],
                    plain_states(lm, fact.prompt, fact.subject, layer)[1],
                    atol=1e-5,
                    rtol=1e-4,
                )
                for c, context in enumerate(CONTEXTS):
                    key = plain_states(lm, context.replace("{}", fact.prompt), fact.subject, layer)[
                        0
                    ]
                    torch.testing.assert_close(keys[i, c], key, atol=1e-5, rtol=1e-4)
                    assert (
                        relative(keys[i, c], plain_states(lm, fact.prompt, fact.subject, 1)[0])
                        > 1e-2
                    ), "another layer is told apart"


# ── from the stream back to the down-projection ─────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def stream_after(lm: LanguageModel, fact: Fact, layer: int, added: torch.Tensor) -> torch.Tensor:
    """The layer's output at the subject when something is added to its down-projection's output there."""
    column = subject_span(lm, fact.text, fact.subject)[1] - 1

    def change(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[0, column] += added
        return changed

    handle = lm.ffn[layer].down.register_forward_hook(change)
    try:
        return plain_states(lm, fact.prompt, fact.subject, layer)[1]
    finally:
        handle.remove()


def test_to_down_through_a_multiplier(
    tiny_granite: LanguageModel, tiny_llama: LanguageModel
) -> None:
    change = torch.randn(len(FACTS), 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_down(tiny_llama, FACTS, 1, change), change), (
        "nothing stands between there"
    )
    added = to_down(tiny_granite, FACTS, 1, change)
    before = read_stream(tiny_granite, FACTS, 1)
    for i, fact in enumerate(FACTS):
        assert relative(stream_after(tiny_granite, fact, 1, added[i]) - before[i], change[i]) < 1e-3
        assert (
            relative(stream_after(tiny_granite, fact, 1, change[i]) - before[i], change[i]) > 0.5
        ), "the change itself is not it"


def test_to_down_through_a_norm(tiny_gemma2: LanguageModel) -> None:
    """What the FFN adds to the stream can be turned, not lengthened: a turn is reached, and of anything else what is nearest."""
    draw = torch.Generator().manual_seed(0)
    reachable = []
    for fact in FACTS:
        other = torch.randn(32, generator=draw)
        reachable.append(
            stream_after(tiny_gemma2, fact, 1, other)
            - plain_states(tiny_gemma2, fact.prompt, fact.subject, 1)[1]
        )
    before = read_stream(tiny_gemma2, FACTS, 1)
    for change, is_reachable in (
        (torch.stack(reachable), True),
        (torch.randn(len(FACTS), 32, generator=draw), False),
    ):
        added = to_down(tiny_gemma2, FACTS, 1, change)
        alone = torch.cat(
            [to_down(tiny_gemma2, [fact], 1, change[i : i + 1]) for i, fact in enumerate(FACTS)]
        )
        for i, fact in enumerate(FACTS):
            ours = relative(stream_after(tiny_gemma2, fact, 1, added[i]) - before[i], change[i])
            naive = relative(stream_after(tiny_gemma2, fact, 1, change[i]) - before[i], change[i])
            assert ours < (1e-2 if is_reachable else 0.9 * naive)
            assert not is_reachable or naive > 0.1, "the change itself is not it"
            by_itself = relative(
                stream_after(tiny_gemma2, fact, 1, alone[i]) - before[i], change[i]
            )
            assert ours == pytest.approx(by_itself, abs=1e-2), (
                "facts do not get in one another's way"
            )


# ── cost and precision ──────────────────────────────────────────────────────────────────────────────────────────────────────


def peak(run: Callable[[], Any]) -> int:
    """The most bytes held at a time, beyond what was held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        run()
    held = most = 0
    for event in sorted(
        (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):  # type: ignore[union-attr]
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_batch_stays_within_its_memory(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = (
        {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 64, "vocab_size": 4000}
        if family == "gpt2"
        else {
            **LLAMA,
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "intermediate_size": 384,
            "vocab_size": 4000,
        }
    )
    lm = wrap(tiny_model(family, **changes), byte_tokenizer(bos=family != "gpt2"))
    facts = [
        Fact(f"{fact.subject} {i}", fact.prompt, fact.target) for i in range(6) for fact in FACTS
    ]
    sizes: list[int] = []
    inner = search._search
    monkeypatch.setattr(
        search,
        "_search",
        lambda questions, *a: sizes.append(len(questions)) or inner(questions, *a),
    )
    config = TargetConfig(steps=2, stop_loss=0)
    taken = {}
    for budget in (2**40, 20_000_000):
        sizes.clear()
        taken[budget] = peak(
            lambda budget=budget: find_targets(lm, facts, 0, config, CONTEXTS, memory=budget)
        )
        assert sum(sizes) == len(facts)
    assert taken[20_000_000] <= 20_000_000 < taken[2**40], "all at once would not have fitted"
    assert max(sizes) > 1 and taken[20_000_000] > 5_000_000, "and the budget is made use of"


def test_batches_cost_as_little_as_any_cut(tiny_gpt2: LanguageModel) -> None:
    """Against every way to cut the sorted list."""
    sizes = [search._Size(7, width, width + 9, 8) for width in (5, 2, 12, 2, 3, 13, 2, 4, 6)]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i].width)

    def cost(batches: Sequence[Sequence[int]]) -> int:
        return sum(
            20 + sum(sizes[i].rows for i in batch) * max(sizes[i].width for i in batch)
            for batch in batches
        )

    cuts = []
    for mask in range(2 ** (len(order) - 1)):
        at = [0, *(i + 1 for i in range(len(order) - 1) if mask >> i & 1), len(order)]
        cuts.append([order[a:b] for a, b in itertools.pairwise(at)])
    found = search._batches(sizes, tiny_gpt2, 0, 2**40)
    assert sorted(i for batch in found for i in batch) == list(range(len(sizes)))
    assert cost(found) == min(map(cost, cuts)) < min(cost([order]), cost([[i] for i in order]))
    alone = search._bytes(sizes[0], tiny_gpt2, 0)
    assert max(len(batch) for batch in search._batches(sizes, tiny_gpt2, 0, alone)) < max(
        map(len, found)
    )
    assert search._batches(sizes, tiny_gpt2, 0, 1) == [[i] for i in order], (
        "one fact is always tried"
    )


def test_no_gradient_of_a_weight_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a caller has told the weights to ask for gradients since."""
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
        found = find_targets(tiny_llama, FACTS, 0, config, CONTEXTS, site="stream")
    half = wrap(tiny_model("llama", **LLAMA).to(torch.bfloat16), tiny_llama.tokenizer)
    coarse = find_targets(half, FACTS, 0, config, CONTEXTS, site="stream")
    for other in (found, coarse):
        assert other.v_star.dtype == other.k_star.dtype == torch.float32
        moved, wanted = other.v_star - other.v_initial, exact.v_star - exact.v_initial
        assert torch.nn.functional.cosine_similarity(moved, wanted).min() > 0.9
        assert not torch.equal(moved, moved.to(torch.bfloat16).float()), (
            "δ is not rounded to what the model computes in"
        )
