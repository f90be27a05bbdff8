"""Causal tracing against the plain loop of full passes, the reference's golden scores, and what cannot depend on the model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from functools import lru_cache, reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import (
    GPT2,
    LLAMA,
    TEXTS,
    VOCAB,
    byte_tokenizer,
    merging_tokenizer,
    shared_dir,
    tiny_model,
)
from factsmith import atlas
from factsmith.core.errors import InputError, LayerError, NumericsError, SubjectError
from factsmith.locate import batching, corruption, runs, sweep
from factsmith.locate.causal import causal_trace
from factsmith.locate.corruption import Corruption
from factsmith.locate.kinds import Restoration
from factsmith.locate.records import CausalTrace
from factsmith.locate.runs import record_runs
from factsmith.locate.sweep import trace_runs
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from factsmith.model.trace import hook_count

KINDS = ("state", "mlp", "attention")
PROMPT, SUBJECT = "The mother tongue of Danielle Darrieux is", "Danielle Darrieux"
SAMPLES = 3

SMALL = {**LLAMA, "head_dim": 8}
SHORT = {"n_positions": 64, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 0}
# family: (config, tokenizer, layers, FFN output, attention output), the parts by their names in transformers
FAMILIES: dict[str, tuple[dict[str, Any], Callable[[], Any], str, str, str]] = {
    "gpt2": (GPT2, byte_tokenizer, "transformer.h", "mlp", "attn"),
    "llama": (LLAMA, lambda: byte_tokenizer(bos=True), "model.layers", "mlp", "self_attn"),
    "gptj": (
        {**SHORT, "n_layer": 3, "n_embd": 32, "n_head": 4, "rotary_dim": 4},
        byte_tokenizer,
        "transformer.h",
        "mlp",
        "attn",
    ),
    "gemma2": (
        {**SMALL, "sliding_window": 6},
        merging_tokenizer,
        "model.layers",
        "mlp",
        "self_attn",
    ),
    "qwen3": (SMALL, byte_tokenizer, "model.layers", "mlp", "self_attn"),
    # Both parts of a Bloom layer add the residual stream themselves; what they contribute is their last linear's output.
    "bloom": (
        {
            "n_layer": 3,
            "hidden_size": 32,
            "n_head": 4,
            "vocab_size": VOCAB,
            "bos_token_id": 1,
            "eos_token_id": 0,
        },
        byte_tokenizer,
        "transformer.h",
        "mlp.dense_4h_to_h",
        "self_attention.dense",
    ),
    "opt": (
        {
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "vocab_size": VOCAB,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        byte_tokenizer,
        "model.decoder.layers",
        "fc2",
        "self_attn",
    ),
    "mixtral": (
        {**SMALL, "num_local_experts": 4},
        byte_tokenizer,
        "model.layers",
        "mlp",
        "self_attn",
    ),
}


@lru_cache
def model(family: str) -> LanguageModel:
    config, tokenizer, *_ = FAMILIES[family]
    return wrap(tiny_model(family, **config), tokenizer())


@lru_cache
def benchmark() -> ModuleType:
    """benchmarks/locate.py, where the oracle lives."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "locate.py"
    spec = importlib.util.spec_from_file_location("benchmark_locate", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def part(module: nn.Module, path: str) -> nn.Module:
    return reduce(getattr, path.split("."), module)


def sites(lm: LanguageModel, family: str, kind: str) -> list[nn.Module]:
    """The restored modules by their names: nothing of what factsmith found out."""
    _, _, layers, mlp, attention = FAMILIES[family]
    found = list(part(lm.module, layers))
    return (
        found
        if kind == "state"
        else [part(layer, {"mlp": mlp, "attention": attention}[kind]) for layer in found]
    )


def normal(trace: CausalTrace, width: int, seed: int = 1) -> Tensor:
    start, stop = trace.subject_span
    return torch.from_numpy(
        np.random.RandomState(seed).randn(trace.samples, stop - start, width) * trace.noise
    ).float()


def oracle(family: str, trace: CausalTrace, **options: Any) -> tuple[Tensor, float, float]:
    """The plain loop on the trace's own question; with replaced subjects, each is written out as a text of its own."""
    lm = model(family)
    others = [trace.prompt.replace(trace.subject, other) for other in trace.replacements] or [
        trace.prompt
    ] * trace.samples
    rows = [lm.tokenizer(text)["input_ids"] for text in (trace.prompt, *others)]
    noise = None if trace.replacements else normal(trace, lm.d_model)
    window = None if trace.kind == "state" else trace.window
    severed = sites(lm, family, trace.sever) if trace.sever else ()
    return benchmark().plain_trace(  # type: ignore[no-any-return]
        lm.module,
        sites(lm, family, trace.kind),
        rows,
        trace.answer_ids,
        trace.subject_span,
        noise,
        window=window,
        severed=severed,
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_full_passes(family: str, kind: str) -> None:
    lm = model(family)
    trace = causal_trace(lm, PROMPT, SUBJECT, kind=kind, window=2, samples=SAMPLES)  # type: ignore[arg-type]
    scores, clean, corrupted = oracle(family, trace)
    assert trace.scores.shape == (len(trace.tokens), lm.n_layers)
    assert torch.allclose(trace.scores, scores, rtol=1e-4, atol=1e-7)
    assert (trace.scores - scores).abs().max() < 1e-5
    assert trace.clean == pytest.approx(clean, abs=1e-5) and trace.corrupted == pytest.approx(
        corrupted, abs=1e-5
    )
    # The map says something: restoring matters somewhere, far beyond what the comparison above lets pass.
    assert (trace.effects.abs() > 1e-3).any()
    assert hook_count(lm.module.modules()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_restoring_another_position_does_not_agree(kind: str) -> None:
    trace = causal_trace(model("gpt2"), PROMPT, SUBJECT, kind=kind, window=2, samples=SAMPLES)  # type: ignore[arg-type]
    wrong, _, _ = oracle("gpt2", trace, shift=1)
    assert (trace.scores - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("sever", ["mlp", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_severed_paths_agree_with_two_full_passes(family: str, sever: str) -> None:
    trace = causal_trace(model(family), PROMPT, SUBJECT, sever=sever, samples=SAMPLES)  # type: ignore[arg-type]
    scores, _, _ = oracle(family, trace)
    assert trace.sever == sever and (trace.scores - scores).abs().max() < 1e-5
    # Cutting the path matters: the plain map is another one, but for the last layer, above which there is nothing to cut.
    whole = causal_trace(model(family), PROMPT, SUBJECT, samples=SAMPLES)
    assert (trace.scores - whole.scores).abs().max() > 1e-3
    assert torch.allclose(trace.scores[:, -1], whole.scores[:, -1], atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"kind": "mlp"}, {"kind": "attention"}, {"sever": "mlp"}, {"target": "French king"}],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_replaced_subjects_agree_with_full_passes(family: str, options: dict[str, Any]) -> None:
    others = fitting(family)
    trace = causal_trace(
        model(family),
        PROMPT,
        SUBJECT,
        corruption="replace",
        replacements=others,
        window=2,
        **options,
    )
    scores, clean, corrupted = oracle(family, trace)
    assert (
        trace.replacements == others
        and trace.samples == len(others)
        and trace.seed is None
        and trace.noise == 0
    )
    assert torch.allclose(trace.scores, scores, rtol=1e-3, atol=0)
    assert trace.clean == pytest.approx(clean, rel=1e-3) and trace.corrupted == pytest.approx(
        corrupted, rel=1e-3, abs=0
    )
    fewer = causal_trace(
        model(family),
        PROMPT,
        SUBJECT,
        corruption="replace",
        replacements=others[:1],
        window=2,
        **options,
    )
    assert fewer.corrupted != pytest.approx(trace.corrupted, rel=1e-3, abs=0)


def fitting(family: str) -> tuple[str, ...]:
    """Other words with as many tokens as SUBJECT."""
    lm = model(family)
    ids = lm.tokenizer(PROMPT)["input_ids"]
    words = " ".join(TEXTS).replace(".", "").replace(",", "").split()
    made = dict.fromkeys(
        " ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, i + 5)
    )
    same = [
        m
        for m in made
        if len(lm.tokenizer(PROMPT.replace(SUBJECT, m))["input_ids"]) == len(ids) and m != SUBJECT
    ]
    assert len(same) >= 3
    return tuple(same[:3])


def test_replacements_are_drawn_from_the_bundled_subjects_by_seed() -> None:
    lm = load("atlas")
    first, again, other = (
        causal_trace(
            lm,
            "The currency of Bulgaria is the",
            "Bulgaria",
            corruption="replace",
            samples=4,
            seed=seed,
        )
        for seed in (3, 3, 4)
    )
    assert len(set(first.replacements)) == first.samples == 4 and first.seed == 3
    known = {fact.subject for fact in atlas.facts()}
    for subject in first.replacements:
        ids = lm.prompt_ids(f"The currency of {subject} is the")
        assert subject in known and subject != "Bulgaria" and len(ids) == len(first.tokens)
    assert first.replacements == again.replacements and torch.equal(first.scores, again.scores)
    assert first.replacements != other.replacements
    # The model says another country's currency now, and the subject's early states bring its own back.
    assert first.is_correct and first.corrupted < 0.5 < float(
        first.scores[first.subject_span[1] - 1].max()
    )


def test_replacements_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model("gpt2")
    for given in (("Edwin",), ("",), (SUBJECT,), (*fitting("gpt2"), SUBJECT + "s"), (), "Edwin"):
        with pytest.raises(InputError, match=r"(Give another subject|a list of subjects)"):
            causal_trace(lm, PROMPT, SUBJECT, corruption="replace", replacements=given)
    monkeypatch.setattr(
        corruption.atlas, "facts", lambda: [atlas.AtlasFact("Edwin", "P140", "Christianity")]
    )
    with pytest.raises(
        InputError, match=r"0 of the 1 bundled subjects fit .* samples is 10\. Give replacements"
    ):
        causal_trace(lm, PROMPT, SUBJECT, corruption="replace")


def test_what_the_model_would_say_is_told() -> None:
    lm = model("gpt2")
    own = causal_trace(lm, PROMPT, SUBJECT, samples=1)
    assert own.is_correct and own.predicted == own.answer
    longer = causal_trace(lm, PROMPT, SUBJECT, target="French king", samples=1)
    ids = lm.prompt_ids(PROMPT)
    for _ in longer.answer_ids:
        ids.append(int(lm.module(torch.tensor([ids])).logits[0, -1].argmax()))
    said = lm.tokenizer.decode(ids[-len(longer.answer_ids) :])
    assert not longer.is_correct and longer.predicted == said and longer.answer == " French king"
    atlas_lm = load("atlas")
    right, wrong = (
        causal_trace(
            atlas_lm, "The official language of Austria is", "Austria", target=t, samples=1
        )
        for t in ("German", "French")
    )
    assert (
        right.is_correct and not wrong.is_correct and wrong.predicted == right.answer == " German"
    )


def test_an_answer_of_no_probability_is_refused() -> None:
    config, tokenizer, *_ = FAMILIES["gpt2"]
    module = tiny_model("gpt2", **{**config, "tie_word_embeddings": False})
    with torch.no_grad():
        module.lm_head.weight *= 1000
    with pytest.raises(NumericsError, match="probability 0"):
        causal_trace(wrap(module, tokenizer()), PROMPT, SUBJECT, target="French king", samples=1)


def test_one_recording_serves_every_map() -> None:
    lm = model("llama")
    recorded = record_runs(lm, PROMPT, SUBJECT, Corruption(samples=SAMPLES), target="F")
    for kind, sever in [("state", None), ("mlp", None), ("attention", None), ("state", "mlp")]:
        alone = causal_trace(
            lm, PROMPT, SUBJECT, target="F", kind=kind, sever=sever, window=2, samples=SAMPLES
        )  # type: ignore[arg-type]
        shared = trace_runs(recorded, Restoration(kind, 2, sever))  # type: ignore[arg-type]
        assert torch.allclose(shared.scores, alone.scores, atol=1e-7)


@pytest.mark.parametrize(("window", "family"), [(1, "gpt2"), (3, "llama"), (10, "gptj")])
def test_windows_are_cut_like_the_reference(window: int, family: str) -> None:
    for kind in ("mlp", "attention"):
        trace = causal_trace(
            model(family), PROMPT, SUBJECT, kind=kind, window=window, samples=SAMPLES
        )  # type: ignore[arg-type]
        scores, _, _ = oracle(family, trace)
        assert (trace.scores - scores).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_answer_of_several_tokens(family: str, kind: str) -> None:
    trace = causal_trace(
        model(family), PROMPT, SUBJECT, target="French king", kind=kind, window=2, samples=SAMPLES
    )  # type: ignore[arg-type]
    assert len(trace.answer_ids) > 2 and trace.answer.strip() == "French king"
    scores, clean, corrupted = oracle(family, trace)
    assert trace.clean == pytest.approx(clean, rel=1e-3) and trace.corrupted == pytest.approx(
        corrupted, rel=1e-3
    )
    assert torch.allclose(trace.scores, scores, rtol=1e-3, atol=1e-12)
    one = causal_trace(
        model(family), PROMPT, SUBJECT, target="F", kind=kind, window=2, samples=SAMPLES
    )  # type: ignore[arg-type]
    assert one.clean > trace.clean  # joint over the tokens, not their mean


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Danielle Darrieux", "Danielle Darrieux"),  # the subject is the whole prompt
        ("The capital of France is Paris", "Paris"),  # it ends at the last token
        ("São Paulo lies in", "São Paulo"),  # characters of several bytes
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_subject_anywhere(family: str, prompt: str, subject: str) -> None:
    if family == "gemma2" and "ã" in prompt:
        prompt, subject = "Zürich lies in Brazil; Edwin", "Zürich lies"
    trace = causal_trace(model(family), prompt, subject, samples=SAMPLES)
    scores, _, _ = oracle(family, trace)
    assert (trace.scores - scores).abs().max() < 1e-5
    assert "�" not in "".join(trace.tokens)


def test_batches_cut_to_memory_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {
        kind: causal_trace(model("llama"), PROMPT, SUBJECT, kind=kind, samples=SAMPLES)
        for kind in KINDS
    }  # type: ignore[arg-type]
    monkeypatch.setattr(batching, "CPU_BATCH_BYTES", 1)
    monkeypatch.setattr(runs, "HEAD_ROWS", 1)
    monkeypatch.setattr(sweep, "HEAD_ROWS", 1)
    for kind, trace in whole.items():
        cut = causal_trace(model("llama"), PROMPT, SUBJECT, kind=kind, samples=SAMPLES)  # type: ignore[arg-type]
        assert torch.allclose(cut.scores, trace.scores, rtol=1e-5, atol=1e-7)


def test_without_a_prefix_cache_the_scores_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model("gpt2")
    cached = {
        kind: causal_trace(lm, PROMPT, SUBJECT, kind=kind, window=2, samples=SAMPLES)
        for kind in KINDS
    }  # type: ignore[arg-type]
    severed = causal_trace(lm, PROMPT, SUBJECT, sever="mlp", samples=SAMPLES)
    monkeypatch.setattr(lm, "caches_prefix", False)
    again = causal_trace(lm, PROMPT, SUBJECT, sever="mlp", samples=SAMPLES)
    assert torch.allclose(again.scores, severed.scores, rtol=1e-4, atol=1e-7)
    for kind, trace in cached.items():
        again = causal_trace(lm, PROMPT, SUBJECT, kind=kind, window=2, samples=SAMPLES)  # type: ignore[arg-type]
        assert torch.allclose(again.scores, trace.scores, rtol=1e-4, atol=1e-7)


def test_shortcuts_that_a_layer_does_not_allow_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers whose attention follows their MLP, and memories that are given more than the hidden state: the long way, the same numbers."""
    lm = model("gpt2")
    recorded = record_runs(lm, PROMPT, SUBJECT, Corruption(samples=SAMPLES))
    maps = [
        Restoration("state", 2),
        Restoration("mlp", 2),
        Restoration("attention", 2),
        Restoration("state", 2, "mlp"),
    ]
    short = [trace_runs(recorded, restoration).scores for restoration in maps]
    ran: list[int] = []
    plain = type(lm.layers[0]).forward

    def counted(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        ran.append(hidden.shape[0] * hidden.shape[1])
        return plain(self, hidden, *args, **kwargs)

    monkeypatch.setattr(type(lm.layers[0]), "forward", counted)
    trace_runs(recorded, Restoration("mlp", 2))
    cells = sum(ran)
    monkeypatch.setattr(batching, "tensors", lambda value: iter((value, value)))
    long = dataclasses.replace(recorded, attention_last=(True,) * lm.n_layers)
    for restoration, scores in zip(maps, short, strict=True):
        ran.clear()
        again = trace_runs(long, restoration).scores
        assert torch.allclose(again, scores, rtol=1e-4, atol=1e-7)
        assert sum(ran) > cells or restoration.kind != "mlp"  # it was a longer way


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_spread_over_devices(family: str, device: str) -> None:
    """Embedding, layers and head apart, as `device_map` puts them. On one device the same hooks are there, and nothing moves."""
    accelerate = pytest.importorskip("accelerate")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no accelerator")
    config, tokenizer, layers, *_ = FAMILIES[family]
    module = tiny_model(family, **{**config, "tie_word_embeddings": False})
    plain = wrap(tiny_model(family, **{**config, "tie_word_embeddings": False}), tokenizer())
    trunk = layers.partition(".")[0]
    places = {
        f"{trunk}.{name}": "cpu"
        for name, child in part(module, trunk).named_children()
        if not isinstance(child, nn.ModuleList)
    }
    places |= {f"{layers}.{layer}": device if layer % 2 else "cpu" for layer in range(3)} | {
        "lm_head": device
    }
    spread = wrap(
        accelerate.dispatch_model(
            module, {k: 0 if v == "cuda" else v for k, v in places.items()}, force_hooks=True
        ),
        tokenizer(),
    )
    for kind, sever in [*zip(KINDS, (None,) * 3, strict=True), ("state", "mlp")]:
        ours, expected = (
            causal_trace(lm, PROMPT, SUBJECT, kind=kind, sever=sever, samples=2)
            for lm in (spread, plain)
        )  # type: ignore[arg-type]
        assert (ours.scores - expected.scores).abs().max() < 1e-5
    replaced = causal_trace(
        spread, PROMPT, SUBJECT, corruption="replace", replacements=fitting(family)
    )
    assert replaced.scores.isfinite().all()


def test_half_precision_stays_near_full() -> None:
    config, tokenizer, *_ = FAMILIES["qwen3"]
    half = wrap(tiny_model("qwen3", **config).bfloat16(), tokenizer())
    for kind in KINDS:
        full, trace = (
            causal_trace(lm, PROMPT, SUBJECT, target="F", kind=kind, window=2, samples=SAMPLES)  # type: ignore[arg-type]
            for lm in (model("qwen3"), half)
        )
        assert trace.scores.dtype == torch.float32 and torch.allclose(
            trace.scores, full.scores, rtol=0.3
        )
        assert not torch.allclose(
            trace.scores, full.scores, rtol=1e-5
        )  # it did run in another precision


def test_layers_are_run_only_where_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work, counted in (row, column, layer) cells, is what the design says: a small part of the plain loop's."""
    lm = model("gpt2")
    ran = 0
    plain = type(lm.layers[0]).forward

    def counted(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        ran += hidden.shape[0] * hidden.shape[1]
        return plain(self, hidden, *args, **kwargs)

    monkeypatch.setattr(type(lm.layers[0]), "forward", counted)
    trace = causal_trace(lm, PROMPT, SUBJECT, samples=SAMPLES)
    n_tokens, start, n = len(trace.tokens), trace.subject_span[0], lm.n_layers
    columns = sum(range(1, n_tokens - start + 1))  # live columns, summed over the traced tokens
    recorded = n_tokens * n * (1 + SAMPLES)  # clean and corrupted, in one pass
    assert ran == recorded + SAMPLES * columns * n * (n - 1) // 2
    assert ran < n_tokens * n * (SAMPLES + 1) * n_tokens * n / 5


def test_edges_of_the_map_are_what_they_must_be() -> None:
    trace = causal_trace(model("llama"), PROMPT, SUBJECT, samples=SAMPLES)
    start, stop = trace.subject_span
    assert trace.tokens[0] == "<|begin|>" and start > 1
    assert "".join(trace.tokens[start:stop]).strip() == SUBJECT
    assert (
        trace.scores[:start] == trace.scores.new_tensor(trace.corrupted)
    ).all()  # before the subject: nothing to restore
    assert trace.scores[-1, -1] == pytest.approx(
        trace.clean, abs=1e-6
    )  # the last state is the answer itself
    assert torch.allclose(
        trace.scores[:-1, -1], torch.tensor(trace.corrupted), atol=1e-6
    )  # nothing reads the others' last state
    assert torch.equal(trace.effects, trace.scores - trace.corrupted)
    token, layer = trace.peak
    assert trace.scores[token, layer] == trace.scores.max()


def test_answer_is_the_models_own_next_token() -> None:
    lm = model("qwen3")
    trace = causal_trace(lm, PROMPT, SUBJECT, samples=1)
    with torch.no_grad():
        p = lm.module(torch.tensor([lm.tokenizer(PROMPT)["input_ids"]])).logits[0, -1].softmax(-1)
    assert trace.answer_ids == (int(p.argmax()),) and trace.clean == pytest.approx(
        float(p.max()), abs=1e-6
    )


def test_noise_by_seed_scale_and_tensor_are_one_thing() -> None:
    lm = model("gpt2")
    drawn = causal_trace(lm, PROMPT, SUBJECT, noise=0.7, samples=SAMPLES, seed=5)
    start, stop = drawn.subject_span
    unit = np.random.RandomState(5).randn(SAMPLES, stop - start, lm.d_model)
    scaled = causal_trace(lm, PROMPT, SUBJECT, noise_tensor=torch.from_numpy(unit) * 0.7)
    both = causal_trace(lm, PROMPT, SUBJECT, noise_tensor=unit, noise=0.7, samples=99)
    other = causal_trace(lm, PROMPT, SUBJECT, noise=0.7, samples=SAMPLES, seed=6)
    for same in (scaled, both):
        assert same.samples == SAMPLES and torch.allclose(same.scores, drawn.scores, atol=1e-6)
    assert drawn.seed == 5 and scaled.seed is both.seed is None
    assert both.noise == drawn.noise == 0.7 and scaled.noise == pytest.approx(0.7, rel=0.2)
    assert (other.scores - drawn.scores).abs().max() > 1e-3


def test_noise_is_three_sigma_of_the_embeddings_it_is_added_to() -> None:
    lm = model("gemma2")  # its embedding module multiplies the rows by the root of d_model
    trace = causal_trace(lm, PROMPT, SUBJECT, samples=1)
    start, stop = trace.subject_span
    rows = lm.module.get_input_embeddings().weight[
        torch.tensor(lm.tokenizer(PROMPT)["input_ids"][start:stop])
    ]
    assert trace.noise == pytest.approx(3 * float(rows.std()) * lm.d_model**0.5, rel=1e-5)


def test_template_and_text_are_the_same() -> None:
    lm = model("gpt2")
    text = causal_trace(lm, PROMPT, SUBJECT, samples=1)
    template = causal_trace(lm, "The mother tongue of {} is", SUBJECT, samples=1)
    assert template.prompt == PROMPT and torch.equal(template.scores, text.scores)
    braces = causal_trace(lm, f"The set {{}} of {SUBJECT} is", SUBJECT, samples=1)
    assert "{}" in braces.prompt  # the subject stands there already, so these are only braces


def test_record_is_plain_json() -> None:
    trace = causal_trace(model("gpt2"), PROMPT, SUBJECT, kind="mlp", window=4, samples=2)
    read = json.loads(json.dumps(trace.to_dict()))
    assert torch.allclose(torch.tensor(read["scores"]), trace.scores)
    assert (
        read["window"] == 4
        and read["subject_span"] == list(trace.subject_span)
        and read["tokens"] == list(trace.tokens)
    )
    with pytest.raises(AttributeError):
        trace.clean = 1.0  # type: ignore[misc]


def test_progress_is_told_token_by_token() -> None:
    told: list[tuple[int, int]] = []
    trace = causal_trace(
        model("gpt2"), PROMPT, SUBJECT, samples=1, progress=lambda done, of: told.append((done, of))
    )
    n = len(trace.tokens) - trace.subject_span[0]
    assert told == [(i + 1, n) for i in range(n)]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"subject": "Edwin"}, SubjectError, "'Edwin'"),
        ({"subject": " "}, SubjectError, "empty"),
        ({"prompt": "Paris, Paris", "subject": "Paris"}, SubjectError, "more than once"),
        ({"kind": "neuron"}, InputError, "'state', 'mlp', 'attention'"),
        ({"kind": "mlp", "window": 0}, LayerError, "window is 0"),
        ({"samples": 0}, InputError, "samples is 0"),
        (
            {"sever": "state"},
            InputError,
            "sever is 'state': it must be one of 'mlp', 'attention', None",
        ),
        ({"sever": "mlp", "kind": "mlp"}, InputError, "give kind='state'"),
        ({"corruption": "mask"}, InputError, "'noise', 'replace'"),
        ({"corruption": "replace", "noise": 0.1}, InputError, "leave the noise out"),
        ({"replacements": ["Edwin"]}, InputError, "Give corruption='replace'"),
        ({"seed": -1}, InputError, "seed is -1"),
        ({"seed": None}, InputError, "seed is None"),
        ({"seed": 1.5}, InputError, "seed is 1.5"),
        ({"seed": "a"}, InputError, "seed is 'a'"),
        ({"prompt": None}, InputError, "the prompt is None: it must be text"),
        ({"prompt": [PROMPT]}, InputError, "the prompt is "),
        ({"prompt": PROMPT + "\ud800"}, InputError, "surrogate"),
        ({"subject": None}, InputError, "the subject is None"),
        ({"target": 3}, InputError, "the target is 3"),
        ({"target": ["French"]}, InputError, "the target is "),
        ({"window": 2.5, "kind": "mlp"}, InputError, "window is 2.5"),
        ({"window": "2", "kind": "mlp"}, InputError, "window is '2'"),
        ({"window": float("nan")}, InputError, "window is nan"),
        ({"samples": 2.5}, InputError, "samples is 2.5"),
        ({"samples": "3"}, InputError, "samples is '3'"),
        ({"samples": True}, InputError, "samples is True"),
        ({"noise": "1"}, InputError, "noise is '1'"),
        ({"noise": True}, InputError, "noise is True"),
        ({"corruption": "replace", "replacements": [None]}, InputError, "a replacement is None"),
        ({"corruption": "replace", "replacements": 3}, InputError, "replacements is 3"),
        ({"noise_tensor": ["a"]}, InputError, "holds no numbers"),
        ({"noise_tensor": np.ones((2, 1, 32), complex)}, InputError, "complex"),
        ({"noise": 0.0}, InputError, "noise is 0.0"),
        ({"noise": float("nan")}, InputError, "noise is nan"),
        (
            {"noise_tensor": np.zeros((2, 1, 32))},
            InputError,
            r"shape \(2, 1, 32\); expected \(samples, \d+, 32\)",
        ),
        ({"target": "  "}, InputError, "empty"),
        ({"prompt": "word " * 80 + SUBJECT}, InputError, "64"),
    ],
)
def test_bad_input_is_refused_in_words(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    given = {"prompt": PROMPT, "subject": SUBJECT, "samples": 1, **options}
    with pytest.raises(error, match=says):
        causal_trace(model("gpt2"), given.pop("prompt"), given.pop("subject"), **given)
    assert hook_count(model("gpt2").module.modules()) == 0


def test_noise_that_is_zero_everywhere_is_refused() -> None:
    lm = model("gpt2")
    start, stop = causal_trace(lm, PROMPT, SUBJECT, samples=1).subject_span
    given = np.zeros((2, stop - start, 32))
    with pytest.raises(InputError, match="zero everywhere"):
        causal_trace(lm, PROMPT, SUBJECT, noise_tensor=given)
    given[1, 0, 0] = 1  # the control
    assert causal_trace(lm, PROMPT, SUBJECT, noise_tensor=given).samples == 2


def test_numpys_whole_numbers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = causal_trace(
        model("gpt2"), PROMPT, SUBJECT, kind="mlp", window=2, samples=2, noise=0.5, seed=3
    )
    same = causal_trace(
        model("gpt2"),
        PROMPT,
        SUBJECT,
        kind="mlp",
        window=np.int64(2),
        samples=np.int32(2),
        noise=np.float32(0.5),
        seed=np.uint8(3),
    )
    assert json.dumps(same.to_dict()) == json.dumps(plain.to_dict())


def test_a_model_s_name_is_no_model() -> None:
    with pytest.raises(InputError, match=r"the name 'atlas'; load it first: lm = factsmith.load"):
        causal_trace("atlas", PROMPT, SUBJECT)  # type: ignore[arg-type]


def test_probabilities_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericsError, match="must be finite"):
        causal_trace(model("gpt2"), PROMPT, SUBJECT, noise=1e38, samples=1)
    assert hook_count(model("gpt2").module.modules()) == 0


@pytest.mark.parametrize(
    ("kind", "name"), [("state", "hidden"), ("mlp", "mlp"), ("attention", "attn")]
)
def test_agrees_with_the_reference(kind: str, name: str) -> None:
    golden = shared_dir() / "golden"
    asked = json.loads((golden / "causal_trace.json").read_text())
    expected = load_file(golden / "causal_trace.safetensors")
    lm = load(golden / "facts-gpt2")
    trace = causal_trace(
        lm,
        asked["prompt"],
        asked["subject"],
        kind=kind,  # type: ignore[arg-type]
        window=asked["window"],
        samples=asked["samples"],
        noise=asked["noise"],
    )
    assert trace.answer == asked["answer"] and list(trace.subject_span) == asked["subject_range"]
    assert (trace.scores - expected[f"{name}.scores"]).abs().max() < 1e-5  # asked for: 1e-4
    assert trace.clean == pytest.approx(float(expected[f"{name}.high_score"]), abs=1e-5)
    assert trace.corrupted == pytest.approx(float(expected[f"{name}.low_score"]), abs=1e-5)
