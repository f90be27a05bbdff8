"""Input statistics: the second moment of what enters a feed-forward network, with its mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from factsmith.core.errors import FingerprintError, InputError
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.corpus.moments_store import find_moments, kept_moments
from factsmith.model.language_model import LanguageModel
from factsmith.model.trace import recording

TEXTS = [f"The number {n} is written in words, and {n * 7} as well." for n in range(60)]


def inputs_of(lm: LanguageModel, layer: int) -> torch.Tensor:
    """Return what enters a feed-forward network at every token, one text after another."""
    rows = []
    for text in TEXTS:
        with torch.no_grad(), recording({"ffn": lm.ffn[layer].module}) as calls:
            lm.forward(lm.batch([text]))
        rows.append(calls["ffn"][0].input.flatten(0, 1))
    return torch.cat(rows).double()


@pytest.mark.parametrize("layer", [0, 1])
def test_mean_and_covariance_are_those_of_the_inputs(tiny_lm: LanguageModel, layer: int) -> None:
    inputs = inputs_of(tiny_lm, layer)
    moment = second_moments(tiny_lm, TEXTS, [layer], max_tokens=1e9, site="inputs")[layer]
    assert moment.count == len(inputs)
    torch.testing.assert_close(moment.mean, inputs.mean(0), rtol=1e-4, atol=1e-5)
    expected = torch.cov(inputs.T, correction=0)
    torch.testing.assert_close(moment.covariance, expected, rtol=1e-3, atol=1e-5)
    # Coefficients are something else, also where the widths agree.
    other = second_moments(tiny_lm, TEXTS, [layer], max_tokens=1e9)[layer]
    assert other.site == "coefficients"
    with pytest.raises(InputError, match="one of coefficients"):
        _ = other.mean


def test_the_sample_holds_inputs(tiny_lm: LanguageModel) -> None:
    inputs = inputs_of(tiny_lm, 1)
    moment = second_moments(tiny_lm, TEXTS, [1], max_tokens=1e9, site="inputs")[1]
    assert moment.sample is not None and len(moment.sample) == len(inputs)
    distances = torch.cdist(moment.sample.double(), inputs).amin(1)
    assert bool((distances < 1e-2).all())
    assert bool((torch.cdist(moment.sample.double() + 1, inputs).amin(1) > 1e-2).all())


def test_each_sampled_input_has_its_last_tokens(tiny_lm: LanguageModel) -> None:
    moment = second_moments(tiny_lm, TEXTS, [1], max_tokens=1e9, site="inputs")[1]
    assert moment.tails is not None and moment.sample is not None
    texts = [tiny_lm.prompt_ids(text) for text in TEXTS]
    for row in (0, 7, 200):
        tail = [token for token in moment.tails[row].tolist() if token >= 0]
        # The tail is in some text, and the input is the one at its end.
        at = [
            (ids, n)
            for ids in texts
            for n in range(len(ids))
            if ids[max(0, n + 1 - len(tail)) : n + 1] == tail and (len(tail) == 16 or n < 15)
        ]
        ids, n = at[0]
        with torch.no_grad(), recording({"ffn": tiny_lm.ffn[1].module}) as calls:
            tiny_lm.forward(tiny_lm.align([ids], [0]))
        expected = calls["ffn"][0].input.flatten(0, 1)[n]
        distance = (moment.sample[row].float() - expected).norm() / expected.norm()
        assert len(tail) < 16 or len(at) > 1 or distance < 1e-2


def test_they_are_kept_apart_from_second_moments(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    options = {"folder": tmp_path, "texts": TEXTS, "max_tokens": 500}
    inputs = find_moments(tiny_lm, [0], site="inputs", **options)[0]
    find_moments(tiny_lm, [0], **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "inputs0.safetensors",
        "layer0.safetensors",
    ]
    kept = kept_moments(tiny_lm, [0], tmp_path, site="inputs")[0]
    assert torch.equal(kept.matrix, inputs.matrix) and kept.site == "inputs"
    assert kept.sample is not None and inputs.sample is not None
    assert torch.equal(kept.sample, inputs.sample)
    assert kept_moments(tiny_lm, [0], tmp_path)[0].site == "coefficients"


def test_those_of_another_width_are_refused(tiny_lm: LanguageModel) -> None:
    wide = SecondMoment(matrix=torch.eye(tiny_lm.d_model + 9), count=9, site="inputs")
    with pytest.raises(FingerprintError, match="another model"):
        wide.check(tiny_lm, 0)
    SecondMoment(matrix=torch.eye(tiny_lm.d_model + 1), count=9, site="inputs").check(tiny_lm, 0)
