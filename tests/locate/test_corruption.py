"""Noise and replaced subjects: the same numbers as full passes, the right scale, clear refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from factsmith import atlas
from factsmith.core.errors import InputError
from factsmith.locate import corruption
from factsmith.locate.causal import causal_trace
from factsmith.locate.corruption import Corruption, TracedPrompt
from factsmith.model.load import load
from tracing import PROMPT, SAMPLES, SUBJECT, fitting, model, oracle


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
    # Corrupted, the model says another country's currency. The subject's early states bring the
    # right one back.
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


def test_noise_that_is_zero_everywhere_is_refused() -> None:
    lm = model("gpt2")
    start, stop = causal_trace(lm, PROMPT, SUBJECT, samples=1).subject_span
    given = np.zeros((2, stop - start, 32))
    with pytest.raises(InputError, match="zero everywhere"):
        causal_trace(lm, PROMPT, SUBJECT, noise_tensor=given)
    given[1, 0, 0] = 1  # the control
    assert causal_trace(lm, PROMPT, SUBJECT, noise_tensor=given).samples == 2


def test_the_inputs_of_the_corrupted_runs() -> None:
    lm = model("llama")
    prompt = TracedPrompt.read(lm, "The mother tongue of {} is", SUBJECT)
    assert prompt.text == PROMPT and list(prompt.ids) == lm.prompt_ids(PROMPT)
    inputs = Corruption("noise", samples=2, scale=0.5).inputs(lm, prompt)
    assert inputs.sequences == [list(prompt.ids)] * 2 and inputs.noise == 0.5
    assert inputs.embed is not None and inputs.replacements == ()
    before = torch.zeros(3, len(prompt.ids), lm.d_model)
    after = inputs.embed(before)
    start, stop = prompt.span
    assert (after[1:, start:stop] != 0).all() and not torch.equal(after[1], after[2])
    assert (after[0] == 0).all() and (after[:, :start] == 0).all() and (after[:, stop:] == 0).all()
    assert (before == 0).all()  # a copy is changed
    others = fitting("llama")
    replaced = Corruption("replace", replacements=others).inputs(lm, prompt)
    assert replaced.embed is None and replaced.noise == 0 and replaced.replacements == others
    texts = [PROMPT.replace(SUBJECT, other) for other in others]
    assert replaced.sequences == [lm.prompt_ids(text) for text in texts]


def test_contradictions_are_refused_when_the_corruption_is_made() -> None:
    for options, argument in [
        ({"kind": "mask"}, "corruption"),
        ({"samples": 0}, "samples"),
        ({"scale": -1.0}, "noise"),
        ({"seed": -1}, "seed"),
        ({"kind": "replace", "scale": 1.0}, "noise"),
        ({"kind": "replace", "tensor": torch.ones(1, 1, 1)}, "noise"),
        ({"replacements": ["Edwin"]}, "replacements"),
    ]:
        with pytest.raises(InputError) as refused:
            Corruption(**options)
        assert refused.value.argument == argument
