"""Causal tracing against the plain loop of full passes and the reference's golden scores."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import shared_dir, tiny_model
from factsmith.core.errors import InputError, LayerError, NumericsError, SubjectError
from factsmith.locate.attribution import attribution_trace
from factsmith.locate.causal import causal_trace
from factsmith.model.load import load, wrap
from factsmith.model.trace import hook_count
from tracing import FAMILIES, KINDS, PROMPT, SAMPLES, SUBJECT, fitting, model, oracle, part


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_full_passes(family: str, kind: str) -> None:
    lm = model(family)
    trace = causal_trace(lm, PROMPT, SUBJECT, kind=kind, window=2, samples=SAMPLES)
    scores, clean, corrupted = oracle(family, trace)
    assert trace.scores.shape == (len(trace.tokens), lm.n_layers)
    assert torch.allclose(trace.scores, scores, rtol=1e-4, atol=1e-7)
    assert (trace.scores - scores).abs().max() < 1e-5
    assert trace.clean == pytest.approx(clean, abs=1e-5) and trace.corrupted == pytest.approx(
        corrupted, abs=1e-5
    )
    # Restoring matters somewhere, by far more than the comparison above tolerates.
    assert (trace.effects.abs() > 1e-3).any()
    assert hook_count(lm.module.modules()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_restoring_another_position_does_not_agree(kind: str) -> None:
    trace = causal_trace(model("gpt2"), PROMPT, SUBJECT, kind=kind, window=2, samples=SAMPLES)
    wrong, _, _ = oracle("gpt2", trace, shift=1)
    assert (trace.scores - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("sever", ["mlp", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_severed_paths_agree_with_two_full_passes(family: str, sever: str) -> None:
    trace = causal_trace(model(family), PROMPT, SUBJECT, sever=sever, samples=SAMPLES)
    scores, _, _ = oracle(family, trace)
    assert trace.sever == sever and (trace.scores - scores).abs().max() < 1e-5
    # Cutting the path matters: the plain map differs, except in the last layer, which has no layer
    # above it to cut.
    whole = causal_trace(model(family), PROMPT, SUBJECT, samples=SAMPLES)
    assert (trace.scores - whole.scores).abs().max() > 1e-3
    assert torch.allclose(trace.scores[:, -1], whole.scores[:, -1], atol=1e-6)


def test_the_record_says_what_the_model_would_say() -> None:
    lm = model("gpt2")
    unforced = causal_trace(lm, PROMPT, SUBJECT, samples=1)
    assert unforced.is_correct and unforced.predicted == unforced.answer
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


@pytest.mark.parametrize(("window", "family"), [(1, "gpt2"), (3, "llama"), (10, "gptj")])
def test_windows_are_cut_like_the_reference(window: int, family: str) -> None:
    for kind in ("mlp", "attention"):
        trace = causal_trace(
            model(family), PROMPT, SUBJECT, kind=kind, window=window, samples=SAMPLES
        )
        scores, _, _ = oracle(family, trace)
        assert (trace.scores - scores).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_answer_of_several_tokens(family: str, kind: str) -> None:
    trace = causal_trace(
        model(family), PROMPT, SUBJECT, target="French king", kind=kind, window=2, samples=SAMPLES
    )
    assert len(trace.answer_ids) > 2 and trace.answer.strip() == "French king"
    scores, clean, corrupted = oracle(family, trace)
    assert trace.clean == pytest.approx(clean, rel=1e-3) and trace.corrupted == pytest.approx(
        corrupted, rel=1e-3
    )
    assert torch.allclose(trace.scores, scores, rtol=1e-3, atol=1e-12)
    one = causal_trace(
        model(family), PROMPT, SUBJECT, target="F", kind=kind, window=2, samples=SAMPLES
    )
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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_spread_over_devices(family: str, device: str) -> None:
    """Embedding, layers and head are on several devices, as `device_map` puts them.

    On one device the same hooks run, and nothing moves.
    """
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
        )
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
            causal_trace(lm, PROMPT, SUBJECT, target="F", kind=kind, window=2, samples=SAMPLES)
            for lm in (model("qwen3"), half)
        )
        assert trace.scores.dtype == torch.float32 and torch.allclose(
            trace.scores, full.scores, rtol=0.3
        )
        assert not torch.allclose(
            trace.scores, full.scores, rtol=1e-5
        )  # it did run in another precision


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


def test_template_and_text_are_the_same() -> None:
    lm = model("gpt2")
    text = causal_trace(lm, PROMPT, SUBJECT, samples=1)
    template = causal_trace(lm, "The mother tongue of {} is", SUBJECT, samples=1)
    assert template.prompt == PROMPT and torch.equal(template.scores, text.scores)
    braces = causal_trace(lm, f"The set {{{{}}}} of {SUBJECT} is", SUBJECT, samples=1)
    assert braces.prompt == f"The set {{}} of {SUBJECT} is"


def test_the_subject_traced_is_that_of_the_slot_or_of_the_number() -> None:
    lm, text = model("gpt2"), "Iran, in Iranian history: Iran is"
    template = causal_trace(lm, "Iran, in Iranian history: {} is", "Iran", samples=1)
    third = causal_trace(lm, text, "Iran", occurrence=3, samples=1)
    assert template.prompt == text and torch.equal(template.scores, third.scores)
    first = causal_trace(lm, text, "Iran", occurrence=1, samples=1)
    assert first.subject_span < third.subject_span
    whole = causal_trace(lm, "In Iranian history, Iran is", "Iran", samples=1)
    assert whole.subject_span[0] > 10
    with pytest.raises(SubjectError, match="more than once"):
        causal_trace(lm, text, "Iran", samples=1)
    estimate = attribution_trace(lm, text, "Iran", occurrence=3, samples=1, passes=1, check=0)
    assert estimate.subject_span == third.subject_span


def test_an_accent_or_a_space_in_another_form_is_the_same() -> None:
    lm, text = model("gpt2"), "The tongue of André Malraux is"
    usual = causal_trace(lm, text, "André Malraux", samples=1)
    for subject in ("Andre\u0301 Malraux", "André\u00a0Malraux"):
        trace = causal_trace(lm, text, subject, samples=1)
        assert trace.subject == "André Malraux" and torch.equal(trace.scores, usual.scores)
    with pytest.raises(SubjectError, match="is not in the prompt"):
        causal_trace(lm, text, "Andre Malraux", samples=1)


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
        causal_trace("atlas", PROMPT, SUBJECT)


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
        kind=kind,
        window=asked["window"],
        samples=asked["samples"],
        noise=asked["noise"],
    )
    assert trace.answer == asked["answer"] and list(trace.subject_span) == asked["subject_range"]
    assert (trace.scores - expected[f"{name}.scores"]).abs().max() < 1e-5  # asked for: 1e-4
    assert trace.clean == pytest.approx(float(expected[f"{name}.high_score"]), abs=1e-5)
    assert trace.corrupted == pytest.approx(float(expected[f"{name}.low_score"]), abs=1e-5)
