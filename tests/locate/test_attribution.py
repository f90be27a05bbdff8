"""Attribution patching where it is exact, against finite differences, and against the exact map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError, LayerError, UnsupportedModelError
from factsmith.core.fact import Fact
from factsmith.locate.attribution import AttributionTrace, attribution_trace, rank_correlation
from factsmith.locate.causal import causal_trace
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from factsmith.model.trace import replacing

KINDS = ("state", "mlp", "attention")
PROMPT, SUBJECT = "The mother tongue of Danielle Darrieux is", "Danielle Darrieux"


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_become_exact_as_the_noise_vanishes(tiny_lm: LanguageModel, kind: str) -> None:
    """In the limit only the first order remains.

    The window is 1, because the layers of a window act on each other.
    """
    errors = []
    for noise in (3e-3, 1.0):
        options: dict[str, Any] = {"kind": kind, "window": 1, "noise": noise, "samples": 4}
        exact = causal_trace(tiny_lm, PROMPT, SUBJECT, **options).effects
        estimated = attribution_trace(tiny_lm, PROMPT, SUBJECT, check=0, **options).effects
        errors.append(float((estimated - exact).abs().max() / exact.abs().max()))
    assert errors[0] < 0.03
    assert errors[1] > 10 * errors[0]  # far away it is an estimate


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_finite_differences(kind: str) -> None:
    """With one pass and one run, the estimate is a derivative that full passes give too.

    It is that of p along (clean - corrupted), at the middle of the way: two full passes a cell.
    """
    lm = wrap(tiny_model("gpt2", **GPT2).double(), byte_tokenizer())
    noise = 0.3 * np.random.RandomState(3).randn(1, len(lm.prompt_ids(SUBJECT)), lm.d_model)
    estimate = attribution_trace(
        lm, PROMPT, SUBJECT, kind=kind, window=1, noise_tensor=noise, passes=1, check=0
    )
    start, stop = estimate.subject_span
    ids = torch.tensor([lm.prompt_ids(PROMPT)])
    added = torch.from_numpy(noise[0]).float().double()
    sites = {
        "state": lm.layers,
        "mlp": [layer.mlp for layer in lm.layers],
        "attention": [layer.attn for layer in lm.layers],
    }[kind]

    def run(share: float, change: Any = None, kept: dict[int, Any] | None = None) -> float:
        def corrupt(embeddings: torch.Tensor) -> torch.Tensor:
            embeddings = embeddings.clone()
            embeddings[:, start:stop] += (1 - share) * added
            return embeddings

        changes: dict[Any, Any] = {lm.embedding: corrupt}
        for layer, site in enumerate(sites):
            if kept is not None:
                changes[site] = lambda out, layer=layer: kept.setdefault(layer, out.clone())
            elif change is not None and change[0] == layer:
                changes[site] = change[1]
        with torch.no_grad(), replacing(changes):
            return float(lm.module(ids).logits[0, -1].softmax(-1)[estimate.answer_ids[0]])

    clean: dict[int, Any] = {}
    corrupted: dict[int, Any] = {}
    run(1, kept=clean)
    run(0, kept=corrupted)
    for token, layer in [
        (start, 0),
        (stop - 1, 1),
        (stop, 0),
        (estimate.scores.shape[0] - 1, 1),
        (estimate.scores.shape[0] - 1, 2),
    ]:
        step = 1e-4 * (clean[layer] - corrupted[layer])[0, token]

        def moved(
            sign: int, token: int = token, layer: int = layer, step: torch.Tensor = step
        ) -> float:
            def change(out: torch.Tensor) -> torch.Tensor:
                out = out.clone()
                out[0, token] += sign * step
                return out

            return run(0.5, (layer, change))

        slope = (moved(1) - moved(-1)) / 2e-4
        assert float(estimate.effects[token, layer]) == pytest.approx(slope, rel=1e-3, abs=2e-7)


def test_estimates_rank_the_exact_map_of_a_model_that_knows_facts() -> None:
    lm = load("atlas")
    fact = Fact("Bulgaria", "The currency of {} is the", "lev")
    # By default one token is followed; "lev" is two.
    for kind, target in [*((kind, None) for kind in KINDS), ("state", fact.target)]:
        estimate = attribution_trace(
            lm, fact.text, fact.subject, target=target, kind=kind, window=2, check=99
        )
        exact = causal_trace(lm, fact.text, fact.subject, target=target, kind=kind, window=2)
        assert estimate.scores.shape == exact.scores.shape == (len(estimate.tokens), lm.n_layers)
        start = estimate.subject_span[0]
        ours = rank_correlation(estimate.effects[start:].flatten(), exact.effects[start:].flatten())
        assert (
            estimate.rank_correlation == pytest.approx(ours, abs=1e-3)
            and estimate.checked == exact.effects[start:].numel()
        )
        assert ours > 0.4
        # Estimates dealt to the wrong cells do not rank them.
        shuffled = estimate.effects[start:].flatten()[
            torch.randperm(estimate.checked, generator=torch.Generator().manual_seed(0))
        ]
        assert abs(rank_correlation(shuffled, exact.effects[start:].flatten())) < ours
        assert estimate.clean == pytest.approx(exact.clean) and estimate.corrupted == pytest.approx(
            exact.corrupted
        )


def test_record_is_a_trace_with_its_quality() -> None:
    lm = wrap(tiny_model("llama", **LLAMA), byte_tokenizer(bos=True))
    calls: list[tuple[int, int]] = []
    estimate = attribution_trace(
        lm,
        PROMPT,
        SUBJECT,
        passes=2,
        check=2,
        samples=2,
        progress=lambda a, b: calls.append((a, b)),
    )
    assert isinstance(estimate, AttributionTrace) and calls == [(1, 2), (2, 2)]
    assert (
        estimate.passes == 2
        and estimate.checked == 2 * lm.n_layers
        and -1 <= (estimate.rank_correlation or 0) <= 1
    )
    start = estimate.subject_span[0]
    assert torch.equal(
        estimate.scores[:start], torch.full((start, lm.n_layers), estimate.corrupted)
    )
    assert estimate.to_dict()["rank_correlation"] == estimate.rank_correlation
    unchecked = attribution_trace(lm, PROMPT, SUBJECT, passes=2, check=0, samples=2)
    assert (
        unchecked.rank_correlation is None
        and unchecked.checked == 0
        and torch.equal(unchecked.scores, estimate.scores)
    )
    other = attribution_trace(
        lm,
        PROMPT,
        SUBJECT,
        target="French king",
        check=0,
        samples=2,
        corruption="replace",
        replacements=[same(lm)],
    )
    assert (
        len(other.answer_ids) > 1
        and other.scores.shape == estimate.scores.shape
        and other.samples == 1
        and other.effects.isfinite().all()
    )


def same(lm: LanguageModel) -> str:
    """Another subject with as many tokens: SUBJECT with two letters exchanged somewhere."""
    for i in range(1, len(SUBJECT) - 2):
        other = SUBJECT[:i] + SUBJECT[i + 1] + SUBJECT[i] + SUBJECT[i + 2 :]
        if other != SUBJECT and len(lm.prompt_ids(PROMPT.replace(SUBJECT, other))) == len(
            lm.prompt_ids(PROMPT)
        ):
            return other
    raise AssertionError


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [9, 7, 3, -1], -1.0),
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),  # the textbook example of ties
        ([1, 1, 1], [1, 2, 3], 0.0),
    ],
)
def test_rank_correlation(a: list[float], b: list[float], expected: float) -> None:
    assert rank_correlation(torch.tensor(a).float(), torch.tensor(b).float()) == pytest.approx(
        expected, abs=1e-9
    )


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"passes": 0}, InputError, "passes is 0"),
        ({"passes": 1.5}, InputError, "passes is 1.5"),
        ({"check": -1}, InputError, "check is -1"),
        ({"kind": "neuron"}, InputError, "'state', 'mlp', 'attention'"),
        ({"kind": "mlp", "window": 0}, LayerError, "window is 0"),
        ({"samples": 0}, InputError, "samples is 0"),
    ],
)
def test_bad_input_is_refused_in_words(
    tiny_gpt2: LanguageModel, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        attribution_trace(tiny_gpt2, PROMPT, SUBJECT, **options)


def test_a_missing_attention_part_is_named(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_gpt2, "attention", (None, *tiny_gpt2.attention[1:]))
    for trace in (attribution_trace, causal_trace):
        with pytest.raises(UnsupportedModelError, match=r"layers \[0\] have no single part"):
            trace(tiny_gpt2, PROMPT, SUBJECT, kind="attention", samples=1)
